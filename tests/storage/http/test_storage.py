"""Repositories on web servers: what is read, what is refused, and that nothing is needed but GETs."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr

import icechunk
from icechunk.config import StorageRetriesSettings, StorageSettings
from icechunk.errors import InvalidInputError, ObjectNotFoundError, ReadOnlyError, StorageError
from icechunk.storage.http.storage import HttpStorage
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.port import ListingUnsupportedError, Range, Suffix
from tests.raising import raises
from tests.storage.http.web_server import WebServer, serving_files

QUICK = StorageSettings(retries=StorageRetriesSettings(max_tries=3, initial_backoff_ms=1))


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    with serving_files(tmp_path) as server:
        yield server


def storage_on(web: WebServer, folder: str = "", **options: object) -> HttpStorage:
    return HttpStorage(f"{web.url}/{folder}", settings=QUICK, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
async def test_ranges_are_read_whether_the_server_supports_them_or_not(web: WebServer, ranges: bool) -> None:
    web.ranges = ranges
    (web.folder / "x").write_bytes(b"0123456789")
    (web.folder / "empty").write_bytes(b"")
    storage = storage_on(web)
    for wanted, data in ((None, b"0123456789"), (Range(3, 7), b"3456"), (Range(5), b"56789"), (Range(5, 99), b"56789")):
        got = await storage.get("x", wanted)
        assert (got.data, got.size) == (data, 10)
    assert (await storage.get("x", Suffix(3))).data == b"789"
    assert (await storage.get("x", Suffix(30))).data == b"0123456789"
    assert (await storage.get("empty", Suffix(3))).data == b""
    with pytest.raises(InvalidInputError) as caught:
        await storage.get("x", Range(10, 12))
    assert caught.value.kind == "invalid-byte-range"
    info = await storage.head("x")
    assert (info.size, info.version) == (10, (await storage.get("x")).version)
    assert got.date_us is not None
    assert info.modified_us > 0
    await storage.aclose()


async def test_missing_forbidden_and_broken_are_different_errors(web: WebServer) -> None:
    (web.folder / "x").write_bytes(b"1")
    storage = storage_on(web)
    with raises(ObjectNotFoundError, "object-not-found", "nothing"):
        await storage.get("nothing")
    web.statuses["/x"] = [403]
    with raises(StorageError, "object-store", 403, 404) as caught:
        await storage.get("x")
    assert not isinstance(caught.value, ObjectNotFoundError)
    web.statuses["/x"] = [500, 503]
    assert (await storage.get("x")).data == b"1"
    web.statuses["/x"] = [500, 500, 500]
    with raises(StorageError, "object-store", 500, 3):
        await storage.get("x")
    await storage.aclose()


async def test_redirects_are_followed_without_the_headers_for_another_server(web: WebServer, tmp_path: Path) -> None:
    other_folder = tmp_path / "other"
    other_folder.mkdir()
    (other_folder / "y").write_bytes(b"elsewhere")
    with serving_files(other_folder) as other:
        web.redirects["/x"] = f"{other.url}/y"
        web.redirects["/loop"] = "/loop"
        storage = storage_on(web, headers={"authorization": "Bearer hush"})
        assert (await storage.get("x")).data == b"elsewhere"
        assert web.seen[0][2]["authorization"] == "Bearer hush"
        assert "authorization" not in other.seen[0][2]
        with raises(StorageError, "bad-redirect", "/loop", 10):
            await storage.get("loop")
        assert "hush" not in repr(storage) + storage.describe()
        await storage.aclose()


async def test_every_write_is_refused_before_anything_is_sent(web: WebServer) -> None:
    storage = storage_on(web)
    for attempt in (storage.put("x", b"1"), storage.delete(["x"]), storage.copy("x", "y")):
        with pytest.raises(ReadOnlyError) as caught:
            await attempt
        assert caught.value.kind == "read-only-storage"
    with pytest.raises(ReadOnlyError):
        await icechunk.Repository.create_async(storage)
    with pytest.raises(ListingUnsupportedError):
        await anext(storage.list_pages())
    assert web.seen == []


@pytest.mark.parametrize("version", [None, 2, 1], ids=["log", "repo", "refs"])
@pytest.mark.parametrize("missing", [404, 403])
async def test_a_repository_of_each_layout_is_read_to_its_head(
    web: WebServer, version: int | None, missing: int
) -> None:
    web.missing = missing
    made = await icechunk.Repository.create_async(LocalStorage(web.folder / "r p"), spec_version=version)
    for n in range(5):
        session = await made.writable_session_async("main")
        array = await zarr.api.asynchronous.create_array(
            store=session.store, name=f"a{n}", shape=(4,), chunks=(2,), dtype="i4", compressors=None
        )
        await array.setitem(slice(None), np.arange(4, dtype="i4") + n)
        await session.commit_async(f"commit {n}")
    storage = storage_on(web, "r p")
    assert await icechunk.Repository.exists_async(storage)
    repo = await icechunk.Repository.open_async(pickle.loads(pickle.dumps(storage)))
    messages = [info.message async for info in repo.async_ancestry(branch="main")]
    assert messages[0] == "commit 4"
    reading = await repo.readonly_session_async(branch="main")
    array = await zarr.api.asynchronous.open_array(store=reading.store, path="a4", mode="r")
    np.testing.assert_array_equal(await array.getitem(slice(None)), np.arange(4) + 4)
    assert {method for method, _, _ in web.seen} <= {"GET", "HEAD"}
    for refused in (
        repo.create_branch_async("dev", reading.snapshot_id),
        repo.writable_session_async("main"),
        repo.rearrange_session_async("main"),
    ):
        with pytest.raises(ReadOnlyError) as caught:
            await refused
        assert caught.value.kind == "read-only-storage"
    # Format 1 keeps no list of its refs.
    if version == 1:
        with pytest.raises(ListingUnsupportedError):
            await repo.list_branches_async()
    else:
        assert await repo.list_branches_async() == {"main"}
    # A commit made meanwhile is seen at the next look.
    session = await made.writable_session_async("main")
    await session.commit_async("one more", allow_empty=True)
    messages = [info.message async for info in repo.async_ancestry(branch="main")]
    assert messages[0] == "one more"
    for each in (made, repo):
        await each.aclose()


async def test_an_empty_place_is_reported_as_such(web: WebServer) -> None:
    storage = storage_on(web, "empty")
    assert not await icechunk.Repository.exists_async(storage)
    with pytest.raises(icechunk.RepositoryNotFoundError):
        await icechunk.Repository.open_async(storage)


def test_bad_urls_and_options_are_refused() -> None:
    for url in ("ftp://host/x", "host/x", "http://", "s3://bucket/x"):
        with pytest.raises(InvalidInputError) as caught:
            icechunk.http_storage(url)
        assert caught.value.kind == "cannot-parse-url"
    with raises(InvalidInputError, "storage-config", "bogus"):
        icechunk.http_storage("http://host/x", {"bogus": "1"})
    with raises(InvalidInputError, "storage-config", "timeout", "soon"):
        icechunk.http_storage("http://host/x", {"timeout": "soon"})
    with raises(StorageError, "storage-config", "allow_http"):
        icechunk.http_storage("http://host/x", {"allow_http": "false"})
    assert repr(icechunk.http_storage("http://u:hush@host/x", {"timeout": "30s"})).count("hush") == 0
    assert repr(icechunk.http_storage("http://host/x")) == "<icechunk.Storage>\ntype: HTTP\nurl: http://host/x\n"
