"""An event loop in which waiting takes no time: the clock jumps to whatever happens next."""

from __future__ import annotations

import asyncio
import heapq
import threading
from collections.abc import Callable
from contextvars import Context
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
    """An event loop with a virtual clock. It has no sockets, and runs what is meant for threads at once, in its own.

    What is called at the same time is called in the order in which it was asked for.
    """

    _ready: Any
    _stopping: bool

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._timers: list[tuple[float, int, asyncio.TimerHandle | asyncio.Future[None]]] = []
        self._asked = 0

    def time(self) -> float:
        return self._now_s

    def now_us(self) -> int:
        """Virtual wall clock, µs since the Unix epoch."""
        return START_US + int(self._now_s * 1e6)

    def after(self, seconds: float) -> asyncio.Future[None]:
        """A future that is done then: what `asyncio.sleep` waits for, at a third of the cost."""
        future: asyncio.Future[None] = asyncio.Future(loop=self)
        self._asked += 1
        heapq.heappush(self._timers, (self._now_s + seconds, self._asked, future))
        return future

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._asked += 1
        heapq.heappush(self._timers, (when, self._asked, timer))
        return timer

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

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

    def run_forever(self) -> None:
        self._thread_id = threading.get_ident()
        asyncio._set_running_loop(self)
        try:
            self._run_until_stopped()
        finally:
            self._stopping = False
            self._thread_id = None  # type: ignore[assignment]
            asyncio._set_running_loop(None)

    def _run_until_stopped(self) -> None:
        ready, timers = self._ready, self._timers
        handles = 0
        while not self._stopping:
            if not ready:
                self._jump(timers)
            handles += 1
            if handles > _MAX_HANDLES:
                raise StuckError(f"the simulation does not end: {_MAX_HANDLES} callbacks were run")
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()

    def _jump(self, timers: list[tuple[float, int, asyncio.TimerHandle | asyncio.Future[None]]]) -> None:
        """Let time pass until something is ready."""
        while timers:
            when, _, timer = heapq.heappop(timers)
            if when > self._now_s:
                self._now_s = when
            if isinstance(timer, asyncio.TimerHandle):
                if not timer.cancelled():
                    self._ready.append(timer)
                    return
            elif not timer.done():
                timer.set_result(None)
                if self._ready:
                    return
        raise StuckError("the simulation is stuck: everybody waits, and nothing will ever happen")

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Nothing: it is found cancelled when its time comes."""

    def _process_events(self, event_list: list[Any]) -> None:
        """Nothing: there are no sockets."""

    def _write_to_self(self) -> None:
        """Nothing: no other thread wakes this loop."""
