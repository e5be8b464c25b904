"""Time limits of answers, learned from the recent answers of one service.

`Recent` is the one estimate: a request that takes three times as long as the slowest of the recent ones is probably
stuck. It decides three things, each with a lower bound of its own:

- when other readers stop to join the request (`icechunk.transfer.flights`): 0.25 s;
- when a read is sent a second time beside the first (`icechunk.transfer.fetch`): 1 s;
- when a try is given up, its connection closed, and the next try made (`Patience`): 2.5 s.

While few answers are known, the bounds are twice as long. The time to connect counts as an answer.

`Watch` tells the transfer above what the storage sees of a request: when it was sent, when bytes came, and how long
this service usually takes. A large answer that comes slowly is thus not taken for a stuck one.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable
from contextvars import ContextVar
from typing import Final, NamedTuple, TypeVar

from icechunk.storage.retry import Limits, note_repeats

__all__ = ["SLOW_LINE_BYTES_PER_S", "Patience", "Recent", "Waiting", "Watch", "watching"]

T = TypeVar("T")

_REMEMBERED: Final = 128
_ENOUGH: Final = 16
"""Number of answers that must be known before they decide alone."""
_SAFETY: Final = 3.0
SLOW_LINE_BYTES_PER_S: Final = 256 * 1024
"""Assumed for a body until the rate of enough of them is known."""


class Recent:
    """Seconds that recent answers took."""

    __slots__ = ("_seconds",)

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)

    def add(self, seconds: float) -> None:
        """Remember an answer."""
        self._seconds.append(seconds)

    @property
    def is_enough(self) -> bool:
        """Whether enough answers are known to decide alone."""
        return len(self._seconds) >= _ENOUGH

    def stuck_s(self, least_s: float) -> float:
        """Seconds after which a request is probably stuck: three times the slowest of the recent ones.

        Parameters
        ----------
        least_s
            Lower bound; twice that while few answers are known.
        """
        return max(least_s if self.is_enough else 2 * least_s, _SAFETY * max(self._seconds, default=0.0))

    def percentile_s(self, percentile: int) -> float:
        """The time within which ``percentile`` % of the recent answers came; at least one answer must be known."""
        ordered = sorted(self._seconds)
        return ordered[min(len(ordered) - 1, len(ordered) * percentile // 100)]


class Watch:
    """The progress of one request, or of several that one caller waits for.

    Parameters
    ----------
    outer
        The watch of the caller, which notes the same.
    """

    __slots__ = ("_outer", "at", "recent")

    def __init__(self, outer: Watch | None = None) -> None:
        self._outer = outer
        self.at: float | None = None
        """Time of the loop when a request was sent or bytes came last; None: all wait for their turn."""
        self.recent: Recent | None = None
        """Silences of this service in recent answers; None: the storage does not report when bytes come."""

    def note(self, now: float, recent: Recent | None = None) -> None:
        """A request was sent, or bytes of its answer came."""
        self.at = now
        self.recent = recent or self.recent
        if self._outer is not None:
            self._outer.note(now, recent)


watching: ContextVar[Watch | None] = ContextVar("watching", default=None)
"""The watch of the request that the running task makes; a storage that sees its bytes come notes it there."""


_LEAST_PATIENCE_S: Final = 2.5
_MOST_DOUBLINGS: Final = 5


class Waiting(NamedTuple):
    """Time limits of one request, seconds."""

    still_s: float
    """Limit for the next byte of an answer, or for the peer to take more of the body."""
    body_s: float
    """Time added for the first byte: the body needs it, and the peer need not tell that it receives the body."""
    epoch: int
    uploading: int
    """Bytes of all bodies under way when it began."""


class Patience:
    """The time to wait while nothing moves before a try is given up, at one service.

    A connection that went silent (a router forgot it, the server behind it is gone) costs that time, and not the
    longest time that a server may be silent. A try that was given up may also mean that the service has become slow, so
    the next tries wait twice as long, until one is answered. Uploads that are under way together share the line, so the
    time for one depends on the bytes of all.
    """

    def __init__(self) -> None:
        self.recent: Recent = Recent()
        """The longest silence in each recent answer; the time that a connection took to open counts as one."""
        self._rates: deque[float] = deque(maxlen=_REMEMBERED)
        self._uploading = 0
        # One for all loops, where the connections are.
        self._lock = threading.Lock()
        self._doublings = 0
        self._epoch = 0

    async def within(self, answer: Awaitable[T], limits: Limits, body_bytes: int = 0) -> T:
        """An answer that comes as a whole; it is cancelled, and `TimeoutError` raised, when it is probably stuck."""
        clock = asyncio.get_running_loop().time
        waiting, began = self.begin(body_bytes), clock()
        still_s = (waiting.still_s + waiting.body_s) * limits.patience
        try:
            async with asyncio.timeout(still_s if still_s < limits.read_s else None) as limit:
                result = await answer
        except TimeoutError as error:
            if not limit.expired():
                raise
            self.missed(waiting)
            note_repeats(abandoned=1)
            raise TimeoutError(f"no answer for {still_s:g} s") from error
        finally:
            self.end(body_bytes)
        took_s = clock() - began
        self.answered(waiting, 0.0 if body_bytes else took_s, took_s)
        return result

    def connected(self, took_s: float) -> None:
        """A connection was opened: the first thing that is known of a service."""
        self.recent.add(took_s)

    def begin(self, body_bytes: int = 0) -> Waiting:
        """Note a request that is sent now; `end` has to follow. ``body_bytes``: of a large body, else 0."""
        with self._lock:
            self._uploading += body_bytes
        factor = 2.0**self._doublings
        still_s = self.recent.stuck_s(_LEAST_PATIENCE_S) * factor
        if not body_bytes:
            return Waiting(still_s, 0.0, self._epoch, 0)
        rate = min(self._rates) / _SAFETY if len(self._rates) >= _ENOUGH else SLOW_LINE_BYTES_PER_S
        return Waiting(still_s, self._uploading / rate * factor, self._epoch, self._uploading)

    def end(self, body_bytes: int = 0) -> None:
        """The request is over, in whatever way."""
        with self._lock:
            self._uploading -= body_bytes

    def answered(self, waiting: Waiting, waited_s: float, took_s: float) -> None:
        """An answer came.

        Parameters
        ----------
        waited_s
            The longest time in which nothing moved once the request was sent.
        took_s
            From the beginning of the request to the first byte of the answer.
        """
        self.recent.add(waited_s)
        if waiting.uploading:
            self._rates.append(waiting.uploading / max(took_s, 1e-3))
        self._doublings = 0

    def missed(self, waiting: Waiting) -> None:
        """The request was given up. Of those that were under way together the first counts."""
        if waiting.epoch == self._epoch:
            self._epoch += 1
            self._doublings = min(_MOST_DOUBLINGS, self._doublings + 1)
