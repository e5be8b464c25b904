"""Work that comes one after the other stays in one thread; work at the same time has several."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from icechunk.runtime import tasks
from icechunk.runtime.tasks import to_its_end
from icechunk.runtime.threads import ProcessPool


async def test_work_one_after_the_other_has_one_thread() -> None:
    pool = ProcessPool(8, "test")
    names = {await to_its_end(pool, lambda: threading.current_thread().name) for _ in range(50)}
    assert len(names) == 1


async def test_work_at_the_same_time_has_several_threads_and_no_more_than_allowed() -> None:
    pool, together = ProcessPool(3, "test"), threading.Barrier(3)
    await asyncio.gather(*(to_its_end(pool, together.wait, 5) for _ in range(3)))
    running, most, guard = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal running, most
        with guard:
            running += 1
            most = max(most, running)
        time.sleep(0.001)
        with guard:
            running -= 1

    await asyncio.gather(*(to_its_end(pool, work) for _ in range(30)))
    assert most <= 3


async def test_results_and_errors_are_those_of_the_work() -> None:
    pool = ProcessPool(2, "test")
    assert await to_its_end(pool, divmod, 7, 2) == (3, 1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await to_its_end(pool, divmod, 7, 0)


async def test_work_ends_before_its_caller_is_cancelled() -> None:
    pool, begun, done = ProcessPool(2, "test"), threading.Event(), []

    def work() -> None:
        begun.set()
        time.sleep(0.05)
        done.append(True)

    task = asyncio.ensure_future(to_its_end(pool, work))
    assert await asyncio.to_thread(begun.wait, 5)
    task.cancel()
    await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == [True]


def test_a_loop_that_is_closed_first_is_told_nothing() -> None:
    pool, release = ProcessPool(2, "test"), threading.Event()

    async def leave() -> None:
        waiting = asyncio.ensure_future(to_its_end(pool, release.wait, 5))
        await asyncio.sleep(0)
        waiting._log_destroy_pending = False  # type: ignore[attr-defined]

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    release.set()
    assert asyncio.run(to_its_end(pool, divmod, 7, 2)) == (3, 1)


async def test_a_process_that_is_ending_does_the_work_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ProcessPool(2, "test")
    pool.here().shutdown()
    made = pool._made
    assert made is not None
    made.first.shutdown()
    with pytest.raises(RuntimeError):
        await to_its_end(pool, divmod, 7, 2)
    monkeypatch.setattr(tasks, "_pools_are_closed", lambda: True)
    assert await to_its_end(pool, divmod, 7, 2) == (3, 1)
    assert made.is_free.acquire(blocking=False)


def test_a_fork_has_threads_of_its_own() -> None:
    pool = ProcessPool(2, "test")
    assert isinstance(pool.here(), ThreadPoolExecutor)
    made = pool._made
    assert made is not None
    made.is_free.acquire()
    pool._made = made._replace(pid=os.getpid() + 1)
    assert asyncio.run(to_its_end(pool, divmod, 7, 2)) == (3, 1)
