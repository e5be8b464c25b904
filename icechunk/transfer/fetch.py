"""The fetch pool: bounded, shared reads of immutable objects, one pool for each loop.

Hedging: a request that takes much longer than recent ones of about the same size is sent a second time, and the first
answer counts. A budget, which answers earn, bounds the number of second requests, so that a store that becomes slow
does not get twice the requests. With a percentile, about one request in ``100 / (100 - percentile)`` is sent twice, and
not more if the whole store becomes slow, because the recent latencies become longer as well.

Sharing: callers that want the same bytes wait for one request. A request that has taken so long that it is probably
stuck is not joined: the next caller sends its own, and the callers that joined before get its answer too.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Generic, Protocol, TypeVar

from icechunk.errors import ErrorKind, InvalidInputError, StorageError
from icechunk.runtime.tasks import run_each
from icechunk.storage.port import ByteRange, GetResult, Octets, Range
from icechunk.storage.retry import note_repeats
from icechunk.transfer.limiter import Gate

__all__ = ["NEVER", "Budget", "FetchPool", "Latencies", "Splitting", "hedged"]

T = TypeVar("T")

NEVER: Final = 100
"""The percentile with which nothing is sent twice."""

_REMEMBERED: Final = 128
_LEAST: Final = 16
"""Number of latencies that must be known before they decide."""
_SAFETY: Final = 3.0
_LEAST_PATIENCE_S: Final = 1.0
_FIRST_PATIENCE_S: Final = 5.0
"""Shortest time after which a request counts as stuck, if latencies of its size are known, and if they are not."""
_HELD_UP_S: Final = 0.1
_SLOW_LINE_BYTES_PER_S: Final = 256 * 1024
_MOST_SPARE: Final = 8.0
_EARNED: Final = 0.05


class Latencies:
    """Seconds that recent requests took, by the magnitude of their sizes."""

    def __init__(self, percentile: int | None = None) -> None:
        self._percentile = percentile
        self._seen: dict[int, deque[float]] = {}

    def add(self, size_bytes: int | None, seconds: float) -> None:
        """Remember a request that was answered; None: its size was unknown when it was sent."""
        self._of(size_bytes).append(seconds)

    def stuck_s(self, size_bytes: int | None) -> float:
        """Seconds after which a request is probably stuck: three times the slowest of the recent ones."""
        seen = self._of(size_bytes)
        if size_bytes is None or len(seen) < _LEAST:
            # Objects of unknown size differ so much that the small ones say little about the next.
            return max(_FIRST_PATIENCE_S + (size_bytes or 0) / _SLOW_LINE_BYTES_PER_S, _SAFETY * max(seen, default=0.0))
        return max(_LEAST_PATIENCE_S, _SAFETY * max(seen))

    def patience_s(self, size_bytes: int | None) -> float:
        """How long to wait for an answer before asking again: the percentile, or `stuck_s` if that is shorter, too
        little is known, or there is no percentile."""
        seen = self._of(size_bytes)
        stuck_s = self.stuck_s(size_bytes)
        if self._percentile is None or len(seen) < _LEAST:
            return stuck_s
        ordered = sorted(seen)
        return min(stuck_s, ordered[min(len(ordered) - 1, len(ordered) * self._percentile // 100)])

    def _of(self, size_bytes: int | None) -> deque[float]:
        # All sizes up to 64 KiB take about the same time; above, there is one class for each factor of four.
        magnitude = -1 if size_bytes is None else max(0, size_bytes.bit_length() - 15) // 2
        return self._seen.setdefault(magnitude, deque(maxlen=_REMEMBERED))


class Budget:
    """Bounds repeated requests: some at first, and one more for every twenty answers, up to the same number."""

    def __init__(self) -> None:
        self._spare = _MOST_SPARE

    def earn(self) -> None:
        """Note an answer."""
        self._spare = min(_MOST_SPARE, self._spare + _EARNED)

    def try_spend(self) -> bool:
        """Take one repetition, if there is one."""
        if self._spare < 1:
            return False
        self._spare -= 1
        return True


async def hedged(
    start: Callable[[], asyncio.Future[T]],
    patience_s: float,
    start_again: Callable[[], asyncio.Future[T] | None],
) -> T:
    """The answer of a request, or of its repetition, whichever succeeds first; the other is cancelled and waited for.

    Parameters
    ----------
    start
        Starts the request, as a task.
    start_again
        Called once ``patience_s`` have passed without an answer: starts the second one, or returns None where there is
        no room for it.

    Raises
    ------
    Exception
        What the first request raises, where neither succeeds.
    """
    loop = asyncio.get_running_loop()
    place: asyncio.Future[T] = loop.create_future()
    tasks = [start()]
    timer: asyncio.TimerHandle

    def settle(task: asyncio.Future[T]) -> None:
        error = None if task.cancelled() else task.exception()
        if place.done():
            return
        if error is None and not task.cancelled():
            place.set_result(task.result())
        elif all(each.done() for each in tasks):
            error = None if tasks[0].cancelled() else tasks[0].exception()
            place.cancel() if error is None else place.set_exception(error)

    def wait(seconds: float) -> asyncio.TimerHandle:
        return loop.call_later(seconds, ask_again, loop.time() + seconds)

    def ask_again(due: float) -> None:
        nonlocal timer
        if loop.time() > due + _HELD_UP_S:
            # The loop did not run for a while: an answer may have come that nothing has looked at yet.
            timer = wait(_HELD_UP_S)
        elif not place.done() and (second := start_again()) is not None:
            tasks.append(second)
            second.add_done_callback(settle)

    tasks[0].add_done_callback(settle)
    timer = wait(patience_s)
    try:
        return await place
    finally:
        timer.cancel()
        if place.done() and not place.cancelled():
            place.exception()  # marks it as seen, for a caller that was cancelled at the same moment
        if len(tasks) > 1 or not tasks[0].done():
            await _end(set(tasks))


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
    """Work that several callers wait for."""

    __slots__ = ("join_s", "older", "place", "since", "task", "waiters")

    def __init__(
        self, task: asyncio.Future[T], place: asyncio.Future[T], since: float, join_s: float, older: _Flight[T] | None
    ) -> None:
        self.task = task
        self.place = place
        """Resolves to the result of the task, or of a flight that started after it and landed first."""
        self.waiters = 0
        self.since = since
        self.join_s = join_s
        """Callers may join for so long after ``since``, seconds."""
        self.older = older
        """The probably stuck flight that it was started beside."""


def _size_of(byte_range: ByteRange) -> int | None:
    return byte_range.end - byte_range.start if isinstance(byte_range, Range) and byte_range.end is not None else None


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
        A request that takes longer than this percentage of recent ones is sent again; None: only one that is probably
        stuck; 100: none.
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
        self._hedges = hedge_percentile != NEVER
        self._budgeted = hedge_percentile is None
        self._latencies = Latencies(hedge_percentile if self._hedges else None)
        self._budget = Budget()
        self._flights: dict[object, _Flight[Any]] = {}

    async def get(self, key: str, byte_range: ByteRange = None) -> bytes:
        """Bytes of an object, or of a range of it. Raises as `Storage.get` does."""
        return bytes(await self.view(key, byte_range))

    async def view(self, key: str, byte_range: ByteRange = None) -> Octets:
        """As `get`, without a copy if the bytes were received as a view."""
        join_s = self._latencies.stuck_s(_size_of(byte_range))
        return await self.share((key, byte_range), lambda: self._fetch(key, byte_range), join_s)

    def stuck_s(self, size_bytes: int) -> float:
        """Seconds after which a request of that size is probably stuck."""
        return self._latencies.stuck_s(size_bytes)

    def is_shared(self, key: object) -> bool:
        """Whether work under ``key`` is in flight."""
        return key in self._flights

    async def share(self, key: object, work: Callable[[], Awaitable[T]], join_s: float = math.inf) -> T:
        """Join the work in flight under ``key``, or start it. All callers that joined get its result or error.

        Parameters
        ----------
        join_s
            Work that began so many seconds ago is probably stuck: it is started anew. Its callers then get the result
            that comes first. Each start doubles the time, so that slow work is not started again and again.
        """
        flight = self._flights.get(key)
        loop = asyncio.get_running_loop()
        now = loop.time()
        if flight is None or now - flight.since >= flight.join_s:
            if flight is not None:
                join_s = max(join_s, 2 * flight.join_s)
            flight = _Flight(asyncio.ensure_future(work()), loop.create_future(), now, join_s, flight)
            self._flights[key] = flight
            flight.task.add_done_callback(partial(self._land, key, flight))
        flight.waiters += 1
        try:
            result: T = await asyncio.shield(flight.place)
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
            return await self._request(key, byte_range, None)
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
                "a proxy or gateway between here and the store changes answers",
                ErrorKind.OBJECT_STORE,
            )
        return GetResult(
            body=data, size=head.size, version=head.version, modified_us=head.modified_us, date_us=head.date_us
        )

    async def _request(self, key: str, byte_range: ByteRange, size: int | None) -> GetResult:
        weight = size or 0
        await self._gate.enter(weight)
        clock, latencies = asyncio.get_running_loop().time, self._latencies
        started = clock()
        if not self._hedges:
            try:
                result = await self._storage.get(key, byte_range)
            finally:
                self._gate.leave(weight)
        else:
            result = await hedged(
                partial(self._start, key, byte_range, weight),
                latencies.patience_s(size),
                partial(self._start_again, key, byte_range, weight),
            )
        # Of both together: a request that was given up for its slowness has to count as slow.
        latencies.add(size, clock() - started)
        self._budget.earn()
        return result

    def _start(self, key: str, byte_range: ByteRange, weight: int) -> asyncio.Future[GetResult]:
        """A request whose place is taken already; given back also where it is cancelled before its first step."""
        task = asyncio.ensure_future(self._storage.get(key, byte_range))
        task.add_done_callback(lambda _: self._gate.leave(weight))
        return task

    def _start_again(self, key: str, byte_range: ByteRange, weight: int) -> asyncio.Future[GetResult] | None:
        if not self._gate.try_enter(weight):
            return None
        if self._budgeted and not self._budget.try_spend():
            self._gate.leave(weight)
            return None
        note_repeats(hedged=1)
        return self._start(key, byte_range, weight)

    def _land(self, key: object, flight: _Flight[Any], task: asyncio.Future[Any]) -> None:
        self._forget(key, flight)
        if flight.place.done():
            if not task.cancelled():
                task.exception()  # marks it as seen
        elif task.cancelled():
            flight.place.cancel()
        elif (error := task.exception()) is not None:
            flight.place.set_exception(error)
            # Marks the error as seen: if the last waiter is being cancelled, no caller is left to get it.
            flight.place.exception()
        else:
            result = task.result()
            flight.place.set_result(result)
            older = flight.older
            while older is not None:
                if not older.place.done():
                    older.place.set_result(result)
                    older.task.cancel()
                older = older.older

    def _forget(self, key: object, flight: _Flight[Any]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def _fetch(self, key: str, byte_range: ByteRange) -> Octets:
        return (await self.get_result(key, byte_range)).body
