"""The fetch pool: bounded and shared reads."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from icechunk.errors import ObjectNotFoundError
from icechunk.storage.base import GetResult, Range
from icechunk.storage.memory import MemoryStorage
from icechunk.transfer.fetch import FetchPool
from icechunk.transfer.gate import Gate


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


async def test_different_ranges_are_different_requests() -> None:
    storage = await slow(a=b"12345")
    storage.release.set()
    pool = FetchPool(storage, Gate(8))
    assert await asyncio.gather(pool.get("a", Range(0, 1)), pool.get("a", Range(1, 2))) == [b"1", b"2"]
    assert storage.reads == 2


async def test_no_more_requests_than_allowed_are_in_flight() -> None:
    storage = await slow(**{f"k{i}": b"x" for i in range(20)})
    pool = FetchPool(storage, Gate(3))
    reads = [asyncio.ensure_future(pool.get(f"k{i}")) for i in range(20)]
    await anyio.sleep(0.01)
    storage.release.set()
    await asyncio.gather(*reads)
    assert storage.most == 3


async def test_waiter_survives_the_cancellation_of_the_one_who_started() -> None:
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
    await anyio.sleep(0.001)
    assert storage.now == 1
    only.cancel()
    await asyncio.wait([only])
    await anyio.sleep(0.001)
    assert storage.now == 0
    storage.release.set()
    assert await pool.get("a") == b"1"


async def test_error_reaches_everybody_who_waits() -> None:
    storage = await slow()
    storage.release.set()
    pool = FetchPool(storage, Gate(8))
    results = await asyncio.gather(pool.get("a"), pool.get("a"), return_exceptions=True)
    assert [type(error) for error in results] == [ObjectNotFoundError] * 2
    with pytest.raises(ObjectNotFoundError):
        await pool.get("a")
