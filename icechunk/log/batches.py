"""Many small arrays at once: their rows are columns of their own, filled and merged together.

What numpy costs for two rows it costs for ten thousand. Rows of arrays of one rank are therefore laid one behind the
other, with the number of the array as a first coordinate, worked on as one, and cut apart again. Virtual references
stay out: their tables of strings would have to be cut apart as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.tables import INLINE, VIRTUAL, ChunkRef, ChunkRefs, Manifest
from icechunk.log.columns import DELETED, concat, from_rows, tombstones, trimmed
from icechunk.log.lookup import sort_last
from icechunk.log.pieces import ArrayPlan, references, written_of

__all__ = ["columns_of_many", "pieces_of_small"]

_SMALL: Final = 256
"""References: an array with more is worth numpy calls of its own."""

Rows = Mapping[tuple[int, ...], ChunkRef | None]


def columns_of_many(many: Sequence[Rows], ndim: int) -> list[ChunkRefs]:
    """`icechunk.log.columns.from_rows` of each; all of one rank."""
    if len(many) < 2 or any(r is not None and r.kind == VIRTUAL for rows in many for r in rows.values()):
        return [from_rows(rows, ndim) for rows in many]
    refs = from_rows({(i, *coords): ref for i, rows in enumerate(many) for coords, ref in rows.items()}, ndim + 1)
    return _split(replace(refs, coords=np.ascontiguousarray(refs.coords[:, 1:])), [len(rows) for rows in many])


def pieces_of_small(
    arrays: Iterable[ArrayPlan], manifests: Mapping[ObjectId, Manifest], max_refs: int
) -> dict[NodeId, ChunkRefs]:
    """What `icechunk.log.pieces.pieces` makes of arrays with few references; arrays that it must see to are left out.

    Parameters
    ----------
    manifests
        At least the sources of the dirty tiles.
    max_refs
        References in a piece.

    Returns
    -------
    dict
        The only piece of each array, which may be empty.

    Raises
    ------
    FormatError
        If a manifest lacks the array that the base says it holds.
    """
    limit = min(_SMALL, max_refs)
    by_rank: dict[int, list[ArrayPlan]] = {}
    for array in arrays:
        if array.tile_shape is not None or array.written.locations:
            continue
        dirty = [tile for tile in array.tiles if tile.dirty]
        if len(dirty) == 1 and not dirty[0].avoid and dirty[0].estimate <= limit:
            by_rank.setdefault(len(array.node.shape), []).append(array)
    found: dict[NodeId, ChunkRefs] = {}
    for ndim, members in by_rank.items():
        found |= _merged(members, manifests, ndim)
    return found


def _merged(arrays: Sequence[ArrayPlan], manifests: Mapping[ObjectId, Manifest], ndim: int) -> dict[NodeId, ChunkRefs]:
    parts: list[ChunkRefs] = []
    owners: list[int] = []
    boxes: list[tuple[tuple[int, int], ...]] = []
    everywhere = ((0, 2**32),) * ndim
    nodes: list[NodeId] = []
    for array in arrays:
        tile = next(tile for tile in array.tiles if tile.dirty)
        old = [references(array, source, manifests) for source in tile.sources]
        if any(refs.locations or refs.checksum_kind is not None for refs in old):
            continue
        written = written_of(array, tile)
        new = [written] if len(written) else []
        if len(tile.deleted):
            new.append(tombstones(array.deleted[tile.deleted]))
        parts += old
        parts += new
        owners += [len(nodes)] * (len(old) + len(new))
        shape = array.node.shape
        boxes += [
            tuple([(a, min(b, d.num_chunks)) for (a, b), d in zip(source.extents, shape, strict=True)])
            for source in tile.sources
        ]
        boxes += [everywhere] * len(new)
        nodes.append(array.node.id)
    if not parts:
        return dict.fromkeys(nodes, ChunkRefs.empty(ndim))
    sizes = np.fromiter(map(len, parts), np.int64, len(parts))
    refs = concat(parts)
    owner = np.repeat(np.array(owners, np.uint32), sizes)
    inside = np.ones(len(refs), np.bool_)
    # int64[parts, ndim, 2]
    limits = np.fromiter(chain.from_iterable(chain.from_iterable(boxes)), np.int64).reshape(len(parts), ndim, 2)
    for d in range(ndim):
        of_row = np.repeat(limits[:, d], sizes, axis=0)
        inside &= (refs.coords[:, d] >= of_row[:, 0]) & (refs.coords[:, d] < of_row[:, 1])
    if not inside.all():
        refs, owner = refs.take(inside), owner[inside]
    order = sort_last(np.column_stack([owner, refs.coords]))
    if order is not None:
        refs, owner = refs.take(order), owner[order]
    live = refs.kind != DELETED
    if not live.all():
        refs, owner = refs.take(live), owner[live]
    pieces = _split(trimmed(refs), np.bincount(owner, minlength=len(nodes)).tolist())
    return dict(zip(nodes, pieces, strict=True))


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
