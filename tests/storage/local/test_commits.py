"""Commits to a local folder: what is there when they return, how often they sync, and that nothing is written later."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pytest
import zarr

import icechunk
from icechunk.config import EngineConfig
from icechunk.format.keys import manifest_key, snapshot_key, transaction_key
from icechunk.format.repo.codec import decode_repo
from icechunk.format.snapshot.codec import decode_snapshot
from icechunk.runtime.twins import run_sync
from icechunk.storage import outcome
from icechunk.storage.local import folders, syncs
from icechunk.storage.local.syncs import Promises
from tests.promises import BTRFS, EXT4, EXT4_WITHOUT_JOURNAL, UNKNOWN

pytestmark = pytest.mark.thorough

Change: TypeAlias = Callable[[icechunk.Session, int], None]
Name: TypeAlias = Literal["log", "repo", "refs"]
LAYOUTS: tuple[Name, ...] = ("log", "repo", "refs")
REMOVALS = 25
"""In each test; nine of ten failed when something was written after a commit had returned."""


def create(root: Path | str, layout: Name = "log") -> icechunk.Repository:
    config = icechunk.RepositoryConfig(engine=EngineConfig(layout=layout))
    return icechunk.Repository.create(icechunk.local_filesystem_storage(str(root)), config=config)


def change(session: icechunk.Session, number: int, *, chunk: bool = False) -> None:
    group = zarr.open_group(session.store, mode="a")
    group.attrs["number"] = number
    if chunk:
        array = group.require_array("a", shape=(100_000,), chunks=(1000,), dtype="i4", compressors=None)
        array[number * 1000 : (number + 1) * 1000] = number + 1


def commit(repo: icechunk.Repository, number: int, *, chunk: bool = False) -> str:
    session = repo.writable_session("main")
    change(session, number, chunk=chunk)
    return session.commit(str(number))


def path_of_descriptor(descriptor: int) -> str:
    if sys.platform == "darwin":
        import fcntl

        return fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0").decode()
    return os.readlink(f"/proc/self/fd/{descriptor}")


class Syncs:
    """Counts the syncs of files and folders below a folder, and of its file system; other programs write nothing.

    Parameters
    ----------
    together
        Whether there is a call that syncs a file system.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, *, together: bool = True) -> None:
        self.count = 0
        real = os.fsync

        def fsync(descriptor: int) -> None:
            # Repositories of other tests may be closed meanwhile.
            self.count += path_of_descriptor(descriptor).startswith(str(root))
            real(descriptor)

        def sync_file_system(descriptor: int) -> int:
            self.count += path_of_descriptor(descriptor).startswith(str(root))
            return 0

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(syncs, "_unwritten_bytes", lambda: 0)
        monkeypatch.setattr(syncs, "_sync_file_system", lambda: sync_file_system if together else None)
        monkeypatch.setattr(syncs, "_sync_file_range", lambda: lambda *_: 0)

    def of(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> int:
        before = self.count
        work(*arguments, **options)
        return self.count - before


def attributes(session: icechunk.Session, number: int) -> None:
    zarr.open_group(session.store, mode="a").attrs["number"] = number


def one_chunk(session: icechunk.Session, number: int) -> None:
    group: Any = zarr.open_group(session.store, mode="a")
    group["a"][number * 1000 : (number + 1) * 1000] = number + 1


def large_chunks(session: icechunk.Session, number: int) -> None:
    group: Any = zarr.open_group(session.store, mode="a")
    group["large"][:] = number + 1


def new_array(session: icechunk.Session, number: int) -> None:
    array = zarr.create_array(
        session.store, name=f"new/{number}", shape=(10_000,), chunks=(1000,), dtype="i4", compressors=None
    )
    array[:] = np.arange(10_000)


def many_references(session: icechunk.Session, number: int) -> None:
    """Whose files are too large for an entry."""
    locations = [f"s3://bucket/{number}/{n:012x}/{n * 7919 % 100_003}" for n in range(20_000)]
    store = session.store
    zarr.create_array(store, name=f"virtual/{number}", shape=(20_000,), chunks=(1,), dtype="i4", compressors=None)
    indexed = [icechunk.VirtualChunkSpec([n], location, n, 4) for n, location in enumerate(locations)]
    store.set_virtual_refs(f"virtual/{number}", indexed, validate_containers=False)


def with_arrays(root: Path, layout: Name) -> icechunk.Repository:
    repo = create(root, layout)
    session = repo.writable_session("main")
    group = zarr.open_group(session.store, mode="a")
    group.create_array("a", shape=(100_000,), chunks=(1000,), dtype="i4", compressors=None)
    group.create_array("large", shape=(8 << 20,), chunks=(1 << 20,), dtype="u1", compressors=None)
    session.commit("arrays")
    return repo


CHANGES = (attributes, one_chunk, large_chunks, new_array, many_references)


@pytest.mark.parametrize("reopened", [False, True], ids=["the client that created it", "another client"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize(
    "promises", [EXT4, BTRFS, EXT4_WITHOUT_JOURNAL], ids=["ext4", "btrfs", "ext4 without a journal"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_commit_waits_for_the_disk_once_where_a_journal_keeps_the_order_and_three_times_at_most_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Name, change: Change, promises: Promises, reopened: bool
) -> None:
    monkeypatch.setattr(folders, "promises_of", lambda device: promises)
    repo = with_arrays(tmp_path / "r", layout)
    if reopened:
        repo = icechunk.Repository.open(icechunk.local_filesystem_storage(str(tmp_path / "r")))
    waits = Syncs(tmp_path, monkeypatch)

    def changed(number: int) -> None:
        session = repo.writable_session("main")
        change(session, number)
        session.commit(str(number))

    # In the layouts of the published formats the new files are synced in one go, with a few chunks too.
    at_once = change is attributes or (change is one_chunk and layout != "log")
    wanted = 1 if promises.orders else 2 if at_once else 3
    if promises is EXT4_WITHOUT_JOURNAL and layout != "log":
        # The device's cache is flushed before the new object gets its name, unless that has a sync of its own.
        wanted += layout == "repo" or change is not many_references
    assert [waits.of(changed, number) for number in range(3)] == [wanted] * 3


@pytest.mark.parametrize(
    ("layout", "tiny", "chunk"), [("log", 2, 4), ("repo", 8, 12), ("refs", 6, 10)], ids=lambda value: str(value)
)
def test_without_a_call_that_syncs_all_each_file_and_folder_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Name, tiny: int, chunk: int
) -> None:
    monkeypatch.setattr(folders, "promises_of", lambda device: UNKNOWN)
    repo = with_arrays(tmp_path / "r", layout)
    commit(repo, 0, chunk=True)
    waits = Syncs(tmp_path, monkeypatch, together=False)
    assert waits.of(commit, repo, 1) == tiny
    assert waits.of(commit, repo, 2, chunk=True) == chunk


@pytest.mark.parametrize("layout", LAYOUTS)
def test_while_others_write_much_each_file_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Name
) -> None:
    monkeypatch.setattr(folders, "promises_of", lambda device: BTRFS)
    repo = with_arrays(tmp_path / "r", layout)
    waits = Syncs(tmp_path, monkeypatch)
    monkeypatch.setattr(syncs, "_unwritten_bytes", lambda: 1 << 30)
    session = repo.writable_session("main")
    large_chunks(session, 1)
    assert waits.of(session.commit, "large") > 8


@pytest.mark.parametrize(("promises", "count"), [(EXT4, 1), (BTRFS, 2)], ids=["ext4", "btrfs"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_other_change_waits_for_the_disk_as_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Name, promises: Promises, count: int
) -> None:
    monkeypatch.setattr(folders, "promises_of", lambda device: promises)
    repo = create(tmp_path / "r", layout)
    tip = commit(repo, 0)
    waits = Syncs(tmp_path, monkeypatch)
    assert waits.of(repo.create_tag, "t", snapshot_id=tip) == count
    assert waits.of(repo.create_branch, "b", snapshot_id=tip) == count
    assert waits.of(repo.delete_branch, "b") == (1 if layout == "refs" else count)


@pytest.mark.parametrize("calls", [1, 1_000_000], ids=["once", "for ever"])
@pytest.mark.parametrize("promises", [UNKNOWN, BTRFS, EXT4], ids=["unknown", "btrfs", "ext4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_commit_whose_name_could_not_be_synced_does_not_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Name, promises: Promises, calls: int
) -> None:
    monkeypatch.setattr(folders, "promises_of", lambda device: promises)
    monkeypatch.setattr(outcome, "_LONGEST_PAUSE_S", 0.0)
    repo = create(tmp_path / "r", layout)
    commit(repo, 0)
    session = repo.writable_session("main")
    change(session, 1)
    left, real = calls, syncs.fsync_folder

    def sync(path: str) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        real(path)

    with monkeypatch.context() as failing:
        failing.setattr(folders, "fsync_folder", sync)
        with pytest.raises(icechunk.IcechunkError) as caught:
            session.commit("1")
        assert left < calls
    if promises.names_follow_files:
        assert isinstance(caught.value, icechunk.CommitOutcomeUnknown)
    # Another client goes on with what is there.
    other = icechunk.Repository.open(icechunk.local_filesystem_storage(str(tmp_path / "r")))
    commit(other, 2)
    assert messages(tmp_path / "r") in (["0", "2"], ["0", "1", "2"])


def test_all_files_are_where_readers_of_the_format_look_when_a_commit_returns(tmp_path: Path) -> None:
    root = tmp_path / "r"
    repo = create(root)
    for number in range(20):
        commit(repo, number, chunk=True)
        info = decode_repo((root / "repo").read_bytes())
        tip = info.branches["main"]
        assert info.snapshots[tip].message == str(number)
        snapshot = decode_snapshot((root / snapshot_key(tip)).read_bytes(), expected_id=tip)
        assert (root / transaction_key(tip)).stat().st_size
        assert all((root / manifest_key(id)).stat().st_size for id in snapshot.manifest_files)


@pytest.mark.parametrize("collected", [False, True], ids=["kept", "collected as garbage"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_can_be_removed_right_after_a_commit(tmp_path: Path, layout: Name, collected: bool) -> None:
    # A collection of garbage goes through everything that other tests have left.
    for number in range(REMOVALS // 3 if collected else REMOVALS):
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            repo = create(f"{folder}/r", layout)
            commit(repo, number % 5, chunk=True)
            if collected:
                del repo
                gc.collect()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1000, 50_000, 3_000_000], ids=["packed", "large", "several"])
def test_a_folder_can_be_removed_under_a_session_that_has_not_committed(
    tmp_path: Path, layout: Name, size: int
) -> None:
    data = np.arange(size, dtype="i4")
    for _ in range(REMOVALS // 5):
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            session = create(f"{folder}/r", layout).writable_session("main")
            array = zarr.create_array(
                session.store, name="a", shape=(size,), chunks=(min(size, 600_000),), dtype="i4", compressors=None
            )
            array[:] = data
        with pytest.raises(icechunk.IcechunkError):
            session.commit("gone")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_can_be_removed_after_a_close(tmp_path: Path, layout: Name) -> None:
    async def live(root: str) -> None:
        config = icechunk.RepositoryConfig(engine=EngineConfig(layout=layout))
        repo = await icechunk.Repository.create_async(icechunk.local_filesystem_storage(root), config=config)
        session = await repo.writable_session_async("main")
        await zarr.api.asynchronous.create_array(store=session.store, name="a", shape=(3,), dtype="i4")
        await session.commit_async("one")
        await repo.aclose()
        shutil.rmtree(root)

    for number in range(REMOVALS):
        asyncio.run(live(str(tmp_path / str(number))))
    assert list(tmp_path.iterdir()) == []


def test_a_repository_is_created_where_one_was_removed_with_the_same_storage(tmp_path: Path) -> None:
    storage = icechunk.local_filesystem_storage(str(tmp_path / "r"))
    for number in range(3):
        repo = icechunk.Repository.create(storage)
        commit(repo, number, chunk=True)
        assert next(found.message for found in repo.ancestry(branch="main")) == str(number)
        shutil.rmtree(tmp_path / "r")


def test_a_client_of_a_repository_that_was_removed_leaves_its_successor_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = icechunk.local_filesystem_storage(str(tmp_path / "r"))
    old = icechunk.Repository.create(storage)
    commit(old, 0)
    shutil.rmtree(tmp_path / "r")
    new = icechunk.Repository.create(storage)
    commit(new, 1)
    with caplog.at_level(logging.INFO, "icechunk"):
        run_sync(old.aclose())
    assert len(list((tmp_path / "r" / "log").iterdir())) == 1
    assert caplog.records == []
    commit(new, 2)
    assert messages(tmp_path / "r") == ["1", "2"]


def test_a_change_to_a_repository_that_was_removed_is_refused(tmp_path: Path) -> None:
    repo = create(tmp_path / "r")
    commit(repo, 0)
    session = repo.writable_session("main")
    change(session, 1)
    shutil.rmtree(tmp_path / "r")
    with pytest.raises(icechunk.IcechunkError):
        session.commit("gone")
    assert not (tmp_path / "r").exists()


PROGRAM = """
import os, shutil, signal, sys
import icechunk, zarr
# A shell that runs the tests in the background has them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
root = sys.argv[1]
repo = icechunk.Repository.create(icechunk.local_filesystem_storage(root))
session = repo.writable_session("main")
zarr.open_group(session.store, mode="a").attrs["number"] = 1
session.commit("one")
"""


def run(script: str, root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM + textwrap.dedent(script), str(root)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def messages(root: Path) -> list[str]:
    repo = icechunk.Repository.open(icechunk.local_filesystem_storage(str(root)))
    return [found.message for found in repo.ancestry(branch="main")][-2::-1]


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("os._exit(4)", 4),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    ],
    ids=["end", "exit", "_exit", "killed", "terminated"],
)
def test_a_program_that_ends_right_after_a_commit_loses_nothing(tmp_path: Path, ending: str, code: int) -> None:
    done = run(ending, tmp_path / "r")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
    assert messages(tmp_path / "r") == ["one"]


def test_a_program_that_is_interrupted_right_after_a_commit_loses_nothing(tmp_path: Path) -> None:
    done = run("signal.raise_signal(signal.SIGINT)", tmp_path / "r")
    assert "KeyboardInterrupt" in done.stderr
    assert messages(tmp_path / "r") == ["one"]


def test_a_program_that_forks_right_after_a_commit_loses_nothing(tmp_path: Path) -> None:
    done = run(
        """
        child = os.fork()
        session = repo.writable_session("main") if child else None
        if not child:
            signal.alarm(30)
            repo = icechunk.Repository.open(icechunk.local_filesystem_storage(root))
            assert [found.message for found in repo.ancestry(branch="main")][0] == "one"
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        zarr.open_group(session.store, mode="a").attrs["number"] = 2
        session.commit("two")
        """,
        tmp_path / "r",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert messages(tmp_path / "r") == ["one", "two"]


def test_a_program_whose_folder_is_removed_says_nothing_at_its_end(tmp_path: Path) -> None:
    done = run("shutil.rmtree(root)", tmp_path / "r")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "r").exists()
