"""Chunks that the disk has lost by the time a commit wants them durable: nothing is committed, then and later."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from pathlib import Path

import pytest
from zarr.core.buffer import default_buffer_prototype

import icechunk
from icechunk.storage.local import folders
from tests.promises import UNKNOWN
from tests.raising import raises

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads names of descriptors from /proc")

GROUP = b'{"zarr_format":3,"node_type":"group","attributes":{}}'
ARRAY = (
    b'{"zarr_format":3,"node_type":"array","shape":[4],"data_type":"uint8","chunk_grid":{"name":"regular",'
    b'"configuration":{"chunk_shape":[1]}},"chunk_key_encoding":{"name":"default"},"fill_value":0,"codecs":'
    b'[{"name":"bytes"}]}'
)


class FailingDisk:
    """Fails the syncs of chunk objects, each once, as systems do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails = 0
        real = os.fsync

        def fsync(descriptor: int) -> None:
            if self.fails and "/chunks/" in os.readlink(f"/proc/self/fd/{descriptor}"):
                self.fails -= 1
                raise OSError(errno.EIO, "input/output error")
            real(descriptor)

        monkeypatch.setattr(folders, "promises_of", lambda device: UNKNOWN)
        monkeypatch.setattr(os, "fsync", fsync)


async def put(session: icechunk.Session, key: str, value: bytes) -> None:
    await session.store.set(key, default_buffer_prototype().buffer.from_bytes(value))


async def with_array(path: Path) -> icechunk.Repository:
    repo = await icechunk.Repository.create_async(icechunk.local_filesystem_storage(str(path)))
    session = await repo.writable_session_async("main")
    await put(session, "a/zarr.json", ARRAY)
    await session.commit_async("an array")
    return repo


async def test_a_commit_fails_for_good_once_one_of_its_chunks_may_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FailingDisk(monkeypatch)
    repo = await with_array(tmp_path)
    tip = await repo.lookup_branch_async("main")
    session = await repo.writable_session_async("main")
    await put(session, "a/c/0", bytes(10_000))
    disk.fails = 1
    with raises(icechunk.IcechunkError, "io", "chunks/") as raised:
        await session.commit_async("lost")
    assert not isinstance(raised.value, icechunk.ConflictError)
    # The system tells of a failure once: the next sync succeeds, without the bytes.
    with raises(icechunk.IcechunkError, "storage-other", "chunks/"):
        await session.commit_async("again")
    assert await repo.lookup_branch_async("main") == tip
    again = await repo.writable_session_async("main")
    await put(again, "a/c/0", bytes(10_000))
    await again.commit_async("in a new session")


async def test_commits_that_share_an_entry_with_one_whose_chunk_is_lost_land(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FailingDisk(monkeypatch)
    repo = await with_array(tmp_path)
    sessions: list[icechunk.Session] = []
    for number in range(4):
        await repo.create_branch_async(str(number), await repo.lookup_branch_async("main"))
        sessions.append(await repo.writable_session_async(str(number)))
        if number == 1:
            await put(sessions[1], "a/c/1", bytes(10_000))
        else:
            await put(sessions[number], f"g{number}/zarr.json", GROUP)
    disk.fails = 1
    answers = await asyncio.gather(*(s.commit_async(str(n)) for n, s in enumerate(sessions)), return_exceptions=True)
    assert isinstance(answers[1], icechunk.IcechunkError)
    assert answers[1].kind == "io"
    assert disk.fails == 0
    for number in (0, 2, 3):
        assert answers[number] == await repo.lookup_branch_async(str(number))
    await repo.aclose()
    reopened = await icechunk.Repository.open_async(icechunk.local_filesystem_storage(str(tmp_path)))
    assert await reopened.lookup_branch_async("1") == await reopened.lookup_branch_async("main")
