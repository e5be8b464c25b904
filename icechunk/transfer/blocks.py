"""Reading parts of chunk objects: few large requests instead of many small ones.

Reads that arrive in the same turn of the loop and are near each other in one object become one request. A reader that
goes through an object in order is read ahead for, in windows that double and are fetched before they are needed. An
object that is repeatedly read at random is read in larger blocks. Objects never change, so fetched bytes are never
stale.

Reading ahead also follows an array: chunks in order are consecutive rows of a manifest, whether their objects are the
rest of this pack, the next packs, or one object each (`Walk`, `upcoming`).

The decisions are plain functions of the wanted ranges and earlier reads (`merge`, `Track`, `Walk`); `BlockReader`
carries them out on one event loop. It holds at most ``cache_bytes`` of bytes that no caller asked for, whether kept or
in flight; the fetch pool bounds the bytes that callers asked for.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np

from icechunk.format.ids import ObjectId
from icechunk.format.values import NATIVE, ChunkRefs
from icechunk.storage.port import GetResult, Octets, Range
from icechunk.transfer.fetch import FetchPool
from icechunk.transfer.flights import Flight, Reader

__all__ = [
    "FIRST_AHEAD_BYTES",
    "MOST_AHEAD_BYTES",
    "BlockReader",
    "Limits",
    "Track",
    "Walk",
    "Walks",
    "merge",
    "upcoming",
]

STEPS: Final = 8
"""Number of consecutive rows that count as a walk. zarr requests that many at once only if it wants more."""
FIRST_AHEAD_BYTES: Final = 2 * 1024 * 1024
GROWTH: Final = 4
MOST_AHEAD_BYTES: Final = 16 * 1024 * 1024
_WALKS: Final = 4
_MOST_ROWS: Final = 8192


@dataclass(slots=True)
class Walk:
    """The progress of one reader along the rows of a manifest."""

    next: int
    """The row that would continue it."""
    steps: int = 1
    """Rows that came in order."""
    fetched: int = 0
    """Rows before this one are asked for already."""
    ahead: int = 0
    """Rows that the last fetch ahead had."""
    ahead_bytes: int = 0
    """Bytes that it was allowed."""

    def wants_more(self) -> bool:
        """Whether it is a walk, and past the first quarter of what was fetched for it last.

        A quarter, since the first windows are small: what follows them has to be under way before they are used up.
        """
        return self.steps >= STEPS and self.fetched - self.next <= self.ahead * 3 // 4

    def grow(self) -> tuple[int, int]:
        """The first row to fetch next, and how many bytes."""
        grown = self.ahead_bytes * GROWTH if self.fetched > self.next else 0
        self.ahead_bytes = min(MOST_AHEAD_BYTES, max(FIRST_AHEAD_BYTES, grown))
        return max(self.next, self.fetched), self.ahead_bytes

    def fetched_to(self, row: int) -> None:
        """Everything before this row is on its way."""
        self.ahead = row - max(self.next, self.fetched)
        self.fetched = row


class Walks:
    """The few readers that read the rows of one array in order at the same time."""

    __slots__ = ("_walks",)

    def __init__(self) -> None:
        self._walks: list[Walk] = []

    def step(self, row: int) -> Walk | None:
        """Note that a row was read; returns the walk for which rows are to be read ahead now, if any."""
        walks = self._walks
        for walk in walks:
            if walk.next == row:
                walk.next = row + 1
                walk.steps += 1
                return walk if walk.wants_more() else None
        if len(walks) == _WALKS:
            # The shortest walk is dropped: random reads replace each other, not a real walk.
            walks.remove(min(walks, key=lambda walk: walk.steps))
            for walk in walks:
                walk.steps -= walk.steps // 8
        walks.append(Walk(row + 1))
        return None


def upcoming(
    refs: ChunkRefs, row: int, max_bytes: int, *, largest_bytes: int, gap_bytes: int
) -> tuple[list[tuple[ObjectId, int, int]], int]:
    """Ranges of chunk objects that the rows from ``row`` on refer to.

    Parameters
    ----------
    max_bytes
        Stop before the row that exceeds so many bytes of chunks.
    largest_bytes
        Chunks of that size and above are left out; they are worth a request of their own.
    gap_bytes
        Bytes between two chunks of an object that are cheaper to fetch than another request.

    Returns
    -------
    ranges
        Object, start and end (exclusive).
    row
        The first row that is not covered; the number of rows at the end.
    """
    stop = min(len(refs), row + _MOST_ROWS)
    length = refs.length[row:stop].astype(np.int64)
    fitting = int(np.searchsorted(np.cumsum(length), max_bytes, side="right"))
    stop = row + fitting
    wanted = row + np.flatnonzero((refs.kind[row:stop] == NATIVE) & (length[:fitting] < largest_bytes))
    return list(_ranges(refs, wanted, gap_bytes)), stop


def _ranges(refs: ChunkRefs, rows: np.ndarray, gap_bytes: int) -> Iterator[tuple[ObjectId, int, int]]:
    if not len(rows):
        return
    ids = refs.chunk_id[rows]
    start = refs.offset[rows].astype(np.int64)
    end = start + refs.length[rows].astype(np.int64)
    gaps = start[1:] - end[:-1]
    breaks = np.flatnonzero((ids[1:] != ids[:-1]) | (gaps < 0) | (gaps > gap_bytes)) + 1
    firsts, lasts = np.concatenate([[0], breaks]), np.concatenate([breaks, [len(rows)]]) - 1
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        yield ObjectId(ids[first].tobytes()), int(start[first]), int(end[last])


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes that decide what becomes one request."""

    merge_gap_bytes: int = 64 * 1024
    """Bytes between two reads that are cheaper to fetch than another request."""
    max_request_bytes: int = 4 * 1024 * 1024
    """Largest merged request, and largest window."""
    first_window_bytes: int = 256 * 1024
    """Window of the second read in order."""
    block_bytes: int = 1024 * 1024
    """Aligned block that random reads are promoted to; reads of that size and above go alone, as they are."""
    promote_after: int = 4
    """Random requests of one object before that."""
    cache_bytes: int = 64 * 1024 * 1024
    """Bytes of windows and blocks that are kept or on their way, in each loop."""
    keep_wanted: bool = False
    """Also keep what was asked for, and not only what was fetched besides."""
    max_objects: int = 4096
    """Objects whose readers are remembered."""


def merge(wanted: Sequence[tuple[int, int]], limits: Limits) -> list[tuple[int, int]]:
    """Ranges that cover all wanted ones, joined where they lie near each other.

    >>> merge([(0, 10), (70_000, 70_010), (10, 20), (9_000_000, 9_000_001)], Limits(merge_gap_bytes=70_000))
    [(0, 70010), (9000000, 9000001)]
    """
    merged: list[tuple[int, int]] = []
    for start, end in sorted(wanted):
        if merged:
            first, last = merged[-1]
            if start <= last + limits.merge_gap_bytes and max(last, end) - first <= limits.max_request_bytes:
                merged[-1] = (first, max(last, end))
                continue
        merged.append((start, end))
    return merged


@dataclass(slots=True)
class Track:
    """The reads of one object so far."""

    next: int = -1
    """The offset at which a reader in order would go on."""
    window: int = 0
    """Size of the last window; 0 where reads are not in order."""
    hits: int = 0
    """Requests that were not in order."""
    last_hit: int = 0
    """Turn of the last one."""
    size: int | None = None
    """Bytes of the object, once an answer told."""

    def plan(self, start: int, end: int, limits: Limits, *, turn: int) -> tuple[int, int]:
        """The range to fetch for a wanted one: at least that, more where the reader shows a pattern.

        Parameters
        ----------
        turn
            Counts the reader's requests of all objects: hits that lie so far apart that a block would not have
            stayed in the cache from one to the next are no reason to fetch blocks.
        """
        if self.size is not None and start >= self.size:
            # Asked for as it is, so that the storage refuses it: a block or window would come back without it.
            return start, end
        if self.next >= 0 and abs(start - self.next) <= limits.merge_gap_bytes:
            grown = max(limits.first_window_bytes, 2 * self.window, 2 * (end - start))
            self.window = min(limits.max_request_bytes, grown)
            end = max(end, start + self.window)
        else:
            self.window = 0
            if turn - self.last_hit > limits.cache_bytes // limits.block_bytes:
                self.hits = 0
            self.hits += 1
            self.last_hit = turn
            if self.hits > limits.promote_after:
                start -= start % limits.block_bytes
                end += -end % limits.block_bytes
        end = self.clamp(end)
        self.next = end
        return start, end

    def ahead(self, end: int, limits: Limits) -> tuple[int, int] | None:
        """The next window, once a reader in order is past the middle of the last one; None before that."""
        if not self.window or self.next - end > self.window // 2 or self.next == self.size:
            return None
        return self.next, self.clamp(self.next + min(limits.max_request_bytes, 2 * self.window))

    def went_ahead(self, end: int, limits: Limits) -> None:
        """The next window, which ends there, is on its way."""
        self.window = min(limits.max_request_bytes, 2 * self.window)
        self.next = end

    def clamp(self, end: int) -> int:
        """``end``, or the end of the object where that is known and comes first."""
        return end if self.size is None else min(end, self.size)


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

    async def read(self, key: str, start: int, end: int) -> Octets:
        """Bytes ``start`` to ``end`` (exclusive) of an object; fewer where it ends before. Many may come as a view.

        Raises
        ------
        ObjectNotFoundError, StorageError
            As `Storage.get` does.
        InvalidInputError
            The object ends at or before ``start`` (kind ``invalid-byte-range``).
        """
        if end - start >= self._limits.block_bytes and not self._limits.keep_wanted:
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
                if known.track.window:
                    self._go_ahead(key, known, end)
                return bytes(data[start - first : end - first])
        return None

    def upcoming(self, refs: ChunkRefs, row: int, max_bytes: int) -> tuple[list[tuple[ObjectId, int, int]], int]:
        """The ranges to `prefetch` for the rows from ``row`` on, within this reader's limits; see `walk.upcoming`."""
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
        known.track.window = 0
        known.track.next = end
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
        return first, result.body

    def _object(self, key: str) -> _Object:
        known = self._objects.get(key)
        if known is not None:
            self._objects.move_to_end(key)
            return known
        known = self._objects[key] = _Object()
        if self._streamed:
            # The object before was read to its end in order: its reader goes on at the start of this one.
            known.track.next, known.track.window = 0, self._streamed // 2
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
        if not known.track.window:
            self._streamed = 0
        size = last - first
        if (size > end - start or self._limits.keep_wanted) and self._make_room(size):
            return self._launch(key, known, first, last, size)
        return self._launch(key, known, start, end, 0)

    def _go_ahead(self, key: str, known: _Object, end: int) -> None:
        window = known.track.ahead(end, self._limits)
        if window is not None and self._make_room(window[1] - window[0]):
            known.track.went_ahead(window[1], self._limits)
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
            ended=partial(self._ended, key, known, reserved),
        )

    def _ended(
        self, key: str, known: _Object, reserved: int, flight: Flight[GetResult], result: GetResult | None
    ) -> None:
        self._reserved_bytes -= reserved
        track = known.track
        if result is None:
            track.window = 0
            return
        # The object may end before the range does.
        flight.end = flight.start + len(result.body)
        track.size = result.size
        track.next = track.clamp(track.next)
        if track.window and track.next == track.size:
            self._streamed = track.window
        if reserved and self._objects.get(key) is known:
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
