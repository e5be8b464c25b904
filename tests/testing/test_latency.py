from __future__ import annotations

import time

import pytest

from icechunk.errors import InvalidInputError
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import Storage
from icechunk.testing.latency import LatencyStorage
from icechunk.testing.storage_contract import StorageContract


class TestLatencyContract(StorageContract):
    @pytest.fixture
    def storage(self) -> Storage:
        return LatencyStorage(MemoryStorage())


async def test_reads_and_writes_take_at_least_their_time_and_that_may_change() -> None:
    storage = LatencyStorage(MemoryStorage(), write_latency_ms=20)
    began = time.monotonic()
    await storage.put("x", b"1")
    assert time.monotonic() - began >= 0.018
    storage.write_latency_ms, storage.read_latency_ms = 0, 20
    began = time.monotonic()
    await storage.get("x")
    assert time.monotonic() - began >= 0.018
    assert (storage.write_latency_ms, storage.read_latency_ms) == (0, 20)
    with pytest.raises(InvalidInputError):
        storage.read_latency_ms = -1
