"""Merging a fork's changes into the session that it was forked from, or into another fork of it.

Who merges wins where both wrote a chunk: forks share out an array's chunks, so nobody asks whether two wrote the same.
Everything else that two cannot both have done is refused: creating different nodes at one path, giving one node two
documents, deleting what the other changed. Merging a fork twice is harmless.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

from icechunk.errors import AlreadyExistsError, ErrorKind, NodeNotFoundError, SessionStateError
from icechunk.format.ids import NodeId
from icechunk.format.values import NodeKind, NodeSnapshot
from icechunk.log.session.columns import trimmed
from icechunk.log.session.events import ArrayCreated, ChunksDeleted, ChunksWritten, Event, GroupCreated
from icechunk.log.session.hierarchy import parent_of
from icechunk.log.session.log import Savepoint, SessionLog
from icechunk.log.session.merge.conflicts import carried_over
from icechunk.log.session.merge.diff import NetChanges

__all__ = ["merge"]


def merge(target: SessionLog, fork: SessionLog, origin: Savepoint) -> None:
    """Append what a fork changed.

    Parameters
    ----------
    target
        Takes the changes. After an error it is as before.
    fork
        Another log over a base with the same nodes.
    origin
        Where the fork's own changes begin.

    Raises
    ------
    SessionStateError
        Kind ``merge-failed``: both changed what only one can.
    """
    events = fork.events[origin.position :]
    if not events:
        return
    if all(isinstance(event, ChunksWritten | ChunksDeleted) for event in events):
        # The usual worker: it wrote chunks, and nothing has to be compared node by node.
        fresh: set[NodeId] = set()
        written = {event.node_id for event in events if isinstance(event, ChunksWritten | ChunksDeleted)}
        refusals = _refusals(gone={_path(fork, i) for i in written if target.node_of(i) is None})
    else:
        own = fork.since(origin).net_changes()
        fresh = {node.id for node in own.new}
        refusals = _compared(target, fork.at(origin), own, fresh)
    if refusals:
        raise SessionStateError(
            f"cannot merge sessions: {'; '.join(refusals)}; create and delete nodes before forking, or in one fork",
            ErrorKind.MERGE_FAILED,
        )
    carried = carried_over(
        [event for event in events if not _is_there(target, event)],
        kept=fresh,
        alive=lambda node_id: target.node_of(node_id) is not None,
        taken=lambda path: target.node(path) is not None,
    )
    try:
        target.replay(list(carried))
    except (AlreadyExistsError, NodeNotFoundError) as error:
        raise SessionStateError(f"cannot merge sessions: {error.message}", ErrorKind.MERGE_FAILED) from error


def _compared(target: SessionLog, before: SessionLog, own: NetChanges, fresh: set[NodeId]) -> list[str]:
    gone = {node.path for node in own.updated if target.node_of(node.id, node.path) is None}
    for node_id, path in own.paths.items():
        if node_id not in fresh and target.node_of(node_id, path) is None:
            gone.add(path)
    return _refusals(
        created={node.path for node in own.new if _taken_by_another(target, node)},
        twice={node.path for node in own.updated if _changed_twice(before, target, node)},
        gone=gone | set(_deleted_though_changed(before, target, own.deleted)),
    )


def _refusals(
    created: Set[str] = frozenset(), twice: Set[str] = frozenset(), gone: Set[str] = frozenset()
) -> list[str]:
    found = [
        ("several created", created),
        ("several updated the metadata of", twice),
        ("one deleted, and another changed,", gone),
    ]
    return [f"{what} {_some(paths)}" for what, paths in found if paths]


def _path(log: SessionLog, node_id: NodeId) -> str:
    node = log.node_of(node_id)
    return node_id.hex() if node is None else node.path


def _is_there(target: SessionLog, event: Event) -> bool:
    """Whether the node that an event creates came with an earlier merge."""
    return isinstance(event, GroupCreated | ArrayCreated) and target.node_of(event.node_id, event.path) is not None


def _taken_by_another(target: SessionLog, node: NodeSnapshot) -> bool:
    there = target.node(node.path)
    return there is not None and there.id != node.id


def _changed_twice(before: SessionLog, target: SessionLog, node: NodeSnapshot) -> bool:
    was, there = before.node_of(node.id, node.path), target.node_of(node.id, node.path)
    if was is None or there is None:
        return False
    return there.user_data not in (was.user_data, node.user_data)


def _deleted_though_changed(before: SessionLog, target: SessionLog, deleted: tuple[NodeSnapshot, ...]) -> Iterator[str]:
    groups: dict[str, NodeId] = {}
    for node in deleted:
        there = target.node_of(node.id, node.path)
        if there is None:
            continue
        if there.user_data != node.user_data:
            yield node.path
        elif node.kind is NodeKind.GROUP:
            groups[there.path] = node.id
        elif _rows(before, node) != _rows(target, there):
            yield node.path
    for path in groups:
        if parent_of(path) in groups and path != "/":
            continue
        for below in target.nodes(path):
            if before.node_of(below.id, below.path) is None:
                yield path
                break


def _rows(log: SessionLog, node: NodeSnapshot) -> tuple[object, ...]:
    written, deleted = log.overlay(node)
    refs = trimmed(written)
    columns = (refs.coords, refs.kind, refs.offset, refs.length, refs.chunk_id, refs.location, deleted)
    return (*(column.tobytes() for column in columns), refs.locations, refs.inline_data)


def _some(paths: Set[str]) -> str:
    shown = ", ".join(sorted(paths)[:3])
    return shown if len(paths) <= 3 else f"{shown} and {len(paths) - 3} more"
