"""Objects that are written now and made durable later."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import pickle
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from icechunk.errors import PreconditionFailedError, StorageError
from icechunk.storage.local import folders, syncs
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.local.syncs import Promises
from icechunk.storage.port import Absent, Following, Matches, Put
from tests.promises import BTRFS, EXT4, EXT4_WITHOUT_JOURNAL, UNKNOWN
from tests.raising import raises


async def test_nothing_is_synced_before_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(folders, "promises_of", lambda device: UNKNOWN)
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

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        all_fails: bool = False,
        lost: str = "",
        promises: Promises = BTRFS,
    ) -> None:
        self.all = 0
        self.asked: list[str] = []

        def sync_file_system(descriptor: int) -> int:
            self.all += 1
            ctypes.set_errno(errno.EIO)
            return -1 if all_fails else 0

        def start_range(descriptor: int, offset: int, size: int, flags: int) -> int:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if flags == syncs._WRITE:
                return 0
            self.asked.append(path)
            ctypes.set_errno(errno.EIO)
            return -1 if lost and lost in path else 0

        monkeypatch.setattr(folders, "promises_of", lambda device: promises)
        monkeypatch.setattr(syncs, "_unwritten_bytes", lambda: 0)
        monkeypatch.setattr(syncs, "_sync_file_system", lambda: sync_file_system)
        monkeypatch.setattr(syncs, "_sync_file_range", lambda: start_range)


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
@pytest.mark.parametrize("promises", [EXT4, EXT4_WITHOUT_JOURNAL], ids=["ext4", "ext4 without a journal"])
async def test_an_object_does_not_appear_if_one_behind_a_barrier_may_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, promises: Promises
) -> None:
    TogetherCalls(monkeypatch, promises=promises, lost="chunks/x")
    storage = LocalStorage(tmp_path)
    await storage.put_unsynced([Put("chunks/x", b"1"), Put("chunks/y", b"2")])
    with raises(StorageError, "io", "chunks/x"):
        await storage.barrier(["chunks/y", "chunks/x"])
    with pytest.raises(StorageError) as raised:
        await storage.put_after(["chunks/x", "chunks/y"], Put("repo", b"3", Absent()))
    assert raised.value.refused
    assert not (tmp_path / "repo").exists()


@linux
async def test_where_a_journal_keeps_the_order_bytes_are_handed_over_before_the_name_and_that_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = TogetherCalls(monkeypatch, promises=EXT4)
    storage = LocalStorage(tmp_path)
    await storage.put("log/0", b"")
    calls.asked.clear()
    done: list[str] = []
    link = os.link

    def name(source: str, target: str) -> None:
        # The bytes of the object, and those of all that it refers to.
        done.extend(os.path.relpath(path, tmp_path).partition("/")[0] for path in calls.asked)
        done.append("name")
        link(source, target)

    await storage.put_unsynced([Put("chunks/x", b"1"), Put("chunks/y", b"2")])
    monkeypatch.setattr(os, "link", name)
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    await storage.barrier(["chunks/x", "chunks/y"])
    await storage.put("log/1", b"3", Absent())
    assert done == ["chunks", "chunks", ".aioicechunk", "name", str(tmp_path / "log")]
    assert calls.all == 0


@linux
@pytest.mark.parametrize(("promises", "flushes"), [(BTRFS, 0), (EXT4_WITHOUT_JOURNAL, 1)], ids=["btrfs", "ext4"])
async def test_without_a_journal_the_devices_cache_is_flushed_after_a_sync_of_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, promises: Promises, flushes: int
) -> None:
    calls = TogetherCalls(monkeypatch, promises=promises)
    storage = LocalStorage(tmp_path)
    await storage.put_unsynced([Put("chunks/x", b"1"), Put("chunks/y", b"2")])
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    await storage.barrier(["chunks/x", "chunks/y"])
    assert (calls.all, len(synced)) == (1, 0), "the next object's sync flushes it"
    await storage.sync(["chunks/x", "chunks/y"])
    assert (calls.all, len(synced)) == (2, flushes)


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
    assert syncs._sync_file_system.__wrapped__() is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the call")
@pytest.mark.parametrize("release", ["5.8.0", "6.18.44-fc", "10.0"])
def test_a_kernel_that_reports_errors_syncs_together(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    assert syncs._sync_file_system.__wrapped__() is not None


@linux
def test_the_systems_own_calls_work(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    done = syncs.fsync_together([str(tmp_path / "x")], flush=True)
    assert done == (syncs._sync_file_system() is not None and syncs._unwritten_bytes() <= syncs._OTHERS_BYTES + 1)


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


async def test_a_folder_is_synced_once_for_the_readers_of_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, moved = tmp_path / "folder", tmp_path / "moved"
    for path in (folder, moved):
        path.mkdir()
        (path / "repo").write_bytes(b"1")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    await asyncio.sleep(0.05)
    for _ in range(3):
        await LocalStorage(folder).get("repo")
    assert len(synced) == 1, "the storages are of one process"
    (folder / "repo").unlink()
    (folder / "repo").write_bytes(b"2")
    await LocalStorage(folder).get("repo")
    assert len(synced) == 2, "the name was given after the sync"
    (folder / "repo").unlink()
    folder.rmdir()
    moved.rename(folder)
    await LocalStorage(folder).get("repo")
    assert len(synced) == 3, "another folder has that path now"


async def test_a_sync_for_a_reader_that_fails_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repo").write_bytes(b"1")
    await asyncio.sleep(0.05)

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    synced: list[int] = []
    with monkeypatch.context() as failing:
        failing.setattr(os, "fsync", fail)
        with raises(StorageError, "io", "repo"):
            await LocalStorage(tmp_path).get("repo")
    monkeypatch.setattr(os, "fsync", synced.append)
    await LocalStorage(tmp_path).get("repo")
    assert len(synced) == 1


class Behind(Following):
    """One object behind an entry, and what there was when it was made."""

    def __init__(self, root: Path, *, fails: bool = False) -> None:
        self._root = root
        self._fails = fails
        self.thread = 0
        self.there_when_made: list[str] = []
        self._puts: list[Put] = []

    @property
    def puts(self) -> list[Put]:
        return self._puts

    def make(self) -> None:
        self.thread = threading.get_ident()
        self.there_when_made = sorted(path.name for path in self._root.rglob("*") if path.name in ("slot", "repo"))
        if self._fails:
            raise RuntimeError
        self._puts = [Put("repo", b"2")]


async def test_what_follows_is_made_by_the_loop_before_an_object_appears(tmp_path: Path) -> None:
    behind = Behind(tmp_path)
    put, answers = await LocalStorage(tmp_path).put_before(Put("log/slot", b"1", Absent()), behind)
    assert behind.thread == threading.get_ident()
    assert (tmp_path / "log" / "slot").read_bytes() == b"1"
    assert (tmp_path / "repo").read_bytes() == b"2"
    assert len(answers) == 1
    assert answers != [put]


@pytest.mark.parametrize("promises", [EXT4, EXT4_WITHOUT_JOURNAL, UNKNOWN])
async def test_what_follows_is_written_once_the_object_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, promises: Promises
) -> None:
    monkeypatch.setattr(folders, "promises_of", lambda device: promises)
    storage = LocalStorage(tmp_path)
    await storage.prepare(["log"])
    there: list[bool] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        there.append((tmp_path / "repo").exists())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    await storage.put_before(Put("log/slot", b"1", Absent()), Behind(tmp_path))
    assert there == [False] * len(there) != []
    assert (tmp_path / "repo").exists()


@linux
@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("promises", [EXT4, EXT4_WITHOUT_JOURNAL, UNKNOWN])
async def test_an_object_that_others_follow_appears_after_those_that_it_refers_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, promises: Promises, count: int
) -> None:
    calls = TogetherCalls(monkeypatch, promises=promises)
    storage = LocalStorage(tmp_path)
    await storage.put("log/0", b"")
    keys = [f"chunks/{number}" for number in range(count)]
    await storage.put_unsynced([Put(key, b"x") for key in keys])
    synced: set[str] = set()
    link = os.link

    def name(source: str, target: str) -> None:
        synced.update(calls.asked)
        assert synced >= {str(tmp_path / key) for key in keys} or calls.all
        synced.add("name")
        link(source, target)

    calls.asked.clear()
    monkeypatch.setattr(os, "link", name)
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.readlink(f"/proc/self/fd/{descriptor}")))
    _, answers = await storage.put_before(Put("log/1", b"1", Absent()), Behind(tmp_path), keys)
    assert "name" in synced
    assert len(answers) == 1


@linux
@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("promises", [EXT4, EXT4_WITHOUT_JOURNAL, UNKNOWN])
async def test_neither_an_object_nor_what_follows_appears_if_one_that_it_refers_to_may_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, promises: Promises, count: int
) -> None:
    TogetherCalls(monkeypatch, promises=promises, lost="chunks/0")
    storage = LocalStorage(tmp_path)
    keys = [f"chunks/{number}" for number in range(count)]
    await storage.put_unsynced([Put(key, b"x") for key in keys])

    def fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("chunks/0"):
            raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with raises(StorageError, "io", "chunks/0") as raised:
        await storage.put_before(Put("log/1", b"1", Absent()), Behind(tmp_path), keys)
    assert (raised.value.refused, raised.value.lost) == (True, True)
    assert pickle.loads(pickle.dumps(raised.value)).lost
    assert not (tmp_path / "log" / "1").exists()
    assert not (tmp_path / "repo").exists()
    assert os.listdir(tmp_path / ".aioicechunk") == []


async def test_nothing_follows_an_object_that_is_not_written(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    await storage.put("log/slot", b"another")
    with pytest.raises(PreconditionFailedError):
        await storage.put_before(Put("log/slot", b"1", Absent()), Behind(tmp_path))
    assert not (tmp_path / "repo").exists()


async def test_what_cannot_be_made_does_not_follow(tmp_path: Path) -> None:
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    _, answers = await LocalStorage(tmp_path).put_before(Put("log/slot", b"1", Absent()), Behind(tmp_path, fails=True))
    assert answers == []
    assert (tmp_path / "log" / "slot").exists()


async def test_that_it_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    _, answers = await LocalStorage(tmp_path).put_before(Put("log/slot", b"1", Absent()), Behind(tmp_path))
    assert answers == []
    assert (tmp_path / "log" / "slot").exists()
