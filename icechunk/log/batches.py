"""Many small arrays at once: their rows are columns of their own, filled together.

What numpy costs for two rows it costs for ten thousand. Rows of arrays of one rank are therefore laid one behind the
other, and worked on as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from icechunk.format.by_node import ByNode, Part
from icechunk.format.ids import NodeId
from icechunk.format.tables import INLINE, VIRTUAL, ChunkRef, ChunkRefs, NodeSnapshot
from icechunk.log.columns import concat, from_rows, from_values
from icechunk.log.layered import Rows as RowsOfOne
from icechunk.log.layers import ArrayFold
from icechunk.log.lookup import sort_last

__all__ = ["LogRows", "columns_of_many", "edges_of_owners", "rows_of_many", "sorted_by_owner"]

Rows = Mapping[tuple[int, ...], ChunkRef | None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogRows:
    """What a log says of chunks."""

    small: ByNode[ChunkRefs]
    """Of small arrays, tombstones too, ascending and unique by coordinates; all of a rank are one part."""
    large: Mapping[NodeId, RowsOfOne]
    """The same of the others, one by one."""
    nodes: Mapping[NodeId, NodeSnapshot]
    """All those arrays as they are now, in ascending order of path."""


def rows_of_many(folds: Sequence[ArrayFold], ndim: int) -> Part[ChunkRefs]:
    """All rows of arrays of one rank; the folds stay as they are.

    Parameters
    ----------
    folds
        At least one, none of them empty.
    """
    rows = [fold.rows for fold in folds]
    values = list(chain.from_iterable([own.values() for own in rows]))
    open_rows = from_values(list(chain.from_iterable(rows)), values, ndim)
    owner = np.repeat(np.arange(len(folds), dtype=np.uint32), list(map(len, rows)))
    layers = [(i, layer.refs) for i, fold in enumerate(folds) if fold.layers for layer in fold.layers]
    refs = open_rows
    if layers:
        refs = concat([*[layer for _, layer in layers], open_rows])
        sizes = [len(layer) for _, layer in layers]
        owner = np.concatenate([np.repeat(np.array([i for i, _ in layers], np.uint32), sizes), owner])
    refs, owner = sorted_by_owner(refs, owner)
    return Part(tuple([fold.node_id for fold in folds]), edges_of_owners(owner, len(folds)), refs)


def sorted_by_owner(refs: ChunkRefs, owner: npt.NDArray[Any]) -> tuple[ChunkRefs, npt.NDArray[Any]]:
    """Rows ascending by owner and coordinates; of several with the same ones the last counts."""
    order = sort_last(np.column_stack([owner.astype(np.uint32, copy=False), refs.coords]))
    return (refs, owner) if order is None else (refs.take(order), owner[order])


def edges_of_owners(owner: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
    """Where the rows of each of so many owners begin, and where the last one's end; ``owner`` is ascending."""
    edges = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(owner, minlength=count), out=edges[1:])
    return edges


def columns_of_many(many: Sequence[Rows], ndim: int) -> list[ChunkRefs]:
    """`icechunk.log.columns.from_rows` of each; all of one rank."""
    if len(many) < 2 or any(r is not None and r.kind == VIRTUAL for rows in many for r in rows.values()):
        return [from_rows(rows, ndim) for rows in many]
    refs = from_rows({(i, *coords): ref for i, rows in enumerate(many) for coords, ref in rows.items()}, ndim + 1)
    return _split(replace(refs, coords=np.ascontiguousarray(refs.coords[:, 1:])), [len(rows) for rows in many])


def _split(refs: ChunkRefs, sizes: Sequence[int]) -> list[ChunkRefs]:
    """The first so many rows, the next so many, and so on; no row is virtual, and inline bytes are in row order."""
    edges = [0, *np.cumsum(sizes).tolist()]
    coords, kind, offset, length, chunk_id, location = (
        refs.coords,
        refs.kind,
        refs.offset,
        refs.length,
        refs.chunk_id,
        refs.location,
    )
    inline = kind == INLINE
    data = [b""] * len(sizes)
    if inline.any():
        ends: npt.NDArray[np.uint64] = np.cumsum(np.where(inline, length, np.uint64(0)), dtype=np.uint64)
        places = np.concatenate([np.zeros(1, np.uint64), ends])[edges]
        offset = np.where(inline, offset - np.repeat(places[:-1], sizes), offset)
        data = [refs.inline_data[a:b] for a, b in pairwise(places.tolist())]
    return [
        ChunkRefs(
            coords=coords[a:b],
            kind=kind[a:b],
            offset=offset[a:b],
            length=length[a:b],
            chunk_id=chunk_id[a:b],
            location=location[a:b],
            inline_data=own,
        )
        for (a, b), own in zip(pairwise(edges), data, strict=True)
    ]
