"""A reference is living only if an array of a living snapshot finds it: sharing a manifest keeps nothing alive."""

from __future__ import annotations

import numpy as np
import pytest
import zarr

import icechunk
from icechunk.config import EngineConfig
from icechunk.storage.memory import MemoryStorage
from tests.maintenance.helpers import ago, sizes

SECRET = np.frombuffer(b"a secret that is to go " * 8, np.uint8)[:160]


async def two_arrays(version: int | None) -> icechunk.Repository:
    """``a``, which holds the secret in ten chunks, and ``b``, written by one commit into one manifest."""
    config = icechunk.RepositoryConfig.default()
    config.inline_chunk_threshold_bytes = 0
    config.engine = EngineConfig(pack_threshold_bytes=0, share_manifests_below_refs=4096)
    repo = await icechunk.Repository.create_async(MemoryStorage(), config, spec_version=version)
    session = await repo.writable_session_async("main")
    for name, values in (("a", SECRET), ("b", np.arange(160, dtype="u1"))):
        array = await zarr.api.asynchronous.create_array(
            store=session.store, name=name, shape=(160,), chunks=(16,), dtype="u1", compressors=None, fill_value=0
        )
        await array.setitem(slice(None), values)
    await session.commit_async("both")
    assert (await repo.chunk_storage_stats_async()).native_bytes == 320
    return repo


async def change(repo: icechunk.Repository, how: str) -> None:
    session = await repo.writable_session_async("main")
    if how == "delete":
        await session.store.delete_dir("a")
    else:
        array = await zarr.api.asynchronous.open_array(store=session.store, path="a", mode="r+")
        await array.setitem(slice(None), np.full(160, 7, "u1"))
    await session.commit_async(how)


@pytest.mark.parametrize("version", [None, 2], ids=["log", "repo"])
@pytest.mark.parametrize(("how", "left"), [("delete", 160), ("overwrite", 320)])
async def test_chunks_that_only_dead_rows_of_a_shared_manifest_name_are_collected(
    version: int | None, how: str, left: int
) -> None:
    repo = await two_arrays(version)
    await change(repo, how)
    await repo.expire_snapshots_async(ago(days=-1))
    assert (await repo.chunk_storage_stats_async()).native_bytes == left
    done = await repo.garbage_collect_async(ago())
    assert done.chunks_deleted == 10
    objects = await sizes(repo.storage)
    assert sum(size for key, size in objects.items() if key.startswith("chunks/")) == left
    for key in objects:
        if key.startswith("chunks/"):
            assert (await repo.storage.get(key)).data not in SECRET.tobytes()
    fresh = await icechunk.Repository.open_async(repo.storage)
    store = (await fresh.readonly_session_async("main")).store
    array = await zarr.api.asynchronous.open_array(store=store, path="b", mode="r")
    np.testing.assert_array_equal(np.asarray(await array.getitem(slice(None))), np.arange(160, dtype="u1"))


async def test_an_older_snapshot_that_stays_keeps_the_rows_that_it_finds() -> None:
    repo = await two_arrays(None)
    await repo.create_tag_async("kept", await repo.lookup_branch_async("main"))
    await change(repo, "delete")
    await repo.expire_snapshots_async(ago(days=-1))
    assert (await repo.chunk_storage_stats_async()).native_bytes == 320
    assert (await repo.garbage_collect_async(ago())).chunks_deleted == 0
    store = (await repo.readonly_session_async(tag="kept")).store
    array = await zarr.api.asynchronous.open_array(store=store, path="a", mode="r")
    np.testing.assert_array_equal(np.asarray(await array.getitem(slice(None))), SECRET)
