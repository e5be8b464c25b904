"""Reading ahead along an array: what makes a walk, how far it looks, and that it changes nothing but the time."""

from __future__ import annotations

import random

import numpy as np
import pytest
import zarr.api.asynchronous as zarr_async
from hypothesis import given, settings
from hypothesis import strategies as st

import icechunk
from icechunk.config import EngineConfig
from icechunk.format.ids import ObjectId
from icechunk.format.values import ID12, INLINE, NATIVE, ChunkRefs
from icechunk.storage.memory import MemoryStorage
from icechunk.testing.recording import RecordingStorage
from icechunk.transfer.prediction import ROWS, Walks, upcoming

KIB = 1024


def columns(rows: list[tuple[int, int, int, int]]) -> ChunkRefs:
    """Rows of kind, object, offset and length."""
    n = len(rows)
    kind, objects, offset, length = (
        (np.array(column) for column in zip(*rows, strict=True)) if n else (np.empty(0),) * 4
    )
    ids = np.array([bytes([o]) * 12 for o in map(int, objects)], ID12) if n else np.empty(0, ID12)
    return ChunkRefs(
        coords=np.arange(n, dtype=np.uint32).reshape(n, 1),
        kind=np.asarray(kind, np.uint8),
        offset=np.asarray(offset, np.uint64),
        length=np.asarray(length, np.uint64),
        chunk_id=ids,
        location=np.full(n, -1, np.int32),
    )


def test_a_few_rows_in_order_are_no_walk() -> None:
    walks = Walks()
    assert [walks.step(row) for row in range(ROWS.steps - 1)] == [None] * (ROWS.steps - 1)
    assert walks.step(ROWS.steps - 1) is not None


def test_rows_at_random_are_no_walk() -> None:
    walks, rows = Walks(), random.Random(0)
    assert all(walks.step(rows.randrange(10_000)) is None for _ in range(2_000))


def test_two_readers_walk_side_by_side() -> None:
    walks = Walks()
    found = [(walks.step(row), walks.step(5_000 + row)) for row in range(ROWS.steps)]
    assert all(walk is not None for walk in found[-1])


def test_a_walk_continues_after_reads_at_random() -> None:
    walks, rows = Walks(), random.Random(0)
    for row in range(1_000):
        walk = walks.step(row)
        if walk is not None:
            walk.fetch_to(row + 100, walk.next_window(ROWS)[1])
        walks.step(100_000 + rows.randrange(10_000))
        assert row < ROWS.steps or any(known.next == row + 1 for known in walks._walks)


def test_windows_grow_up_to_their_bound_and_are_asked_for_in_time() -> None:
    walks, sizes, fetched = Walks(), [], 0
    for row in range(20_000):
        walk = walks.step(row)
        if walk is not None:
            first, size = walk.next_window(ROWS)
            sizes.append(size)
            assert first >= fetched
            fetched = first + size // (16 * KIB)
            walk.fetch_to(fetched, size)
        assert row < ROWS.steps or fetched > row
    assert sizes[0] == ROWS.first_bytes
    assert sizes == sorted(sizes)
    assert sizes[-1] == ROWS.most_bytes


def test_rows_become_ranges_of_their_objects() -> None:
    refs = columns(
        [
            (NATIVE, 1, 0, 10),
            (NATIVE, 1, 10, 10),
            (INLINE, 0, 0, 5),
            (NATIVE, 1, 25, 5),
            (NATIVE, 1, 900, 5),
            (NATIVE, 2, 7, 5),
            (NATIVE, 2, 100, 5_000),
            (NATIVE, 2, 0, 5),
        ]
    )
    ranges, row = upcoming(refs, 0, 10_000, largest_bytes=1_000, gap_bytes=8)
    one, two = ObjectId(b"\1" * 12), ObjectId(b"\2" * 12)
    assert ranges == [(one, 0, 30), (one, 900, 905), (two, 7, 12), (two, 0, 5)]
    assert row == len(refs)


TABLES = st.lists(
    st.tuples(st.sampled_from([NATIVE, NATIVE, INLINE]), st.integers(1, 3), st.integers(0, 200), st.integers(1, 40)),
    max_size=30,
)


@settings(max_examples=100)
@given(rows=TABLES, row=st.integers(0, 30), most=st.integers(0, 400), gap=st.integers(0, 20))
def test_ranges_cover_the_rows_and_stay_within_the_bytes(
    rows: list[tuple[int, int, int, int]], row: int, most: int, gap: int
) -> None:
    refs = columns(rows)
    row = min(row, len(rows))
    ranges, stop = upcoming(refs, row, most, largest_bytes=30, gap_bytes=gap)
    assert row <= stop <= len(rows)
    assert sum(length for *_, length in rows[row:stop]) <= most
    wanted = [r for r in rows[row:stop] if r[0] == NATIVE and r[3] < 30]
    for _, owner, offset, length in wanted:
        assert any(
            id == bytes([owner]) * 12 and start <= offset and offset + length <= end for id, start, end in ranges
        )
    assert sum(end - start for _, start, end in ranges) <= sum(length for *_, length in wanted) + gap * len(wanted)


async def written(engine: EngineConfig, chunks: int = 400) -> tuple[RecordingStorage, np.ndarray]:
    storage = RecordingStorage(MemoryStorage())
    repo = await icechunk.Repository.create_async(storage, icechunk.RepositoryConfig(engine=engine))
    session = await repo.writable_session_async("main")
    data = np.random.default_rng(0).integers(0, 255, chunks * 16 * KIB, dtype="u1")
    array = await zarr_async.create_array(
        session.store, name="a", shape=data.shape, chunks=(16 * KIB,), dtype="u1", compressors=None
    )
    await array.setitem(slice(None), data)
    await session.commit_async("chunks")
    await repo.aclose()
    return storage, data


@pytest.mark.parametrize(("pack_threshold", "most"), [(512 * KIB, 8), (0, 400)], ids=["packs", "an object each"])
async def test_reading_in_order_brings_the_same_bytes_in_few_rounds(pack_threshold: int, most: int) -> None:
    storage, data = await written(EngineConfig(pack_threshold_bytes=pack_threshold))
    async with await icechunk.Repository.open_async(storage) as repo:
        session = await repo.readonly_session_async("main")
        array = await zarr_async.open_array(store=session.store, path="a", mode="r")
        storage.clear()
        assert np.array_equal(await array.getitem(slice(None)), data)
    assert storage.count("get", "chunks/") <= most
    assert storage.dependent_rounds() <= 8  # forty batches of ten, one after the other, without
    assert sum(request.size for request in storage.requests if request.key.startswith("chunks/")) == data.size


async def test_looking_chunks_up_without_reading_them_fetches_nothing() -> None:
    storage, _ = await written(EngineConfig())
    async with await icechunk.Repository.open_async(storage) as repo:
        session = await repo.readonly_session_async("main")
        storage.clear()
        for index in range(50):
            assert await session.store.exists(f"a/c/{index}")
    assert storage.count("get", "chunks/") == 0


async def test_a_reader_that_stops_leaves_at_most_a_window_behind() -> None:
    storage, _ = await written(EngineConfig())
    async with await icechunk.Repository.open_async(storage) as repo:
        session = await repo.readonly_session_async("main")
        array = await zarr_async.open_array(store=session.store, path="a", mode="r")
        storage.clear()
        await array.getitem(slice(0, 12 * 16 * KIB))
    fetched = sum(request.size for request in storage.requests if request.key.startswith("chunks/"))
    assert fetched <= 12 * 16 * KIB + ROWS.first_bytes
