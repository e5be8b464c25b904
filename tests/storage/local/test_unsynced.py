"""Objects that are written now and made durable later."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from icechunk.errors import StorageError
from icechunk.storage.local import files, folders
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


class TogetherCalls:
    """A substitute for the system's calls: a sync of everything, and the question whether a file's bytes got there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, all_fails: bool = False, lost: str = "") -> None:
        self.all = 0
        self.asked: list[str] = []

        def sync_file_system(descriptor: int) -> int:
            self.all += 1
            ctypes.set_errno(errno.EIO)
            return -1 if all_fails else 0

        def start_range(descriptor: int, offset: int, size: int, flags: int) -> int:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if flags == files._SYNC_FILE_RANGE_WRITE:
                return 0
            self.asked.append(path)
            ctypes.set_errno(errno.EIO)
            return -1 if lost and lost in path else 0

        monkeypatch.setattr(folders, "syncs_names", lambda device: True)
        monkeypatch.setattr(files, "_unwritten_bytes", lambda: 0)
        monkeypatch.setattr(files, "_sync_file_system", lambda: sync_file_system)
        monkeypatch.setattr(files, "_start_range", lambda: start_range)


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads names of descriptors from /proc")


@linux
async def test_an_object_appears_after_others_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = TogetherCalls(monkeypatch)
    storage = LocalStorage(tmp_path)
    await storage.put_unsynced([Put("chunks/x", b"1"), Put("chunks/y", b"2")])
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    put = await storage.put_after(["chunks/x", "chunks/y"], Put("repo", b"3", Absent()))
    assert (await storage.get("repo")).version == put.version
    assert calls.all == 1
    assert [path.rpartition("/")[2] for path in calls.asked[:2]] == ["x", "y"]
    assert synced == [str(tmp_path)], "the object's name"


@linux
@pytest.mark.parametrize("failing", [{"all_fails": True}, {"lost": "chunks/x"}], ids=["everything", "one file"])
async def test_an_object_does_not_appear_if_others_may_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: Any
) -> None:
    TogetherCalls(monkeypatch, **failing)
    storage = LocalStorage(tmp_path)
    await storage.put_unsynced([Put("chunks/x", b"1"), Put("chunks/y", b"2")])
    with pytest.raises(StorageError) as raised:
        await storage.put_after(["chunks/x", "chunks/y"], Put("repo", b"3", Absent()))
    assert raised.value.refused, "another try would succeed, without the bytes"
    assert sorted(os.listdir(tmp_path)) == [".aioicechunk", "chunks"]
    assert os.listdir(tmp_path / ".aioicechunk") == []
    with pytest.raises(StorageError):
        await storage.sync(["chunks/x", "chunks/y"])


@linux
async def test_objects_that_were_removed_are_not_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TogetherCalls(monkeypatch)
    storage = LocalStorage(tmp_path)
    await storage.put_unsynced([Put("chunks/x", b"1"), Put("chunks/y", b"2")])
    (tmp_path / "chunks" / "y").unlink()
    with pytest.raises(StorageError):
        await storage.sync(["chunks/x", "chunks/y"])


@pytest.mark.parametrize("release", ["4.18.0-553.el8.x86_64", "5.7.1", "unknown"])
def test_a_kernel_that_hides_errors_does_not_sync_together(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    assert files._sync_file_system.__wrapped__() is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the call")
@pytest.mark.parametrize("release", ["5.8.0", "6.18.44-fc", "10.0"])
def test_a_kernel_that_reports_errors_syncs_together(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    assert files._sync_file_system.__wrapped__() is not None


@linux
def test_the_systems_own_calls_work(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    done = files.fsync_together([str(tmp_path / "x")])
    assert done == (files._sync_file_system() is not None and files._unwritten_bytes() <= files._OTHERS_BYTES + 1)


async def test_a_file_that_this_process_made_durable_is_read_without_a_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(tmp_path)
    await storage.put("repo", b"1")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    await storage.get("repo")
    assert synced == []
    other = LocalStorage(tmp_path)
    await other.get("repo")
    await other.get("repo")
    assert len(synced) == 1, "it is young, and another client's"
