"""Commits of many references: no more is held than is on its way, and a failure in between leaves nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import icechunk
from icechunk import commit_files
from icechunk.config import EngineConfig, RepositoryConfig
from icechunk.errors import StorageError
from icechunk.format.manifest import encode_manifest
from icechunk.repository import Repository
from icechunk.storage.base import Storage
from icechunk.storage.memory import MemoryStorage
from icechunk.testing.faulty import Fault, FaultyStorage, PlannedRequest
from icechunk.testing.wrapping import WrappingStorage

ARRAY = (
    b'{"zarr_format": 3, "node_type": "array", "shape": [%d, %d], "data_type": "int8", "chunk_grid": {"name": '
    b'"regular", "configuration": {"chunk_shape": [1, 1]}}, "chunk_key_encoding": {"name": "default"}, '
    b'"fill_value": 0, "codecs": [{"name": "bytes"}], "attributes": {}}'
)
BUCKET = "s3://bucket/"


async def repository(storage: Storage, **engine: Any) -> Repository:
    config = RepositoryConfig.default()
    config.engine = EngineConfig(**engine)
    config.set_virtual_chunk_container(icechunk.VirtualChunkContainer(BUCKET, icechunk.s3_store(region="us-east-1")))
    return await Repository.create_async(storage, config)


def write_blocks(session: icechunk.Session, shape: Sequence[int], blocks: int) -> None:
    """Virtual references for all chunks of a new array ``/a``, so many blocks of rows in turn."""
    rows, columns = shape
    session.set_metadata("/a", ARRAY % (rows, columns))
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
        ref = await session.chunk_reference("/a", coords)
        assert ref is not None
        assert (ref.location, ref.offset, ref.length) == (f"{BUCKET}object", row, row + 1)


class SlowManifests(WrappingStorage):
    """Counts manifests on their way, each of which takes some turns of the loop."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.sizes: list[int] = []
        self.on_the_way = self.most_bytes = self.put_manifests = 0

    async def put(self, key, data, precondition=icechunk.storage.base.ANY, *, kind="metadata", metadata=None):  # type: ignore[no-untyped-def]
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

    monkeypatch.setattr(commit_files, "encode_manifest", counting)
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
    session.delete_chunk("/a", (0, 0))
    await session.commit_async("works")
    await check_rows(await Repository.open_async(faulty), (100, 100), [1, 99, 100, 5_000, 9_999])
    assert await (await repo.readonly_session_async("main")).chunk_reference("/a", (0, 0)) is None
