"""The fold of one array's chunk events.

Rows written one at a time are collected in a dict, the *open rows*. Bulk rows, and dicts that were closed, are layers
of sorted columns, newest last. A new layer is merged with its predecessor until every layer is at least twice as large
as the next, so there are O(log n) layers, a row is merged O(log n) times, and a look-up is one dict access and a few
bisections. Large layers stay separate until there are many, and then a few neighbours are merged at a time. `Layered`
presents the rows of many layers as one list without copying them.

A layer is *fresh* until the log takes it as an event. The event then holds the columns of the layer, so the rows are in
memory once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from operator import lt
from typing import Any, Final, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from icechunk.format.by_node import Coords
from icechunk.format.ids import NodeId
from icechunk.format.values import ChunkRef, ChunkRefs
from icechunk.log.session.columns import (
    DELETED,
    RefTable,
    concat,
    from_rows,
    normalized,
    sort_last,
    tombstones,
    trimmed,
)
from icechunk.log.session.events import ChunksDeleted, ChunksWritten

__all__ = [
    "FEW_ROWS",
    "LARGE_LAYER",
    "MANY_LAYERS",
    "OPEN_ROWS",
    "ArrayFold",
    "Layered",
    "Rows",
    "in_view",
    "inside",
    "layered",
]

_SAMPLE: Final = 2**16
_SLAB_SAMPLES: Final = 64
"""Samples per slab of about 4 million rows. One slab is merged at a time: sorting takes ten times the memory of the
rows that are sorted."""


class Rows(Protocol):
    """References of one array, ascending and unique by coordinates: `ChunkRefs`, or `Layered`."""

    def __len__(self) -> int: ...

    @property
    def coords(self) -> Coords:
        """uint32[n, ndim]."""
        ...

    @property
    def locations(self) -> tuple[str, ...]:
        """Table of locations; empty only if no row is virtual."""
        ...

    def take(self, rows: npt.NDArray[Any]) -> ChunkRefs:
        """The references at these row numbers (in this order), or in the rows where this mask is true."""
        ...


class Layered:
    """Rows of several layers as one ascending list: coordinates are one column, the rest stays in the layers.

    Parameters
    ----------
    coords
        uint32[n, ndim], ascending and unique.
    parts
        Columns that hold the rows.
    order
        uint32[n]: the index of each row in the concatenation of all parts; None: the order of that concatenation.
    """

    __slots__ = ("_order", "_parts", "_starts", "coords")

    def __init__(self, coords: Coords, parts: Sequence[ChunkRefs], order: npt.NDArray[np.uint32] | None) -> None:
        self.coords: Coords = coords
        self._parts = tuple(parts)
        self._starts = np.cumsum([0, *map(len, parts)])
        self._order = order

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def locations(self) -> tuple[str, ...]:
        """The first table of locations that is not empty."""
        return next((part.locations for part in self._parts if part.locations), ())

    def kinds(self) -> npt.NDArray[np.uint8]:
        """uint8[n]: the kind of each row."""
        kinds = np.concatenate([part.kind for part in self._parts])
        return kinds if self._order is None else kinds[self._order]

    def where(self, mask: npt.NDArray[np.bool_]) -> Layered:
        """The rows where the mask is true."""
        order = np.flatnonzero(mask).astype(np.uint32) if self._order is None else self._order[mask]
        return Layered(self.coords[mask], self._parts, order)

    def take(self, rows: npt.NDArray[Any]) -> ChunkRefs:
        """A copy of the references at these row numbers (in this order), or in the rows where this mask is true; the
        tables of the copy hold only the entries that its rows use."""
        if rows.dtype == np.bool_:
            rows = np.flatnonzero(rows)
        numbers = rows if self._order is None else self._order[rows]
        of_part = np.searchsorted(self._starts, numbers, side="right") - 1
        by_part = None
        if (of_part[1:] < of_part[:-1]).any():
            by_part = np.argsort(of_part, kind="stable")
            numbers, of_part = numbers[by_part], of_part[by_part]
        edges = np.flatnonzero(of_part[1:] != of_part[:-1]) + 1
        found = []
        for a, b in pairwise([0, *edges.tolist(), len(numbers)]):
            if a < b:
                part = int(of_part[a])
                found.append(trimmed(self._parts[part].take(numbers[a:b] - self._starts[part])))
        if not found:
            return ChunkRefs.empty(int(self.coords.shape[1]))
        refs = concat(found)
        if by_part is None:
            return refs
        back = np.empty(len(by_part), np.intp)
        back[by_part] = np.arange(len(by_part))
        return refs.take(back)


def layered(layers: Sequence[ChunkRefs]) -> Layered:
    """All rows of some layers; of rows with the same coordinates the newest counts.

    Parameters
    ----------
    layers
        At least one layer, oldest first; each ascending and unique by coordinates, none empty, all of the same rank,
        which is not 0.
    """
    ordered = sorted(layers, key=_first)
    if all(_last(a) < _first(b) for a, b in pairwise(ordered)):
        return Layered(np.concatenate([part.coords for part in ordered]), ordered, None)
    return _merged(layers)


def _merged(layers: Sequence[ChunkRefs]) -> Layered:
    starts = np.cumsum([0, *map(len, layers)])
    coords = np.empty((int(starts[-1]), layers[0].ndim), np.uint32)
    order = np.empty(int(starts[-1]), np.uint32)
    axis = _sorted_axis(layers)
    columns: list[Any] = [memoryview(part.coords[:, axis]) for part in layers]  # type: ignore[arg-type]
    samples = np.sort(np.concatenate([part.coords[::_SAMPLE, axis] for part in layers]))
    cuts = np.unique(samples[::_SLAB_SAMPLES][1:]).tolist()
    begins = [0] * len(layers)
    filled = 0
    for cut in [*cuts, None]:
        ends = [len(c) if cut is None else bisect_left(c, cut, a) for c, a in zip(columns, begins, strict=True)]
        some = [i for i in range(len(layers)) if begins[i] < ends[i]]
        if some:
            slab = np.concatenate([layers[i].coords[begins[i] : ends[i]] for i in some])
            numbers = np.concatenate([np.arange(starts[i] + begins[i], starts[i] + ends[i]) for i in some])
            newest = sort_last(slab)
            if newest is not None:
                slab, numbers = slab[newest], numbers[newest]
            coords[filled : filled + len(slab)] = slab
            order[filled : filled + len(slab)] = numbers
            filled += len(slab)
        begins = ends
    return Layered(coords[:filled], layers, order[:filled])


def _sorted_axis(layers: Sequence[ChunkRefs]) -> int:
    """The first axis along which coordinates differ; all layers are therefore sorted by it."""
    for axis in range(layers[0].ndim):
        ends = {int(c) for part in layers for c in (part.coords[0, axis], part.coords[-1, axis])}
        if len(ends) > 1:
            return axis
    return 0


def _first(part: ChunkRefs) -> tuple[int, ...]:
    return tuple(part.coords[0].tolist())


def _last(part: ChunkRefs) -> tuple[int, ...]:
    return tuple(part.coords[-1].tolist())


OPEN_ROWS: Final = 16_384
"""Number of open rows that are turned into columns: a row of a dict takes ten times the memory."""

LARGE_LAYER: Final = 2**20
"""Number of rows from which a layer is not merged with its neighbours before there are `MANY_LAYERS`."""
MANY_LAYERS: Final = 64
_MERGED_LAYERS: Final = 8
"""Number of large layers that are then merged into one."""

FEW_ROWS: Final = 256
"""Number of rows above which an array gets numpy calls of its own."""

_MOST: Final = 2**32 - 1

Found: TypeAlias = ChunkRef | Literal[False] | None


class ArrayFold:
    """The log's knowledge of the chunks of one array.

    Parameters
    ----------
    node_id
        Id of the array.
    path
        Path of the array when its first row was added.
    grid
        Number of chunks along each dimension, according to the current metadata.
    """

    __slots__ = ("_fresh", "_spread", "grid", "layers", "node_id", "path", "rows")

    def __init__(self, node_id: NodeId, path: str, grid: tuple[int, ...]) -> None:
        self.node_id: NodeId = node_id
        self.path: str = path
        self.grid: tuple[int, ...] = grid
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

    def push(self, refs: ChunkRefs, *, recorded: bool = False) -> None:
        """Add rows (ascending, unique; tombstones allowed) that override all earlier ones.

        Parameters
        ----------
        recorded
            True if the rows are those of an event in the log; there must be no fresh rows then.
        """
        if not len(refs):
            return
        self._spread = None
        self.layers.append(RefTable(refs))
        if recorded:
            self._settle(0)
            return
        self._fresh += 1
        before = len(self.layers)
        self._settle(before - self._fresh)
        self._fresh -= before - len(self.layers)

    def push_deleted(self, coords: npt.NDArray[np.uint32], *, recorded: bool = False) -> None:
        """Add tombstones (ascending, unique) that override all earlier rows; ``recorded`` as in `push`."""
        self.push(tombstones(coords), recorded=recorded)

    def close(self) -> None:
        """Turn the open rows into a layer."""
        if self.rows:
            self.close_as(from_rows(self.rows, len(self.grid)))

    def close_as(self, refs: ChunkRefs) -> None:
        """As `close`, given the open rows as columns."""
        self.rows = {}
        self.push(refs)

    def take_fresh(self) -> list[ChunksWritten | ChunksDeleted]:
        """Return everything fresh, open rows included, as events; nothing is fresh afterwards."""
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
        """Whether it has so few rows that they are processed together with those of other arrays."""
        count = len(self.rows)
        if self.layers:
            count += sum([len(layer.refs) for layer in self.layers])
        return count <= FEW_ROWS and count <= LARGE_LAYER

    @property
    def is_mixed(self) -> bool:
        """Whether some layers are fresh and others are not."""
        return 0 < self._fresh < len(self.layers)

    def flat(self) -> ChunkRefs:
        """All rows, tombstones too, ascending and unique, merged into one layer. Requires that there are no open rows,
        and that either all layers are fresh or none is."""
        if not self.layers:
            return ChunkRefs.empty(len(self.grid))
        if len(self.layers) > 1:
            self.layers = [RefTable(normalized(concat([layer.refs for layer in self.layers])))]
            self._fresh = min(self._fresh, 1)
        return self.layers[0].refs

    @property
    def is_large(self) -> bool:
        """Whether merging all layers into one would copy many rows."""
        return len(self.layers) > 1 and sum(len(layer.refs) for layer in self.layers) > LARGE_LAYER

    def spread(self) -> Layered:
        """The same rows as `flat`, without a copy. Requires several layers, and no open rows."""
        if self._spread is None:
            self._spread = layered([layer.refs for layer in self.layers])
        return self._spread

    def _settle(self, first: int) -> None:
        """Merge the newest layers, from number ``first`` on, until each is at least twice as large as the next."""
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
    """bool[n]: which coordinates are inside a grid of that many chunks along each dimension."""
    if len(coords) <= 16:
        return np.array([all(map(lt, row, grid)) for row in coords.tolist()], np.bool_)
    good = np.ones(len(coords), np.bool_)
    for d, n in enumerate(grid):
        if n <= _MOST:
            good &= coords[:, d] < n
    return good


def in_view(refs: ChunkRefs, grid: Sequence[int]) -> tuple[ChunkRefs, npt.NDArray[np.uint32]]:
    """The rows inside a grid, as references and as coordinates of tombstones."""
    visible = inside(refs.coords, grid)
    written = visible & (refs.kind != DELETED)
    if written.all():
        return refs, refs.coords[:0]
    return refs.take(written), refs.coords[visible & ~written]
