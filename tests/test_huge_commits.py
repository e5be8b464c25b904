"""Commits of many references: no more is held than is on its way, and a failure in between leaves nothing."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import icechunk
from icechunk.config import EngineConfig, RepositoryConfig
from icechunk.errors import InvalidInputError, StorageError
from icechunk.format import transaction
from icechunk.format.ids import object_id_from_text
from icechunk.format.manifest import encode_manifest
from icechunk.format.transaction import in_parts
from icechunk.log.session import array_fold
from icechunk.log.session.plan import tiles
from icechunk.repository import Repository
from icechunk.runtime.twins import run_sync
from icechunk.session import commit
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import Storage
from icechunk.testing.faulty import Fault, FaultyStorage, PlannedRequest
from icechunk.testing.recording import RecordingStorage
from icechunk.testing.wrapping import WrappingStorage
from tests.inside import content_of, core_of
from tests.nodes import delete_chunk, write_chunk, write_node
from tests.raising import raises

ARRAY = (
    b'{"zarr_format": 3, "node_type": "array", "shape": [%d, %d], "data_type": "int8", "chunk_grid": {"name": '
    b'"regular", "configuration": {"chunk_shape": [1, 1]}}, "chunk_key_encoding": {"name": "default"}, '
    b'"fill_value": 0, "codecs": [{"name": "bytes"}], "attributes": {}}'
)
BUCKET = "s3://bucket/"


async def repository(storage: Storage, *, cached_refs: int | None = None, **engine: Any) -> Repository:
    config = RepositoryConfig.default()
    config.caching = icechunk.CachingConfig(num_chunk_refs=cached_refs)
    config.engine = EngineConfig(**engine)
    config.set_virtual_chunk_container(icechunk.VirtualChunkContainer(BUCKET, icechunk.s3_store(region="us-east-1")))
    return await Repository.create_async(storage, config)


def write_blocks(session: icechunk.Session, shape: Sequence[int], blocks: int) -> None:
    """Virtual references for all chunks of a new array ``/a``, so many blocks of rows in turn."""
    rows, columns = shape
    run_sync(write_node(session, "/a", ARRAY % (rows, columns)))
    height = rows // blocks
    for first in range(0, rows, height):
        count = height * columns
        numbers = np.arange(first * columns, first * columns + count, dtype=np.uint64)
        session.store.set_virtual_refs_arr(
            "a", (height, columns), [f"{BUCKET}object"] * count, numbers, numbers + 1, arr_offset=(first, 0)
        )


async def check_rows(repository: Repository, shape: Sequence[int], rows: Sequence[int]) -> None:
    session = await repository.readonly_session_async("main")
    for row in rows:
        coords = divmod(row, shape[1])
        ref = await content_of(session).chunk_reference("/a", coords)
        assert ref is not None
        assert (ref.location, ref.offset, ref.length) == (f"{BUCKET}object", row, row + 1)


def written(storage: RecordingStorage) -> list[str]:
    """Keys of what was put. The look whether a store knows conditions is a put that is refused."""
    return [request.key for request in storage.requests if request.verb == "put" and request.error is None]


class SlowManifests(WrappingStorage):
    """Counts manifests on their way, each of which takes some turns of the loop."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.sizes: list[int] = []
        self.on_the_way = self.most_bytes = self.put_manifests = 0

    async def put(self, key, data, precondition=icechunk.storage.port.ANY, *, kind="metadata", metadata=None):  # type: ignore[no-untyped-def]
        if not key.startswith("manifests/"):
            return await self.inner.put(key, data, precondition, kind=kind, metadata=metadata)
        self.on_the_way += len(data)
        self.sizes.append(len(data))
        self.most_bytes = max(self.most_bytes, self.on_the_way)
        for _ in range(20):
            await asyncio.sleep(0)
        self.on_the_way -= len(data)
        self.put_manifests += 1
        return await self.inner.put(key, data, precondition, kind=kind, metadata=metadata)


async def test_manifests_are_encoded_as_those_before_them_are_put(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowManifests(MemoryStorage())
    bound = 30_000
    repo = await repository(slow, max_refs_per_manifest=1000, put_memory_bytes=bound, small_commit_bytes=0)
    encoded: list[int] = []
    most_held = 0

    def counting(*args: Any) -> bytes:
        nonlocal most_held
        data = encode_manifest(*args)
        encoded.append(len(data))
        most_held = max(most_held, sum(encoded) - sum(slow.sizes[: slow.put_manifests]))
        return data

    monkeypatch.setattr(commit, "encode_manifest", counting)
    session = await repo.writable_session_async("main")
    write_blocks(session, (200, 200), 4)
    await session.commit_async("many")
    assert len(encoded) == slow.put_manifests >= 40
    assert sum(encoded) > 3 * bound
    assert slow.most_bytes <= bound
    # One more is made while those are on their way, and one waits for its turn.
    assert most_held <= bound + 2 * max(encoded)
    await check_rows(repo, (200, 200), [0, 199, 200, 20_000, 39_999])


async def test_a_put_that_fails_amid_the_manifests_commits_nothing_and_a_later_try_does() -> None:
    faulty = FaultyStorage(MemoryStorage())
    repo = await repository(faulty, max_refs_per_manifest=1000, small_commit_bytes=0, put_memory_bytes=20_000)
    before = await repo.lookup_branch_async("main")
    session = await repo.writable_session_async("main")
    write_blocks(session, (100, 100), 2)
    seen = 0

    def fail_fifth(request: PlannedRequest) -> Fault:
        nonlocal seen
        seen += request.verb == "put" and request.key.startswith("manifests/")
        return Fault.FAIL_BEFORE if seen >= 5 and request.key.startswith("manifests/") else Fault.NONE

    faulty.plan = fail_fifth
    with pytest.raises(StorageError):
        await session.commit_async("fails")
    assert seen < 10
    assert await repo.lookup_branch_async("main") == before
    assert session.has_uncommitted_changes
    faulty.plan = lambda request: Fault.NONE
    # The session can be written on, and committed.
    await delete_chunk(session, "/a", (0, 0))
    await session.commit_async("works")
    await check_rows(await Repository.open_async(faulty), (100, 100), [1, 99, 100, 5_000, 9_999])
    assert await content_of(await repo.readonly_session_async("main")).chunk_reference("/a", (0, 0)) is None


async def test_a_commit_takes_less_memory_than_the_references_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_fold, "LARGE_LAYER", 2**15)
    monkeypatch.setattr(tiles, "_SLAB", 2**16)  # private: small numbers stand for large ones
    monkeypatch.setattr(transaction, "_BLOCK", 2**15)  # private: small numbers stand for large ones
    monkeypatch.setattr(commit, "in_parts", partial(in_parts, max_chunks=2**16))
    repo = await repository(
        icechunk.local_filesystem_storage(str(tmp_path)), cached_refs=500_000, max_refs_per_manifest=8192
    )
    session = await repo.writable_session_async("main")
    tracemalloc.start()
    try:
        began = tracemalloc.get_traced_memory()[0]
        write_blocks(session, (1000, 600), 50)
        held = tracemalloc.get_traced_memory()[0] - began
        tracemalloc.reset_peak()
        await session.commit_async("many")
        peak = tracemalloc.get_traced_memory()[1] - began
    finally:
        tracemalloc.stop()
    # Once each: coordinates, where the reference leads to, its offset and length.
    assert held < 600_000 * (8 + 4 + 8 + 8) * 1.2
    # Coordinates and the numbers of rows once more, and what a manifest and a transaction log take.
    assert peak < held * 1.9
    await check_rows(repo, (1000, 600), [0, 1, 599, 600, 300_000, 599_999])


@pytest.mark.parametrize("spec_version", [None, 2])
async def test_changes_in_several_transaction_logs_are_all_found(
    spec_version: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "in_parts", partial(in_parts, max_chunks=30))
    storage = MemoryStorage()
    repo = await Repository.create_async(storage, spec_version=spec_version)
    session = await repo.writable_session_async("main")
    await write_node(session, "/a", ARRAY % (10, 10))
    await write_node(session, "/b", ARRAY % (10, 10))
    base = await session.commit_async("two arrays")
    others = [await repo.writable_session_async("main") for _ in range(3)]
    session = await repo.writable_session_async("main")
    for i in range(100):
        await write_chunk(session, "/a", divmod(i, 10), b"x")
        await write_chunk(session, "/b", divmod(i, 10), b"y")
    tip = await session.commit_async("two hundred chunks")
    record = (await core_of(repo).state()).snapshots[object_id_from_text(tip)]
    assert len(record.pruned_ancestor_tx_logs) == 6
    diff = await repo.diff_async(from_snapshot_id=base, to_snapshot_id=tip)
    assert {path: len(rows) for path, rows in diff.updated_chunks.items()} == {"/a": 100, "/b": 100}
    for other, coords in zip(others, [(0, 0), (4, 9), (9, 9)], strict=True):
        await write_chunk(other, "/b", coords, b"z")
        with pytest.raises(icechunk.RebaseFailedError):
            await other.commit_async("conflicts", rebase_with=icechunk.ConflictDetector())
    # Another client, after a collection of all unreferenced objects.
    again = await Repository.open_async(storage)
    await again.garbage_collect_async(datetime.now(UTC) + timedelta(days=1))
    diff = await again.diff_async(from_snapshot_id=base, to_branch="main")
    assert {path: len(rows) for path, rows in diff.updated_chunks.items()} == {"/a": 100, "/b": 100}


async def test_more_changes_than_a_transaction_log_of_format_1_holds_are_refused_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transaction, "MAX_TABLES", 50)
    monkeypatch.setattr(transaction, "_SURELY_FEW", 0)  # private: small numbers stand for large ones
    storage = RecordingStorage(MemoryStorage(), turns=0)
    repo = await Repository.create_async(storage, spec_version=1)
    session = await repo.writable_session_async("main")
    await write_node(session, "/a", ARRAY % (10, 10))
    storage.clear()
    for i in range(60):
        await write_chunk(session, "/a", divmod(i, 10), b"x")
    with raises(InvalidInputError, "serialization", 60):
        await session.commit_async("too many")
    assert not written(storage)
    for i in range(30):
        await delete_chunk(session, "/a", divmod(i, 10))
    assert session.has_uncommitted_changes


async def test_more_references_than_a_manifest_holds_are_refused_and_splitting_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commit, "max_refs", lambda ndim: 50)
    recording = RecordingStorage(MemoryStorage(), turns=0)
    repo = await Repository.create_async(recording, spec_version=2)
    session = await repo.writable_session_async("main")
    await write_node(session, "/a", ARRAY % (10, 10))
    await write_node(session, "/few", ARRAY % (10, 10))
    for i in range(60):
        await write_chunk(session, "/a", divmod(i, 10), b"x")
    await write_chunk(session, "/few", (0, 0), b"x")
    recording.clear()
    with raises(InvalidInputError, "serialization", 60, "'/a'", "ManifestConfig.splitting"):
        await session.commit_async("too many")
    assert not written(recording)

    config = RepositoryConfig.default()
    config.manifest = icechunk.ManifestConfig(
        splitting=icechunk.ManifestSplittingConfig.from_dict(
            {icechunk.ManifestSplitCondition.AnyArray(): {icechunk.ManifestSplitDimCondition.Axis(0): 5}}
        )
    )
    split = await Repository.open_async(recording, config)
    session = await split.writable_session_async("main")
    await write_node(session, "/a", ARRAY % (10, 10))
    for i in range(60):
        await write_chunk(session, "/a", divmod(i, 10), b"x")
    await session.commit_async("split")
    assert len(split.list_manifest_files(session.snapshot_id)) == 2
