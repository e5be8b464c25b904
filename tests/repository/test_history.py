"""Snapshots of a history, whose fields are read when they are looked at."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re

import pytest

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
