"""Number, pauses and deadlines of the tries of one operation, and the bound on requests that a service imposes.

The bound is learned from refusals, on one event loop. There is none until the service asks to slow down (503, 429,
``SlowDown``). Then it is half of the requests in flight, and it is halved again for each refusal of a request that was
sent under the new bound; refusals of requests that were under way already do not count. Answers raise the bound by one
for each round of it, and after many good rounds by one for each answer, until it is lifted. Waiting for a turn is not
counted as a try, so a storm of refusals costs time, and not requests.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from dataclasses import replace
from typing import Final

from icechunk.config import StorageRetriesSettings, StorageSettings, StorageTimeoutSettings
from icechunk.config.storage import (
    DEFAULT_CONNECT_TIMEOUT_MS,
    DEFAULT_INITIAL_BACKOFF_MS,
    DEFAULT_MAX_BACKOFF_MS,
    DEFAULT_MAX_TRIES,
)
from icechunk.runtime.clock import Sources
from icechunk.runtime.late_dataclass import dataclass
from icechunk.storage.port import Sender

__all__ = [
    "Limits",
    "Pace",
    "Repeats",
    "Tries",
    "limits_of",
    "note_repeats",
    "repeats_so_far",
]

_LONGEST_SILENCE_S: Final = 60
_FIRST_CONTACT_TRIES: Final = 4
"""Tries for a service that never answered: more likely a wrong address than a bad day."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Tries and timeouts of one storage's settings."""

    max_tries: int
    initial_backoff_s: float
    max_backoff_s: float
    connect_s: float
    read_s: float
    """Limit for the next byte of an answer."""
    attempt_s: float | None
    """Limit of one try; None: in proportion to the body's size."""
    operation_s: float | None
    """Limit of all tries together; None: no limit."""
    patience: float = 1.0
    """Multiple of the time of `icechunk.storage.patience.Patience` to wait while nothing moves; infinite for the last
    try."""
    sender: Sender | None = None
    """Nothing is tried again once it is told; None: no matter."""

    @property
    def are_over(self) -> bool:
        """Whether there must be no other try, since the sender is told."""
        return self.sender is not None and self.sender.is_told


def limits_of(settings: StorageSettings | None, stream_timeout_s: int | None = None) -> Limits:
    """The limits that settings and options describe; official defaults where they give none."""
    settings = settings or StorageSettings()
    retries = settings.retries or StorageRetriesSettings()
    timeouts = settings.timeouts or StorageTimeoutSettings()

    def seconds(value_ms: int | None, default_ms: int) -> float:
        return (default_ms if value_ms is None else value_ms) / 1000

    return Limits(
        max_tries=DEFAULT_MAX_TRIES if retries.max_tries is None else retries.max_tries,
        initial_backoff_s=seconds(retries.initial_backoff_ms, DEFAULT_INITIAL_BACKOFF_MS),
        max_backoff_s=seconds(retries.max_backoff_ms, DEFAULT_MAX_BACKOFF_MS),
        connect_s=seconds(timeouts.connect_timeout_ms, DEFAULT_CONNECT_TIMEOUT_MS),
        # 0 means no limit in the official library; a limit there has to be.
        read_s=seconds(timeouts.read_timeout_ms, 1000 * (stream_timeout_s or _LONGEST_SILENCE_S)),
        attempt_s=None
        if timeouts.operation_attempt_timeout_ms is None
        else timeouts.operation_attempt_timeout_ms / 1e3,
        operation_s=None if timeouts.operation_timeout_ms is None else timeouts.operation_timeout_ms / 1e3,
    )


class Tries:
    """The tries of one operation: how many there were, whether there is another, and how long it may take.

    Parameters
    ----------
    limits
        Of the storage.
    sources
        Clock, pauses, and the chance in them.
    """

    def __init__(self, limits: Limits, sources: Sources) -> None:
        self.count: int = 1
        """Tries so far, with the one that is being made."""
        self._limits = limits
        self._sources = sources
        self._began_us = sources.elapsed_us()

    def __str__(self) -> str:
        """The end of a message about them: `` (3 tries)``, empty for a single one."""
        return f" ({self.count} tries)" if self.count > 1 else ""

    @property
    def limits(self) -> Limits:
        """Limits of the next try, which ends when the time of the operation is up."""
        limits = self._limits
        if self.count > 1 or limits.max_tries == 1:
            # A request that takes long by itself has to get the time at some try.
            last = self.count >= limits.max_tries
            limits = replace(limits, patience=math.inf if last else 2.0 ** (self.count - 1))
        left_s = self._left_s
        if left_s is None or (limits.attempt_s is not None and limits.attempt_s <= left_s):
            return limits
        return replace(limits, attempt_s=max(left_s, 0.001))

    def pause_s(self, *, asked_s: float = 0.0, contacted: bool = True) -> float | None:
        """The pause before the next try, with full jitter; None if the tries or the time are used up.

        Parameters
        ----------
        asked_s
            What the service asks for; comes on top, within the longest pause.
        contacted
            Whether the service has ever answered.
        """
        limits = self._limits
        most = limits.max_tries if contacted else min(limits.max_tries, _FIRST_CONTACT_TRIES)
        if self.count >= most or limits.are_over:
            return None
        pause_s = min(limits.max_backoff_s, limits.initial_backoff_s * 2.0 ** (self.count - 1))
        pause_s = pause_s * self._sources.fraction() + min(limits.max_backoff_s, asked_s)
        left_s = self._left_s
        return None if left_s is not None and pause_s >= left_s else pause_s

    async def again(self, *, contacted: bool = True) -> bool:
        """Pause, and return True; False where the tries or the time are used up."""
        pause_s = self.pause_s(contacted=contacted)
        if pause_s is None:
            return False
        return await self.after(pause_s)

    async def after(self, pause_s: float) -> bool:
        """Wait, and count the next try; False where there may be none any more."""
        await self._sources.sleep(pause_s)
        if self._limits.are_over:
            return False
        self.count += 1
        return True

    @property
    def _left_s(self) -> float | None:
        if self._limits.operation_s is None:
            return None
        spent_s = (self._sources.elapsed_us() - self._began_us) / 1e6
        return self._limits.operation_s - spent_s


_UNBOUNDED: Final = 512
_CALM_ROUNDS: Final = 8


class Pace:
    """Requests in flight to one service."""

    def __init__(self) -> None:
        self._limit: float | None = None
        self._in_flight = 0
        self._epoch = 0
        self._calm = 0.0
        """Rounds of good answers since the last refusal that counted."""
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def limit(self) -> int | None:
        """Requests that may be in flight; None: as many as there are."""
        return None if self._limit is None else int(self._limit)

    @property
    def in_flight(self) -> int:
        """Requests sent and not answered yet."""
        return self._in_flight

    async def enter(self) -> int:
        """Wait for a turn. Returns the argument for `leave`; after cancellation `leave` must not be called."""
        if self._limit is not None and (self._waiting or self._in_flight >= int(self._limit)):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except BaseException:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                elif not turn.cancelled():
                    self._in_flight -= 1
                    self._call()
                raise
        else:
            self._in_flight += 1
        return self._epoch

    def leave(self, epoch: int, refused: bool | None) -> None:
        """The request has ended.

        Parameters
        ----------
        refused
            True: the service asked to slow down. False: it answered. None: neither.
        """
        if refused:
            if epoch == self._epoch:
                self._limit = max(1.0, self._in_flight / 2)
                self._epoch += 1
                self._calm = 0.0
        elif self._limit is not None and refused is False:
            self._calm += 1 / self._limit
            self._limit += 1 if self._calm > _CALM_ROUNDS else 1 / self._limit
            if self._limit >= _UNBOUNDED:
                self._limit = None
        self._in_flight -= 1
        if self._waiting:
            self._call()

    def _call(self) -> None:
        while self._waiting and (self._limit is None or self._in_flight < int(self._limit)):
            turn = self._waiting.popleft()
            if not turn.done():
                self._in_flight += 1
                turn.set_result(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """Numbers of the requests that this process sent again because an answer was late, for load tests and diagnosis.

    They are totals since the process began, of all storages, loops and threads.
    """

    hedged: int = 0
    """Reads that were sent a second time while the first still ran."""
    abandoned: int = 0
    """Requests, of any kind, that were given up because nothing came for much longer than usual."""


_repeats_lock = threading.Lock()
_repeats = Repeats()


def note_repeats(*, hedged: int = 0, abandoned: int = 0) -> None:
    """Add to the numbers of repeated requests. Safe in all threads."""
    global _repeats
    with _repeats_lock:
        _repeats = replace(_repeats, hedged=_repeats.hedged + hedged, abandoned=_repeats.abandoned + abandoned)


def repeats_so_far() -> Repeats:
    """Numbers of all repeated requests that were noted so far."""
    return _repeats
