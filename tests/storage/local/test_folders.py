"""Syncing folders: one sync for all who asked before it began, and none for less."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from icechunk.errors import StorageError
from icechunk.storage.local import folders as local_folders
from icechunk.storage.local.folders import Folders
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.local.syncs import fsync_folder
from icechunk.storage.port import Absent, Put
from tests.promises import UNKNOWN
from tests.raising import raises


class Slow:
    """A substitute for fsync: each call waits until it is released, and may fail."""

    def __init__(self, fails: Callable[[int], bool] = lambda call: False) -> None:
        self.calls = 0
        self.begun = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self._fails = fails

    def __call__(self, path: str) -> None:
        self.calls += 1
        call = self.calls
        self.begun.release()
        assert self.go.acquire(timeout=30)
        if self._fails(call):
            raise OSError(errno.EIO, "Input/output error")


def waiting(folders: Folders, folder: str, count: int) -> None:
    """Until so many threads are inside `Folders.sync`."""
    pause = threading.Event()
    while (syncs := folders._syncs.get(folder)) is None or syncs.users < count:
        pause.wait(0.001)


@pytest.mark.parametrize("missing", ["root", "root/chunks"])
def test_a_folder_that_another_thread_makes_and_uses_meanwhile_was_not_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    folders, chunks = Folders(str(tmp_path / "root")), str(tmp_path / "root" / "chunks")
    if missing == "root/chunks":
        (tmp_path / "root").mkdir()
    look = {"root": "isdir", "root/chunks": "lstat"}[missing]
    module = os.path if look == "isdir" else os
    real = getattr(module, look)

    def look_before_the_other(path: str) -> object:
        if path != str(tmp_path / missing):
            return real(path)
        monkeypatch.setattr(module, look, real)
        os.makedirs(chunks)
        folders.use(chunks)
        if look == "isdir":
            return False
        raise FileNotFoundError(errno.ENOENT, "missing", path)

    monkeypatch.setattr(module, look, look_before_the_other)
    folders.make(chunks, durable=False)
    assert os.listdir(tmp_path / "root") == ["chunks"]


@pytest.mark.parametrize("failing", [0, 1, 2], ids=["none fails", "the first fails", "the second fails"])
def test_calls_during_a_sync_share_the_next_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: int) -> None:
    slow = Slow(lambda call: call == failing)
    monkeypatch.setattr(local_folders, "fsync_folder", slow)
    folders = Folders(str(tmp_path))
    with ThreadPoolExecutor(9) as threads:
        first = threads.submit(folders.sync, "f")
        assert slow.begun.acquire(timeout=30)
        others = [threads.submit(folders.sync, "f") for _ in range(8)]
        waiting(folders, "f", 9)
        slow.go.release()
        assert slow.begun.acquire(timeout=30)
        assert not any(other.done() for other in others), "their names were given after the first sync began"
        slow.go.release()
        errors = [future.exception(timeout=30) for future in (first, *others)]
    assert slow.calls == 2
    assert [error is not None for error in errors] == [failing == 1] + [failing == 2] * 8
    assert not folders._syncs


def failing_once(monkeypatch: pytest.MonkeyPatch, code: int = errno.EIO, calls: int = 1) -> None:
    """The next syncs of folders fail."""
    real, left = fsync_folder, calls

    def sync(path: str) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(code, os.strerror(code), path)
        real(path)

    monkeypatch.setattr(local_folders, "fsync_folder", sync)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES], ids=["the disk fails", "the folder cannot be read"])
async def test_an_object_whose_sync_failed_is_not_returned_until_it_is_written_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    storage = LocalStorage(tmp_path)
    await storage.put("log/0", b"old")
    failing_once(monkeypatch, code)
    with raises(StorageError, "io"):
        await storage.put("log/1", b"new", Absent())
    for read in (storage.get, storage.head, storage.get, lambda key: storage.get_all([key])):
        with raises(StorageError, "io"):
            await read("log/1")
    assert (await storage.get("log/0")).data == b"old"
    await storage.put("log/2", b"other", Absent())
    assert (await storage.get("log/2")).data == b"other"
    with raises(StorageError, "io"):
        await storage.get("log/1")
    await storage.put("log/1", b"new")
    assert (await storage.get("log/1")).data == b"new"


async def test_an_object_that_a_reader_cannot_sync_is_not_returned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    await LocalStorage(tmp_path).put("log/1", b"1")
    reader = LocalStorage(tmp_path)
    failing_once(monkeypatch)
    for _ in range(2):
        with raises(StorageError, "io"):
            await reader.get("log/1")


async def test_a_reader_without_the_right_to_sync_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    await LocalStorage(tmp_path).put("log/1", b"1")
    failing_once(monkeypatch, errno.EACCES)
    assert (await LocalStorage(tmp_path).get("log/1")).data == b"1"


async def test_a_sync_that_never_began_leaves_no_doubt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    await storage.put("log/0", b"")
    failing_once(monkeypatch, errno.EMFILE)
    with raises(StorageError, "io"):
        await storage.put("log/1", b"1", Absent())
    assert (await storage.get("log/1")).data == b"1"


async def test_objects_whose_sync_failed_are_not_durable_by_another_sync(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(local_folders, "promises_of", lambda device: UNKNOWN)
    storage = LocalStorage(tmp_path)
    await storage.put("snapshots/0", b"")
    put = Put("snapshots/1", b"1", Absent())
    await storage.put_unsynced([put])
    failing_once(monkeypatch)
    with raises(StorageError, "io"):
        await storage.sync([put.key])
    with raises(StorageError, "io"):
        await storage.sync([put.key])
    with raises(StorageError, "io") as caught:
        await storage.put_after([put.key], Put("repo", b"", Absent()))
    assert caught.value.refused
    assert not (tmp_path / "repo").exists()
    assert await storage.put_unsynced([put]) != [None], "it is written again"


async def test_a_name_given_while_a_sync_fails_is_in_doubt_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folders = Folders(str(tmp_path))
    before_ns = time.time_ns()
    failing_once(monkeypatch)
    for _ in range(2):
        # words: a system error has no kind
        with pytest.raises(OSError, match=rf"Errno {errno.EIO}\b"):
            folders.sync(str(tmp_path), before_ns)
    folders.sync(str(tmp_path), time.time_ns() + 1)


async def test_a_folder_whose_name_could_not_be_synced_is_made_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(local_folders, "promises_of", lambda device: UNKNOWN)
    storage = LocalStorage(tmp_path)
    await storage.put("x", b"")
    failing_once(monkeypatch)
    with raises(StorageError, "io"):
        await storage.put("a/b/c", b"", Absent())
    assert not (tmp_path / "a").exists()
    await storage.put("a/b/c", b"", Absent())


def test_folders_do_not_wait_for_one_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = Slow()
    monkeypatch.setattr(local_folders, "fsync_folder", slow)
    folders = Folders(str(tmp_path))
    with ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(folders.sync, name) for name in ("f", "g")]
        assert slow.begun.acquire(timeout=30)
        assert slow.begun.acquire(timeout=30)
        slow.go.release(2)
        for future in futures:
            future.result(timeout=30)


async def test_a_batch_of_objects_costs_fewer_syncs_than_objects(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import asyncio

    storage = LocalStorage(tmp_path)
    await storage.put("chunks/first", b"1")
    calls, lock, real = 0, threading.Lock(), fsync_folder
    pause = threading.Event()

    def counted(path: str) -> None:
        nonlocal calls
        with lock:
            calls += 1
        pause.wait(0.01)  # as long as a disk takes
        real(path)

    monkeypatch.setattr(local_folders, "fsync_folder", counted)
    await asyncio.gather(*(storage.put(f"chunks/{n}", b"1") for n in range(64)))
    assert calls < 48


def test_a_child_does_not_wait_for_the_syncs_of_its_parents_threads(tmp_path: Path) -> None:
    script = """
import os, signal, sys, threading
from icechunk.storage.local import folders as local_folders
real, begun, go = local_folders.fsync_folder, threading.Event(), threading.Event()
def slow(path):
    begun.set()
    go.wait()
folders = local_folders.Folders(sys.argv[1])
local_folders.fsync_folder = slow
thread = threading.Thread(target=folders.sync, args=(sys.argv[1],))
thread.start()
begun.wait()
child = os.fork()
if not child:
    signal.alarm(20)
    local_folders.fsync_folder = real
    folders.sync(sys.argv[1])
    os._exit(0)
status = os.waitpid(child, 0)[1]
go.set()
thread.join()
sys.exit(status != 0)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(tmp_path)], timeout=60)
    assert done.returncode == 0
