"""The fetch pool: bounded, shared reads of immutable objects, one pool for each loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from icechunk.storage.base import ByteRange, GetResult, Range
from icechunk.transfer.gate import Gate

__all__ = ["FetchPool"]

T = TypeVar("T")

MAX_BYTES = 512 * 1024 * 1024
"""Bytes in flight at the most, of requests whose size is known before their answer."""


class _Flight(Generic[T]):
    __slots__ = ("task", "waiters")

    def __init__(self, task: asyncio.Future[T]) -> None:
        self.task = task
        self.waiters = 0


class Gettable(Protocol):
    """What a pool reads from: a storage, or something else with its first verb."""

    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        """See `Storage.get`."""
        ...


class FetchPool:
    """Reads of a repository on one event loop.

    At most ``max_requests`` are in flight, with at most ``max_bytes``, and callers that want the same bytes at the
    same time share one request: it is cancelled only when the last of them is.
    """

    def __init__(self, storage: Gettable, max_requests: int, *, max_bytes: int = MAX_BYTES) -> None:
        self._storage = storage
        self._gate = Gate(max_requests, max_bytes)
        self._flights: dict[object, _Flight[Any]] = {}

    async def get(self, key: str, byte_range: ByteRange = None) -> bytes:
        """Bytes of an object, or of a range of it. Raises as `Storage.get` does."""
        return await self.share((key, byte_range), lambda: self._fetch(key, byte_range))

    async def share(self, key: object, work: Callable[[], Awaitable[T]]) -> T:
        """Join the work in flight under ``key``, or start it. Its result or error reaches everybody who joined."""
        flight = self._flights.get(key)
        if flight is None:
            flight = _Flight(asyncio.ensure_future(work()))
            self._flights[key] = flight
            flight.task.add_done_callback(partial(self._land, key, flight))
        flight.waiters += 1
        try:
            result: T = await asyncio.shield(flight.task)
            return result
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.task.done():
                # Nobody may join a flight that is being cancelled.
                self._forget(key, flight)
                flight.task.cancel()

    async def get_result(self, key: str, byte_range: ByteRange = None) -> GetResult:
        """The same as `get`, with what the store said of the object; not shared."""
        size = byte_range.end - byte_range.start if type(byte_range) is Range and byte_range.end is not None else 0
        await self._gate.enter(size)
        try:
            return await self._storage.get(key, byte_range)
        finally:
            self._gate.leave(size)

    def _land(self, key: object, flight: _Flight[Any], task: asyncio.Future[Any]) -> None:
        self._forget(key, flight)
        if not task.cancelled():
            # Marks it as seen: what fails while its last waiter is being cancelled is nobody's business.
            task.exception()

    def _forget(self, key: object, flight: _Flight[Any]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def _fetch(self, key: str, byte_range: ByteRange) -> bytes:
        return (await self.get_result(key, byte_range)).data
