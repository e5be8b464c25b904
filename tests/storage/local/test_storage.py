from __future__ import annotations

import asyncio
import contextlib
import errno
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from icechunk.errors import InvalidInputError, ObjectNotFoundError, PreconditionFailedError, StorageError
from icechunk.runtime.threads import ProcessPool
from icechunk.storage.local import files, folders, syncs
from icechunk.storage.local import storage as local
from icechunk.storage.local.files import Exclusion
from icechunk.storage.local.storage import RESERVED, LocalStorage
from icechunk.storage.local.syncs import Promises
from icechunk.storage.port import ANY, Absent, Matches
from icechunk.testing.storage_contract import StorageContract, list_all
from tests.promises import BTRFS, UNKNOWN
from tests.raising import raises


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "root")


class TestLocalContract(StorageContract):
    pass


class TestContractWithoutLinks(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStorage:
        monkeypatch.setattr(os, "link", _refuse_link)
        return LocalStorage(tmp_path)


class TestContractWithLocksOnly(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStorage:
        monkeypatch.setattr(os, "link", _refuse_link)
        monkeypatch.setattr(files, "_rename_exclusively", lambda source, target: False)
        return LocalStorage(tmp_path)


def _refuse_link(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


async def test_a_place_without_links_renames_and_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_lock(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(os, "link", _refuse_link)
    monkeypatch.setattr(files, "_rename_exclusively", lambda source, target: False)
    monkeypatch.setattr("fcntl.flock", refuse_lock)
    storage = LocalStorage(tmp_path)
    with raises(StorageError, "storage-config", os.strerror(errno.ENOLCK)):
        await storage.put("x", b"1", Absent())
    assert await list_all(storage) == []


async def test_the_root_is_made_by_the_first_write_only(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "root"
    storage = LocalStorage(root)
    assert await list_all(storage) == []
    with pytest.raises(ObjectNotFoundError):
        await storage.get("x")
    assert (await storage.delete(["x"])).deleted == 1
    assert not root.exists()
    await storage.put("a/b", b"1")
    assert (root / "a" / "b").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("promises", "needed"),
    [(UNKNOWN, {".", "r", "r/s", "r/s/a", "r/s/a/b"}), (BTRFS, {"r/s/a/b"})],
    ids=["folders are synced", "names follow files"],
)
async def test_every_folder_on_the_way_is_synced_before_the_put_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, promises: Promises, needed: set[str]
) -> None:
    monkeypatch.setattr(folders, "promises_of", lambda device: promises)
    synced: list[str] = []
    real = syncs.fsync_folder

    def record(path: str) -> None:
        synced.append(os.path.relpath(path, tmp_path))
        real(path)

    monkeypatch.setattr(folders, "fsync_folder", record)
    storage = LocalStorage(tmp_path / "r" / "s")
    await storage.put("a/b/c", b"1", Absent())
    assert needed <= set(synced)
    assert synced[-1] == "r/s/a/b"
    synced.clear()
    await storage.put("a/b/d", b"1", Absent())
    assert synced == ["r/s/a/b"]


async def test_a_reader_syncs_the_folder_before_it_returns_a_new_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await LocalStorage(tmp_path).put("log/1", b"1")
    synced: list[str] = []
    monkeypatch.setattr(folders, "fsync_folder", synced.append)
    reader = LocalStorage(tmp_path)
    await reader.get("log/1")
    assert synced == [str(tmp_path / "log")]


async def test_unfinished_files_are_neither_listed_nor_readable(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    await storage.put("x", b"1")
    (tmp_path / RESERVED / "torn").write_bytes(b"half")
    assert [info.key for info in await list_all(storage)] == ["x"]
    assert await list_all(storage, RESERVED) == []
    assert await list_all(storage, RESERVED + "/") == []
    for key in (RESERVED, f"{RESERVED}/torn", f"{RESERVED}/lock"):
        with pytest.raises(InvalidInputError):
            await storage.get(key)
        with pytest.raises(InvalidInputError):
            await storage.put(key, b"")


async def test_files_of_writers_that_died_long_ago_are_swept(tmp_path: Path) -> None:
    folder = tmp_path / RESERVED
    folder.mkdir()
    old, young, foreign = files.temporary_name(), files.temporary_name(), "notes.txt"
    for name in (old, young, foreign):
        (folder / name).write_bytes(b"half")
    for name in (old, foreign):
        os.utime(folder / name, (1, 1))
    await LocalStorage(tmp_path).put("x", b"1")
    assert sorted(os.listdir(folder)) == sorted([young, foreign])


async def test_unfinished_files_are_swept_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / RESERVED
    folder.mkdir()
    old = folder / files.temporary_name()
    old.write_bytes(b"all the room that there was")
    os.utime(old, (1, 1))

    def full(path: str, data: bytes, **options: Any) -> None:
        assert os.listdir(folder) == []
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local, "write_new", full)
    with raises(StorageError, "io", os.strerror(errno.ENOSPC)):
        await LocalStorage(tmp_path).put("x", b"1")


@pytest.mark.parametrize("size", [100_000, 2 * 1024 * 1024 + 100], ids=["small", "large"])
def test_a_writer_killed_at_any_step_leaves_the_object_whole_or_absent(tmp_path: Path, size: int) -> None:
    script = textwrap.dedent(
        """
        import asyncio, os, signal, sys
        from icechunk.storage.local import folders, storage as local
        from icechunk.storage.port import Absent
        top = sys.argv[1]
        calls = step = 0
        def dying(real):
            def call(*arguments, **options):
                global calls
                calls += 1
                if calls == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)
            return call
        for name in ("write", "utime", "link", "unlink", "replace"):
            setattr(os, name, dying(getattr(os, name)))
        os.supports_fd.add(os.utime)
        local.fsync_file = dying(local.fsync_file)
        local.hand_over = dying(local.hand_over)
        folders.fsync_folder = dying(folders.fsync_folder)
        status = None
        while status != 0:
            step += 1
            child = os.fork()
            if not child:
                asyncio.run(local.LocalStorage(f"{top}/{step}").put("log/1", b"x" * int(sys.argv[2]), Absent()))
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status in (0, -signal.SIGKILL), status
        """
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(size)], check=True, timeout=100)
    states: list[bool] = []
    for step in range(1, 1 + len(os.listdir(tmp_path))):
        storage = LocalStorage(tmp_path / str(step))
        found = {info.key: info.size for info in asyncio.run(list_all(storage))}
        assert found in ({}, {"log/1": size})
        states.append(bool(found))
        # With any files left behind, the slot can be taken by the next writer, or is taken already.
        if not found:
            asyncio.run(storage.put("log/1", b"next", Absent()))
    assert states == sorted(states), "once visible, an object stays"
    assert False in states
    assert states[-1]


def _create_in_process(root: str, n: int, start: Any, won: Any) -> None:
    async def attempt() -> None:
        storage = LocalStorage(root)
        for round_ in range(20):
            try:
                await storage.put(f"slot/{round_}", b"%d" % n, Absent())
            except PreconditionFailedError:
                continue
            won.put((round_, n))

    start.wait()
    asyncio.run(attempt())
    won.put(None)


def _count_in_process(root: str, start: Any, done: Any) -> None:
    async def count() -> None:
        storage = LocalStorage(root)
        landed = 0
        while landed < 10:
            found = await storage.get("counter")
            try:
                await storage.put("counter", b"%d" % (int(found.data) + 1), Matches(found.version))
            except PreconditionFailedError:
                continue
            landed += 1

    start.wait()
    asyncio.run(count())
    done.put(None)


@pytest.mark.thorough
def test_of_eight_processes_that_create_one_slot_exactly_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    start, won = context.Event(), context.Queue()
    workers = [context.Process(target=_create_in_process, args=(str(tmp_path), n, start, won)) for n in range(8)]
    for worker in workers:
        worker.start()
    start.set()
    winners: dict[int, int] = {}
    finished = 0
    while finished < 8:
        item = won.get(timeout=60)
        if item is None:
            finished += 1
        else:
            assert item[0] not in winners
            winners[item[0]] = item[1]
    for worker in workers:
        worker.join()
    storage = LocalStorage(tmp_path)
    assert {n: int(asyncio.run(storage.get(f"slot/{n}")).data) for n in range(20)} == winners


async def test_a_version_is_compared_again_once_the_lock_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(tmp_path)
    first = await storage.put("x", b"1")
    locked = LocalStorage._locked  # private: the moment at which the lock is held

    @contextlib.contextmanager
    def after_another(self: LocalStorage) -> Iterator[None]:
        with locked(self):
            (tmp_path / "other").write_bytes(b"another")
            (tmp_path / "other").replace(tmp_path / "x")
            yield

    monkeypatch.setattr(LocalStorage, "_locked", after_another)
    with pytest.raises(PreconditionFailedError):
        await storage.put("x", b"2", Matches(first.version))
    assert (tmp_path / "x").read_bytes() == b"another"


@pytest.mark.thorough
def test_replacing_by_version_loses_no_update_among_processes(tmp_path: Path) -> None:
    asyncio.run(LocalStorage(tmp_path).put("counter", b"0"))
    context = multiprocessing.get_context("forkserver")
    start, done = context.Event(), context.Queue()
    workers = [context.Process(target=_count_in_process, args=(str(tmp_path), start, done)) for _ in range(4)]
    for worker in workers:
        worker.start()
    start.set()
    for _ in workers:
        done.get(timeout=60)
    for worker in workers:
        worker.join()
    assert asyncio.run(LocalStorage(tmp_path).get("counter")).data == b"40"


async def test_a_full_disk_names_the_object_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    await storage.put("old", b"old")
    real = os.write

    def full(descriptor: int, data: Any) -> int:
        if len(data) > 10:
            return real(descriptor, data[: len(data) // 8192 * 4096 or 10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for key in ("new", "old"):
        for size in (15, 3_000_005):
            with raises(StorageError, "io", repr(key), os.strerror(errno.ENOSPC)) as caught:
                await storage.put(key, b"x" * size)
            assert caught.value.refused
    monkeypatch.undo()
    assert os.listdir(tmp_path / RESERVED) == []
    assert [(info.key, info.size) for info in await list_all(storage)] == [("old", 3)]


async def test_a_write_whose_folder_cannot_be_synced_is_reported_as_uncertain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(tmp_path)
    await storage.put("old", b"")

    def fail(path: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(folders, "fsync_folder", fail)
    with raises(StorageError, "io", "'x'", os.strerror(errno.EIO)) as caught:
        await storage.put("x", b"1", Absent())
    assert not caught.value.refused
    assert not caught.value.unsent


@pytest.mark.parametrize(
    ("call", "code", "refused", "unsent"),
    [
        ("link", errno.ENOSPC, True, False),
        ("link", errno.EROFS, True, False),
        ("link", errno.EACCES, True, False),
        # A network file system that gives no answer may have given the name.
        ("link", errno.EIO, False, False),
        ("open", errno.EROFS, True, False),
        ("open", errno.EIO, False, True),
        ("open", errno.EMFILE, False, True),
    ],
)
async def test_a_failure_before_the_file_could_have_its_name_is_certain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, refused: bool, unsent: bool
) -> None:
    storage = LocalStorage(tmp_path)
    await storage.put("old", b"")
    real = getattr(os, call)

    def fail(*arguments: Any, **options: Any) -> Any:
        if call == "link" or RESERVED in str(arguments[0]):
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StorageError) as caught:
        await storage.put("x", b"1", Absent())
    monkeypatch.undo()
    assert (caught.value.refused, caught.value.unsent) == (refused, unsent)
    with pytest.raises(ObjectNotFoundError):
        await storage.get("x")


async def test_a_file_where_the_root_folder_should_be_refuses_writes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        await LocalStorage(tmp_path / "file").put("x", b"1", Absent())
    assert caught.value.refused


async def test_objects_and_folders_in_each_others_way_are_refused(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    await storage.put("a", b"1")
    await storage.put("d/x", b"1")
    with raises(StorageError, "io", "'a/b'") as caught:
        await storage.put("a/b", b"2")
    assert caught.value.refused
    for precondition in (Absent(), Matches((await storage.head("a")).version), ANY):
        with pytest.raises(StorageError, match=re.escape("'d'")):
            await storage.put("d", b"2", precondition)
    assert [info.key for info in await list_all(storage)] == ["a", "d/x"]


async def test_names_too_long_for_a_file_are_refused(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    await storage.put("k" * 255, b"1")
    for key in ("k" * 256, "é" * 128):
        with raises(InvalidInputError, "invalid-key", 255):
            await storage.put(key, b"1")


async def test_pipes_and_foreign_names_are_no_objects(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.makedirs(os.fsencode(tmp_path) + b"/\xff")
    (tmp_path / "loop").symlink_to(tmp_path)
    storage = LocalStorage(tmp_path)
    with pytest.raises(ObjectNotFoundError):
        await storage.get("pipe")
    assert await list_all(storage) == []


async def test_forked_children_use_it_with_threads_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = ProcessPool(2, "test")
    monkeypatch.setattr(local, "_THREADS_OF_PROCESS", threads)
    storage = LocalStorage(tmp_path)
    await storage.put("x", b"1")
    first = threads._made
    assert first is not None
    threads._made = first._replace(pid=os.getpid() + 1)
    await storage.put("x", b"2")
    assert (await storage.get("x")).data == b"2"
    assert threads._made is not None
    assert threads._made.first is not first.first


async def test_storages_of_one_process_share_their_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_THREADS_OF_PROCESS", ProcessPool(2, "test"))
    with mock.patch("icechunk.runtime.threads.ThreadPoolExecutor", wraps=ThreadPoolExecutor) as made:
        for n in range(5):
            await LocalStorage(tmp_path / str(n)).put("x", b"1")
    assert made.call_count == 2, "an executor of one thread, and one of the others"


def test_pickles_name_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = LocalStorage("here")
    monkeypatch.chdir("/")
    assert storage.describe() == f"file://{tmp_path}/here"
    assert pickle.loads(pickle.dumps(storage)) == storage
    assert storage != LocalStorage("here")
    assert hash(storage) == hash(LocalStorage(tmp_path / "here"))


async def test_the_way_that_works_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _refuse_link)
    storage = LocalStorage(tmp_path)
    await storage.put("x", b"1", Absent())
    assert storage._exclusion is Exclusion.RENAME
