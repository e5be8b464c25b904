"""Several repositories on one storage object, and closing while others work."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from icechunk import Repository
from icechunk.config import S3Options, StorageRetriesSettings, StorageSettings
from icechunk.credentials import S3Credentials
from icechunk.storage.http.storage import HttpStorage
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.port import Storage
from icechunk.storage.s3.storage import S3Storage
from tests.storage.http.web_server import serving_files
from tests.storage.s3.faulty_s3 import FaultyS3, serving

ONE_TRY = StorageSettings(retries=StorageRetriesSettings(max_tries=1))


def storage_on(server: FaultyS3) -> S3Storage:
    server.clock_s = None
    options = S3Options(region="r", endpoint_url=server.endpoint, allow_http=True, force_path_style=True)
    return S3Storage("b", options=options, credentials=S3Credentials.Anonymous(), settings=ONE_TRY)


async def open_and_close(storage: Storage) -> list[str]:
    async with await Repository.open_async(storage) as repository:
        return [info.message async for info in repository.async_ancestry(branch="main")]


async def test_closing_one_repository_does_not_break_others_on_the_same_storage() -> None:
    async with serving() as server:
        storage = storage_on(server)
        async with await Repository.create_async(storage) as repository:
            session = await repository.writable_session_async("main")
            await session.commit_async("first", allow_empty=True)
        server.hold_s = 0.002
        async with asyncio.timeout(30):
            found = await asyncio.gather(*(open_and_close(storage) for _ in range(40)))
        assert {messages[0] for messages in found} == {"first"}
        async with asyncio.timeout(5):
            await storage.aclose()


async def test_a_commit_is_not_disturbed_by_others_that_open_and_close() -> None:
    async with serving() as server:
        storage = storage_on(server)
        async with await Repository.create_async(storage) as repository:
            server.hold_s = 0.002

            async def commit() -> None:
                for n in range(10):
                    session = await repository.writable_session_async("main")
                    await session.commit_async(str(n), allow_empty=True)

            async with asyncio.timeout(60):
                writing = asyncio.create_task(commit())
                while not writing.done():
                    await open_and_close(storage)
                await writing
            messages = [info.message async for info in repository.async_ancestry(branch="main")]
        assert messages[:10] == [str(n) for n in reversed(range(10))]


async def test_readers_of_a_web_server_do_not_close_each_other(tmp_path: Path) -> None:
    async with await Repository.create_async(LocalStorage(tmp_path)):
        pass
    with serving_files(tmp_path) as web:
        storage = HttpStorage(web.url, settings=ONE_TRY)
        async with asyncio.timeout(60):
            found = await asyncio.gather(*(open_and_close(storage) for _ in range(20)))
        assert found == [["Repository initialized"]] * 20
        await storage.aclose()


@pytest.mark.parametrize("times", [1, 3])
async def test_a_storage_that_was_closed_opens_again(times: int) -> None:
    async with serving() as server:
        storage = storage_on(server)
        for n in range(times):
            await storage.put(f"x{n}", b"1")
            await storage.aclose()
            assert (await storage.get(f"x{n}")).data == b"1"
        await storage.aclose()
        await asyncio.sleep(0)
    assert server.connections == 0
