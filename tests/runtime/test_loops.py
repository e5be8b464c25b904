"""The background loop of synchronous twins."""

from __future__ import annotations

import asyncio
import os
import threading
import warnings
from collections.abc import AsyncIterator

import pytest

from icechunk.runtime.loops import background_loop, blocked_loop, iterate_sync, run_sync


async def double(value: int) -> int:
    await asyncio.sleep(0)
    return 2 * value


def test_a_coroutine_runs_on_the_one_background_loop() -> None:
    async def where() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    assert run_sync(double(2)) == 4
    assert run_sync(where()) is run_sync(where()) is background_loop()


def test_errors_arrive_as_they_are() -> None:
    async def fail() -> None:
        raise LookupError("here")

    with pytest.raises(LookupError, match="here"):
        run_sync(fail())


async def test_it_works_while_a_loop_runs_in_this_thread_and_tells_which_one_is_blocked() -> None:
    async def blocked() -> asyncio.AbstractEventLoop | None:
        return blocked_loop.get()

    assert run_sync(blocked()) is asyncio.get_running_loop()
    assert await asyncio.to_thread(lambda: run_sync(blocked())) is None
    assert blocked_loop.get() is None


def test_on_its_own_loop_it_refuses_instead_of_waiting_for_ever() -> None:
    async def wrong() -> int:
        return run_sync(double(1))

    with pytest.raises(RuntimeError, match="await its"):
        run_sync(wrong())


def test_many_threads_share_it() -> None:
    results: list[int] = []
    threads = [threading.Thread(target=lambda n=n: results.append(run_sync(double(n)))) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [2 * n for n in range(16)]


def test_an_iterator_is_walked_an_item_at_a_time() -> None:
    reached: list[int] = []

    async def count() -> AsyncIterator[int]:
        for n in range(5):
            reached.append(n)
            yield n

    walk = iterate_sync(count())
    assert next(walk) == 0
    assert reached == [0]
    assert list(walk) == [1, 2, 3, 4]


def test_an_iterator_that_is_left_early_is_closed() -> None:
    closed = threading.Event()

    async def count() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    for _ in iterate_sync(count()):
        break
    assert closed.wait(5)


def test_an_error_in_the_middle_of_an_iterator_arrives() -> None:
    async def count() -> AsyncIterator[int]:
        yield 1
        raise LookupError

    walk = iterate_sync(count())
    assert next(walk) == 1
    with pytest.raises(LookupError):
        next(walk)


def test_a_forked_child_makes_a_loop_of_its_own() -> None:
    assert run_sync(double(1)) == 2
    with warnings.catch_warnings():
        # Python 3.12 and later warn of forks in processes with threads; users do it all the same.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        os._exit(0 if run_sync(double(3)) == 6 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert run_sync(double(2)) == 4
