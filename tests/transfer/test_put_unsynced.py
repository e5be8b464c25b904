"""The put pool on a disk: written when put, durable when flushed, and a loss is never forgotten."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from icechunk.errors import ErrorKind, StorageError
from icechunk.storage.local.storage import LocalStorage
from icechunk.transfer.limiter import Gates
from icechunk.transfer.put import PutMemory, PutPool
from tests.raising import raises


class Disk(LocalStorage):
    """Notes what is synced; fails when asked to."""

    fails = False

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.synced: list[list[str]] = []

    async def sync(self, keys: Iterable[str]) -> None:
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
