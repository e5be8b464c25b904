"""The plan for one array: which of its manifests a commit rewrites.

The references of an array are in *tiles*: a tile is the part of the array in one manifest, and its
box is the manifest's extents. Boxes never overlap. A changed reference inside a tile's box makes the
tile *dirty*: it is read, and written again. References outside all boxes become tiles of their
own, so an append reads nothing.

Two rules keep the tiles well shaped.

*Tiers.* A tile of n references is of tier ⌊log_f n⌋. Neighbouring tiles of tier ≤ T are merged once
they hold f^(T+1) references together, and either f times the largest of them, or are 2f in number,
or fill a manifest. Every reference then rises by a tier, so a reference is rewritten O(log n) times;
fewer than 2f tiles of a tier are side by side; and appends of equal size read something only
every f-th time. Tiles that are at least half full are not merged.

*Absorption.* New rows whose bounding box crosses smaller tiles absorb them (the cost is
proportional to the rows written); around larger tiles they are cut along the faces of those tiles.

With a *tile grid* instead (configured splitting; the official library's default is a single cell)
the boxes are given. If an array changes, all references in a changed cell are gathered into one manifest.
A manifest elsewhere stays if it is inside the array and inside one cell; otherwise it is cut into one piece
for each cell that it overlaps. A cell may therefore hold several manifests until a change gathers them; the
same happens with the official library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from icechunk.format.by_node import Coords
from icechunk.format.ids import ObjectId
from icechunk.format.values import Extents, ManifestFile, ManifestRef
from icechunk.log.session.columns import sort_last
from icechunk.log.session.extents import around, bounds, clipped, halved, in_box, overlap, slabs, union, volume
from icechunk.runtime.late_dataclass import dataclass

__all__ = ["Tile", "TilePolicy", "plan_anew", "plan_grid", "plan_tiles"]

Rows = npt.NDArray[Any]
"""Row numbers; uint32 if there may be very many."""

_NONE = np.empty(0, np.intp)
_SLAB: Final = 2**22
"""Number of rows that are processed together: halving them takes ten times the memory of their coordinates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TilePolicy:
    """Rules for the size of tiles."""

    max_refs: int
    """Largest number of references in a tile."""
    fan_in: int
    """f: the number of tiles of a tier that become one tile of the next."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tile:
    """A box and its contents after the commit."""

    box: Extents
    """The box that holds all its references."""
    estimate: int
    """Upper bound of the number of references; exact if no other array shares the manifest."""
    sources: tuple[ManifestRef, ...] = ()
    """Manifests that hold its existing references."""
    written: Rows = field(default_factory=lambda: _NONE)
    """Row numbers of the written references that go into it."""
    deleted: Rows = field(default_factory=lambda: _NONE)
    """Row numbers of the deleted coordinates that are removed from it."""
    dirty: bool = False
    """Whether it must be written."""
    avoid: tuple[Extents, ...] = ()
    """Boxes inside its box; its references must be cut around them once they are known."""


def plan_tiles(
    present: Sequence[ManifestRef],
    files: Mapping[ObjectId, ManifestFile],
    grid: Sequence[int],
    written: Coords,
    deleted: Coords,
    policy: TilePolicy,
) -> list[Tile]:
    """Plan the tiles of an array.

    Parameters
    ----------
    present
        The array's manifests.
    files
        Sizes of the manifests.
    grid
        Current number of chunks along each dimension; references outside are dropped.
    written, deleted
        uint32[n, ndim], ascending, inside the grid, disjoint.

    Returns
    -------
    list of Tile
        Clean tiles stay as they are; dirty ones are written. Boxes are disjoint, except for `Tile.avoid`.
    """
    tiles, outside = _hit(present, files, grid, written, deleted)
    if outside is None:
        tiles += _placed_anew(written, policy.max_refs)
    elif len(outside):
        tiles += _place(tiles, written, outside, policy.max_refs)
    if len(tiles) > 1 and any(tile.dirty for tile in tiles):
        tiles = _merge(tiles, policy)
    return tiles


def plan_grid(
    present: Sequence[ManifestRef],
    files: Mapping[ObjectId, ManifestFile],
    grid: Sequence[int],
    written: Coords,
    deleted: Coords,
    tile: Sequence[int],
) -> list[Tile]:
    """As `plan_tiles`, for tiles that are the cells of a given grid.

    Parameters
    ----------
    tile
        Number of chunks of a cell along each dimension.

    Returns
    -------
    list of Tile
        Clean tiles, and at most one dirty one, whose references are to be cut by the grid: a cell in which something is
        written or deleted is one piece, another cell is one piece for each manifest that its references come from.
    """
    touched = _cells(written, deleted, tile) if present else written[:0]
    near = _near(present, written, deleted)
    clean: list[Tile] = []
    apart: list[Tile] = []
    for i, ref in enumerate(present):
        box = clipped(ref.extents, grid)
        chunks = volume(box)
        if not chunks or (near[i] and len(in_box(written, box)) + len(in_box(deleted, box)) == chunks):
            continue
        file = files.get(ref.object_id)
        known = Tile(box=box, estimate=chunks if file is None else min(chunks, file.num_chunk_refs), sources=(ref,))
        around_cells = tuple((a // n, (b - 1) // n + 1) for (a, b), n in zip(box, tile, strict=True))
        one_cell = all(b - a == 1 for a, b in around_cells)
        stays = one_cell and box == tuple(ref.extents) and not len(in_box(touched, around_cells))
        (clean if stays else apart).append(known)
    if not apart and not len(written):
        return clean
    boxes = [t.box for t in apart]
    if len(written):
        boxes.append(bounds(written))
    one = Tile(
        box=union(boxes),
        estimate=sum(t.estimate for t in apart) + len(written),
        sources=tuple(s for t in apart for s in t.sources),
        written=_all(written),
        deleted=_all(deleted),
        dirty=True,
    )
    return [*clean, one]


def plan_anew(
    present: Sequence[ManifestRef],
    files: Mapping[ObjectId, ManifestFile],
    grid: Sequence[int],
    written: Coords,
    deleted: Coords,
) -> list[Tile]:
    """As `plan_tiles`, if everything is rewritten: at most one tile, which is dirty."""
    inside = [ref for ref in present if volume(clipped(ref.extents, grid))]
    boxes = [clipped(ref.extents, grid) for ref in inside]
    if len(written):
        boxes.append(bounds(written))
    if not boxes:
        return []
    known = [files[ref.object_id].num_chunk_refs for ref in inside if ref.object_id in files]
    return [
        Tile(
            box=union(boxes),
            estimate=sum(known) + len(written),
            sources=tuple(inside),
            written=_all(written),
            deleted=_all(deleted),
            dirty=True,
        )
    ]


def _hit(
    present: Sequence[ManifestRef],
    files: Mapping[ObjectId, ManifestFile],
    grid: Sequence[int],
    written: Coords,
    deleted: Coords,
) -> tuple[list[Tile], Rows | None]:
    """The existing tiles, marked dirty if they change, and the written rows outside all of them; None if there are no
    tiles, which means all rows."""
    tiles: list[Tile] = []
    if not present:
        return tiles, None
    left = np.ones(len(written), np.bool_)
    near = _near(present, written, deleted)
    for i, ref in enumerate(present):
        box = clipped(ref.extents, grid)
        size = volume(box)
        if not size:
            continue
        file = files.get(ref.object_id)
        estimate = size if file is None else min(size, file.num_chunk_refs)
        into = in_box(written, box) if near[i] else _NONE
        out = in_box(deleted, box) if near[i] else _NONE
        if not len(into) and not len(out) and box == tuple(ref.extents):
            tiles.append(Tile(box=box, estimate=estimate, sources=(ref,)))
            continue
        left[into] = False
        if len(into) + len(out) < size:
            estimate = min(size - len(out), estimate + len(into))
            tile = Tile(box=box, estimate=estimate, sources=(ref,), written=into, deleted=out, dirty=True)
        elif len(into):
            tile = Tile(box=bounds(written[into]), estimate=len(into), written=into, dirty=True)
        else:
            continue
        tiles.append(tile)
    return tiles, np.flatnonzero(left)


def _all(coords: Coords) -> Rows:
    return np.arange(len(coords), dtype=np.uint32)


def _cells(written: Coords, deleted: Coords, tile: Sequence[int]) -> Coords:
    """The cells of a grid that contain rows, ascending."""
    size = np.asarray(tile, np.uint64)
    parts = [
        _distinct((coords[first : first + _SLAB] // size).astype(np.uint32))
        for coords in (written, deleted)
        for first in range(0, len(coords), _SLAB)
    ]
    return _distinct(np.concatenate(parts)) if parts else written[:0]


def _distinct(cells: Coords) -> Coords:
    order = sort_last(cells)
    return cells if order is None else cells[order]


def _near(present: Sequence[ManifestRef], written: Coords, deleted: Coords) -> list[bool]:
    """For each manifest, whether it overlaps the bounding box of the changes."""
    if len(present) < 2:
        return [True] * len(present)
    both = [bounds(c) for c in (written, deleted) if len(c)]
    if not both:
        return [False] * len(present)
    box = union(both)
    return [overlap(ref.extents, box) for ref in present]


def _placed_anew(written: Coords, max_refs: int) -> list[Tile]:
    """Tiles for the rows of an array that has no tiles."""
    placed = []
    for run in slabs(written, max(_SLAB, max_refs)):
        part = written[run]
        for rows in halved(part, max_refs) if len(part) else ():
            own = (rows + run.start).astype(np.uint32)
            placed.append(Tile(box=bounds(part[rows]), estimate=len(own), written=own, dirty=True))
    return placed


def _place(tiles: list[Tile], written: Coords, outside: Rows, max_refs: int) -> list[Tile]:
    """Tiles for rows outside all others; removes from ``tiles`` those that are absorbed."""
    coords = written if len(outside) == len(written) else written[outside]
    box = bounds(coords)
    if not tiles and len(outside) <= max_refs:
        return [Tile(box=box, estimate=len(outside), written=outside, dirty=True)]
    crossed = [t for t in tiles if overlap(t.box, box)]
    small = {id(t) for t in crossed if t.estimate <= len(outside)}
    if small:
        absorbed = [t for t in crossed if id(t) in small]
        tiles[:] = [t for t in tiles if id(t) not in small]
        whole = union([box, *(t.box for t in absorbed)])
        return [
            Tile(
                box=whole,
                estimate=sum(t.estimate for t in absorbed) + len(outside),
                sources=tuple(s for t in absorbed for s in t.sources),
                written=np.sort(np.concatenate([outside, *(t.written for t in absorbed)])),
                deleted=np.sort(np.concatenate([_NONE, *(t.deleted for t in absorbed)])),
                dirty=True,
                avoid=tuple(t.box for t in tiles if overlap(t.box, whole)),
            )
        ]
    placed = []
    for piece in around(coords, [t.box for t in crossed]) if crossed else [np.arange(len(coords))]:
        for rows in halved(coords[piece], max_refs):
            own = outside[piece[rows]]
            placed.append(Tile(box=bounds(written[own]), estimate=len(own), written=own, dirty=True))
    return placed


def _merge(tiles: list[Tile], policy: TilePolicy) -> list[Tile]:
    tiles = sorted(tiles, key=_corner)
    full = max(1, policy.max_refs // 2)
    reach = policy.fan_in
    # T = 0, 1, …: tiles below f^(T+1) references merge once they hold that many together.
    while True:
        held = sum([t.estimate for t in tiles if t.estimate < full])
        if held < min(reach, full):
            # Nor do they in any higher tier.
            return _gathered(tiles, full, policy)
        tiles = _merge_tier(tiles, min(reach, full), policy)
        if reach >= full:
            return _gathered(tiles, full, policy)
        reach *= policy.fan_in


def _gathered(tiles: list[Tile], full: int, policy: TilePolicy) -> list[Tile]:
    """If small tiles outnumber full ones because larger tiles are between them, merge them with those."""
    small = sorted((t for t in tiles if t.estimate < full and not t.avoid), key=_corner)
    if len(small) <= max(4 * policy.fan_in, len(tiles) - len(small)):
        return tiles
    for start in range(0, len(small), policy.fan_in):
        group = {id(t) for t in small[start : start + policy.fan_in]}
        members = [t for t in tiles if id(t) in group]
        if len(members) < 2:
            continue
        while True:
            box = union(t.box for t in members)
            more = [t for t in tiles if overlap(t.box, box)]
            if len(more) == len(members):
                break
            members = more
        # One commit must not rewrite a large array for this; later commits try at other places.
        if sum(t.estimate for t in members) > 8 * policy.max_refs or any(t.avoid for t in members):
            continue
        inside = {id(t) for t in members}
        tiles = [t for t in tiles if id(t) not in inside]
        tiles.append(_one(members, box))
    return tiles


def _merge_tier(tiles: list[Tile], reach: int, policy: TilePolicy) -> list[Tile]:
    result: list[Tile] = []  # its boxes also include those of earlier merges, which later ones must not overlap
    run: list[Tile] = []
    held = 0

    def close(*, filled: bool = False) -> None:
        nonlocal run, held
        if len(run) > 1 and held >= reach:
            ripe = filled or len(run) >= 2 * policy.fan_in
            if ripe or held >= policy.fan_in * max(t.estimate for t in run):
                run = _joined(run, [*tiles, *result], reach)
        result.extend(run)
        run, held = [], 0

    for tile in tiles:
        if tile.estimate >= reach or tile.avoid:
            close()
            result.append(tile)
            continue
        if held + tile.estimate > policy.max_refs:
            close(filled=True)
        run.append(tile)
        held += tile.estimate
    close()
    return result


def _joined(run: list[Tile], tiles: list[Tile], reach: int) -> list[Tile]:
    """A run as one tile, if it is large enough and its box overlaps no other tile; else its halves, if they qualify."""
    total = sum(t.estimate for t in run)
    if len(run) < 2 or total < reach:
        return run
    box = union(t.box for t in run)
    own = {id(t) for t in run}
    if any(overlap(box, t.box) for t in tiles if id(t) not in own):
        middle = len(run) // 2
        return _joined(run[:middle], tiles, reach) + _joined(run[middle:], tiles, reach)
    return [_one(run, box)]


def _one(members: list[Tile], box: Extents) -> Tile:
    return Tile(
        box=box,
        estimate=sum(t.estimate for t in members),
        sources=tuple(s for t in members for s in t.sources),
        written=np.sort(np.concatenate([t.written for t in members])),
        deleted=np.sort(np.concatenate([t.deleted for t in members])),
        dirty=True,
    )


def _corner(tile: Tile) -> tuple[int, ...]:
    return tuple([a for a, _ in tile.box])
