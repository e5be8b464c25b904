"""Ranges of objects as rows of bytes that sort: by object, by where a range begins, by its length. Pure.

A row is a name of fixed width, then offset and length as big-endian numbers of 64 bits, in bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from icechunk.format.values import ChunkRefs

__all__ = [
    "CHUNK_ID_BYTES",
    "SPAN_BYTES",
    "covered_by_object",
    "joined_native_rows",
    "names_of",
    "native_rows",
    "reached_before",
    "rows",
    "spans_of",
    "starts_of_objects",
]

CHUNK_ID_BYTES = 12
SPAN_BYTES = 16
"""Bytes of a row behind the name."""


def rows(
    names: npt.NDArray[np.uint8], offset: npt.NDArray[np.uint64], length: npt.NDArray[np.uint64]
) -> npt.NDArray[Any]:
    """Rows, ``S{width}[n]``.

    Parameters
    ----------
    names
        uint8[n, k].
    offset, length
        uint64[n], bytes.
    """
    width = names.shape[1] + SPAN_BYTES
    joined = np.empty(len(names), _layout(width))
    joined["name"] = np.ascontiguousarray(names).view(joined.dtype["name"]).reshape(-1)
    joined["offset"], joined["length"] = offset, length
    return joined.view(f"S{width}")


def _layout(width: int) -> np.dtype[np.void]:
    return np.dtype([("name", f"S{width - SPAN_BYTES}"), ("offset", ">u8"), ("length", ">u8")])


def _columns(rows: npt.NDArray[Any]) -> npt.NDArray[np.void]:
    return np.ascontiguousarray(rows).view(_layout(rows.dtype.itemsize))


def native_rows(refs: ChunkRefs, native: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """The ranges of chunk objects that these references name."""
    ids = np.ascontiguousarray(refs.chunk_id[native]).view(np.uint8).reshape(-1, CHUNK_ID_BYTES)
    return rows(ids, refs.offset[native], refs.length[native])


def joined_native_rows(refs: ChunkRefs, native: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """Ranges with the same bytes as `native_rows`, of at least one reference; those in a row that adjoin are one.

    Chunks that are written together follow one another in their object, so that few rows are left to sort.
    """
    refs = refs if native.all() else refs.take(np.flatnonzero(native))
    ids = np.ascontiguousarray(refs.chunk_id).view("<u4").reshape(-1, CHUNK_ID_BYTES // 4)
    end = refs.offset + refs.length
    # A range that ends beyond 64 bits stays alone.
    ends = end >= refs.offset
    adjoin = (refs.offset[1:] == end[:-1]) & ends[1:] & ends[:-1]
    for word in ids.T:
        adjoin &= word[1:] == word[:-1]
    first = np.flatnonzero(np.append(True, ~adjoin))
    last = np.append(first[1:], len(refs)) - 1
    return rows(ids[first].view(np.uint8), refs.offset[first], end[last] - refs.offset[first])


def names_of(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The name of each row, ``S{k}[n]``."""
    return np.ascontiguousarray(_columns(rows)["name"])


def spans_of(rows: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Offset and length of each row, in bytes."""
    columns = _columns(rows)
    return columns["offset"].astype(np.uint64), columns["length"].astype(np.uint64)


def covered_by_object(rows: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint64]]:
    """Bytes of each object that ranges cover, once where they overlap.

    Parameters
    ----------
    rows
        Ascending.

    Returns
    -------
    names : S{k}[m]
        Ascending.
    bytes : uint64[m]
    """
    if not len(rows):
        return np.empty(0, f"S{rows.dtype.itemsize - SPAN_BYTES}"), np.empty(0, np.uint64)
    offset, length = spans_of(rows)
    first = starts_of_objects(rows)
    end = offset + length
    if bool((first[1:] | (end[:-1] <= offset[1:])).all()):
        start = offset
    else:
        start = np.maximum(offset, reached_before(first, end))
    fresh = np.where(end > start, end - start, np.uint64(0)).astype(np.uint64)
    begins = np.flatnonzero(first)
    return names_of(rows[begins]), np.add.reduceat(fresh, begins)


def reached_before(first: npt.NDArray[np.bool_], end: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The largest end of the ranges before each one within its object; 0 for the first of an object."""
    # Ends as ranks, so that objects do not mix.
    ends, rank = np.unique(end, return_inverse=True)
    reached = np.maximum.accumulate((np.cumsum(first) - 1) * len(ends) + rank)
    before = np.zeros(len(end), np.uint64)
    before[1:] = ends[reached[:-1] % len(ends)]
    before[first] = 0
    return before


def starts_of_objects(rows: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether each row, of ascending ones, is the first of its object."""
    names = names_of(rows)
    first = np.ones(len(rows), np.bool_)
    first[1:] = names[1:] != names[:-1]
    return first
