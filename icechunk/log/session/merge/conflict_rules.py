"""Conflicts between a session's changes and the commits that landed since it began.

A pure function of the session's log (its changes and its base) and of the winners' changes: their transaction logs,
and the snapshot that they led to. It finds typed conflicts; a solver's choices turn them into a log on the new base,
or into a `RebaseFailedError`. The rules are a table in ``spec/session-log.md``, in the order in which they are
checked here.

Worked example::

    winner = Winner(snapshot=tip, transactions=(transaction_log,))
    find_conflicts(log, winner)                       # (Conflict(ChunkDoubleUpdate, path="/a", …),)
    log = rebase(log, winner, BasicConflictSolver())  # our chunk stays
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from icechunk.conflicts import (
    BasicConflictSolver,
    Conflict,
    ConflictSolver,
    ConflictType,
    RebaseFailedError,
    VersionSelection,
)
from icechunk.format.ids import NodeId, encode_id
from icechunk.format.snapshot.nodes import by_id
from icechunk.format.values import NodeKind, NodeSnapshot, Snapshot, TransactionLog
from icechunk.log.session.columns import CoordIndex
from icechunk.log.session.events import (
    ArrayCreated,
    ChunksDeleted,
    ChunksWritten,
    Event,
    GroupCreated,
    HierarchyCleared,
)
from icechunk.log.session.hierarchy import Hierarchy, parent_of
from icechunk.log.session.log import SessionLog
from icechunk.log.session.merge.diff import NetChanges
from icechunk.log.session.merge.landed import Landed, LandedSince
from icechunk.runtime.late_dataclass import dataclass

__all__ = ["Winner", "carried_over", "find_conflicts", "rebase"]

_ORDER: Final = (
    ConflictType.NewNodeConflictsWithExistingNode,
    ConflictType.NewNodeInInvalidGroup,
    ConflictType.ZarrMetadataDoubleUpdate,
    ConflictType.ZarrMetadataUpdateOfDeletedArray,
    ConflictType.ZarrMetadataUpdateOfDeletedGroup,
    ConflictType.ChunksUpdatedInDeletedArray,
    ConflictType.ChunksUpdatedInUpdatedArray,
    ConflictType.ChunkDoubleUpdate,
    ConflictType.DeleteOfUpdatedArray,
    ConflictType.DeleteOfUpdatedGroup,
    ConflictType.MoveOperationCannotBeRebased,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Winner:
    """One commit, or several in a row, that landed on the branch after the session began."""

    snapshot: Snapshot
    """The snapshot after them."""
    transactions: tuple[TransactionLog, ...] = ()
    """Logs of every commit between the session's base and the snapshot, oldest first; those of expired ancestors
    too."""
    landed: LandedSince | None = None
    """The changes of the same commits, if they are known; ``transactions`` are not read then."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Theirs:
    """A winner's changes, by node."""

    onto: Snapshot
    alive: Mapping[NodeId, NodeSnapshot]
    """All nodes after them."""
    landed: LandedSince

    @staticmethod
    def of(winner: Winner) -> _Theirs:
        return _Theirs(
            onto=winner.snapshot,
            alive=by_id(winner.snapshot.nodes),
            landed=winner.landed or Landed.of(winner.transactions).since(0),
        )


def _topmost(paths: Iterable[str]) -> tuple[str, ...]:
    """The paths that are not below another one."""
    known, found = set(paths), list[str]()
    for path in sorted(known):
        above = path
        while above != "/" and (above := parent_of(above)) not in known:
            pass
        if above == "/" and (path == "/" or "/" not in known):
            found.append(path)
    return tuple(found)


def find_conflicts(log: SessionLog, winner: Winner) -> tuple[Conflict, ...]:
    """The conflicts between a session's changes and a winner's.

    Parameters
    ----------
    log
        The session's; its base is the parent of the winner's first commit. Nothing about it changes.
    winner
        What landed.

    Returns
    -------
    tuple of Conflict
        None twice, ordered by type and path. Empty: `rebase` succeeds with every solver.
    """
    return _sorted(_find(log, log.net_changes(), _Theirs.of(winner)))


def rebase(log: SessionLog, winner: Winner, solver: ConflictSolver) -> SessionLog:
    """The same changes on top of the winner's snapshot; ``log`` stays as it is.

    Parameters
    ----------
    log, winner
        As for `find_conflicts`.
    solver
        Settles conflicts, or does not.

    Raises
    ------
    RebaseFailedError
        The solver leaves a conflict open; it names all of them, those too that the solver would have settled.
    """
    mine, theirs = log.net_changes(), _Theirs.of(winner)
    conflicts = _sorted(_find(log, mine, theirs))
    if not all(_settles(solver, conflict) for conflict in conflicts):
        raise RebaseFailedError(encode_id(winner.snapshot.id), list(conflicts))
    lost: dict[NodeId, CoordIndex] = {}
    if isinstance(solver, BasicConflictSolver) and solver.on_chunk_conflict is VersionSelection.UseTheirs:
        for node_id, coords in mine.chunks.items():
            both = theirs.landed.written(node_id, coords)
            if len(both):
                lost[node_id] = CoordIndex(both)
    events = carried_over(
        log.events,
        kept={node.id for node in mine.new},
        alive=theirs.alive.__contains__,
        taken=winner.snapshot.nodes.__contains__,
        lost=lost,
    )
    return log.rebased(winner.snapshot, events)


def _settles(solver: ConflictSolver, conflict: Conflict) -> bool:
    if not isinstance(solver, BasicConflictSolver):
        return False
    match conflict.conflict_type:
        case ConflictType.ChunkDoubleUpdate:
            return solver.on_chunk_conflict is not VersionSelection.Fail
        case ConflictType.DeleteOfUpdatedArray:
            return not solver.fail_on_delete_of_updated_array
        case ConflictType.DeleteOfUpdatedGroup:
            return not solver.fail_on_delete_of_updated_group
        case _:
            return False


def _sorted(found: Iterator[Conflict]) -> tuple[Conflict, ...]:
    distinct = {(_ORDER.index(c.conflict_type), c.path): c for c in found}
    return tuple(distinct[at] for at in sorted(distinct))


def _find(log: SessionLog, mine: NetChanges, theirs: _Theirs) -> Iterator[Conflict]:
    moved = theirs.landed.moved
    if moved:
        # A transaction log has net effects only: the path at which something of mine happened may mean another place.
        yield from (Conflict(ConflictType.MoveOperationCannotBeRebased, path) for path in _topmost(moved))
        return
    yield from _placed(log, mine, theirs)
    yield from _documents(mine, theirs)
    yield from _chunks(mine, theirs)
    yield from _deletions(log, mine, theirs)


def _placed(log: SessionLog, mine: NetChanges, theirs: _Theirs) -> Iterator[Conflict]:
    """Conflicts of my new and moved nodes, at their new paths."""
    onto, base = theirs.onto.nodes, log.base.nodes
    leaving = {node.id for node in mine.deleted} | {move.node_id for move in mine.moved}
    placed = [(node.path, node.kind) for node in mine.new] + [(move.target, move.kind) for move in mine.moved]
    own = {path for path, _ in placed}
    for move in mine.moved:
        if move.node_id not in theirs.alive:
            yield Conflict(ConflictType.MoveOperationCannotBeRebased, move.source)
    tree = Hierarchy(onto)
    for path, kind in placed:
        there = onto.get(path)
        if there is not None and there.id not in leaving:
            yield Conflict(ConflictType.NewNodeConflictsWithExistingNode, path)
        if kind is NodeKind.ARRAY and path not in base:
            below = (node for node in tree.subtree(path) if node.path != path and node.path not in base)
            if next(below, None) is not None:
                yield Conflict(ConflictType.NewNodeInInvalidGroup, path)
        above = path
        while above != "/":
            above = parent_of(above)
            holder = onto.get(above)
            if holder is not None and holder.kind is NodeKind.ARRAY and holder.id not in leaving:
                yield Conflict(ConflictType.NewNodeInInvalidGroup, above)
        # Only the parent: groups above it are checked for the parent itself.
        parent = parent_of(path)
        before = base.get(parent)
        if parent not in onto and parent not in own and before is not None and before.id not in leaving:
            yield Conflict(ConflictType.NewNodeInInvalidGroup, parent)


def _documents(mine: NetChanges, theirs: _Theirs) -> Iterator[Conflict]:
    for node in mine.updated:
        if node.id not in theirs.alive:
            if node.kind is NodeKind.ARRAY:
                yield Conflict(ConflictType.ZarrMetadataUpdateOfDeletedArray, node.path)
            else:
                yield Conflict(ConflictType.ZarrMetadataUpdateOfDeletedGroup, node.path)
        elif theirs.landed.has_updated(node.id):
            yield Conflict(ConflictType.ZarrMetadataDoubleUpdate, node.path)


def _chunks(mine: NetChanges, theirs: _Theirs) -> Iterator[Conflict]:
    new = {node.id for node in mine.new}
    for node_id, coords in mine.chunks.items():
        if node_id in new:
            continue
        path = mine.paths[node_id]
        if node_id not in theirs.alive:
            yield Conflict(ConflictType.ChunksUpdatedInDeletedArray, path)
            continue
        if theirs.landed.has_updated(node_id):
            yield Conflict(ConflictType.ChunksUpdatedInUpdatedArray, path)
        both = theirs.landed.written(node_id, coords)
        if len(both):
            yield Conflict(ConflictType.ChunkDoubleUpdate, path, both.tolist())


def _deletions(log: SessionLog, mine: NetChanges, theirs: _Theirs) -> Iterator[Conflict]:
    groups = set()
    for node in mine.deleted:
        if node.kind is NodeKind.ARRAY:
            if node.id in theirs.alive and (theirs.landed.has_updated(node.id) or theirs.landed.has_touched(node.id)):
                yield Conflict(ConflictType.DeleteOfUpdatedArray, node.path)
        else:
            groups.add(node.path)
            if node.id in theirs.alive and theirs.landed.has_updated(node.id):
                yield Conflict(ConflictType.DeleteOfUpdatedGroup, node.path)
    if any(isinstance(event, HierarchyCleared) for event in log.events):
        groups.add("/")
    if not groups:
        return
    known = {node.id for node in log.base.nodes.values()}
    for node in theirs.alive.values():
        if node.id in known:
            continue
        # A node that they put into a group that I delete would vanish, and my session has never seen it.
        above = node.path
        while above != "/":
            above = parent_of(above)
            if above in groups:
                yield Conflict(ConflictType.DeleteOfUpdatedGroup, above)
                break


def carried_over(
    events: Sequence[Event],
    *,
    kept: Container[NodeId],
    alive: Callable[[NodeId], bool],
    taken: Callable[[str], bool],
    lost: Mapping[NodeId, CoordIndex] | None = None,
) -> Iterator[Event]:
    """The events that still mean something where others have been at work.

    Parameters
    ----------
    events
        Oldest first.
    kept
        Ids of nodes that the events create, and leave.
    alive
        Whether a node of the base that the events began with is still there.
    taken
        Whether there is a node at a path.
    lost
        Chunks of these arrays that give way to those of others.
    """
    created = {event.node_id: event.path for event in events if isinstance(event, GroupCreated | ArrayCreated)}
    # Created and deleted again, at a place that is taken now.
    passing = {node_id for node_id, path in created.items() if node_id not in kept and taken(path)}
    for event in events:
        if isinstance(event, HierarchyCleared):
            yield event
        elif event.node_id in passing or (event.node_id not in created and not alive(event.node_id)):
            # Both deleted it: no earlier change of it counts.
            continue
        elif lost and isinstance(event, ChunksWritten | ChunksDeleted) and event.node_id in lost:
            yield from _without(event, lost[event.node_id])
        else:
            yield event


def _without(event: ChunksWritten | ChunksDeleted, lost: CoordIndex) -> Iterator[Event]:
    coords = event.refs.coords if isinstance(event, ChunksWritten) else event.coords
    stay = lost.find_rows(coords) < 0
    if stay.all():
        yield event
    elif not stay.any():
        return
    elif isinstance(event, ChunksWritten):
        yield replace(event, refs=event.refs.take(stay))
    else:
        yield replace(event, coords=coords[stay])
