"""The fetch pool: bounded and shared reads."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.errors import InvalidInputError, ObjectNotFoundError, StorageError
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import ByteRange, GetResult, Range
from icechunk.transfer.fetch import FetchPool, Splitting
from icechunk.transfer.limiter import Gate
from tests.raising import raises


class Slow(MemoryStorage):
    """Counts reads, and holds them until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.release = asyncio.Event()
        self.reads = 0
        self.now = 0
        self.most = 0

    async def get(self, *args: Any, **kwargs: Any) -> GetResult:
        self.reads += 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.release.wait()
            return await super().get(*args, **kwargs)
        finally:
            self.now -= 1


async def slow(**objects: bytes) -> Slow:
    storage = Slow()
    for key, data in objects.items():
        await storage.put(key, data)
    return storage


async def test_same_bytes_at_the_same_time_are_one_request() -> None:
    storage = await slow(a=b"12345")
    pool = FetchPool(storage, Gate(8))
    reads = [asyncio.ensure_future(pool.get("a", Range(1, 3))) for _ in range(5)]
    await anyio.lowlevel.checkpoint()
    storage.release.set()
    assert await asyncio.gather(*reads) == [b"23"] * 5
    assert storage.reads == 1


async def test_callers_are_woken_in_the_order_in_which_they_joined() -> None:
    storage = await slow(a=b"12345")
    pool = FetchPool(storage, Gate(8))
    woken: list[int] = []

    async def read(n: int) -> None:
        await pool.get("a", Range(1, 3))
        woken.append(n)

    reads = [asyncio.ensure_future(read(n)) for n in range(50)]
    await anyio.lowlevel.checkpoint()
    storage.release.set()
    await asyncio.gather(*reads)
    assert woken == list(range(50))


async def test_different_ranges_are_different_requests() -> None:
    storage = await slow(a=b"12345")
    storage.release.set()
    pool = FetchPool(storage, Gate(8))
    assert [*await asyncio.gather(pool.get("a", Range(0, 1)), pool.get("a", Range(1, 2)))] == [b"1", b"2"]
    assert storage.reads == 2


async def test_no_more_requests_than_allowed_are_in_flight() -> None:
    storage = await slow(**{f"k{i}": b"x" for i in range(20)})
    pool = FetchPool(storage, Gate(3))
    reads = [asyncio.ensure_future(pool.get(f"k{i}")) for i in range(20)]
    await anyio.sleep(0.01)
    storage.release.set()
    await asyncio.gather(*reads)
    assert storage.most == 3


async def test_a_waiter_gets_the_result_after_the_first_caller_was_cancelled() -> None:
    storage = await slow(a=b"1")
    pool = FetchPool(storage, Gate(8))
    first = asyncio.ensure_future(pool.get("a"))
    await anyio.lowlevel.checkpoint()
    second = asyncio.ensure_future(pool.get("a"))
    await anyio.lowlevel.checkpoint()
    first.cancel()
    await anyio.lowlevel.checkpoint()
    storage.release.set()
    assert await second == b"1"
    assert storage.reads == 1


async def test_request_is_cancelled_with_its_last_waiter_and_can_be_made_again() -> None:
    storage = await slow(a=b"1")
    pool = FetchPool(storage, Gate(8))
    only = asyncio.ensure_future(pool.get("a"))
    async with asyncio.timeout(5):
        while storage.now != 1:
            await anyio.lowlevel.checkpoint()
    only.cancel()
    await asyncio.wait([only])
    async with asyncio.timeout(5):
        while storage.now:
            await anyio.lowlevel.checkpoint()
    storage.release.set()
    assert await pool.get("a") == b"1"


async def test_an_error_reaches_every_waiter() -> None:
    storage = await slow()
    storage.release.set()
    pool = FetchPool(storage, Gate(8))
    results = await asyncio.gather(pool.get("a"), pool.get("a"), return_exceptions=True)
    assert [type(error) for error in results] == [ObjectNotFoundError] * 2
    with pytest.raises(ObjectNotFoundError):
        await pool.get("a")


async def test_long_range_is_read_in_equal_parts_with_no_more_in_flight_than_allowed() -> None:
    data = bytes(range(250))
    storage = await slow(a=data)
    pool = FetchPool(storage, Gate(8), splitting=Splitting(part_bytes=50, max_requests=3))
    reading = asyncio.ensure_future(pool.get("a", Range(0, 240)))
    await anyio.sleep(0.01)
    assert storage.now == 3
    storage.release.set()
    assert await reading == data[:240]
    assert storage.reads == 5
    assert storage.most == 3


async def test_parts_are_of_one_version_or_an_error() -> None:
    class Changing(MemoryStorage):
        async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
            found = await super().get(key, byte_range)
            await self.put(key, b"y" * 30)
            return found

    storage = Changing()
    await storage.put("a", b"x" * 30)
    pool = FetchPool(storage, Gate(8), splitting=Splitting(part_bytes=10, max_requests=3))
    with raises(StorageError, "object-store", "'a'", 3):
        await pool.get("a", Range(0, 30))


async def test_parts_that_lack_bytes_are_an_error() -> None:
    class Short(MemoryStorage):
        async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
            found = await super().get(key, byte_range)
            return replace(found, body=found.data[:-1])

    storage = Short()
    await storage.put("a", b"x" * 30)
    pool = FetchPool(storage, Gate(8), splitting=Splitting(part_bytes=10, max_requests=3))
    with raises(StorageError, "object-store", 27, 30):
        await pool.get("a", Range(0, 30))


@pytest.mark.parametrize("size", [15, 20, 21, 35])
async def test_parts_beyond_the_end_of_the_object_are_left_out(size: int) -> None:
    storage = await slow(a=bytes(range(size)))
    storage.release.set()
    pool = FetchPool(storage, Gate(8), splitting=Splitting(part_bytes=10, max_requests=3))
    assert await pool.get("a", Range(5, 35)) == bytes(range(5, size))
    with pytest.raises(InvalidInputError):
        await pool.get("a", Range(size, size + 30))


def test_a_waiter_gets_the_result_after_the_cancel_scope_of_the_first_caller() -> None:
    async def main() -> None:
        storage = await slow(a=b"1")
        gate = Gate(8)
        pool = FetchPool(storage, gate)
        found: list[bytes] = []

        async def read() -> None:
            found.append(await pool.get("a"))

        async with anyio.create_task_group() as group:
            with anyio.move_on_after(0.01):
                group.start_soon(read)
                await pool.get("a")
            storage.release.set()
        assert found == [b"1"]
        assert (storage.reads, gate.requests) == (1, 0)

    anyio.run(main)


@settings(max_examples=80)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from([None, Range(0, 3), Range(0, 20)]), st.integers(0, 9)),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_no_waiter_is_lost_and_no_task_is_left_after_any_cancellation(
    reads: list[tuple[str, Range | None, int]], places: int, chance: random.Random
) -> None:
    async def main() -> None:
        storage = await slow(a=b"a" * 20, b=b"b" * 20, c=b"c" * 20)
        storage.release.set()
        gate = Gate(places)
        pool = FetchPool(storage, gate, splitting=Splitting(part_bytes=7, max_requests=2))
        tasks: dict[asyncio.Task[bytes], bytes] = {}
        cancelled = set()
        for key, byte_range, turns in reads:
            task = asyncio.ensure_future(pool.get(key, byte_range))
            tasks[task] = key.encode() * (20 if byte_range is None or byte_range.end is None else byte_range.end)
            for _ in range(turns):
                await asyncio.sleep(0)
                if chance.random() < 0.3:
                    victim = chance.choice(list(tasks))
                    if victim.cancel():
                        cancelled.add(victim)
        async with asyncio.timeout(10):
            await asyncio.wait(tasks)
        for task, expected in tasks.items():
            if not task.cancelled():
                assert task.result() == expected
            else:
                assert task in cancelled
        for _ in range(8):
            await asyncio.sleep(0)
        assert (gate.requests, gate.bytes, storage.now) == (0, 0, 0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
