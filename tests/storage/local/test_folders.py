"""Syncing folders: one sync for all who asked before it began, and none for less."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from icechunk.storage.local import folders as local_folders
from icechunk.storage.local.files import fsync_folder
from icechunk.storage.local.folders import Folders
from icechunk.storage.local.storage import LocalStorage


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
