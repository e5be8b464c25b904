"""Reading ahead along an array: who reads its chunks in order is served from requests made before he asks.

Chunks in order are rows in order of a manifest, wherever their objects are: the rest of this pack, the next packs, or
an object each. The decisions are plain functions of rows and columns; `BlockReader.prefetch` carries them out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from icechunk.format.ids import ObjectId
from icechunk.format.tables import NATIVE, ChunkRefs

__all__ = ["FIRST_AHEAD_BYTES", "MOST_AHEAD_BYTES", "Walk", "Walks", "upcoming"]

STEPS: Final = 8
"""Rows in order that make a walk. zarr asks for that many at once only where more are wanted."""
FIRST_AHEAD_BYTES: Final = 2 * 1024 * 1024
GROWTH: Final = 4
MOST_AHEAD_BYTES: Final = 16 * 1024 * 1024
_WALKS: Final = 4
_MOST_ROWS: Final = 8192


@dataclass(slots=True)
class Walk:
    """One reader's way along the rows of a manifest."""

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
    """The few readers that walk along the rows of one array at a time."""

    __slots__ = ("_walks",)

    def __init__(self) -> None:
        self._walks: list[Walk] = []

    def step(self, row: int) -> Walk | None:
        """Note that a row was read; the walk that wants rows ahead now, if it does."""
        walks = self._walks
        for walk in walks:
            if walk.next == row:
                walk.next = row + 1
                walk.steps += 1
                return walk if walk.wants_more() else None
        if len(walks) == _WALKS:
            # The one that has come least far: random reads push each other out, and no walk.
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
