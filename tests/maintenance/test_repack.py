"""Repacking: dead bytes beside living ones go, and no client loses data."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import zarr

import icechunk
from icechunk.config import EngineConfig
from icechunk.errors import ConflictError, InvalidInputError
from icechunk.format.ids import object_id_from_text
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import Storage
from icechunk.testing.wrapping import WrappingStorage
from tests.inside import core_of
from tests.maintenance.helpers import AgedStorage, ago, by_layout, sizes

DAYS = 12
RECORDS = 8


def packing(**options: int) -> icechunk.RepositoryConfig:
    """Chunks share objects, and arrays manifests, in every layout."""
    config = icechunk.RepositoryConfig.default()
    config.inline_chunk_threshold_bytes = 0
    config.engine = EngineConfig(pack_threshold_bytes=1 << 20, pack_size_bytes=4096, share_manifests_below_refs=4096)
    for name, value in options.items():
        setattr(config.engine, name, value)
    return config


async def window(storage: Storage, version: int | None, **options: int) -> icechunk.Repository:
    """An array of a record a chunk: the first stays, and each day's others go the next day."""
    repo = await icechunk.Repository.create_async(storage, packing(**options), spec_version=version)
    session = await repo.writable_session_async("main")
    await zarr.api.asynchronous.create_array(
        store=session.store, name="a", shape=(DAYS * RECORDS * 100,), chunks=(100,), dtype="u1", compressors=None,
        fill_value=0,
    )  # fmt: skip
    await session.commit_async("array")
    for day in range(DAYS):
        session = await repo.writable_session_async("main")
        array = await zarr.api.asynchronous.open_array(store=session.store, path="a", mode="r+")
        first = day * RECORDS
        await array.setitem(
            slice(first * 100, (first + RECORDS) * 100), values()[first * 100 : (first + RECORDS) * 100]
        )
        for record in range(first - RECORDS + 1, first) if day else ():
            await session.store.delete(f"a/c/{record}")
        await session.commit_async(f"day {day}")
    return repo


def values() -> np.ndarray:
    return np.random.default_rng(7).integers(1, 255, DAYS * RECORDS * 100, dtype="u1")


def expected() -> np.ndarray:
    left = values().reshape(-1, 100)
    for record in range((DAYS - 1) * RECORDS):
        if record % RECORDS:
            left[record] = 0
    return left.reshape(-1)


async def read(repo: icechunk.Repository, path: str = "a", **version: Any) -> np.ndarray:
    store = (await repo.readonly_session_async(**(version or {"branch": "main"}))).store
    array = await zarr.api.asynchronous.open_array(store=store, path=path, mode="r")
    return np.asarray(await array.getitem(slice(None)))


async def stored(storage: Storage, folder: str = "chunks") -> int:
    return sum(size for key, size in (await sizes(storage)).items() if key.startswith(f"{folder}/"))


@by_layout
async def test_a_rolling_window_stores_little_more_than_its_living_bytes(version: int | None) -> None:
    storage = MemoryStorage()
    repo = await window(storage, version)
    living = (DAYS - 1 + RECORDS) * 100
    assert await stored(storage) == DAYS * RECORDS * 100
    await repo.expire_snapshots_async(ago(days=-1))
    dry = await repo.garbage_collect_async(ago(), dry_run=True)
    before = await sizes(storage)
    done = await repo.garbage_collect_async(ago())
    after = await sizes(storage)
    assert replace(dry, bytes_deleted=0) == replace(done, bytes_deleted=0)
    assert (done.packs_rewritten, done.chunk_bytes_copied) == (DAYS - 1, (DAYS - 1) * 100)
    assert done.chunks_deleted == len([key for key in before.keys() - after.keys() if key.startswith("chunks/")])
    assert done.bytes_deleted == dry.bytes_deleted == sum(before[key] for key in before.keys() - after.keys())
    assert await stored(storage) == living
    assert (await repo.chunk_storage_stats_async()).native_bytes == living
    fresh = await icechunk.Repository.open_async(storage)
    np.testing.assert_array_equal(await read(fresh), expected())
    again = await repo.garbage_collect_async(ago())
    assert (again.bytes_deleted, again.packs_rewritten, again.snapshots_rewritten) == (0, 0, 0)


@by_layout
async def test_history_keeps_its_times_messages_and_content(version: int | None) -> None:
    storage = MemoryStorage()
    repo = await window(storage, version)
    tip = await repo.lookup_branch_async("main")
    parent = [info async for info in repo.async_ancestry(snapshot_id=tip)][1]
    await repo.create_tag_async("yesterday", parent.id)
    await repo.create_branch_async("also", tip)
    await repo.expire_snapshots_async(parent.written_at)
    before = [replace(info, id="", parent_id=None) async for info in repo.async_ancestry(branch="main")]
    contents = [await read(repo), await read(repo, tag="yesterday")]
    changes = (await repo.diff_async(from_snapshot_id=parent.id, to_branch="main")).updated_chunks
    done = await repo.garbage_collect_async(ago())
    assert done.snapshots_rewritten == 2
    fresh = await icechunk.Repository.open_async(storage)
    infos = [info async for info in fresh.async_ancestry(branch="main")]
    assert [replace(info, id="", parent_id=None) for info in infos] == before
    assert tip != infos[0].id == await fresh.lookup_branch_async("also")
    assert parent.id != infos[1].id == await fresh.lookup_tag_async("yesterday")
    np.testing.assert_array_equal(await read(fresh), contents[0])
    np.testing.assert_array_equal(await read(fresh, tag="yesterday"), contents[1])
    diff = await fresh.diff_async(from_snapshot_id=infos[1].id, to_branch="main")
    assert diff.updated_chunks == changes
    assert await stored(storage) <= 1.5 * (await fresh.chunk_storage_stats_async()).native_bytes


@by_layout
async def test_without_repacking_packs_stay_whole(version: int | None) -> None:
    storage = MemoryStorage()
    repo = await window(storage, version)
    await repo.expire_snapshots_async(ago(days=-1))
    done = await repo.garbage_collect_async(ago(), repack=False)
    assert (done.packs_rewritten, done.snapshots_rewritten) == (0, 0)
    assert await stored(storage) == DAYS * RECORDS * 100


@pytest.mark.parametrize("version", [None, 2], ids=["log", "repo"])
async def test_replaced_snapshots_stay_readable_where_the_past_is_collected(version: int | None) -> None:
    storage = AgedStorage(MemoryStorage())
    repo = await window(storage, version)
    tip = await repo.lookup_branch_async("main")
    await repo.expire_snapshots_async(ago(days=-1))
    past = ago(hours=1)
    session = await repo.readonly_session_async("main")
    done = await repo.garbage_collect_async(past)
    assert (done.packs_rewritten, done.chunks_deleted) == (DAYS - 1, 0)
    new = await repo.lookup_branch_async("main")
    assert new != tip
    fresh = await icechunk.Repository.open_async(storage)
    for reader in (await read(fresh, snapshot_id=tip), await read(fresh), await read(fresh, snapshot_id=new)):
        np.testing.assert_array_equal(reader, expected())
    array = await zarr.api.asynchronous.open_array(store=session.store, path="a", mode="r")
    np.testing.assert_array_equal(np.asarray(await array.getitem(slice(None))), expected())
    # Nothing more happens until a collection of what is older than the repacking.
    again = await repo.garbage_collect_async(past)
    assert (again.packs_rewritten, again.chunks_deleted, again.snapshots_deleted) == (0, 0, 0)
    last = await repo.garbage_collect_async(ago())
    assert (last.packs_rewritten, last.chunks_deleted) == (0, DAYS - 1)
    assert await stored(storage) == (DAYS - 1 + RECORDS) * 100
    np.testing.assert_array_equal(await read(await icechunk.Repository.open_async(storage)), expected())


@pytest.mark.parametrize("version", [None, 2], ids=["log", "repo"])
async def test_a_consumer_of_the_feed_has_nothing_to_do_for_a_rewritten_snapshot(version: int | None) -> None:
    storage = AgedStorage(MemoryStorage())
    repo = await window(storage, version)
    tip = await repo.lookup_branch_async("main")
    token = [event async for event in repo.watch(since="", stop_at_end=True)][-1].token
    await repo.expire_snapshots_async(ago(days=-1))
    assert (await repo.garbage_collect_async(ago(hours=1))).snapshots_rewritten

    async def amended() -> list[Any]:
        fresh = await icechunk.Repository.open_async(storage)
        events = fresh.watch("main", since=token, stop_at_end=True, with_changes=True)
        return [event async for event in events if event.kind == "amend"]

    (event,) = await amended()
    new = await repo.lookup_branch_async("main")
    assert (event.previous_snapshot_id, event.snapshot_id) == (tip, new)
    assert event.changes is not None
    assert (event.changes.since, event.changes.until, list(event.changes)) == (tip, new, [])
    assert (event.changes.deleted, event.changes.moved) == ((), ())
    # An amendment of the rewritten snapshot by a user is told in full.
    session = await repo.writable_session_async("main")
    await session.store.delete("a/c/0")
    await session.amend_async("the first record goes")
    assert [[c.path for c in event.changes] for event in await amended()] == [[], ["/a"]]
    # Once the former snapshot is collected, the two kinds cannot be told apart: changes are those since the parent.
    await repo.garbage_collect_async(ago())
    assert all(event.changes is None or event.changes.since != tip for event in await amended())


@by_layout
async def test_dead_rows_leave_a_manifest_that_serves_another_array(version: int | None) -> None:
    storage = MemoryStorage()
    config = packing()
    config.inline_chunk_threshold_bytes = 512
    repo = await icechunk.Repository.create_async(storage, config, spec_version=version)
    secret = np.random.default_rng(1).integers(0, 255, 200, dtype="u1")
    session = await repo.writable_session_async("main")
    for name, content in (("a", secret), ("b", np.arange(20, dtype="u1"))):
        array = await zarr.api.asynchronous.create_array(
            store=session.store, name=name, shape=content.shape, chunks=content.shape, dtype="u1", compressors=None
        )
        await array.setitem(slice(None), content)
    await session.commit_async("both")
    session = await repo.writable_session_async("main")
    await session.store.delete_dir("a")
    await session.commit_async("one")
    await repo.expire_snapshots_async(ago(days=-1))
    done = await repo.garbage_collect_async(ago())
    assert (done.manifests_rewritten, done.snapshots_rewritten, done.packs_rewritten) == (1, 1, 0)
    fresh = await icechunk.Repository.open_async(storage)
    np.testing.assert_array_equal(await read(fresh, "b"), np.arange(20))
    (file,) = await fresh.list_manifest_files_async(await fresh.lookup_branch_async("main"))
    manifest = await core_of(fresh).assets.manifest(object_id_from_text(file.id))
    assert manifest.num_chunk_refs == 1
    assert b"".join(refs.inline_data for refs in manifest.arrays.values()) == bytes(range(20))
    assert (await repo.chunk_storage_stats_async()).inlined_bytes == 20


@by_layout
async def test_a_threshold_decides_and_a_hundred_percent_leaves_no_dead_byte(version: int | None) -> None:
    async def after(percent: int | None, **options: int) -> int:
        storage = MemoryStorage()
        repo = await icechunk.Repository.create_async(storage, packing(**options), spec_version=version)
        session = await repo.writable_session_async("main")
        array = await zarr.api.asynchronous.create_array(
            store=session.store, name="a", shape=(1000,), chunks=(100,), dtype="u1", compressors=None, fill_value=0
        )
        await array.setitem(slice(None), np.arange(1000) % 251 + 1)
        await session.commit_async("ten")
        session = await repo.writable_session_async("main")
        for i in range(2):
            await session.store.delete(f"a/c/{i}")
        await session.commit_async("eight")
        await repo.expire_snapshots_async(ago(days=-1))
        await repo.garbage_collect_async(ago(), repack_below_percent=percent)
        left = (np.arange(1000) % 251 + 1) * (np.arange(1000) >= 200)
        np.testing.assert_array_equal(await read(await icechunk.Repository.open_async(storage)), left)
        return await stored(storage)

    assert await after(None) == 1000
    assert await after(80) == 1000
    assert await after(81) == 800
    assert await after(100) == 800
    assert await after(None, repack_below_percent=90) == 800


@pytest.mark.parametrize("percent", [-1, 101])
async def test_an_invalid_percentage_is_refused(percent: int) -> None:
    repo = await icechunk.Repository.create_async(MemoryStorage())
    with pytest.raises(InvalidInputError) as caught:
        await repo.garbage_collect_async(ago(), repack_below_percent=percent)
    assert caught.value.kind == "invalid-setting"


@by_layout
async def test_a_session_that_began_before_the_repacking_is_refused(version: int | None) -> None:
    repo = await window(MemoryStorage(), version)
    await repo.expire_snapshots_async(ago(days=-1))
    session = await repo.writable_session_async("main")
    array = await zarr.api.asynchronous.open_array(store=session.store, path="a", mode="r+")
    await array.setitem(slice(0, 100), np.full(100, 3, "u1"))
    await repo.garbage_collect_async(ago())
    with pytest.raises((ConflictError, icechunk.SessionStateError)):
        await session.commit_async("late")
    np.testing.assert_array_equal(await read(await icechunk.Repository.open_async(repo.storage)), expected())


class Meanwhile(WrappingStorage):
    """Runs something once, just before the first object of a kind is written."""

    def __init__(self, inner: Storage, prefix: str) -> None:
        super().__init__(inner)
        self.prefix = prefix
        self.act: Callable[[], Awaitable[None]] | None = None

    async def put(self, key, data, precondition=None, **kwargs):  # type: ignore[no-untyped-def]
        if key.startswith(self.prefix) and self.act is not None:
            act, self.act = self.act, None
            await act()
        return await self.inner.put(key, data, precondition, **kwargs)


@by_layout
@pytest.mark.parametrize("prefix", ["chunks/", "manifests/", "snapshots/"])
async def test_commits_during_a_repacking_are_kept(version: int | None, prefix: str) -> None:
    inner = MemoryStorage()
    repo = await window(inner, version)
    await repo.expire_snapshots_async(ago(days=-1))
    storage = Meanwhile(inner, prefix)
    collector = await icechunk.Repository.open_async(storage)

    async def commit() -> None:
        session = await repo.writable_session_async("main")
        array = await zarr.api.asynchronous.open_array(store=session.store, path="a", mode="r+")
        await array.setitem(slice(100, 200), np.full(100, 9, "u1"))
        await session.commit_async("meanwhile")

    storage.act = commit
    await collector.garbage_collect_async(ago())
    assert storage.act is None
    content = expected()
    content[100:200] = 9
    fresh = await icechunk.Repository.open_async(inner)
    np.testing.assert_array_equal(await read(fresh), content)
    messages = [info.message async for info in fresh.async_ancestry(branch="main")]
    assert messages[:2] == ["meanwhile", f"day {DAYS - 1}"]
    parent = [info async for info in fresh.async_ancestry(branch="main")][1]
    np.testing.assert_array_equal(await read(fresh, snapshot_id=parent.id), expected())
    await fresh.expire_snapshots_async(ago(days=-1))
    await fresh.garbage_collect_async(ago())
    np.testing.assert_array_equal(await read(await icechunk.Repository.open_async(inner)), content)
    assert await stored(inner) <= 1.5 * (await fresh.chunk_storage_stats_async()).native_bytes


async def season(storage: Storage, version: int | None, seed: int) -> icechunk.Repository:
    """Arrays that share manifests and packs, of which most are deleted later, and half of the chunks of others."""
    rng = np.random.default_rng(seed)
    config = packing(pack_size_bytes=1 << 16)
    config.inline_chunk_threshold_bytes = 64
    repo = await icechunk.Repository.create_async(storage, config, spec_version=version)
    for day in range(6):
        session = await repo.writable_session_async("main")
        for i in range(12):
            # Chunks of the first arrays are inline, those of the others in packs.
            chunk = 40 if i < 6 else 400
            array = await zarr.api.asynchronous.create_array(
                store=session.store, name=f"{day}/{i}", shape=(40, chunk), chunks=(1, chunk), dtype="u1",
                compressors=None, fill_value=0,
            )  # fmt: skip
            await array.setitem(slice(None), rng.integers(1, 255, array.shape, dtype="u1"))
        await session.commit_async(f"day {day}")
    session = await repo.writable_session_async("main")
    for day in range(6):
        for i in range(12):
            if rng.random() < (0.4, 0.6, 0.8)[day % 3]:
                await session.store.delete_dir(f"{day}/{i}")
            elif i >= 6:
                for chunk in np.flatnonzero(rng.random(40) < 0.5).tolist():
                    await session.store.delete(f"{day}/{i}/c/{chunk}/0")
    await session.commit_async("most of it is gone")
    return repo


@pytest.mark.thorough
@by_layout
@pytest.mark.parametrize("seed", range(3))
async def test_packs_and_manifests_hold_at_most_half_as_much_again_as_what_lives(
    version: int | None, seed: int
) -> None:
    left: list[dict[str, int]] = []
    dead: list[dict[str, int]] = []
    for percent in (None, 100):
        storage = MemoryStorage()
        repo = await season(storage, version, seed)
        await repo.expire_snapshots_async(ago(days=-1))
        await repo.garbage_collect_async(ago(), repack=False)
        dead.append({folder: await stored(storage, folder) for folder in ("chunks", "manifests")})
        await repo.garbage_collect_async(ago(), repack_below_percent=percent)
        left.append({folder: await stored(storage, folder) for folder in ("chunks", "manifests")})
        native = (await repo.chunk_storage_stats_async()).native_bytes
        assert left[-1]["chunks"] <= (1.5 if percent is None else 1) * native
    by_default, living = left
    for folder in ("chunks", "manifests"):
        assert by_default[folder] <= 1.5 * living[folder]
    # Without repacking they would hold more.
    assert dead[0]["chunks"] > 1.5 * living["chunks"]
    assert dead[0]["manifests"] > 1.5 * living["manifests"]
