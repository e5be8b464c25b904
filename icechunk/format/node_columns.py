"""Nodes of a snapshot that share a layout, many at once.

Five thousand arrays of one kind differ in what they are called, in their documents' bytes, in their shapes, in where
their references are, and in where they stand in the file: everything else is the first one's bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from icechunk.format.tables import NodeKind, NodeSnapshot

__all__ = ["FEW", "Layout", "alike", "block"]

FEW: Final = 16
"""Nodes: fewer of one layout are written one by one."""

_ID_AT: Final = 16
_REF_SIZE: Final = 24
"""Of the table of a manifest's id and extents, up to the extents."""
_MOST: Final = 2**32 - 1


class Layout(NamedTuple):
    """Where in a node's bytes stands what differs from node to node, counted from its first byte."""

    tables: tuple[int, ...]
    """Every table; it begins with the distance to its vtable."""
    path_at: int
    path_bytes: int
    """Of the field, with its padding."""
    data_at: int
    data_bytes: int
    dimensions_at: int
    """Format 2: of the table of the first dimension; format 1: of the numbers of the first dimension."""
    refs_at: int
    """Of the table of the first manifest."""


def alike(nodes: Sequence[NodeSnapshot], paths: Sequence[bytes]) -> list[npt.NDArray[np.intp]]:
    """Numbers of nodes of one layout, for every layout; those with `NodeSnapshot.extra` are left out.

    Parameters
    ----------
    paths
        Of the nodes, as they are encoded.
    """
    n = len(nodes)
    traits: list[npt.NDArray[np.int64]] = [
        np.fromiter(map(len, paths), np.int64, n) // 4,
        -(-np.fromiter([len(node.user_data) for node in nodes], np.int64, n) // 4),
        np.fromiter([len(node.shape) if node.kind is NodeKind.ARRAY else -1 for node in nodes], np.int64, n),
        np.fromiter([len(node.manifests) for node in nodes], np.int64, n),
        np.fromiter([len(node.manifests[0].extents) if node.manifests else -1 for node in nodes], np.int64, n),
    ]
    numbers = {names: i for i, names in enumerate(dict.fromkeys(node.dimension_names for node in nodes))}
    if len(numbers) > 1:
        traits.append(np.fromiter([numbers[node.dimension_names] for node in nodes], np.int64, n))
    kinds = np.zeros(n, np.int64)
    for trait in traits:
        if trait.min() == trait.max():
            continue
        # Numbered anew each time, so that the product stays small.
        _, kinds = np.unique(kinds * (int(trait.max()) + 2) + trait + 1, return_inverse=True)
    order = np.argsort(kinds, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(kinds[order])) + 1)
    extra = np.array([node.extra is not None for node in nodes], np.bool_)
    return [group[~extra[group]] for group in groups] if extra.any() else groups


def block(
    template: bytes,
    layout: Layout,
    nodes: Sequence[NodeSnapshot],
    paths: Sequence[bytes],
    shapes_v1: Sequence[Sequence[tuple[int, int]]] | None,
) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]] | None:
    """The bytes of many nodes, uint8[n, size]; None where a number does not fit its field.

    Parameters
    ----------
    template
        Those of the first one.
    nodes, paths
        To stand one behind the other, from the first one's place on.
    shapes_v1
        For format 1: length and chunk length along each dimension, of each node.
    """
    n, size = len(nodes), len(template)
    out = np.empty((n, size), np.uint8)
    out[:] = np.frombuffer(template, np.uint8)

    def field(at: int, dtype: npt.DTypeLike, items: int = 1, step: int = 0) -> npt.NDArray[Any]:
        """A view of numbers in every node: ``items`` of them, ``step`` bytes apart."""
        return np.ndarray((n, items), dtype, out, at, (size, step))

    moved = size * np.arange(n, dtype=np.int64)
    for at in layout.tables:
        distance = field(at, "<i4")[:, 0]
        distance[:] = distance + moved
    field(_ID_AT, "V8")[:, 0] = np.frombuffer(b"".join([node.id for node in nodes]), "V8")
    _fill_texts(field(layout.path_at, "<u4"), out, layout.path_at + 4, layout.path_bytes, paths)
    data = [node.user_data for node in nodes]
    _fill_texts(field(layout.data_at, "<u4"), out, layout.data_at + 4, layout.data_bytes, data)
    shapes: Sequence[Sequence[tuple[int, int]]] = [node.shape for node in nodes] if shapes_v1 is None else shapes_v1
    ndim = len(shapes[0])
    if ndim and nodes[0].kind is NodeKind.ARRAY:
        numbers = _numbers(list(chain.from_iterable(chain.from_iterable(shapes))), 2**64 - 1)
        if numbers is None or (shapes_v1 is None and numbers[1::2].max() > _MOST):
            return None
        pairs = numbers.reshape(n, 2 * ndim)
        if shapes_v1 is None:
            field(layout.dimensions_at + 4, "<u8", ndim, 16)[:] = pairs[:, ::2]
            field(layout.dimensions_at + 12, "<u4", ndim, 16)[:] = pairs[:, 1::2]
        else:
            field(layout.dimensions_at, "<u8", 2 * ndim, 8)[:] = pairs
    count = len(nodes[0].manifests)
    if count:
        refs = [ref for node in nodes for ref in node.manifests]
        rank = len(refs[0].extents)
        extents = [ref.extents for ref in refs]
        step = _REF_SIZE + 8 * rank
        field(layout.refs_at + 8, "V12", count, step)[:] = np.frombuffer(
            b"".join([ref.object_id for ref in refs]), "V12"
        ).reshape(n, count)
        if set(map(len, extents)) != {rank}:
            return None
        if rank:
            ranges = _numbers(list(chain.from_iterable(chain.from_iterable(extents))), _MOST)
            if ranges is None:
                return None
            ranges = ranges.reshape(n, count, 2 * rank)
            for i in range(2 * rank):
                field(layout.refs_at + _REF_SIZE + 4 * i, "<u4", count, step)[:] = ranges[:, :, i]
    return out


def _fill_texts(
    lengths: npt.NDArray[Any], out: npt.NDArray[np.uint8], at: int, width: int, texts: Sequence[bytes]
) -> None:
    lengths[:, 0] = np.fromiter(map(len, texts), np.uint32, len(texts))
    if width:
        # Bytes that end with zeros are those bytes, padded.
        out[:, at : at + width] = np.array(texts, f"S{width}").view(np.uint8).reshape(len(texts), width)


def _numbers(values: Sequence[int], most: int) -> npt.NDArray[np.uint64] | None:
    """The values as a column; None where one of them is negative or larger than that."""
    if min(values) < 0 or max(values) > most:
        return None
    return np.array(values, np.uint64)
