"""The measured workloads: one script, run with our library and with the official one.

``python -m tools.bench.workload CASE JSON`` prints one JSON object of seconds by name. Both libraries get the same
calls, through the public API at its defaults.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer import default_buffer_prototype

import icechunk
from tools.bench.forks import merge
from tools.bench.history import history, sync_files
from tools.bench.processes import contend_processes
from tools.bench.shards import shards
from tools.bench.wide import wide
from tools.bench.wire import storage_at

__all__ = ["CASES"]

SMALL_CALLS = 5_000
SMALL_BYTES = 64
COMMIT_REFS = 20_000
REFERENCES = 1_000_000
SMALL_ARRAYS = 5_000
WIRE_CHUNKS = 1_000
WIRE_CHUNK_BYTES = 16 * 1024
RANDOM_READS = 200
LOCAL_COMMITS = 1_000
CONTEND_ROUNDS = 3
IMPORTS = 5
APPEND_VARIABLES = 10
APPEND_SIDE = 128
APPEND_STEPS = 40
APPEND_MANY = 1_000


async def small(_: Mapping[str, Any]) -> dict[str, float]:
    """Seconds per call of the store's `set` and `get` with 64 bytes, in memory, one after the other."""
    repo = await icechunk.Repository.create_async(icechunk.in_memory_storage())
    session = await repo.writable_session_async("main")
    store = session.store
    await _array(store, "a", SMALL_CALLS, SMALL_BYTES)
    value = default_buffer_prototype().buffer.from_bytes(b"x" * SMALL_BYTES)
    keys = [f"a/c/{i}" for i in range(SMALL_CALLS)]
    prototype = default_buffer_prototype()

    started = time.perf_counter()
    for key in keys:
        await store.set(key, value)
    set_s = time.perf_counter() - started

    started = time.perf_counter()
    for key in keys:
        await store.get(key, prototype)
    get_s = time.perf_counter() - started

    await session.commit_async("small")
    reader = (await repo.readonly_session_async("main")).store
    await reader.get(keys[0], prototype)
    started = time.perf_counter()
    for key in keys:
        await reader.get(key, prototype)
    committed_s = time.perf_counter() - started
    return {
        "set": set_s / SMALL_CALLS,
        "get uncommitted": get_s / SMALL_CALLS,
        "get committed": committed_s / SMALL_CALLS,
    }


async def commit(_: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a commit of 20 000 native references, and of reading one of them from a new repository object."""
    config = icechunk.RepositoryConfig.default()
    config.inline_chunk_threshold_bytes = 0
    storage = icechunk.in_memory_storage()
    repo = await icechunk.Repository.create_async(storage, config=config)
    session = await repo.writable_session_async("main")
    store = session.store
    await _array(store, "a", COMMIT_REFS, 16)
    value = default_buffer_prototype().buffer.from_bytes(b"x" * 16)
    started = time.perf_counter()
    for first in range(0, COMMIT_REFS, 1000):
        await asyncio.gather(*(store.set(f"a/c/{i}", value) for i in range(first, first + 1000)))
    write_s = time.perf_counter() - started
    # a library that writes behind finishes its chunks first: the commit alone is measured
    await asyncio.sleep(1.0)
    started = time.perf_counter()
    await session.commit_async("many references")
    commit_s = time.perf_counter() - started
    return {"write": write_s, "commit": commit_s, "write and commit": write_s + commit_s}


def wire(options: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of what users do through zarr's API at its defaults, on an S3 endpoint.

    To write and to read 1 000 chunks of 16 KiB; to open and to read one; to read 200 at random, one at a time; to
    open a session, change an attribute and commit; of that the commit alone.
    """
    prefix = f"bench/{uuid.uuid4().hex}"
    repo = icechunk.Repository.create(storage_at(options, prefix))
    data = np.random.default_rng(0).integers(0, 2**31, WIRE_CHUNKS * WIRE_CHUNK_BYTES // 4, dtype="i4")
    session = repo.writable_session("main")
    array = zarr.create_array(
        store=session.store,
        name="a",
        shape=data.shape,
        chunks=(WIRE_CHUNK_BYTES // 4,),
        dtype="i4",
        compressors=None,
    )
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    array[:] = data
    session.commit("chunks")
    seconds["write and commit"] = time.perf_counter() - started

    reopened = icechunk.Repository.open(storage_at(options, prefix))
    store = reopened.readonly_session("main").store
    started = time.perf_counter()
    values = zarr.open_array(store, path="a", mode="r")[:]
    seconds["read"] = time.perf_counter() - started
    if not np.array_equal(values, data):
        raise AssertionError("what was read is not what was written")

    started = time.perf_counter()
    cold = icechunk.Repository.open(storage_at(options, prefix)).readonly_session("main").store
    zarr.open_array(cold, path="a", mode="r")[:1]
    seconds["open to first chunk"] = time.perf_counter() - started

    chosen = np.random.default_rng(1).integers(0, WIRE_CHUNKS, RANDOM_READS).tolist()
    again = icechunk.Repository.open(storage_at(options, prefix)).readonly_session("main").store
    array = zarr.open_array(again, path="a", mode="r")
    each = WIRE_CHUNK_BYTES // 4
    started = time.perf_counter()
    for i in chosen:
        part = np.asarray(array[i * each : (i + 1) * each])
        if part[0] != data[i * each]:
            raise AssertionError("what was read is not what was written")
    seconds["random reads"] = time.perf_counter() - started

    tries = 20
    seconds |= {"tiny session and commit": 0.0, "tiny commit": 0.0}
    for i in range(tries):
        started = time.perf_counter()
        session = repo.writable_session("main")
        zarr.open_array(session.store, path="a", mode="r+").attrs["i"] = i
        changed = time.perf_counter()
        session.commit("tiny")
        ended = time.perf_counter()
        seconds["tiny session and commit"] += (ended - started) / tries
        seconds["tiny commit"] += (ended - changed) / tries
    return seconds


async def references(_: Mapping[str, Any]) -> dict[str, float]:
    """Seconds to set and commit a million virtual references of 10 000 objects, then to append 1 000 to them."""
    config = icechunk.RepositoryConfig.default()
    container = icechunk.VirtualChunkContainer("s3://bucket/", icechunk.s3_store(region="us-east-1"))
    config.set_virtual_chunk_container(container)
    repo = await icechunk.Repository.create_async(icechunk.in_memory_storage(), config=config)
    seconds: dict[str, float] = {}
    first = 0
    for what, count in (("1 M set and commit", REFERENCES), ("append 1 000 to 1 M", 1_000)):
        session = await repo.writable_session_async("main")
        places = np.arange(first, first + count)
        locations = [f"s3://bucket/era5/air_temperature_at_2_metres/{i // 12}/{i % 12:02d}.nc" for i in places // 100]
        started = time.perf_counter()
        if first:
            array = await zarr.api.asynchronous.open_array(store=session.store, path="a", mode="r+")
            await array.resize((first + count,))
        else:
            await _array(session.store, "a", count, 1)
        session.store.set_virtual_refs_arr(
            "a",
            (count,),
            locations,
            (places % 100 * 1000).astype(np.uint64),
            np.full(count, 1000, np.uint64),
            arr_offset=(first,),
            validate_containers=True,
        )
        await session.commit_async(what)
        seconds[what] = time.perf_counter() - started
        first += count
    return seconds


async def virtual_distinct(_: Mapping[str, Any]) -> dict[str, float]:
    """Seconds to set a million virtual references of a million objects, as daily files have, and to commit them."""
    config = icechunk.RepositoryConfig.default()
    config.set_virtual_chunk_container(
        icechunk.VirtualChunkContainer("s3://bucket/", icechunk.s3_store(region="us-east-1"))
    )
    repo = await icechunk.Repository.create_async(icechunk.in_memory_storage(), config=config)
    session = await repo.writable_session_async("main")
    await _array(session.store, "a", REFERENCES, 1)
    locations = [f"s3://bucket/sst/{1980 + i // 365_00}/oisst-avhrr-v02r01.{i:08d}.nc" for i in range(REFERENCES)]
    offsets, lengths = np.full(REFERENCES, 4096, np.uint64), np.full(REFERENCES, 1000, np.uint64)
    started, cpu = time.perf_counter(), time.process_time()
    session.store.set_virtual_refs_arr("a", (REFERENCES,), locations, offsets, lengths, validate_containers=True)
    written, cpu_written = time.perf_counter(), time.process_time()
    await session.commit_async("a million")
    return {
        "1 M distinct: set": written - started,
        "1 M distinct: set, CPU": cpu_written - cpu,
        "1 M distinct: commit": time.perf_counter() - written,
        "1 M distinct: commit, CPU": time.process_time() - cpu_written,
    }


async def arrays(_: Mapping[str, Any]) -> dict[str, float]:
    """Seconds to set documents and chunks of 5 000 arrays of two chunks and to commit them; then a chunk of each. Also
    the CPU time that the commits take in all threads, which says more on a busy machine.

    The documents are set as they are: zarr's own creation of arrays, which costs both libraries the same, is left out.
    """
    config = icechunk.RepositoryConfig.default()
    config.inline_chunk_threshold_bytes = 0
    repo = await icechunk.Repository.create_async(icechunk.in_memory_storage(), config=config)
    prototype = default_buffer_prototype().buffer
    session = await repo.writable_session_async("main")
    await _array(session.store, "a", 2, 16)
    found = await session.store.get("a/zarr.json", default_buffer_prototype())
    assert found is not None
    document, value = prototype.from_bytes(found.to_bytes()), prototype.from_bytes(b"x" * 16)
    seconds: dict[str, float] = {}
    for what, keys in (("create", ("zarr.json", "c/0", "c/1")), ("update", ("c/0",))):
        started = time.perf_counter()
        for first in range(0, SMALL_ARRAYS, 500):
            for key in keys:
                put = document if key == "zarr.json" else value
                await asyncio.gather(*(session.store.set(f"a{i}/{key}", put) for i in range(first, first + 500)))
        written = time.perf_counter()
        # a library that writes behind finishes its chunks first, as in `commit`
        await asyncio.sleep(1.0)
        began, cpu = time.perf_counter(), time.process_time()
        await session.commit_async(what)
        committed = time.perf_counter() - began
        seconds |= {f"{what}: set": written - started, f"{what}: commit": committed}
        seconds[f"{what}: commit, CPU"] = time.process_time() - cpu
        seconds[f"{what} and commit"] = written - started + committed
        session = await repo.writable_session_async("main")
    return seconds


async def contend(_: Mapping[str, Any]) -> dict[str, float]:
    """Seconds a commit of 64 and of 256 tasks of one process that write a chunk each and commit with a rebase: from
    sessions of one base; and then each task again and again, from a new session each time."""
    found: dict[str, float] = {}

    def take(what: str, started: float, cpu: float, commits: int) -> None:
        found[what] = (time.perf_counter() - started) / commits
        found[f"{what}, CPU"] = (time.process_time() - cpu) / commits

    for tasks in (64, 256):
        repo = await icechunk.Repository.create_async(icechunk.in_memory_storage())
        session = await repo.writable_session_async("main")
        await _array(session.store, "a", tasks, 512)
        await session.commit_async("an array")
        sessions = [await repo.writable_session_async("main") for _ in range(tasks)]
        value = default_buffer_prototype().buffer.from_bytes(bytes(512))

        async def one(i: int, sessions: list[Any] = sessions, value: Any = value) -> None:
            await sessions[i].store.set(f"a/c/{i}", value)
            await sessions[i].commit_async(f"task {i}", rebase_with=icechunk.ConflictDetector())

        async def again(i: int, one: Any = one, sessions: list[Any] = sessions, repo: Any = repo) -> None:
            for _ in range(CONTEND_ROUNDS):
                sessions[i] = await repo.writable_session_async("main")
                await one(i)

        started, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(one(i) for i in range(tasks)))
        take(f"{tasks} tasks", started, cpu, tasks)
        started, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(again(i) for i in range(tasks)))
        take(f"{tasks} tasks, new sessions", started, cpu, tasks * CONTEND_ROUNDS)
    return found


async def append(options: Mapping[str, Any]) -> dict[str, float]:
    """Seconds a step of ten variables × 64 KiB appended, by what each library has for it: ours the appender, official
    xarray; a step a commit, and a thousand steps in one commit; then a thousand steps of 4 bytes a variable.

    On local disk, or on an S3 endpoint where ``options`` has one. Of the thousand steps, official appends the first 50
    alone: its time of a step is the same or longer for each later one. On local disk also seconds that no appender can
    go below, since they write and sync the bytes of a thousand steps, and do nothing else.
    """
    import xarray as xr

    from icechunk.xarray import to_icechunk

    def dataset(step: int, side: int = APPEND_SIDE) -> Any:
        values = np.arange(side * side, dtype="f4").reshape(1, side, side)
        times = np.datetime64("2000-01-01", "ns") + np.arange(step, step + 1).astype("timedelta64[h]")
        names = [f"v{i}" for i in range(APPEND_VARIABLES)]
        return xr.Dataset(dict.fromkeys(names, (("time", "y", "x"), values)), coords={"time": times})

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:

        def created(name: str, side: int = APPEND_SIDE) -> Any:
            if options:
                storage = storage_at(options, f"bench/{uuid.uuid4().hex}")
            else:
                storage = icechunk.local_filesystem_storage(f"{folder}/{name}")
            repo = icechunk.Repository.create(storage)
            session = repo.writable_session("main")
            first = dataset(0, side)
            to_icechunk(first, session, encoding={"time": {"units": "hours since 2000-01-01", "dtype": "i8"}})
            session.commit("create")
            return repo

        def by_xarray(repo: Any, first: int, steps: int, commits: int, side: int = APPEND_SIDE) -> float:
            started = time.perf_counter()
            for commit in range(commits):
                session = repo.writable_session("main")
                for step in range(steps):
                    to_icechunk(dataset(first + commit * steps + step, side), session, append_dim="time")
                session.commit("append")
            return (time.perf_counter() - started) / steps / commits

        repo = await asyncio.to_thread(created, "steps")
        if not hasattr(repo, "appender"):
            steps, many = APPEND_STEPS // 2 if options else APPEND_STEPS, APPEND_MANY // 20
            small = await asyncio.to_thread(created, "small", 1)
            found = {
                "a step a commit": await asyncio.to_thread(by_xarray, repo, 1, 1, steps),
                "1 000 steps a commit": await asyncio.to_thread(by_xarray, repo, 1 + steps, many, 1),
                "1 000 small steps": await asyncio.to_thread(by_xarray, small, 1, many, 1, 1),
            }
            if not options:
                found["1 000 steps, writes"] = await asyncio.to_thread(_write_chunks, folder)
            return found
        seconds: dict[str, float] = {}
        async with repo.appender("main", dim="time", source="bench", every=3600) as appender:
            data_of_steps = [dataset(step) for step in range(1, 1 + APPEND_STEPS)]
            started = time.perf_counter()
            for step, data in enumerate(data_of_steps):
                await appender.put(data, offset=step)
                await appender.flush()
            seconds["a step a commit"] = (time.perf_counter() - started) / APPEND_STEPS
        memory = {"every": 3600, "max_rows": 10**9, "max_bytes": 2**31}
        for what, side in (("1 000 steps a commit", APPEND_SIDE), ("1 000 small steps", 1)):
            repo = await asyncio.to_thread(created, what, side)
            async with repo.appender("main", dim="time", source="bench", **memory) as appender:
                data_of_steps = [dataset(step, side) for step in range(1, 1 + APPEND_MANY)]
                started = time.perf_counter()
                for step, data in enumerate(data_of_steps):
                    await appender.put(data, offset=step)
                await appender.flush()
                seconds[what] = (time.perf_counter() - started) / APPEND_MANY
        if not options:
            seconds["1 000 steps, writes"] = await asyncio.to_thread(_write_chunks, folder)
    return seconds


def _write_chunks(folder: str) -> float:
    """Seconds a step to write the chunks of a thousand steps, already compressed, into files of 16 MiB that are synced
    at once in two threads."""
    from concurrent.futures import ThreadPoolExecutor

    from numcodecs.zstd import Zstd

    chunk = bytes(Zstd().encode(np.arange(APPEND_SIDE**2, dtype="f4")))
    files = APPEND_MANY // 40

    def write(number: int) -> None:
        file = os.open(f"{folder}/{number} chunks", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(file, chunk * (APPEND_VARIABLES * APPEND_MANY // files))
        os.fsync(file)
        os.close(file)

    started = time.perf_counter()
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, range(files)))
    return (time.perf_counter() - started) / APPEND_MANY


async def local_commits(_: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a thousand sessions on local disk that change one attribute each and commit, one after the other.

    Official waits for no disk: what it has committed may be gone after a power failure. So the limits are measured too,
    without any library: seconds of a thousand files that are synced and named, and whose folder is synced; and seconds
    of all files of such commits: the entry, a snapshot, a transaction log, and ``repo`` in place of the former one.
    (Where a journal keeps the order, ours waits once a commit, not twice: docs/storages.md.)
    """
    with tempfile.TemporaryDirectory() as folder:
        repo = await icechunk.Repository.create_async(icechunk.local_filesystem_storage(f"{folder}/r"))
        started = time.perf_counter()
        for number in range(LOCAL_COMMITS):
            session = await repo.writable_session_async("main")
            await session.store.set("zarr.json", _group({"number": number}))
            await session.commit_async(f"commit {number}")
        commits_s = time.perf_counter() - started
        seconds = {"1 000 tiny commits": commits_s}
        for what, unsynced in {"their waits for the disk alone": 0, "their files alone": 3}.items():
            os.mkdir(f"{folder}/{unsynced}")
            started = time.perf_counter()
            await asyncio.to_thread(sync_files, f"{folder}/{unsynced}", LOCAL_COMMITS, unsynced)
            seconds[what] = time.perf_counter() - started
        return seconds


def _group(attributes: Mapping[str, Any]) -> Any:
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return default_buffer_prototype().buffer.from_bytes(json.dumps(document).encode())


async def _array(store: Any, path: str, n_chunks: int, chunk_bytes: int) -> None:
    await zarr.api.asynchronous.create_array(
        store=store, name=path, shape=(n_chunks * chunk_bytes,), chunks=(chunk_bytes,), dtype="u1", compressors=None
    )


def importing(_: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a fresh process that imports the package, of one that opens a local repository of format 2 too, of one
    that makes the store of a session besides, and of one that imports zarr alone, which a store needs."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | {
            "PYTHONPATH": str(Path(icechunk.__file__).parents[1]),
            "PYTHONPYCACHEPREFIX": f"{folder}/compiled",
            "ICECHUNK_LOG": "error",
        }
        place = f"icechunk.local_filesystem_storage({folder + '/repository'!r})"
        icechunk.Repository.create(icechunk.local_filesystem_storage(f"{folder}/repository"), spec_version=2)
        opened = f"import icechunk; icechunk.Repository.open({place}).readonly_session('main')"
        scripts = {
            "import": "import icechunk",
            "import and open": opened,
            "import, open and store": f"{opened}.store",
            "import of zarr alone": "import zarr",
        }
        seconds = {}
        for what, script in scripts.items():
            taken = []
            for _turn in range(1 + IMPORTS):
                began = time.perf_counter()
                subprocess.run([sys.executable, "-c", script], env=environment, cwd=folder, check=True)
                taken.append(time.perf_counter() - began)
            # The first one compiles.
            seconds[what] = min(taken[1:])
        return seconds


CASES: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "small": small,
    "commit": commit,
    "references": references,
    "virtual-distinct": virtual_distinct,
    "arrays": arrays,
    "contend": contend,
    "contend-processes": contend_processes,
    "append": append,
    "append-wire": append,
    "local-commits": local_commits,
    "wire": wire,
    "merge": merge,
    "shards": shards,
    "import": importing,
    "wide": wide,
    "history": history,
}


def main(arguments: list[str]) -> None:
    warnings.simplefilter("ignore")
    case, options = arguments
    result = CASES[case](json.loads(options))
    if asyncio.iscoroutine(result):
        result = asyncio.run(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
