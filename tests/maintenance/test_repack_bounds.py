"""The costs of a repacking: memory that does not grow with the data, and few requests."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zarr

import icechunk
from icechunk.maintenance import repack
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.port import Storage
from icechunk.testing.recording import RecordingStorage
from tests.maintenance.helpers import ago, by_layout
from tests.maintenance.test_repack import packing

CHUNK_BYTES = 16 << 10
PACK_BYTES = 256 << 10
CHUNKS = 2048


async def thinned(storage: Storage, version: int | None) -> icechunk.Repository:
    """An array in packs, of which one chunk in three stays."""
    config = packing(pack_size_bytes=PACK_BYTES)
    repo = await icechunk.Repository.create_async(storage, config, spec_version=version)
    session = await repo.writable_session_async("main")
    array = await zarr.api.asynchronous.create_array(
        store=session.store, name="a", shape=(CHUNKS * CHUNK_BYTES,), chunks=(CHUNK_BYTES,), dtype="u1",
        compressors=None, fill_value=0,
    )  # fmt: skip
    await array.setitem(slice(None), np.repeat(np.arange(CHUNKS, dtype="u2") % 255 + 1, CHUNK_BYTES).astype("u1"))
    await session.commit_async("all")
    session = await repo.writable_session_async("main")
    for i in range(CHUNKS):
        if i % 3:
            await session.store.delete(f"a/c/{i}")
    await session.commit_async("a third")
    await repo.expire_snapshots_async(ago(days=-1))
    return repo


@pytest.mark.thorough
@by_layout
async def test_a_repacking_takes_memory_for_some_packs_and_a_request_for_each(
    version: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repack, "_COPY_BYTES", 4 * PACK_BYTES)
    monkeypatch.setattr(repack, "_RUN_BYTES", PACK_BYTES)
    storage = RecordingStorage(LocalStorage(tmp_path / "storage"), turns=0)
    await (await thinned(storage, version)).aclose()
    repo = await icechunk.Repository.open_async(storage)
    # Modules are loaded when they are first needed.
    await repo.garbage_collect_async(ago(), dry_run=True)
    storage.clear()
    tracemalloc.start()
    try:
        done = await repo.garbage_collect_async(ago())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    living = (CHUNKS + 2) // 3 * CHUNK_BYTES
    assert done.chunk_bytes_copied == living > 10 << 20
    # The packs that are copied at a time, as bytes read and bytes written, and as much again for all else.
    assert peak < 12 * PACK_BYTES < living // 3
    counts = Counter((one.verb, one.key.split("/")[0]) for one in storage.requests)
    new = -(-living // PACK_BYTES)
    assert counts["put", "chunks"] == new
    # Living pieces near one another are one request; a new pack begins anywhere in an old one.
    assert counts["get", "chunks"] <= done.packs_rewritten + new
    assert counts["put", "manifests"] == done.manifests_rewritten == 1
    assert done.snapshots_rewritten == 1
    # The snapshots of a history in files name their parents, which an expiration has changed.
    assert counts["put", "snapshots"] <= 2
    assert counts["put", "transactions"] <= 1
    # All else is the collection.
    assert len(storage.requests) < done.packs_rewritten + 2 * new + 60
    assert (await repo.chunk_storage_stats_async()).native_bytes == living


@pytest.mark.thorough
@by_layout
async def test_a_dry_run_copies_nothing(version: int | None, tmp_path: Path) -> None:
    storage = RecordingStorage(LocalStorage(tmp_path / "storage"), turns=0)
    repo = await thinned(storage, version)
    storage.clear()
    planned = await repo.garbage_collect_async(ago(), dry_run=True)
    assert not [
        one for one in storage.requests if one.key.startswith("chunks/") and one.verb in ("get", "put", "delete")
    ]
    done = await repo.garbage_collect_async(ago())
    assert (planned.packs_rewritten, planned.chunk_bytes_copied) == (done.packs_rewritten, done.chunk_bytes_copied)
    assert planned.snapshots_rewritten == done.snapshots_rewritten
