"""One value per event loop: made at first use, closed with its loop, never touched after a fork.

Clients, locks and pools belong to the loop they were made on, while one storage or store object is used from many: the
user's, zarr's, one per thread or test. `PerLoop` keeps the value of each.

How a value is closed in time: for each value an asynchronous generator is started on its loop, suspended at its only
``yield``, whose ``finally`` closes the value. `asyncio.run` and `asyncio.Runner` end a loop with
``shutdown_asyncgens()``, which runs that ``finally`` on the loop itself. The values of loops that still run, or are
idle, at the end of the process (daemon threads) are closed by an ``atexit`` hook. After a fork the child drops the
parent's values without closing or finalising them: their sockets and selectors are shared with the parent.

Order of closing: ``shutdown_asyncgens()`` ends all generators of a loop at once, but a value may need another one while
it is closed (a repository log writes its last checkpoint through a storage's client). So each `PerLoop` has a rank, and
at the end of a loop a value waits until those of higher ranks on this loop are closed. A value that is made again for
such a close, because it had been closed by hand, gets no generator, since none would be ended any more: the last close
on the loop closes it too.

Concurrent closing: several callers may close a value at once, the loop's end among them, while a generator that is
being ended may not be ended again. So the entry does the closing: the first caller closes, in its own task, the others
wait for it, and a generator that is left over does nothing.

This module also has synchronous twins, and the one background loop that they run on. Each twin is a line:
``commit: Final = synchronous(commit_async)``, final so that every type checker infers its signature. The loop runs in
a daemon thread, is made at the first call, and never crosses a fork: a child makes its own.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import functools
import inspect
import os
import sys
import threading
import warnings
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from types import AsyncGeneratorType, FrameType
from typing import Any, Final, Generic, ParamSpec, TypeAlias, TypeVar, cast, overload

__all__ = [
    "PerLoop",
    "background_loop",
    "blocked_loop",
    "closing_garbage",
    "iterate_sync",
    "run_sync",
    "running_loop",
    "synchronous",
    "warn_caller",
]

T = TypeVar("T")
P = ParamSpec("P")

closing_garbage: contextvars.ContextVar[bool] = contextvars.ContextVar("closing_garbage", default=False)
"""Whether a value is being closed because its `PerLoop` was collected as garbage: at no moment that a user chose."""

_EXIT_PATIENCE_S: Final = 5.0
_ORDER_PATIENCE_S: Final = 30.0

_everyone: weakref.WeakSet[PerLoop[Any]] = weakref.WeakSet()
# The open values of each loop, of every `PerLoop`.
_open: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, list[_Entry[Any]]] = weakref.WeakKeyDictionary()
# Loops whose generators are being ended.
_ending: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
# Values of a parent process, kept so that they are never finalised here.
_inherited: list[object] = []
_guard = threading.Lock()
_hooked = False


class _Entry(Generic[T]):
    __slots__ = ("close", "closed", "closer", "closing", "home", "keeper", "lock", "rank", "value")

    def __init__(self, rank: int, home: _Entries[T], close: Callable[[T], Awaitable[None]] | None) -> None:
        # Not the `PerLoop` itself: a reference to it would keep it alive through its own finaliser.
        self.home = home
        self.close = close
        self.rank = rank
        self.closed = asyncio.Event()
        self.closer: asyncio.Task[Any] | None = None
        self.lock = asyncio.Lock()
        self.keeper: AsyncGenerator[None, None] | None = None
        self.value: T | None = None
        self.closing: asyncio.Task[None] | None = None


_Entries: TypeAlias = weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Entry[T]]


class PerLoop(Generic[T]):
    """A value for each running event loop.

    Parameters
    ----------
    factory
        Makes the value, on the loop that it is for; may be a coroutine function. Must not return None.
    close
        Closes it, on the same loop. Its errors are dropped.
    rank
        At the end of a loop, or of the process, values with a higher rank are closed before those with a lower one.
    """

    def __init__(
        self,
        factory: Callable[[], T | Awaitable[T]],
        close: Callable[[T], Awaitable[None]] | None = None,
        *,
        rank: int = 0,
    ) -> None:
        self._rank = rank
        self._factory = factory
        self._close = close
        self._entries: _Entries[T] = weakref.WeakKeyDictionary()
        self._pid = os.getpid()
        # Holds the values for as long as this object lives, and then until their loops have closed them: collected in
        # one go with their keepers they would be finalised while open.
        weakref.finalize(self, _abandon, self._entries, self._pid).atexit = False

    def peek(self) -> T | None:
        """The running loop's value, or None where none was made yet. Needs a running loop."""
        if self._pid != os.getpid():
            return None
        entry = self._entries.get(asyncio.get_running_loop())
        return None if entry is None else entry.value

    async def get(self) -> T:
        """The running loop's value, made now if need be. Concurrent callers get the same one."""
        value = self.peek()
        if value is not None:
            return value
        loop = asyncio.get_running_loop()
        while True:
            entry = self._entry(loop)
            async with entry.lock:
                if self._entries.get(loop) is not entry:
                    continue  # closed while we waited
                if entry.value is not None:
                    return entry.value
                made = self._factory()
                value = cast(T, await made if inspect.isawaitable(made) else made)
                if loop not in _ending:
                    entry.keeper = _keep(entry)
                    await anext(entry.keeper)
                with _guard:
                    _open.setdefault(loop, []).append(entry)
                entry.value = value
                return value

    async def aclose(self) -> None:
        """Close the running loop's value, if it has one; return once it is closed. The next `get` makes a new one."""
        if self._pid == os.getpid():
            await self._aclose_on(asyncio.get_running_loop())

    def _entry(self, loop: asyncio.AbstractEventLoop) -> _Entry[T]:
        with _guard:
            if self._pid != os.getpid():
                _inherited.append(self._entries)
                self._entries = weakref.WeakKeyDictionary()
                self._pid = os.getpid()
                weakref.finalize(self, _abandon, self._entries, self._pid).atexit = False
            for other in list(self._entries):
                if other.is_closed():
                    del self._entries[other]
            entry = self._entries.get(loop)
            if entry is None:
                entry = self._entries[loop] = _Entry(self._rank, self._entries, self._close)
            _everyone.add(self)
            _hook_exit()
            return entry

    async def _aclose_on(self, loop: asyncio.AbstractEventLoop) -> None:
        with _guard:
            mine = [entry for entry in _open.get(loop, ()) if entry.home is self._entries]
        for entry in mine:
            await _close_now(entry)


async def _close_now(entry: _Entry[Any]) -> None:
    """Close one value ahead of its loop and of its rank."""
    try:
        await _close_once(entry)
    finally:
        keeper = entry.keeper
        # Does not suspend, since there is nothing left to do.
        if entry.closed.is_set() and isinstance(keeper, AsyncGeneratorType) and not keeper.ag_running:
            await keeper.aclose()


async def _close_once(entry: _Entry[Any]) -> None:
    """Close a value; a second caller waits for the first one, unless both are the same task."""
    task = asyncio.current_task()
    if entry.closer is not None:
        if entry.closer is not task:
            await entry.closed.wait()
        return
    entry.closer = task
    loop = asyncio.get_running_loop()
    try:
        with _guard:
            if entry.home.get(loop) is entry:
                del entry.home[loop]
        if entry.close is not None:
            with contextlib.suppress(Exception):
                await entry.close(entry.value)
    finally:
        with _guard:
            _open[loop].remove(entry)
        entry.closed.set()


async def _keep(own: _Entry[Any]) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        loop = asyncio.get_running_loop()
        if own.closer is None:
            _ending.add(loop)
            await _wait_for_higher(own, loop)
        if not own.closed.is_set():
            await _close_once(own)
        await _close_late(loop)


async def _close_late(loop: asyncio.AbstractEventLoop) -> None:
    """Close values that were made while the loop ended, once nothing else is open that may use them."""
    with _guard:
        left = _open.get(loop, [])[:]
    if loop in _ending and all(entry.keeper is None for entry in left):
        for entry in sorted(left, key=lambda entry: entry.rank, reverse=True):
            await _close_once(entry)


async def _wait_for_higher(own: _Entry[Any], loop: asyncio.AbstractEventLoop) -> None:
    with _guard:
        higher = [entry for entry in _open[loop] if entry.rank > own.rank]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_ORDER_PATIENCE_S):
            for entry in higher:
                await entry.closed.wait()


def _abandon(entries: _Entries[Any], pid: int) -> None:
    """Close the values of a deleted object on loops that still run, on those loops."""
    if pid != os.getpid():
        return
    for loop, entry in list(entries.items()):
        if entry.keeper is not None and not loop.is_closed():
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_close_soon, loop, entry)


def _close_soon(loop: asyncio.AbstractEventLoop, entry: _Entry[Any]) -> None:
    if entry.keeper is not None:
        context = contextvars.copy_context()
        context.run(closing_garbage.set, True)
        entry.closing = loop.create_task(_close_now(entry), context=context)


def _hook_exit() -> None:
    # Registered at first use, not at import: hooks run last in, first out, and this one must run before the loops'
    # owners (zarr among them) stop their loops.
    global _hooked
    if not _hooked:
        _hooked = True
        atexit.register(_close_everything)


def _close_everything() -> None:
    for keeper in sorted(_everyone, key=lambda keeper: keeper._rank, reverse=True):
        if keeper._pid != os.getpid():
            continue
        for loop in list(keeper._entries):
            with contextlib.suppress(Exception):
                _finish(keeper, loop)


def _finish(keeper: PerLoop[Any], loop: asyncio.AbstractEventLoop) -> None:
    if loop.is_closed():
        return
    closing = keeper._aclose_on(loop)
    try:
        if loop.is_running():
            asyncio.run_coroutine_threadsafe(closing, loop).result(_EXIT_PATIENCE_S)
        else:
            loop.run_until_complete(closing)
    finally:
        closing.close()


def _after_fork() -> None:
    # The parent may have held the lock while it forked, and its values must outlive every finaliser here.
    global _guard
    _guard = threading.Lock()
    _inherited.extend(list(keeper._entries.items()) for keeper in list(_everyone))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


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


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs in this thread; None where none does."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


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
