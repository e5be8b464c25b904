"""The session log: a base snapshot, an append-only list of events, and their fold.

Theory
------
A session never changes its base; it appends events. Its view is the fold of the events over
the base, updated with every event, so that a read never replays events.

A command (`SessionLog.set_metadata`, `SessionLog.set_native`, …) checks its arguments against the
fold, then appends the event and folds it: a command that raises has changed nothing. Chunks do not
become events when they are written. They are collected in their array's fold, single ones in its *open rows*,
and become a few events when events are needed: at a savepoint, or when the log is serialised,
forked or rebased. This is sound because chunk events of one array commute with all other events but
two: the creation of the array, which comes first anyway, and its deletion, which makes them void
(they are dropped then).

Chunks are looked up by coordinates under the array's current grid. After a shrink the chunks
outside are invisible, and visible again if the array grows in the same session; the commit
drops chunks that are outside at that time, as the official library does.

Worked example::

    log = SessionLog(snapshot, sources.new_node_id)
    log.set_metadata("/a", zarr_json)
    node = log.node("/a")
    log.set_native(node, (0, 0), chunk_id, 0, 1000)
    log.chunk(node, (0, 0))      # ChunkRef(kind=NATIVE, …)
    log.chunk(node, (0, 1))      # ABSENT: the array is new
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from icechunk.errors import AlreadyExistsError, ErrorKind, InvalidInputError, SessionStateError
from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.values import INLINE, NATIVE, ChunkRef, ChunkRefs, NodeKind, NodeSnapshot, Snapshot
from icechunk.log.session.array_fold import OPEN_ROWS, inside
from icechunk.log.session.columns import normalized, sort_last
from icechunk.log.session.events import (
    ArrayCreated,
    Event,
    GroupCreated,
    HierarchyCleared,
    MetadataReplaced,
    NodeDeleted,
    NodeMoved,
)
from icechunk.log.session.fold import ABSENT, IN_BASE, Absent, Fold, InBase, in_grid
from icechunk.log.session.hierarchy import check_path, is_below, parent_of
from icechunk.log.session.zarr_metadata import ArrayMeta, parse_node, parse_replacement
from icechunk.runtime.late_dataclass import dataclass

__all__ = ["ABSENT", "IN_BASE", "Absent", "Commands", "InBase", "Savepoint", "SessionLog"]

_new_ref = tuple.__new__


class Commands(Fold):
    """The commands of a session: each checks its arguments against the fold, then appends an event. A command that
    raises has changed nothing."""

    def set_metadata(self, path: str, user_data: bytes) -> None:
        """Create a group or array, or replace the metadata of the one that is there.

        Nothing happens if the document is byte for byte the current one. Groups above it need not exist.

        Raises
        ------
        InvalidInputError
            If the path or the document is refused (see `parse_node`).
        AlreadyExistsError
            If an array shall be created at the path of a group, or a group at that of an array: delete it first.
        """
        check_path(path)
        node = self._tree.get(path)
        if node is not None and node.user_data == user_data:
            return
        meta = parse_node(user_data, path) if node is None else parse_replacement(user_data, node)
        kind = NodeKind.ARRAY if isinstance(meta, ArrayMeta) else NodeKind.GROUP
        if node is None:
            created = ArrayCreated if kind is NodeKind.ARRAY else GroupCreated
            self._append(created(node_id=self._new_node_id(), path=path, user_data=user_data), meta)
        elif node.kind != kind:
            raise AlreadyExistsError(
                f"cannot set the metadata of {path} to that of {_an(kind)}: there is {_an(node.kind)}; delete it first",
                ErrorKind.NODE_ALREADY_EXISTS,
            )
        else:
            self._append(MetadataReplaced(node_id=node.id, path=path, user_data=user_data), meta)

    def delete_node(self, path: str) -> None:
        """Delete a node and everything below it.

        Raises
        ------
        NodeNotFoundError
            If there is none.
        """
        self._append(NodeDeleted(node_id=self._existing(path, "delete").id, path=path))

    def clear(self) -> None:
        """Delete every node, the root too; nothing happens if there are no nodes."""
        if next(self._tree.subtree("/"), None) is not None:
            self._append(HierarchyCleared())

    def move_node(self, source: str, target: str) -> None:
        """Move a node and everything below it; no data moves.

        Raises
        ------
        NodeNotFoundError
            If there is nothing at ``source``.
        AlreadyExistsError
            Kind ``move-wont-overwrite`` if there is something at ``target``.
        SessionStateError
            Kind ``move-into-self-or-descendant``, ``move-destination-parent-missing`` or
            ``move-destination-parent-not-group``.
        InvalidInputError
            If a path is malformed.
        """
        check_path(source)
        check_path(target)
        if source == target or is_below(target, source):
            raise SessionStateError(
                f"cannot move {source} to {target}: a node cannot move into itself or its own descendant",
                ErrorKind.MOVE_INTO_SELF_OR_DESCENDANT,
            )
        node = self._existing(source, "move")
        if self._tree.get(target) is not None:
            raise AlreadyExistsError(
                f"cannot move {source} to {target}: it would overwrite existing node {target}; delete that first, or "
                "choose another path",
                ErrorKind.MOVE_WONT_OVERWRITE,
            )
        above = parent_of(target)
        parent = self._tree.get(above)
        if parent is None:
            raise SessionStateError(
                f"cannot move {source} to {target}: the destination's parent group {above} does not exist; create it "
                "in an ordinary session first",
                ErrorKind.MOVE_DESTINATION_PARENT_MISSING,
            )
        if parent.kind != NodeKind.GROUP:
            raise SessionStateError(
                f"cannot move {source} to {target}: {above} is an array, not a group, and only groups hold nodes",
                ErrorKind.MOVE_DESTINATION_PARENT_NOT_GROUP,
            )
        if next((n for n in self._tree.subtree(target)), None) is not None:
            raise AlreadyExistsError(
                f"cannot move {source} to {target}: there are nodes below it", ErrorKind.MOVE_WONT_OVERWRITE
            )
        self._append(NodeMoved(node_id=node.id, source=source, target=target))

    def set_inline(self, node: NodeSnapshot, coords: tuple[int, ...], data: bytes) -> None:
        """Write a chunk whose bytes are stored in the manifest.

        Raises
        ------
        InvalidInputError
            ``invalid-chunk-index`` outside the grid, ``zero-length-chunk``, ``not-an-array``.
        NodeNotFoundError
            If the node is there no more.
        """
        n = len(data)
        if not n:
            raise _zero_length(node, coords)
        fold = self._arrays.get(node.id) or self._fold_of(node)
        if not in_grid(coords, fold.grid):
            raise _outside(node, coords, fold.grid)
        rows = fold.rows
        rows[coords] = _new_ref(ChunkRef, (INLINE, data, None, None, 0, n, None, None))
        if len(rows) >= OPEN_ROWS:
            fold.close()

    def set_native(
        self, node: NodeSnapshot, coords: tuple[int, ...], chunk_id: ObjectId, offset: int, length: int
    ) -> None:
        """Write a chunk that is a range of bytes of a chunk object.

        Raises
        ------
        InvalidInputError
            ``invalid-chunk-index`` outside the grid, ``zero-length-chunk``, ``not-an-array``.
        NodeNotFoundError
            If the node is there no more.
        """
        if length <= 0:
            raise _zero_length(node, coords)
        fold = self._arrays.get(node.id) or self._fold_of(node)
        if not in_grid(coords, fold.grid):
            raise _outside(node, coords, fold.grid)
        rows = fold.rows
        rows[coords] = _new_ref(ChunkRef, (NATIVE, None, chunk_id, None, offset, length, None, None))
        if len(rows) >= OPEN_ROWS:
            fold.close()

    def set_refs(self, node: NodeSnapshot, refs: ChunkRefs) -> None:
        """Write many chunks.

        Parameters
        ----------
        refs
            In any order; of several rows with the same coordinates the last counts. The log takes ownership of the
            columns: the caller must not change them.

        Raises
        ------
        InvalidInputError
            ``invalid-chunk-index`` if a chunk is outside the grid, ``not-an-array``.
        NodeNotFoundError
            If the node is there no more.
        """
        fold = self._arrays.get(node.id) or self._fold_of(node)
        _check_all_inside(node, refs.coords, fold.grid)
        if len(refs):
            fold.close()
            fold.push(normalized(refs))

    def delete_chunk(self, node: NodeSnapshot, coords: tuple[int, ...]) -> None:
        """Delete a chunk, whether it exists or not; nothing happens outside the grid.

        Raises
        ------
        InvalidInputError
            ``not-an-array``.
        NodeNotFoundError
            If the node is there no more.
        """
        fold = self._arrays.get(node.id) or self._fold_of(node)
        if in_grid(coords, fold.grid):
            fold.rows[coords] = None
            if len(fold.rows) >= OPEN_ROWS:
                fold.close()

    def delete_chunks(self, node: NodeSnapshot, coords: npt.NDArray[np.uint32]) -> None:
        """Delete many chunks, whether they exist or not; those outside the grid are ignored.

        Parameters
        ----------
        coords
            uint32[n, ndim], in any order.

        Raises
        ------
        InvalidInputError
            ``invalid-chunk-index`` if the coordinates have another rank than the array, ``not-an-array``.
        NodeNotFoundError
            If the node is there no more.
        """
        fold = self._arrays.get(node.id) or self._fold_of(node)
        _check_rank(node, coords, fold.grid)
        coords = coords[inside(coords, fold.grid)]
        order = sort_last(coords)
        if len(coords):
            fold.close()
            fold.push_deleted(coords if order is None else coords[order])


def _check_all_inside(node: NodeSnapshot, coords: npt.NDArray[np.uint32], grid: tuple[int, ...]) -> None:
    _check_rank(node, coords, grid)
    good = inside(coords, grid)
    if not good.all():
        raise _outside(node, coords[int(np.argmin(good))].tolist(), grid)


def _check_rank(node: NodeSnapshot, coords: npt.NDArray[np.uint32], grid: tuple[int, ...]) -> None:
    if coords.ndim != 2 or coords.shape[1] != len(grid):
        raise _outside(node, coords[0].tolist() if len(coords) else list(coords.shape[1:]), grid)


def _outside(node: NodeSnapshot, coords: object, grid: tuple[int, ...]) -> InvalidInputError:
    return InvalidInputError(
        f"cannot write chunk {coords} of the array {node.path}: it is outside the grid of {grid} chunks",
        ErrorKind.INVALID_CHUNK_INDEX,
    )


def _zero_length(node: NodeSnapshot, coords: tuple[int, ...]) -> InvalidInputError:
    return InvalidInputError(
        f"cannot write chunk {coords} of the array {node.path}: it has no bytes, and no codec encodes a chunk to none",
        ErrorKind.ZERO_LENGTH_CHUNK,
    )


def _an(kind: NodeKind) -> str:
    return "an array" if kind == NodeKind.ARRAY else "a group"


@dataclass(frozen=True, slots=True)
class Savepoint:
    """A position of one log."""

    serial: int
    """Identifies the savepoint within its log."""
    position: int
    """Number of events before it."""


class SessionLog(Commands):
    """Events over a base snapshot, and their fold.

    Not thread-safe by itself: its owner must guard every method call, each of which is a short critical section.

    Parameters
    ----------
    base
        The snapshot that the session is based on.
    new_node_id
        Source of fresh ids.
    author
        8 bytes that no other log uses as author of new events; empty: events get no ids, and the log cannot be merged.
    """

    def __init__(self, base: Snapshot, new_node_id: Callable[[], NodeId], author: bytes = b"") -> None:
        super().__init__(base, new_node_id, author)
        self._savepoints: dict[int, int] = {}
        self._serial = 0

    def savepoint(self) -> Savepoint:
        """Remember this position."""
        self._record_all()
        self._serial += 1
        self._savepoints[self._serial] = len(self._events)
        return Savepoint(self._serial, len(self._events))

    def rollback(self, savepoint: Savepoint) -> None:
        """Return to a savepoint, which stays valid; later ones do not.

        Raises
        ------
        SessionStateError
            If the savepoint is not of this log, or was rolled back itself.
        """
        self._require(savepoint)
        self._savepoints = {s: p for s, p in self._savepoints.items() if s <= savepoint.serial}
        self._refold(self._events[: savepoint.position])

    def since(self, savepoint: Savepoint) -> SessionLog:
        """The changes after a savepoint, as a log over the nodes that existed at the savepoint.

        Its base has the id and the manifests of this log's base: use it to inspect changes, not to read chunks.

        Raises
        ------
        SessionStateError
            As `rollback`.
        """
        self._require(savepoint)
        then = self.at(savepoint)
        return then.rebased(self._base.with_nodes(then.hierarchy()), self.events[savepoint.position :])

    def at(self, savepoint: Savepoint) -> SessionLog:
        """A separate log in the state that this one had at a savepoint. Raises as `rollback`."""
        self._require(savepoint)
        return self.rebased(self._base, self.events[: savepoint.position])

    def discard(self) -> None:
        """Drop every event and savepoint."""
        self._savepoints.clear()
        self._refold(())

    def rebased(self, base: Snapshot, events: Iterable[Event] | None = None, *, author: bytes = b"") -> SessionLog:
        """A new log with the same events on another base; this one stays as it is.

        The caller must check for conflicts between the two bases beforehand.

        Parameters
        ----------
        base
            The snapshot that the new log is based on.
        events
            Events to use instead of this log's own.
        author
            Author of later events; empty: this log's author. This log must then get no further events.

        Raises
        ------
        NodeNotFoundError
            If an event names a node that the other base does not have.
        AlreadyExistsError
            If an event creates a node where the other base has one.
        """
        log = SessionLog(base, self._new_node_id, author or self._author)
        log._made = self._made
        # A savepoint of this log must not be valid for the new one.
        log._serial = self._serial
        log._refold(self.events if events is None else events)
        return log

    def savepoint_at(self, position: int) -> Savepoint:
        """A savepoint after that many events, for a log that was decoded: its bytes do not contain savepoints."""
        savepoint = self.savepoint()
        if not 0 <= position <= savepoint.position:
            raise SessionStateError(f"no savepoint after {position} events: the log has {savepoint.position}")
        self._savepoints[savepoint.serial] = position
        return Savepoint(savepoint.serial, position)

    def replay(self, events: Iterable[Event]) -> None:
        """Append events of another log that started from the current state of this one.

        Raises
        ------
        NodeNotFoundError, AlreadyExistsError
            As `rebased`; the log is then as it was before.
        """
        self._record_all()
        before = list(self._events)
        try:
            for event in events:
                self._append(event)
        except BaseException:
            self._refold(before)
            raise

    def _require(self, savepoint: Savepoint) -> None:
        if self._savepoints.get(savepoint.serial) != savepoint.position:
            raise SessionStateError(
                "cannot roll back: the savepoint belongs to another session, or has been rolled back"
            )
