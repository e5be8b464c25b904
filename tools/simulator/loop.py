"""An event loop in which waiting takes no time: the clock jumps to whatever happens next."""

from __future__ import annotations

import asyncio
import heapq
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context, copy_context
from functools import partial
from types import FrameType
from typing import Any, Final

from icechunk.runtime.clock import Sources

__all__ = ["DAY_S", "START_US", "StuckError", "VirtualLoop"]

DAY_S: Final = 86_400.0
START_US: Final = 1_790_000_000_000_000
"""Virtual wall clock at the loop's time 0, µs since the Unix epoch."""
_MAX_CALLS: Final = 400_000
"""Callbacks of one loop. A schedule needs some thousands; more means that something never ends."""


class StuckError(RuntimeError):
    """Nothing will ever happen any more, or the same happens again and again."""


class _OutOfTimeError(BaseException):
    """Raised in a callback that never returns. No ``except Exception`` of the code under test stops it."""


class _Call(partial[Any]):
    """A callback that is due: what asyncio calls a handle, without what a simulation never asks of it.

    Errors are raised, not logged: a callback of a simulation that fails is a fault of the simulator or the engine.
    """

    # Made and called some hundred times in a schedule, both in C: it has no constructor of its own, and no flag.

    def cancel(self) -> None:
        with suppress(ValueError):
            asyncio.get_running_loop()._ready.remove(self)  # type: ignore[attr-defined]


class _TimedCall:
    """A callback that will be due."""

    __slots__ = ("_call", "_when")

    def __init__(self, call: Callable[[], Any], when: float) -> None:
        self._call: Callable[[], Any] | None = call
        self._when = when

    def cancel(self) -> None:
        self._call = None

    def cancelled(self) -> bool:
        return self._call is None

    def when(self) -> float:
        return self._when


def _wake(ended: asyncio.Future[None], _: object) -> None:
    if not ended.done():
        ended.set_result(None)


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop with a virtual clock. It has no sockets, and runs what is meant for threads at once, in its own.

    What is called at the same time is called in the order in which it was asked for.
    """

    _ready: Any
    _asyncgen_finalizer_hook: Any
    _stopping: bool

    patience_s = 60.0
    """CPU time of one run of the loop, s. A schedule needs a tenth of a second."""

    def __init__(self) -> None:
        super().__init__()
        self._endless = ""
        """Where a callback was that did not return."""
        self.now_s = 0.0
        """Time of the loop, s."""
        self._timers: list[tuple[float, int, _TimedCall | asyncio.Future[None]]] = []
        self._asked = 0

    def time(self) -> float:
        return self.now_s

    def now_us(self) -> int:
        """Virtual wall clock, µs since the Unix epoch."""
        return START_US + int(self.now_s * 1e6)

    def sources(self, random_bytes: Callable[[int], bytes], wall_us: Callable[[], int] | None = None) -> Sources:
        """Time, sleep and chance of one client; ``wall_us`` is its own wall clock, if it has one."""
        return Sources(
            wall_us=wall_us or self.now_us,
            elapsed_us=lambda: int(self.now_s * 1e6),
            random_bytes=random_bytes,
            sleep=asyncio.sleep,
        )

    def after(self, seconds: float) -> asyncio.Future[None]:
        """A future that is done then: what `asyncio.sleep` waits for, at a third of the cost."""
        future: asyncio.Future[None] = asyncio.Future(loop=self)
        self._asked += 1
        heapq.heappush(self._timers, (self.now_s + seconds, self._asked, future))
        return future

    def take_apart(self) -> None:
        """Let go of all that would still be called."""
        self._timers.clear()
        self._ready.clear()
        self.set_task_factory(None)

    get_debug = bool  # False: asked by every future, and this way without a frame

    async def finished(self, task: asyncio.Task[Any]) -> None:
        """Wait for the end of a task, whatever it is; as `asyncio.wait` for one, at a fraction of the cost."""
        if not task.done():
            ended = asyncio.Future[None](loop=self)
            wake = partial(_wake, ended)
            task.add_done_callback(wake)
            try:
                await ended
            finally:
                task.remove_done_callback(wake)

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> _Call:
        call = _Call((copy_context() if context is None else context).run, callback, *args)
        self._ready.append(call)
        return call

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> _TimedCall:
        timer = _TimedCall(_Call((copy_context() if context is None else context).run, callback, *args), when)
        self._asked += 1
        heapq.heappush(self._timers, (when, self._asked, timer))
        return timer

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> _TimedCall:
        return self.call_at(self.now_s + delay, callback, *args, context=context)

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
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(finalizer=self._asyncgen_finalizer_hook)
        self._endless = ""
        try:
            with suppress(_OutOfTimeError), self._alarm():
                self._run_until_stopped()
            if self._endless:
                # The work that was waited for may have ended with the interruption, and would stop the next run, too.
                ended = asyncio.base_events._run_until_complete_cb  # type: ignore[attr-defined]
                self._ready = deque(call for call in self._ready if ended not in call.args)
                raise StuckError(f"the simulation does not end: {self.patience_s:.0f} s of CPU time{self._endless}")
        finally:
            sys.set_asyncgen_hooks(*hooks)
            self._stopping = False
            self._thread_id = None  # type: ignore[assignment]
            asyncio._set_running_loop(None)

    @contextmanager
    def _alarm(self) -> Iterator[None]:
        """Interrupt, and end the loop, where it has taken too much CPU time: a callback that never returns makes no
        steps that could be counted."""
        if (
            threading.current_thread() is not threading.main_thread()
            or not hasattr(signal, "setitimer")
            or signal.getsignal(signal.SIGVTALRM) is not signal.SIG_DFL  # the caller has an alarm of its own
        ):
            yield
            return
        signal.signal(signal.SIGVTALRM, self._interrupt)
        # Again and again: the code that is interrupted may catch that, too.
        signal.setitimer(signal.ITIMER_VIRTUAL, self.patience_s, 1.0)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, signal.SIG_DFL)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        if not self._endless:
            places = traceback.extract_stack(frame)[-3:]
            self._endless = "".join(f"; {place.name} {place.filename}:{place.lineno}" for place in places)
        raise _OutOfTimeError

    def _run_until_stopped(self) -> None:
        ready, timers = self._ready, self._timers
        calls = 0
        while not self._stopping:
            if not ready:
                self._jump(timers)
            calls += 1
            if calls > _MAX_CALLS:
                raise StuckError(f"the simulation does not end: {_MAX_CALLS} callbacks were run")
            ready.popleft()()

    def _jump(self, timers: list[tuple[float, int, _TimedCall | asyncio.Future[None]]]) -> None:
        """Let time pass until something is ready."""
        while timers:
            when, _, timer = heapq.heappop(timers)
            if when > self.now_s:
                self.now_s = when
            if isinstance(timer, _TimedCall):
                if timer._call is not None:
                    self._ready.append(timer._call)
                    return
            elif not timer.done():
                timer.set_result(None)
                if self._ready:
                    return
        raise StuckError("the simulation is stuck: every task waits, and nothing will ever happen")

    def _process_events(self, event_list: list[Any]) -> None:
        """Nothing: there are no sockets."""

    def _write_to_self(self) -> None:
        """Nothing: no other thread wakes this loop."""
