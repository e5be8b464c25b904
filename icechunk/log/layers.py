"""The fold of one array's chunk events.

Rows written one at a time gather in a dict; bulk rows, and dicts that were sealed, are layers of
sorted columns, newest last. A new layer is merged with its predecessor until every layer is at
least twice as large as the next, so there are O(log n) of them, a row is merged O(log n) times,
and a look-up is one dict access and a few bisections. Large layers stay apart until there are many:
they share their columns with the events, and merging would copy them.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import lt
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from icechunk.format.ids import NodeId
from icechunk.format.tables import ChunkRef, ChunkRefs
from icechunk.log.columns import DELETED, concat, from_rows, normalized, tombstones
from icechunk.log.events import ChunksDeleted, ChunksWritten
from icechunk.log.lookup import RefTable

__all__ = ["FEW_ROWS", "LARGE_LAYER", "MANY_LAYERS", "OPEN_ROWS", "ArrayFold", "in_view", "inside"]

OPEN_ROWS: Final = 16_384
"""So many rows written one at a time become columns: a row of a dict takes ten times the memory."""

LARGE_LAYER: Final = 2**20
"""Rows of a layer that is not merged with its neighbours before there are `MANY_LAYERS`."""
MANY_LAYERS: Final = 64

FEW_ROWS: Final = 256
"""Rows: an array with more is worth numpy calls of its own."""

_MOST: Final = 2**32 - 1

Found: TypeAlias = ChunkRef | Literal[False] | None


class ArrayFold:
    """What the log says about the chunks of one array.

    Parameters
    ----------
    node_id
        Of the array.
    path
        Where it stood when the first row came.
    grid
        Chunks along each dimension, as the metadata says now.
    """

    __slots__ = ("grid", "layers", "node_id", "path", "rows")

    def __init__(self, node_id: NodeId, path: str, grid: tuple[int, ...]) -> None:
        self.node_id = node_id
        self.path = path
        self.grid = grid
        self.rows: dict[tuple[int, ...], ChunkRef | None] = {}
        self.layers: list[RefTable] = []

    def __bool__(self) -> bool:
        return bool(self.rows or self.layers)

    def find(self, coords: tuple[int, ...]) -> Found:
        """The newest row at these coordinates: a reference, None if deleted, False if the log says nothing."""
        found: Found = self.rows.get(coords, False)
        if found is not False or not self.layers:
            return found
        for layer in reversed(self.layers):
            row = layer.index.find(coords)
            if row >= 0:
                return None if layer.kind(row) == DELETED else layer.row(row)
        return False

    def push(self, refs: ChunkRefs) -> None:
        """Lay rows (ascending, unique; tombstones allowed) over everything known so far."""
        if not len(refs):
            return
        layer = RefTable(refs)
        while self.layers and len(self.layers[-1].refs) < 2 * len(layer.refs):
            apart = len(self.layers[-1].refs) + len(layer.refs) > LARGE_LAYER
            if apart and len(self.layers) < MANY_LAYERS:
                break
            older = self.layers.pop()
            layer = RefTable(normalized(concat([older.refs, layer.refs])))
        self.layers.append(layer)

    def push_deleted(self, coords: npt.NDArray[np.uint32]) -> None:
        """Lay tombstones (ascending, unique) over everything known so far."""
        self.push(tombstones(coords))

    @property
    def is_small(self) -> bool:
        """Whether its rows are so few that they are worked on together with those of other arrays."""
        count = len(self.rows)
        for layer in self.layers:
            count += len(layer.refs)
        return count <= FEW_ROWS

    def seal(self) -> list[ChunksWritten | ChunksDeleted]:
        """End the open rows: they become a layer, and the events returned."""
        return self.seal_as(from_rows(self.rows, len(self.grid))) if self.rows else []

    def seal_as(self, refs: ChunkRefs) -> list[ChunksWritten | ChunksDeleted]:
        """The same, given the open rows as columns."""
        self.rows = {}
        self.push(refs)
        deleted = refs.kind == DELETED
        if not deleted.any():
            return [ChunksWritten(node_id=self.node_id, refs=refs)]
        events: list[ChunksWritten | ChunksDeleted] = []
        if not deleted.all():
            events.append(ChunksWritten(node_id=self.node_id, refs=refs.take(~deleted)))
        events.append(ChunksDeleted(node_id=self.node_id, coords=refs.coords[deleted]))
        return events

    def flat(self) -> ChunkRefs:
        """All rows, tombstones too, ascending and unique; the open rows must have been sealed."""
        if not self.layers:
            return ChunkRefs.empty(len(self.grid))
        if len(self.layers) > 1:
            self.layers = [RefTable(normalized(concat([layer.refs for layer in self.layers])))]
        return self.layers[0].refs


def inside(coords: npt.NDArray[np.uint32], grid: Sequence[int]) -> npt.NDArray[np.bool_]:
    """bool[n]: which coordinates lie in a grid of that many chunks along each dimension."""
    if len(coords) <= 16:
        return np.array([all(map(lt, row, grid)) for row in coords.tolist()], np.bool_)
    good = np.ones(len(coords), np.bool_)
    for d, n in enumerate(grid):
        if n <= _MOST:
            good &= coords[:, d] < n
    return good


def in_view(refs: ChunkRefs, grid: Sequence[int]) -> tuple[ChunkRefs, npt.NDArray[np.uint32]]:
    """Of rows with tombstones, those inside a grid: the references, and the coordinates of the tombstones."""
    visible = inside(refs.coords, grid)
    written = visible & (refs.kind != DELETED)
    if written.all():
        return refs, refs.coords[:0]
    return refs.take(written), refs.coords[visible & ~written]
