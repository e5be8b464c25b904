"""One process's knowledge of the segments of a session that it writes; see `icechunk.log.session.segment`."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from dataclasses import field
from typing import NamedTuple

from icechunk.errors import ErrorKind, SessionEndedError
from icechunk.format.ids import ObjectId, encode_id
from icechunk.log.session.events import Event
from icechunk.log.session.segment import SegmentHead, SegmentKind, Slot, events_of
from icechunk.runtime.late_dataclass import dataclass

__all__ = ["Persisted", "Turn", "Written", "ended_error"]


class Turn:
    """Lets one caller at a time through, of all loops and threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: concurrent.futures.Future[None] | None = None

    async def __aenter__(self) -> None:
        while True:
            with self._lock:
                waiting = self._holder
                if waiting is None:
                    self._holder = concurrent.futures.Future()
                    # So that a waiter that is cancelled does not cancel it.
                    self._holder.set_running_or_notify_cancel()
                    return
            await asyncio.wrap_future(waiting)

    async def __aexit__(self, *_: object) -> None:
        with self._lock:
            done, self._holder = self._holder, None
        assert done is not None
        done.set_result(None)


class Written(NamedTuple):
    """The contents of a segment."""

    base: ObjectId
    keep: int
    new: tuple[Event, ...]
    events: tuple[Event, ...]
    """All that it and those before it make."""


@dataclass(slots=True, kw_only=True, eq=False)
class Persisted:
    """The segments of a session, or of a fork that joined one by its id. Changed only during its `turn`."""

    session: ObjectId
    worker: ObjectId | None = None
    """The fork; None: the session itself."""
    joined_at: int = 0
    """Number of the session's segment after which a fork's own events come; 0 for a session."""
    created_us: int = 0
    lease_us: int = 0
    last: int = 0
    """Number of the newest segment."""
    events: tuple[Event, ...] = ()
    """Events in the segments."""
    attempts: tuple[ObjectId, ...] = ()
    """Snapshots that were tried to commit."""
    claims: tuple[int, ...] = ()
    """Numbers of segments by which processes took the session over; they outlast its end."""
    parts: dict[int, tuple[ObjectId, int, tuple[Event, ...]]] = field(default_factory=dict)
    """Base of each segment, the number of events that it keeps, and its new ones: the beginning of forks."""
    earlier_bases: tuple[ObjectId, ...] = ()
    """Bases of earlier segments, oldest first, each once; the newest segment's may be among them."""
    tries: dict[bytes, Written] = field(default_factory=dict)
    """Contents of the next segment whose PUT had no certain answer, by nonce."""
    collected: dict[ObjectId, tuple[int, tuple[Event, ...]]] = field(default_factory=dict)
    """Number of the newest segment of each fork that was read, and the fork's events up to there."""
    ended: SessionEndedError | None = None
    """The error because of which nothing can be written any more; else None."""
    seen: int = 0
    """Number of the last of the session's segments that are known not to end a fork; 0 for a session."""
    turn: Turn = field(default_factory=Turn)

    @property
    def next_slot(self) -> Slot:
        """The slot of the next segment."""
        return Slot(self.session, self.worker, self.last + 1)

    @property
    def slots(self) -> list[Slot]:
        """The slots in which segments were written, or may have been."""
        return [Slot(self.session, self.worker, n) for n in range(1, self.last + 1 + bool(self.tries))]

    def inherited_at(self, number: int) -> tuple[ObjectId, tuple[Event, ...]] | None:
        """The base and all events as of a segment; None where there is no such segment."""
        if number not in self.parts:
            return None
        events = events_of((self.parts[n][1], self.parts[n][2]) for n in range(1, number + 1))
        return self.parts[number][0], events

    def advance(self, nonce: bytes) -> None:
        """The segment with this nonce has the next slot."""
        written = self.tries[nonce]
        self.tries.clear()
        self.last += 1
        self.events = written.events
        self.parts[self.last] = written.base, written.keep, written.new
        if written.base not in self.earlier_bases:
            self.earlier_bases += (written.base,)


def ended_error(session: ObjectId, head: SegmentHead) -> SessionEndedError:
    """The error for a session whose newest segment is ``head``, which this process did not write."""
    id = encode_id(session)
    match head.kind:
        case SegmentKind.COMMITTED:
            snapshot = None if head.snapshot is None else encode_id(head.snapshot)
            return SessionEndedError(
                f"session {id} was committed, as snapshot {snapshot}; open a new session on the branch",
                ErrorKind.SESSION_COMMITTED,
                snapshot,
            )
        case SegmentKind.ABANDONED:
            return SessionEndedError(
                f"session {id} was abandoned; open a new session on the branch", ErrorKind.SESSION_ABANDONED
            )
        case SegmentKind.EXPIRED:
            return SessionEndedError(
                f"session {id} has expired: nothing was written for longer than its lease, and a collection took its "
                "chunks; repeat the work in a new session, with a longer lease",
                ErrorKind.SESSION_EXPIRED,
            )
    return SessionEndedError(
        f"session {id} is continued by another process, which has resumed it; nothing was written from here",
        ErrorKind.SESSION_FENCED,
    )
