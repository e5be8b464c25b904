"""Moving an array's chunks in its grid: references change their coordinates, and no data moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.format.by_node import Coords
from icechunk.format.values import ChunkRefs
from icechunk.log.session.columns import CoordIndex, normalized

__all__ = ["Reindex", "reindexed", "shifted"]

Reindex: TypeAlias = Callable[[Iterable[int]], Iterable[int] | None]


def shifted(refs: ChunkRefs, grid: Sequence[int], offset: Sequence[int]) -> tuple[ChunkRefs, Coords]:
    """All references at their coordinates plus an offset; those that leave the grid are dropped.

    Parameters
    ----------
    refs
        All references of an array, ascending and unique by coordinates.
    grid
        Number of chunks along each dimension.
    offset
        One number per dimension, of either sign; chunks.

    Returns
    -------
    moved : ChunkRefs
        The references at their new coordinates.
    vacated : uint32[n, ndim]
        Coordinates that have no chunk any more.
    """
    coords = refs.coords.astype(np.int64) + np.array(offset, np.int64)
    stays: npt.NDArray[np.bool_] = np.all((coords >= 0) & (coords < np.array(grid, np.int64)), axis=1)
    moved = _at(refs.take(stays), coords[stays].astype(np.uint32))
    return moved, _not_in(refs.coords, moved.coords)


def reindexed(
    refs: ChunkRefs, grid: Sequence[int], forward: Reindex, backward: Reindex | None
) -> tuple[ChunkRefs, Coords]:
    """References at the coordinates that a function returns.

    Parameters
    ----------
    refs
        All references of an array, ascending and unique by coordinates.
    grid
        Number of chunks along each dimension.
    forward
        Maps the coordinates of a chunk to those that it moves to; None: the chunk moves nowhere. If several chunks move
        to the same coordinates, the last counts, in ascending order of their old coordinates.
    backward
        Maps coordinates that have a chunk to those that they are filled from. If it returns None, or coordinates
        without a chunk, and no chunk moves there, the coordinates are vacated. Without ``backward``, a chunk whose
        coordinates no other chunk takes also stays there.

    Returns
    -------
    moved : ChunkRefs
    vacated : uint32[n, ndim]

    Raises
    ------
    InvalidInputError
        Kind ``invalid-chunk-index``: coordinates outside the grid.
    """
    places = [tuple(row) for row in refs.coords.tolist()]
    rows, targets = [], []
    for row, place in enumerate(places):
        target = forward(list(place))
        if target is not None:
            rows.append(row)
            targets.append(_checked(target, grid, place))
    moved = _at(refs.take(np.array(rows, np.intp)), np.array(targets, np.uint32).reshape(len(rows), len(grid)))
    if backward is None:
        return moved, refs.coords[:0]
    known, taken = set(places), set(targets)
    vacated = []
    for place in places:
        if place in taken:
            continue
        source = backward(list(place))
        if source is None or tuple(source) not in known:
            vacated.append(place)
    return moved, np.array(vacated, np.uint32).reshape(len(vacated), len(grid))


def _at(refs: ChunkRefs, coords: Coords) -> ChunkRefs:
    return normalized(
        ChunkRefs(
            coords=coords,
            kind=refs.kind,
            offset=refs.offset,
            length=refs.length,
            chunk_id=refs.chunk_id,
            location=refs.location,
            locations=refs.locations,
            checksum_kind=refs.checksum_kind,
            checksum=refs.checksum,
            etags=refs.etags,
            inline_data=refs.inline_data,
        )
    )


def _not_in(coords: Coords, others: Coords) -> Coords:
    return coords[CoordIndex(others).find_rows(coords) < 0]


def _checked(target: Iterable[int], grid: Sequence[int], place: tuple[int, ...]) -> tuple[int, ...]:
    coords = tuple(target)
    if len(coords) != len(grid) or not all(0 <= c < n for c, n in zip(coords, grid, strict=True)):
        raise InvalidInputError(
            f"cannot move chunk {list(place)} to {list(coords)}: it is outside the grid of {list(grid)} chunks; return "
            "None for a chunk that moves nowhere",
            ErrorKind.INVALID_CHUNK_INDEX,
        )
    return coords
