"""The fold of one array's chunk events.

Rows written one at a time gather in a dict; bulk rows, and dicts that were closed, are layers of
sorted columns, newest last. A new layer is merged with its predecessor until every layer is at
least twice as large as the next, so there are O(log n) of them, a row is merged O(log n) times,
and a look-up is one dict access and a few bisections. Large layers stay apart until there are many,
and then a few neighbours are merged at a time.

Layers are *fresh* until the log asks for them as events: only then do the events hold columns, those of
the layers. What was merged before that is in memory once.
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
from icechunk.log.layered import Layered, layered
from icechunk.log.lookup import RefTable

__all__ = ["FEW_ROWS", "LARGE_LAYER", "MANY_LAYERS", "OPEN_ROWS", "ArrayFold", "in_view", "inside"]

OPEN_ROWS: Final = 16_384
"""So many rows written one at a time become columns: a row of a dict takes ten times the memory."""

LARGE_LAYER: Final = 2**20
"""Rows of a layer that is not merged with its neighbours before there are `MANY_LAYERS`."""
MANY_LAYERS: Final = 64
_MERGED_LAYERS: Final = 8
"""So many are then made one."""

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

    __slots__ = ("_fresh", "_spread", "grid", "layers", "node_id", "path", "rows")

    def __init__(self, node_id: NodeId, path: str, grid: tuple[int, ...]) -> None:
        self.node_id = node_id
        self.path = path
        self.grid = grid
        self.rows: dict[tuple[int, ...], ChunkRef | None] = {}
        self.layers: list[RefTable] = []
        self._fresh = 0
        self._spread: Layered | None = None

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

    def push(self, refs: ChunkRefs, *, told: bool = False) -> None:
        """Lay rows (ascending, unique; tombstones allowed) over everything known so far.

        Parameters
        ----------
        told
            They are those of an event, and nothing is fresh.
        """
        if not len(refs):
            return
        self._spread = None
        self.layers.append(RefTable(refs))
        if told:
            self._settle(0)
            return
        self._fresh += 1
        before = len(self.layers)
        self._settle(before - self._fresh)
        self._fresh -= before - len(self.layers)

    def push_deleted(self, coords: npt.NDArray[np.uint32], *, told: bool = False) -> None:
        """Lay tombstones (ascending, unique) over everything known so far; ``told`` as in `push`."""
        self.push(tombstones(coords), told=told)

    def close(self) -> None:
        """End the open rows: they become a layer."""
        if self.rows:
            self.close_as(from_rows(self.rows, len(self.grid)))

    def close_as(self, refs: ChunkRefs) -> None:
        """The same, given the open rows as columns."""
        self.rows = {}
        self.push(refs)

    def tell(self) -> list[ChunksWritten | ChunksDeleted]:
        """What is fresh, open rows too, as events; it is not afterwards."""
        self.close()
        events: list[ChunksWritten | ChunksDeleted] = []
        for layer in self.layers[len(self.layers) - self._fresh :]:
            refs = layer.refs
            deleted = refs.kind == DELETED
            if not deleted.any():
                events.append(ChunksWritten(node_id=self.node_id, refs=refs))
                continue
            if not deleted.all():
                events.append(ChunksWritten(node_id=self.node_id, refs=refs.take(~deleted)))
            events.append(ChunksDeleted(node_id=self.node_id, coords=refs.coords[deleted]))
        if self._fresh:
            self._fresh = 0
            self._settle(0)
        return events

    @property
    def is_small(self) -> bool:
        """Whether its rows are so few that they are worked on together with those of other arrays."""
        count = len(self.rows)
        if self.layers:
            count += sum([len(layer.refs) for layer in self.layers])
        return count <= FEW_ROWS and count <= LARGE_LAYER

    @property
    def is_mixed(self) -> bool:
        """Whether some layers are fresh and others are not."""
        return 0 < self._fresh < len(self.layers)

    def flat(self) -> ChunkRefs:
        """All rows, tombstones too, ascending and unique, which are one layer then; there are no open rows, and either
        all layers are fresh or none is."""
        if not self.layers:
            return ChunkRefs.empty(len(self.grid))
        if len(self.layers) > 1:
            self.layers = [RefTable(normalized(concat([layer.refs for layer in self.layers])))]
            self._fresh = min(self._fresh, 1)
        return self.layers[0].refs

    @property
    def is_large(self) -> bool:
        """Whether to make one layer of all would copy many rows."""
        return len(self.layers) > 1 and sum(len(layer.refs) for layer in self.layers) > LARGE_LAYER

    def spread(self) -> Layered:
        """The same rows as `flat`, where they are; there are several layers, and no open rows."""
        if self._spread is None:
            self._spread = layered([layer.refs for layer in self.layers])
        return self._spread

    def _settle(self, first: int) -> None:
        """Merge the newest layers, of those from ``first`` on, until each is twice as large as the next."""
        layers = self.layers
        while len(layers) > first + 1:
            older, newer = layers[-2].refs, layers[-1].refs
            if len(older) >= 2 * len(newer) or len(older) + len(newer) > LARGE_LAYER:
                break
            layers[-2:] = [RefTable(normalized(concat([older, newer])))]
        if len(layers) > MANY_LAYERS and len(layers) - first >= _MERGED_LAYERS:
            ends = np.cumsum([0, *(len(layer.refs) for layer in layers[first:])])
            start = first + int(np.argmin(ends[_MERGED_LAYERS:] - ends[:-_MERGED_LAYERS]))
            run = slice(start, start + _MERGED_LAYERS)
            layers[run] = [RefTable(normalized(concat([layer.refs for layer in layers[run]])))]


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
