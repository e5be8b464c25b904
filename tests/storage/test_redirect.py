"""Storages that a web server names."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

import icechunk
from icechunk.config import StorageRetriesSettings, StorageSettings
from icechunk.errors import InvalidInputError, ReadOnlyError, StorageError
from icechunk.storage.http.storage import HttpStorage
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.redirect import RedirectStorage, storage_of_url
from tests.raising import raises
from tests.storage.http.web_server import WebServer, serving_files

QUICK = StorageSettings(retries=StorageRetriesSettings(max_tries=2, initial_backoff_ms=1))


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    with serving_files(tmp_path) as server:
        yield server


async def test_a_repository_is_read_where_the_server_points(web: WebServer) -> None:
    made = await icechunk.Repository.create_async(LocalStorage(web.folder / "r"))
    session = await made.writable_session_async("main")
    await session.commit_async("there", allow_empty=True)
    await made.aclose()
    web.redirects["/ask"] = "/ask-again"
    web.redirects["/ask-again"] = f"http+icechunk://{web.url.removeprefix('http://')}/r"
    storage = icechunk.redirect_storage(f"{web.url}/ask")
    assert repr(storage) == f"<icechunk.Storage>\ntype: redirect\nurl: {web.url}/ask\n"
    assert web.seen == []
    assert await icechunk.Repository.exists_async(storage)
    repo = await icechunk.Repository.open_async(pickle.loads(pickle.dumps(storage)))
    messages = [info.message async for info in repo.async_ancestry(branch="main")]
    assert messages[0] == "there"
    with pytest.raises(ReadOnlyError):
        await icechunk.Repository.create_async(storage)
    await repo.aclose()


async def test_servers_that_name_no_storage_are_refused(web: WebServer) -> None:
    web.redirects["/loop"] = "/loop"
    web.redirects["/file"] = "file:///etc"
    web.redirects["/noregion"] = "s3://bucket/prefix"
    for path, reason in (
        ("/plain", "no redirect"),
        ("/loop", "more than"),
        ("/file", "not supported as a target"),
        ("/noregion", "region"),
    ):
        with raises(StorageError, "bad-redirect", web.url + path, reason):  # words: nothing else tells the four apart
            await RedirectStorage(web.url + path, QUICK).get("repo")
    with raises(StorageError, "bad-redirect", "http://127.0.0.1:9/x"):
        await RedirectStorage("http://127.0.0.1:9/x", QUICK).get("repo")
    with pytest.raises(InvalidInputError):
        icechunk.redirect_storage("s3://bucket/prefix")


def test_the_urls_of_the_official_library_name_anonymous_storages() -> None:
    def named(url: str) -> str:
        return storage_of_url(url, asked="http://host/x").describe()

    assert named("s3://bucket/a/b?region=eu-west-1") == "s3://bucket/a/b/"
    assert named("gs://bucket/a/b") == named("gcs://bucket/a/b") == "gs://bucket/a/b/"
    assert "12.r2.cloudflarestorage.com" in repr(storage_of_url("r2://bucket/a?account_id=12", asked="x"))
    assert "t3.storage.dev" in repr(storage_of_url("tigris://bucket/a", asked="x"))
    assert isinstance(storage_of_url("https+icechunk://host/a", asked="x"), HttpStorage)
    assert named("https+icechunk://host/a") == "https://host/a"
    for url in ("r2://bucket/a", "ftp://host/a", "az://container/a"):
        with pytest.raises(StorageError):
            named(url)
