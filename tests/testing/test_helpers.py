from __future__ import annotations

import asyncio

import pytest

from icechunk.errors import PreconditionFailedError, StorageError
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import Absent, Storage
from icechunk.testing.faulty import Fault, FaultyStorage, scripted, seeded
from icechunk.testing.recording import RecordingStorage
from icechunk.testing.storage_contract import StorageContract, list_all
from tests.raising import raises


class TestRecordingContract(StorageContract):
    @pytest.fixture
    def storage(self) -> Storage:
        return RecordingStorage(MemoryStorage())


class TestFaultyContractWithoutFaults(StorageContract):
    @pytest.fixture
    def storage(self) -> Storage:
        return FaultyStorage(MemoryStorage())


async def test_requests_that_fly_together_are_one_round() -> None:
    storage = RecordingStorage(MemoryStorage())

    async def slow_starter(n: int) -> None:
        for _ in range(n):
            await asyncio.sleep(0)
        await storage.put(f"x{n}", b"abc")

    await asyncio.gather(*(slow_starter(n) for n in range(10)))
    assert storage.dependent_rounds() == 1
    await storage.get("x0")
    await asyncio.gather(storage.head("x1"), storage.head("x2"))
    assert storage.dependent_rounds() == 3
    assert (storage.count(), storage.count("put"), storage.count("head", "x1")) == (13, 10, 1)
    assert storage.requests[0].size == 3
    storage.clear()
    assert storage.dependent_rounds() == 0


async def test_two_chains_side_by_side_cost_the_longer_one() -> None:
    storage = RecordingStorage(MemoryStorage())

    async def chain(length: int) -> None:
        for n in range(length):
            await storage.put(f"{length}/{n}", b"")

    await asyncio.gather(chain(2), chain(4))
    assert storage.dependent_rounds() == 4


async def test_each_fault_has_its_effect() -> None:
    inner = MemoryStorage()
    faults = [Fault.FAIL_BEFORE, Fault.LOSE_ANSWER, Fault.LATE, Fault.DUPLICATE]
    storage = FaultyStorage(inner, scripted({("put", n): fault for n, fault in enumerate(faults)}))
    for key in ("before", "lost", "late"):
        with raises(StorageError, "object-store", repr(key)):
            await storage.put(key, b"1", Absent())
    await storage.put("double", b"1")
    assert [info.key for info in await list_all(inner)] == ["double", "lost"]
    await inner.delete(["double"])
    assert await storage.deliver() == [True, True]
    assert [info.key for info in await list_all(inner)] == ["double", "late", "lost"]


async def test_a_late_creation_lands_only_in_an_empty_place() -> None:
    storage = FaultyStorage(MemoryStorage(), scripted({("put", 0): Fault.LATE}))
    with pytest.raises(StorageError):
        await storage.put("slot", b"late", Absent())
    await storage.put("slot", b"other", Absent())
    assert await storage.deliver() == [False]
    assert (await storage.get("slot")).data == b"other"
    with pytest.raises(PreconditionFailedError):
        await storage.put("slot", b"late", Absent())


async def test_the_same_seed_gives_the_same_faults() -> None:
    async def run(seed: int) -> list[str]:
        storage = FaultyStorage(MemoryStorage(), seeded(seed, 0.5))
        outcomes = []
        for n in range(50):
            try:
                await storage.put(f"{n}", b"")
                outcomes.append("ok")
            except StorageError:
                outcomes.append("error")
        return outcomes

    assert await run(7) == await run(7)
    assert await run(7) != await run(8)
