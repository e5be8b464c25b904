"""Finding rows by chunk coordinates.

Coordinates of one set of rows are packed into one unsigned 64-bit key each, as many bits per
dimension as its largest coordinate needs, the first dimension highest, so that the order of keys
is the lexicographic order of coordinates. Where 64 bits are too few, the key is the coordinates'
big-endian bytes. A search is then one bisection over one contiguous column.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from icechunk.format.ids import ObjectId
from icechunk.format.tables import NATIVE, ChunkRef, ChunkRefs

__all__ = ["CoordIndex", "RefTable", "find", "find_row", "packed", "sort_last"]

Coords = npt.NDArray[np.uint32]
Rows = npt.NDArray[np.intp]


def _widths(coords: Coords) -> tuple[int, ...]:
    if not len(coords):
        return (0,) * int(coords.shape[1])
    most: list[int] = [int(coords[:, d].max()) for d in range(coords.shape[1])]
    return tuple([m.bit_length() for m in most])


def _pack(coords: Coords, widths: Sequence[int]) -> npt.NDArray[Any]:
    n, ndim = coords.shape
    if sum(widths) > 64:
        wide = np.ascontiguousarray(coords, dtype=">u4")
        return wide.view(f"S{4 * ndim}").reshape(n)
    keys = np.zeros(n, np.uint64)
    for d, width in enumerate(widths):
        if width:
            keys = keys << np.uint64(width) | coords[:, d].astype(np.uint64)
    return keys


def packed(coords: Coords) -> npt.NDArray[Any]:
    """One key for each row; keys compare as the coordinates do, among these rows."""
    return _pack(coords, _widths(coords))


def sort_last(coords: Coords) -> Rows | None:
    """Rows in ascending order of coordinates, of equal ones only the last.

    Returns
    -------
    intp[m] or None
        None if the rows are ascending and unique as they are.
    """
    if len(coords) < 2:
        return None
    keys = packed(coords)
    if bool((keys[1:] > keys[:-1]).all()):
        return None
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    last = np.ones(len(order), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=last[:-1])
    return order[last]


class CoordIndex:
    """Sorted search in rows that are ascending and unique by coordinates.

    Parameters
    ----------
    coords
        uint32[n, ndim], ascending lexicographically, unique.
    """

    __slots__ = ("_keys", "_view", "_widths", "wide")

    def __init__(self, coords: Coords) -> None:
        self._widths = _widths(coords)
        self.wide = sum(self._widths) > 64
        self._keys = _pack(coords, self._widths)
        self._view: Any = self._keys if self.wide else _view(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, coords: Sequence[int]) -> int:
        """The row with these coordinates, or −1."""
        if self.wide:
            key: Any = b"".join([c.to_bytes(4) for c in coords])
            row = int(self._keys.searchsorted(np.array(key, self._keys.dtype)))
            return row if row < len(self._keys) and self._keys[row : row + 1].tobytes() == key else -1
        key = 0
        for c, width in zip(coords, self._widths, strict=True):
            if c >> width:
                return -1
            key = key << width | c
        view = self._view
        row = bisect_left(view, key)
        return row if row < len(view) and view[row] == key else -1

    def find_rows(self, coords: Coords) -> Rows:
        """For each of the given coordinates the row that has them, or −1.

        Parameters
        ----------
        coords
            uint32[m, ndim], in any order.

        Returns
        -------
        intp[m]
        """
        if not len(self._keys) or not len(coords):
            return np.full(len(coords), -1, np.intp)
        known = np.ones(len(coords), np.bool_)
        if not self.wide:
            for d, width in enumerate(self._widths):
                known &= coords[:, d] >> np.uint32(width) == 0 if width < 32 else True
            coords = np.where(known[:, None], coords, np.uint32(0))
        keys = _pack(coords, self._widths)
        rows = np.minimum(self._keys.searchsorted(keys), len(self._keys) - 1)
        return np.where(known & (self._keys[rows] == keys), rows, -1)


class RefTable:
    """Columns prepared for many look-ups of one reference at a time; 8 bytes a row besides the columns.

    Parameters
    ----------
    refs
        Ascending and unique by coordinates, as in a manifest.
    """

    __slots__ = ("_ids", "_index", "_kind", "_length", "_offset", "refs")

    def __init__(self, refs: ChunkRefs) -> None:
        self.refs = refs
        self._index: CoordIndex | None = None

    @property
    def index(self) -> CoordIndex:
        """Made by the first look-up; most columns are never asked."""
        if self._index is None:
            refs = self.refs
            # Items of a memoryview are Python integers, at a third of the cost of numpy's scalars.
            self._kind: Any = _view(refs.kind)
            self._offset: Any = _view(refs.offset)
            self._length: Any = _view(refs.length)
            self._ids: Any = _view(np.ascontiguousarray(refs.chunk_id).view(np.uint8)) if len(refs) else b""
            self._index = CoordIndex(refs.coords)
        return self._index

    def __len__(self) -> int:
        return len(self.refs)

    def kind(self, row: int) -> int:
        """The kind of a row that `index` found."""
        kind: int = self._kind[row]
        return kind

    def row(self, row: int) -> ChunkRef:
        """A row that `index` found, as a value of its own."""
        if self._kind[row] != NATIVE:
            return self.refs.row(row)
        chunk_id = ObjectId(self._ids[12 * row : 12 * row + 12].tobytes())
        return ChunkRef(NATIVE, None, chunk_id, None, self._offset[row], self._length[row])

    def get(self, coords: Sequence[int]) -> ChunkRef | None:
        """The reference at these coordinates, of the columns' rank, if there is one."""
        row = self.index.find(coords)
        return None if row < 0 else self.row(row)


def _view(column: npt.NDArray[Any]) -> Any:
    return memoryview(np.ascontiguousarray(column))  # type: ignore[arg-type]


def find_row(refs: ChunkRefs, coords: Sequence[int]) -> int:
    """The row with these coordinates, or −1; O(ndim · log n), and nothing to prepare.

    Parameters
    ----------
    refs
        Ascending and unique by coordinates, as in a manifest.
    coords
        One per dimension; others than `refs.ndim` find nothing.
    """
    if len(coords) != refs.ndim:
        return -1
    low, high = 0, len(refs)
    for d, c in enumerate(coords):
        column: Any = memoryview(refs.coords[:, d])  # type: ignore[arg-type]
        low = bisect_left(column, c, low, high)
        high = bisect_right(column, c, low, high)
        if low == high:
            return -1
    return low if low < high else -1


def find(refs: ChunkRefs, coords: Sequence[int]) -> ChunkRef | None:
    """The reference at these coordinates, if there is one; see `find_row`."""
    row = find_row(refs, coords)
    return None if row < 0 else refs.row(row)
