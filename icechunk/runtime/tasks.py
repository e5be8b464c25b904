"""Running a few coroutines at once, with one plain exception at the end; and waiting for tasks to end."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing, suppress
from typing import Any, Final, Generic, TypeVar

from icechunk.runtime.threads import ProcessPool

__all__ = [
    "finish_task",
    "in_thread",
    "run_all",
    "run_each",
    "run_jobs",
    "run_pair",
    "run_stream",
    "shielded",
    "to_its_end",
]

T = TypeVar("T")
U = TypeVar("U")


async def run_all(*work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """Run all at once; the first error cancels the others and is raised as itself, not in a group."""
    if len(work) <= 1:
        for only in work:
            await only()
        return
    try:
        async with asyncio.TaskGroup() as group:
            for item in work:
                group.create_task(item())
    except BaseExceptionGroup as errors:
        first = _first(errors)
    else:
        return
    try:
        raise first
    finally:
        # The error's traceback has this frame, and the group has the caller's task, which may end with the error.
        del first, group


async def run_each(work: Callable[[T], Awaitable[Any]], items: Iterable[T], *, limit: int) -> None:
    """Run ``work`` for every item, at most ``limit`` at once; errors as in `run_all`."""
    todo = list(items)
    waiting = iter(todo)

    async def worker() -> None:
        for item in waiting:
            await work(item)

    await run_all(*[worker] * min(limit, len(todo)))


async def run_jobs(jobs: Sequence[Callable[[], Awaitable[T]]], *, limit: int = 32) -> list[T]:
    """Results of the jobs, in their order, at most ``limit`` at once; errors as in `run_all`."""
    if len(jobs) == 1:
        return [await jobs[0]()]
    results: dict[int, T] = {}

    async def work(i: int) -> None:
        results[i] = await jobs[i]()

    await run_each(work, range(len(jobs)), limit=limit)
    return [results[i] for i in range(len(jobs))]


async def run_pair(first: Callable[[], Awaitable[T]], second: Callable[[], Awaitable[U]]) -> tuple[T, U]:
    """Results of two jobs of different types, run at once; errors as in `run_all`."""
    firsts: list[T] = []
    seconds: list[U] = []

    async def run_first() -> None:
        firsts.append(await first())

    async def run_second() -> None:
        seconds.append(await second())

    await run_all(run_first, run_second)
    return firsts[0], seconds[0]


async def run_stream(
    work: Callable[[T], Coroutine[Any, Any, Any]],
    items: AsyncGenerator[T, None],
    weigh: Callable[[T], int],
    *,
    limit: int,
    max_weight: int,
) -> None:
    """Run ``work`` for every item as it comes; errors as in `run_all`.

    At most ``limit`` run at once, which weigh ``max_weight`` together at the most, or are one that is heavier; the next
    but one is asked for only then.
    """
    running: dict[asyncio.Task[Any], int] = {}
    try:
        async with asyncio.TaskGroup() as group, aclosing(items):
            async for item in items:
                weight = weigh(item)
                while running and (len(running) >= limit or sum(running.values()) + weight > max_weight):
                    done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        del running[task]
                running[group.create_task(work(item))] = weight
                del item
                # Let the started work send its requests while the next item is made.
                await asyncio.sleep(0)
    except BaseExceptionGroup as errors:
        first = _first(errors)
    else:
        return
    try:
        raise first
    finally:
        del first, group, running


_THREADS: Final = ProcessPool(40, "icechunk-work")


async def in_thread(work: Callable[[], T], *, limiter: asyncio.Semaphore | None = None) -> T:
    """Run CPU-bound work beside the loop, or here where the process is ending and starts no threads any more.

    A caller that is cancelled does not wait for the end of the work, which counts in the limiter until then.
    """
    # Not of anyio: importing what it runs threads with takes longer than most of the work.
    run = contextvars.copy_context().run
    with ExitStack() as held:
        if limiter is not None:
            await limiter.acquire()
            held.callback(limiter.release)
        try:
            done = asyncio.get_running_loop().run_in_executor(_THREADS.here(), run, work)
        except RuntimeError:
            return work()
        if limiter is None:
            return await done
        release = held.pop_all()
        done.add_done_callback(lambda _: release.close())
        return await asyncio.shield(done)


class _Call(Generic[T]):
    """Work in a thread, and the task that waits for it: with less in between than two kinds of futures."""

    __slots__ = ("_arguments", "_error", "_loop", "_result", "_told", "_work", "is_done")

    def __init__(self, work: Callable[..., T], arguments: tuple[Any, ...]) -> None:
        self._work = work
        self._arguments = arguments
        self._loop = asyncio.get_running_loop()
        self._told = self._loop.create_future()
        self._result: T
        self._error: BaseException | None = None
        self.is_done = False

    def run(self) -> None:
        try:
            self._result = self._work(*self._arguments)
        except BaseException as error:  # raised in the task
            self._error = error

    def tell(self) -> None:
        # The loop may have been closed.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        self.is_done = True
        if not self._told.done():
            self._told.set_result(None)

    async def wait(self) -> None:
        if self._told.cancelled():
            self._told = self._loop.create_future()
        await self._told

    def outcome(self) -> T:
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
            return self._result
        finally:
            # Its traceback has this frame.
            del error


async def to_its_end(pool: ProcessPool, work: Callable[..., T], *arguments: Any) -> T:
    """Run blocking work in a thread and wait for its end, also when cancelled: nothing of it happens afterwards."""
    call = _Call(work, arguments)
    try:
        pool.start(call.run, call.tell)
    except RuntimeError:
        if not _pools_are_closed():
            raise
        # The interpreter is shutting down and starts no threads; a last checkpoint still has to be written.
        return work(*arguments)
    try:
        await call.wait()
    except asyncio.CancelledError:
        with shielded():
            while not call.is_done:
                with suppress(asyncio.CancelledError):
                    await call.wait()
        raise
    return call.outcome()


def _pools_are_closed() -> bool:
    from concurrent.futures import thread

    return bool(getattr(thread, "_shutdown", False))


def shielded() -> AbstractContextManager[Any]:
    """A context in which a task that was cancelled can wait for something else.

    asyncio cancels a task once; a scope of anyio, where the application has one, again and again.
    """
    # Imported here: few programs cancel anything, and anyio's backend takes longer to import than most first calls.
    import anyio

    return anyio.CancelScope(shield=True)


async def finish_task(task: asyncio.Task[Any] | None, grace_s: float) -> None:
    """Wait for a task; cancel it where it takes too long, and leave it where it takes as long to end then.

    A thread that waits for a disk that hangs cannot be cancelled.
    """
    if task is None or task.done() or task is asyncio.current_task():
        return
    await asyncio.wait({task}, timeout=grace_s)
    if not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=grace_s)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error to raise in place of the group: without a reference to it, so that its memory is free at once."""
    # asyncio leaves the group in the frame that raised it, which is in its traceback.
    errors.__traceback__ = None
    for error in errors.exceptions:
        found = _first(error) if isinstance(error, BaseExceptionGroup) else error
        if isinstance(found, Exception):
            return found
    return found
