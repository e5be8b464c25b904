"""Merging forks into the session that they were forked from, or into another fork of it.

A fork brings the events that it made since it was forked. *Foreign* events are those of the target that the fork does
not have: of the session itself since the fork, and of forks that were merged before. Events are distinguished by their
ids, so an event that came with an earlier merge, or with another copy of the same fork, counts once.

Two sides are compatible if they changed different chunks and nodes, or one chunk to the same effect. The rules are a
table in ``spec/session-log.md``.

Worked example::

    merging = Merge(log, "error")
    merging.add(Fork(number=0, base=base, inherited=events[:3], own=events[3:]))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from icechunk.conflicts import MergeConflict, MergeConflictType, MergeFailedError
from icechunk.errors import AlreadyExistsError, ErrorKind, NodeNotFoundError, SessionStateError
from icechunk.format.by_node import Coords
from icechunk.format.ids import NodeId
from icechunk.format.values import INLINE, NATIVE, ChunkRef, NodeKind, NodeSnapshot, Snapshot
from icechunk.log.session.array_fold import inside
from icechunk.log.session.columns import CoordIndex, find, sort_last
from icechunk.log.session.events import (
    ArrayCreated,
    ChunksDeleted,
    ChunksWritten,
    Event,
    GroupCreated,
    HierarchyCleared,
    MetadataReplaced,
    NodeMoved,
)
from icechunk.log.session.hierarchy import parent_of
from icechunk.log.session.log import ABSENT, Absent, SessionLog
from icechunk.log.session.merge.conflict_rules import carried_over
from icechunk.log.session.merge.diff import NetChanges
from icechunk.log.session.zarr_metadata import encoding_of
from icechunk.runtime.late_dataclass import dataclass

__all__ = ["Fork", "Merge", "MergePolicy", "Pair", "event_key"]

MergePolicy: TypeAlias = Literal["error", "ours", "theirs"]
"""The choice where two sides changed the same chunks, or the metadata of one array: refuse; keep the target's;
or take that of the fork, which is merged later."""
Pair: TypeAlias = tuple[ChunkRef, ChunkRef]
"""References of one chunk, in the target and in a fork, whose bytes may be equal."""

_SETTLED: Final = frozenset(
    (
        MergeConflictType.CHUNKS_CHANGED_TWICE,
        MergeConflictType.METADATA_CHANGED_TWICE,
        MergeConflictType.CHUNKS_OUTSIDE_SHAPE,
    )
)
"""Conflicts that "ours" and "theirs" settle."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fork:
    """The changes of a fork."""

    number: int
    """Position in the order in which forks are merged, from 0."""
    base: Snapshot
    inherited: Sequence[Event]
    """Events over the base that make the state that the fork began with."""
    own: Sequence[Event]
    """Events after those."""
    last_inherited: Sequence[bytes] = ()
    """Ids of the last events of its ancestors that the base has already."""
    began: SessionLog | None = None
    """The inherited events over the base, if the caller has them folded; it is only read, so forks may share it."""

    def log_with(self, known: Sequence[Event], like: SessionLog) -> SessionLog:
        """The inherited events and some of its own, over its base; not to be changed."""
        if self.began is not None and not known:
            return self.began
        return like.rebased(self.base, [*self.inherited, *known])


@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    """An event of the target."""

    event: Event
    position: int
    fork: int | None
    """Number of the fork that brought it; None: it was there before."""


class Merge:
    """One merge of several forks.

    Parameters
    ----------
    target
        Takes the changes. After an error it may have some of them: its owner goes back to a savepoint.
    policy
        What to do about conflicts that can be settled.
    equal
        Whether the bytes of pairs of references are equal, where that is known.
    """

    def __init__(
        self, target: SessionLog, policy: MergePolicy = "error", equal: Mapping[Pair, bool] = MappingProxyType({})
    ) -> None:
        self.undecided: list[Pair] = []
        """Pairs of which it is not known, and that were taken as equal: the merge holds only if they are."""
        self.target = target
        self._policy = policy
        self._equal = equal
        self._positions: dict[object, int] = {}
        self._by_node: dict[NodeId, list[_Made]] = {}
        self._documents: dict[NodeId, list[_Made]] = {}
        self._boxes: dict[NodeId, _Boxes] = {}
        self._note(target.events, None)

    def add(self, fork: Fork) -> None:
        """Append the changes of a fork.

        Raises
        ------
        MergeFailedError
            Its changes conflict with those in the log, and the policy does not settle that.
        SessionStateError
            Kind ``merge-failed``: its events do not apply to the target.
        """
        own = [event for event in fork.own if event_key(event) not in self._positions]
        if not own:
            return
        changes = _Changes(self, fork, own)
        conflicts = list(self._find(changes))
        left = [c for c in conflicts if self._policy == "error" or c.type not in _SETTLED]
        if left:
            raise MergeFailedError(left)
        resolved = self._resolved(changes)
        carried = carried_over(
            [event for event in resolved if not self._is_there(event, changes)],
            kept=changes.fresh,
            alive=lambda node_id: self.target.node_of(node_id) is not None,
            taken=lambda path: self.target.node(path) is not None,
            lost=changes.lost,
        )
        try:
            self.target.replay(list(carried))
        except (AlreadyExistsError, NodeNotFoundError) as error:
            raise SessionStateError(f"cannot merge sessions: {error.message}", ErrorKind.MERGE_FAILED) from error
        left = list(self._without_parent(changes))
        if left:
            raise MergeFailedError(left)
        self._note(resolved, fork.number)

    def foreign(self, node_id: NodeId, changes: _Changes) -> list[_Made]:
        """Events about a node that the other side made since the fork began."""
        return [made for made in self._by_node.get(node_id, ()) if self._is_foreign(made, changes)]

    def _is_foreign(self, made: _Made, changes: _Changes) -> bool:
        return made.position > changes.began_at and event_key(made.event) not in changes.keys

    def position(self, event_id: bytes) -> int:
        """Index of an event in the target; −1 if it is not there."""
        return self._positions.get(event_id, -1)

    def _note(self, events: Iterable[Event], fork: int | None) -> None:
        for event in events:
            made = _Made(event, len(self._positions), fork)
            self._positions[event_key(event)] = made.position
            if isinstance(event, HierarchyCleared):
                continue
            self._by_node.setdefault(event.node_id, []).append(made)
            if isinstance(event, MetadataReplaced):
                self._documents.setdefault(event.node_id, []).append(made)
            elif isinstance(event, ChunksWritten | ChunksDeleted):
                self._boxes.setdefault(event.node_id, _Boxes()).add(made)

    def _find(self, changes: _Changes) -> Iterator[MergeConflict]:
        for node_id, events in changes.chunks.items():
            node = self.target.node_of(node_id)
            if node_id in changes.fresh:
                continue
            if node is not None:
                yield from self._chunks_under_new_metadata(node, events, changes)
                yield from self._chunks_twice(node, events, changes)
            elif changes.after.node_of(node_id) is not None:
                path = changes.path_of(node_id)
                yield self._conflict(MergeConflictType.DELETED_AND_CHANGED, node_id, path, changes)
        if not changes.only_chunks:
            yield from self._nodes(changes)

    # -- chunks ------------------------------------------------------------------------------------------------------

    def _chunks_under_new_metadata(
        self, node: NodeSnapshot, events: Sequence[Event], changes: _Changes
    ) -> Iterator[MergeConflict]:
        """Chunks of the fork in an array whose metadata the other side changed."""
        if not any(self._is_foreign(made, changes) for made in self._documents.get(node.id, ())):
            return
        was = changes.before.node_of(node.id, node.path)
        if was is None or was.user_data == node.user_data:
            return
        if encoding_of(was.user_data) != encoding_of(node.user_data):
            yield self._conflict(MergeConflictType.ENCODING_CHANGED, node.id, node.path, changes)
            return
        coords = np.concatenate([_coords(event) for event in events])
        outside = coords[inside(coords, _grid(was)) & ~inside(coords, _grid(node))]
        if len(outside):
            if self._policy == "ours":
                changes.lose(node.id, outside)
            changes.shapes[node.id] = was.user_data
            yield self._conflict(MergeConflictType.CHUNKS_OUTSIDE_SHAPE, node.id, node.path, changes, outside)

    def _chunks_twice(self, node: NodeSnapshot, events: Sequence[Event], changes: _Changes) -> Iterator[MergeConflict]:
        """Chunks that both sides changed."""
        boxes = self._boxes.get(node.id)
        if boxes is None or self._policy == "theirs":
            return
        found: dict[int | None, list[Coords]] = {}
        # Chunks outside one side's new shape are another conflict; zarr deletes those chunks when it shrinks an array.
        grids = [_grid(node)]
        if not changes.only_chunks and (last := changes.after.node_of(node.id, node.path)) is not None:
            grids.append(_grid(last))
        for coords in map(_coords, events):
            for grid in grids:
                if len(grid) == coords.shape[1]:
                    coords = coords[inside(coords, grid)]
            for made in boxes.overlapping(coords):
                if self._is_foreign(made, changes):
                    both = coords[CoordIndex(_coords(made.event)).find_rows(coords) >= 0]
                    if len(both):
                        # Also those to the same effect: the target's are as good.
                        changes.lose(node.id, both)
                        found.setdefault(made.fork, []).append(both)
        if self._policy == "ours" or not found:
            return
        differing: dict[int | None, Coords] = {}
        for number, parts in found.items():
            coords = _united(parts)
            rows = [self._differ(node, tuple(row), events) for row in coords.tolist()]
            if any(rows):
                differing[number] = coords[rows]
        if differing:
            yield MergeConflict(
                type=MergeConflictType.CHUNKS_CHANGED_TWICE,
                path=node.path,
                sessions=(*differing, changes.fork.number),
                chunks=_box(_united(list(differing.values()))),
            )

    def _differ(self, node: NodeSnapshot, coords: tuple[int, ...], events: Sequence[Event]) -> bool:
        ours, theirs = self.target.chunk(node, coords), _last(events, coords)
        if ours == theirs:
            return False
        if not (isinstance(ours, ChunkRef) and isinstance(theirs, ChunkRef) and _comparable(ours, theirs)):
            return True
        equal = self._equal.get((ours, theirs))
        if equal is None:
            self.undecided.append((ours, theirs))
        return equal is False

    # -- nodes -------------------------------------------------------------------------------------------------------

    def _nodes(self, changes: _Changes) -> Iterator[MergeConflict]:
        target = self.target
        for node in changes.net.new:
            there = target.node(node.path)
            if there is not None and there.id != node.id:
                yield self._conflict(MergeConflictType.CREATED_TWICE, there.id, node.path, changes)
        for move in changes.net.moved:
            there = target.node_of(move.node_id, move.target)
            at_target = target.node(move.target)
            if there is None:
                yield self._conflict(MergeConflictType.DELETED_AND_CHANGED, move.node_id, move.source, changes)
            elif there.path not in (move.source, move.target):
                yield self._conflict(MergeConflictType.MOVED_TWICE, move.node_id, there.path, changes)
            elif there.path == move.target:
                changes.arrived.add(move.node_id)
            elif at_target is not None and at_target.id not in (move.node_id, *changes.leaving):
                yield self._conflict(MergeConflictType.CREATED_TWICE, at_target.id, move.target, changes)
        for node in changes.net.updated:
            there, was = target.node_of(node.id, node.path), changes.before.node_of(node.id, node.path)
            if there is None:
                yield self._conflict(MergeConflictType.DELETED_AND_CHANGED, node.id, node.path, changes)
            elif was is None or there.user_data == was.user_data:
                yield from self._new_metadata_over_chunks(node, there, changes)
            elif node.kind is NodeKind.ARRAY or there.user_data != node.user_data:
                changes.twice.add(node.id)
                yield self._conflict(MergeConflictType.METADATA_CHANGED_TWICE, node.id, there.path, changes)
        for node in changes.net.deleted:
            yield from self._deleted(node, changes)

    def _new_metadata_over_chunks(
        self, node: NodeSnapshot, there: NodeSnapshot, changes: _Changes
    ) -> Iterator[MergeConflict]:
        """Chunks of the other side in an array whose metadata the fork changed."""
        events = [
            made.event
            for made in self.foreign(node.id, changes)
            if isinstance(made.event, ChunksWritten | ChunksDeleted)
        ]
        if not events:
            return
        if encoding_of(node.user_data) != encoding_of(there.user_data):
            yield self._conflict(MergeConflictType.ENCODING_CHANGED, node.id, there.path, changes)
            return
        coords = np.concatenate([_coords(event) for event in events])
        outside = coords[inside(coords, _grid(there)) & ~inside(coords, _grid(node))]
        if len(outside):
            changes.twice.add(node.id)
            if self._policy == "ours":
                for coords in map(_coords, changes.chunks.get(node.id, ())):
                    changes.lose(node.id, coords[~inside(coords, _grid(node))])
            yield self._conflict(MergeConflictType.CHUNKS_OUTSIDE_SHAPE, node.id, there.path, changes, outside)

    def _deleted(self, node: NodeSnapshot, changes: _Changes) -> Iterator[MergeConflict]:
        """A node that the fork deleted, and the other side changed."""
        there, before = self.target.node_of(node.id, node.path), changes.before
        if there is None:
            return
        if there.user_data != node.user_data:
            changed = True
        elif node.kind is NodeKind.ARRAY:
            changed = any(isinstance(m.event, ChunksWritten | ChunksDeleted) for m in self.foreign(node.id, changes))
        else:
            new = (below for below in self.target.nodes(there.path) if before.node_of(below.id, below.path) is None)
            changed = next(new, None) is not None
        if changed:
            yield self._conflict(MergeConflictType.DELETED_AND_CHANGED, node.id, there.path, changes)

    def _without_parent(self, changes: _Changes) -> Iterator[MergeConflict]:
        """Nodes that the fork made or moved, whose group the other side deleted, moved, or made an array."""
        if changes.only_chunks:
            return
        for path in [*(node.path for node in changes.net.new), *(move.target for move in changes.net.moved)]:
            parent = parent_of(path)
            had = changes.after.node(parent)
            if path == "/" or had is None or self.target.node(path) is None:
                continue
            holder = self.target.node(parent)
            if holder is None or holder.kind is not NodeKind.GROUP:
                yield self._conflict(MergeConflictType.DELETED_AND_CHANGED, had.id, parent, changes)

    # -- outcomes ----------------------------------------------------------------------------------------------------

    def _resolved(self, changes: _Changes) -> list[Event]:
        """The fork's events, as the policy has them."""
        if self._policy == "ours":
            return [
                event
                for event in changes.own
                if not (isinstance(event, MetadataReplaced) and event.node_id in changes.twice)
            ]
        restored = [
            # The array gets the shape back that the fork's chunks are in.
            MetadataReplaced(node_id=node_id, path=changes.path_of(node_id), user_data=document)
            for node_id, document in changes.shapes.items()
            if self._policy == "theirs" and node_id not in changes.twice
        ]
        return [*restored, *changes.own]

    def _is_there(self, event: Event, changes: _Changes) -> bool:
        """Whether the node that an event creates came with an earlier merge, or is where the event moves it."""
        match event:
            case GroupCreated() | ArrayCreated():
                return self.target.node_of(event.node_id, event.path) is not None
            case NodeMoved():
                return event.node_id in changes.arrived
            case _:
                return False

    def _conflict(
        self, type: MergeConflictType, node_id: NodeId, path: str, changes: _Changes, coords: Coords | None = None
    ) -> MergeConflict:
        """A conflict between the fork and the sessions of the other side that changed the node."""
        others = dict.fromkeys(made.fork for made in self.foreign(node_id, changes)) or {None: None}
        return MergeConflict(
            type=type,
            path=path,
            sessions=(*others, changes.fork.number),
            chunks=None if coords is None else _box(coords),
        )


class _Changes:
    """The changes of a fork that are not in the target, and the outcome of each."""

    def __init__(self, merging: Merge, fork: Fork, own: list[Event]) -> None:
        self.fork: Fork = fork
        self.own: list[Event] = own
        self._merging = merging
        self.only_chunks: bool = all(isinstance(event, ChunksWritten | ChunksDeleted) for event in own)
        self.chunks: dict[NodeId, list[Event]] = {}
        for event in own:
            if isinstance(event, ChunksWritten | ChunksDeleted):
                self.chunks.setdefault(event.node_id, []).append(event)
        self.began_at: int = max(map(merging.position, fork.last_inherited), default=-1)
        """Events of the target up to this position were there when the fork began."""
        self.twice: set[NodeId] = set()
        """Nodes whose metadata are in conflict."""
        self.arrived: set[NodeId] = set()
        """Nodes that the other side moved to the same places."""
        self.shapes: dict[NodeId, bytes] = {}
        """Documents with the shapes in which the fork wrote chunks that the target has no place for."""
        self._lost: dict[NodeId, list[Coords]] = {}

    def lose(self, node_id: NodeId, coords: Coords) -> None:
        """Chunks that give way where the target's are kept."""
        self._lost.setdefault(node_id, []).append(coords)

    @property
    def lost(self) -> dict[NodeId, CoordIndex]:
        """All of them."""
        return {node_id: CoordIndex(_united(parts)) for node_id, parts in self._lost.items() if any(map(len, parts))}

    @cached_property
    def keys(self) -> set[object]:
        """Keys of all events that the fork has."""
        return {event_key(event) for event in (*self.fork.inherited, *self.fork.own)}

    @cached_property
    def before(self) -> SessionLog:
        """The fork without the changes that it brings."""
        new = {id(event) for event in self.own}
        known = [event for event in self.fork.own if id(event) not in new]
        return self.fork.log_with(known, self._merging.target)

    @cached_property
    def after(self) -> SessionLog:
        """The same with them, as a log over the nodes that there were before."""
        before = self.before
        return before.rebased(self.fork.base.with_nodes(before.hierarchy()), self.own)

    @cached_property
    def net(self) -> NetChanges:
        """The changes by node; none where there are only chunks."""
        return NetChanges() if self.only_chunks else self.after.net_changes()

    @cached_property
    def fresh(self) -> set[NodeId]:
        """Nodes that it brings."""
        return {node.id for node in self.net.new}

    @cached_property
    def leaving(self) -> set[NodeId]:
        """Nodes that it deletes or moves."""
        return {node.id for node in self.net.deleted} | {move.node_id for move in self.net.moved}

    def path_of(self, node_id: NodeId) -> str:
        """The path of a node in the fork."""
        node = self.after.node_of(node_id) or self.before.node_of(node_id)
        return node_id.hex() if node is None else node.path


class _Boxes:
    """Chunk events of one array, to be searched by the box of their coordinates."""

    def __init__(self) -> None:
        self._made: list[_Made] = []
        self._edges: npt.NDArray[np.uint32] | None = None
        self._new: list[Coords] = []

    def add(self, made: _Made) -> None:
        coords = _coords(made.event)
        if not len(coords):
            return
        edges = np.array([coords.min(axis=0, initial=0), coords.max(axis=0, initial=0)], np.uint32)
        if self._made and len(edges[0]) != len(_coords(self._made[-1].event)[0]):
            # The array has another rank now, and those chunks are gone.
            self._made, self._edges, self._new = [], None, []
        self._made.append(made)
        self._new.append(edges)

    def overlapping(self, coords: Coords) -> Iterator[_Made]:
        """Events whose box has a chunk in common with that of some coordinates, all of one rank."""
        if not len(coords) or not self._made:
            return
        if self._new:
            new = np.stack(self._new)
            self._edges = new if self._edges is None else np.concatenate([self._edges, new])
            self._new = []
        edges = self._edges
        assert edges is not None
        if edges.shape[2] != coords.shape[1]:
            return
        first, last = coords.min(axis=0, initial=2**32 - 1), coords.max(axis=0, initial=0)
        meets = ((edges[:, 0] <= last) & (edges[:, 1] >= first)).all(axis=1)
        for row in np.flatnonzero(meets).tolist():
            yield self._made[row]


def event_key(event: Event) -> object:
    """The identity that all copies of an event share."""
    return event.id or id(event)


def _coords(event: Event) -> Coords:
    assert isinstance(event, ChunksWritten | ChunksDeleted)
    return event.refs.coords if isinstance(event, ChunksWritten) else event.coords


def _last(events: Sequence[Event], coords: tuple[int, ...]) -> ChunkRef | Absent:
    """A chunk after the events, in their order."""
    for event in reversed(events):
        if isinstance(event, ChunksWritten) and (ref := find(event.refs, coords)) is not None:
            return ref
        if isinstance(event, ChunksDeleted) and (event.coords == np.array(coords, np.uint32)).all(axis=1).any():
            return ABSENT
    return ABSENT


def _comparable(a: ChunkRef, b: ChunkRef) -> bool:
    """Whether the bytes of two references could be equal, and are ours to read."""
    return a.length == b.length and {a.kind, b.kind} in ({NATIVE}, {INLINE, NATIVE})


def _united(parts: Sequence[Coords]) -> Coords:
    coords = np.concatenate(parts)
    order = sort_last(coords)
    return coords if order is None else coords[order]


def _box(coords: Coords) -> tuple[tuple[int, int], ...]:
    return tuple((int(column.min()), int(column.max())) for column in coords.T)


def _grid(node: NodeSnapshot) -> tuple[int, ...]:
    return tuple(dimension.num_chunks for dimension in node.shape)
