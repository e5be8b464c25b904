"""Many rows in layers, seen as one list without being copied into one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from icechunk.format.tables import ChunkRefs
from icechunk.log.columns import concat, trimmed
from icechunk.log.lookup import sort_last

__all__ = ["Layered", "Rows", "layered"]

Coords = npt.NDArray[np.uint32]

_SAMPLE: Final = 2**16
_SLAB_SAMPLES: Final = 64
"""Rows are merged about 4 million at a time: sorting takes ten times the memory of what is sorted."""


class Rows(Protocol):
    """References of one array, ascending and unique by coordinates: `ChunkRefs`, or `Layered`."""

    def __len__(self) -> int: ...

    @property
    def coords(self) -> Coords:
        """uint32[n, ndim]."""
        ...

    @property
    def locations(self) -> tuple[str, ...]:
        """Empty only where no row is virtual."""
        ...

    def take(self, rows: npt.NDArray[Any]) -> ChunkRefs:
        """The references at these row numbers, in this order, or where this mask is true."""
        ...


class Layered:
    """Rows of several layers as one ascending list: the coordinates are a column, the rest stays where it is.

    Parameters
    ----------
    coords
        uint32[n, ndim], ascending and unique.
    parts
        Columns that the rows are in.
    order
        uint32[n]: the number of each row among those of all parts, laid one behind the other; None: as they are.
    """

    __slots__ = ("_order", "_parts", "_starts", "coords")

    def __init__(self, coords: Coords, parts: Sequence[ChunkRefs], order: npt.NDArray[np.uint32] | None) -> None:
        self.coords = coords
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
        """The references at these row numbers, in this order, or where this mask is true; copied, and their tables hold
        nothing else."""
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
    """All rows of some layers, the oldest first; of those with the same coordinates the newest counts.

    Parameters
    ----------
    layers
        At least one; each ascending and unique by coordinates, none empty, of one rank that is not 0.
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
    """The first along which coordinates differ, by which all layers are therefore sorted."""
    for axis in range(layers[0].ndim):
        ends = {int(c) for part in layers for c in (part.coords[0, axis], part.coords[-1, axis])}
        if len(ends) > 1:
            return axis
    return 0


def _first(part: ChunkRefs) -> tuple[int, ...]:
    return tuple(part.coords[0].tolist())


def _last(part: ChunkRefs) -> tuple[int, ...]:
    return tuple(part.coords[-1].tolist())
