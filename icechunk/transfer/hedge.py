"""Hedging: a request that takes longer than most is sent a second time, and the first answer counts.

The latencies that decide are those of recent requests of about the same size. So about one request in
``100 / (100 - percentile)`` is sent twice, and no more than that however slow everything becomes, since the latencies
that are compared with become slow as well.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TypeVar

__all__ = ["Latencies", "hedged"]

T = TypeVar("T")

_REMEMBERED = 128
_LEAST = 16
"""Latencies to have seen before anything is sent twice."""


class Latencies:
    """Seconds that recent requests took, by the magnitude of their sizes."""

    def __init__(self, percentile: int) -> None:
        self._percentile = percentile
        self._seen: dict[int, deque[float]] = {}

    def add(self, size_bytes: int, seconds: float) -> None:
        """Remember a request that was answered."""
        self._of(size_bytes).append(seconds)

    def patience_s(self, size_bytes: int) -> float | None:
        """How long to wait for an answer before asking again; None while too little is known."""
        seen = self._of(size_bytes)
        if len(seen) < _LEAST:
            return None
        ordered = sorted(seen)
        return ordered[min(len(ordered) - 1, len(ordered) * self._percentile // 100)]

    def _of(self, size_bytes: int) -> deque[float]:
        # 64 KiB and less take about as long as each other; above, in steps of four.
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
    """Cancel what still runs, and wait until it has put its connection away."""
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
