"""A collection that starts from what the one before found to live."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime, timedelta

import numpy as np
import pytest
import zarr

import icechunk
from icechunk.format.ids import object_id_from_text
from icechunk.format.keys import CHUNKS_PREFIX
from icechunk.maintenance import living
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import ObjectInfo, Storage
from icechunk.testing.recording import RecordingStorage
from icechunk.testing.wrapping import WrappingStorage
from tests.inside import log_of
from tests.maintenance.helpers import AgedStorage, History, ago, by_layout


async def read_again(recording: RecordingStorage, history: History, cutoff: datetime | None = None) -> list[str]:
    """The kinds of metadata files that a collection reads, sorted."""
    recording.clear()
    await history.repo.garbage_collect_async(cutoff or ago(days=1))
    asked = [one.key.split("/")[0] for one in recording.requests if one.verb == "get"]
    return sorted(kind for kind in asked if kind in ("snapshots", "manifests"))


async def commit(history: History, value: int) -> None:
    session = await history.repo.writable_session_async("main")
    array = await zarr.api.asynchronous.open_array(store=session.store, path="a", mode="r+")
    await array.setitem(slice(0, 2), np.full(2, value, "i4"))
    await session.commit_async(f"{value}")


@by_layout
async def test_a_second_collection_reads_only_new_files(version: int | None) -> None:
    recording = RecordingStorage(AgedStorage(MemoryStorage()), turns=0)
    history = await History.create(recording, version)
    for value in range(5):
        await commit(history, value)
    first = await read_again(recording, history)
    again = await read_again(recording, history)
    if version == 1:
        # In format 1 what is reachable is known from the files only.
        assert again == first
        return
    assert len(first) > 10
    assert again == []
    await commit(history, 7)
    assert await read_again(recording, history) == ["manifests", "snapshots"]
    assert await read_again(recording, history) == []


@pytest.mark.parametrize("version", [None, 2], ids=["log", "repo"])
async def test_after_an_expiration_dead_objects_are_collected_all_the_same(version: int | None) -> None:
    storage = MemoryStorage()
    history = await History.create(AgedStorage(storage), version)
    for value in range(5):
        await commit(history, value)
    assert (await history.repo.garbage_collect_async(ago(days=1))).chunks_deleted == 0
    infos = [info async for info in history.repo.async_ancestry(branch="main")]
    await history.repo.expire_snapshots_async(infos[0].written_at)
    summary = await history.repo.garbage_collect_async(ago(days=1))
    assert summary.chunks_deleted >= 4
    assert summary.snapshots_deleted >= 4
    session = await icechunk.Repository.open_async(storage)
    array = await zarr.api.asynchronous.open_array(
        store=(await session.readonly_session_async("main")).store, path="a", mode="r"
    )
    assert np.array_equal(np.asarray(await array.getitem(slice(0, 2))), [4, 4])


@pytest.mark.parametrize("version", [None, 2], ids=["log", "repo"])
async def test_a_snapshot_that_lost_its_branch_is_no_longer_taken_from_memory(version: int | None) -> None:
    recording = RecordingStorage(AgedStorage(MemoryStorage()), turns=0)
    history = await History.create(recording, version)
    await commit(history, 1)
    infos = [info async for info in history.repo.async_ancestry(branch="main")]
    old = infos[0].written_at - timedelta(days=1)
    await read_again(recording, history, old)
    await history.repo.reset_branch_async("main", infos[1].id)
    # It stays, since it is young; but its chunks must not be moved, which is known only from reading it.
    assert await read_again(recording, history, old)
    log = await log_of(history.repo)
    assert object_id_from_text(infos[0].id) in log.state.snapshots


class MeanwhileStorage(WrappingStorage):
    """Something happens before chunks are listed."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.meanwhile: Callable[[], Awaitable[object]] | None = None

    async def list_pages(
        self, prefix: str = "", *, start_after: str | None = None, page_size: int = 1000
    ) -> AsyncIterator[list[ObjectInfo]]:
        if prefix == CHUNKS_PREFIX and (meanwhile := self.meanwhile) is not None:
            self.meanwhile = None
            await meanwhile()
        async for page in super().list_pages(prefix, start_after=start_after, page_size=page_size):
            yield page


@pytest.mark.parametrize("change", ["create a tag", "delete a branch", "commit"])
@pytest.mark.parametrize("version", [None, 2], ids=["log", "repo"])
async def test_findings_are_kept_unless_what_a_collection_sees_while_it_deletes_makes_them_incomplete(
    version: int | None, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(living, "_LOOK_EVERY_US", -1)
    meanwhile = MeanwhileStorage(AgedStorage(MemoryStorage()))
    recording = RecordingStorage(meanwhile, turns=0)
    history = await History.create(recording, version)
    for value in range(5):
        await commit(history, value)
    infos = [info async for info in history.repo.async_ancestry(branch="main")]
    await history.repo.create_branch_async("b", infos[0].id)
    branch = await history.repo.writable_session_async("b")
    await (await zarr.api.asynchronous.create_group(store=branch.store, path="g")).update_attributes({"of": "b"})
    tip = await branch.commit_async("on the branch")
    await history.repo.expire_snapshots_async(infos[0].written_at)
    other = await icechunk.Repository.open_async(recording)

    async def happens() -> None:
        if change == "create a tag":
            await other.create_tag_async("t", infos[-1].id)
        elif change == "delete a branch":
            await other.delete_branch_async("b")
        else:
            session = await other.writable_session_async("b")
            await zarr.api.asynchronous.create_group(store=session.store, path="h")
            await session.commit_async("another")

    meanwhile.meanwhile = happens
    summary = await history.repo.garbage_collect_async(ago(days=1))
    assert summary.snapshots_deleted >= 4
    assert meanwhile.meanwhile is None
    young = datetime.fromisoformat("2000-01-01T00:00:00+00:00")
    # A snapshot that lost its branch stays here, since it is young; its chunks must not be moved.
    assert bool(await read_again(recording, history, young)) == (change != "create a tag")
    assert object_id_from_text(tip) in (await log_of(history.repo)).state.snapshots
