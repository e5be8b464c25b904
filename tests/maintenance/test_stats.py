"""Storage statistics: every byte once."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import icechunk
from icechunk.credentials import LocalFileSystemAccess
from icechunk.format.ids import NodeId
from icechunk.format.values import INLINE, NATIVE, ChunkRefs, Manifest
from icechunk.maintenance.byte_ranges import (
    CHUNK_ID_BYTES,
    SPAN_BYTES,
    covered_by_object,
    joined_native_rows,
    native_rows,
)
from icechunk.maintenance.limits import Limits
from icechunk.maintenance.reachability import (
    Budget,
    Files,
    ManyRefs,
    RowSet,
    Unseen,
    Use,
    distinct_rows,
    read_manifests,
)
from icechunk.maintenance.stats import _Counter
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import ListingUnsupportedError, ObjectInfo
from icechunk.testing.wrapping import WrappingStorage
from tests.inside import core_of, log_of
from tests.maintenance.helpers import History, ago, by_layout


@by_layout
async def test_native_bytes_are_those_of_distinct_objects_that_refs_reach(version: int | None) -> None:
    history = await History.create(MemoryStorage(), version)
    assert (await history.repo.chunk_storage_stats_async()).native_bytes == 80
    await history.commit("c1", 0)
    await history.repo.create_branch_async("b", history.ids["first"])
    await history.commit("b1", 1, branch="b")
    await history.commit("detached", 2, how="flush")
    stats = await history.repo.chunk_storage_stats_async()
    assert (stats.native_bytes, stats.virtual_bytes, stats.inlined_bytes) == (96, 0, 0)
    assert (stats.total_bytes(), stats.non_virtual_bytes()) == (96, 96)
    await history.repo.delete_branch_async("b")
    assert (await history.repo.chunk_storage_stats_async()).native_bytes == 88


@by_layout
async def test_virtual_ranges_count_once_and_inline_bytes_in_every_manifest(
    tmp_path: Path, version: int | None
) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"0" * 1000)
    config = icechunk.RepositoryConfig.default()
    config.inline_chunk_threshold_bytes = 100
    prefix = f"file://{tmp_path}/"
    store = icechunk.local_filesystem_store(str(tmp_path))
    config.set_virtual_chunk_container(icechunk.VirtualChunkContainer(prefix, store))
    repo = await icechunk.Repository.create_async(
        MemoryStorage(), config, authorize_virtual_chunk_access={prefix: LocalFileSystemAccess}, spec_version=version
    )
    azarr = zarr.api.asynchronous
    options: dict[str, Any] = {"shape": (40,), "chunks": (10,), "dtype": "i1", "compressors": None, "fill_value": 0}
    session = await repo.writable_session_async("main")
    await azarr.create_array(store=session.store, name="v", **options)
    for i, offset in enumerate((0, 10, 0, 5)):
        session.store.set_virtual_ref(f"v/c/{i}", f"file://{file}", offset=offset, length=10)
    await session.commit_async("virtual")
    session = await repo.writable_session_async("main")
    inline = await azarr.create_array(store=session.store, name="i", **options)
    await inline.setitem(slice(None), 1)
    await session.commit_async("inline")
    stats = await repo.chunk_storage_stats_async(max_snapshots_in_memory=1, max_concurrent_manifest_fetches=1)
    assert (stats.native_bytes, stats.virtual_bytes, stats.inlined_bytes) == (0, 30, 40)


SPANS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30), st.integers(0, 12)), max_size=30)


@given(SPANS)
@settings(max_examples=100)
def test_bytes_of_shared_objects_count_once_however_ranges_overlap(spans: list[tuple[int, int, int]]) -> None:
    counter = _Counter()
    for part in (spans[::2], spans[1::2]):
        if not part:
            continue
        refs = ChunkRefs(
            coords=np.arange(len(part), dtype=np.uint32)[:, None],
            kind=np.full(len(part), NATIVE, np.uint8),
            offset=np.array([span[1] for span in part], np.uint64),
            length=np.array([span[2] for span in part], np.uint64),
            chunk_id=np.frombuffer(b"".join(bytes([span[0]]) + b"\0" * 11 for span in part), "V12"),
            location=np.full(len(part), -1, np.int32),
        )
        counter.add([ManyRefs(refs, np.zeros(len(refs), np.int64), np.ones(len(refs), np.bool_))])
    expected = {(id, byte) for id, offset, length in spans for byte in range(offset, offset + length)}
    assert counter.result().native_bytes == len(expected)


STEPS = st.lists(st.tuples(st.booleans(), st.sampled_from([0, 0, 0, 5]), st.sampled_from([0, 1, 7, 2**64 - 8])))


@given(STEPS)
def test_ranges_that_adjoin_are_joined_and_cover_the_same_bytes(steps: list[tuple[bool, int, int]]) -> None:
    spans: list[tuple[int, int, int]] = [(0, 0, 3)]
    for same, gap, length in steps:
        object, start, size = spans[-1]
        spans.append((object if same else 1 - object, (start + size + gap) % 2**64, length))
    refs = ChunkRefs(
        coords=np.arange(len(spans), dtype=np.uint32)[:, None],
        kind=np.full(len(spans), NATIVE, np.uint8),
        offset=np.array([span[1] for span in spans], np.uint64),
        length=np.array([span[2] for span in spans], np.uint64),
        chunk_id=np.frombuffer(b"".join(b"id of chunk" + bytes([span[0]]) for span in spans), "V12"),
        location=np.full(len(spans), -1, np.int32),
    )
    everything = np.ones(len(spans), np.bool_)
    found = []
    for rows_of in (native_rows, joined_native_rows):
        rows = RowSet(CHUNK_ID_BYTES + SPAN_BYTES)
        rows.add(rows_of(refs, everything))
        names, covered = covered_by_object(rows.rows)
        found.append((names.tolist(), covered.tolist()))
    assert found[0] == found[1]


@given(st.lists(st.lists(st.binary(min_size=3, max_size=3))), st.lists(st.binary(min_size=3, max_size=3)))
def test_a_set_of_rows_is_a_set(parts: list[list[bytes]], asked: list[bytes]) -> None:
    rows = RowSet(3)
    for part in parts:
        rows.add(np.frombuffer(b"".join(part), "V3"))
    model = {row for part in parts for row in part}
    assert len(rows) == len(model)
    assert rows.missing(asked) == [row not in model for row in asked]


@given(st.integers(0, 2**32 - 1), st.sampled_from((1, 50, 5_000, 200_000)), st.sampled_from((0, 1, 10, 20_000)))
@settings(max_examples=25)
def test_distinct_rows_are_those_of_a_set_however_often_each_occurs(seed: int, values: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    rows = np.empty(count, [("id", "S12"), ("number", ">u4")])
    rows["id"] = rng.choice(np.frombuffer(rng.bytes(12 * 8), "S12"), count)
    rows["number"] = rng.integers(0, values, count)
    plain = rows.view("V16")
    expected = sorted(set(plain.tolist()))
    assert [id + number for id, number in distinct_rows(rows, "<12s4s")] == expected
    unseen = Unseen(16)
    parts = [unseen.add(part).tolist() for part in np.array_split(plain, 3)]
    assert set(itertools.chain.from_iterable(parts)) == set(expected)


def test_of_many_equal_rows_few_are_left() -> None:
    rows = np.tile(np.random.default_rng(0).integers(0, 2**63, (1000, 2)), (100, 1)).view("V16").reshape(-1)
    unseen = Unseen(16)
    left = unseen.add(rows)
    assert set(left.tolist()) == set(rows.tolist())
    # Those whose bucket another row stands for are kept: one in 260.
    assert len(left) < 3_000
    assert len(unseen.add(rows)) < 3_000
    assert len(unseen.add(rows[:10])) <= 10


@pytest.mark.parametrize("width", [8, 16, 24, 40])
@pytest.mark.parametrize("byte", [b"\0", b"\xff"])
def test_rows_of_equal_bytes_are_seen_like_others(width: int, byte: bytes) -> None:
    unseen = Unseen(width)
    rows = np.array([byte * width] * 10_000, f"V{width}")
    assert unseen.add(rows).tolist() == [byte * width]
    assert not len(unseen.add(rows))


async def test_a_budget_lends_no_more_than_it_has_and_everything_to_a_larger_request() -> None:
    budget, held, most = Budget(10), 0, 0

    async def borrow(amount: int) -> None:
        nonlocal held, most
        async with budget.take(amount):
            held += min(amount, 10)
            most = max(most, held)
            await anyio.lowlevel.checkpoint()
            held -= min(amount, 10)

    await asyncio.gather(*(borrow(amount) for amount in (3, 8, 100, 1, 10, 4, 0)))
    assert most == 10


async def test_manifests_are_read_within_the_bounds() -> None:
    class Counting(WrappingStorage):
        now = most = 0

        async def get(self, key, byte_range=None):  # type: ignore[no-untyped-def]
            self.now += 1
            try:
                for _ in range(50):
                    await asyncio.sleep(0)
                self.most = max(self.most, self.now)
                return await self.inner.get(key, byte_range)
            finally:
                self.now -= 1

    history = await History.create(MemoryStorage(), None)
    for i in range(8):
        await history.commit(f"c{i}", i)
    await history.repo.checkpoint_async()  # so that all of them are read from storage, none from the log's entries
    log = await log_of(history.repo)
    files = {
        file.object_id: Use(file=file)
        for id in log.state.snapshots
        for file in (await core_of(history.repo).assets.snapshot(id)).manifest_files.values()
    }
    assert len(files) > 6

    async def most(limits: Limits) -> int:
        storage = Counting(history.repo.storage)
        seen: list[Manifest] = []

        async def visit(manifest: Manifest, nodes: Collection[NodeId]) -> None:
            seen.append(manifest)

        await read_manifests(Files(storage, log), files, limits, visit)
        assert {manifest.id for manifest in seen} == set(files)
        return storage.most

    assert await most(Limits()) == len(files)
    assert await most(Limits(max_concurrent_manifest_fetches=2)) == 2
    assert await most(Limits(max_compressed_manifest_mem_bytes=1)) == 1
    assert await most(Limits(max_decoded_manifest_mem_bytes=1)) == 1


def test_inline_bytes_are_those_of_the_rows() -> None:
    refs = ChunkRefs(
        coords=np.arange(2, dtype=np.uint32)[:, None],
        kind=np.full(2, INLINE, np.uint8),
        offset=np.array([0, 3], np.uint64),
        length=np.array([3, 4], np.uint64),
        chunk_id=np.zeros(2, "V12"),
        location=np.full(2, -1, np.int32),
        inline_data=b"abcdefg",
    )
    counter = _Counter()
    for _ in range(2):
        counter.add([ManyRefs(refs, np.zeros(len(refs), np.int64), np.ones(len(refs), np.bool_))])
    assert counter.result().inlined_bytes == 14


@by_layout
async def test_living_dead_and_unreferenced_bytes_are_counted_separately(version: int | None) -> None:
    storage = MemoryStorage()
    history = await History.create(storage, version, pack_threshold_bytes=1 << 20)
    # One pack of ten chunks of eight bytes; a second one for the chunk that is written again.
    stats = await history.repo.chunk_storage_stats_async()
    assert (stats.native_bytes, stats.dead_bytes, stats.unreferenced_bytes) == (80, 0, 0)
    await history.commit("c1", 0)
    await history.repo.expire_snapshots_async(ago(days=-1))
    await storage.put("chunks/0000000000000000000G", b"12345")
    await storage.put("chunks/README", b"no chunk object")
    stats = await history.repo.chunk_storage_stats_async()
    assert (stats.native_bytes, stats.dead_bytes, stats.unreferenced_bytes) == (80, 8, 5)
    await history.repo.garbage_collect_async(ago(), repack_below_percent=100)
    stats = await history.repo.chunk_storage_stats_async()
    assert (stats.native_bytes, stats.dead_bytes, stats.unreferenced_bytes) == (80, 0, 0)


@by_layout
async def test_without_a_listing_dead_and_unreferenced_bytes_are_unknown(version: int | None) -> None:
    class Unlisted(WrappingStorage):
        async def list_pages(self, prefix: str = "", **options: Any) -> AsyncIterator[list[ObjectInfo]]:
            if prefix == "chunks/":
                raise ListingUnsupportedError("no listings here")
            async for page in self.inner.list_pages(prefix, **options):
                yield page

    history = await History.create(MemoryStorage(), version)
    for repo, options in (
        (history.repo, {"list_objects": False}),
        (await icechunk.Repository.open_async(Unlisted(history.repo.storage)), {}),
    ):
        stats = await repo.chunk_storage_stats_async(**options)
        assert (stats.native_bytes, stats.dead_bytes, stats.unreferenced_bytes) == (80, None, None)
