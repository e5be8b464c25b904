"""Objects that are written now and made durable later."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from icechunk.errors import StorageError
from icechunk.storage.local import folders
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.port import Absent, Matches, Put
from tests.raising import raises


async def test_nothing_is_synced_before_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(folders, "syncs_names", lambda device: False)
    storage = LocalStorage(tmp_path)
    await storage.prepare(["chunks"])
    monkeypatch.setattr(os, "fsync", synced.append)
    keys = [f"chunks/{n}" for n in range(20)]
    answers = await storage.put_unsynced([Put(key, b"1") for key in keys])
    assert None not in answers
    assert synced == []
    await storage.sync(keys)
    assert len(synced) == 21, "each file, and their folder once"


async def test_conditions_hold_and_later_objects_are_written_all_the_same(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    old = (await storage.put("repo", b"old")).version
    await storage.put("repo", b"new")
    await storage.put("there", b"same")
    answers = await storage.put_unsynced(
        [
            Put("repo", b"mine", Matches(old)),
            Put("there", b"same", Absent()),
            Put("a", b"1", Absent()),
        ]
    )
    assert [answer is None for answer in answers] == [True, True, False]
    assert (await storage.get("repo")).data == b"new"
    assert answers[2] is not None
    assert (await storage.head("a")).version == answers[2].version


@pytest.mark.parametrize("torn", [b"", b"whol", bytes(5), b"longer than whole"])
async def test_files_torn_by_a_power_failure_are_written_again(tmp_path: Path, torn: bytes) -> None:
    storage = LocalStorage(tmp_path)
    await storage.put("snapshots/x", torn)
    assert None not in await storage.put_unsynced([Put("snapshots/x", b"whole", Absent())])
    assert (await storage.get("snapshots/x")).data == b"whole"


async def test_an_object_that_is_gone_cannot_be_synced(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    await storage.put_unsynced([Put("chunks/x", b"1")])
    (tmp_path / "chunks" / "x").unlink()
    with raises(StorageError, "io", "chunks/x"):
        await storage.sync(["chunks/x"])


async def test_a_failing_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    await storage.put_unsynced([Put("chunks/x", b"1")])

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with raises(StorageError, "io", os.strerror(errno.EIO)) as caught:
        await storage.sync(["chunks/x"])
    assert not caught.value.refused
