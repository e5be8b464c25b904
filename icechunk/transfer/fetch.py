"""The fetch pool: bounded, shared reads of immutable objects, one pool for each loop.

Hedging: a request that takes much longer than recent ones is sent a second time, and the first answer counts. If the
storage reports when bytes come (`Watch`), that means that nothing came for much longer than in recent answers of this
service; else, that the whole request takes much longer than recent ones of about the same size. A budget, which answers
earn, bounds the number of second requests, so that a store that becomes slow does not get twice the requests. With a
percentile, about one request in ``100 / (100 - percentile)`` is sent twice, and not more if the whole store becomes
slow, because the recent latencies become longer as well.

Sharing: callers that want the same bytes wait for one request; see `icechunk.transfer.flights`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol, TypeVar

from icechunk.errors import ErrorKind, InvalidInputError, StorageError
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.tasks import run_each
from icechunk.storage.patience import SLOW_LINE_BYTES_PER_S, Recent, Watch, watching
from icechunk.storage.port import ByteRange, GetResult, Octets, Range, Version
from icechunk.storage.retry import note_repeats
from icechunk.transfer.disk_cache import ObjectsOnDisk
from icechunk.transfer.flights import LEAST_PATIENCE_S, Alarm, Flights
from icechunk.transfer.limiter import Gate

__all__ = ["NEVER", "Budget", "FetchPool", "Latencies", "Splitting", "hedged"]

T = TypeVar("T")

NEVER: Final = 100
"""The percentile with which nothing is sent twice."""

_LEAST_PATIENCE_S: Final = 1.0
_FIRST_PATIENCE_S: Final = 5.0
"""Shortest silence after which a request is sent again if the storage does not report when bytes come, and too few
requests of its size are known."""
_MOST_SPARE: Final = 8.0
_EARNED: Final = 0.05


class Latencies:
    """Seconds that recent requests took, by the magnitude of their sizes."""

    def __init__(self) -> None:
        self._recent: dict[int, Recent] = {}

    def of(self, size_bytes: int | None) -> Recent:
        """Recent answers of about that size; None: of those whose size was unknown when they were sent."""
        # All sizes up to 64 KiB take about the same time; above, there is one class for each factor of four.
        magnitude = -1 if size_bytes is None else max(0, size_bytes.bit_length() - 15) // 2
        return self._recent.setdefault(magnitude, Recent())

    def stuck_s(self, size_bytes: int | None, least_s: float, first_s: float) -> float:
        """Seconds after which a request is probably stuck, by what whole requests took.

        Parameters
        ----------
        least_s
            At the least, if enough requests of that size are known.
        first_s
            If they are not: at the least so much, and the time that the bytes would take on a slow line.
        """
        recent = self.of(size_bytes)
        if size_bytes is None or not recent.is_enough:
            # Objects of unknown size differ so much that the small ones say little about the next.
            return max(first_s + (size_bytes or 0) / SLOW_LINE_BYTES_PER_S, recent.stuck_s(least_s))
        return recent.stuck_s(least_s)


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
    due: Callable[[float], float],
    start_again: Callable[[], asyncio.Future[T] | None],
) -> T:
    """The answer of a request, or of its repetition, whichever succeeds first; the other is cancelled and waited for.

    Parameters
    ----------
    start
        Starts the request, as a task.
    due
        Time of the loop at which it is to be repeated; see `Alarm`.
    start_again
        Called once at that time: starts the second one, or returns None where there is no room for it.

    Raises
    ------
    Exception
        What the first request raises, where neither succeeds.
    """
    place: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    tasks = [start()]

    def settle(task: asyncio.Future[T]) -> None:
        error = None if task.cancelled() else task.exception()
        if place.done():
            return
        if error is None and not task.cancelled():
            place.set_result(task.result())
        elif all(each.done() for each in tasks):
            error = None if tasks[0].cancelled() else tasks[0].exception()
            place.cancel() if error is None else place.set_exception(error)

    def repeat() -> bool:
        if not place.done() and (second := start_again()) is not None:
            tasks.append(second)
            second.add_done_callback(settle)
        return False

    tasks[0].add_done_callback(settle)
    alarm = Alarm(due, repeat)
    try:
        return await place
    finally:
        alarm.cancel()
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
    disk
        Where ranges are looked for before they are requested, and kept afterwards; None: nowhere.
    """

    def __init__(
        self,
        storage: Gettable,
        gate: Gate,
        *,
        splitting: Splitting | None = None,
        hedge_percentile: int | None = None,
        disk: ObjectsOnDisk | None = None,
    ) -> None:
        self._storage = storage
        self._disk = disk
        self._gate = gate
        self._splitting = splitting
        # Of all ranges that are being read in parts; most have not entered the gate yet.
        self._parts = 0
        self._hedges = hedge_percentile != NEVER
        self._percentile = hedge_percentile if self._hedges else None
        self._latencies = Latencies()
        self._budget = Budget()
        self.flights: Flights = Flights(self._may_repeat)
        """The requests in flight, those of the block reader on top of this pool included."""

    async def get(self, key: str, byte_range: ByteRange = None) -> bytes:
        """Bytes of an object, or of a range of it. Raises as `Storage.get` does."""
        return bytes(await self.view(key, byte_range))

    async def view(self, key: str, byte_range: ByteRange = None) -> Octets:
        """As `get`, without a copy if the bytes were received as a view."""
        join_s = partial(self.join_s, _size_of(byte_range))
        return await self.flights.share((key, byte_range), lambda: self._fetch(key, byte_range), join_s)

    def join_s(self, size_bytes: int | None) -> float:
        """See `Flight`: for a request of that size."""
        return self._latencies.stuck_s(size_bytes, LEAST_PATIENCE_S, 2 * LEAST_PATIENCE_S)

    def _may_repeat(self) -> bool:
        if not self._hedges:
            return False
        return self._percentile is not None or self._budget.try_spend()

    async def get_result(self, key: str, byte_range: ByteRange = None) -> GetResult:
        """As `get`, with the object's size; the request is not shared. Version and times are told by the store only.

        Raises
        ------
        StorageError
            Also where an object that is read in parts changed meanwhile.
        """
        disk = self._disk
        if disk is None or not disk.takes(key):
            return await self._fetched(key, byte_range)
        found = await disk.read(key, byte_range)
        if found is not None:
            return GetResult(body=found.body, size=found.size, version=Version(""), modified_us=0, date_us=None)
        result = await self._fetched(key, byte_range)
        disk.keep(key, byte_range, result.size, result.body)
        return result

    async def _fetched(self, key: str, byte_range: ByteRange) -> GetResult:
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
        watch = Watch(watching.get())
        watch.note(started)
        if not self._hedges:
            try:
                result = await self._watched(watch, key, byte_range)
            finally:
                self._gate.leave(weight)
        else:
            first_s = latencies.stuck_s(size, _LEAST_PATIENCE_S, _FIRST_PATIENCE_S)
            recent = latencies.of(size)
            late = math.inf
            if self._percentile is not None and recent.is_enough:
                late = started + recent.percentile_s(self._percentile)

            def due(now: float) -> float:
                assert watch.at is not None
                silent_s = first_s if watch.recent is None else watch.recent.stuck_s(_LEAST_PATIENCE_S)
                return min(late, watch.at + silent_s)

            result = await hedged(
                partial(self._start, watch, key, byte_range, weight),
                due,
                partial(self._start_again, watch, key, byte_range, weight),
            )
        # Of both together: a request that was given up for its slowness has to count as slow.
        latencies.of(size).add(clock() - started)
        self._budget.earn()
        return result

    async def _watched(self, watch: Watch, key: str, byte_range: ByteRange) -> GetResult:
        token = watching.set(watch)
        try:
            return await self._storage.get(key, byte_range)
        finally:
            watching.reset(token)

    def _start(self, watch: Watch, key: str, byte_range: ByteRange, weight: int) -> asyncio.Future[GetResult]:
        """A request whose place is taken already; given back also where it is cancelled before its first step."""
        task = asyncio.ensure_future(self._watched(watch, key, byte_range))
        task.add_done_callback(lambda _: self._gate.leave(weight))
        return task

    def _start_again(
        self, watch: Watch, key: str, byte_range: ByteRange, weight: int
    ) -> asyncio.Future[GetResult] | None:
        if not self._gate.try_enter(weight):
            return None
        if not self._may_repeat():
            self._gate.leave(weight)
            return None
        note_repeats(hedged=1)
        return self._start(watch, key, byte_range, weight)

    async def _fetch(self, key: str, byte_range: ByteRange) -> Octets:
        return (await self.get_result(key, byte_range)).body
