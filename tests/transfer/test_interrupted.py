"""Reads that a person interrupts, or that are cancelled, while their server is silent: the next ones are answered."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
import zarr

from icechunk import EngineConfig, Repository, RepositoryConfig
from icechunk.config import S3Options
from icechunk.credentials import S3Credentials
from icechunk.storage.s3.storage import S3Storage
from tests.storage.s3.faulty_s3 import HANG, FaultyS3, Seen, serving

ANSWERED_S = 1.5
"""An answered read takes milliseconds; a reader that joins a stuck request for longer than this waits for another."""

CHILD = """
    import signal, sys, time
    import numpy as np
    import zarr
    import icechunk

    # A shell that runs the tests in the background has them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    storage = icechunk.s3_storage(
        bucket="b", prefix=None, region="us-east-1", endpoint_url=sys.argv[1], allow_http=True, force_path_style=True,
        anonymous=True,
    )
    repository = icechunk.Repository.open(storage)
    array = zarr.open_array(repository.readonly_session("main").store, path="a", mode="r")
    print("reading", flush=True)
    try:
        array[:]
        print("not interrupted", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    began = time.monotonic()
    print(int(np.asarray(array[:]).sum()), time.monotonic() - began, flush=True)
"""


def storage_on(server: FaultyS3) -> S3Storage:
    server.clock_s = None
    return S3Storage(
        "b",
        options=S3Options(region="us-east-1", endpoint_url=server.endpoint, allow_http=True, force_path_style=True),
        credentials=S3Credentials.Anonymous(),
    )


@asynccontextmanager
async def with_array(chunk_items: int = 1000) -> AsyncIterator[FaultyS3]:
    """A server with a repository whose array ``a`` has one chunk, of an object of its own."""
    async with serving() as server:
        config = RepositoryConfig(engine=EngineConfig(pack_threshold_bytes=0), inline_chunk_threshold_bytes=0)

        def write() -> None:
            repository = Repository.create(storage_on(server), config)
            session = repository.writable_session("main")
            data = np.arange(chunk_items)
            zarr.create_array(session.store, name="a", data=data, chunks=data.shape, compressors=None)
            session.commit("data")

        await asyncio.to_thread(write)
        yield server


def silent_at_first(server: FaultyS3, times: int = 1) -> asyncio.Event:
    """Let the first requests for a chunk go unanswered; set when one arrives."""
    arrived = asyncio.Event()
    left = times

    def faulty(seen: Seen) -> str:
        nonlocal left
        if left and seen.method == "GET" and "/chunks/" in seen.path:
            left -= 1
            arrived.set()
            return HANG
        return "ok"

    server.faulty = faulty
    return arrived


@pytest.mark.thorough
@pytest.mark.parametrize("items", [1000, 300_000], ids=["small", "large"])
@pytest.mark.parametrize("waited_s", [0.05, 0.6])
async def test_read_after_ctrl_c_is_answered_at_once(items: int, waited_s: float) -> None:
    async with with_array(items) as server:
        arrived = silent_at_first(server)
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            textwrap.dedent(CHILD),
            server.endpoint,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        try:
            async with asyncio.timeout(60):
                assert child.stdout is not None
                assert await child.stdout.readline() == b"reading\n"
                await arrived.wait()
                await asyncio.sleep(waited_s)
                child.send_signal(signal.SIGINT)
                assert await child.stdout.readline() == b"interrupted\n"
                total, took_s = (await child.stdout.readline()).split()
                assert int(total) == items * (items - 1) // 2
                assert float(took_s) < ANSWERED_S
                assert await child.wait() == 0
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()


@pytest.mark.parametrize("items", [1000, 300_000], ids=["small", "large"])
async def test_read_after_a_cancelled_one_is_answered_at_once(items: int) -> None:
    async with with_array(items) as server, await Repository.open_async(storage_on(server)) as repository:
        array = await reading(repository)
        arrived = silent_at_first(server)
        first = asyncio.ensure_future(array.getitem(...))
        await arrived.wait()
        first.cancel()
        await asyncio.wait([first])
        assert await took_s(lambda: array.getitem(...)) < ANSWERED_S


@pytest.mark.parametrize("items", [1000, 300_000], ids=["small", "large"])
async def test_reader_that_joined_a_read_gets_its_bytes_whether_or_not_that_is_cancelled(items: int) -> None:
    async with with_array(items) as server, await Repository.open_async(storage_on(server)) as repository:
        array = await reading(repository)
        arrived = silent_at_first(server)
        first = asyncio.ensure_future(array.getitem(...))
        await arrived.wait()

        async def join() -> None:
            joined = asyncio.ensure_future(array.getitem(...))
            await asyncio.sleep(0.05)
            first.cancel()
            await joined

        assert await took_s(join) < ANSWERED_S


async def test_threads_that_read_the_same_bytes_as_an_interrupted_one_are_answered_at_once() -> None:
    async with with_array() as server:
        repository = await asyncio.to_thread(Repository.open, storage_on(server))
        store = (await asyncio.to_thread(repository.readonly_session, "main")).store
        array = await asyncio.to_thread(zarr.open_array, store, path="a", mode="r")
        arrived = silent_at_first(server)
        # As a thread that was interrupted in zarr leaves it: no caller waits for it or cancels it.
        threading.Thread(target=array.__getitem__, args=(...,), daemon=True).start()
        await arrived.wait()

        async def others() -> None:
            await asyncio.gather(*(asyncio.to_thread(array.__getitem__, ...) for _ in range(3)))

        assert await took_s(others) < ANSWERED_S


@pytest.mark.thorough
async def test_commit_that_meets_a_server_silent_for_five_seconds_takes_little_longer() -> None:
    async with with_array() as server, await Repository.open_async(storage_on(server)) as repository:
        session = await repository.writable_session_async("main")
        loop = asyncio.get_running_loop()
        speaks_at = loop.time() + 5.0
        server.faulty = lambda seen: HANG if loop.time() < speaks_at else "ok"
        assert await took_s(lambda: session.commit_async("through silence", allow_empty=True)) < 9.0


async def reading(repository: Repository) -> zarr.AsyncArray:  # type: ignore[type-arg]
    session = await repository.readonly_session_async("main")
    return await zarr.api.asynchronous.open_array(store=session.store, path="a", mode="r")


async def took_s(work: Callable[[], object]) -> float:
    began = asyncio.get_running_loop().time()
    async with asyncio.timeout(30):
        await work()  # type: ignore[misc]
    return asyncio.get_running_loop().time() - began
