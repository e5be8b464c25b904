"""One store in many event loops and threads at once; every loop ends without complaint, and leaves nothing behind.

zarr's synchronous interface runs a loop of its own in a thread, icechunk's synchronous twins another one, and users
have theirs. What one of them wrote, the others see, and a commit on any of them waits for.
"""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import zarr
import zarr.api.asynchronous as zarr_async
from zarr.core.sync import sync

import icechunk
from icechunk import Repository
from icechunk.errors import ErrorKind, ReadOnlyError, SessionStateError, StorageError
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import PutResult, Storage
from tests.raising import raises
from tests.store.store_builders import array_document, buffer, group_document, open_session, read

T = TypeVar("T")


@contextmanager
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing is warned of or logged in this block, not even by what is collected at its end."""
    # Collections look through what the block makes, and not through all that earlier tests have left: 0.3 s each.
    gc.freeze()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield
            gc.collect()
    finally:
        gc.unfreeze()
    assert [str(warning.message) for warning in warned if "coroutine" in str(warning.message)] == []
    assert [str(warning.message) for warning in warned if issubclass(warning.category, ResourceWarning)] == []
    assert [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


@pytest.fixture(autouse=True)
def nothing_is_left_behind(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No "Unclosed client session", "Task was destroyed" or "attached to a different loop" in any test here."""
    with quiet(caplog):
        yield


def run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """`asyncio.run` on a loop that reports every complaint as an error."""
    complaints: list[str] = []

    async def main() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(str(context)))
        return await work()

    with asyncio.Runner(debug=False) as runner:
        result = runner.run(main())
    gc.collect()
    assert complaints == []
    return result


async def other_tasks() -> list[str]:
    """Tasks of this loop that are not the caller."""
    return [repr(task) for task in asyncio.all_tasks() if task is not asyncio.current_task()]


def in_threads(*work: Callable[[], T]) -> list[T]:
    """Run all at the same moment, each in a thread of its own."""
    start = threading.Barrier(len(work))

    def one(item: Callable[[], T]) -> T:
        start.wait()
        return item()

    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result() for future in [pool.submit(one, item) for item in work]]


def new_repository(storage: Storage, *, inline_bytes: int = 64) -> Repository:
    return Repository.create(storage, icechunk.RepositoryConfig(inline_chunk_threshold_bytes=inline_bytes))


VALUES = np.arange(1, 1 + 32 * 16, dtype="i4").reshape(32, 16)
"""Rows of 64 bytes: a chunk of one row is inline, one of two is not."""


@pytest.mark.parametrize("rows", [1, 2], ids=["inline", "native"])
@pytest.mark.parametrize("committer", ["sync", "own loop", "running loop", "thread"])
def test_threads_write_disjoint_chunks_of_one_session_and_any_loop_commits_them(
    storage: Storage, rows: int, committer: str
) -> None:
    repository = new_repository(storage)
    session = repository.writable_session("main")
    array = zarr.create_array(session.store, name="a", shape=(32, 16), chunks=(rows, 16), dtype="i4", compressors=None)

    def write(start: int) -> Callable[[], None]:
        def work() -> None:
            zarr.open_array(session.store, path="a", mode="r+")[start : start + 8] = VALUES[start : start + 8]

        return work

    in_threads(*map(write, range(0, 32, 8)))
    np.testing.assert_array_equal(array[...], VALUES)

    async def commit() -> str:
        return await session.commit_async("by a loop")

    async def twin() -> str:
        # A synchronous twin called on a running loop: it blocks that loop, and nothing waits for it.
        return session.commit("by a twin")

    match committer:
        case "sync":
            id = session.commit("sync")
        case "own loop":
            id = run(commit)
        case "running loop":
            id = run(twin)
        case _:
            [id] = in_threads(lambda: session.commit("thread"))
    assert repository.lookup_branch("main") == id
    found = Repository.open(storage).readonly_session("main").store
    np.testing.assert_array_equal(zarr.open_array(found, path="a", mode="r")[...], VALUES)
    run(repository.aclose)


@pytest.mark.thorough
def test_loops_write_and_read_one_session_at_once(storage: Storage) -> None:
    repository = new_repository(storage)
    session = repository.writable_session("main")
    zarr.create_array(session.store, name="a", shape=(32, 16), chunks=(2, 16), dtype="i4", compressors=None)

    def own_loop(start: int) -> Callable[[], None]:
        async def work() -> None:
            array = await zarr_async.open_array(store=session.store, path="a", mode="r+")
            for row in range(start, start + 8, 2):
                await array.setitem((slice(row, row + 2), slice(None)), VALUES[row : row + 2])
                np.testing.assert_array_equal(
                    await array.getitem((slice(row, row + 2), slice(None))), VALUES[row : row + 2]
                )

        return lambda: run(work)

    in_threads(*map(own_loop, range(0, 32, 8)))
    # The loops that put these chunks have ended: the commit uploads the chunks that were not sent yet.
    np.testing.assert_array_equal(zarr.open_array(session.store, path="a", mode="r")[...], VALUES)
    session.commit("written by loops that are gone")

    def reader() -> None:
        async def work() -> None:
            again = await repository.readonly_session_async("main")
            for store in (session.store, again.store):
                array = await zarr_async.open_array(store=store, path="a", mode="r")
                np.testing.assert_array_equal(await array.getitem(...), VALUES)

        run(work)

    in_threads(*[reader] * 4)
    run(repository.aclose)


def test_one_repository_object_works_on_many_loops(storage: Storage) -> None:
    repository = new_repository(storage, inline_bytes=0)

    async def commit(n: int) -> None:
        session = await repository.writable_session_async("main")
        root = await zarr_async.open_group(session.store, mode="a")
        array = await root.create_array(f"a{n}", shape=(4,), chunks=(2,), dtype="i4")
        await array.setitem(slice(None), np.full(4, n))
        await session.commit_async(f"number {n}")
        messages = [info.message async for info in repository.async_ancestry(branch="main")]
        assert messages[0] == f"number {n}"

    for n in range(1, 5):
        run(lambda n=n: commit(n))  # type: ignore[misc]
    root = zarr.open_group(repository.readonly_session("main").store, mode="r")
    assert {name: np.asarray(array[:]).tolist() for name, array in root.arrays()} == {
        f"a{n}": [n] * 4 for n in range(1, 5)
    }
    run(repository.aclose)


def test_loop_ends_without_tasks_of_the_store(storage: Storage) -> None:
    async def work() -> list[str]:
        before = await other_tasks()
        repository = await Repository.create_async(storage, icechunk.RepositoryConfig(inline_chunk_threshold_bytes=0))
        session = await repository.writable_session_async("main")
        await session.store.set("zarr.json", buffer(array_document((3,))))
        for i in range(3):
            await session.store.set(f"c/{i}", buffer(bytes([i + 1] * 1000)))
        await session.commit_async("three")
        assert await read((await repository.readonly_session_async("main")).store, "c/2") == b"\x03" * 1000
        assert await session.store.is_empty("none")
        assert not await session.store.is_empty("")
        await repository.aclose()
        await storage.aclose()
        return [task for task in await other_tasks() if task not in before]

    assert run(work) == []


@pytest.mark.parametrize("size", [10, 100_000])
def test_sync_interfaces_work_inside_a_running_loop(storage: Storage, size: int) -> None:
    async def work() -> None:
        repository = new_repository(storage, inline_bytes=16)
        session = repository.writable_session("main")
        root = zarr.open_group(session.store, mode="a")
        array = root.create_array("a", shape=(4 * size,), chunks=(size,), dtype="u1", compressors=None)
        array[:] = 7
        # Put by this very loop, whose thread then waits for the twin: the twin uploads them itself.
        await session.store.set("a/c/3", buffer(bytes([9] * size)))
        session.commit("by a twin")
        found = zarr.open_array(repository.readonly_session("main").store, path="a", mode="r")
        assert np.asarray(found[:]).tolist() == [7] * 3 * size + [9] * size
        await repository.aclose()

    run(work)


class Barred(MemoryStorage):
    """Uploads of chunks from the barred loop never end; others do at once."""

    def __init__(self) -> None:
        super().__init__()
        self.barred: asyncio.AbstractEventLoop | None = None
        self.begun = 0

    async def put(self, key: str, *args: Any, **kwargs: Any) -> PutResult:
        if key.startswith("chunks/"):
            self.begun += 1
            if asyncio.get_running_loop() is self.barred:
                await asyncio.Event().wait()
        return await super().put(key, *args, **kwargs)


@pytest.mark.parametrize("where", ["sync", "own loop"])
def test_chunks_in_flight_when_their_loop_ends_are_uploaded_by_the_commit(where: str) -> None:
    storage = Barred()
    repository = new_repository(storage, inline_bytes=0)
    session = repository.writable_session("main")
    store = session.store

    async def write() -> None:
        storage.barred = asyncio.get_running_loop()
        await store.set("zarr.json", buffer(array_document((4,))))
        for i in range(4):
            # Two go alone, two share an object that has not set out.
            await store.set(f"c/{i}", buffer(bytes([i + 1] * (100 if i % 2 else 2_000_000))))
        await asyncio.sleep(0)

    run(write)
    assert storage.begun > 0

    async def commit() -> None:
        assert [await read(store, f"c/{i}", None) for i in (1, 3)] == [b"\x02" * 100, b"\x04" * 100]
        await session.commit_async("from another loop")

    run(commit) if where == "own loop" else session.commit("from another loop")

    async def check() -> None:
        found = (await (await Repository.open_async(storage)).readonly_session_async("main")).store
        for i in range(4):
            assert await read(found, f"c/{i}") == bytes([i + 1] * (100 if i % 2 else 2_000_000))

    run(check)


def test_twin_called_on_the_loop_that_is_uploading_does_not_wait_for_it() -> None:
    storage = Barred()

    async def work() -> None:
        repository = await Repository.create_async(storage, icechunk.RepositoryConfig(inline_chunk_threshold_bytes=0))
        session = await repository.writable_session_async("main")
        storage.barred = asyncio.get_running_loop()
        await session.store.set("zarr.json", buffer(array_document((1,))))
        await session.store.set("c/0", buffer(b"x" * 2_000_000))
        await asyncio.sleep(0)
        session.commit("by a twin, while this loop stands still")
        gc.collect()
        await asyncio.sleep(0)
        assert await read(session.store, "c/0") == b"x" * 2_000_000

    run(work)


def test_writes_while_a_commit_runs_are_refused_or_in_it(storage: Storage) -> None:
    repository = new_repository(storage)
    session = repository.writable_session("main")
    zarr.create_array(session.store, name="a", shape=(400, 16), chunks=(2, 16), dtype="i4", compressors=None)
    acknowledged: list[int] = []
    refusals: list[str] = []
    begun = threading.Event()

    def write() -> None:
        async def work() -> None:
            for i in range(200):
                try:
                    await session.store.set(f"a/c/{i}/0", buffer(bytes([i % 250 + 1] * 128)))
                except (SessionStateError, ReadOnlyError) as error:
                    refusals.append(error.kind)
                    return
                acknowledged.append(i)
                if i == 5:
                    begun.set()
                await asyncio.sleep(0)

        run(work)

    def commit() -> None:
        begun.wait(30)
        session.commit("while another thread writes")

    in_threads(write, commit)

    async def check() -> None:
        found = (await (await Repository.open_async(storage)).readonly_session_async("main")).store
        for i in acknowledged:
            assert await read(found, f"a/c/{i}/0") == bytes([i % 250 + 1] * 128)

    assert len(acknowledged) > 5
    assert set(refusals) <= {ErrorKind.READ_ONLY_STORE, ErrorKind.READ_ONLY_SESSION, ErrorKind.NOT_ALLOWED}
    run(check)
    run(repository.aclose)


def test_twenty_threads_read_one_read_only_store(storage: Storage) -> None:
    repository = new_repository(storage, inline_bytes=0)
    with repository.transaction("main", message="all") as store:
        zarr.create_array(store, name="a", shape=(32, 16), chunks=(2, 16), dtype="i4")[...] = VALUES
    store = Repository.open(storage).readonly_session("main").store

    def look() -> None:
        np.testing.assert_array_equal(zarr.open_array(store, path="a", mode="r")[...], VALUES)

    in_threads(*[look] * 20)


def test_store_used_on_zarrs_loop_and_on_the_users_at_the_same_time(storage: Storage) -> None:
    async def work() -> None:
        session = await open_session(storage, inline_bytes=0)
        store = session.store
        await store.set("zarr.json", buffer(array_document((64,))))

        def theirs() -> None:
            for i in range(1, 64, 2):
                sync(store.set(f"c/{i}", buffer(bytes([i] * 100))))

        async def ours() -> None:
            for i in range(0, 64, 2):
                await store.set(f"c/{i}", buffer(bytes([i] * 100)))
                await asyncio.sleep(0)

        await asyncio.gather(asyncio.to_thread(theirs), ours())
        await session.commit_async("both")
        found = await store.get_partial_values(
            zarr.core.buffer.default_buffer_prototype(), [(f"c/{i}", None) for i in range(64)]
        )
        assert [value.to_bytes() for value in found if value is not None] == [bytes([i] * 100) for i in range(64)]
        await storage.aclose()

    run(work)


def test_upload_that_fails_on_one_loop_raises_on_another_and_commits_later() -> None:
    class Failing(MemoryStorage):
        broken = True

        async def put(self, key: str, *args: Any, **kwargs: Any) -> PutResult:
            if self.broken and key.startswith("chunks/"):
                raise StorageError("the disk is full")
            return await super().put(key, *args, **kwargs)

    storage = Failing()
    repository = new_repository(storage, inline_bytes=0)
    session = repository.writable_session("main")

    async def write() -> None:
        await session.store.set("zarr.json", buffer(array_document((1,))))
        await session.store.set("c/0", buffer(b"x" * 2_000_000))

    run(write)
    with raises(StorageError, "storage-other", "chunks/"):
        session.commit("does not work")
    assert not session.read_only
    assert repository.lookup_branch("main") == session.snapshot_id

    async def look() -> bytes | None:
        return await read(session.store, "c/0")

    assert run(look) == b"x" * 2_000_000
    storage.broken = False

    async def commit() -> None:
        await session.commit_async("works")

    run(commit)
    assert run(look) == b"x" * 2_000_000


@pytest.mark.parametrize("size", [100, 2_000_000], ids=["packed", "alone"])
async def test_write_that_a_discard_in_another_thread_overtakes_keeps_its_bytes(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = MemoryStorage()
    session = await open_session(storage, inline_bytes=0)
    await session.store.set("zarr.json", buffer(array_document((1,))))
    await session.commit_async("array")
    repository = await Repository.open_async(storage)
    session = await repository.writable_session_async("main")
    put = session._content.puts.put
    discarded: list[object] = []

    async def put_then_lose_it(data: bytes) -> Any:
        place = await put(data)
        if not discarded:
            discarded.append(place)
            session.discard_changes()
        return place

    monkeypatch.setattr(session._content.puts, "put", put_then_lose_it)
    # As where there is no room at once: with room a chunk is packed and noted in one step.
    monkeypatch.setattr(session._content.puts, "put_nowait", lambda data: None)
    await session.store.set("c/0", buffer(b"x" * size))
    assert discarded
    await session.commit_async("acknowledged, so it is there")
    found = (await (await Repository.open_async(storage)).readonly_session_async("main")).store
    assert await read(found, "c/0") == b"x" * size


def test_cancelled_readers_leave_nothing_behind(storage: Storage) -> None:
    async def work() -> list[str]:
        before = await other_tasks()
        session = await open_session(storage, inline_bytes=0)
        await session.store.set("zarr.json", buffer(array_document((8,))))
        for i in range(8):
            await session.store.set(f"c/{i}", buffer(bytes([i + 1] * 3_000_00)))
        await session.commit_async("eight")
        repository = await Repository.open_async(storage)
        store = (await repository.readonly_session_async("main")).store
        tasks = [asyncio.ensure_future(read(store, f"c/{i % 8}")) for i in range(16)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for i, result in enumerate(results):
            assert isinstance(result, asyncio.CancelledError) if i % 2 == 0 else result == bytes([i % 8 + 1] * 3_000_00)
        assert await read(store, "c/0") == b"\x01" * 3_000_00
        await repository.aclose()
        await session._content.core.aclose()
        await storage.aclose()
        return [task for task in await other_tasks() if task not in before]

    assert run(work) == []


def test_listings_are_consistent_while_other_threads_make_and_delete_nodes() -> None:
    repository = new_repository(MemoryStorage())
    session = repository.writable_session("main")
    store = session.store
    document = buffer(group_document())
    sync(store.set("zarr.json", document))
    for i in range(0, 200, 2):
        sync(store.set(f"stays{i:03}/zarr.json", document))
    staying = {f"stays{i:03}" for i in range(0, 200, 2)}
    done = threading.Event()

    def change() -> None:
        async def work() -> None:
            for _ in range(30):
                for i in range(1, 200, 10):
                    await store.set(f"stays{i:03}/zarr.json", document)
                for i in range(1, 200, 10):
                    await store.delete(f"stays{i:03}/zarr.json")

        try:
            run(work)
        finally:
            done.set()

    def look() -> None:
        async def work() -> None:
            while not done.is_set():
                names = [name async for name in store.list_dir("")]
                assert len(names) == len(set(names))
                assert staying <= set(names)
                keys = [key async for key in store.list()]
                assert len(keys) == len(set(keys))
                assert {f"{name}/zarr.json" for name in staying} <= set(keys)
                assert await store.getsize_prefix("") >= len(document) * (len(staying) + 1)
                session.status()

        run(work)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        in_threads(change, look, look)
    finally:
        sys.setswitchinterval(interval)


def test_nothing_is_started_by_an_import() -> None:
    code = (
        "import threading, asyncio, icechunk\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "assert asyncio._get_running_loop() is None\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


@pytest.mark.thorough
@pytest.mark.parametrize("interface", ["sync", "async", "zarr", "unclosed", "mixed"])
def test_the_process_ends_without_output(tmp_path: Any, moto_storage: Storage, interface: str) -> None:
    """In a process of its own, on S3, where clients would complain of being left open."""
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    (tmp_path / "storage.pickle").write_bytes(pickle.dumps(moto_storage))
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", str(script), interface]
    done = subprocess.run(command, cwd=tmp_path, env=_environment(), capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


_SCRIPT = """
import asyncio, pickle, sys
import zarr
import icechunk

with open("storage.pickle", "rb") as file:
    storage = pickle.load(file)
interface = sys.argv[1]

async def asynchronously(close):
    repository = await icechunk.Repository.open_or_create_async(storage)
    session = await repository.writable_session_async("main")
    root = await zarr.api.asynchronous.open_group(session.store, mode="a")
    array = await root.create_array(f"a{close}", shape=(4, 1000), chunks=(1, 1000), dtype="i4")
    await array.setitem(..., 5)
    await session.commit_async("async")
    assert (await array.getitem(...)).sum() == 20000
    if close:
        await repository.aclose()

def synchronously():
    repository = icechunk.Repository.open_or_create(storage)
    session = repository.writable_session("main")
    zarr.create_array(session.store, name="s", shape=(4, 1000), chunks=(1, 1000), dtype="i4")[...] = 5
    session.commit("sync")
    return repository

if interface == "sync":
    synchronously()
elif interface == "async":
    asyncio.run(asynchronously(True))
elif interface == "unclosed":
    asyncio.run(asynchronously(False))
elif interface == "zarr":
    store = synchronously().readonly_session("main").store
    assert zarr.open_array(store, path="s", mode="r")[...].sum() == 20000
else:
    repository = synchronously()
    asyncio.run(asynchronously(False))
    asyncio.run(asynchronously(True))
    array = zarr.open_array(repository.readonly_session("main").store, path="aTrue", mode="r")
    assert array[...].sum() == 20000
print("done")
"""
