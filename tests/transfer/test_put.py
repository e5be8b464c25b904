"""The put pool: write-behind, bounded, and never losing bytes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from icechunk.errors import StorageError
from icechunk.storage.base import PutResult, Version
from icechunk.storage.memory import MemoryStorage
from icechunk.sync import run_sync
from icechunk.transfer.put import PutPool


class Gated(MemoryStorage):
    """A memory storage whose writes wait for a gate, and fail as often as told."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.failures = 0
        self.started = 0

    async def put(self, key: str, data: Any, *args: Any, **kwargs: Any) -> PutResult:
        self.started += 1
        while not self.gate.is_set():
            await anyio.sleep(0.001)
        if self.failures:
            self.failures -= 1
            raise StorageError(f"no luck with {key}")
        await super().put(key, data)
        return PutResult(version=Version("1"), date_us=None)


def pool(storage: MemoryStorage, **kwargs: int) -> PutPool:
    return PutPool(storage, **{"max_bytes": 1000, "max_requests": 4, **kwargs})


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


async def test_object_larger_than_the_bound_travels_alone() -> None:
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
    with pytest.raises(StorageError, match=r"'a'.*no luck"):
        await puts.put("b", b"2")
    await puts.put("b", b"2")
    await puts.flush()
    assert (await storage.get("a")).data == b"1"
    assert (await storage.get("b")).data == b"2"


async def test_flush_that_fails_says_so_and_keeps_the_bytes_for_the_next() -> None:
    storage = Gated()
    storage.failures = 2
    storage.gate.set()
    puts = pool(storage)
    await puts.put("a", b"1")
    with pytest.raises(StorageError, match="nothing was committed"):
        await puts.flush()
    assert puts.pending("a") == b"1"
    await puts.flush()
    assert (await storage.get("a")).data == b"1"


async def test_discard_forgets_bytes_and_failures() -> None:
    storage = Gated()
    storage.failures = 1
    storage.gate.set()
    puts = pool(storage)
    await puts.put("a", b"1")
    await until(lambda: storage.failures == 0)
    puts.discard()
    await puts.flush()
    assert puts.in_flight == 0


def test_flush_uploads_what_a_finished_loop_left_behind() -> None:
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
