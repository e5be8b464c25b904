"""Work that runs at once, and work on items as they come."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from icechunk.runtime.tasks import finish_task, in_thread, run_all, run_jobs, run_pair, run_stream


async def test_no_more_is_asked_for_than_has_room() -> None:
    asked: list[int] = []
    done: list[int] = []
    most = 0

    async def items() -> AsyncGenerator[int, None]:
        for weight in (3, 3, 3, 20, 1, 1, 1, 1, 1):
            asked.append(weight)
            yield weight

    async def work(weight: int) -> None:
        nonlocal most
        # The last request waits for room.
        most = max(most, sum(asked[:-1]) - sum(done))
        for _ in range(5):
            await asyncio.sleep(0)
        done.append(weight)

    await run_stream(work, items(), lambda weight: weight, limit=3, max_weight=7)
    assert sorted(done) == [1, 1, 1, 1, 1, 3, 3, 3, 20]
    assert most <= 20


async def test_an_error_ends_the_source_and_all_other_work_and_is_raised_as_itself() -> None:
    ended: list[str] = []

    async def items() -> AsyncGenerator[int, None]:
        try:
            for i in range(100):
                yield i
        finally:
            ended.append("items")

    async def work(item: int) -> None:
        if item == 3:
            raise KeyError("three")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("work")
            raise

    with pytest.raises(KeyError, match=re.escape("three")):
        await run_stream(work, items(), lambda item: 1, limit=10, max_weight=10)
    assert ended.count("items") == 1
    assert ended.count("work") >= 3


async def test_an_error_of_the_source_cancels_the_tasks_of_its_items() -> None:
    async def items() -> AsyncGenerator[int, None]:
        yield 1
        raise ValueError("no more")

    async def work(item: int) -> None:
        await asyncio.sleep(60)

    with pytest.raises(ValueError, match="no more"):  # words: the test's own
        await run_stream(work, items(), lambda item: 1, limit=10, max_weight=10)


async def test_results_come_in_the_order_of_the_jobs_and_no_more_run_at_once_than_allowed() -> None:
    running = most = 0

    async def job(n: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(10 - n):
            await asyncio.sleep(0)
        running -= 1
        return n

    assert await run_jobs([partial(job, n) for n in range(10)], limit=3) == list(range(10))
    assert most == 3
    assert await run_jobs([partial(job, 4)]) == [4]
    assert await run_jobs([]) == []


async def test_the_first_error_cancels_the_others_and_is_raised_unchanged() -> None:
    cancelled: list[bool] = []

    async def fail() -> None:
        await asyncio.sleep(0)
        raise KeyError("it")

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    for run in (partial(run_all, wait, fail), partial(run_jobs, [wait, fail]), partial(run_pair, wait, fail)):
        with pytest.raises(KeyError, match=re.escape("it")):
            await run()
    assert cancelled == [True] * 3


async def _one() -> AsyncGenerator[int, None]:
    yield 1


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("way", ["all", "jobs", "pair", "stream"])
async def test_an_error_keeps_its_cause_and_its_memory_is_free_as_soon_as_it_was_handled(
    way: str, nested: bool
) -> None:
    class WrongError(Exception):
        pass

    seen: list[weakref.ref[WrongError]] = []
    cause: BaseException | None = None

    async def fail() -> None:
        await asyncio.sleep(0)
        error = WrongError()
        seen.append(weakref.ref(error))
        try:
            raise error from KeyError("why")
        finally:
            del error

    async def wait() -> None:
        await asyncio.sleep(60)

    async def run(work: Callable[[], Coroutine[None, None, None]]) -> None:
        match way:
            case "all":
                await run_all(work, wait)
            case "jobs":
                await run_jobs([work, wait])
            case "pair":
                await run_pair(work, wait)
            case _:
                await run_stream(lambda item: work(), _one(), lambda item: 1, limit=2, max_weight=2)

    collecting = gc.isenabled()
    gc.disable()
    try:
        try:
            await run(partial(run, fail) if nested else fail)
        except WrongError as error:
            cause = error.__cause__
        # Tasks that have ended are known to the loop for one turn more.
        await asyncio.sleep(0)
        assert [found() for found in seen] == [None]
        assert isinstance(cause, KeyError)
    finally:
        if collecting:
            gc.enable()


async def test_a_job_that_is_cancelled_before_its_first_step_leaves_no_coroutine_behind() -> None:
    async def wait() -> None:
        await asyncio.sleep(60)

    task = asyncio.ensure_future(run_jobs([wait] * 3))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_two_results_of_different_types() -> None:
    async def number() -> int:
        return 1

    async def word() -> str:
        return "one"

    assert await run_pair(number, word) == (1, "one")


@pytest.mark.parametrize(("takes_s", "cancelled"), [(0.0, False), (60.0, True)])
async def test_a_task_that_takes_too_long_to_finish_is_cancelled(takes_s: float, cancelled: bool) -> None:
    task = asyncio.ensure_future(asyncio.sleep(takes_s))
    await finish_task(task, 0.01)
    assert task.done()
    assert task.cancelled() == cancelled
    await finish_task(None, 0.01)


async def test_a_task_that_cannot_be_cancelled_is_left() -> None:
    ended = asyncio.Event()

    async def stubborn() -> None:
        while not ended.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await ended.wait()

    task = asyncio.ensure_future(stubborn())
    await finish_task(task, 0.01)
    assert not task.done()
    ended.set()
    await task


async def test_work_goes_to_a_thread_and_stays_here_where_no_thread_can_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert await in_thread(threading.get_ident) != threading.get_ident()

    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    assert await in_thread(threading.get_ident) == threading.get_ident()


async def test_work_of_a_cancelled_caller_counts_in_the_limiter_until_it_ends() -> None:
    limiter, begun, go = asyncio.Semaphore(1), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert go.wait(30)

    task = asyncio.create_task(in_thread(work, limiter=limiter))
    await in_thread(begun.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert limiter.locked()
    go.set()
    assert await in_thread(lambda: 1, limiter=limiter) == 1
    assert not limiter.locked()


async def test_an_error_of_the_work_itself_is_raised_and_it_is_not_done_twice() -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise RuntimeError("of the work")

    with pytest.raises(RuntimeError, match="of the work"):  # words: the test's own
        await in_thread(fail)
    assert calls == [1]
