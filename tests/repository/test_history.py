"""Snapshots of a history, whose fields are read when they are looked at."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re

import pytest

from icechunk.errors import RefNotFoundError, SnapshotNotFoundError
from icechunk.repository import Repository
from icechunk.snapshots import SnapshotInfo
from icechunk.storage.memory import MemoryStorage


async def test_snapshots_of_a_stored_history_are_the_values_that_a_look_up_returns() -> None:
    storage = MemoryStorage()
    async with await Repository.create_async(storage) as repository:
        for n in range(70):
            session = await repository.writable_session_async("main")
            await session.commit_async(f"commit {n}", {"n": n} if n % 10 == 0 else None, allow_empty=True)
        await repository.checkpoint_async()
    async with await Repository.open_async(storage) as repository:
        session = await repository.writable_session_async("main")
        await session.commit_async("newest", allow_empty=True)
        infos = [info async for info in repository.async_ancestry(branch="main")]
        again = [info async for info in repository.async_ancestry(branch="main")]
        assert [info.message for info in infos] == [
            "newest",
            *(f"commit {n}" for n in range(69, -1, -1)),
            infos[-1].message,
        ]
        assert [info.parent_id for info in infos] == [*(info.id for info in infos[1:]), None]
        assert again == infos
        for info in infos:
            expected = await repository.lookup_snapshot_async(info.id)
            assert info == expected
            assert repr(info) == repr(expected)
        fresh = [info async for info in repository.async_ancestry(branch="main")]
    assert [copy.copy(info) for info in fresh] == infos
    assert pickle.loads(pickle.dumps(fresh)) == infos
    assert dataclasses.asdict(fresh[1]) == dataclasses.asdict(infos[1])
    assert dataclasses.replace(fresh[1], message="x").message == "x"
    with pytest.raises(AttributeError, match=re.escape("nothing")):
        _ = fresh[2].nothing
    with pytest.raises(dataclasses.FrozenInstanceError):
        fresh[2].message = "y"  # type: ignore[misc]
    assert isinstance(fresh[2], SnapshotInfo)
    assert not hasattr(SnapshotInfo.__new__(SnapshotInfo), "message")


@pytest.mark.parametrize("version", [None, 2, 1], ids=["log", "repo", "refs"])
def test_an_unknown_start_is_refused_before_the_first_item(version: int | None) -> None:
    repo = Repository.create(MemoryStorage(), spec_version=version)
    for start in ({"branch": "nope"}, {"tag": "nope"}):
        with pytest.raises(RefNotFoundError):
            repo.ancestry(**start)
    with pytest.raises(SnapshotNotFoundError):
        repo.ancestry(snapshot_id="0" * 20)
    with pytest.raises(ValueError, match="branch"):  # words: it has no kind
        repo.ancestry()
    assert [info.parent_id for info in repo.ancestry(branch="main")] == [None]
