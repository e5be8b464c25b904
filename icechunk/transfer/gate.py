"""The bound on requests and bytes in flight: who comes first goes first, and nobody who fits waits a turn."""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["Gate"]


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
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def requests(self) -> int:
        """Requests inside."""
        return self._requests

    @property
    def bytes(self) -> int:
        """Their sizes together."""
        return self._bytes

    async def enter(self, size_bytes: int = 0) -> None:
        """Wait for a place. After cancellation no place is held; otherwise `leave` has to follow."""
        if not self._waiting and self._fits(size_bytes):
            self._admit(size_bytes)
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size_bytes, place))
        try:
            await place
        except BaseException:
            if not place.cancelled():
                self.leave(size_bytes)  # it was let in at the moment of its cancellation
            else:
                self._admit_waiting()  # those behind it may be smaller
            raise

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
        while self._waiting:
            size_bytes, place = self._waiting[0]
            if not place.done():
                if not self._fits(size_bytes):
                    return
                self._admit(size_bytes)
                place.set_result(None)
            self._waiting.popleft()
