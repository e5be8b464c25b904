"""Room for bytes that are on their way to storage: one bound for all writable sessions of a repository.

Bytes are reserved before they are taken, first come, first served, by whichever session. What a session holds is
counted apart, so that the room of one that was dropped without a commit comes back by itself.
"""

from __future__ import annotations

import concurrent.futures
import threading
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

__all__ = ["Holding", "PutMemory", "Room"]


@dataclass(slots=True, eq=False)
class Holding:
    """What one session has of the room."""

    bytes: int = 0


@dataclass(slots=True, eq=False)
class Room:
    """Somebody who waits for room."""

    size: int
    holding: Holding
    owner: Holder
    woken: concurrent.futures.Future[bool] = field(default_factory=concurrent.futures.Future)
    """True: the room is reserved. False: something happened that the waiter should look at."""


class Holder(Protocol):
    """Whoever reserves room: the put pool of a session."""

    @property
    def has_news(self) -> bool:
        """Whether an upload failed that its session has not been told of."""
        ...

    @property
    def is_still(self) -> bool:
        """Whether none of its bytes is being uploaded."""
        ...


class PutMemory:
    """Bytes of one repository that are not durable yet, in all loops and threads.

    Whoever changes anything holds ``lock``; nothing here waits.

    Parameters
    ----------
    max_bytes
        At the most; a single object that is larger is let in alone.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.lock = threading.Lock()
        self.waiting: deque[Room] = deque()
        self._bytes = 0
        self._holders: weakref.WeakSet[Holder] = weakref.WeakSet()
        # Finalisers may run anywhere, also where the lock is held: they only leave a note.
        self._dropped: deque[Holding] = deque()

    @property
    def bytes(self) -> int:
        """Bytes reserved."""
        return self._bytes

    def join(self, holder: Holder) -> Holding:
        """Count a session's bytes from now on, and for as long as ``holder`` lives."""
        holding = Holding()
        with self.lock:
            # Sessions that write nothing large never ask for room, where the notes are read otherwise.
            self._collect()
            self._holders.add(holder)
        weakref.finalize(holder, self._dropped.append, holding).atexit = False
        return holding

    def holders(self) -> list[Holder]:
        """Everybody who may hold bytes."""
        with self.lock:
            return list(self._holders)

    def fits(self, size_bytes: int) -> bool:
        """Under the lock: whether so many more bytes may be reserved now."""
        self._collect()
        return not self._bytes or self._bytes + size_bytes <= self.max_bytes

    def add(self, holding: Holding, size_bytes: int) -> None:
        """Under the lock: count so many bytes more, or with a negative number less."""
        holding.bytes += size_bytes
        self._bytes += size_bytes

    def is_still(self) -> bool:
        """Under the lock: whether nothing is being uploaded that could make room."""
        return all(holder.is_still for holder in list(self._holders))

    def let_in(self) -> None:
        """Under the lock: reserve room for those who come next, and call the first if it has to help itself."""
        self.admit()
        if self.waiting and not self.waiting[0].woken.done() and (self.waiting[0].owner.has_news or self.is_still()):
            self.waiting[0].woken.set_result(False)

    def admit(self) -> None:
        """Under the lock: reserve room for those who come next."""
        while self.waiting and self.fits(self.waiting[0].size):
            room = self.waiting.popleft()
            self.add(room.holding, room.size)
            if room.woken.done():
                room.woken = concurrent.futures.Future()
            room.woken.set_result(True)

    def _collect(self) -> None:
        while self._dropped:
            holding = self._dropped.popleft()
            self.add(holding, -holding.bytes)
