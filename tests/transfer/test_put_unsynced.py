"""The put pool on a disk: written when put, durable when flushed, and a loss is never forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from icechunk.errors import ErrorKind, StorageError
from icechunk.format.ids import ObjectId
from icechunk.format.keys import chunk_key
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.port import Put, PutResult
from icechunk.transfer.limiter import Gates
from icechunk.transfer.packs import Packs
from icechunk.transfer.put import PutMemory, PutPool
from tests.raising import raises


class Disk(LocalStorage):
    """Notes what is synced; fails when asked to."""

    fails = False

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.synced: list[list[str]] = []

    async def barrier(self, keys: Iterable[str]) -> None:
        self.synced.append(list(keys))
        if self.fails:
            raise StorageError("Input/output error", ErrorKind.IO)


def pool_on(disk: Disk) -> PutPool:
    return PutPool(disk, memory=PutMemory(10**6), gates=Gates(8))


async def test_puts_are_written_and_a_flush_makes_all_of_them_durable_at_once(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    pool = pool_on(disk)
    for number in range(3):
        await pool.put(f"chunks/{number}", b"x")
        assert (tmp_path / "chunks" / str(number)).read_bytes() == b"x"
        assert (pool.in_flight, pool.held_bytes, pool.is_durable) == (0, 0, False)
    assert disk.synced == []
    await pool.flush()
    assert disk.synced == [["chunks/0", "chunks/1", "chunks/2"]]
    assert pool.is_durable
    await pool.flush()
    assert len(disk.synced) == 1


async def test_after_a_failed_sync_no_flush_succeeds(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    pool = pool_on(disk)
    await pool.put("chunks/x", b"x")
    disk.fails = True
    with pytest.raises(StorageError):
        await pool.flush()
    # The system tells of a failure once: a second sync would succeed, without the bytes.
    disk.fails = False
    with raises(StorageError, "storage-other", "chunks/x"):
        await pool.flush()
    assert not pool.is_durable
    pool.discard()
    await pool.flush()
    assert pool.is_durable


async def test_a_few_objects_are_left_to_be_made_durable_by_the_put_that_refers_to_them(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    pool = pool_on(disk)
    assert await pool.finish_writes() == []
    for number in range(4):
        await pool.put(f"chunks/{number}", b"x")
    left = await pool.finish_writes()
    assert left == [f"chunks/{number}" for number in range(4)]
    assert (disk.synced, pool.is_durable) == ([], False)
    pool.synced(left)
    assert pool.is_durable
    for number in range(5):
        await pool.put(f"chunks/{number}", b"x")
    assert await pool.finish_writes() == []
    assert len(disk.synced[0]) == 5
    assert pool.is_durable


async def test_after_such_an_object_was_lost_no_flush_succeeds(tmp_path: Path) -> None:
    pool = pool_on(Disk(tmp_path))
    await pool.put("chunks/x", b"x")
    left = await pool.finish_writes()
    pool.require_kept(left)
    pool.synced(left, lost=True)
    for call in (pool.finish_writes, pool.flush):
        with raises(StorageError, "storage-other", "chunks/x"):
            await call()
    with raises(StorageError, "storage-other", "chunks/x"):
        pool.require_kept(left)
    pool.discard()
    await pool.flush()


async def test_a_large_chunk_is_written_from_its_callers_memory_and_is_there_when_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path)
    packs = Packs(pool_on(disk), lambda: ObjectId(bytes(12)), threshold_bytes=1000, size_bytes=2000)
    memory = bytearray(b"x" * 1000)
    written: list[object] = []
    real = disk.put_unsynced

    async def put_unsynced(puts: Sequence[Put]) -> list[PutResult | None]:
        written.extend(put.data.obj for put in puts if isinstance(put.data, memoryview))
        return await real(puts)

    monkeypatch.setattr(disk, "put_unsynced", put_unsynced)
    id, offset = await packs.put(memoryview(memory))
    memory[:] = bytes(1000)
    assert (tmp_path / chunk_key(id)).read_bytes() == b"x" * 1000
    assert offset == 0
    assert written == [memory]
    assert written[0] is memory
