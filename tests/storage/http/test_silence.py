"""Servers that go silent: what waits for them gives up in the time that their answers have taken, and goes on."""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from icechunk import EngineConfig, Repository, RepositoryConfig
from icechunk.config import S3Options, StorageRetriesSettings, StorageSettings
from icechunk.credentials import S3Credentials
from icechunk.storage import patience
from icechunk.storage.http import connections as http_connections
from icechunk.storage.http.connections import SilentError
from icechunk.storage.port import Absent, Range
from icechunk.storage.retry import repeats_so_far
from icechunk.storage.s3.storage import S3Storage
from tests.storage.http.certificates import tls_contexts
from tests.storage.http.test_connections import LIMITS, OK, connections, serving
from tests.storage.s3.faulty_s3 import HANG, LOSE, FaultyS3, Seen
from tests.storage.s3.faulty_s3 import serving as serving_s3


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_LEAST_PATIENCE_S", 0.1)


def storage_on(server: FaultyS3, tries: int = 5) -> S3Storage:
    server.clock_s = None
    return S3Storage(
        "b",
        options=S3Options(region="us-east-1", endpoint_url=server.endpoint, allow_http=True, force_path_style=True),
        credentials=S3Credentials.Anonymous(),
        settings=StorageSettings(
            retries=StorageRetriesSettings(max_tries=tries, initial_backoff_ms=1, max_backoff_ms=1)
        ),
    )


async def test_a_silent_connection_is_given_up_early_and_those_beside_it_are_closed() -> None:
    silent = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            if not silent.is_set():
                await asyncio.sleep(0.01)
                writer.write(OK)

    async with serving(talk) as origin, connections() as made:
        await asyncio.gather(*(made.exchange(origin, "GET", "/", {"host": "h"}, **LIMITS) for _ in range(20)))
        assert len(made._idle[origin]) == 20
        silent.set()
        began = asyncio.get_running_loop().time()
        with pytest.raises(SilentError):
            await made.exchange(origin, "GET", "/", {"host": "h"}, **LIMITS, patience=1.0)
        assert asyncio.get_running_loop().time() - began < 1.0
        assert made._kept(origin) is None
        with pytest.raises(TimeoutError) as caught:
            await made.exchange(origin, "GET", "/", {"host": "h"}, connect_s=5.0, read_s=0.5, patience=math.inf)
        assert asyncio.get_running_loop().time() - began > 0.5
        assert not isinstance(caught.value, SilentError)


@pytest.fixture(params=["http", "https"])
def tls(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext] | tuple[None, None]:
    """Contexts of server and client."""
    return tls_contexts(tmp_path) if request.param == "https" else (None, None)


async def read_head(reader: asyncio.StreamReader) -> int:
    """Read the head of a request; returns the size of the body that follows."""
    head = await reader.readuntil(b"\r\n\r\n")
    return int(head.split(b"content-length: ")[1].split(b"\r\n")[0])


Tls = tuple[ssl.SSLContext, ssl.SSLContext] | tuple[None, None]


async def test_a_body_gets_the_time_that_a_slow_line_needs_to_take_it(tls: Tls) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = await read_head(reader)
        began = asyncio.get_running_loop().time()
        while left:
            left -= len(await reader.read(64 * 1024))
            await asyncio.sleep(0.01)
        assert asyncio.get_running_loop().time() - began > 1.0
        writer.write(OK)

    async with serving(talk, tls[0]) as origin, connections(tls[1]) as made:
        response = await made.exchange(origin, "PUT", "/", {"host": "h"}, bytes(12 << 20), **LIMITS, patience=1.0)
        assert response.status == 200


@pytest.mark.parametrize("system_tells", [True, False])
@pytest.mark.parametrize("taken", [1 << 20, 4 << 20])
async def test_an_upload_that_moves_no_more_is_given_up_as_soon_as_uploads_are_known_to_be_fast(
    tls: Tls, taken: int, system_tells: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not system_tells:
        monkeypatch.setattr(http_connections, "_untaken_bytes", lambda _: None)
    stop = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (size := await read_head(reader)) < 4 << 20:
            await reader.readexactly(size)
            writer.write(OK)
        await reader.readexactly(taken)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await stop.wait()

    # Where the system does not tell, the longest silence finds out that a peer stopped in the middle.
    is_silent = system_tells or taken == 4 << 20
    read_s = 60.0 if is_silent else 2.0
    before = repeats_so_far().abandoned
    async with serving(talk, tls[0]) as origin, connections(tls[1]) as made:

        async def put(size: int) -> None:
            await made.exchange(
                origin, "PUT", "/", {"host": "h"}, bytes(size), connect_s=5.0, read_s=read_s, patience=1.0
            )

        for _ in range(16):
            await put(1 << 20)
        with pytest.raises(TimeoutError) as caught:
            await put(4 << 20)
        if is_silent:
            assert isinstance(caught.value, SilentError)
            assert repeats_so_far().abandoned > before
        stop.set()


async def test_an_answer_that_stops_in_the_middle_is_given_up_early(tls: Tls) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n" + bytes(1_000_000))
        await reader.read()

    async with serving(talk, tls[0]) as origin, connections(tls[1]) as made:
        began = asyncio.get_running_loop().time()
        with pytest.raises(SilentError):
            await made.exchange(origin, "GET", "/", {"host": "h"}, **LIMITS, patience=1.0)
        assert asyncio.get_running_loop().time() - began < 2.0


async def test_an_answer_that_comes_slowly_is_read_to_its_end(tls: Tls) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n")
        for _ in range(20):
            await asyncio.sleep(0.02)
            writer.write(b"x")
        await reader.read()

    async with serving(talk, tls[0]) as origin, connections(tls[1]) as made:
        response = await made.exchange(origin, "GET", "/", {"host": "h"}, **LIMITS, patience=1.0)
        assert bytes(response.body) == b"x" * 20


def hanging_once(which: Callable[[Seen], bool], behaviour: str = HANG) -> Callable[[Seen], str]:
    left = 1

    def faulty(seen: Seen) -> str:
        nonlocal left
        if left and which(seen):
            left -= 1
            return behaviour
        return "ok"

    return faulty


async def test_reads_of_a_silent_server_are_tried_again_soon() -> None:
    async with serving_s3() as server, asyncio.timeout(10):
        storage = storage_on(server)
        await storage.put("x", b"0123456789")
        for wanted in (None, Range(2, 4)):
            server.faulty = hanging_once(lambda seen: seen.method == "GET")
            assert (await storage.get("x", wanted)).data == b"0123456789"[slice(2, 4) if wanted else slice(None)]
        server.faulty = hanging_once(lambda seen: "list-type" in seen.path)
        assert [page async for page in storage.list_pages()]
        await storage.aclose()


async def test_a_server_that_is_always_slow_gets_more_time_at_a_later_try() -> None:
    async with serving_s3() as server, asyncio.timeout(20):
        storage = storage_on(server)
        await storage.put("x", b"1")
        server.hold_s = 0.7
        assert (await storage.get("x")).data == b"1"
        once = storage_on(server, tries=1)
        assert (await once.get("x")).data == b"1"
        for each in (storage, once):
            await each.aclose()


@pytest.mark.parametrize("behaviour", [HANG, LOSE])
async def test_a_commit_that_meets_silence_takes_little_longer_than_the_silence(behaviour: str) -> None:
    async with serving_s3() as server, asyncio.timeout(20):
        storage = storage_on(server)
        async with await Repository.create_async(storage) as repository:
            session = await repository.writable_session_async("main")
            server.faulty = hanging_once(lambda seen: seen.method == "PUT" and "/log/" in seen.path, behaviour)
            began = asyncio.get_running_loop().time()
            await session.commit_async("through silence", allow_empty=True)
            assert asyncio.get_running_loop().time() - began < 3.0
            messages = [info.message async for info in repository.async_ancestry(branch="main")]
            assert messages.count("through silence") == 1


async def test_the_outcome_of_a_conditional_write_that_was_given_up_is_looked_up() -> None:
    async with serving_s3() as server, asyncio.timeout(10):
        storage = storage_on(server)

        def faulty(seen: Seen) -> str:
            if seen.method == "PUT" and "/b/x" not in server.objects:
                server.carry_out(seen)
                return HANG
            return "ok"

        server.faulty = faulty
        await storage.put("x", b"1", Absent())
        assert server.methods() == ["PUT", "HEAD"]
        await storage.aclose()


async def test_threads_that_read_the_same_bytes_as_one_that_is_stuck_are_served_soon() -> None:
    async with serving_s3() as server, asyncio.timeout(30):
        storage = storage_on(server)
        config = RepositoryConfig(engine=EngineConfig(pack_threshold_bytes=0), inline_chunk_threshold_bytes=0)
        repository = await asyncio.to_thread(Repository.create, storage, config)

        def write() -> None:
            session = repository.writable_session("main")
            zarr.create_array(session.store, name="a", data=np.arange(1000), chunks=(1000,))
            session.commit("data")

        await asyncio.to_thread(write)
        reader = await asyncio.to_thread(Repository.open, storage)

        def read() -> int:
            array = zarr.open_array(reader.readonly_session("main").store, path="a", mode="r")
            return int(np.asarray(array[:]).sum())

        # Every file that a reader fetches is stuck at its first request.
        seen: set[str] = set()

        def faulty(request: Seen) -> str:
            first = request.method == "GET" and "list-type" not in request.path and request.path not in seen
            seen.add(request.path)
            return HANG if first else "ok"

        server.faulty = faulty
        began = asyncio.get_running_loop().time()
        assert await asyncio.gather(*(asyncio.to_thread(read) for _ in range(4))) == [499500] * 4
        assert asyncio.get_running_loop().time() - began < 8.0
        assert len(seen) > 1
