"""The references of many arrays in columns; manifests are encoded from them and decoded into them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from icechunk.format.by_node import ByNode, Part, edges_of
from icechunk.format.ids import NodeId
from icechunk.format.values import ETAG, INLINE, ChunkRefs

__all__ = ["grouped_refs", "of_rank", "refs_by_node", "unmixed"]

_P = TypeVar("_P", tuple[str, ...], bytes)


def refs_by_node(parts: Iterable[Part[ChunkRefs]]) -> ByNode[ChunkRefs]:
    """The references of many arrays; all arrays of a part share tables and inline bytes."""
    return ByNode(parts, ChunkRefs.take)


def grouped_refs(arrays: Mapping[NodeId, ChunkRefs]) -> ByNode[ChunkRefs]:
    """The same from the references of each array; returned as it is if it is a `ByNode` already."""
    if isinstance(arrays, ByNode):
        return arrays
    by_rank: dict[int, list[NodeId]] = {}
    for node, refs in arrays.items():
        by_rank.setdefault(refs.ndim, []).append(node)
    return refs_by_node([_part(nodes, [arrays[node] for node in nodes]) for nodes in by_rank.values()])


def of_rank(arrays: Mapping[NodeId, ChunkRefs], node: NodeId, ndim: int) -> ChunkRefs | None:
    """The references of an array that have its number of dimensions; None where it has none of any rank."""
    refs = arrays.get(node)
    if refs is None or refs.ndim == ndim:
        return refs
    if isinstance(arrays, ByNode):
        for part in arrays.parts:
            if part.rows.ndim == ndim and node in part.nodes:
                i = part.nodes.index(node)
                rows: ChunkRefs = part.rows.take(slice(int(part.edges[i]), int(part.edges[i + 1])))
                return rows
    return ChunkRefs.empty(ndim)


def unmixed(columns: ByNode[ChunkRefs]) -> ByNode[ChunkRefs]:
    """The same with references of one rank only for each array, that of most of them, as a manifest of ours has it."""
    if len(columns) == sum(len(part.nodes) for part in columns.parts):
        return columns
    return grouped_refs(dict(columns))


def _part(nodes: Sequence[NodeId], batch: Sequence[ChunkRefs]) -> Part[ChunkRefs]:
    return Part(tuple(nodes), edges_of(batch), _joined(batch))


def _joined(batch: Sequence[ChunkRefs]) -> ChunkRefs:
    """The rows of several arrays of one rank, concatenated."""
    if len(batch) == 1:
        return batch[0]
    locations, location_base = _pooled([refs.locations for refs in batch])
    etags, etag_base = _pooled([refs.etags for refs in batch])
    inline, inline_base = _pooled([refs.inline_data for refs in batch])
    checked = any(refs.checksum_kind is not None for refs in batch)
    return ChunkRefs(
        coords=np.concatenate([refs.coords for refs in batch]),
        kind=np.concatenate([refs.kind for refs in batch]),
        offset=np.concatenate(
            [
                refs.offset + np.where(refs.kind == INLINE, base, 0).astype(np.uint64) if base else refs.offset
                for refs, base in zip(batch, inline_base, strict=True)
            ]
        ),
        length=np.concatenate([refs.length for refs in batch]),
        chunk_id=np.concatenate([refs.chunk_id for refs in batch]),
        location=np.concatenate([refs.location + base for refs, base in zip(batch, location_base, strict=True)]),
        locations=tuple(text for part in locations for text in part),
        checksum_kind=np.concatenate([_or_zeros(refs.checksum_kind, refs, np.uint8) for refs in batch])
        if checked
        else None,
        checksum=np.concatenate(
            [
                _or_zeros(refs.checksum, refs, np.int64)
                + np.where(_or_zeros(refs.checksum_kind, refs, np.uint8) == ETAG, base, 0)
                for refs, base in zip(batch, etag_base, strict=True)
            ]
        )
        if checked
        else None,
        etags=tuple(text for part in etags for text in part),
        inline_data=b"".join(inline),
    )


def _pooled(parts: Sequence[_P]) -> tuple[list[_P], list[int]]:
    """The distinct parts (by identity), and for each the position of its items among those of all."""
    kept: list[_P] = []
    begins: dict[int, int] = {}
    total = 0
    for part in parts:
        if id(part) not in begins:
            begins[id(part)] = total
            kept.append(part)
            total += len(part)
    return kept, [begins[id(part)] for part in parts]


def _or_zeros(column: npt.NDArray[Any] | None, refs: ChunkRefs, dtype: type) -> npt.NDArray[Any]:
    return np.zeros(len(refs), dtype) if column is None else column
