"""The references that a commit writes: the current contents of dirty tiles, cut into pieces for single manifests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from icechunk.errors import ErrorKind, FormatError, InvalidInputError
from icechunk.format.by_node import Coords
from icechunk.format.ids import ObjectId
from icechunk.format.manifest.refs_by_node import of_rank
from icechunk.format.values import ChunkRefs, Manifest, ManifestRef, NodeSnapshot
from icechunk.log.session.array_fold import Rows
from icechunk.log.session.columns import CoordIndex, concat, normalized, trimmed
from icechunk.log.session.extents import around, by_tile, halved, in_box
from icechunk.log.session.plan.tiles import Tile
from icechunk.runtime.late_dataclass import dataclass

__all__ = ["ArrayPlan", "pieces", "references", "require_fit", "written_of"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ArrayPlan:
    """The plan for one array's references."""

    node: NodeSnapshot
    """The current array, with the base's manifests."""
    tiles: tuple[Tile, ...]
    """All tiles; the dirty ones are written."""
    written: Rows
    """References of the log inside the grid, ascending."""
    deleted: Coords
    """uint32[n, ndim]: coordinates deleted inside the grid, ascending."""
    tile_shape: tuple[int, ...] | None
    """Number of chunks of a cell along each dimension, if the tiles are the cells of a given grid; else None."""
    anew: bool = False
    """Whether cells of the grid without a change are also gathered from several manifests into one."""


def pieces(array: ArrayPlan, manifests: Mapping[ObjectId, Manifest], max_refs: int) -> Iterator[ChunkRefs]:
    """The current references of an array's dirty tiles, in pieces: each goes into one manifest, and their boxes are
    disjoint.

    Parameters
    ----------
    manifests
        At least the sources of the dirty tiles.
    max_refs
        Largest number of references in a piece, if the tiles are not those of a given grid.

    Raises
    ------
    FormatError
        If a manifest lacks the array that the base says it holds.
    """
    for tile in array.tiles:
        if not tile.dirty:
            continue
        if array.tile_shape is not None:
            yield from _cut_by_grid(array, tile, array.tile_shape, manifests)
            continue
        content = _content(array, tile, manifests)
        if not len(content):
            continue
        if not tile.avoid and len(content) <= max_refs:
            yield trimmed(content)
            continue
        whole = around(content.coords, tile.avoid) if tile.avoid else [np.arange(len(content))]
        for part in whole:
            for rows in halved(content.coords[part], max_refs):
                yield trimmed(content if len(rows) == len(content) else content.take(part[rows]))


def require_fit(array: ArrayPlan, max_refs: int) -> None:
    """Refuse a plan that writes more references into one cell of a given grid than a manifest can hold.

    Raises
    ------
    InvalidInputError
        If there is such a cell; the message names the array and the remedy.
    """
    if array.tile_shape is None or len(array.written) <= max_refs:
        return
    most = max(map(len, _cells(array.written.coords, array.tile_shape)))
    if most > max_refs:
        raise InvalidInputError(
            f"cannot write {most} references of array {array.node.path!r} into one manifest, which holds at most "
            f"{max_refs}: split the array's manifests (ManifestConfig.splitting); nothing was written",
            ErrorKind.SERIALIZATION,
        )


def _content(array: ArrayPlan, tile: Tile, manifests: Mapping[ObjectId, Manifest]) -> ChunkRefs:
    """The references of a dirty tile: the previous ones, without those deleted or outside the grid, and the written
    ones."""
    written = written_of(array, tile)
    changed = [written.coords, array.deleted[tile.deleted]]
    parts = [refs for source in tile.sources if len(refs := _kept(array, source, manifests, changed))]
    if not parts:
        return written
    return normalized(concat([*parts, written])) if len(written) or len(parts) > 1 else parts[0]


def _cut_by_grid(
    array: ArrayPlan, tile: Tile, shape: tuple[int, ...], manifests: Mapping[ObjectId, Manifest]
) -> Iterator[ChunkRefs]:
    coords = array.written.coords[tile.written] if len(tile.written) != len(array.written) else array.written.coords
    deleted = array.deleted[tile.deleted]
    # Row numbers only: the references of a cell are taken when the cell is written.
    written = {_cell(coords[rows[0]], shape): rows for rows in _cells(coords, shape)}
    gathered: dict[tuple[int, ...], list[ChunkRefs]] = {cell: [] for cell in written}
    for rows in _cells(deleted, shape):
        gathered.setdefault(_cell(deleted[rows[0]], shape), [])
    for source in tile.sources:
        refs = _kept(array, source, manifests, [coords, deleted])
        for rows in _cells(refs.coords, shape):
            part = refs if len(rows) == len(refs) else refs.take(rows)
            cell = _cell(part.coords[0], shape)
            into = gathered.setdefault(cell, []) if array.anew else gathered.get(cell)
            if into is None:
                yield trimmed(part)
            else:
                # Trimmed first: manifests of an array may have different tables, and joining untrimmed tables would
                # process all their strings.
                into.append(trimmed(part))
    for cell in sorted(gathered):
        parts = gathered.pop(cell)
        if cell in written:
            parts.append(trimmed(array.written.take(tile.written[written.pop(cell)])))
        if parts:
            yield trimmed(normalized(concat(parts)))


def _cells(coords: Coords, shape: tuple[int, ...]) -> list[npt.NDArray[np.intp]]:
    return by_tile(coords, shape) if len(coords) else []


def _cell(coords: npt.NDArray[np.uint32], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(c // n for c, n in zip(coords.tolist(), shape, strict=True))


def written_of(array: ArrayPlan, tile: Tile) -> ChunkRefs:
    """The references of the log that go into a tile."""
    refs = array.written
    return refs if isinstance(refs, ChunkRefs) and len(tile.written) == len(refs) else refs.take(tile.written)


def _kept(
    array: ArrayPlan, source: ManifestRef, manifests: Mapping[ObjectId, Manifest], changed: Sequence[Coords]
) -> ChunkRefs:
    """References of one manifest that are still inside the grid and not among the changed ones (each ascending)."""
    old = references(array, source, manifests)
    box = tuple((a, min(b, d.num_chunks)) for (a, b), d in zip(source.extents, array.node.shape, strict=True))
    rows = in_box(old.coords, box)
    near = [coords[found] for coords in changed if len(found := in_box(coords, box))]
    if near:
        gone = np.zeros(len(old), np.bool_)
        at = CoordIndex(old.coords).find_rows(np.concatenate(near))
        gone[at[at >= 0]] = True
        rows = rows[~gone[rows]]
    return old if len(rows) == len(old) else old.take(rows)


def references(array: ArrayPlan, source: ManifestRef, manifests: Mapping[ObjectId, Manifest]) -> ChunkRefs:
    """All references of the array in a manifest.

    Raises
    ------
    FormatError
        If there are none, although the base says that there are.
    """
    old = of_rank(manifests[source.object_id].arrays, array.node.id, len(array.node.shape))
    if old is None:
        raise FormatError(
            f"manifest {source.object_id.hex()} holds no references of the array {array.node.path}, "
            "although the snapshot says so",
            ErrorKind.INCONSISTENT_MANIFESTS,
        )
    return old
