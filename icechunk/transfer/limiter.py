"""The bound on requests and bytes in flight: one for a repository on each event loop, for its reads and its writes.

Nobody waits inside for anything but the storage's answer, so the bound never blocks itself: a writer that waits for
memory, or a read that waits for its parts, holds no place. Of each kind who comes first goes first, nobody who fits
waits a turn, and where both kinds wait they go in by turns: a long queue of writes behind a slow line does not keep
out the reads that a commit needs.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import Final
from weakref import WeakKeyDictionary

__all__ = ["MAX_BYTES", "READ", "WRITE", "Gate", "Gates"]

MAX_BYTES: Final = 512 * 1024 * 1024
"""Bytes in flight at the most, of requests whose size is known before their answer, unless configured."""

READ: Final = 0
WRITE: Final = 1


class Gate:
    """Requests of one event loop, counted and weighed.

    Parameters
    ----------
    max_requests
        That many at once at the most.
    max_bytes
        Their sizes together at the most; one that is larger goes alone. None: no bound.
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
            `READ` or `WRITE`: whose queue to stand in.
        """
        if self.try_enter(size_bytes):
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[kind].append((size_bytes, place))
        try:
            await place
        except BaseException:
            if not place.cancelled():
                self.leave(size_bytes)  # it was let in at the moment of its cancellation
            else:
                self._admit_waiting()  # those behind it may be smaller
            raise

    def try_enter(self, size_bytes: int = 0) -> bool:
        """Take a place if nobody waits and one is free; then `leave` has to follow."""
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

    def __init__(self, max_requests: int, max_bytes: int | None = MAX_BYTES) -> None:
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
