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
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import inspect
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import AsyncGeneratorType
from typing import Any, Final, Generic, ParamSpec, TypeAlias, TypeVar, cast

__all__ = ["PerLoop", "closing_garbage", "running_loop"]

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
_NO_ENTRIES: Final[_Entries[Any]] = weakref.WeakKeyDictionary()
_NO_PROCESS: Final = -1
"""The process of a `PerLoop` that has had no value."""


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
        # An object has many of these, most of which never get a value.
        self._entries: _Entries[T] = _NO_ENTRIES
        self._pid = _NO_PROCESS

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
                    # Of a loop that was closed without ending its generators: its values refer to it, so that it would
                    # never be garbage.
                    for other in [other for other in _open if other.is_closed()]:
                        del _open[other]
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
                if self._pid != _NO_PROCESS:
                    _inherited.append(self._entries)
                self._entries = weakref.WeakKeyDictionary()
                self._pid = os.getpid()
                # Holds the values for as long as this object lives, and then until their loops have closed them:
                # collected in one go with their keepers they would be finalised while open.
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


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs in this thread; None where none does."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
