"""Every setting of transfers shows: in requests at a time, in their sizes, and in what stays in memory."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from zarr.core.buffer import default_buffer_prototype

from icechunk.config import (
    CachingConfig,
    EngineConfig,
    RepositoryConfig,
    StorageConcurrencySettings,
    StorageSettings,
)
from icechunk.errors import InvalidInputError
from icechunk.repository import Repository
from icechunk.session import Session
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import ByteRange, GetResult, PutResult, Range, Storage
from icechunk.testing.wrapping import WrappingStorage
from tests.inside import content_of, core_of
from tests.nodes import read_chunk, write_chunk, write_node
from tests.raising import raises

ARRAY = (
    b'{"zarr_format": 3, "node_type": "array", "shape": [64], "data_type": "int8", "chunk_grid": {"name": "regular", '
    b'"configuration": {"chunk_shape": [1]}}, "chunk_key_encoding": {"name": "default"}, "fill_value": 0, '
    b'"codecs": [{"name": "bytes"}], "attributes": {}}'
)
ALONE = EngineConfig(pack_threshold_bytes=0)


class Counting(WrappingStorage):
    """Counts requests for chunks, and how many there are at a time; each takes a few turns of the loop."""

    def __init__(self, inner: Storage | None = None) -> None:
        super().__init__(inner or MemoryStorage())
        self.now = self.most = self.bytes = self.most_bytes = 0
        self.read: list[int] = []
        """Bytes of each read."""

    @property
    def gains_from_split_reads(self) -> bool:
        return isinstance(self.inner, MemoryStorage) or super().gains_from_split_reads

    async def _hold(self, size: int, work: Any) -> Any:
        self.now, self.bytes = self.now + 1, self.bytes + size
        self.most, self.most_bytes = max(self.most, self.now), max(self.most_bytes, self.bytes)
        try:
            for _ in range(20):
                await asyncio.sleep(0)
            return await work
        finally:
            self.now, self.bytes = self.now - 1, self.bytes - size

    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        if not key.startswith("chunks/") or not isinstance(byte_range, Range) or byte_range.end is None:
            return await super().get(key, byte_range)
        self.read.append(byte_range.end - byte_range.start)
        found: GetResult = await self._hold(self.read[-1], super().get(key, byte_range))
        return found

    async def put(self, key: str, data: Any, *args: Any, **kwargs: Any) -> PutResult:
        if not key.startswith("chunks/"):
            return await super().put(key, data, *args, **kwargs)
        done: PutResult = await self._hold(len(data), super().put(key, data, *args, **kwargs))
        return done


async def filled(
    config: RepositoryConfig, size: int = 1000, inner: Storage | None = None
) -> tuple[Counting, Repository, Session]:
    """A repository with 32 chunks of so many bytes, and a session that reads them."""
    storage = Counting(inner)
    repository = await Repository.create_async(storage, config)
    session = await repository.writable_session_async("main")
    await write_node(session, "/a", ARRAY)
    for n in range(32):
        await write_chunk(session, "/a", (n,), bytes([n]) * size)
    await session.commit_async("x")
    return storage, repository, await repository.readonly_session_async("main")


async def read_all(session: Session) -> None:
    found = await asyncio.gather(*(read_chunk(session, "/a", (n,)) for n in range(32)))
    assert [data[0] for data in found if data] == list(range(32))


async def test_requests_of_all_sessions_reads_and_writes_are_bounded_together() -> None:
    storage, repository, reader = await filled(RepositoryConfig(max_concurrent_requests=4, engine=ALONE))
    assert storage.most == 4
    writers = [await repository.writable_session_async("main") for _ in range(3)]

    async def write(session: Session) -> None:
        for n in range(32):
            await write_chunk(session, "/a", (n,), bytes(1000))
        await session.flush_async("x")

    async with asyncio.timeout(30):
        await asyncio.gather(read_all(reader), *map(write, writers))
    assert storage.most == 4


async def test_bytes_in_flight_are_bounded() -> None:
    config = RepositoryConfig(engine=EngineConfig(pack_threshold_bytes=0, max_bytes_in_flight=2500))
    storage, _, reader = await filled(config)
    await read_all(reader)
    assert storage.most_bytes == 2000


async def test_chunk_bytes_on_their_way_are_bounded_for_all_sessions_together() -> None:
    config = RepositoryConfig(engine=EngineConfig(pack_threshold_bytes=0, put_memory_bytes=5000))
    storage, repository, _ = await filled(config)
    sessions = [await repository.writable_session_async("main") for _ in range(4)]

    async def write(session: Session) -> None:
        for n in range(32):
            await write_chunk(session, "/a", (n,), bytes(1000))
            # private: memory is public nowhere
            assert sum(content_of(other).puts._pool.held_bytes for other in sessions) <= 5000

    async with asyncio.timeout(30):
        await asyncio.gather(*map(write, sessions))
        for session in sessions:
            await session.flush_async("x")
    assert storage.most_bytes <= 5000


@pytest.mark.parametrize(("most", "expected"), [(3, 3), (None, 32)])
async def test_values_of_one_call_are_fetched_so_many_at_a_time(most: int | None, expected: int) -> None:
    storage, _, reader = await filled(RepositoryConfig(get_partial_values_concurrency=most, engine=ALONE))
    storage.most = 0
    # Not in order: who walks along an array is served ahead, beside what was asked for.
    wanted = [(f"a/c/{n * 13 % 32}", None) for n in range(32)]
    found = await reader.store.get_partial_values(default_buffer_prototype(), wanted)
    assert all(found)
    assert storage.most == expected


async def test_long_reads_are_split_where_the_size_of_a_request_is_set() -> None:
    size = 3_000_000
    whole = RepositoryConfig(engine=ALONE)
    split = RepositoryConfig(
        engine=ALONE,
        storage=StorageSettings(
            concurrency=StorageConcurrencySettings(
                ideal_concurrent_request_size=400_000, max_concurrent_requests_for_object=3
            )
        ),
    )
    storage, _, reader = await filled(whole, size)
    assert await read_chunk(reader, "/a", (7,)) == b"\7" * size
    assert storage.read == [size]
    storage, _, reader = await filled(split, size)
    storage.most = 0
    assert await read_chunk(reader, "/a", (7,)) == b"\7" * size
    assert storage.read == [375_000] * 8
    assert storage.most == 3


async def test_long_reads_are_split_unless_enough_requests_are_on_their_way() -> None:
    size = 400_000
    settings = StorageSettings(concurrency=StorageConcurrencySettings(5, 200_000))
    storage, _, reader = await filled(RepositoryConfig(engine=ALONE, storage=settings), size)
    await read_all(reader)
    assert storage.read.count(size) > 20
    assert storage.read.count(size // 2) == 2 * (32 - storage.read.count(size)) > 0


async def test_long_transfers_are_split_by_default_where_that_can_help() -> None:
    size = 13 << 20
    storage, repository, _ = await filled(RepositoryConfig(engine=ALONE), 10)
    session = await repository.writable_session_async("main")
    await write_chunk(session, "/a", (7,), bytes(size))
    await session.commit_async("x")
    reader = await repository.readonly_session_async("main")
    assert await read_chunk(reader, "/a", (7,)) == bytes(size)
    assert storage.read == [size // 2] * 2


async def test_files_of_a_local_disk_are_read_whole_for_any_configured_size_of_requests(tmp_path: Path) -> None:
    """The official library persists 4 KiB for them."""
    concurrency = StorageConcurrencySettings(ideal_concurrent_request_size=4096)
    config = RepositoryConfig(engine=ALONE, storage=StorageSettings(concurrency=concurrency))
    storage, _, reader = await filled(config, 3_000_000, LocalStorage(tmp_path))
    assert await read_chunk(reader, "/a", (7,)) == b"\7" * 3_000_000
    assert storage.read == [3_000_000]


@pytest.mark.parametrize(("kept", "reads"), [(None, 2), (0, 2), (10_000_000, 1)])
async def test_chunks_are_kept_where_there_is_room_set_for_them(kept: int | None, reads: int) -> None:
    config = RepositoryConfig(engine=ALONE, caching=CachingConfig(num_bytes_chunks=kept))
    storage, _, reader = await filled(config)
    for _ in range(2):
        assert await read_chunk(reader, "/a", (7,)) == b"\7" * 1000
    assert len(storage.read) == reads


async def test_caches_of_metadata_are_bounded() -> None:
    config = RepositoryConfig(caching=CachingConfig(num_snapshot_nodes=0, num_chunk_refs=0, num_transaction_changes=0))
    _, repository, reader = await filled(config)
    await read_all(reader)
    assets = core_of(repository).assets
    # private: what a client remembers is public nowhere
    assert (len(assets._snapshots), len(assets._manifests), len(assets._transactions)) == (0, 0, 0)
    _, repository, reader = await filled(RepositoryConfig())
    await read_all(reader)
    # private: what a client remembers is public nowhere
    assert (len(core_of(repository).assets._snapshots), len(core_of(repository).assets._manifests)) > (0, 0)


@pytest.mark.parametrize("value", [0, 49, 101])
def test_percentile_that_makes_no_sense_is_refused(value: int) -> None:
    with raises(InvalidInputError, "invalid-setting", "EngineConfig.hedge_percentile"):
        EngineConfig(hedge_percentile=value)
