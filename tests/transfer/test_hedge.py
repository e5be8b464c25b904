"""Hedging: one slow request does not hold up the others, and the loser leaves nothing behind."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.errors import StorageError
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import GetResult, Range
from icechunk.transfer.fetch import NEVER, FetchPool, Latencies, hedged
from icechunk.transfer.limiter import Gate


class Uneven(MemoryStorage):
    """Answers at once, except requests that the test lets hang or refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.plan: list[str] = []
        self.now = 0
        self.requests = 0

    async def get(self, *args: Any, **kwargs: Any) -> GetResult:
        self.requests += 1
        self.now += 1
        try:
            match self.plan.pop(0) if self.plan else "answer":
                case "hang":
                    await asyncio.Event().wait()
                case "fail":
                    raise StorageError("no luck")
            return await super().get(*args, **kwargs)
        finally:
            self.now -= 1


async def used(storage: Uneven, gate: Gate) -> FetchPool:
    """A pool that knows how long requests take."""
    await storage.put("a", b"0123456789")
    pool = FetchPool(storage, gate, hedge_percentile=95)
    for _ in range(20):
        await pool.get("a", Range(0, 1))
    storage.requests = 0
    return pool


async def test_request_that_hangs_is_sent_again_and_the_answer_counts() -> None:
    storage, gate = Uneven(), Gate(8)
    pool = await used(storage, gate)
    storage.plan = ["hang"]
    async with asyncio.timeout(5):
        assert await pool.get("a", Range(0, 2)) == b"01"
    await asyncio.sleep(0)
    assert (storage.requests, storage.now, gate.requests, gate.bytes) == (2, 0, 0, 0)


async def test_failure_of_the_first_waits_for_the_second_and_failure_of_both_is_the_firsts() -> None:
    async def main(first: str, second: str) -> Any:
        both = asyncio.Event()

        async def one(name: str) -> str:
            if name == second:
                both.set()
            await both.wait()
            if name.startswith("fail"):
                raise StorageError(name)
            return name

        began = asyncio.get_running_loop().time()
        return await hedged(
            lambda: asyncio.ensure_future(one(first)), lambda now: began, lambda: asyncio.ensure_future(one(second))
        )

    assert await main("fail 1", "fine") == "fine"
    with pytest.raises(StorageError, match="fail 1"):  # words: the test's own
        await main("fail 1", "fail 2")


async def test_no_second_request_where_the_bound_is_reached() -> None:
    storage, gate = Uneven(), Gate(1)
    pool = await used(storage, gate)
    storage.plan = ["hang"]
    reading = asyncio.ensure_future(pool.get("a", Range(0, 2)))
    await asyncio.sleep(0.05)
    assert storage.requests == 1
    reading.cancel()
    await asyncio.wait([reading])
    await asyncio.sleep(0)
    assert (storage.now, gate.requests) == (0, 0)


async def test_nothing_is_sent_twice_where_that_is_turned_off() -> None:
    storage = Uneven()
    await storage.put("a", b"01")
    pool = FetchPool(storage, Gate(8), hedge_percentile=NEVER)
    for _ in range(20):
        await pool.get("a", Range(0, 1))
    storage.plan = ["hang"]
    storage.requests = 0
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await pool.get("a", Range(0, 2))
    assert storage.requests == 1


def test_requests_of_other_magnitudes_say_nothing_about_one() -> None:
    latencies = Latencies()
    assert latencies.stuck_s(0, 1.0, 5.0) == 5.0
    assert latencies.stuck_s(4 << 20, 1.0, 5.0) == 21.0
    for _ in range(16):
        latencies.of(1000).add(0.5)
        latencies.of(4_000_000).add(100.0)
    assert latencies.stuck_s(16_000, 1.0, 5.0) == 1.5
    assert latencies.stuck_s(4_100_000, 1.0, 5.0) == 300.0
    assert latencies.stuck_s(None, 1.0, 5.0) == 5.0


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(["hang", "fail", "answer"]), min_size=2, max_size=2),
            st.none() | st.integers(0, 8),
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 3),
)
def test_nothing_is_left_in_flight_after_any_hang_failure_or_cancellation(
    reads: list[tuple[list[str], int | None]], places: int
) -> None:
    async def main() -> None:
        storage, gate = Uneven(), Gate(places)
        pool = await used(storage, gate)
        tasks = []
        for n, (plan, cancel_after) in enumerate(reads):
            storage.plan += plan
            task = asyncio.ensure_future(pool.get("a", Range(0, n % 3 + 1)))
            tasks.append(task)
            if cancel_after is not None:
                for _ in range(cancel_after):
                    await asyncio.sleep(0)
                task.cancel()
        await asyncio.wait(tasks, timeout=0.02)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for _ in range(5):
            await asyncio.sleep(0)
        assert (storage.now, gate.requests, gate.bytes) == (0, 0, 0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
