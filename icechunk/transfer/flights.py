"""The requests in flight on one event loop, and the readers that wait for them.

Readers that want the same bytes join one flight, which is cancelled when the last of them is. The next reader launches
a flight of its own beside one that may be stuck:

- one that has been silent for much longer than recent answers were;
- one that a reader left before its end, as the user who interrupted that reader, or a time limit, judged it stuck.

A reader that joined a flight launches its own too once the flight has been silent for so long, if repeating is allowed.
The flight that lands first serves every reader that wants its bytes, also the readers of other flights. So no reader
waits for a stuck request of another one.

An interrupt (Ctrl-C) of zarr's synchronous interface reaches neither the reader nor its flight: zarr lets the read go
on in its own loop. Silence is then the only sign.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import field
from functools import partial
from typing import Any, Final, Generic, TypeVar

from icechunk.runtime.late_dataclass import dataclass
from icechunk.storage.patience import Watch, watching
from icechunk.storage.retry import note_repeats

__all__ = ["LEAST_PATIENCE_S", "Alarm", "Flight", "Flights", "Reader"]

T = TypeVar("T")

LEAST_PATIENCE_S: Final = 0.25
"""Shortest silence of a request after which no reader joins it."""
_LOOK_S: Final = 0.5
_HELD_UP_S: Final = 0.1


@dataclass(slots=True, eq=False)
class Reader(Generic[T]):
    """A caller that waits for the byte at ``start``, and takes what comes with it up to ``end``."""

    start: int
    """First byte that it wants, counted from the object's beginning."""
    end: float
    """End of the bytes that it takes, exclusive; infinite: up to the object's end."""
    place: asyncio.Future[tuple[int, T]]
    """Resolves to the start and the result of the flight that serves it."""
    flights: list[Flight[T]] = field(default_factory=list)
    """The flights that may serve it, the newest last."""


@dataclass(slots=True, eq=False)
class Flight(Generic[T]):
    """Work that several readers wait for."""

    start: int
    end: float
    """End of its bytes, exclusive; infinite: all of an object."""
    join_s: Callable[[], float] | None
    """Seconds of silence after which it is not joined, if its storage does not report when bytes come; None: it is
    always joined."""
    ended: Callable[[Flight[T], T | None], None] | None
    """Called once when it leaves the table, before its readers are served; the result is None if it failed or was
    cancelled."""
    least_s: float = 0.0
    """Lower bound of `patience_s`, seconds."""
    watch: Watch = field(default_factory=Watch)
    readers: dict[Reader[T], None] = field(default_factory=dict)
    """Readers in the order in which they joined, which is the order in which they are woken: reads in order stay in
    order."""
    is_left: bool = False
    """Whether a reader was cancelled while it waited."""
    task: asyncio.Task[T] | None = None

    def covers(self, start: int) -> bool:
        """Whether it brings that byte."""
        return self.start <= start < self.end

    def patience_s(self) -> float:
        """Seconds of silence after which it is not joined."""
        if self.join_s is None:
            return math.inf
        recent = self.watch.recent
        return max(self.least_s, self.join_s() if recent is None else recent.stuck_s(LEAST_PATIENCE_S))

    def stuck_at(self, now: float) -> float:
        """Time of the loop from which on it counts as stuck if nothing moves; never, while it waits for its turn."""
        return (now if self.watch.at is None else self.watch.at) + self.patience_s()

    def join(self, reader: Reader[T]) -> None:
        """Let a reader wait for it."""
        self.readers[reader] = None
        reader.flights.append(self)


class Flights:
    """All flights of one event loop, by the object or the work that they bring.

    Parameters
    ----------
    may_repeat
        Whether a reader may launch a flight beside one that is probably stuck; may count what it allows.
    """

    def __init__(self, may_repeat: Callable[[], bool]) -> None:
        self._may_repeat = may_repeat
        self._by_key: dict[Hashable, list[Flight[Any]]] = {}

    def of(self, key: Hashable) -> list[Flight[Any]]:
        """The flights under ``key``, the oldest first."""
        return self._by_key.get(key, [])

    def launch(
        self,
        key: Hashable,
        work: Callable[[], Awaitable[T]],
        join_s: Callable[[], float] | None,
        *,
        start: int = 0,
        end: float = math.inf,
        ended: Callable[[Flight[T], T | None], None] | None = None,
    ) -> Flight[T]:
        """Start a flight.

        Each one beside others that bring some of the same bytes is joined for twice as long as they are: work that is
        only slow is not started again and again.
        """
        flight = Flight(start, end, join_s, ended)
        beside = self._by_key.setdefault(key, [])
        flight.least_s = 2 * max((f.patience_s() for f in beside if f.start < end and start < f.end), default=0.0)
        beside.append(flight)
        flight.task = asyncio.get_running_loop().create_task(_watched(work, flight.watch))
        flight.task.add_done_callback(partial(self._land, key, flight))
        return flight

    def try_join(self, key: Hashable, reader: Reader[T]) -> bool:
        """Let a reader wait for a flight that brings its first byte and is not stuck; False if there is none."""
        flights = self._by_key.get(key)
        if not flights:
            return False
        now = asyncio.get_running_loop().time()
        for flight in flights:
            joined = flight.join_s is None or (not flight.is_left and now < flight.stuck_at(now))
            if flight.covers(reader.start) and joined:
                flight.join(reader)
                return True
        return False

    async def share(
        self, key: Hashable, work: Callable[[], Awaitable[T]], join_s: Callable[[], float] | None = None
    ) -> T:
        """Join the work in flight under ``key``, or start it. All callers that joined get its result or error."""
        reader: Reader[T] = Reader(0, math.inf, asyncio.get_running_loop().create_future())
        launch = partial(self.launch, key, work, join_s)
        if self.try_join(key, reader):
            return (await self.wait(key, reader, None if join_s is None else launch))[1]
        launch().join(reader)
        return (await self.wait(key, reader))[1]

    async def wait(
        self, key: Hashable, reader: Reader[T], again: Callable[[], Flight[T]] | None = None
    ) -> tuple[int, T]:
        """The first byte and the result of a flight for a reader. Raises the error of the flight.

        Parameters
        ----------
        again
            Launches a flight of the reader's own, once the flights that it joined are probably stuck. None for a
            reader that launched its flight: the fetch pool repeats that request.
        """

        def launch_own() -> bool:
            if not reader.place.done() and self._may_repeat():
                note_repeats(hedged=1)
                assert again is not None
                again().join(reader)
            return True

        def due(now: float) -> float:
            return reader.flights[-1].stuck_at(now) if reader.flights else math.inf

        alarm = None if again is None else Alarm(due, launch_own)
        try:
            return await reader.place
        except asyncio.CancelledError:
            if reader.place.done() and not reader.place.cancelled():
                reader.place.exception()  # marks it as seen
            self._leave(key, reader, cancelled=True)
            raise
        finally:
            if alarm is not None:
                alarm.cancel()

    def _leave(self, key: Hashable, reader: Reader[Any], *, cancelled: bool = False) -> None:
        flights, reader.flights = reader.flights, []
        for flight in flights:
            flight.readers.pop(reader, None)
            flight.is_left = flight.is_left or cancelled
            if not flight.readers and self._forget(key, flight, None) and flight.task is not None:
                flight.task.cancel()

    def _forget(self, key: Hashable, flight: Flight[T], result: T | None) -> bool:
        """Remove a flight that is over, so that no reader joins it; False if it was removed before."""
        flights = self._by_key.get(key, [])
        if flight not in flights:
            return False
        flights.remove(flight)
        if not flights:
            del self._by_key[key]
        if flight.ended is not None:
            flight.ended(flight, result)
        return True

    def _land(self, key: Hashable, flight: Flight[T], task: asyncio.Task[T]) -> None:
        # Reading the exception marks it as seen: one that no reader waits for is not reported.
        error = None if task.cancelled() else task.exception()
        if task.cancelled() or error is not None:
            self._forget(key, flight, None)
            for reader in flight.readers:
                reader.flights.remove(flight)
                # Others may still bring it.
                if not reader.flights and not reader.place.done():
                    reader.place.cancel() if error is None else reader.place.set_exception(error)
            return
        result = task.result()
        self._forget(key, flight, result)
        served = [*flight.readers]
        for other in self.of(key):
            served += [reader for reader in other.readers if flight.covers(reader.start)]
        for reader in served:
            if not reader.place.done():
                reader.place.set_result((flight.start, result))
            self._leave(key, reader)


async def _watched(work: Callable[[], Awaitable[T]], watch: Watch) -> T:
    watching.set(watch)
    return await work()


class Alarm:
    """Acts at a time that may still move, in both directions.

    Parameters
    ----------
    due
        Returns the time of the loop to act at; its argument is the time now.
    act
        Called then; returns whether to go on watching.
    """

    __slots__ = ("_act", "_due", "_loop", "_timer")

    def __init__(self, due: Callable[[float], float], act: Callable[[], bool]) -> None:
        self._due = due
        self._act = act
        self._loop = asyncio.get_running_loop()
        now = self._loop.time()
        self._arm(now, due(now))

    def cancel(self) -> None:
        """Do not act any more."""
        self._timer.cancel()

    def _arm(self, now: float, due: float) -> None:
        at = min(due, now + _LOOK_S)
        self._timer = self._loop.call_at(at, self._look, at)

    def _look(self, at: float) -> None:
        now = self._loop.time()
        if now > at + _HELD_UP_S:
            # The loop did not run for a while: an answer may have come that nothing has looked at yet.
            self._arm(now, now + _HELD_UP_S)
            return
        due = self._due(now)
        if due > now:
            self._arm(now, due)
        elif self._act():
            self._arm(now, now + _LOOK_S)
