"""The one background loop that synchronous twins run on.

Each twin is a line: ``return run_sync(self.commit_async(...))``. The loop lives in a daemon thread, is
made at the first call, and never crosses a fork: a child makes its own.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar

__all__ = ["background_loop", "blocked_loop", "iterate_sync", "run_sync"]

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_thread: threading.Thread | None = None
_pid = 0

blocked_loop: contextvars.ContextVar[asyncio.AbstractEventLoop | None] = contextvars.ContextVar(
    "icechunk_blocked_loop", default=None
)
"""Inside a synchronous twin: the loop whose thread waits for it, and so cannot make progress meanwhile."""


def background_loop() -> asyncio.AbstractEventLoop:
    """The loop of this process's background thread, started if need be."""
    global _loop, _thread, _pid
    with _lock:
        if _loop is None or _pid != os.getpid() or _loop.is_closed():
            _loop = asyncio.new_event_loop()
            _thread = threading.Thread(target=_loop.run_forever, name="icechunk-sync", daemon=True)
            _thread.start()
            _pid = os.getpid()
        return _loop


def run_sync(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the background loop, and wait for its result in this thread.

    Raises
    ------
    RuntimeError
        When called on the background loop itself, where waiting would never end.
    """
    loop = background_loop()
    if threading.current_thread() is _thread:
        coroutine.close()
        raise RuntimeError("a synchronous method was called on icechunk's own event loop; await its *_async twin")
    try:
        blocked: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
    except RuntimeError:
        blocked = None
    token = blocked_loop.set(blocked)
    try:
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    finally:
        blocked_loop.reset(token)
    try:
        return future.result()
    except BaseException:
        # KeyboardInterrupt reaches the waiting thread only: the work must not go on behind the user's back.
        future.cancel()
        raise


def iterate_sync(source: AsyncIterator[T]) -> Iterator[T]:
    """Walk an asynchronous iterator from synchronous code, an item at a time."""

    async def step() -> tuple[bool, T | None]:
        try:
            return True, await anext(source)
        except StopAsyncIteration:
            return False, None

    while True:
        more, item = run_sync(step())
        if not more:
            return
        yield item  # type: ignore[misc]


def _after_fork() -> None:
    # The parent may have held the lock while it forked.
    global _lock, _loop, _thread
    _lock = threading.Lock()
    _loop = _thread = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
