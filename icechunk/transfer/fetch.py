"""The fetch pool: bounded, shared reads of immutable objects, one pool for each loop.

Hedging: a request that takes longer than most is sent a second time, and the first answer counts. "Longer" is relative
to the latencies of recent requests of about the same size. So about one request in ``100 / (100 - percentile)`` is sent
twice, and not more if the whole store becomes slow, because the recent latencies become longer as well.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from icechunk.errors import ErrorKind, InvalidInputError, StorageError
from icechunk.runtime.tasks import run_each
from icechunk.storage.port import ByteRange, GetResult, Octets, Range
from icechunk.transfer.limiter import Gate

__all__ = ["FetchPool", "Latencies", "Splitting", "hedged"]

T = TypeVar("T")

_REMEMBERED = 128
_LEAST = 16
"""Number of latencies that must be known before any request is sent twice."""


class Latencies:
    """Seconds that recent requests took, by the magnitude of their sizes."""

    def __init__(self, percentile: int) -> None:
        self._percentile = percentile
        self._seen: dict[int, deque[float]] = {}

    def add(self, size_bytes: int, seconds: float) -> None:
        """Remember a request that was answered."""
        self._of(size_bytes).append(seconds)

    def patience_s(self, size_bytes: int) -> float | None:
        """The time to wait for an answer before asking again, s; None while too few answers are known."""
        seen = self._of(size_bytes)
        if len(seen) < _LEAST:
            return None
        ordered = sorted(seen)
        return ordered[min(len(ordered) - 1, len(ordered) * self._percentile // 100)]

    def _of(self, size_bytes: int) -> deque[float]:
        # All sizes up to 64 KiB take about the same time; above, there is one class for each factor of four.
        magnitude = max(0, size_bytes.bit_length() - 15) // 2
        return self._seen.setdefault(magnitude, deque(maxlen=_REMEMBERED))


async def hedged(
    start: Callable[[], asyncio.Future[T]],
    patience_s: float | None,
    start_again: Callable[[], asyncio.Future[T] | None],
) -> T:
    """The answer of a request, or of its repetition, whichever succeeds first; the other is cancelled and waited for.

    Parameters
    ----------
    start
        Starts the request, as a task.
    start_again
        Called once ``patience_s`` (None: never) have passed without an answer: starts the second one, or returns
        None where there is no room for it.

    Raises
    ------
    Exception
        What the first request raises, where neither succeeds.
    """
    first = start()
    tasks = {first}
    try:
        await asyncio.wait(tasks, timeout=patience_s)
        if not first.done() and (second := start_again()) is not None:
            tasks.add(second)
        waiting = tasks
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if not task.cancelled() and task.exception() is None:
                    return task.result()
        return first.result()
    finally:
        await _end(tasks)


async def _end(tasks: set[asyncio.Future[T]]) -> None:
    """Cancel the tasks that still run, and wait until they have released their connections."""
    running = {task for task in tasks if not task.done()}
    for task in running:
        task.cancel()
    cancelled = False
    while running:
        try:
            _, running = await asyncio.wait(running)
        except asyncio.CancelledError:
            cancelled = True
            running = {task for task in running if not task.done()}
    for task in tasks:
        if not task.cancelled():
            task.exception()  # marks it as seen
    if cancelled:
        raise asyncio.CancelledError


@dataclass(frozen=True, slots=True, kw_only=True)
class Splitting:
    """Splitting of a long range into several requests."""

    part_bytes: int
    """Ranges longer than this are fetched in parts of about this size, all equal."""
    max_requests: int
    """Largest number of parts of one range in flight; while that many requests are in flight, nothing is split."""

    def parts(self, start: int, end: int) -> list[tuple[int, int]]:
        """Ranges that make up the bytes from ``start`` to ``end``.

        >>> Splitting(part_bytes=10, max_requests=4).parts(5, 30)
        [(5, 14), (14, 23), (23, 30)]
        """
        size = end - start
        count = max(1, -(-size // self.part_bytes))
        each = max(1, -(-size // count))
        return [(first, min(first + each, end)) for first in range(start, end, each)]


class _Flight(Generic[T]):
    __slots__ = ("task", "waiters")

    def __init__(self, task: asyncio.Future[T]) -> None:
        self.task = task
        self.waiters = 0


class Gettable(Protocol):
    """The source that a pool reads from: a storage, or another object with its method `get`."""

    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        """See `Storage.get`."""
        ...


class FetchPool:
    """Reads of a repository on one event loop.

    Callers that want the same bytes at the same time share one request: it is cancelled only when the last of them
    is.

    Parameters
    ----------
    storage
        Read from.
    gate
        Bounds these requests, together with those of all other users of the gate.
    splitting
        How long ranges are split; None: they are not.
    hedge_percentile
        A request that takes longer than this percentage of recent ones is sent again; None: never.
    """

    def __init__(
        self,
        storage: Gettable,
        gate: Gate,
        *,
        splitting: Splitting | None = None,
        hedge_percentile: int | None = None,
    ) -> None:
        self._storage = storage
        self._gate = gate
        self._splitting = splitting
        # Of all ranges that are being read in parts; most have not entered the gate yet.
        self._parts = 0
        self._latencies = None if hedge_percentile is None else Latencies(hedge_percentile)
        self._flights: dict[object, _Flight[Any]] = {}

    async def get(self, key: str, byte_range: ByteRange = None) -> bytes:
        """Bytes of an object, or of a range of it. Raises as `Storage.get` does."""
        return bytes(await self.view(key, byte_range))

    async def view(self, key: str, byte_range: ByteRange = None) -> Octets:
        """As `get`, without a copy if the bytes were received as a view."""
        return await self.share((key, byte_range), lambda: self._fetch(key, byte_range))

    async def share(self, key: object, work: Callable[[], Awaitable[T]]) -> T:
        """Join the work in flight under ``key``, or start it. All callers that joined get its result or error."""
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
                # No caller may join a flight that is being cancelled.
                self._forget(key, flight)
                flight.task.cancel()

    async def get_result(self, key: str, byte_range: ByteRange = None) -> GetResult:
        """As `get`, with the object's version, size and time; the request is not shared.

        Raises
        ------
        StorageError
            Also where an object that is read in parts changed meanwhile.
        """
        if type(byte_range) is not Range or byte_range.end is None:
            return await self._request(key, byte_range, 0)
        size = byte_range.end - byte_range.start
        if self._splitting is None or size <= self._splitting.part_bytes or self._busy(self._splitting):
            return await self._request(key, byte_range, size)
        return await self._in_parts(key, byte_range.start, byte_range.end, self._splitting)

    def _busy(self, splitting: Splitting) -> bool:
        # Enough connections carry something already; parts would only cost requests.
        return max(self._gate.requests, self._parts) >= splitting.max_requests

    async def _in_parts(self, key: str, start: int, end: int, splitting: Splitting) -> GetResult:
        found: dict[int, GetResult] = {}

        async def fetch(part: tuple[int, int]) -> None:
            try:
                found[part[0]] = await self._request(key, Range(*part), part[1] - part[0])
            except InvalidInputError as error:
                # Only the first part says that the object ends before it.
                if part[0] == start or error.kind != ErrorKind.INVALID_BYTE_RANGE:
                    raise

        planned = splitting.parts(start, end)
        self._parts += len(planned)
        try:
            await run_each(fetch, planned, limit=splitting.max_requests)
        finally:
            self._parts -= len(planned)
        parts = [found[first] for first in sorted(found)]
        head = parts[0]
        if any((part.version, part.size) != (head.version, head.size) for part in parts):
            raise StorageError(
                f"cannot read {key!r}: the object changed while it was read in {len(parts)} parts; read it again",
                ErrorKind.OBJECT_STORE,
            )
        data = b"".join([part.body for part in parts])
        if len(data) != min(end, head.size) - start:
            raise StorageError(
                f"cannot read {key!r}: {len(data)} of {min(end, head.size) - start} bytes came in {len(parts)} parts; "
                "something between here and the store changes answers",
                ErrorKind.OBJECT_STORE,
            )
        return GetResult(
            body=data, size=head.size, version=head.version, modified_us=head.modified_us, date_us=head.date_us
        )

    async def _request(self, key: str, byte_range: ByteRange, size: int) -> GetResult:
        await self._gate.enter(size)
        if self._latencies is None:
            try:
                return await self._storage.get(key, byte_range)
            finally:
                self._gate.leave(size)
        clock, latencies = asyncio.get_running_loop().time, self._latencies
        started = clock()
        patience_s = latencies.patience_s(size)
        result = await hedged(
            partial(self._start, key, byte_range, size),
            patience_s,
            lambda: self._start(key, byte_range, size) if self._gate.try_enter(size) else None,
        )
        # Of both together: what was given up for its slowness has to count as slow.
        latencies.add(size, clock() - started)
        return result

    def _start(self, key: str, byte_range: ByteRange, size: int) -> asyncio.Future[GetResult]:
        """A request whose place is taken already; given back also where it is cancelled before its first step."""
        task = asyncio.ensure_future(self._storage.get(key, byte_range))
        task.add_done_callback(lambda _: self._gate.leave(size))
        return task

    def _land(self, key: object, flight: _Flight[Any], task: asyncio.Future[Any]) -> None:
        self._forget(key, flight)
        if not task.cancelled():
            # Marks the error as seen: if the last waiter is being cancelled, no caller is left to get it.
            task.exception()

    def _forget(self, key: object, flight: _Flight[Any]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def _fetch(self, key: str, byte_range: ByteRange) -> Octets:
        return (await self.get_result(key, byte_range)).body
