"""The bound on requests and bytes in flight: one for a repository on each event loop, for its reads and its writes.

A request holds a place only while it waits for the storage's answer, so the bound cannot deadlock: a writer that waits
for memory, or a read that waits for its parts, holds no place. Requests of one kind enter in the order of their
arrival, and a request that fits does not wait. If both kinds wait they enter alternately, so a long queue of writes on
a slow connection does not keep out the reads that a commit needs.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import Final
from weakref import WeakKeyDictionary

from icechunk.config.repository import DEFAULT_MAX_BYTES_IN_FLIGHT

__all__ = ["READ", "WRITE", "Gate", "Gates"]

READ: Final = 0
WRITE: Final = 1


class Gate:
    """Requests of one event loop, counted and weighed.

    Parameters
    ----------
    max_requests
        Largest number of requests at the same time.
    max_bytes
        Largest sum of their sizes; a request that is larger enters alone. None: no bound.
    """

    def __init__(self, max_requests: int, max_bytes: int | None = None) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._requests = 0
        self._bytes = 0
        self._waiting: tuple[deque[tuple[int, asyncio.Future[None]]], ...] = (deque(), deque())
        self._turn = READ

    @property
    def requests(self) -> int:
        """Requests inside."""
        return self._requests

    @property
    def bytes(self) -> int:
        """Their sizes together."""
        return self._bytes

    async def enter(self, size_bytes: int = 0, kind: int = READ) -> None:
        """Wait for a place. After cancellation no place is held; otherwise `leave` has to follow.

        Parameters
        ----------
        kind
            `READ` or `WRITE`: the queue to wait in.
        """
        if self.try_enter(size_bytes):
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[kind].append((size_bytes, place))
        try:
            await place
        except BaseException:
            if not place.cancelled():
                self.leave(size_bytes)  # it was admitted at the moment of its cancellation
            else:
                self._admit_waiting()  # those behind it may be smaller
            raise

    def try_enter(self, size_bytes: int = 0) -> bool:
        """Take a place if no request waits and a place is free; then `leave` has to follow."""
        if any(self._waiting) or not self._fits(size_bytes):
            return False
        self._admit(size_bytes)
        return True

    def leave(self, size_bytes: int = 0) -> None:
        """Give the place back, with the size it was entered with."""
        self._requests -= 1
        self._bytes -= size_bytes
        self._admit_waiting()

    def _fits(self, size_bytes: int) -> bool:
        if not self._requests:
            return True
        return self._requests < self._max_requests and (
            self._max_bytes is None or self._bytes + size_bytes <= self._max_bytes
        )

    def _admit(self, size_bytes: int) -> None:
        self._requests += 1
        self._bytes += size_bytes

    def _admit_waiting(self) -> None:
        while any(self._waiting):
            kind = self._turn if self._waiting[self._turn] else 1 - self._turn
            size_bytes, place = self._waiting[kind][0]
            if not place.done():
                if not self._fits(size_bytes):
                    return
                self._admit(size_bytes)
                place.set_result(None)
                self._turn = 1 - kind
            self._waiting[kind].popleft()


class Gates:
    """The gate of each loop, of one repository. Safe among threads; made at first use, gone with its loop.

    Parameters
    ----------
    max_requests, max_bytes
        As for `Gate`, in each loop.
    """

    def __init__(self, max_requests: int, max_bytes: int | None = DEFAULT_MAX_BYTES_IN_FLIGHT) -> None:
        self.max_requests = max_requests
        self.max_bytes = max_bytes
        self._gates: WeakKeyDictionary[asyncio.AbstractEventLoop, Gate] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def here(self) -> Gate:
        """The running loop's gate."""
        loop = asyncio.get_running_loop()
        gate = self._gates.get(loop)
        if gate is None:
            with self._lock:
                gate = self._gates[loop] = Gate(self.max_requests, self.max_bytes)
        return gate
