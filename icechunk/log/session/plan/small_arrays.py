"""Commits of many small arrays: arrays that end up with one small tile each are planned and merged together.

A numpy call costs as much for two rows as for ten thousand. The rows of all small arrays of one rank are therefore
concatenated in shared columns and processed at once.

The decisions of `tiles` and `manifest_rows` are simple for an array of few references. An array without references gets
one tile of the written ones; if the only manifest of an array holds a small box and all changes are inside it, that box
is rewritten. This module makes both decisions for all such arrays at once, in columns, and merges their references at
once with those of their manifests, which are usually the same few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, compress, pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from icechunk.errors import ErrorKind, FormatError
from icechunk.format.by_node import ByNode, Part, owners
from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.manifest.refs_by_node import grouped_refs
from icechunk.format.values import INLINE, VIRTUAL, ChunkRef, ChunkRefs, Extents, Manifest, NodeSnapshot
from icechunk.log.session.array_fold import ArrayFold
from icechunk.log.session.array_fold import Rows as RowsOfOne
from icechunk.log.session.columns import DELETED, concat, from_rows, from_values, sort_last, trimmed
from icechunk.runtime.late_dataclass import dataclass

__all__ = [
    "MANY",
    "Batch",
    "LogRows",
    "boxes_of",
    "columns_of_many",
    "cut",
    "edges_of_owners",
    "merged",
    "plan_batches",
    "rows_of_many",
    "sorted_by_owner",
]

Rows = Mapping[tuple[int, ...], ChunkRef | None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogRows:
    """The chunk rows of a log."""

    small: ByNode[ChunkRefs]
    """Rows of small arrays, tombstones too, ascending and unique by coordinates; arrays of one rank are one part."""
    large: Mapping[NodeId, RowsOfOne]
    """Rows of each of the other arrays."""
    nodes: Mapping[NodeId, NodeSnapshot]
    """The current nodes of all these arrays, in ascending order of path."""


def rows_of_many(folds: Sequence[ArrayFold], ndim: int) -> Part[ChunkRefs]:
    """All rows of arrays of one rank; the folds are not changed.

    Parameters
    ----------
    folds
        At least one fold; none is empty.
    """
    layers = [(i, layer.refs) for i, fold in enumerate(folds) if fold.layers for layer in fold.layers]
    batches = [refs for _, refs in layers]
    owners_of = [np.repeat(np.array([i for i, _ in layers], np.uint32), list(map(len, batches)))] if layers else []
    rows = [fold.rows for fold in folds]
    if any(rows):
        values = list(chain.from_iterable([own.values() for own in rows]))
        batches.append(from_values(list(chain.from_iterable(rows)), values, ndim))
        owners_of.append(np.repeat(np.arange(len(folds), dtype=np.uint32), list(map(len, rows))))
    refs, owner = concat(batches), owners_of[0] if len(owners_of) == 1 else np.concatenate(owners_of)
    refs, owner = sorted_by_owner(refs, owner)
    return Part(tuple([fold.node_id for fold in folds]), edges_of_owners(owner, len(folds)), refs)


def sorted_by_owner(refs: ChunkRefs, owner: npt.NDArray[Any]) -> tuple[ChunkRefs, npt.NDArray[Any]]:
    """Rows ascending by owner and coordinates; of several rows with equal ones the last counts."""
    order = sort_last(np.column_stack([owner.astype(np.uint32, copy=False), refs.coords]))
    return (refs, owner) if order is None else (refs.take(order), owner[order])


def edges_of_owners(owner: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
    """int64[count + 1]: the first row of each owner, and the end of the last one's rows; ``owner`` is ascending."""
    edges = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(owner, minlength=count), out=edges[1:])
    return edges


def columns_of_many(many: Sequence[Rows], ndim: int) -> list[ChunkRefs]:
    """`icechunk.log.session.columns.from_rows` for each array; all have the same rank."""
    if len(many) < 2 or any(r is not None and r.kind == VIRTUAL for rows in many for r in rows.values()):
        return [from_rows(rows, ndim) for rows in many]
    refs = from_rows({(i, *coords): ref for i, rows in enumerate(many) for coords, ref in rows.items()}, ndim + 1)
    return _split(replace(refs, coords=np.ascontiguousarray(refs.coords[:, 1:])), [len(rows) for rows in many])


def _split(refs: ChunkRefs, sizes: Sequence[int]) -> list[ChunkRefs]:
    """Split the rows into consecutive runs of these sizes; no row is virtual, and inline bytes are in row order."""
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


MANY: Final = 8
"""Number of arrays below which they are planned one by one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Arrays of one rank, each of which ends up with one small tile, or none."""

    nodes: tuple[NodeSnapshot, ...]
    """The current arrays, with the base's manifests, in ascending order of path."""
    rows: Part[ChunkRefs]
    """The log's rows inside the grids, tombstones too, in the order of the nodes."""
    sources: tuple[ObjectId | None, ...]
    """The manifest with each array's existing references, if they are needed; else None."""
    boxes: npt.NDArray[np.int64]
    """int64[n, ndim, 2]: for each array the box in which its references in that manifest count."""


def plan_batches(rows: LogRows, limit: int) -> tuple[list[Batch], frozenset[NodeId]]:
    """Plan the arrays that are simple (see the module).

    Parameters
    ----------
    limit
        Largest number of references of a small array.

    Returns
    -------
    batches
        At most one batch for each rank.
    done
        Ids of the arrays that need no plan of their own: those in the batches, and those that do not change.
    """
    batches: list[Batch] = []
    done: set[NodeId] = set()
    for part in rows.small.parts:
        nodes = [rows.nodes[i] for i in part.nodes]
        if len([node for node in nodes if len(node.manifests) < 2]) < MANY:
            continue
        if (traits := _traits(part, nodes)) is None:
            continue
        chosen, needed = traits.simple(limit)
        if np.count_nonzero(chosen) >= MANY:
            batch = _batch(part, nodes, traits, chosen, needed)
            batches.append(batch)
            done.update(batch.rows.nodes)
        done.update([node.id for node, idle in zip(nodes, traits.idle.tolist(), strict=True) if idle])
    return batches, frozenset(done)


class _Traits(NamedTuple):
    """The numbers, in columns, that decide whether arrays of one rank are simple."""

    present: npt.NDArray[np.int64]
    """Number of manifests of each array."""
    boxes: npt.NDArray[np.int64]
    """int64[n, ndim, 2]: the box of the array's only manifest, clipped to the grid."""
    visible: npt.NDArray[np.bool_]
    """Rows of the log that are inside the grids."""
    written: npt.NDArray[np.int64]
    """Number of references of each array among those."""
    written_inside: npt.NDArray[np.int64]
    """Number of those references that are in the box."""
    changed: npt.NDArray[np.int64]
    """Number of references and tombstones of each array in the box."""

    @property
    def idle(self) -> npt.NDArray[np.bool_]:
        """Mask of the arrays that had no references and get none."""
        idle: npt.NDArray[np.bool_] = (self.present == 0) & (self.written == 0)
        return idle

    def simple(self, limit: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Masks of the arrays for a batch, and of those whose manifest is needed."""
        # As floats: a box may have more chunks than any integer holds.
        sides = np.maximum(self.boxes[:, :, 1] - self.boxes[:, :, 0], 0)
        chunks: npt.NDArray[np.float64] = sides.astype(np.float64).prod(axis=1)
        first: npt.NDArray[np.bool_] = (self.present == 0) & (self.written > 0) & (self.written <= limit)
        again: npt.NDArray[np.bool_] = (self.present == 1) & (chunks > 0) & (chunks <= limit)
        again &= (self.written == self.written_inside) & (self.changed > 0)
        needed: npt.NDArray[np.bool_] = again & (self.changed < chunks)
        return first | again, needed


def _traits(part: Part[ChunkRefs], nodes: Sequence[NodeSnapshot]) -> _Traits | None:
    """The traits of the arrays of a part; None if the rank of some extents differs from that of their array."""
    n, ndim = len(nodes), part.rows.ndim
    present = np.fromiter([len(node.manifests) for node in nodes], np.int64, n)
    # Length and number of chunks of each dimension.
    shapes = np.array(list(chain.from_iterable(chain.from_iterable([node.shape for node in nodes]))), np.uint64)
    grids = shapes.reshape(n, ndim, 2)[:, :, 1].astype(np.int64)
    boxes = np.zeros((n, ndim, 2), np.int64)
    single = present == 1
    extents = [node.manifests[0].extents for node in nodes if len(node.manifests) == 1]
    if extents:
        if set(map(len, extents)) != {ndim}:
            return None
        flat = list(chain.from_iterable(chain.from_iterable(extents)))
        boxes[single] = np.array(flat, np.int64).reshape(len(extents), ndim, 2)
        boxes[:, :, 1] = np.minimum(boxes[:, :, 1], grids)
    owner, coords = owners(part.edges), part.rows.coords
    visible: npt.NDArray[np.bool_] = np.all(coords < grids[owner], axis=1)
    inside = visible & _inside(coords, boxes[owner])
    live = part.rows.kind != DELETED

    def tally(rows: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        return np.bincount(owner[rows], minlength=n)

    return _Traits(present, boxes, visible, tally(visible & live), tally(inside & live), tally(inside))


def _inside(coords: npt.NDArray[np.uint32], boxes: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """bool[n]: whether each of the coordinates, uint32[n, ndim], is in its box, int64[n, ndim, 2]."""
    inside: npt.NDArray[np.bool_] = np.all((coords >= boxes[:, :, 0]) & (coords < boxes[:, :, 1]), axis=1)
    return inside


def _batch(
    part: Part[ChunkRefs],
    nodes: Sequence[NodeSnapshot],
    traits: _Traits,
    chosen: npt.NDArray[np.bool_],
    needed: npt.NDArray[np.bool_],
) -> Batch:
    own = tuple(compress(nodes, chosen.tolist()))
    owner = owners(part.edges)
    keep = chosen[owner] & traits.visible
    numbers = np.cumsum(chosen) - 1
    reads = zip(own, needed[chosen].tolist(), strict=True)
    return Batch(
        nodes=own,
        rows=Part(
            tuple([node.id for node in own]),
            edges_of_owners(numbers[owner[keep]], len(own)),
            part.rows if keep.all() else part.rows.take(keep),
        ),
        sources=tuple([node.manifests[0].object_id if read else None for node, read in reads]),
        boxes=traits.boxes[chosen],
    )


def merged(batch: Batch, manifests: Mapping[ObjectId, Manifest]) -> Part[ChunkRefs] | None:
    """The current references of the arrays; arrays without references are left out. None if no array has any.

    Parameters
    ----------
    manifests
        At least the batch's sources.

    Raises
    ------
    FormatError
        If a manifest lacks the array that the base says it holds.
    """
    parts: list[ChunkRefs] = []
    of: list[npt.NDArray[np.int64]] = []
    for part, members, places in _present(batch, manifests):
        first, sizes = part.edges[places], part.edges[places + 1] - part.edges[places]
        owner = np.repeat(members, sizes)
        rows = np.repeat(first - (np.cumsum(sizes) - sizes), sizes) + np.arange(len(owner))
        inside = _inside(part.rows.coords[rows], batch.boxes[owner])
        parts.append(part.rows.take(rows if inside.all() else rows[inside]))
        of.append(owner if inside.all() else owner[inside])
    parts.append(batch.rows.rows)
    of.append(owners(batch.rows.edges))
    refs, owner = sorted_by_owner(concat(parts), np.concatenate(of))
    live = refs.kind != DELETED
    if not live.all():
        refs, owner = refs.take(live), owner[live]
    if not len(refs):
        return None
    edges = edges_of_owners(owner, len(batch.nodes))
    nodes = batch.rows.nodes
    filled = np.diff(edges) > 0
    if not filled.all():
        nodes = tuple(compress(nodes, filled.tolist()))
        edges = np.concatenate([np.zeros(1, np.int64), edges[1:][filled]])
    return Part(nodes, edges, trimmed(refs))


def _present(
    batch: Batch, manifests: Mapping[ObjectId, Manifest]
) -> list[tuple[Part[ChunkRefs], npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Columns that hold the existing references of the batch's arrays, each with the numbers of those arrays in the
    batch and their numbers in the columns."""
    columns = {id: grouped_refs(manifests[id].arrays) for id in set(batch.sources) if id is not None}
    found: dict[int, tuple[Part[ChunkRefs], list[int], list[int]]] = {}
    for i, (node, source) in enumerate(zip(batch.nodes, batch.sources, strict=True)):
        if source is None:
            continue
        where = columns[source].where(node.id)
        if where is None:
            raise FormatError(
                f"manifest {source.hex()} holds no references of the array {node.path}, although the snapshot says so",
                ErrorKind.INCONSISTENT_MANIFESTS,
            )
        if where[0].rows.ndim != len(node.shape):
            where = _of_rank(columns[source], node)
            if where is None:
                continue
        part, place = where
        _, members, places = found.setdefault(id(part), (part, [], []))
        members.append(i)
        places.append(place)
    return [(part, np.array(members), np.array(places)) for part, members, places in found.values()]


def _of_rank(columns: ByNode[ChunkRefs], node: NodeSnapshot) -> tuple[Part[ChunkRefs], int] | None:
    """The part with the references of an array that have its rank; other writers may have stored several ranks."""
    for part in columns.parts:
        if part.rows.ndim == len(node.shape) and node.id in part.nodes:
            return part, part.nodes.index(node.id)
    return None


def boxes_of(part: Part[ChunkRefs]) -> list[Extents]:
    """The bounding box of the references of each array; every array has at least one. Equal boxes are one object."""
    ndim = part.rows.ndim
    starts = part.edges[:-1]
    coords = part.rows.coords.astype(np.int64)
    low, high = np.minimum.reduceat(coords, starts), np.maximum.reduceat(coords, starts) + 1
    boxes = np.stack([low, high], axis=2)
    known: dict[bytes, Extents] = {}
    raw, size = boxes.tobytes(), 16 * ndim
    result = []
    for i in range(len(starts)):
        key = raw[size * i : size * (i + 1)]
        box = known.get(key)
        if box is None:
            box = known[key] = tuple([(a, b) for a, b in boxes[i].tolist()])
        result.append(box)
    return result


def cut(part: Part[ChunkRefs], first: int, last: int) -> Part[ChunkRefs]:
    """The arrays numbered ``first`` (inclusive) to ``last`` (exclusive)."""
    if not first and last == len(part.nodes):
        return part
    edges = part.edges[first : last + 1]
    rows = part.rows.take(slice(int(edges[0]), int(edges[-1])))
    return Part(part.nodes[first:last], edges - edges[0], trimmed(rows))
