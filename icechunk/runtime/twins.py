"""Synchronous twins of coroutines, and the one background loop that they run on.

Each twin is a line: ``commit: Final = synchronous(commit_async)``, final so that every type checker infers its
signature. The loop runs in a daemon thread, is made at the first call, and never crosses a fork: a child makes its own.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import os
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, Final, ParamSpec, TypeAlias, TypeVar, overload

from icechunk.runtime.loops import running_loop

__all__ = ["background_loop", "blocked_loop", "iterate_sync", "run_sync", "synchronous", "warn_caller"]

T = TypeVar("T")
P = ParamSpec("P")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_thread: threading.Thread | None = None
_pid = 0

blocked_loop: contextvars.ContextVar[asyncio.AbstractEventLoop | None] = contextvars.ContextVar(
    "icechunk_blocked_loop", default=None
)
"""Inside a synchronous twin: the loop whose thread waits for it, and so cannot make progress meanwhile."""

_Place: TypeAlias = tuple[str, int, dict[str, Any]]
"""File, line and globals of a call."""
_waiting_caller: contextvars.ContextVar[_Place | None] = contextvars.ContextVar("icechunk_waiting_caller", default=None)
"""Inside a synchronous twin: the user's call that waits for it."""
_PACKAGE: Final = __name__.partition(".")[0]


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
    blocked_token, caller_token = blocked_loop.set(running_loop()), _waiting_caller.set(_user_call(sys._getframe(1)))
    try:
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    finally:
        blocked_loop.reset(blocked_token)
        _waiting_caller.reset(caller_token)
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


@overload
def synchronous(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]: ...


@overload
def synchronous(function: Callable[P, AsyncIterator[T]]) -> Callable[P, Iterator[T]]: ...


def synchronous(function: Callable[P, Any]) -> Callable[P, Any]:
    """The synchronous twin of a function or method whose name ends in ``_async``.

    Parameters
    ----------
    function
        A coroutine function, whose twin returns its result, or an asynchronous generator function, whose twin returns
        an iterator. A twin of a method calls the method of the object's own class, so a subclass overrides both at
        once. Wrap the twin of a static method in ``staticmethod``.

    Returns
    -------
    Callable
        Has the parameters, overloads and documentation of ``function``, and its name without ``_async``. Called on the
        background loop itself it raises `RuntimeError`.
    """
    own_name = function.__name__
    dispatched = not isinstance(function, staticmethod) and "." in function.__qualname__.rpartition("<locals>.")[2]
    finish = iterate_sync if inspect.isasyncgenfunction(function) else run_sync

    def call(*args: P.args, **kwargs: P.kwargs) -> Any:
        if dispatched and args:
            return finish(getattr(args[0], own_name)(*args[1:], **kwargs))
        return finish(function(*args, **kwargs))

    twin = functools.update_wrapper(call, function)
    twin.__name__ = own_name.removesuffix("_async")
    twin.__qualname__ = function.__qualname__.removesuffix("_async")
    twin.__doc__ = f"Synchronous twin of `{own_name}`.\n\n{inspect.cleandoc(function.__doc__ or '')}".rstrip()
    return twin


def warn_caller(message: str, category: type[Warning]) -> None:
    """Give a warning that names the user's call: the nearest one from outside this package.

    In a synchronous twin, whose work runs in another thread, that is the call of the twin.
    """
    waiting = _waiting_caller.get() if threading.current_thread() is _thread else None
    filename, line, variables = waiting or _user_call(sys._getframe(1))
    registry = variables.setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, category, filename, line, variables.get("__name__"), registry)


def _user_call(frame: FrameType) -> _Place:
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno, frame.f_globals


def _forget_background_loop() -> None:
    # The parent may have held the lock while it forked.
    global _lock, _loop, _thread
    _lock = threading.Lock()
    _loop = _thread = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_background_loop)
