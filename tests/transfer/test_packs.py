"""Packs: small chunks share objects, and every byte is found before, during and after its upload."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.errors import SessionStateError, StorageError
from icechunk.format.ids import ObjectId
from icechunk.format.keys import chunk_key
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import PutResult, Range
from icechunk.transfer.limiter import Gates
from icechunk.transfer.packs import Packs
from icechunk.transfer.put import PutMemory, PutPool
from tests.raising import raises


class Unreliable(MemoryStorage):
    """Writes take some turns of the loop, and fail as drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: Callable[[], int] = lambda: 0
        self.fails: Callable[[], bool] = lambda: False
        self.sizes: list[int] = []

    async def put(self, key: str, data: Any, *args: Any, **kwargs: Any) -> PutResult:
        for _ in range(self.turns()):
            await asyncio.sleep(0)
        if self.fails():
            raise StorageError(f"no luck with {key}")
        self.sizes.append(len(data))
        return await super().put(key, data)


def packs_on(
    storage: MemoryStorage, *, max_bytes: int = 10**9, threshold: int = 100, size: int = 256
) -> tuple[Packs, PutPool]:
    ids = itertools.count(1)
    pool = PutPool(storage, memory=PutMemory(max_bytes), gates=Gates(4), patience_s=60)
    packs = Packs(pool, lambda: ObjectId(next(ids).to_bytes(12)), threshold_bytes=threshold, size_bytes=size)
    return packs, pool


async def find(packs: Packs, storage: MemoryStorage, place: tuple[ObjectId, int], length: int) -> bytes:
    waiting = packs.pending(*place, length)
    if waiting is not None:
        return waiting
    id, offset = place
    return (await storage.get(chunk_key(id), Range(offset, offset + length))).data


operations = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 9), st.integers(1, 150)),
        st.tuples(st.just("read"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("flush"), st.just(0), st.just(0)),
        st.tuples(st.just("wait"), st.just(0), st.integers(1, 5)),
    ),
    max_size=60,
)


@settings(max_examples=150)
@given(
    operations=operations,
    seed=st.integers(0, 2**32),
    failure_rate=st.sampled_from([0.0, 0.3]),
    max_bytes=st.sampled_from([1, 200, 600, 10**6]),
    threshold=st.sampled_from([0, 60, 1000]),
)
def test_any_sequence_of_puts_reads_and_flushes_returns_exactly_the_newest_bytes(
    operations: list[tuple[str, int, int]], seed: int, failure_rate: float, max_bytes: int, threshold: int
) -> None:
    generator = random.Random(seed)

    async def main() -> None:
        storage = Unreliable()
        storage.turns = lambda: generator.randrange(4)
        storage.fails = lambda: generator.random() < failure_rate
        packs, pool = packs_on(storage, max_bytes=max_bytes, threshold=threshold)
        model: dict[int, tuple[tuple[ObjectId, int], bytes]] = {}
        for what, name, n in operations:
            try:
                match what:
                    case "put":
                        data = generator.randbytes(n)
                        model[name] = (await packs.put(data), data)
                    case "read" if name in model:
                        place, data = model[name]
                        assert await find(packs, storage, place, len(data)) == data
                    case "flush":
                        await packs.flush()
                        assert (pool.in_flight, pool.held_bytes) == (0, 0)
                    case "wait":
                        for _ in range(n):
                            await asyncio.sleep(0)
            except StorageError:
                assert failure_rate
            assert pool.held_bytes <= max(max_bytes, 150)
        storage.fails = lambda: False
        await packs.flush()
        assert (pool.in_flight, pool.held_bytes) == (0, 0)
        for place, data in model.values():
            assert packs.pending(*place, len(data)) is None
            assert await find(packs, storage, place, len(data)) == data

    async def bounded() -> None:
        async with asyncio.timeout(20):
            await main()

    asyncio.run(bounded())


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 150), min_size=1, max_size=60),
    cancelled=st.lists(st.tuples(st.integers(0, 59), st.integers(0, 6)), max_size=12),
    seed=st.integers(0, 2**32),
    max_bytes=st.sampled_from([1, 300, 10**6]),
)
def test_concurrent_writers_some_of_them_cancelled_lose_nothing_and_leak_no_room(
    sizes: list[int], cancelled: list[tuple[int, int]], seed: int, max_bytes: int
) -> None:
    generator = random.Random(seed)

    async def main() -> None:
        storage = Unreliable()
        storage.turns = lambda: generator.randrange(5)
        packs, pool = packs_on(storage, max_bytes=max_bytes)

        async def write(size: int) -> tuple[tuple[ObjectId, int], bytes]:
            data = generator.randbytes(size)
            place = await packs.put(data)
            assert pool.held_bytes <= max(max_bytes, 150)
            return place, data

        tasks = [asyncio.ensure_future(write(size)) for size in sizes]
        for n, turns in cancelled:
            for _ in range(turns):
                await asyncio.sleep(0)
            tasks[n % len(tasks)].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await packs.flush()
        assert (pool.in_flight, pool.held_bytes) == (0, 0)
        for result in results:
            if not isinstance(result, asyncio.CancelledError):
                assert not isinstance(result, BaseException), result
                place, data = result
                assert await find(packs, storage, place, len(data)) == data

    async def bounded() -> None:
        async with asyncio.timeout(20):
            await main()

    asyncio.run(bounded())


async def test_hundreds_of_small_chunks_are_a_few_objects() -> None:
    storage = Unreliable()
    packs, _ = packs_on(storage, size=1000)
    for _ in range(100):
        await packs.put(b"x" * 50)
    await packs.flush()
    assert storage.sizes == [1000] * 5


async def test_chunks_of_the_threshold_and_above_have_objects_of_their_own() -> None:
    storage = Unreliable()
    packs, _ = packs_on(storage)
    places = [await packs.put(b"x" * 100), await packs.put(b"y" * 99), await packs.put(b"z" * 101)]
    assert [offset for _, offset in places] == [0, 0, 0]
    await packs.flush()
    assert sorted(storage.sizes) == [99, 100, 101]


async def test_writer_that_outruns_the_storage_still_fills_its_packs() -> None:
    storage = Unreliable()
    storage.turns = lambda: 50
    packs, _ = packs_on(storage, max_bytes=4000, size=1000)
    todo = iter(range(800))

    async def worker() -> None:
        for _ in todo:
            await packs.put(b"x" * 50)

    async with asyncio.timeout(20):
        await asyncio.gather(*[worker() for _ in range(10)])
        await packs.flush()
    assert len(storage.sizes) <= 44


async def test_discarded_pack_is_never_uploaded_and_leaves_no_room_taken() -> None:
    storage = Unreliable()
    packs, pool = packs_on(storage)
    await packs.put(b"x" * 50)
    packs.discard()
    await packs.flush()
    assert (storage.sizes, pool.held_bytes) == ([], 0)


async def test_pool_full_of_failures_refuses_more_until_storage_is_well_again() -> None:
    storage = Unreliable()
    storage.fails = lambda: True
    packs, pool = packs_on(storage, max_bytes=500, size=100)
    taken, refused = [], 0
    async with asyncio.timeout(20):
        for n in range(100):
            data = n.to_bytes(50)
            try:
                taken.append((await packs.put(data), data))
            except StorageError:
                refused += 1
            assert pool.held_bytes <= 500
        assert refused > 80
        storage.fails = lambda: False
        await packs.flush()
    for place, data in taken:
        assert await find(packs, storage, place, len(data)) == data


def test_threads_share_packs_and_read_their_writes_while_one_of_them_flushes() -> None:
    storage = Unreliable()
    storage.turns = lambda: 1
    packs, pool = packs_on(storage, max_bytes=3000, size=500)
    failures: list[BaseException] = []

    async def work(seed: int) -> None:
        generator = random.Random(seed)
        async with asyncio.timeout(30):
            places = []
            for n in range(150):
                data = generator.randbytes(generator.randrange(1, 99))
                places.append((await packs.put(data), data))
                place, data = generator.choice(places)
                assert await find(packs, storage, place, len(data)) == data
                if n % 50 == seed:
                    await packs.flush()
            await packs.flush()
            for place, data in places:
                assert await find(packs, storage, place, len(data)) == data

    def run(seed: int) -> None:
        try:
            asyncio.run(work(seed))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    asyncio.run(packs.flush())
    assert (pool.in_flight, pool.held_bytes) == (0, 0)


async def test_packs_refuse_to_work_in_a_forked_child(monkeypatch: pytest.MonkeyPatch) -> None:
    packs, _ = packs_on(MemoryStorage())
    place = await packs.put(b"x" * 50)
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    with raises(SessionStateError, "commit-not-allowed"):
        await packs.put(b"y")
    with raises(SessionStateError, "commit-not-allowed"):
        await packs.flush()
    assert packs.pending(*place, 50) == b"x" * 50
