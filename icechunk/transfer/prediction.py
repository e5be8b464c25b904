"""Prediction of reads: the bytes that are worth requesting together with those that are wanted, as pure functions.

Nearby ranges become one request (`merge`). One rule reads ahead (`Walk`): reads that come in order are answered from
windows that grow, and each window is requested before the one before it is used up. It follows

- the rows of a manifest (`Walks`): chunks in order are consecutive rows, whether their objects are the rest of this
  pack, the next packs, or one object each. `upcoming` turns rows into ranges of objects;
- the bytes of one object (`Track`): of a file with virtual chunks, or of a shard.

An object that is repeatedly read at random is read in larger blocks (`Track`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import field
from typing import Final, NamedTuple

import numpy as np

from icechunk.format.ids import ObjectId
from icechunk.format.values import NATIVE, ChunkRefs
from icechunk.runtime.late_dataclass import dataclass

__all__ = ["ROWS", "Growth", "Limits", "Track", "Walk", "Walks", "merge", "upcoming"]


class Growth(NamedTuple):
    """The beginning and the reach of reading ahead."""

    steps: int
    """Number of reads in order that count as a walk."""
    first_bytes: int
    """Bytes of the first window."""
    factor: int
    """Each window is so many times as large as the one before."""
    most_bytes: int
    """Bytes of the largest window."""
    reserve: float
    """Part of a window that is not read yet when the next one is requested."""


ROWS: Final = Growth(steps=8, first_bytes=2 * 1024 * 1024, factor=4, most_bytes=16 * 1024 * 1024, reserve=0.75)
"""Growth of reads of rows of a manifest: zarr requests eight chunks at once only if it wants more. Their sizes are
known, so little is fetched in vain. The next window is requested early: the first ones are small, and are used up
before it could come."""
_WALKS: Final = 4
_MOST_ROWS: Final = 8192


@dataclass(slots=True)
class Walk:
    """The progress of one reader that reads positions in order: rows of a manifest, or bytes of an object."""

    next: int
    """The position that would continue it."""
    steps: int = 1
    """Reads that came in order."""
    fetched: int = 0
    """Positions before this one are asked for already."""
    window: int = 0
    """Positions that the last window had."""
    window_bytes: int = 0
    """Bytes that it was allowed; 0: there was none."""

    def step(self, start: int, end: int, gap: int = 0) -> bool:
        """Note a read of the positions from ``start`` to ``end`` (exclusive), if it begins at most ``gap`` positions
        before or after the end of the last one; else returns False."""
        if abs(start - self.next) > gap:
            return False
        self.next = end
        self.steps += 1
        return True

    def wants_more(self, growth: Growth) -> bool:
        """Whether it is a walk of which no more than the reserve is left to read."""
        return self.steps >= growth.steps and self.fetched - self.next <= self.window * growth.reserve

    def next_window(self, growth: Growth) -> tuple[int, int]:
        """The position at which the next window begins, and its bytes."""
        size = max(growth.first_bytes, growth.factor * self.window_bytes)
        return max(self.next, self.fetched), min(growth.most_bytes, size)

    def fetch_to(self, end: int, window_bytes: int) -> None:
        """Note that the next window, which was allowed that many bytes, is asked for, up to position ``end``."""
        self.window = end - max(self.next, self.fetched)
        self.fetched = end
        self.window_bytes = window_bytes


class Walks:
    """The few readers that read the rows of one array in order at the same time."""

    __slots__ = ("_walks",)

    def __init__(self) -> None:
        self._walks: list[Walk] = []

    def step(self, row: int) -> Walk | None:
        """Note that a row was read; returns the walk for which rows are to be read ahead now, if any."""
        walks = self._walks
        for walk in walks:
            if walk.step(row, row + 1):
                return walk if walk.wants_more(ROWS) else None
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
    """Whether bytes that were asked for are kept too, and not only those that were fetched besides."""
    max_objects: int = 4096
    """Objects whose readers are remembered."""

    @property
    def growth(self) -> Growth:
        """Growth of windows in one object."""
        most_bytes = self.max_request_bytes
        return Growth(steps=2, first_bytes=self.first_window_bytes, factor=2, most_bytes=most_bytes, reserve=0.5)


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

    walk: Walk = field(default_factory=lambda: Walk(-1))
    """The reader in order."""
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
        walk = self.walk
        if walk.next >= 0 and walk.step(start, end, limits.merge_gap_bytes):
            window = min(limits.max_request_bytes, max(walk.next_window(limits.growth)[1], 2 * (end - start)))
            end = self.clamp(max(end, start + window))
            walk.fetch_to(end, window)
            return start, end
        if turn - self.last_hit > limits.cache_bytes // limits.block_bytes:
            self.hits = 0
        self.hits += 1
        self.last_hit = turn
        if self.hits > limits.promote_after:
            start -= start % limits.block_bytes
            end = self.clamp(end + -end % limits.block_bytes)
        self.walk = Walk(end, fetched=end)
        return start, end

    def ahead(self, end: int, limits: Limits) -> tuple[int, int] | None:
        """The next window, once a reader in order, which has read up to ``end``, wants more; None before that."""
        walk = self.walk
        if not walk.window_bytes:
            return None
        walk.next = max(walk.next, end)
        if walk.fetched == self.size or not walk.wants_more(limits.growth):
            return None
        start, size = walk.next_window(limits.growth)
        return start, self.clamp(start + size)

    def go_ahead(self, end: int, limits: Limits) -> None:
        """Note that the next window, which ends there, is asked for."""
        self.walk.fetch_to(end, self.walk.next_window(limits.growth)[1])

    def restart(self, at: int) -> None:
        """Read nothing ahead until reads come in order from ``at`` on."""
        self.walk = Walk(at, fetched=at)

    def clamp(self, end: int) -> int:
        """``end``, or the end of the object where that is known and comes first."""
        return end if self.size is None else min(end, self.size)
