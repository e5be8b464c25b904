"""The session log: a base snapshot, an append-only list of events, and their fold.

Theory
------
A session never changes its base; it appends events. What the session sees is the fold of the
events over the base, kept up to date with every event, so that a read never replays.

A command (`SessionLog.set_metadata`, `SessionLog.set_native`, …) checks its arguments against the
fold, then appends the event and folds it: a command that raises has changed nothing. Chunks written
one at a time do not become an event each. They gather in the *open rows* of their array, and
become one event when the array is sealed: at a savepoint, before a bulk write, when the log is
serialised, or when there are many. This is sound because chunk events of one array commute with
all other events but two: the creation of the array, which comes first anyway, and its deletion,
which makes them void (open rows are simply dropped then).

Chunks are looked up by coordinates under the array's current grid. After a shrink the chunks
outside are out of sight, and in sight again if the array grows in the same session; the commit
drops what is outside then, as the official library does.

Worked example::

    log = SessionLog(snapshot, sources.new_node_id)
    log.set_metadata("/a", zarr_json)
    node = log.node("/a")
    log.set_native(node, (0, 0), chunk_id, 0, 1000)
    log.chunk(node, (0, 0))      # ChunkRef(kind=NATIVE, …)
    log.chunk(node, (0, 1))      # ABSENT: the array is new
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from icechunk.errors import AlreadyExistsError, ErrorKind, InvalidInputError, NodeNotFoundError, SessionStateError
from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.tables import INLINE, NATIVE, VIRTUAL, ChunkRef, ChunkRefs, Move, NodeKind, NodeSnapshot, Snapshot
from icechunk.log.changes import Changes, NetChanges, move_order
from icechunk.log.columns import DELETED, normalized
from icechunk.log.events import (
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
from icechunk.log.hierarchy import Hierarchy, check_path, is_below, parent_of
from icechunk.log.layers import OPEN_ROWS, ArrayFold, inside
from icechunk.log.lookup import sort_last
from icechunk.log.zarr_metadata import ArrayMeta, GroupMeta, parse_node

__all__ = ["ABSENT", "IN_BASE", "Absent", "InBase", "Savepoint", "SessionLog"]


class _Place(Enum):
    ABSENT = "absent"
    IN_BASE = "in base"


Absent: TypeAlias = Literal[_Place.ABSENT]
InBase: TypeAlias = Literal[_Place.IN_BASE]
ABSENT: Final = _Place.ABSENT
"""There is no such chunk in this session's view."""
IN_BASE: Final = _Place.IN_BASE
"""The log says nothing about the chunk: look it up in the base's manifests of the node."""

_new_ref = tuple.__new__


@dataclass(frozen=True, slots=True)
class Savepoint:
    """A position of one log."""

    serial: int
    """Identifies the savepoint within its log."""
    position: int
    """Events before it."""


class SessionLog:
    """Events over a base snapshot, and their fold.

    Not safe for threads by itself: every method is one short critical section that its owner guards.

    Parameters
    ----------
    base
        What the session stands on.
    new_node_id
        Source of fresh ids.
    """

    def __init__(self, base: Snapshot, new_node_id: Callable[[], NodeId]) -> None:
        self._base = base
        self._new_node_id = new_node_id
        self._events: list[Event] = []
        self._savepoints: dict[int, int] = {}
        self._serial = 0
        self._reset()

    def _reset(self) -> None:
        self._tree = Hierarchy(self._base.nodes)
        self._arrays: dict[NodeId, ArrayFold] = {}

    # -- the folded view ---------------------------------------------------------------------------

    @property
    def base(self) -> Snapshot:
        """What the session stands on."""
        return self._base

    @property
    def is_empty(self) -> bool:
        """Whether the fold equals the base. Deleting a chunk counts as a change, even where there was none: the commit
        must not overtake another one that wrote it."""
        return not self._tree.overlay and not any(self._arrays.values())

    @property
    def events(self) -> tuple[Event, ...]:
        """Everything that happened, oldest first; open rows are sealed by asking."""
        self._seal_all()
        return tuple(self._events)

    def node(self, path: str) -> NodeSnapshot | None:
        """The group or array at this path, or None. Its manifests are those of the base."""
        return self._tree.get(path)

    def node_of(self, node_id: NodeId, hint: str = "/") -> NodeSnapshot | None:
        """The node with this id, wherever it stands; ``hint`` is tried first."""
        path = self._tree.path_of(node_id, hint)
        return None if path is None else self._tree.get(path)

    def children(self, path: str, *, implied: bool = False) -> list[str]:
        """Names of the groups and arrays directly below ``path``, ascending; with ``implied`` also names at which there
        is no node, but some below."""
        return self._tree.children(path, implied=implied)

    def nodes(self, under: str = "/") -> Iterator[NodeSnapshot]:
        """The node at ``under`` and everything below it, in ascending order of the path's bytes."""
        return iter(list(self._tree.subtree(under)))

    def chunk(self, node: NodeSnapshot, coords: tuple[int, ...]) -> ChunkRef | Absent | InBase:
        """Where a chunk is.

        Parameters
        ----------
        node
            An array, as `node` gave it.
        coords
            Chunk grid coordinates.

        Returns
        -------
        ChunkRef, `ABSENT` or `IN_BASE`
            `ABSENT` also for coordinates outside the grid.
        """
        fold = self._arrays.get(node.id)
        if fold is not None:
            if not _in_grid(coords, fold.grid):
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
            Ascending; none of them written.
        """
        fold = self._arrays.get(node.id)
        if fold is None:
            ndim = len(node.shape)
            return ChunkRefs.empty(ndim), np.empty((0, ndim), np.uint32)
        refs = self._flat(fold)
        visible = inside(refs.coords, fold.grid)
        written = visible & (refs.kind != DELETED)
        if written.all():
            return refs, refs.coords[:0]
        return refs.take(written), refs.coords[visible & ~written]

    @property
    def row_count(self) -> int:
        """Chunk rows of the log, of which some may hide others."""
        return sum(len(fold.rows) + sum(len(layer.refs) for layer in fold.layers) for fold in self._arrays.values())

    def touched_arrays(self) -> frozenset[NodeId]:
        """Ids of arrays with chunk rows of this log."""
        return frozenset(node_id for node_id, fold in self._arrays.items() if fold)

    def net_changes(self) -> NetChanges:
        """What the fold changed, by node."""
        before: dict[NodeId, NodeSnapshot] = {}
        after: dict[NodeId, NodeSnapshot] = {}
        for path, node in self._tree.overlay.items():
            old = self._tree.base(path)
            if old is not None:
                before[old.id] = old
            if node is not None:
                after[node.id] = node
        kept = [(before[i], after[i]) for i in before.keys() & after.keys()]
        chunks = {}
        for node_id, fold in self._arrays.items():
            if fold:
                path = self._path_of(node_id, fold.path)
                chunks[node_id] = (path, self._flat(fold).coords)
        return NetChanges(
            new=tuple(node for i, node in after.items() if i not in before),
            deleted=tuple(node for i, node in before.items() if i not in after),
            updated=tuple(new for old, new in kept if old.user_data != new.user_data),
            moved=tuple(
                sorted(
                    (Move(old.path, new.path, new.id, new.kind) for old, new in kept if old.path != new.path),
                    key=move_order,
                )
            ),
            chunks=chunks,
        )

    def changes(self) -> Changes:
        """What the fold changed, by path: the session's status."""
        return self.net_changes().summary()

    # -- commands ----------------------------------------------------------------------------------

    def set_metadata(self, path: str, user_data: bytes) -> None:
        """Create a group or array, or replace the metadata of the one that is there.

        Nothing happens if the document is byte for byte the current one. Groups above it need not exist.

        Raises
        ------
        InvalidInputError
            If the path or the document is refused (see `parse_node`).
        AlreadyExistsError
            If a group stands where an array shall, or the other way round: delete it first.
        """
        check_path(path)
        node = self._tree.get(path)
        if node is not None and node.user_data == user_data:
            return
        meta = parse_node(user_data, path)
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
        """Delete every node, the root too; nothing happens if there is none."""
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
        """Write a chunk whose bytes travel in the manifest.

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
        if not _in_grid(coords, fold.grid):
            raise _outside(node, coords, fold.grid)
        rows = fold.rows
        rows[coords] = _new_ref(ChunkRef, (INLINE, data, None, None, 0, n, None, None))
        if len(rows) >= OPEN_ROWS:
            self._events += fold.seal()

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
        if not _in_grid(coords, fold.grid):
            raise _outside(node, coords, fold.grid)
        rows = fold.rows
        rows[coords] = _new_ref(ChunkRef, (NATIVE, None, chunk_id, None, offset, length, None, None))
        if len(rows) >= OPEN_ROWS:
            self._events += fold.seal()

    def set_virtual(
        self,
        node: NodeSnapshot,
        coords: tuple[int, ...],
        location: str,
        offset: int,
        length: int,
        etag: str | None = None,
        last_modified: int | None = None,
    ) -> None:
        """Write a chunk that is a range of bytes of somebody else's object.

        Parameters
        ----------
        etag, last_modified
            What the object must still have, or not be newer than (seconds since the epoch), when it is read.

        Raises
        ------
        InvalidInputError
            ``invalid-chunk-index`` outside the grid, ``not-an-array``.
        NodeNotFoundError
            If the node is there no more.
        """
        fold = self._arrays.get(node.id) or self._fold_of(node)
        if not _in_grid(coords, fold.grid):
            raise _outside(node, coords, fold.grid)
        fold.rows[coords] = ChunkRef(VIRTUAL, None, None, location, offset, length, etag, last_modified)
        if len(fold.rows) >= OPEN_ROWS:
            self._events += fold.seal()

    def set_refs(self, node: NodeSnapshot, refs: ChunkRefs) -> None:
        """Write many chunks.

        Parameters
        ----------
        refs
            In any order; of several rows with the same coordinates the last counts. The columns belong to the log now.

        Raises
        ------
        InvalidInputError
            ``invalid-chunk-index`` if any of them is outside the grid, ``not-an-array``.
        NodeNotFoundError
            If the node is there no more.
        """
        fold = self._arrays.get(node.id) or self._fold_of(node)
        _check_all_inside(node, refs.coords, fold.grid)
        if len(refs):
            self._append(ChunksWritten(node_id=node.id, refs=normalized(refs)))

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
        if _in_grid(coords, fold.grid):
            fold.rows[coords] = None
            if len(fold.rows) >= OPEN_ROWS:
                self._events += fold.seal()

    def delete_chunks(self, node: NodeSnapshot, coords: npt.NDArray[np.uint32]) -> None:
        """Delete many chunks, whether they exist or not; those outside the grid are passed over.

        Parameters
        ----------
        coords
            uint32[n, ndim], in any order.

        Raises
        ------
        InvalidInputError
            ``invalid-chunk-index`` if the rank is another one, ``not-an-array``.
        NodeNotFoundError
            If the node is there no more.
        """
        fold = self._arrays.get(node.id) or self._fold_of(node)
        if coords.ndim != 2 or coords.shape[1] != len(fold.grid):
            raise _outside(node, coords.shape, fold.grid)
        coords = coords[inside(coords, fold.grid)]
        order = sort_last(coords)
        if len(coords):
            self._append(ChunksDeleted(node_id=node.id, coords=coords if order is None else coords[order]))

    # -- the life of the log -----------------------------------------------------------------------

    def savepoint(self) -> Savepoint:
        """Remember this position."""
        self._seal_all()
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
        """The changes after a savepoint, as a log over the nodes that there were at it.

        Its base has this log's base's id and manifests: it is for looking at changes, not for reading chunks.

        Raises
        ------
        SessionStateError
            As `rollback`.
        """
        self._require(savepoint)
        then = self.at(savepoint)
        nodes = {node.path: node for node in then.nodes()}
        return then.rebased(self._base.with_nodes(nodes), self.events[savepoint.position :])

    def at(self, savepoint: Savepoint) -> SessionLog:
        """A log of its own that stands where this one stood at a savepoint. Raises as `rollback`."""
        self._require(savepoint)
        return self.rebased(self._base, self.events[: savepoint.position])

    def discard(self) -> None:
        """Forget every event and savepoint."""
        self._savepoints.clear()
        self._refold(())

    def rebased(self, base: Snapshot, events: Iterable[Event] | None = None) -> SessionLog:
        """A new log with the same events on another base; this one stays as it is.

        Whether the two bases allow that is the conflict check's business, beforehand.

        Parameters
        ----------
        base
            What the new log stands on.
        events
            To take instead of this log's own.

        Raises
        ------
        NodeNotFoundError
            If an event names a node that the other base does not have.
        AlreadyExistsError
            If an event creates a node where the other base has one.
        """
        log = SessionLog(base, self._new_node_id)
        # Savepoints of this log must not pass for the new one's.
        log._serial = self._serial
        log._refold(self.events if events is None else events)
        return log

    def savepoint_at(self, position: int) -> Savepoint:
        """A savepoint after so many events; of a log that was read back, whose own savepoints did not travel."""
        savepoint = self.savepoint()
        if not 0 <= position <= savepoint.position:
            raise SessionStateError(f"no savepoint after {position} events: the log has {savepoint.position}")
        self._savepoints[savepoint.serial] = position
        return Savepoint(savepoint.serial, position)

    def replay(self, events: Iterable[Event]) -> None:
        """Append events of another log that started where this one stands.

        Raises
        ------
        NodeNotFoundError, AlreadyExistsError
            As `rebased`; the log is then as it was before.
        """
        self._seal_all()
        before = list(self._events)
        try:
            for event in events:
                self._append(event)
        except BaseException:
            self._refold(before)
            raise

    def to_bytes(self) -> bytes:
        """The log without its base, to be read back by `from_bytes`; savepoints are not included."""
        from icechunk.log.wire import encode_log

        return encode_log(self._base.id, self.events)

    @classmethod
    def from_bytes(cls, data: bytes, base: Snapshot, new_node_id: Callable[[], NodeId]) -> SessionLog:
        """Read a log back.

        Raises
        ------
        FormatError
            If the bytes are not a log's, or do not fold over this base.
        SessionStateError
            If the log stands on another base.
        """
        from icechunk.log.wire import decode_log

        return decode_log(data, base, new_node_id)

    # -- the fold ----------------------------------------------------------------------------------

    def _require(self, savepoint: Savepoint) -> None:
        if self._savepoints.get(savepoint.serial) != savepoint.position:
            raise SessionStateError(
                "cannot roll back: the savepoint belongs to another session, or was rolled back already"
            )

    def _refold(self, events: Iterable[Event]) -> None:
        self._events = []
        self._reset()
        for event in events:
            self._append(event)

    def _append(self, event: Event, meta: GroupMeta | ArrayMeta | None = None) -> None:
        """Fold an event, then keep it; ``meta`` is its document, if that was parsed already."""
        match event:
            case ChunksWritten() | ChunksDeleted():
                coords = event.refs.coords if isinstance(event, ChunksWritten) else event.coords
                fold = self._arrays.get(event.node_id) or self._fold_of_id(event.node_id)
                if coords.shape[1] != len(fold.grid):
                    raise InvalidInputError(
                        f"chunk coordinates of rank {coords.shape[1]} for an array of rank {len(fold.grid)}",
                        ErrorKind.INVALID_CHUNK_INDEX,
                    )
                self._events += fold.seal()
                if isinstance(event, ChunksWritten):
                    fold.push(event.refs)
                else:
                    fold.push_deleted(coords)
            case GroupCreated() | ArrayCreated():
                if self._tree.get(event.path) is not None:
                    raise AlreadyExistsError(f"cannot create {event.path}: there is a node already")
                kind = NodeKind.ARRAY if isinstance(event, ArrayCreated) else NodeKind.GROUP
                node = NodeSnapshot(id=event.node_id, path=event.path, kind=kind, user_data=event.user_data)
                self._tree.put(_described(node, event.user_data, meta or parse_node(event.user_data, event.path)))
            case MetadataReplaced():
                path = self._path_of(event.node_id, event.path)
                node = self._existing(path, "replace the metadata of")
                described = _described(node, event.user_data, meta or parse_node(event.user_data, path))
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
                    raise AlreadyExistsError(f"cannot move to {event.target}: there is a node already")
                self._tree.move(self._path_of(event.node_id, event.source), event.target)
        self._events.append(event)

    def _remove(self, path: str) -> None:
        for node in list(self._tree.subtree(path)):
            self._tree.remove(node.path)
            self._arrays.pop(node.id, None)

    def _path_of(self, node_id: NodeId, hint: str) -> str:
        path = self._tree.path_of(node_id, hint)
        if path is None:
            raise NodeNotFoundError(f"there is no node {hint} with the id {node_id.hex()} any more")
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
                raise InvalidInputError(f"{node.path} is not an array: it has no chunks", ErrorKind.NOT_AN_ARRAY)
            fold = self._arrays[node.id] = ArrayFold(node.id, now.path, _grid(now))
        return fold

    def _fold_of_id(self, node_id: NodeId) -> ArrayFold:
        return self._fold_of(self._existing(self._path_of(node_id, ""), "write chunks of"))

    def _flat(self, fold: ArrayFold) -> ChunkRefs:
        self._events += fold.seal()
        return fold.flat()

    def _seal_all(self) -> None:
        for fold in self._arrays.values():
            if fold.rows:
                self._events += fold.seal()


def _described(node: NodeSnapshot, user_data: bytes, meta: GroupMeta | ArrayMeta) -> NodeSnapshot:
    if isinstance(meta, GroupMeta):
        return replace(node, user_data=user_data)
    shape = meta.dimensions
    return replace(
        node,
        user_data=user_data,
        shape=shape,
        dimension_names=meta.dimension_names,
        manifests=node.manifests if len(shape) == len(node.shape) else (),
    )


def _grid(node: NodeSnapshot) -> tuple[int, ...]:
    return tuple(dimension.num_chunks for dimension in node.shape)


def _in_grid(coords: tuple[int, ...], grid: tuple[int, ...]) -> bool:
    if len(coords) != len(grid):
        return False
    # A plain loop: on the path of every chunk, a generator or a keyword would cost as much as the work itself.
    for c, n in zip(coords, grid):  # noqa: B905, SIM110
        if not 0 <= c < n:
            return False
    return True


def _check_all_inside(node: NodeSnapshot, coords: npt.NDArray[np.uint32], grid: tuple[int, ...]) -> None:
    if coords.ndim != 2 or coords.shape[1] != len(grid):
        raise _outside(node, coords.shape, grid)
    good = inside(coords, grid)
    if not good.all():
        raise _outside(node, coords[int(np.argmin(good))].tolist(), grid)


def _outside(node: NodeSnapshot, coords: object, grid: tuple[int, ...]) -> InvalidInputError:
    return InvalidInputError(
        f"cannot write chunk {coords} of the array {node.path}: it is outside the grid of {grid} chunks",
        ErrorKind.INVALID_CHUNK_INDEX,
    )


def _zero_length(node: NodeSnapshot, coords: tuple[int, ...]) -> InvalidInputError:
    return InvalidInputError(
        f"cannot write chunk {coords} of the array {node.path}: it has no bytes, and no chunk encodes to none",
        ErrorKind.ZERO_LENGTH_CHUNK,
    )


def _an(kind: NodeKind) -> str:
    return "an array" if kind == NodeKind.ARRAY else "a group"
