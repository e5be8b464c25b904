"""Costs of reading and cleaning up a long history, on local disk, with either library.

One history is made beforehand, by our library: the official one gets the same files, as a repository of format 2.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import zarr
from zarr.core.buffer import default_buffer_prototype

import icechunk

__all__ = ["history", "places", "sync_files"]

LENGTHS = {"1k": 1_000, "20k": 20_000}
ARRAYS, REFERENCES, COMMITS, BRANCHES = 300, 100_000, 200, 200
_OPENS = 15
_CHUNK_BYTES = 600


def history(options: Mapping[str, Any]) -> dict[str, float]:
    """Seconds to open, to list the ancestry, to expire half of the history, to collect what that left, and to collect
    again, when nothing is left to delete. On a repository of 300 arrays and 100 000 references: seconds for its
    statistics, for the difference between the first and the last of its 200 commits, to create 200 branches, and for
    the syncs that 200 changes need to survive a power failure, which the official library does without. Also the CPU
    time that each takes in all threads, which says more on a busy machine."""
    seconds: dict[str, float] = {}
    for name in LENGTHS:
        with _copy(options[name]) as folder:
            # "open, 1k", "open, 1k, CPU"
            seconds |= {_named(what, name): value for what, value in _long(folder).items()}
    with _copy(options["many references"]) as folder:
        return seconds | _many_references(folder)


def _named(what: str, length: str) -> str:
    case, comma, cpu = what.partition(", ")
    return f"{case}, {length}{comma}{cpu}"


@contextmanager
def _copy(place: str) -> Iterator[str]:
    # No file is ever changed in place, so links will do.
    with tempfile.TemporaryDirectory(dir=Path(place).parent, ignore_cleanup_errors=True) as folder:
        shutil.copytree(place, f"{folder}/repository", copy_function=os.link)
        yield f"{folder}/repository"


def _open(folder: str) -> Any:
    return icechunk.Repository.open(icechunk.local_filesystem_storage(folder))


def _take(seconds: dict[str, float], what: str, work: Callable[[], Any], turns: int = 1) -> None:
    """Add the least seconds of some turns, and the least CPU time."""
    for _ in range(turns):
        started, cpu = time.perf_counter(), time.process_time()
        work()
        taken = {what: time.perf_counter() - started, f"{what}, CPU": time.process_time() - cpu}
        for name, value in taken.items():
            seconds[name] = min(seconds.get(name, value), value)


def _long(folder: str) -> dict[str, float]:
    seconds: dict[str, float] = {}
    _take(seconds, "open", lambda: _open(folder), _OPENS)
    repository = _open(folder)
    infos = list(repository.ancestry(branch="main"))
    _take(seconds, "ancestry", lambda: list(repository.ancestry(branch="main")), 3)
    middle = infos[len(infos) // 2].written_at
    _take(seconds, "expire half", lambda: repository.expire_snapshots(middle))
    if len(list(repository.ancestry(branch="main"))) > len(infos) // 2 + 3:
        raise AssertionError("nothing was expired")
    past = datetime.now(UTC) - timedelta(seconds=1)
    collected = []
    _take(seconds, "collect half", lambda: collected.append(repository.garbage_collect(past)))
    _take(seconds, "collect nothing", lambda: collected.append(repository.garbage_collect(past)), 2)
    if not collected[0].snapshots_deleted or collected[-1].snapshots_deleted:
        raise AssertionError("not what there is was collected")
    return seconds


def _many_references(folder: str) -> dict[str, float]:
    repository = _open(folder)
    infos = list(repository.ancestry(branch="main"))
    first, last = infos[-2].id, infos[0].id

    def diff() -> None:
        repository.diff(from_snapshot_id=first, to_snapshot_id=last)

    def branches() -> None:
        for i in range(BRANCHES):
            repository.create_branch(f"branch-{i}", last)

    seconds: dict[str, float] = {}
    _take(seconds, "statistics", lambda: _open(folder).chunk_storage_stats(), 3)
    _take(seconds, "diff", diff)
    _take(seconds, "diff again", diff, 3)
    _take(seconds, "200 branches", branches)
    _take(seconds, "200 branches: waits for the disk alone", lambda: sync_files(folder, BRANCHES))
    return seconds


def sync_files(folder: str, count: int, unsynced: int = 0) -> None:
    """Write so many small files, one after the other: each is synced and named, and then its folder is synced.

    The same without any library: a writer that keeps each change through a power failure hardly takes less time.

    Parameters
    ----------
    unsynced
        Files that are written after each of them without a sync; the last one in place of the one before, with which it
        exchanges names where the system can: ext4 begins to write a file that replaces another by a rename at once.
    """
    directory = os.open(folder, os.O_RDONLY)
    for number in range(count):
        _write_file(f"{folder}/{number}", sync=True)
        os.fsync(directory)
        for other in range(unsynced):
            _write_file(f"{folder}/" + ("replaced" if other == unsynced - 1 else f"{number} {other}"), sync=False)
    os.close(directory)


def _write_file(path: str, *, sync: bool) -> None:
    file = os.open(f"{path} unfinished", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    os.write(file, bytes(3000))
    if sync:
        os.fsync(file)
    os.close(file)
    if not os.path.exists(path) or not _exchange(f"{path} unfinished", path):
        os.rename(f"{path} unfinished", path)
    else:
        os.unlink(f"{path} unfinished")


def _exchange(one: str, other: str) -> bool:
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    return call is not None and call(-100, one.encode(), -100, other.encode(), ctypes.c_uint(2)) == 0


@contextmanager
def places() -> Iterator[dict[str, dict[str, str]]]:
    """Folders with the histories, by library: ``ours`` and ``official``."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        made = {
            **{name: asyncio.run(_history(length)) for name, length in LENGTHS.items()},
            "many references": asyncio.run(_references()),
        }
        found: dict[str, dict[str, str]] = {"ours": {}, "official": {}}
        for name, storage in made.items():
            for library, places_of in found.items():
                place = places_of[name] = f"{folder}/{library}/{name}"
                if library == "official":
                    asyncio.run(_convert(storage))
                for key, (_, data) in storage._objects.items():
                    Path(place, key).parent.mkdir(parents=True, exist_ok=True)
                    Path(place, key).write_bytes(data)
                if library == "ours":
                    # As a writer on local disk leaves it: with a durable checkpoint.
                    icechunk.Repository.open(icechunk.local_filesystem_storage(place)).checkpoint()
        # Collections leave alone what is younger than the moment they are asked for.
        time.sleep(1.5)
        yield found


async def _convert(storage: Any) -> None:
    async with await icechunk.Repository.open_async(storage) as repository:
        await repository.convert_async("repo")


async def _history(length: int) -> Any:
    storage = icechunk.in_memory_storage()
    async with await icechunk.Repository.create_async(storage) as repository:
        value = default_buffer_prototype().buffer.from_bytes(bytes(_CHUNK_BYTES))
        session = await repository.writable_session_async("main")
        await zarr.api.asynchronous.create_array(
            store=session.store, name="a", shape=(10 * _CHUNK_BYTES,), chunks=(_CHUNK_BYTES,), dtype="u1"
        )
        await session.commit_async("the array")
        for i in range(length - 2):
            session = await repository.writable_session_async("main")
            await session.store.set(f"a/c/{i % 10}", value)
            await session.commit_async(f"commit {i}")
        await repository.checkpoint_async()
    return storage


async def _references() -> Any:
    storage = icechunk.in_memory_storage()
    each = REFERENCES // ARRAYS
    async with await icechunk.Repository.create_async(storage) as repository:
        value = default_buffer_prototype().buffer.from_bytes(bytes(_CHUNK_BYTES))
        session = await repository.writable_session_async("main")
        for i in range(ARRAYS):
            await zarr.api.asynchronous.create_array(
                store=session.store, name=f"a{i}", shape=(2 * each,), chunks=(1,), dtype="u1"
            )
        for i in range(ARRAYS):
            await asyncio.gather(*(session.store.set(f"a{i}/c/{j}", value) for j in range(each)))
        await session.commit_async("chunks")
        for n in range(COMMITS):
            session = await repository.writable_session_async("main")
            for i in range(n % 3, ARRAYS, 10):
                await session.store.set(f"a{i}/c/{each + n}", value)
            await session.commit_async(f"commit {n}")
        await repository.checkpoint_async()
    return storage
