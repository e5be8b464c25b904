from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
import warnings
import weakref
from collections.abc import Coroutine

import pytest

from icechunk.runtime.loops import PerLoop


class Client:
    """Remembers its loop and that it was closed on it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.closed = 0

    async def aclose(self) -> None:
        await asyncio.sleep(0)
        assert asyncio.get_running_loop() is self.loop
        self.closed += 1


async def make() -> Client:
    await asyncio.sleep(0)
    return Client()


def test_each_loop_has_its_own_value_and_closes_it() -> None:
    clients = PerLoop(make, Client.aclose)

    async def use() -> Client:
        assert clients.peek() is None
        first, second = await asyncio.gather(clients.get(), clients.get())
        assert first is second is clients.peek()
        assert first.closed == 0
        return first

    one, two = asyncio.run(use()), asyncio.run(use())
    assert one is not two
    assert (one.closed, two.closed) == (1, 1)
    assert len(clients._entries) == 0


async def test_closing_while_the_loop_ends_waits_for_it() -> None:
    first, second = asyncio.Event(), asyncio.Event()

    async def close(client: Client) -> None:
        first.set()
        await second.wait()
        await client.aclose()

    clients = PerLoop(make, close)
    client = await clients.get()
    entry = clients._entries[asyncio.get_running_loop()]
    assert entry.keeper is not None
    # As `loop.shutdown_asyncgens` does.
    ending = asyncio.create_task(entry.keeper.aclose())
    await first.wait()
    closing = asyncio.create_task(clients.aclose())
    await asyncio.sleep(0)
    assert not closing.done()
    second.set()
    await asyncio.gather(ending, closing)
    assert client.closed == 1


async def test_closing_early_makes_a_new_value_next_time() -> None:
    clients = PerLoop(make, Client.aclose)
    first = await clients.get()
    await clients.aclose()
    await clients.aclose()
    assert first.closed == 1
    second = await clients.get()
    assert second is not first
    await clients.aclose()


async def test_a_factory_that_fails_or_is_cancelled_is_called_again() -> None:
    calls = 0

    async def factory() -> Client:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError("not now")
        if calls == 2:
            await asyncio.Event().wait()
        return Client()

    values = PerLoop(factory, Client.aclose)
    with pytest.raises(OSError, match="not now"):  # words: the test's own
        await values.get()
    first = asyncio.create_task(values.get())
    await asyncio.sleep(0)
    second = asyncio.create_task(values.get())
    await asyncio.sleep(0)
    first.cancel()
    assert isinstance(await second, Client)
    assert calls == 3


def test_loops_in_threads_do_not_meet() -> None:
    clients = PerLoop(make, Client.aclose)
    seen: list[Client] = []

    async def use() -> None:
        for _ in range(5):
            seen.append(await clients.get())

    threads = [threading.Thread(target=lambda: asyncio.run(use())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 6
    assert {client.closed for client in seen} == {1}


async def use(clients: PerLoop[Client]) -> None:
    await clients.get()


def test_nothing_is_kept_of_a_loop_that_has_ended() -> None:
    clients = PerLoop(make, Client.aclose)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(clients.get())
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
    ended = weakref.ref(loop)
    del loop
    gc.collect()
    assert ended() is None


def test_nothing_is_kept_of_a_loop_that_was_closed_without_ending_its_generators() -> None:
    clients = PerLoop(make, Client.aclose)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(clients.get())
    loop.close()
    ended = weakref.ref(loop)
    del loop
    asyncio.run(use(clients))
    gc.collect()
    assert ended() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_starts_anew_and_leaves_the_parents_value_alone() -> None:
    script = """
        import asyncio, os
        from icechunk.runtime.loops import PerLoop
        class Value:
            def __del__(self):
                os.write(1, b"finalised in %s\\n" % (b"parent" if os.getpid() == parent else b"child"))
        parent = os.getpid()
        async def close(value):
            os.write(1, b"closed in %s\\n" % (b"parent" if os.getpid() == parent else b"child"))
        values = PerLoop(Value, close)
        loop = asyncio.new_event_loop()
        mine = id(loop.run_until_complete(values.get()))
        pid = os.fork()
        if pid == 0:
            async def other():
                assert values.peek() is None
                assert id(await values.get()) != mine
            asyncio.run(other())
            os.write(1, b"child done\\n")
            os._exit(0)
        os.waitpid(pid, 0)
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
    """
    lines = _run(script).splitlines()
    assert lines == ["closed in child", "finalised in child", "child done", "closed in parent", "finalised in parent"]


def test_values_of_loops_that_still_run_are_closed_at_exit() -> None:
    script = """
        import asyncio, atexit, threading
        from icechunk.runtime.loops import PerLoop
        async def close(value):
            await asyncio.sleep(0)
            print("closed", value, flush=True)
        names = iter("abc")
        values = PerLoop(lambda: next(names), close)
        running, idle = asyncio.new_event_loop(), asyncio.new_event_loop()
        atexit.register(idle.close)  # runs after the hook, which is registered at first use
        threading.Thread(target=running.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(values.get(), running).result()
        idle.run_until_complete(values.get())
    """
    assert sorted(_run(script).splitlines()) == ["closed a", "closed b"]


def _run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore::ResourceWarning", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_values_of_a_higher_rank_close_first_when_their_loop_ends() -> None:
    order: list[str] = []

    async def close_client(value: str) -> None:
        order.append(value)

    async def close_log(value: str) -> None:
        await asyncio.sleep(0)
        assert await clients.get() == "client"  # still open, and not made anew
        order.append(value)

    clients: PerLoop[str] = PerLoop(lambda: "client", close_client)
    logs: PerLoop[str] = PerLoop(lambda: "log", close_log, rank=1)

    async def use() -> None:
        await clients.get()
        await logs.get()

    asyncio.run(use())
    assert order == ["log", "client"]


async def test_a_value_closed_by_hand_waits_for_no_other() -> None:
    closed: list[str] = []

    async def close(value: str) -> None:
        closed.append(value)

    low: PerLoop[str] = PerLoop(lambda: "low", close)
    high: PerLoop[str] = PerLoop(lambda: "high", close, rank=1)
    await low.get()
    await high.get()
    await low.aclose()
    assert closed == ["low"]
    await high.aclose()


async def test_a_value_that_is_being_closed_is_closed_once_and_every_caller_waits_for_it() -> None:
    gate = asyncio.Event()
    closed: list[str] = []

    async def close(value: str) -> None:
        await gate.wait()
        closed.append(value)

    values: PerLoop[str] = PerLoop(lambda: "value", close)
    await values.get()
    # The loop's entry leaves the object when its closing begins, so the second caller finds it at the same moment.
    callers = [asyncio.ensure_future(values.aclose()) for _ in range(2)]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*callers)
    assert closed == ["value"]


def test_an_abandoned_value_that_the_end_of_the_process_closes_too_makes_no_noise() -> None:
    script = """
import asyncio, threading
from icechunk.runtime import loops

async def close(value):
    await asyncio.sleep(0.01)

loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()
values = loops.PerLoop(lambda: "value", close)
asyncio.run_coroutine_threadsafe(values.get(), loop).result()

loops._abandon(values._entries, __import__("os").getpid())
loops._close_everything()
"""
    done = subprocess.run([sys.executable, "-X", "dev", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def end_of_loop_complaints(main: Coroutine[None, None, None]) -> list[str]:
    """Messages of a loop about the generators that it ends."""
    said: list[str] = []
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _, context: said.append(f"{context['message']}: {context.get('exception')}"))
    loop.run_until_complete(main)
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
    return said


@pytest.mark.parametrize("turns", range(6))
def test_a_loop_that_ends_while_a_value_is_being_closed_waits_for_that(turns: int) -> None:
    closed: list[str] = []

    async def close(value: str) -> None:
        await asyncio.sleep(0.001)
        closed.append(value)

    values: PerLoop[str] = PerLoop(lambda: "value", close)
    tasks: list[asyncio.Task[None]] = []

    async def use() -> None:
        await values.get()
        tasks.append(asyncio.ensure_future(values.aclose()))
        for _ in range(turns):
            await asyncio.sleep(0)

    assert end_of_loop_complaints(use()) == []
    assert closed == ["value"]


@pytest.mark.parametrize("turns", range(6))
def test_an_object_that_goes_as_its_loop_ends_is_closed_without_noise(turns: int) -> None:
    closed: list[str] = []

    async def close(value: str) -> None:
        await asyncio.sleep(0.001)
        closed.append(value)

    async def use() -> None:
        values: PerLoop[str] = PerLoop(lambda: "value", close)
        await values.get()
        del values
        for _ in range(turns):
            await asyncio.sleep(0)

    assert end_of_loop_complaints(use()) == []
    assert closed == ["value"]


def test_a_value_closed_at_the_end_of_a_loop_may_close_values_it_uses() -> None:
    closed: list[str] = []

    async def close_low(value: str) -> None:
        await asyncio.sleep(0)
        closed.append(value)

    async def close_high(value: str) -> None:
        await asyncio.sleep(0)
        await low.aclose()
        closed.append(value)

    low: PerLoop[str] = PerLoop(lambda: "low", close_low)
    high: PerLoop[str] = PerLoop(lambda: "high", close_high, rank=1)

    async def use() -> None:
        await low.get()
        await high.get()

    assert end_of_loop_complaints(use()) == []
    assert closed == ["low", "high"]


def test_values_made_while_a_loop_ends_are_closed_with_it() -> None:
    order: list[str] = []

    async def close_client(value: str) -> None:
        order.append(value)

    async def close_log(value: str) -> None:
        await clients.get()
        await asyncio.sleep(0)
        assert clients.peek() == "client", "it is closed only when nothing can use it any more"
        order.append(value)

    clients: PerLoop[str] = PerLoop(lambda: "client", close_client)
    logs: PerLoop[str] = PerLoop(lambda: "log", close_log, rank=1)
    other: PerLoop[str] = PerLoop(lambda: "other", close_client)

    async def use() -> None:
        await clients.get()
        await logs.get()
        await other.get()
        await clients.aclose()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert end_of_loop_complaints(use()) == []
    assert order[:2] == ["client", "log"]
    assert sorted(order[2:]) == ["client", "other"]


async def test_a_second_close_returns_when_the_value_is_closed() -> None:
    gate = asyncio.Event()

    async def close(value: str) -> None:
        await gate.wait()

    values: PerLoop[str] = PerLoop(lambda: "value", close)
    await values.get()
    first = asyncio.ensure_future(values.aclose())
    await asyncio.sleep(0)
    second = asyncio.ensure_future(values.aclose())
    await asyncio.sleep(0)
    assert not second.done()
    gate.set()
    await asyncio.gather(first, second)


async def test_a_value_may_close_its_own_object_while_it_is_closed() -> None:
    async def close(value: str) -> None:
        await values.aclose()

    values: PerLoop[str] = PerLoop(lambda: "value", close)
    await values.get()
    async with asyncio.timeout(5):
        await values.aclose()
    assert values.peek() is None
