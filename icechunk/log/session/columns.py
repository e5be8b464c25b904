"""Pure operations on columns of chunk references: searching, joining, sorting, conversion from rows.

Inside the session log a row may also be a tombstone: kind `DELETED`, everything else empty. Such
rows never leave the log.

For searches, the coordinates of each row are packed into one unsigned 64-bit key, with as many bits per dimension as
its largest coordinate needs, the first dimension highest, so that the order of keys is the lexicographic order of
coordinates. If 64 bits are too few, the key is the coordinates' big-endian bytes. A search is one bisection over one
contiguous column.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from icechunk.format.by_node import Coords
from icechunk.format.ids import ObjectId
from icechunk.format.values import ETAG, ID12, INLINE, LAST_MODIFIED, NATIVE, NO_CHECKSUM, VIRTUAL, ChunkRef, ChunkRefs

__all__ = [
    "DELETED",
    "CoordIndex",
    "RefTable",
    "concat",
    "find",
    "find_row",
    "from_rows",
    "from_values",
    "normalized",
    "packed",
    "sort_last",
    "tombstones",
    "trimmed",
]

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
    """One key for each row; the keys of these rows compare as their coordinates do."""
    return _pack(coords, _widths(coords))


def sort_last(coords: Coords) -> Rows | None:
    """Row numbers in ascending order of coordinates; of rows with equal coordinates only the last.

    Returns
    -------
    intp[m] or None
        None if the rows are ascending and unique already.
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
        self.wide: bool = sum(self._widths) > 64
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
        """For each of the given coordinates the number of the row that has them, or −1.

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
        self.refs: ChunkRefs = refs
        self._index: CoordIndex | None = None

    @property
    def index(self) -> CoordIndex:
        """The index, which the first look-up makes; most tables have no look-ups."""
        if self._index is None:
            refs = self.refs
            # A memoryview returns Python integers at a third of the cost of numpy's scalars.
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
        """A row that `index` found, as a single value."""
        if self._kind[row] != NATIVE:
            return self.refs.row(row)
        return ChunkRef(NATIVE, None, self.chunk_id(row), None, self._offset[row], self._length[row])

    def chunk_id(self, row: int) -> ObjectId:
        """The object of a native row that `index` found."""
        return ObjectId(self._ids[12 * row : 12 * row + 12].tobytes())

    def span(self, row: int) -> tuple[int, int]:
        """The offset and length of a row that `index` found."""
        return self._offset[row], self._length[row]

    def get(self, coords: Sequence[int]) -> ChunkRef | None:
        """The reference at these coordinates, or None; they must have the rank of the columns."""
        row = self.index.find(coords)
        return None if row < 0 else self.row(row)


def _view(column: npt.NDArray[Any]) -> Any:
    return memoryview(np.ascontiguousarray(column))  # type: ignore[arg-type]


def find_row(refs: ChunkRefs, coords: Sequence[int]) -> int:
    """The row with these coordinates, or −1; O(ndim · log n), without preparation.

    Parameters
    ----------
    refs
        Ascending and unique by coordinates, as in a manifest.
    coords
        One per dimension; coordinates of another rank find nothing.
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
    """The reference at these coordinates, or None; see `find_row`."""
    row = find_row(refs, coords)
    return None if row < 0 else refs.row(row)


DELETED: Final = 0

_TOMBSTONE: Final = ChunkRef(DELETED)
_NO_ID: Final = ObjectId(bytes(12))


def tombstones(coords: npt.NDArray[np.uint32]) -> ChunkRefs:
    """One deleted row for each of the coordinates."""
    n = len(coords)
    return ChunkRefs(
        coords=coords,
        kind=np.full(n, DELETED, np.uint8),
        offset=np.zeros(n, np.uint64),
        length=np.zeros(n, np.uint64),
        chunk_id=np.zeros(n, ID12),
        location=np.full(n, -1, np.int32),
    )


def concat(parts: Sequence[ChunkRefs]) -> ChunkRefs:
    """The concatenated rows of all parts; at least one part, all of one rank."""
    if len(parts) == 1:
        return parts[0]
    locations, location = _joined([p.locations for p in parts], [p.location for p in parts])
    offsets = [p.offset for p in parts]
    if any(p.inline_data for p in parts):
        base, offsets = 0, []
        for p in parts:
            offsets.append(np.where(p.kind == INLINE, p.offset + np.uint64(base), p.offset) if base else p.offset)
            base += len(p.inline_data)
    checksum_kind = checksum = None
    etags: tuple[str, ...] = ()
    if any(p.checksum_kind is not None for p in parts):
        kinds = [np.zeros(len(p), np.uint8) if p.checksum_kind is None else p.checksum_kind for p in parts]
        sums = [np.zeros(len(p), np.int64) if p.checksum is None else p.checksum for p in parts]
        etags, rows = _joined(
            [p.etags for p in parts], [np.where(k == ETAG, s, -1) for k, s in zip(kinds, sums, strict=True)]
        )
        checksum_kind = _column(kinds)
        checksum = np.where(checksum_kind == ETAG, rows, np.concatenate(sums))
    return ChunkRefs(
        coords=np.concatenate([p.coords for p in parts]),
        kind=_column([p.kind for p in parts]),
        offset=np.concatenate(offsets),
        length=np.concatenate([p.length for p in parts]),
        chunk_id=_column([p.chunk_id for p in parts]),
        location=location.astype(np.int32, copy=False),
        locations=locations,
        checksum_kind=checksum_kind,
        checksum=checksum,
        etags=etags,
        inline_data=b"".join([p.inline_data for p in parts]),
    )


def _column(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """The concatenated parts. Broadcast columns of one value (as in virtual references) give a broadcast column, which
    takes no memory."""
    first = parts[0]
    if all(part.strides == (0,) and len(part) and part[0] == first[0] for part in parts):
        return np.broadcast_to(first[0], sum(map(len, parts)))
    return np.concatenate(parts)


def _joined(tables: Sequence[tuple[str, ...]], columns: Sequence[npt.NDArray[Any]]) -> tuple[tuple[str, ...], Any]:
    """One table of distinct strings, and the columns of row numbers (−1: none) rewritten to it."""
    rows: dict[str, int] = {}
    out = []
    last: tuple[str, ...] | None = None
    for table, column in zip(tables, columns, strict=True):
        if not table:
            out.append(column)
            continue
        if table is not last:
            numbers = np.fromiter((rows.setdefault(s, len(rows)) for s in table), np.int64, len(table))
            last = table
        out.append(np.where(column >= 0, numbers[np.maximum(column, 0)], -1))
    return tuple(rows), np.concatenate(out)


def normalized(refs: ChunkRefs) -> ChunkRefs:
    """The rows, ascending and unique by coordinates; of rows with the same coordinates the last counts."""
    order = sort_last(refs.coords)
    return refs if order is None else refs.take(order)


def trimmed(refs: ChunkRefs) -> ChunkRefs:
    """The same rows, with tables and inline bytes reduced to those that the rows use, in row order."""
    inline = np.flatnonzero(refs.kind == INLINE)
    offset, data = refs.offset, b""
    if len(inline):
        lengths = refs.length[inline]
        starts = refs.offset[inline]
        ends = np.cumsum(lengths, dtype=np.uint64)
        if int(ends[-1]) == len(refs.inline_data) and np.array_equal(starts, ends - lengths):
            data = refs.inline_data
        else:
            source = refs.inline_data
            pairs = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
            data = b"".join([source[a:b] for a, b in pairs])
            offset = refs.offset.copy()
            offset[inline] = ends - lengths
    locations, location = _used(refs.locations, refs.location)
    checksum_kind, checksum, etags = refs.checksum_kind, refs.checksum, refs.etags
    if checksum_kind is None or checksum is None or not checksum_kind.any():
        checksum_kind = checksum = None
        etags = ()
    else:
        tagged = checksum_kind == ETAG
        etags, rows = _used(etags, np.where(tagged, checksum, -1))
        checksum = np.where(tagged, rows, checksum)
    return ChunkRefs(
        coords=refs.coords,
        kind=refs.kind,
        offset=offset,
        length=refs.length,
        chunk_id=refs.chunk_id,
        location=location.astype(np.int32, copy=False),
        locations=locations,
        checksum_kind=checksum_kind,
        checksum=checksum,
        etags=etags,
        inline_data=data,
    )


def _used(table: tuple[str, ...], column: npt.NDArray[Any]) -> tuple[tuple[str, ...], Any]:
    if not table:
        return table, column
    is_set = column >= 0
    rows = column if is_set.all() else column[is_set]
    if not len(rows):
        return (), column
    # Only as much as the rows span of a table that has the texts of many manifests.
    first, last = int(rows.min()), int(rows.max())
    present = np.zeros(last - first + 1, np.bool_)
    present[rows - first] = True
    used = np.flatnonzero(present)
    if len(used) == len(table):
        return table, column
    if len(used) == len(present):
        # A manifest of references that were set in order has the locations in order, too.
        return table[first : last + 1], np.where(is_set, column.astype(np.int64) - first, -1)
    numbers = np.full(len(present), -1, np.int64)
    numbers[used] = np.arange(len(used))
    texts = tuple([table[i] for i in (first + used).tolist()])
    return texts, np.where(is_set, numbers[np.maximum(column.astype(np.int64) - first, 0)], -1)


def from_rows(rows: Mapping[tuple[int, ...], ChunkRef | None], ndim: int) -> ChunkRefs:
    """Columns, ascending by coordinates, from a mapping of coordinates to references; None is a tombstone."""
    ordered = sorted(rows.items(), key=_coords_of)
    return from_values([coords for coords, _ in ordered], [ref for _, ref in ordered], ndim)


def from_values(coords: Sequence[tuple[int, ...]], refs: Iterable[ChunkRef | None], ndim: int) -> ChunkRefs:
    """Columns in the order of ``coords``, from one reference (None: a tombstone) for each of the coordinates."""
    n = len(coords)
    if not n:
        return ChunkRefs.empty(ndim)
    fields = zip(*[_TOMBSTONE if ref is None else ref for ref in refs], strict=True)
    kinds, inline, chunk_ids, urls, offsets, lengths, tags, modified = fields
    kind = np.array(kinds, np.uint8)
    length, offset = np.array(lengths, np.uint64), np.array(offsets, np.uint64)
    chunk_id = np.zeros(n, ID12)
    if (kind == NATIVE).any():
        chunk_id = np.frombuffer(b"".join([id or _NO_ID for id in chunk_ids]), ID12)
    data = b""
    if (rows := kind == INLINE).any():
        data = b"".join([part for part in inline if part is not None])
        sizes = length[rows]
        offset[rows] = np.cumsum(sizes, dtype=np.uint64) - sizes
    location = np.full(n, -1, np.int32)
    locations: dict[str, int] = {}
    etags: dict[str, int] = {}
    checksum_kind = checksum = None
    if (kind == VIRTUAL).any():
        checksum_kind, checksum = np.full(n, NO_CHECKSUM, np.uint8), np.zeros(n, np.int64)
        for i, url in enumerate(urls):
            if url is None:
                continue
            location[i] = locations.setdefault(url, len(locations))
            if tags[i] is not None:
                checksum_kind[i], checksum[i] = ETAG, etags.setdefault(tags[i], len(etags))
            elif modified[i] is not None:
                checksum_kind[i], checksum[i] = LAST_MODIFIED, modified[i]
    return ChunkRefs(
        coords=np.fromiter(chain.from_iterable(coords), np.uint32, n * ndim).reshape(n, ndim),
        kind=kind,
        offset=offset,
        length=length,
        chunk_id=chunk_id,
        location=location,
        locations=tuple(locations),
        checksum_kind=checksum_kind,
        checksum=checksum,
        etags=tuple(etags),
        inline_data=data,
    )


def _coords_of(item: tuple[tuple[int, ...], ChunkRef | None]) -> tuple[int, ...]:
    return item[0]
