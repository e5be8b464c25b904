"""Reading parts of chunk objects: few large requests instead of many small ones.

Reads that arrive in the same turn of the loop and lie near each other in one object become one request. Who walks
through an object in order is served ahead, in windows that double and are fetched before they are needed; who keeps
hitting an object at random gets larger blocks of it. Objects never change, so what was fetched is never stale.

The decisions are plain functions of what was wanted and what was seen (`merge`, `Track.plan`); `BlockReader` carries
them out on one event loop.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from icechunk.storage.base import GetResult, Range
from icechunk.transfer.fetch import FetchPool

__all__ = ["BlockReader", "Track", "merge"]

MERGE_GAP_BYTES = 64 * 1024
"""Bytes between two reads that are cheaper to fetch than another request."""
MAX_REQUEST_BYTES = 4 * 1024 * 1024
"""Largest merged request, and largest window."""
FIRST_WINDOW_BYTES = 256 * 1024
"""Window of the second read in order."""
BLOCK_BYTES = 1024 * 1024
"""Aligned block that random reads are promoted to."""
PROMOTE_AFTER = 4
"""Random requests of one object before that."""
CACHE_BYTES = 64 * 1024 * 1024
"""Bytes kept of windows and blocks, in each loop."""
MAX_TRACKS = 4096
"""Objects whose readers are remembered."""


def merge(wanted: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges that cover all wanted ones, joined where they lie near each other.

    >>> merge([(0, 10), (70_000, 70_010), (10, 20), (9_000_000, 9_000_001)])
    [(0, 70010), (9000000, 9000001)]
    """
    merged: list[tuple[int, int]] = []
    for start, end in sorted(wanted):
        if merged:
            first, last = merged[-1]
            if start <= last + MERGE_GAP_BYTES and max(last, end) - first <= MAX_REQUEST_BYTES:
                merged[-1] = (first, max(last, end))
                continue
        merged.append((start, end))
    return merged


@dataclass(slots=True)
class Track:
    """How one object has been read so far."""

    next: int = -1
    """Where a reader in order would go on."""
    window: int = 0
    """Size of the last window; 0 where reads are not in order."""
    hits: int = 0
    """Requests that were not in order."""
    size: int | None = None
    """Bytes of the object, once an answer told."""

    def plan(self, start: int, end: int) -> tuple[int, int]:
        """The range to fetch for a wanted one: at least that, more where the reader shows a pattern."""
        if self.next >= 0 and self.next - MERGE_GAP_BYTES <= start <= self.next + MERGE_GAP_BYTES:
            self.window = min(MAX_REQUEST_BYTES, max(FIRST_WINDOW_BYTES, 2 * self.window, 2 * (end - start)))
            end = max(end, start + self.window)
        else:
            self.window = 0
            self.hits += 1
            if self.hits > PROMOTE_AFTER:
                start -= start % BLOCK_BYTES
                end += -end % BLOCK_BYTES
        end = self.clamp(end)
        self.next = end
        return start, end

    def ahead(self, end: int) -> tuple[int, int] | None:
        """The next window, once a reader in order is past the middle of the last one; None before that."""
        if not self.window or self.next - end > self.window // 2 or self.next == self.size:
            return None
        self.window = min(MAX_REQUEST_BYTES, 2 * self.window)
        start, self.next = self.next, self.clamp(self.next + self.window)
        return start, self.next

    def clamp(self, end: int) -> int:
        """``end``, or the end of the object where that is known and comes first."""
        return end if self.size is None else min(end, self.size)


@dataclass(slots=True, eq=False)
class _Flight:
    """A request on its way."""

    start: int
    end: int
    task: asyncio.Task[GetResult]
    waiters: int = 0

    async def join(self) -> GetResult:
        """Wait for the answer; the request is cancelled with the last one who waits."""
        self.waiters += 1
        try:
            return await asyncio.shield(self.task)
        finally:
            self.waiters -= 1
            if not self.waiters:
                self.task.cancel()


@dataclass(slots=True, eq=False)
class _Object:
    track: Track = field(default_factory=Track)
    flights: list[_Flight] = field(default_factory=list)
    segments: list[tuple[int, bytes]] = field(default_factory=list)
    """Start and bytes of what is cached."""
    wanted: list[tuple[int, int, asyncio.Future[_Flight]]] = field(default_factory=list)


class BlockReader:
    """Reads small parts of chunk objects on one event loop.

    Parameters
    ----------
    pool
        Bounds and shares the requests.
    cache_bytes
        Bytes of windows and blocks that are kept.
    """

    def __init__(self, pool: FetchPool, *, cache_bytes: int = CACHE_BYTES) -> None:
        self._pool = pool
        self._objects: OrderedDict[str, _Object] = OrderedDict()
        self._kept: OrderedDict[tuple[str, int], int] = OrderedDict()
        self._kept_bytes = 0
        self._cache_bytes = cache_bytes
        self._streamed = 0

    async def read(self, key: str, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end`` (exclusive) of an object; fewer where it ends before. Raises as `Storage.get`."""
        if end - start >= BLOCK_BYTES:
            return await self._pool.get(key, Range(start, end))
        known = self._object(key)
        for first, data in known.segments:
            if first <= start < first + len(data):
                self._kept.move_to_end((key, first))
                return await self._rest(key, known, data[start - first : end - first], start, end)
        flight = next((f for f in known.flights if f.start <= start < f.end), None)
        if flight is None:
            if not known.wanted:
                asyncio.get_running_loop().call_soon(self._dispatch, key, known)
            place: asyncio.Future[_Flight] = asyncio.get_running_loop().create_future()
            known.wanted.append((start, end, place))
            flight = await place
        data = (await flight.join()).data
        return await self._rest(key, known, data[start - flight.start : end - flight.start], start, end)

    async def _rest(self, key: str, known: _Object, found: bytes, start: int, end: int) -> bytes:
        """What was found, with what lies beyond the window that it was found in."""
        track = known.track
        cut = start + len(found)
        if cut < end and found and (track.size is None or cut < track.size):
            return found + await self.read(key, cut, end)
        window = track.ahead(end)
        if window is not None:
            self._fly(key, known, *window, keep=True)
        return found

    def _object(self, key: str) -> _Object:
        known = self._objects.get(key)
        if known is not None:
            self._objects.move_to_end(key)
            return known
        known = self._objects[key] = _Object()
        if self._streamed:
            # The object before was read to its end in order: its reader goes on at the start of this one.
            known.track.next, known.track.window = 0, self._streamed // 2
        if len(self._objects) > MAX_TRACKS:
            old, _ = self._objects.popitem(last=False)
            for kept in [kept for kept in self._kept if kept[0] == old]:
                self._kept_bytes -= self._kept.pop(kept)
        return known

    def _dispatch(self, key: str, known: _Object) -> None:
        wanted = [want for want in known.wanted if not want[2].done()]
        known.wanted = []
        for start, end in merge([(start, end) for start, end, _ in wanted]):
            first, last = known.track.plan(start, end)
            if not known.track.window:
                self._streamed = 0
            flight = self._fly(key, known, first, last, keep=(first, last) != (start, end))
            for begin, _, place in wanted:
                if start <= begin < end:
                    place.set_result(flight)

    def _fly(self, key: str, known: _Object, start: int, end: int, *, keep: bool) -> _Flight:
        task = asyncio.ensure_future(self._pool.get_result(key, Range(start, end)))
        flight = _Flight(start, end, task)
        known.flights.append(flight)
        task.add_done_callback(lambda _: self._land(key, known, flight, keep))
        return flight

    def _land(self, key: str, known: _Object, flight: _Flight, keep: bool) -> None:
        known.flights.remove(flight)
        # Asking for the exception marks it as seen: a window that nobody came to want may fail unnoticed.
        if flight.task.cancelled() or flight.task.exception() is not None:
            known.track.window = 0
            return
        result = flight.task.result()
        track = known.track
        track.size = result.size
        track.next = track.clamp(track.next)
        if track.window and track.next == track.size:
            self._streamed = track.window
        if keep and self._objects.get(key) is known:
            self._keep(key, known, flight.start, result.data)

    def _keep(self, key: str, known: _Object, start: int, data: bytes) -> None:
        if (key, start) in self._kept:
            return
        known.segments.append((start, data))
        self._kept[key, start] = len(data)
        self._kept_bytes += len(data)
        while self._kept_bytes > self._cache_bytes:
            (old, first), size = self._kept.popitem(last=False)
            self._kept_bytes -= size
            self._objects[old].segments = [s for s in self._objects[old].segments if s[0] != first]
