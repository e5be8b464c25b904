"""Requests that are stuck: they hold up neither their own caller nor any other for long, and few are sent twice."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from icechunk.errors import StorageError
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.patience import Recent, watching
from icechunk.storage.port import ByteRange, GetResult, Octets, Range
from icechunk.storage.retry import repeats_so_far
from icechunk.transfer import fetch
from icechunk.transfer.assets import Assets, Reads
from icechunk.transfer.blocks import BlockReader
from icechunk.transfer.fetch import NEVER, FetchPool
from icechunk.transfer.limiter import Gate, Gates
from tools.simulator.loop import VirtualLoop

SILENT_S = 60.0
"""The longest time that a server may be silent."""


class Slow(MemoryStorage):
    """Takes as many virtual seconds for each read as planned, else as usual; fails after a silence of a minute."""

    def __init__(self, usual_s: float = 0.05) -> None:
        super().__init__()
        self.usual_s = usual_s
        self.plan: list[float] = []
        self.requests = 0
        self.now = 0

    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        self.requests += 1
        self.now += 1
        took_s = self.plan.pop(0) if self.plan else self.usual_s
        try:
            await asyncio.sleep(min(took_s, SILENT_S))
            if took_s >= SILENT_S:
                raise StorageError("silence")
            return await super().get(key, byte_range)
        finally:
            self.now -= 1


def now() -> float:
    return asyncio.get_running_loop().time()


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def watched() -> None:
        await main()
        for _ in range(3):
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(watched())


async def pool_of(storage: Slow, *, warm: int = 0, **options: Any) -> FetchPool:
    await storage.put("a", bytes(range(100)))
    pool = FetchPool(storage, Gate(64), **options)
    for _ in range(warm):
        await pool.get("a", Range(0, 1))
    storage.requests = 0
    return pool


@pytest.mark.parametrize(("warm", "within_s"), [(0, 5.2), (20, 1.2)])
@pytest.mark.parametrize("wanted", [Range(0, 3), None])
def test_read_whose_request_is_stuck_is_sent_again_as_soon_as_that_is_probable(
    warm: int, within_s: float, wanted: Range | None
) -> None:
    async def main() -> None:
        storage = Slow()
        pool = await pool_of(storage, warm=warm)
        before = repeats_so_far().hedged
        storage.plan = [SILENT_S]
        began = now()
        assert await pool.get("a", wanted) == bytes(range(100))[slice(0, 3) if wanted else slice(None)]
        assert now() - began < (within_s if wanted else 5.2)
        assert (storage.requests, storage.now) == (2, 0)
        assert repeats_so_far().hedged >= before + 1

    run(main)


def test_next_caller_sends_its_own_request_and_those_that_joined_the_stuck_one_get_its_answer() -> None:
    async def main() -> None:
        storage = Slow()
        pool = await pool_of(storage, warm=20, hedge_percentile=NEVER)
        storage.plan = [SILENT_S]
        joined = [asyncio.ensure_future(pool.get("a", Range(0, 2))) for _ in range(3)]
        await asyncio.sleep(2)
        assert storage.requests == 1
        began = now()
        assert await pool.get("a", Range(0, 2)) == b"\0\1"
        assert now() - began < 0.1
        assert await asyncio.gather(*joined) == [b"\0\1"] * 3
        assert now() - began < 0.1
        await asyncio.sleep(0)
        assert (storage.requests, storage.now) == (2, 0)

    run(main)


def test_next_caller_after_a_cancellation_sends_its_own_request_at_once() -> None:
    async def main() -> None:
        storage = Slow()
        pool = await pool_of(storage)
        storage.plan = [SILENT_S]
        reading = asyncio.ensure_future(pool.get("a", Range(0, 2)))
        await asyncio.sleep(0.1)
        reading.cancel()
        await asyncio.wait([reading])
        began = now()
        assert await pool.get("a", Range(0, 2)) == b"\0\1"
        assert now() - began < 0.1

    run(main)


class Streaming(Slow):
    """Reports its bytes as they come, ten times in the usual time."""

    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        self.requests += 1
        silent = self.plan.pop(0) if self.plan else 0.0
        watch = watching.get()
        assert watch is not None
        recent = Recent()
        recent.add(0.01)
        for _ in range(10):
            watch.note(now(), recent)
            await asyncio.sleep(silent or self.usual_s / 10)
        return await MemoryStorage.get(self, key, byte_range)


@pytest.mark.parametrize("hedge_percentile", [None, NEVER])
def test_answer_that_comes_slowly_is_joined_and_not_repeated(hedge_percentile: int | None) -> None:
    async def main() -> None:
        storage = Streaming(usual_s=4.0)
        pool = await pool_of(storage, hedge_percentile=hedge_percentile)
        first = asyncio.ensure_future(pool.get("a"))
        await asyncio.sleep(3.0)
        assert await pool.get("a") == await first == bytes(range(100))
        assert storage.requests == 1

    run(main)


def test_silence_decides_as_soon_as_the_storage_reports_its_bytes() -> None:
    async def main() -> None:
        storage = Streaming()
        pool = await pool_of(storage)
        storage.plan = [SILENT_S]
        began = now()
        assert await pool.get("a", Range(0, 4 << 20)) == bytes(range(100))
        assert 2.0 <= now() - began < 2.2

    run(main)


@pytest.mark.parametrize("hedge_percentile", [None, NEVER])
def test_request_that_a_reader_left_is_not_joined_by_the_next(hedge_percentile: int | None) -> None:
    async def main() -> None:
        storage = Slow()
        pool = await pool_of(storage, hedge_percentile=hedge_percentile)
        blocks = BlockReader(pool)
        reads: list[Callable[[], Awaitable[Octets]]] = [
            lambda: pool.get("a", Range(0, 5)),
            lambda: blocks.read("a", 0, 5),
        ]
        for read in reads:
            storage.requests = 0
            storage.plan = [SILENT_S]
            first, second = asyncio.ensure_future(read()), asyncio.ensure_future(read())
            await asyncio.sleep(0.01)
            assert storage.requests == 1
            first.cancel()
            await asyncio.wait([first])
            began = now()
            assert await read() == await second == bytes(range(5))
            assert storage.requests == 2
            assert now() - began == pytest.approx(0.05)

    run(main)


def test_reader_that_joined_a_silent_request_sends_its_own_soon() -> None:
    async def main() -> None:
        storage = Slow()
        pool = await pool_of(storage)
        before = repeats_so_far().hedged
        storage.plan = [SILENT_S]
        first = asyncio.ensure_future(pool.get("a", Range(0, 2)))
        await asyncio.sleep(0.1)
        began = now()
        assert await pool.get("a", Range(0, 2)) == await first == b"\0\1"
        assert now() - began < 0.6
        assert (storage.requests, repeats_so_far().hedged - before) == (2, 1)

    run(main)


def test_request_that_waits_for_its_turn_is_joined_however_long_that_takes() -> None:
    async def main() -> None:
        storage = Slow(usual_s=3.0)
        await storage.put("a", bytes(10))
        pool = FetchPool(storage, Gate(1))
        reads = [asyncio.ensure_future(pool.get("a", Range(0, n))) for n in (1, 2, 3)]
        await asyncio.sleep(5.5)
        assert await pool.get("a", Range(0, 3)) == bytes(3)
        await asyncio.gather(*reads)
        assert storage.requests == 3

    run(main)


def test_slow_requests_are_not_started_again_and_again() -> None:
    async def main() -> None:
        storage = Slow()
        pool = await pool_of(storage, warm=20, hedge_percentile=NEVER)
        storage.usual_s = 50.0
        reading = []
        for _ in range(100):
            reading.append(asyncio.ensure_future(pool.get("a", Range(0, 2))))
            await asyncio.sleep(0.4)
        await asyncio.gather(*reading)
        assert storage.requests <= 8

    run(main)


def test_store_that_becomes_slow_gets_few_requests_more() -> None:
    async def main() -> None:
        storage = Slow(0.01)
        pool = await pool_of(storage, warm=128)
        before = repeats_so_far().hedged
        for usual_s in (2.0, 20.0):
            storage.usual_s = usual_s
            storage.requests = 0
            for first in range(0, 200, 40):
                await asyncio.gather(*(pool.get("a", Range(0, n + 1)) for n in range(first % 80, first % 80 + 40)))
            assert storage.requests <= 200 * 1.05 + 8
        assert repeats_so_far().hedged - before <= 400 * 0.05 + 16

    run(main)


def test_failing_second_request_changes_nothing() -> None:
    async def main() -> None:
        storage = Slow()
        pool = await pool_of(storage, warm=20)
        storage.plan = [SILENT_S, SILENT_S]
        with pytest.raises(StorageError):
            await pool.get("a", Range(0, 2))
        assert (storage.requests, storage.now) == (2, 0)

    run(main)


def test_reader_of_a_window_that_is_stuck_fetches_its_own_and_serves_those_that_wait() -> None:
    async def main() -> None:
        storage = Slow()
        pool = await pool_of(storage, warm=20, hedge_percentile=NEVER)
        reader = BlockReader(pool)
        storage.plan = [SILENT_S]
        waiting = [asyncio.ensure_future(reader.read("a", 0, 10)), asyncio.ensure_future(reader.read("a", 5, 15))]
        await asyncio.sleep(2)
        assert storage.requests == 1
        began = now()
        assert await reader.read("a", 0, 20) == bytes(range(20))
        assert await asyncio.gather(*waiting) == [bytes(range(10)), bytes(range(5, 15))]
        assert now() - began < 0.2
        await asyncio.sleep(0)
        assert (storage.now, reader._reserved_bytes) == (0, 0)

    run(main)


@pytest.mark.parametrize("hedge_percentile", [None, NEVER])
async def test_metadata_file_whose_request_is_stuck_is_read_by_the_next_session(
    hedge_percentile: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_FIRST_PATIENCE_S", 0.1)
    monkeypatch.setattr(fetch, "LEAST_PATIENCE_S", 0.05)
    storage = Slow(0.0)
    await storage.put("a", b"x")
    assets = Assets(
        storage,
        gates=Gates(64),
        reads=Reads(hedge_percentile=hedge_percentile),
        num_snapshot_nodes=0,
        num_chunk_refs=0,
        num_transaction_changes=0,
    )
    storage.plan = [SILENT_S]
    decoded = []

    def decode(data: bytes) -> bytes:
        decoded.append(data)
        return data

    async with asyncio.timeout(10):
        first = asyncio.ensure_future(assets._load("a", decode))
        await asyncio.sleep(0.15)
        assert await assets._load("a", decode) == b"x"
        assert await first == b"x"
    assert 1 <= len(decoded) <= 2
