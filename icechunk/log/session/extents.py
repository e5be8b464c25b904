"""Geometry of chunk coordinates: bounding boxes, and cutting rows into groups with disjoint boxes."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from icechunk.format.by_node import Coords
from icechunk.format.values import Extents
from icechunk.log.session.columns import packed

__all__ = ["around", "bounds", "by_tile", "clipped", "halved", "in_box", "overlap", "slabs", "union", "volume"]

Rows = npt.NDArray[np.intp]

_BLOCK: Final = 2**20


def bounds(coords: Coords) -> Extents:
    """The smallest box that holds all coordinates; at least one row."""
    if len(coords) <= 16:
        return tuple([(min(axis), max(axis) + 1) for axis in zip(*coords.tolist(), strict=True)])
    # Column by column: a numpy reduction along the short axis of a tall array is ten times slower.
    columns = [coords[:, d] for d in range(coords.shape[1])]
    return tuple([(int(c.min()), int(c.max()) + 1) for c in columns])


def volume(box: Extents) -> int:
    """Number of chunks in a box; 0 if it is empty, 1 if it has no dimensions."""
    size = 1
    for a, b in box:
        size *= max(0, b - a)
    return size


def overlap(one: Extents, other: Extents) -> bool:
    """Whether two boxes share a chunk."""
    # Plain loops here and below: for the two or three dimensions of an array, generators would cost the most.
    for (a, b), (c, d) in zip(one, other, strict=True):  # noqa: SIM110
        if a >= d or c >= b:
            return False
    return True


def union(boxes: Iterable[Extents]) -> Extents:
    """The smallest box that holds all boxes; at least one box."""
    return tuple((min(a for a, _ in axis), max(b for _, b in axis)) for axis in zip(*boxes, strict=True))


def clipped(box: Extents, grid: Sequence[int]) -> Extents:
    """The part of a box inside a grid of that many chunks along each dimension."""
    for (_, end), size in zip(box, grid, strict=True):
        if end > size:
            return tuple([(a, min(b, n)) for (a, b), n in zip(box, grid, strict=True)])
    return tuple(box)


def _within(row: Sequence[int], box: Extents) -> bool:
    # A plain loop: for a single row a generator would cost more than the comparisons.
    for c, (a, b) in zip(row, box):  # noqa: B905, SIM110
        if not a <= c < b:
            return False
    return True


def in_box(coords: Coords, box: Extents) -> Rows:
    """Numbers, ascending, of the rows whose coordinates are in the box; coordinates must be ascending
    lexicographically."""
    if not box or not len(coords):
        return np.arange(len(coords))
    if len(coords) <= 16:
        few = coords.tolist()
        return np.array([i for i, row in enumerate(few) if _within(row, box)], np.intp)
    first, last = np.searchsorted(coords[:, 0], np.array(box[0], np.uint32)).tolist()
    some = coords[first:last, 1:]
    if not some.shape[1]:
        return np.arange(first, last)
    good = np.ones(len(some), np.bool_)
    for d, (a, b) in enumerate(box[1:]):
        column = some[:, d]
        good &= (column >= a) & (column < b)
    rows: Rows = np.flatnonzero(good) + first
    return rows


def halved(coords: Coords, most: int) -> list[Rows]:
    """Cut rows into pieces of at most ``most`` rows whose bounding boxes are disjoint.

    Cuts go across the longest side, at the row count that makes all pieces about equally full.

    Parameters
    ----------
    coords
        Unique, at least one row.
    """
    done: list[Rows] = []
    todo: list[Rows] = [np.arange(len(coords))]
    while todo:
        rows = todo.pop()
        n = len(rows)
        if n <= most:
            done.append(rows)
            continue
        part = coords[rows]
        box = bounds(part)
        axis = max(range(len(box)), key=lambda d: box[d][1] - box[d][0])
        pieces = -(-n // most)
        column = part[:, axis]
        at = n * (pieces // 2) // pieces
        cut = int(np.partition(column, at)[at])
        low = column < max(cut, box[axis][0] + 1)
        todo += [rows[~low], rows[low]]
    return done


def slabs(coords: Coords, most: int) -> list[slice]:
    """Cut ascending rows into runs of at most ``most`` rows whose bounding boxes are disjoint.

    Parameters
    ----------
    coords
        Ascending lexicographically, unique.
    """
    done: list[slice] = []
    todo = [(0, len(coords), 0)]
    while todo:
        first, last, axis = todo.pop()
        if last - first <= most:
            done.append(slice(first, last))
            continue
        column: Any = memoryview(coords[:, axis])  # type: ignore[arg-type]
        value = column[first + most]
        cut = bisect_left(column, value, first, last)
        if cut > first:
            todo.append((cut, last, axis))
            done.append(slice(first, cut))
            continue
        # More than ``most`` rows are in one plane.
        cut = bisect_right(column, value, first, last)
        todo += [(cut, last, axis), (first, cut, axis + 1)] if cut < last else [(first, last, axis + 1)]
    return done


def around(coords: Coords, obstacles: Sequence[Extents]) -> list[Rows]:
    """Cut rows into pieces whose bounding boxes overlap neither an obstacle nor each other.

    Every cut is along the plane of an obstacle's face. A bounding box is tight, so a face inside it has rows on both
    sides, and the recursion ends.

    Parameters
    ----------
    coords
        Unique, at least one row, none of them in an obstacle.
    obstacles
        Disjoint boxes.
    """
    done: list[Rows] = []
    todo = [(np.arange(len(coords)), list(obstacles))]
    while todo:
        rows, near = todo.pop()
        part = coords[rows]
        box = bounds(part)
        near = [o for o in near if overlap(o, box)]
        if not near:
            done.append(rows)
            continue
        best: tuple[int, npt.NDArray[np.bool_]] | None = None
        for axis, ((a, b), (low, high)) in enumerate(zip(near[0], box, strict=True)):
            column = part[:, axis]
            for cut, clear_below in ((a, True), (b, False)):
                if low < cut < high:
                    below = column < cut
                    clear = int(np.count_nonzero(below))
                    clear = clear if clear_below else len(rows) - clear
                    if best is None or clear > best[0]:
                        best = clear, below
        assert best is not None, "a row lies in an obstacle"
        todo += [(rows[~best[1]], near), (rows[best[1]], near)]
    return done


def by_tile(coords: Coords, tile: Sequence[int]) -> list[npt.NDArray[Any]]:
    """Group rows by the tile of a regular grid that they are in; rows keep their order, tiles ascend.

    Parameters
    ----------
    tile
        Number of chunks of a tile along each dimension.
    """
    if not len(tile):
        return [np.arange(len(coords))]
    keys = _cells(coords, tile)
    order: npt.NDArray[Any] = np.arange(len(keys), dtype=np.uint32)
    if (keys[1:] < keys[:-1]).any():
        order = np.argsort(keys, kind="stable").astype(np.uint32)
        keys = keys[order]
    starts = np.flatnonzero(keys[1:] != keys[:-1]) + 1
    return [order[a:b] for a, b in pairwise([0, *starts.tolist(), len(order)])]


def _cells(coords: Coords, tile: Sequence[int]) -> npt.NDArray[Any]:
    """For each row a key of the tile that it is in; keys compare as tiles do."""
    box = bounds(coords)
    widths = [((last - 1) // n).bit_length() for (_, last), n in zip(box, tile, strict=True)]
    if sum(widths) > 64:
        return packed((coords // np.asarray(tile, np.uint64)).astype(np.uint32))
    keys = np.zeros(len(coords), np.uint32 if sum(widths) <= 32 else np.uint64)
    # One block at a time: the intermediate arrays of many rows would take gigabytes.
    for first in range(0, len(coords), _BLOCK):
        rows = slice(first, first + _BLOCK)
        key = np.zeros(len(coords[rows]), np.uint64)
        for d, (n, width) in enumerate(zip(tile, widths, strict=True)):
            if width:
                key = key << np.uint64(width) | (coords[rows, d] // np.uint64(n)).astype(np.uint64)
        keys[rows] = key
    return keys
