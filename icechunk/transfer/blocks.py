"""Reading parts of chunk objects: few large requests instead of many small ones.

`icechunk.transfer.prediction` decides what to request; `BlockReader` carries that out on one event loop. Reads that
arrive in the same turn of the loop become one request where they are near each other. Objects never change, so fetched
bytes are never stale. At most ``cache_bytes`` of bytes that no caller asked for are held, whether kept or in flight.
The fetch pool bounds the bytes that callers asked for.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import field
from functools import partial

from icechunk.format.ids import ObjectId
from icechunk.format.values import ChunkRefs
from icechunk.runtime.late_dataclass import dataclass
from icechunk.storage.port import GetResult, Octets, Range
from icechunk.transfer.fetch import FetchPool
from icechunk.transfer.flights import Flight, Reader
from icechunk.transfer.prediction import Limits, Track, Walk, merge, upcoming

__all__ = ["BlockReader"]


@dataclass(slots=True, eq=False)
class _Object:
    track: Track = field(default_factory=Track)
    kept: dict[int, Octets] = field(default_factory=dict)
    """The cached ranges, by start."""
    wanted: list[Reader[GetResult]] = field(default_factory=list)
    """Readers of this turn."""


class BlockReader:
    """Reads parts of chunk objects on one event loop.

    Parameters
    ----------
    pool
        Bounds and shares the requests.
    limits
        Sizes of requests, and of the cache.
    """

    def __init__(self, pool: FetchPool, limits: Limits | None = None) -> None:
        self._pool = pool
        self._flights = pool.flights
        self._limits = limits or Limits()
        self._objects: OrderedDict[str, _Object] = OrderedDict()
        self._kept: OrderedDict[tuple[str, int], int] = OrderedDict()
        self._kept_bytes = 0
        self._reserved_bytes = 0
        self._streamed = 0
        """Window with which an object was read to its end in order; 0 where that was not the last that happened."""
        self._turn = 0

    @property
    def held_bytes(self) -> int:
        """Bytes kept, and bytes on their way to be kept."""
        return self._kept_bytes + self._reserved_bytes

    async def read(self, key: str, start: int, end: int, *, exact: bool = False) -> Octets:
        """Bytes ``start`` to ``end`` (exclusive) of an object; fewer where it ends before. Many may come as a view.

        Parameters
        ----------
        exact
            The caller knows all that it wants: the read says nothing about what is wanted next.

        Raises
        ------
        ObjectNotFoundError, StorageError
            As `Storage.get` does.
        InvalidInputError
            The object ends at or before ``start`` (kind ``invalid-byte-range``).
        """
        if exact and (kept := self.read_nowait(key, start, end)) is not None:
            return kept
        if (exact or end - start >= self._limits.block_bytes) and not self._limits.keep_wanted:
            return await self._pool.view(key, Range(start, end))
        known, found = await self._part(key, start, end)
        if len(found) == end - start:
            return found
        parts = [found]
        # The rest lies beyond the window that the beginning was found in, or the object has ended: before the first
        # byte, the storage shall say so.
        while (start := start + len(parts[-1])) < end and (not parts[-1] or start != known.track.size):
            known, found = await self._part(key, start, end)
            parts.append(found)
        return b"".join(parts)

    def read_nowait(self, key: str, start: int, end: int) -> bytes | None:
        """The same where all of it is in the cache, and None where it is not: nothing is waited for."""
        known = self._objects.get(key)
        if known is None:
            return None
        for first, data in known.kept.items():
            if first <= start and end <= first + len(data):
                self._objects.move_to_end(key)
                self._kept.move_to_end((key, first))
                self._go_ahead(key, known, end)
                return bytes(data[start - first : end - first])
        return None

    def upcoming(self, refs: ChunkRefs, row: int, max_bytes: int) -> tuple[list[tuple[ObjectId, int, int]], int]:
        """The ranges to `prefetch` for the rows from ``row`` on, within the limits; see `prediction.upcoming`."""
        limits = self._limits
        return upcoming(
            refs,
            row,
            min(max_bytes, limits.cache_bytes // 4),
            largest_bytes=limits.block_bytes,
            gap_bytes=limits.merge_gap_bytes,
        )

    def prefetch(self, key: str, start: int, end: int) -> None:
        """Fetch a range of an object that will be wanted soon, where it is not here yet and the cache has room."""
        known = self._object(key)
        # A caller that prefetches knows better what comes next than the track of this one object.
        known.track.restart(end)
        start = self._after(key, known, start)
        while start < end:
            stop = min(end, start + self._limits.max_request_bytes)
            if not self._make_room(stop - start):
                return
            self._launch(key, known, start, stop, stop - start)
            start = self._after(key, known, stop)

    def _after(self, key: str, known: _Object, start: int) -> int:
        """The first byte from ``start`` on that is neither kept nor in flight."""
        while True:
            ends = [first + len(data) for first, data in known.kept.items() if first <= start < first + len(data)]
            ends += [int(flight.end) for flight in self._flights.of(key) if flight.covers(start)]
            if not ends:
                return start
            start = max(ends)

    async def _part(self, key: str, start: int, end: int) -> tuple[_Object, bytes]:
        """The wanted bytes as far as one piece of the object has them, one at least."""
        known = self._object(key)
        for first, data in known.kept.items():
            if first <= start < first + len(data):
                self._kept.move_to_end((key, first))
                break
        else:
            first, data = await self._fetched(key, known, start, end)
        self._go_ahead(key, known, end)
        # Of a view too: a caller that keeps a small part must not keep all of it in memory.
        return known, bytes(data[start - first : end - first])

    async def _fetched(self, key: str, known: _Object, start: int, end: int) -> tuple[int, Octets]:
        loop = asyncio.get_running_loop()
        reader: Reader[GetResult] = Reader(start, end, loop.create_future())
        launch_own = None
        if self._flights.try_join(key, reader):
            launch_own = partial(self._launch, key, known, start, end, 0)
        else:
            if not known.wanted:
                loop.call_soon(self._dispatch, key, known)
            known.wanted.append(reader)
        first, result = await self._flights.wait(key, reader, launch_own)
        # The flight may have begun before the object was forgotten and known anew.
        known.track.size = result.size
        return first, result.body

    def _object(self, key: str) -> _Object:
        known = self._objects.get(key)
        if known is not None:
            self._objects.move_to_end(key)
            return known
        known = self._objects[key] = _Object()
        if self._streamed:
            # The object before was read to its end in order: its reader goes on at the start of this one.
            known.track.walk = Walk(0, steps=self._limits.growth.steps - 1, window_bytes=self._streamed // 2)
        if len(self._objects) > self._limits.max_objects:
            old, forgotten = self._objects.popitem(last=False)
            for first in forgotten.kept:
                self._kept_bytes -= self._kept.pop((old, first))
        return known

    def _dispatch(self, key: str, known: _Object) -> None:
        wanted, known.wanted = [reader for reader in known.wanted if not reader.place.done()], []
        try:
            waiting = [reader for reader in wanted if not self._flights.try_join(key, reader)]
            for start, end in merge([(reader.start, int(reader.end)) for reader in waiting], self._limits):
                inside = [reader for reader in waiting if not reader.flights and start <= reader.start < end]
                # A block or window of the range before may reach into this one.
                inside = [reader for reader in inside if not self._flights.try_join(key, reader)]
                if inside:
                    start, end = min(reader.start for reader in inside), max(int(reader.end) for reader in inside)
                    flight = self._start(key, known, start, end)
                    for reader in inside:
                        flight.join(reader)
        except Exception as error:
            # Otherwise they would never be woken.
            for reader in wanted:
                if not reader.flights and not reader.place.done():
                    reader.place.set_exception(error)

    def _start(self, key: str, known: _Object, start: int, end: int) -> Flight[GetResult]:
        self._turn += 1
        first, last = known.track.plan(start, end, self._limits, turn=self._turn)
        if not known.track.walk.window_bytes:
            self._streamed = 0
        size = last - first
        if (size > end - start or self._limits.keep_wanted) and self._make_room(size):
            return self._launch(key, known, first, last, size)
        return self._launch(key, known, start, end, 0)

    def _go_ahead(self, key: str, known: _Object, end: int) -> None:
        window = known.track.ahead(end, self._limits)
        if window is not None and self._make_room(window[1] - window[0]):
            known.track.go_ahead(window[1], self._limits)
            self._launch(key, known, *window, window[1] - window[0])

    def _launch(self, key: str, known: _Object, start: int, end: int, reserved: int) -> Flight[GetResult]:
        """Request a range; with ``reserved`` bytes of the cache it will be kept there."""
        self._reserved_bytes += reserved
        return self._flights.launch(
            key,
            partial(self._pool.get_result, key, Range(start, end)),
            partial(self._pool.join_s, end - start),
            start=start,
            end=end,
            ended=partial(self._ended, key, reserved),
        )

    def _ended(self, key: str, reserved: int, flight: Flight[GetResult], result: GetResult | None) -> None:
        self._reserved_bytes -= reserved
        if result is not None:
            # The object may end before the range does.
            flight.end = flight.start + len(result.body)
        known = self._objects.get(key)
        if known is None:
            return
        track = known.track
        if result is None:
            track.restart(track.walk.next)
            return
        track.size = result.size
        walk = track.walk
        walk.fetched = track.clamp(walk.fetched)
        if walk.window_bytes and walk.fetched == track.size:
            self._streamed = walk.window_bytes
        if reserved:
            self._keep(key, known, flight.start, result.body)

    def _keep(self, key: str, known: _Object, start: int, data: Octets) -> None:
        if len(known.kept.get(start, b"")) >= len(data):
            return
        known.kept[start] = data
        self._kept_bytes += len(data) - self._kept.pop((key, start), 0)
        self._kept[key, start] = len(data)

    def _make_room(self, size: int) -> bool:
        """Drop the least recently used bytes until ``size`` bytes fit; False if bytes in flight need the room."""
        most = self._limits.cache_bytes - self._reserved_bytes - size
        if most < 0:
            return False
        while self._kept_bytes > most:
            (old, first), gone = self._kept.popitem(last=False)
            self._kept_bytes -= gone
            del self._objects[old].kept[first]
        return True
