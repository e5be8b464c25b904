"""The put pool: write-behind, bounded, and never losing bytes."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from icechunk.errors import StorageError
from icechunk.runtime.twins import run_sync
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import PutResult, Version
from icechunk.transfer.limiter import READ, WRITE, Gates
from icechunk.transfer.put import PutMemory, PutPool
from tests.raising import raises


class Gated(MemoryStorage):
    """A memory storage whose writes wait for a gate, and fail as often as configured."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.failures = 0
        self.started = 0

    async def put(self, key: str, data: Any, *args: Any, **kwargs: Any) -> PutResult:
        self.started += 1
        while not self.gate.is_set():  # noqa: ASYNC110  # of threads, not of one loop
            await anyio.sleep(0.001)
        if self.failures:
            self.failures -= 1
            raise StorageError(f"no luck with {key}")
        await super().put(key, data)
        return PutResult(version=Version("1"), date_us=None)


def pool(storage: MemoryStorage, *, max_bytes: int = 1000, max_requests: int = 4, patience_s: float = 1.0) -> PutPool:
    return PutPool(storage, memory=PutMemory(max_bytes), gates=Gates(max_requests), patience_s=patience_s)


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(5):
        while not condition():
            await anyio.lowlevel.checkpoint()


async def test_put_returns_before_the_bytes_are_written_and_flush_waits_for_them() -> None:
    storage = Gated()
    puts = pool(storage)
    await puts.put("a", b"1")
    assert puts.pending("a") == b"1"
    flushing = asyncio.ensure_future(puts.flush())
    await anyio.sleep(0.01)
    assert not flushing.done()
    storage.gate.set()
    await flushing
    assert puts.pending("a") is None
    assert (await storage.get("a")).data == b"1"


async def test_full_pool_makes_the_next_put_wait_until_there_is_room() -> None:
    storage = Gated()
    puts = pool(storage, max_bytes=10)
    await puts.put("a", b"x" * 8)
    second = asyncio.ensure_future(puts.put("b", b"y" * 8))
    await anyio.sleep(0.01)
    assert not second.done()
    storage.gate.set()
    await second
    await puts.flush()
    assert (await storage.get("b")).data == b"y" * 8


async def test_object_larger_than_the_bound_is_sent_alone() -> None:
    storage = Gated()
    storage.gate.set()
    puts = pool(storage, max_bytes=10)
    await puts.put("a", b"x" * 100)
    await puts.flush()
    assert (await storage.get("a")).size == 100


async def test_failure_surfaces_once_at_the_next_put_and_flush_tries_again() -> None:
    storage = Gated()
    storage.failures = 1
    storage.gate.set()
    puts = pool(storage)
    await puts.put("a", b"1")
    await until(lambda: storage.failures == 0)
    await anyio.lowlevel.checkpoint()
    with raises(StorageError, "storage-other", "'a'"):
        await puts.put("b", b"2")
    await puts.put("b", b"2")
    await puts.flush()
    assert (await storage.get("a")).data == b"1"
    assert (await storage.get("b")).data == b"2"


async def test_failed_flush_raises_and_keeps_the_bytes_for_the_next() -> None:
    storage = Gated()
    storage.failures = 2
    storage.gate.set()
    puts = pool(storage)
    await puts.put("a", b"1")
    with raises(StorageError, "storage-other", "'a'"):
        await puts.flush()
    assert puts.pending("a") == b"1"
    await puts.flush()
    assert (await storage.get("a")).data == b"1"


async def test_discard_drops_bytes_and_failures() -> None:
    storage = Gated()
    storage.failures = 1
    storage.gate.set()
    puts = pool(storage)
    await puts.put("a", b"1")
    await until(lambda: storage.failures == 0)
    puts.discard()
    await puts.flush()
    assert puts.in_flight == 0


def test_flush_uploads_bytes_that_a_finished_loop_left_behind() -> None:
    storage = Gated()
    puts = pool(storage)
    asyncio.run(puts.put("a", b"1"))
    assert puts.in_flight == 1
    storage.gate.set()
    asyncio.run(puts.flush())
    assert asyncio.run(storage.get("a")).data == b"1"


async def test_synchronous_flush_inside_a_running_loop_does_not_wait_for_that_loop() -> None:
    storage = Gated()
    puts = pool(storage)
    await puts.put("a", b"1")
    storage.gate.set()
    run_sync(puts.flush())
    assert (await storage.get("a")).data == b"1"
    await puts.flush()


def test_flush_waits_for_uploads_that_another_running_loop_started() -> None:
    storage = Gated()
    puts = pool(storage)
    run_sync(puts.put("a", b"1"))

    async def main() -> None:
        flushing = asyncio.ensure_future(puts.flush())
        await until(lambda: storage.started == 1)
        await anyio.sleep(0.01)
        assert not flushing.done()
        storage.gate.set()
        await flushing

    asyncio.run(main())
    assert storage.started == 1
    assert asyncio.run(storage.get("a")).data == b"1"


async def test_cancelled_upload_is_taken_up_by_the_next_flush() -> None:
    storage = Gated()
    puts = pool(storage)
    await puts.put("a", b"1")
    await until(lambda: storage.started == 1)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await anyio.lowlevel.checkpoint()
    storage.gate.set()
    await puts.flush()
    assert (await storage.get("a")).data == b"1"


async def test_cancelled_flush_loses_nothing() -> None:
    storage = Gated()
    puts = pool(storage)
    await puts.put("a", b"1")
    with anyio.move_on_after(0.01):
        await puts.flush()
    storage.gate.set()
    await puts.flush()
    assert (await storage.get("a")).data == b"1"


async def test_a_discarded_upload_that_fails_later_raises_nothing() -> None:
    storage = Gated()
    storage.failures = 1
    puts = pool(storage)
    await puts.put("a", b"1")
    await until(lambda: storage.started == 1)
    puts.discard()
    storage.gate.set()
    await anyio.sleep(0.01)
    storage.failures = 0
    await puts.put("b", b"2")
    await puts.flush()
    assert (await storage.get("b")).data == b"2"


async def test_flush_waits_for_earlier_bytes_only_however_many_follow() -> None:
    storage = Gated()
    puts = pool(storage)
    await puts.put("a", b"1")
    flushing = asyncio.ensure_future(puts.flush())
    await anyio.lowlevel.checkpoint()
    storage.gate.set()
    await until(lambda: puts.in_flight == 0)
    storage.gate.clear()
    await puts.put("b", b"2")
    await asyncio.wait_for(flushing, 5)
    assert puts.in_flight == 1
    storage.gate.set()
    await puts.flush()


async def test_one_slow_upload_does_not_keep_others_waiting_for_room_that_is_there() -> None:
    release = asyncio.Event()

    class OneSlow(MemoryStorage):
        async def put(self, key: str, data: Any, *args: Any, **kwargs: Any) -> PutResult:
            if key == "slow":
                await release.wait()
            return await super().put(key, data)

    storage = OneSlow()
    puts = pool(storage, max_bytes=10)
    await puts.put("slow", b"x" * 2)
    for n in range(20):
        await asyncio.wait_for(puts.put(f"k{n}", b"y" * 5), 5)
    written = [info.key async for page in storage.list_pages() for info in page]
    assert "slow" not in written
    assert len(written) >= 18  # at the most two of five bytes wait in the room that is left
    release.set()
    await puts.flush()
    assert len([info async for page in storage.list_pages() for info in page]) == 21


async def test_the_longest_waiting_write_gets_room_first() -> None:
    storage = Gated()
    puts = pool(storage, max_bytes=10, max_requests=1)
    await puts.put("first", b"x" * 8)
    order: list[str] = []

    async def put(key: str, size: int) -> None:
        await puts.put(key, b"x" * size)
        order.append(key)

    tasks = [asyncio.ensure_future(put(f"{n}", size)) for n, size in enumerate([9, 2, 10, 1])]
    await anyio.lowlevel.checkpoint()
    storage.gate.set()
    await asyncio.wait_for(asyncio.gather(*tasks), 5)
    assert order == ["0", "1", "2", "3"]
    await puts.flush()
    assert puts.held_bytes == 0


async def test_cancelled_waiter_leaves_its_room_to_the_next() -> None:
    storage = Gated()
    puts = pool(storage, max_bytes=10)
    await puts.put("a", b"x" * 8)
    second, third = (asyncio.ensure_future(puts.put(key, b"x" * 8)) for key in "bc")
    await anyio.lowlevel.checkpoint()
    second.cancel()
    storage.gate.set()
    await asyncio.wait_for(third, 5)
    await puts.flush()
    assert puts.held_bytes == 0
    assert (await storage.get("c")).size == 8


@pytest.fixture
def other_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


@pytest.mark.parametrize("how", ["flush", "wait for room"])
async def test_loop_whose_thread_is_blocked_is_not_waited_for(other_loop: asyncio.AbstractEventLoop, how: str) -> None:
    storage = Gated()
    puts = pool(storage, max_bytes=10, patience_s=0.02)
    asyncio.run_coroutine_threadsafe(puts.put("a", b"x" * 8), other_loop).result(5)
    blocked = threading.Event()
    other_loop.call_soon_threadsafe(blocked.wait, 30)
    storage.gate.set()
    try:
        with anyio.fail_after(10):
            if how == "flush":
                await puts.flush()
            else:
                await puts.put("b", b"y" * 8)
            assert (await storage.get("a")).data == b"x" * 8
            await puts.flush()
    finally:
        blocked.set()


async def test_running_loop_is_waited_for_and_its_bytes_are_sent_once(
    other_loop: asyncio.AbstractEventLoop,
) -> None:
    storage = Gated()
    puts = pool(storage, max_bytes=10, patience_s=0.02)
    asyncio.run_coroutine_threadsafe(puts.put("a", b"x" * 8), other_loop).result(5)
    flushing = asyncio.ensure_future(puts.flush())
    waiting = asyncio.ensure_future(puts.put("b", b"y" * 8))
    await anyio.sleep(0.1)
    assert not flushing.done()
    assert not waiting.done()
    storage.gate.set()
    await flushing
    await waiting
    await puts.flush()
    assert storage.started == 2


def test_loop_that_stopped_with_an_upload_under_way_does_not_fill_the_pool_for_ever() -> None:
    storage = Gated()
    puts = pool(storage, max_bytes=10)
    stopped = asyncio.new_event_loop()
    stopped.run_until_complete(puts.put("a", b"x" * 8))
    storage.gate.set()

    async def main() -> None:
        with anyio.fail_after(10):
            await puts.put("b", b"y" * 8)
            await puts.flush()

    asyncio.run(main())
    assert asyncio.run(storage.get("a")).size == 8
    for task in asyncio.all_tasks(stopped):
        task.cancel()
    stopped.run_until_complete(asyncio.sleep(0))
    stopped.close()


def test_interrupt_during_an_upload_reaches_the_program_and_the_bytes_stay() -> None:
    class Interrupted(MemoryStorage):
        interrupts = 1

        async def put(self, key: str, data: Any, *args: Any, **kwargs: Any) -> PutResult:
            if self.interrupts:
                self.interrupts -= 1
                raise KeyboardInterrupt
            return await super().put(key, data)

    storage = Interrupted()
    puts = pool(storage)

    async def main() -> None:
        await puts.put("a", b"1")
        await anyio.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert puts.pending("a") == b"1"
    asyncio.run(puts.flush())
    assert asyncio.run(storage.get("a")).data == b"1"


# -- several sessions of one repository --------------------------------------------------------------------------------


def shared(storage: MemoryStorage, n: int, *, max_bytes: int) -> list[PutPool]:
    memory, gates = PutMemory(max_bytes), Gates(4)
    return [PutPool(storage, memory=memory, gates=gates, patience_s=0.02) for _ in range(n)]


async def test_sessions_share_one_bound_on_bytes() -> None:
    storage = Gated()
    first, second = shared(storage, 2, max_bytes=10)
    await first.put("a", b"x" * 8)
    waiting = asyncio.ensure_future(second.put("b", b"y" * 8))
    await anyio.sleep(0.01)
    assert not waiting.done()
    assert (first.held_bytes, second.held_bytes) == (8, 0)
    storage.gate.set()
    await waiting
    await second.flush()
    assert first.held_bytes == second.held_bytes == 0


async def test_sessions_share_one_bound_on_requests() -> None:
    storage = Gated()
    pools = shared(storage, 3, max_bytes=1000)
    for n, puts in enumerate(pools):
        for i in range(4):
            await puts.put(f"{n}/{i}", b"x")
    await anyio.sleep(0.01)
    assert storage.started == 4
    storage.gate.set()
    for puts in pools:
        await puts.flush()


async def test_bytes_held_back_by_another_session_are_sent_when_room_is_needed() -> None:
    storage = Gated()
    storage.gate.set()
    idle, busy = shared(storage, 2, max_bytes=10)
    await idle.reserve(8)

    class HoldsBack:
        def send_held_back(self) -> None:
            idle.take("held back", b"x" * 8)

    holder = HoldsBack()
    idle.holds_back(holder)
    with anyio.fail_after(5):
        await busy.put("b", b"y" * 8)
    assert (await storage.get("held back")).size == 8
    await busy.flush()


async def test_failed_bytes_of_another_session_are_tried_again_and_then_the_error_says_why_there_is_no_room() -> None:
    storage = Gated()
    storage.gate.set()
    storage.failures = 2
    unlucky, other = shared(storage, 2, max_bytes=10)
    await unlucky.put("a", b"x" * 8)
    await until(lambda: storage.failures == 1)
    with anyio.fail_after(5), raises(StorageError, "storage-other", "'a'"):
        await other.put("b", b"y" * 8)
    with anyio.fail_after(5):
        await other.put("b", b"y" * 8)
    await unlucky.flush()
    await other.flush()
    assert (await storage.get("a")).size == (await storage.get("b")).size == 8


async def test_a_session_that_finds_room_does_not_get_the_error_of_another() -> None:
    storage = Gated()
    storage.gate.set()
    storage.failures = 1
    unlucky, other = shared(storage, 2, max_bytes=100)
    await unlucky.put("a", b"x" * 8)
    await until(lambda: unlucky.has_pending_errors)
    await other.put("b", b"y" * 8)
    await other.flush()
    with raises(StorageError, "storage-other", "'a'"):
        await unlucky.put("c", b"z")
    await unlucky.flush()


async def test_room_of_a_session_that_was_dropped_comes_back() -> None:
    storage = Gated()
    storage.gate.set()
    dropped, other = shared(storage, 2, max_bytes=10)
    await dropped.reserve(8)
    waiting = asyncio.ensure_future(other.put("b", b"y" * 8))
    await anyio.sleep(0.01)
    assert not waiting.done()
    del dropped
    gc.collect()
    with anyio.fail_after(20):
        await waiting
    await other.flush()


async def test_reads_go_in_by_turns_with_a_queue_of_writes() -> None:
    gates = Gates(1)
    gate = gates.here()
    assert gate.try_enter()
    order: list[str] = []

    async def visit(name: str, kind: int) -> None:
        await gate.enter(1, kind)
        order.append(name)
        gate.leave(1)

    writes = [asyncio.ensure_future(visit("write", WRITE)) for _ in range(5)]
    await anyio.lowlevel.checkpoint()
    read = asyncio.ensure_future(visit("read", READ))
    await anyio.lowlevel.checkpoint()
    gate.leave()
    await asyncio.gather(*writes, read)
    assert order.index("read") <= 1
