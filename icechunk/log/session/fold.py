"""The fold of a session's events over its base: the view of the session.

Every event updates the fold, so a read never replays events. `icechunk.log.session.log` has the commands that append
events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from enum import Enum
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from icechunk.errors import AlreadyExistsError, ErrorKind, InvalidInputError, NodeNotFoundError
from icechunk.format.by_node import Part, coords_by_node, coords_part
from icechunk.format.ids import NodeId
from icechunk.format.manifest.refs_by_node import refs_by_node
from icechunk.format.values import ChunkRef, ChunkRefs, Move, NodeKind, NodeSnapshot, Snapshot
from icechunk.log.session.array_fold import ArrayFold, Layered, Rows, in_view, inside
from icechunk.log.session.columns import DELETED
from icechunk.log.session.events import (
    ArrayCreated,
    ChunksDeleted,
    ChunksWritten,
    Event,
    GroupCreated,
    HierarchyCleared,
    MetadataReplaced,
    NodeDeleted,
    NodeMoved,
)
from icechunk.log.session.hierarchy import Hierarchy
from icechunk.log.session.merge.diff import Changes, NetChanges, move_order
from icechunk.log.session.plan.small_arrays import LogRows, columns_of_many, rows_of_many
from icechunk.log.session.zarr_metadata import ArrayMeta, GroupMeta, parse_node, parse_replacement

__all__ = ["ABSENT", "IN_BASE", "Absent", "Fold", "InBase", "in_grid"]


class _Place(Enum):
    ABSENT = "absent"
    IN_BASE = "in base"


Absent: TypeAlias = Literal[_Place.ABSENT]
InBase: TypeAlias = Literal[_Place.IN_BASE]
ABSENT: Final = _Place.ABSENT
"""There is no such chunk in this session's view."""
IN_BASE: Final = _Place.IN_BASE
"""The log has no change of the chunk: look it up in the base's manifests of the node."""


class Fold:
    """Events over a base snapshot, and their fold; see `icechunk.log.session.log.SessionLog`."""

    def __init__(self, base: Snapshot, new_node_id: Callable[[], NodeId], author: bytes = b"") -> None:
        self._base = base
        self._new_node_id = new_node_id
        self._author = author
        self._made = 0
        self._events: list[Event] = []
        self._reset()

    def _reset(self) -> None:
        self._tree = Hierarchy(self._base.nodes)
        self._arrays: dict[NodeId, ArrayFold] = {}

    # -- the folded view ---------------------------------------------------------------------------

    @property
    def base(self) -> Snapshot:
        """The snapshot that the session is based on."""
        return self._base

    @property
    def is_empty(self) -> bool:
        """Whether the fold equals the base. Deleting a chunk counts as a change even if there was no chunk: another
        commit may write it meanwhile, and that has to be a conflict."""
        return not self._tree.overlay and not any(self._arrays.values())

    @property
    def events(self) -> tuple[Event, ...]:
        """All events, oldest first; the call turns everything fresh into events."""
        self._record_all()
        return tuple(self._events)

    def node(self, path: str) -> NodeSnapshot | None:
        """The group or array at this path, or None. Its manifests are those of the base."""
        return self._tree.get(path)

    def node_of(self, node_id: NodeId, hint: str = "/") -> NodeSnapshot | None:
        """The node with this id, at any path; the path ``hint`` is tried first."""
        path = self._tree.path_of(node_id, hint)
        return None if path is None else self._tree.get(path)

    def children(self, path: str, *, implied: bool = False) -> list[str]:
        """Names of the groups and arrays directly below ``path``, ascending; with ``implied`` also names without a node
        of their own that have nodes below them."""
        return self._tree.children(path, implied=implied)

    def nodes(self, under: str = "/") -> Iterator[NodeSnapshot]:
        """The node at ``under`` and everything below it, in ascending order of the path's bytes."""
        return iter(list(self._tree.subtree(under)))

    def hierarchy(self) -> Mapping[str, NodeSnapshot]:
        """All nodes by path, in ascending order of the path's bytes; valid until the next event."""
        return self._tree.everything()

    def chunk(self, node: NodeSnapshot, coords: tuple[int, ...]) -> ChunkRef | Absent | InBase:
        """Look up a chunk.

        Parameters
        ----------
        node
            An array, as `node` returned it.
        coords
            Chunk grid coordinates.

        Returns
        -------
        ChunkRef, `ABSENT` or `IN_BASE`
            `ABSENT` also for coordinates outside the grid.
        """
        fold = self._arrays.get(node.id)
        if fold is not None:
            if not in_grid(coords, fold.grid):
                return ABSENT
            ref = fold.find(coords)
            if ref is not False:
                return ABSENT if ref is None else ref
        elif len(coords) != len(node.shape):
            return ABSENT
        else:
            for c, dimension in zip(coords, node.shape, strict=True):
                if not 0 <= c < dimension[1]:
                    return ABSENT
        return IN_BASE if node.manifests else ABSENT

    def overlay(self, node: NodeSnapshot) -> tuple[ChunkRefs, npt.NDArray[np.uint32]]:
        """The log's own rows of an array, inside its current grid.

        Returns
        -------
        written : ChunkRefs
            Ascending and unique by coordinates; tables and inline bytes may hold more than the rows use.
        deleted : uint32[m, ndim]
            Ascending; disjoint from the written ones.
        """
        fold = self._arrays.get(node.id)
        if fold is None:
            ndim = len(node.shape)
            return ChunkRefs.empty(ndim), np.empty((0, ndim), np.uint32)
        rows = self._rows(fold)
        return in_view(rows if isinstance(rows, ChunkRefs) else rows.take(np.arange(len(rows))), fold.grid)

    def overlay_rows(self, node: NodeSnapshot) -> tuple[Rows, npt.NDArray[np.uint32]]:
        """The same as `overlay`; many rows are not copied."""
        fold = self._arrays.get(node.id)
        rows = None if fold is None else self._rows(fold)
        if fold is None or not isinstance(rows, Layered):
            return self.overlay(node)
        visible = inside(rows.coords, fold.grid)
        written = rows.kinds() != DELETED
        written &= visible
        if written.all():
            return rows, rows.coords[:0]
        return rows.where(written), rows.coords[visible & ~written]

    @property
    def row_count(self) -> int:
        """Number of chunk rows in the log; some may override others."""
        return sum(len(fold.rows) + sum(len(layer.refs) for layer in fold.layers) for fold in self._arrays.values())

    def rows(self) -> LogRows:
        """All chunk rows of the log."""
        touched = [fold for fold in self._arrays.values() if fold.rows or fold.layers]
        nodes = [self._tree.node_of(fold.node_id, fold.path) for fold in touched]
        # Removing an array removes its rows, so every array here exists.
        paths = [node.path for node in nodes if node is not None]
        large: dict[NodeId, ArrayFold] = {}
        by_rank: dict[int, list[ArrayFold]] = {}
        ordered: dict[NodeId, NodeSnapshot] = {}
        for i in sorted(range(len(paths)), key=paths.__getitem__):
            fold, node = touched[i], nodes[i]
            assert node is not None
            ordered[node.id] = node
            if not fold.is_small:
                large[node.id] = fold
            elif (known := by_rank.get(len(fold.grid))) is not None:
                known.append(fold)
            else:
                by_rank[len(fold.grid)] = [fold]
        return LogRows(
            small=refs_by_node([rows_of_many(folds, ndim) for ndim, folds in by_rank.items()]),
            large={node_id: self._rows(fold) for node_id, fold in large.items()},
            nodes=ordered,
        )

    def net_changes(self, rows: LogRows | None = None) -> NetChanges:
        """The net changes by node; ``rows`` is the result of `rows`, if the caller has it already."""
        rows = rows or self.rows()
        before: dict[NodeId, NodeSnapshot] = {}
        after: dict[NodeId, NodeSnapshot] = {}
        for path, node in self._tree.overlay.items():
            old = self._tree.base(path)
            if old is not None:
                before[old.id] = old
            if node is not None:
                after[node.id] = node
        kept = [(before[i], after[i]) for i in before.keys() & after.keys()]
        return NetChanges(
            new=tuple([node for i, node in after.items() if i not in before]),
            deleted=tuple([node for i, node in before.items() if i not in after]),
            updated=tuple([new for old, new in kept if old.user_data != new.user_data]),
            moved=tuple(
                sorted(
                    (Move(old.path, new.path, new.id, new.kind) for old, new in kept if old.path != new.path),
                    key=move_order,
                )
            ),
            chunks=coords_by_node(
                [
                    *[Part(part.nodes, part.edges, part.rows.coords) for part in rows.small.parts],
                    *[coords_part([node_id], [large.coords]) for node_id, large in rows.large.items()],
                ]
            ),
            paths={node_id: node.path for node_id, node in rows.nodes.items()},
        )

    def changes(self) -> Changes:
        """The net changes by path: the session's status."""
        return self.net_changes().summary()

    # -- the fold ----------------------------------------------------------------------------------

    def _refold(self, events: Iterable[Event]) -> None:
        self._events = []
        self._reset()
        for event in events:
            self._append(event)

    def _append(self, event: Event, meta: GroupMeta | ArrayMeta | None = None) -> None:
        """Fold an event, then append it; ``meta`` is its parsed document, if the caller has it already."""
        match event:
            case ChunksWritten() | ChunksDeleted():
                coords = event.refs.coords if isinstance(event, ChunksWritten) else event.coords
                fold = self._arrays.get(event.node_id) or self._fold_of_id(event.node_id)
                if coords.shape[1] != len(fold.grid):
                    raise InvalidInputError(
                        f"chunk coordinates of rank {coords.shape[1]} for an array of rank {len(fold.grid)}",
                        ErrorKind.INVALID_CHUNK_INDEX,
                    )
                self._record(fold)
                if isinstance(event, ChunksWritten):
                    fold.push(event.refs, recorded=True)
                else:
                    fold.push_deleted(coords, recorded=True)
            case GroupCreated() | ArrayCreated():
                if self._tree.get(event.path) is not None:
                    raise AlreadyExistsError(f"cannot create {event.path}: it already exists")
                self._tree.put(_created(event, meta or parse_node(event.user_data, event.path)))
            case MetadataReplaced():
                path = self._path_of(event.node_id, event.path)
                node = self._existing(path, "replace the metadata of")
                described = _described(node, event.user_data, meta or parse_replacement(event.user_data, node))
                self._tree.put(described)
                if len(described.shape) != len(node.shape):
                    self._arrays.pop(node.id, None)
                elif (known := self._arrays.get(node.id)) is not None:
                    known.grid = _grid(described)
            case NodeDeleted():
                self._remove(self._path_of(event.node_id, event.path))
            case HierarchyCleared():
                self._remove("/")
            case NodeMoved():
                if self._tree.get(event.target) is not None:
                    raise AlreadyExistsError(f"cannot move to {event.target}: it already exists")
                self._tree.move(self._path_of(event.node_id, event.source), event.target)
        self._events.append(self._identified(event))

    def _identified(self, event: Event) -> Event:
        """The event with an id, if it has none and the log has an author."""
        if event.id or not self._author:
            return event
        self._made += 1
        return replace(event, id=self._author + self._made.to_bytes(4))

    def _record(self, fold: ArrayFold) -> None:
        self._events += map(self._identified, fold.take_fresh())

    def _remove(self, path: str) -> None:
        for node in list(self._tree.subtree(path)):
            self._tree.remove(node.path)
            self._arrays.pop(node.id, None)

    def _path_of(self, node_id: NodeId, hint: str) -> str:
        path = self._tree.path_of(node_id, hint)
        if path is None:
            raise NodeNotFoundError(f"the node {hint} with the id {node_id.hex()} does not exist any more")
        return path

    def _existing(self, path: str, verb: str) -> NodeSnapshot:
        node = self._tree.get(path)
        if node is None:
            raise NodeNotFoundError(f"cannot {verb} {path}: node not found")
        return node

    def _fold_of(self, node: NodeSnapshot) -> ArrayFold:
        fold = self._arrays.get(node.id)
        if fold is None:
            now = self._tree.get(node.path)
            if now is None or now.id != node.id:
                now = self._tree.get(self._path_of(node.id, node.path))
            if now is None or now.kind != NodeKind.ARRAY:
                raise InvalidInputError(f"{node.path} is not an array, so it has no chunks", ErrorKind.NOT_AN_ARRAY)
            fold = self._arrays[node.id] = ArrayFold(node.id, now.path, _grid(now))
        return fold

    def _fold_of_id(self, node_id: NodeId) -> ArrayFold:
        return self._fold_of(self._existing(self._path_of(node_id, ""), "write chunks of"))

    def _rows(self, fold: ArrayFold) -> Layered | ChunkRefs:
        """All rows of an array, tombstones too, ascending and unique."""
        fold.close()
        if fold.is_large:
            return fold.spread()
        if fold.is_mixed:
            self._record(fold)
        return fold.flat()

    def _close_all(self) -> None:
        by_rank: dict[int, list[ArrayFold]] = {}
        for fold in self._arrays.values():
            if fold.rows:
                by_rank.setdefault(len(fold.grid), []).append(fold)
        for ndim, folds in by_rank.items():
            for fold, refs in zip(folds, columns_of_many([fold.rows for fold in folds], ndim), strict=True):
                fold.close_as(refs)

    def _record_all(self) -> None:
        self._close_all()
        for fold in self._arrays.values():
            self._record(fold)


def _described(node: NodeSnapshot, user_data: bytes, meta: GroupMeta | ArrayMeta) -> NodeSnapshot:
    """The node with another document."""
    if isinstance(meta, GroupMeta):
        return replace(node, user_data=user_data)
    shape = meta.dimensions
    return NodeSnapshot(
        id=node.id,
        path=node.path,
        kind=node.kind,
        user_data=user_data,
        shape=shape,
        dimension_names=meta.dimension_names,
        manifests=node.manifests if len(shape) == len(node.shape) else (),
        extra=node.extra,
    )


def _created(event: GroupCreated | ArrayCreated, meta: GroupMeta | ArrayMeta) -> NodeSnapshot:
    """The node that an event creates."""
    return NodeSnapshot(
        id=event.node_id,
        path=event.path,
        kind=NodeKind.ARRAY if isinstance(event, ArrayCreated) else NodeKind.GROUP,
        user_data=event.user_data,
        shape=meta.dimensions if isinstance(meta, ArrayMeta) else (),
        dimension_names=meta.dimension_names if isinstance(meta, ArrayMeta) else None,
    )


def _grid(node: NodeSnapshot) -> tuple[int, ...]:
    return tuple([dimension.num_chunks for dimension in node.shape])


def in_grid(coords: tuple[int, ...], grid: tuple[int, ...]) -> bool:
    if len(coords) != len(grid):
        return False
    # A plain loop: this runs for every chunk, and a generator or a keyword would cost as much as the work itself.
    for c, n in zip(coords, grid):  # noqa: B905, SIM110
        if not 0 <= c < n:
            return False
    return True
