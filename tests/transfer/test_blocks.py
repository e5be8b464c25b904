"""Reading parts of chunk objects: exact bytes whatever happens, few requests, bounded memory."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.errors import InvalidInputError, ObjectNotFoundError, StorageError
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import ByteRange, GetResult, Range
from icechunk.transfer.blocks import BlockReader
from icechunk.transfer.fetch import FetchPool
from icechunk.transfer.limiter import Gate
from icechunk.transfer.prediction import Limits, Track, Walk, merge
from tests.raising import raises

KIB = 1024
SMALL = Limits(
    merge_gap_bytes=8,
    max_request_bytes=128,
    first_window_bytes=16,
    block_bytes=64,
    promote_after=2,
    cache_bytes=256,
    max_objects=3,
)


class Turns(MemoryStorage):
    """Every read takes some turns of the loop, may fail, and is written down."""

    def __init__(self, draw: Callable[[], tuple[int, bool]] = lambda: (1, False)) -> None:
        super().__init__()
        self.ranges: list[tuple[str, int, int]] = []
        self.draw = draw
        self.now = 0
        self.failed = 0

    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        assert isinstance(byte_range, Range)
        assert byte_range.end is not None
        self.ranges.append((key, byte_range.start, byte_range.end))
        turns, fails = self.draw()
        self.now += 1
        try:
            for _ in range(turns):
                await asyncio.sleep(0)
        finally:
            self.now -= 1
        if fails:
            self.failed += 1
            raise StorageError(f"no luck with {key}")
        return await super().get(key, byte_range)


async def storage_with(**objects: bytes) -> Turns:
    storage = Turns()
    for key, data in objects.items():
        await storage.put(key, data)
    return storage


def reader(storage: MemoryStorage, limits: Limits | None = None) -> BlockReader:
    return BlockReader(FetchPool(storage, Gate(64)), limits)


def pattern(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """`run_strictly` collects garbage often: spare it the objects of all imported modules."""
    gc.freeze()
    yield
    gc.unfreeze()


def run_strictly(main: Callable[[], Awaitable[None]]) -> None:
    """Run; nothing may be left behind: no task, no exception that was not retrieved."""
    complaints: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with asyncio.timeout(20):
            await main()
        for _ in range(60):
            await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left

    asyncio.run(watched())
    gc.collect()
    assert not complaints


@dataclass(frozen=True)
class Step:
    key: str
    start: int
    length: int
    wait: int
    """Turns before it starts."""
    cancel_after: int | None
    """Turns until it is cancelled."""


steps = st.builds(
    Step,
    key=st.sampled_from("abcde"),
    start=st.integers(0, 420),
    length=st.integers(1, 90),
    wait=st.integers(0, 12),
    cancel_after=st.none() | st.none() | st.integers(0, 12),
)


@settings(max_examples=120)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=5, max_size=5),
    schedule=st.lists(steps, min_size=1, max_size=40),
    seed=st.integers(0, 2**32),
    failure_rate=st.sampled_from([0.0, 0.0, 0.2]),
)
def test_any_schedule_of_reads_and_cancellations_returns_exactly_the_bytes(
    sizes: list[int], schedule: list[Step], seed: int, failure_rate: float
) -> None:
    objects = {key: pattern(size, size) for key, size in zip("abcde", sizes, strict=True)}
    generator = random.Random(seed)

    async def main() -> None:
        storage = Turns(lambda: (generator.randrange(6), generator.random() < failure_rate))
        for key, data in objects.items():
            await storage.put(key, data)
        blocks = reader(storage, SMALL)

        async def one(step: Step) -> None:
            for _ in range(step.wait):
                await asyncio.sleep(0)
            size = len(objects[step.key])
            try:
                data = await blocks.read(step.key, step.start, step.start + step.length)
            except InvalidInputError:
                assert step.start >= size
            except StorageError:
                assert failure_rate
            else:
                assert data == objects[step.key][step.start : step.start + step.length]
                assert step.start < size
            assert blocks.held_bytes <= SMALL.cache_bytes

        async def cancelling(step: Step) -> None:
            task = asyncio.ensure_future(one(step))
            if step.cancel_after is not None:
                for _ in range(step.wait + step.cancel_after):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled():
                    task.result()
            else:
                await task

        results = await asyncio.gather(*map(cancelling, schedule), return_exceptions=True)
        assert [error for error in results if error is not None] == []
        # Earlier failures do not affect later readers.
        storage.draw = lambda: (0, False)
        for key, data in objects.items():
            assert await blocks.read(key, 0, len(data)) == data
        for _ in range(60):
            await asyncio.sleep(0)
        assert blocks._reserved_bytes == 0
        assert blocks._kept_bytes == sum(blocks._kept.values()) <= SMALL.cache_bytes
        assert set(blocks._kept) == {(key, first) for key, known in blocks._objects.items() for first in known.kept}
        assert len(blocks._objects) <= SMALL.max_objects

    run_strictly(main)


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 60)), min_size=1, max_size=30))
def test_merged_ranges_cover_the_requested_ones_and_each_begins_and_ends_with_one(wants: list[tuple[int, int]]) -> None:
    wanted = [(start, start + length) for start, length in wants]
    merged = merge(wanted, SMALL)
    for start, end in wanted:
        assert any(first <= start and end <= last for first, last in merged)
    assert {first for first, _ in merged} <= {start for start, _ in wanted}
    assert {last for _, last in merged} <= {end for _, end in wanted}
    assert all(last - first <= SMALL.max_request_bytes for first, last in merged)


async def walk(blocks: BlockReader, key: str, size: int, chunk: int, readers: int, data: bytes) -> None:
    """Read all chunks of an object in order, as zarr does: so many at once."""
    places = iter(range(0, size, chunk))

    async def worker() -> None:
        for start in places:
            assert await blocks.read(key, start, start + chunk) == data[start : start + chunk]

    await asyncio.gather(*[worker() for _ in range(readers)])


@pytest.mark.parametrize("readers", [1, 10, 64])
async def test_walk_through_a_pack_takes_few_requests_and_fetches_every_byte_once(readers: int) -> None:
    data = pattern(4 * KIB * KIB)
    storage = await storage_with(a=data)
    await walk(reader(storage), "a", len(data), 16 * KIB, readers, data)
    assert len(storage.ranges) <= 8
    assert sum(end - start for _, start, end in storage.ranges) == len(data)


async def test_walk_through_many_packs_takes_one_request_each_once_it_is_at_speed() -> None:
    data = pattern(KIB * KIB)
    storage = await storage_with(**{f"k{i}": data for i in range(20)})
    blocks = reader(storage)
    for i in range(20):
        await walk(blocks, f"k{i}", len(data), 16 * KIB, 10, data)
    assert len(storage.ranges) <= 20 + 8


async def test_next_window_is_on_its_way_before_the_reader_comes_there() -> None:
    data = pattern(4 * KIB * KIB)
    storage = await storage_with(a=data)
    blocks = reader(storage)
    waits = 0
    for start in range(0, len(data), 16 * KIB):
        read = asyncio.ensure_future(blocks.read("a", start, start + 16 * KIB))
        await asyncio.sleep(0)
        waits += not read.done()
        await read
    assert waits <= 3


async def test_reads_of_one_turn_that_lie_near_each_other_are_one_request() -> None:
    data = pattern(KIB * KIB)
    storage = await storage_with(a=data)
    blocks = reader(storage)
    places = [0, 20 * KIB, 60 * KIB, 5 * KIB]
    found = await asyncio.gather(*[blocks.read("a", start, start + KIB) for start in places])
    assert found == [data[start : start + KIB] for start in places]
    assert storage.ranges == [("a", 0, 61 * KIB)]


async def test_single_random_read_fetches_only_the_requested_range() -> None:
    storage = await storage_with(a=pattern(4 * KIB * KIB))
    blocks = reader(storage)
    await blocks.read("a", 3_000_000, 3_000_100)
    assert storage.ranges == [("a", 3_000_000, 3_000_100)]


async def test_random_reads_that_keep_hitting_one_object_are_promoted_to_blocks() -> None:
    data = pattern(4 * KIB * KIB)
    storage = await storage_with(a=data)
    blocks = reader(storage)
    generator = random.Random(1)
    for _ in range(200):
        start = generator.randrange(len(data) - 16 * KIB)
        assert await blocks.read("a", start, start + 16 * KIB) == data[start : start + 16 * KIB]
    assert len(storage.ranges) <= 4 + 5


async def test_random_reads_that_come_back_seldom_are_never_promoted() -> None:
    limits = Limits(cache_bytes=4 * KIB * KIB, block_bytes=KIB * KIB)
    data = pattern(2 * KIB * KIB)
    storage = await storage_with(**{f"k{i}": data for i in range(50)})
    blocks = reader(storage, limits)
    for round_ in range(12):
        for i in range(50):
            await blocks.read(f"k{i}", (round_ * 170_000) % 1_900_000, (round_ * 170_000) % 1_900_000 + 100)
    assert {end - start for _, start, end in storage.ranges} == {100}


async def test_large_chunk_goes_alone_and_is_not_kept() -> None:
    data = pattern(3 * KIB * KIB)
    storage = await storage_with(a=data)
    blocks = reader(storage)
    assert await blocks.read("a", 0, len(data)) == data
    assert storage.ranges == [("a", 0, len(data))]
    assert blocks.held_bytes == 0


async def test_block_that_is_larger_than_a_kept_piece_at_its_start_replaces_it() -> None:
    data = pattern(256)
    storage = await storage_with(a=data)
    blocks = reader(storage, SMALL)
    blocks._object("a").track.walk = Walk(0, window_bytes=2)
    await blocks.read("a", 0, 4)
    for start in (40, 20, 50, 30):
        await blocks.read("a", start, start + 4)
    count = len(storage.ranges)
    assert await blocks.read("a", 40, 44) == data[40:44]
    assert len(storage.ranges) == count


async def test_reading_beyond_the_end_is_shorter_or_refused() -> None:
    storage = await storage_with(a=b"0123456789")
    blocks = reader(storage, SMALL)
    assert await blocks.read("a", 8, 30) == b"89"
    for _ in range(2):
        with pytest.raises(InvalidInputError):
            await blocks.read("a", 10, 12)
    results = await asyncio.gather(blocks.read("a", 2, 4), blocks.read("a", 10, 12), return_exceptions=True)
    assert results[0] == b"23"
    assert isinstance(results[1], InvalidInputError)


async def test_random_reads_beyond_the_end_are_refused_with_one_request_each() -> None:
    storage = await storage_with(a=pattern(179))
    blocks = reader(storage, SMALL)
    for start in (10, 120, 60, 150, 30):
        await blocks.read("a", start, start + 4)
    requests = len(storage.ranges)
    # In a block of its own the object has bytes, and in the cache too.
    for start in (179, 191, 185):
        async with asyncio.timeout(5):
            with raises(InvalidInputError, "invalid-byte-range", 179):
                await blocks.read("a", start, 213)
    assert storage.ranges[requests:] == [("a", start, 213) for start in (179, 191, 185)]


async def test_a_missing_object_is_an_error_for_every_waiting_reader() -> None:
    blocks = reader(await storage_with())
    results = await asyncio.gather(*[blocks.read("a", i, i + 1) for i in range(3)], return_exceptions=True)
    assert [type(error) for error in results] == [ObjectNotFoundError] * 3


def test_a_read_ahead_window_that_failed_is_fetched_again_for_a_reader() -> None:
    async def main() -> None:
        data = pattern(400)
        storage = await storage_with(a=data)
        blocks = reader(storage, SMALL)
        fails = iter([False, False, True])
        storage.draw = lambda: (1, next(fails, False))
        for start in range(0, 400, 8):
            assert await blocks.read("a", start, start + 8) == data[start : start + 8]
            for _ in range(8):
                await asyncio.sleep(0)
        assert storage.failed == 1

    run_strictly(main)


def test_a_reader_that_joined_a_request_gets_it_after_the_first_reader_was_cancelled() -> None:
    async def main() -> None:
        storage = await storage_with(a=pattern(100))
        blocks = reader(storage, SMALL)
        first = asyncio.ensure_future(blocks.read("a", 0, 10))
        second = asyncio.ensure_future(blocks.read("a", 5, 10))
        for _ in range(3):
            await asyncio.sleep(0)
        first.cancel()
        assert await second == pattern(100)[5:10]
        assert len(storage.ranges) == 1

    run_strictly(main)


def test_reader_that_joins_a_request_from_before_its_object_was_forgotten_learns_the_end_of_the_object() -> None:
    async def main() -> None:
        storage = await storage_with(a=pattern(100), b=pattern(10))
        storage.draw = lambda: (20, False)
        blocks = reader(storage, replace(SMALL, max_objects=1))
        first = asyncio.ensure_future(blocks.read("a", 90, 100))
        for _ in range(4):
            await asyncio.sleep(0)
        other = asyncio.ensure_future(blocks.read("b", 0, 10))
        await asyncio.sleep(0)
        joined = asyncio.ensure_future(blocks.read("a", 95, 120))
        assert [*await asyncio.gather(first, other, joined)] == [pattern(100)[90:], pattern(10), pattern(100)[95:]]
        assert [key for key, _, _ in storage.ranges] == ["a", "b"]

    run_strictly(main)


def test_request_is_cancelled_with_its_last_reader_and_the_next_one_begins_anew() -> None:
    async def main() -> None:
        storage = await storage_with(a=pattern(100))
        storage.draw = lambda: (20, False)
        blocks = reader(storage, SMALL)
        first = asyncio.ensure_future(blocks.read("a", 0, 10))
        for _ in range(4):
            await asyncio.sleep(0)
        assert storage.now == 1
        first.cancel()
        await asyncio.sleep(0)
        # The cancelled request has not ended yet: a new reader must not join it.
        second = asyncio.ensure_future(blocks.read("a", 0, 10))
        assert await second == pattern(100)[:10]
        assert len(storage.ranges) == 2

    run_strictly(main)


def test_reader_cancelled_before_its_request_began_leaves_none_behind() -> None:
    async def main() -> None:
        storage = await storage_with(a=pattern(100))
        blocks = reader(storage, SMALL)
        task = asyncio.ensure_future(blocks.read("a", 0, 10))
        await asyncio.sleep(0)
        task.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert storage.ranges == []

    run_strictly(main)


async def test_a_planning_error_is_raised_to_the_waiting_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> tuple[int, int]:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Track, "plan", broken)
    blocks = reader(await storage_with(a=b"123"))
    with pytest.raises(RuntimeError, match="a bug"):  # words: the test's own
        await asyncio.wait_for(blocks.read("a", 0, 1), 5)


async def test_many_streams_at_once_hold_no_more_than_the_bound() -> None:
    limits = Limits(cache_bytes=2 * KIB * KIB)
    data = pattern(KIB * KIB)
    storage = await storage_with(**{f"k{i}": data for i in range(16)})
    blocks = reader(storage, limits)
    most = 0

    async def stream(key: str) -> None:
        nonlocal most
        for start in range(0, len(data), 16 * KIB):
            assert await blocks.read(key, start, start + 16 * KIB) == data[start : start + 16 * KIB]
            most = max(most, blocks.held_bytes)

    await asyncio.gather(*[stream(f"k{i}") for i in range(16)])
    assert KIB * KIB < most <= limits.cache_bytes
