"""An event loop in which waiting takes no time: the clock jumps to whatever happens next."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from typing import Any, Final

__all__ = ["DAY_S", "START_US", "StuckError", "VirtualLoop"]

DAY_S: Final = 86_400.0
START_US: Final = 1_790_000_000_000_000
"""Virtual wall clock at the loop's time 0, µs since the Unix epoch."""
_MAX_HANDLES: Final = 400_000
"""Callbacks of one loop. A schedule needs some thousands; more means that something never ends."""


class StuckError(RuntimeError):
    """Nothing will ever happen any more, or the same happens again and again."""


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop with a virtual clock. It has no sockets, and runs what is meant for threads at once, in its own."""

    _ready: Any
    _scheduled: list[Any]

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._handles = 0
        self.interrupt: BaseException | None = None
        """Raised out of the loop before anything else runs; None: it goes on."""

    def time(self) -> float:
        return self._now_s

    def now_us(self) -> int:
        """Virtual wall clock, µs since the Unix epoch."""
        return START_US + int(self._now_s * 1e6)

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        # Threads would make the order of events depend on the machine.
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def _run_once(self) -> None:
        ready, scheduled = self._ready, self._scheduled
        if self.interrupt is not None:
            raise self.interrupt
        if not ready:
            while scheduled:
                timer = heapq.heappop(scheduled)
                timer._scheduled = False
                if not timer._cancelled:
                    self._now_s = max(self._now_s, timer._when)
                    ready.append(timer)
                    break
            else:
                raise StuckError("the simulation is stuck: everybody waits, and nothing will ever happen")
        count = len(ready)
        self._handles += count
        if self._handles > _MAX_HANDLES:
            raise StuckError(f"the simulation does not end: {_MAX_HANDLES} callbacks were run")
        for _ in range(count):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()

    def _process_events(self, event_list: list[Any]) -> None:
        """Nothing: there are no sockets."""

    def _write_to_self(self) -> None:
        """Nothing: no other thread wakes this loop."""
