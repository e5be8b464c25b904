"""Pure operations on columns of chunk references.

Inside the session log a row may also be a tombstone: kind `DELETED`, everything else empty. Such
rows never leave the log.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from icechunk.format.tables import (
    ETAG,
    ID12,
    INLINE,
    LAST_MODIFIED,
    NATIVE,
    NO_CHECKSUM,
    VIRTUAL,
    ChunkRef,
    ChunkRefs,
)
from icechunk.log.lookup import sort_last

__all__ = ["DELETED", "concat", "from_rows", "normalized", "tombstones", "trimmed"]

DELETED: Final = 0


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
    """Rows of all parts, one after the other; at least one part, all of one rank."""
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
    """The parts one after another; of one value that takes no room, as in virtual references, that stays so."""
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
    """Ascending and unique by coordinates; of several rows with the same ones the last counts."""
    order = sort_last(refs.coords)
    return refs if order is None else refs.take(order)


def trimmed(refs: ChunkRefs) -> ChunkRefs:
    """The same rows with nothing in tables and inline bytes that no row uses, and those in row order."""
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
    used = np.unique(column[column >= 0])
    if len(used) == len(table):
        return table, column
    numbers = np.full(len(table), -1, np.int64)
    numbers[used] = np.arange(len(used))
    return tuple(table[i] for i in used.tolist()), np.where(column >= 0, numbers[np.maximum(column, 0)], -1)


def from_rows(rows: Mapping[tuple[int, ...], ChunkRef | None], ndim: int) -> ChunkRefs:
    """Columns, ascending by coordinates, from rows by coordinates; None is a tombstone."""
    ordered = sorted(rows.items(), key=_coords_of)
    refs = [ref for _, ref in ordered]
    n = len(refs)
    locations: dict[str, int] = {}
    etags: dict[str, int] = {}
    kind = np.fromiter((DELETED if r is None else r.kind for r in refs), np.uint8, n)
    length = np.fromiter((0 if r is None else r.length for r in refs), np.uint64, n)
    chunk_id = np.frombuffer(b"".join([_id_of(r) for r in refs]), ID12) if (kind == NATIVE).any() else np.zeros(n, ID12)
    offset = np.fromiter((0 if r is None else r.offset for r in refs), np.uint64, n)
    location = np.full(n, -1, np.int32)
    checksum_kind = checksum = None
    data = b""
    if (kind == INLINE).any():
        inline = kind == INLINE
        data = b"".join([r.data for r in refs if r is not None and r.data is not None])
        lengths = length[inline]
        offset[inline] = np.cumsum(lengths, dtype=np.uint64) - lengths
    if (kind == VIRTUAL).any():
        checksum_kind, checksum = np.full(n, NO_CHECKSUM, np.uint8), np.zeros(n, np.int64)
        for i, r in enumerate(refs):
            if r is None or r.location is None:
                continue
            location[i] = locations.setdefault(r.location, len(locations))
            if r.etag is not None:
                checksum_kind[i], checksum[i] = ETAG, etags.setdefault(r.etag, len(etags))
            elif r.last_modified is not None:
                checksum_kind[i], checksum[i] = LAST_MODIFIED, r.last_modified
    return ChunkRefs(
        coords=coords_array((c for c, _ in ordered), ndim),
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


def coords_array(coords: Iterable[tuple[int, ...]], ndim: int) -> npt.NDArray[np.uint32]:
    """uint32[n, ndim] from tuples."""
    rows = list(coords)
    return np.array(rows, np.uint32).reshape(len(rows), ndim)


def _coords_of(item: tuple[tuple[int, ...], ChunkRef | None]) -> tuple[int, ...]:
    return item[0]


def _id_of(ref: ChunkRef | None) -> bytes:
    return ref.chunk_id if ref is not None and ref.chunk_id is not None else bytes(12)
