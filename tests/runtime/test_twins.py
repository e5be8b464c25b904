"""The background loop of synchronous twins."""

from __future__ import annotations

import asyncio
import inspect
import os
import pickle
import re
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Iterator
from typing import Self, assert_type, overload

import pytest

from icechunk.runtime.twins import background_loop, blocked_loop, iterate_sync, run_sync, synchronous, warn_caller


async def double(value: int) -> int:
    await asyncio.sleep(0)
    return 2 * value


def test_a_coroutine_runs_on_the_one_background_loop() -> None:
    async def where() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    assert run_sync(double(2)) == 4
    assert run_sync(where()) is run_sync(where()) is background_loop()


def test_errors_are_raised_unchanged() -> None:
    async def fail() -> None:
        raise LookupError("here")

    with pytest.raises(LookupError, match=re.escape("here")):
        run_sync(fail())


async def test_it_works_while_a_loop_runs_in_this_thread_and_logs_which_one_is_blocked() -> None:
    async def blocked() -> asyncio.AbstractEventLoop | None:
        return blocked_loop.get()

    assert run_sync(blocked()) is asyncio.get_running_loop()
    assert await asyncio.to_thread(lambda: run_sync(blocked())) is None
    assert blocked_loop.get() is None


def test_on_its_own_loop_it_refuses_instead_of_waiting_for_ever() -> None:
    async def wrong() -> int:
        return run_sync(double(1))

    with pytest.raises(RuntimeError, match="await its"):  # words: the remedy; asyncio raises RuntimeErrors of its own
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


class Counter:
    """Has every kind of asynchronous function that has a twin."""

    step = 1

    async def add_async(self, value: int, *, times: int = 1) -> int:
        """A sum.

        Parameters
        ----------
        value
            A summand.
        """
        await asyncio.sleep(0)
        return value + self.step * times

    add = synchronous(add_async)

    async def itself_async(self) -> Self:
        return self

    itself = synchronous(itself_async)

    async def up_to_async(self, end: int) -> AsyncIterator[int]:
        """Numbers."""
        for n in range(0, end, self.step):
            yield n

    up_to = synchronous(up_to_async)

    @overload
    async def echo_async(self, value: int) -> int: ...

    @overload
    async def echo_async(self, value: str) -> str: ...

    async def echo_async(self, value: int | str) -> int | str:
        return value

    echo = synchronous(echo_async)

    @staticmethod
    async def half_async(value: int) -> float:
        return value / 2

    half = staticmethod(synchronous(half_async))

    async def warn_async(self) -> None:
        warn_caller("enough", DeprecationWarning)

    warn = synchronous(warn_async)


class Doubling(Counter):
    async def add_async(self, value: int, *, times: int = 1) -> int:
        return 2 * await super().add_async(value, times=times)


async def thrice_async(value: int) -> int:
    return 3 * value


thrice = synchronous(thrice_async)


def test_a_twin_returns_the_result_of_its_asynchronous_function() -> None:
    counter = Counter()
    assert assert_type(counter.add(1, times=2), int) == 3
    assert assert_type(Doubling().itself(), Doubling).step == 1
    assert list(assert_type(counter.up_to(3), Iterator[int])) == [0, 1, 2]
    assert (assert_type(counter.echo(1), int), assert_type(counter.echo("a"), str)) == (1, "a")
    assert assert_type(Counter.half(3), float) == counter.half(3) == 1.5
    assert assert_type(thrice(2), int) == 6


def test_a_twin_of_a_method_calls_the_override_of_a_subclass() -> None:
    assert Doubling().add(1) == Counter.add(Doubling(), 1) == 4


def test_a_twin_has_the_name_the_parameters_and_the_documentation_of_its_asynchronous_function() -> None:
    assert (Counter.add.__name__, Counter.add.__qualname__) == ("add", "Counter.add")
    assert inspect.signature(Counter.add) == inspect.signature(Counter.add_async)
    assert not inspect.iscoroutinefunction(Counter.add)
    assert (Counter.up_to.__doc__, thrice.__doc__) == (
        "Synchronous twin of `up_to_async`.\n\nNumbers.",
        "Synchronous twin of `thrice_async`.",
    )


def test_twins_pickle_as_functions_and_methods_do() -> None:
    for twin in (Counter.add, thrice, Counter.half):
        assert pickle.loads(pickle.dumps(twin)) is twin
    assert pickle.loads(pickle.dumps(Doubling().add))(1) == 4


def test_a_twin_called_without_its_arguments_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=re.escape("value")):
        Counter().add()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=re.escape("self")):
        Counter.add()  # type: ignore[call-arg]


async def test_a_warning_names_the_users_call_in_a_twin_and_where_it_is_awaited() -> None:
    here = sys._getframe().f_lineno
    with pytest.warns(DeprecationWarning, match=re.escape("enough")) as of_twin:
        Counter().warn()
    with pytest.warns(DeprecationWarning, match=re.escape("enough")) as of_coroutine:
        await Counter().warn_async()
    assert (of_twin[0].filename, of_twin[0].lineno) == (__file__, here + 2)
    assert of_coroutine[0].filename == __file__


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
