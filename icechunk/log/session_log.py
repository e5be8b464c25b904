"""The session log: a base snapshot, an append-only list of events, and their fold.

Theory
------
A session never changes its base; it appends events. What the session sees is the fold of the
events over the base, kept up to date with every event, so that a read never replays.

A command (`SessionLog.set_metadata`, `SessionLog.set_native`, …) checks its arguments against the
fold, then appends the event and folds it: a command that raises has changed nothing. Chunks do not
become events as they are written. They gather in their array's fold, single ones in its *open rows*,
and become few events when somebody asks for them: at a savepoint, or when the log is serialised,
forked or rebased. This is sound because chunk events of one array commute with all other events but
two: the creation of the array, which comes first anyway, and its deletion, which makes them void
(they are simply dropped then).

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

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from icechunk.errors import SessionStateError
from icechunk.format.ids import NodeId
from icechunk.format.tables import Snapshot
from icechunk.log.commands import Commands
from icechunk.log.events import Event
from icechunk.log.fold import ABSENT, IN_BASE, Absent, InBase

__all__ = ["ABSENT", "IN_BASE", "Absent", "InBase", "Savepoint", "SessionLog"]


@dataclass(frozen=True, slots=True)
class Savepoint:
    """A position of one log."""

    serial: int
    """Identifies the savepoint within its log."""
    position: int
    """Events before it."""


class SessionLog(Commands):
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
        super().__init__(base, new_node_id)
        self._savepoints: dict[int, int] = {}
        self._serial = 0

    def savepoint(self) -> Savepoint:
        """Remember this position."""
        self._tell_all()
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
        self._tell_all()
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

    def _require(self, savepoint: Savepoint) -> None:
        if self._savepoints.get(savepoint.serial) != savepoint.position:
            raise SessionStateError(
                "cannot roll back: the savepoint belongs to another session, or was rolled back already"
            )
