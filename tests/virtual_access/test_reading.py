"""Reading virtual chunks: from files, from web servers, from S3; changed, missing, and forbidden ones."""

from __future__ import annotations

import asyncio
import os
import pickle
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest

import icechunk
from icechunk import ErrorKind, IcechunkError, InvalidInputError, Repository, StorageError, VirtualChunkContainer
from icechunk.credentials import HttpAccess, LocalFileSystemAccess
from tests.conftest import BUCKET, s3_storage_on
from tests.raising import raises
from tests.store.store_builders import read
from tests.virtual_builders import (
    FILE_BYTES,
    WebServer,
    array,
    config_of,
    local_container,
    local_repository,
    prefix_of,
    serve,
    session_on,
    web_repository,
)
from tools import services


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "data"
    place.mkdir()
    (place / "f").write_bytes(FILE_BYTES)
    (tmp_path / "secret").write_bytes(b"x" * 1000)
    return place


@pytest.fixture
def web() -> Iterator[WebServer]:
    with serve() as server:
        yield server


async def get_virtual(
    session: icechunk.Session, location: str, offset: int = 5, length: int = 10, **more: Any
) -> bytes:
    """The bytes of a chunk that is this range."""
    store = session.store
    if await read(store, "a/zarr.json") is None:
        await asyncio.to_thread(array, store)
    await store.set_virtual_ref_async("a/c/0", location, offset=offset, length=length, **more)
    found = await read(store, "a/c/0")
    assert found is not None
    return found


async def fails(session: icechunk.Session, location: str, kind: ErrorKind, **more: Any) -> IcechunkError:
    with pytest.raises(IcechunkError) as caught:
        await get_virtual(session, location, **more)
    assert caught.value.kind == kind, caught.value
    return caught.value


# -- files of this machine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["f", "sp ace", "p%q", "é", "a/b/c"])
async def test_ranges_of_local_files_are_read_by_plain_and_encoded_names(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(FILE_BYTES)
    session = await session_on(folder)
    from urllib.parse import quote

    for location in (f"{prefix_of(folder)}{quote(name)}", f"vcc://local/{quote(name)}"):
        assert await get_virtual(session, location) == FILE_BYTES[5:15]


async def test_parts_of_a_virtual_chunk_are_read_as_of_any_other(folder: Path) -> None:
    session = await session_on(folder)
    location = prefix_of(folder) + "f"
    await get_virtual(session, location)
    store = session.store
    assert await read(store, "a/c/0", RangeByteRequest(2, 5)) == FILE_BYTES[7:10]
    assert await read(store, "a/c/0", RangeByteRequest(5, 500)) == FILE_BYTES[10:15]
    assert await read(store, "a/c/0", OffsetByteRequest(8)) == FILE_BYTES[13:15]
    assert await read(store, "a/c/0", OffsetByteRequest(10)) == b""
    assert await read(store, "a/c/0", SuffixByteRequest(3)) == FILE_BYTES[12:15]
    assert await store.getsize("a/c/0") == 10


async def test_links_in_an_authorised_folder_are_followed_as_the_official_library_does(folder: Path) -> None:
    (folder / "link").symlink_to(folder.parent / "secret")
    assert await get_virtual(await session_on(folder), prefix_of(folder) + "link") == b"x" * 10


@pytest.mark.parametrize(
    ("tail", "kind"),
    [
        ("../secret", ErrorKind.NO_CONTAINER_FOR_VIRTUAL_CHUNK),
        ("%2e%2e/secret", ErrorKind.NO_CONTAINER_FOR_VIRTUAL_CHUNK),
        ("..%2fsecret", ErrorKind.INVALID_VIRTUAL_REF),
        ("f%00", ErrorKind.INVALID_VIRTUAL_REF),
        ("nothing", ErrorKind.VIRTUAL_CHUNK_FETCH),
        ("f/below", ErrorKind.VIRTUAL_CHUNK_FETCH),
        ("sub", ErrorKind.VIRTUAL_CHUNK_FETCH),
        ("pipe", ErrorKind.VIRTUAL_CHUNK_FETCH),
    ],
)
async def test_references_that_lead_to_no_file_of_the_folder_are_errors(
    folder: Path, tail: str, kind: ErrorKind
) -> None:
    (folder / "sub").mkdir()
    os.mkfifo(folder / "pipe")
    session = await session_on(folder)
    await fails(session, prefix_of(folder) + tail, kind, validate_container=False)
    if "/" in tail or "%2" in tail:
        await fails(session, f"vcc://local/{tail}", kind, validate_container=False)


@pytest.mark.parametrize("offset", [995, 1000, 5000, 2**63])
async def test_a_range_beyond_the_end_is_an_error_never_fill_values(folder: Path, offset: int) -> None:
    session = await session_on(folder)
    await fails(session, prefix_of(folder) + "f", ErrorKind.VIRTUAL_CHUNK_FETCH, offset=offset)
    stored = zarr.open_array(session.store, path="a")
    with pytest.raises(StorageError):
        await asyncio.to_thread(lambda: stored[:])


async def test_a_bad_reference_does_not_spoil_its_neighbours(folder: Path) -> None:
    session = await session_on(folder)
    store = session.store
    await asyncio.to_thread(array, store)
    for i, offset in enumerate((0, 990, 995)):
        await store.set_virtual_ref_async(f"a/c/{i}", prefix_of(folder) + "f", offset=offset, length=10)
    found = await asyncio.gather(*(read(store, f"a/c/{i}") for i in range(3)), return_exceptions=True)
    assert found[:2] == [FILE_BYTES[:10], FILE_BYTES[990:]]
    assert isinstance(found[2], StorageError)


async def test_a_file_that_cannot_be_opened_is_an_error(folder: Path) -> None:
    session = await session_on(folder)
    await fails(session, f"{prefix_of(folder)}{'n' * 300}", ErrorKind.VIRTUAL_CHUNK_FETCH)


async def test_checksums_of_local_files_are_verified(folder: Path) -> None:
    session = await session_on(folder)
    location = prefix_of(folder) + "f"
    os.utime(folder / "f", (1_700_000_000, 1_700_000_000))
    found = (folder / "f").stat()
    etag = f"{found.st_ino:x}-{found.st_mtime_ns // 1000:x}-{found.st_size:x}"
    when = datetime.fromtimestamp(1_700_000_000, UTC)
    for good in (etag, f'"{etag}"', when, when + timedelta(days=9), datetime.now(UTC)):
        assert await get_virtual(session, location, checksum=good) == FILE_BYTES[5:15]
    for bad in ("other", when - timedelta(seconds=1)):
        error = await fails(session, location, ErrorKind.VIRTUAL_CHUNK_MODIFIED, checksum=bad)
        assert isinstance(error, StorageError)
        assert "changed" in error.message


async def test_a_rewritten_file_is_noticed_by_every_repository_that_is_opened_later(folder: Path) -> None:
    storage = icechunk.in_memory_storage()
    repository = await local_repository(folder, storage)
    session = await repository.writable_session_async("main")
    os.utime(folder / "f", (1_700_000_000, 1_700_000_000))
    checksum = datetime.fromtimestamp(1_700_000_000, UTC)
    assert await get_virtual(session, prefix_of(folder) + "f", checksum=checksum) == FILE_BYTES[5:15]
    await session.commit_async("one")
    (folder / "f").write_bytes(b"changed" * 100)
    os.utime(folder / "f", (1_700_000_001, 1_700_000_001))
    later = await Repository.open_async(storage, None, {prefix_of(folder): LocalFileSystemAccess})
    store = (await later.readonly_session_async("main")).store
    with pytest.raises(StorageError) as caught:
        await read(store, "a/c/0")
    assert caught.value.kind == ErrorKind.VIRTUAL_CHUNK_MODIFIED


# -- authorisation ----------------------------------------------------------------------------------------------------


async def test_chunks_are_not_read_without_authorisation(folder: Path) -> None:
    other = {f"file://{folder.parent}/": LocalFileSystemAccess, "local": LocalFileSystemAccess}
    for authorized in ({}, other):
        session = await session_on(folder, authorized=authorized)
        kind = ErrorKind.UNAUTHORIZED_VIRTUAL_CHUNK_CONTAINER
        error = await fails(session, prefix_of(folder) + "f", kind)
        assert isinstance(error, InvalidInputError)
        assert "authorize_virtual_chunk_access" in error.message


async def test_a_prefix_is_authorised_without_its_last_slash_too(folder: Path) -> None:
    session = await session_on(folder, authorized={prefix_of(folder)[:-1]: LocalFileSystemAccess})
    await fails(session, prefix_of(folder) + "none", ErrorKind.VIRTUAL_CHUNK_FETCH)


async def test_the_longer_prefix_needs_its_own_authorisation(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "f").write_bytes(FILE_BYTES)
    config = config_of(local_container(folder), local_container(folder / "deep", "deep"))
    repository = await Repository.create_async(
        icechunk.in_memory_storage(), config, {prefix_of(folder): LocalFileSystemAccess}
    )
    session = await repository.writable_session_async("main")
    assert await get_virtual(session, prefix_of(folder) + "f") == FILE_BYTES[5:15]
    kind = ErrorKind.UNAUTHORIZED_VIRTUAL_CHUNK_CONTAINER
    await fails(session, prefix_of(folder) + "deep/f", kind)
    await fails(session, "vcc://local/deep/f", kind)


async def test_credentials_of_another_kind_are_refused_when_opening(folder: Path) -> None:
    web = VirtualChunkContainer("http://web/", icechunk.http_store())
    s3 = VirtualChunkContainer("s3://b/", icechunk.s3_store())
    gcs = VirtualChunkContainer("gs://b/", icechunk.gcs_store())
    azure = VirtualChunkContainer("az://c/", icechunk.azure_store(account="x"))
    keys = icechunk.containers_credentials({"k": icechunk.s3_anonymous_credentials()})["k"]
    for container, bad in [
        (local_container(folder), HttpAccess),
        (local_container(folder), keys),
        (web, LocalFileSystemAccess),
        (s3, HttpAccess),
        (gcs, keys),
        (azure, keys),
    ]:
        with raises(StorageError, "storage-other", repr(container.url_prefix)):
            await Repository.create_async(
                icechunk.in_memory_storage(), config_of(container), {container.url_prefix: bad}
            )
    with pytest.raises(TypeError, match=re.escape("containers_credentials")):
        await local_repository(folder, authorized={prefix_of(folder): 5})


def test_none_as_credentials_is_deprecated_and_the_warning_names_the_caller(folder: Path) -> None:
    storage = icechunk.in_memory_storage()
    access: dict[str, Any] = {prefix_of(folder): None}
    config = config_of(local_container(folder))
    calls: list[Callable[[], Repository]] = [
        lambda: Repository.create(storage, config, access),
        lambda: Repository.open(storage, None, access),
        lambda: Repository.open_or_create(storage, None, access),
        lambda: Repository.open(storage).reopen(None, access),
    ]
    for call in calls:
        with pytest.warns(DeprecationWarning, match=re.escape("LocalFileSystemAccess")) as caught:
            repository = call()
        assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]
    assert repository.authorized_virtual_container_prefixes == {prefix_of(folder)}


async def test_asynchronous_callers_are_warned_too(folder: Path) -> None:
    with pytest.warns(DeprecationWarning, match=re.escape("LocalFileSystemAccess")) as caught:
        await local_repository(folder, authorized={prefix_of(folder): None})
    assert len(caught) == 1


async def test_a_session_that_was_pickled_reads_virtual_chunks_where_it_arrives(folder: Path) -> None:
    repository = await local_repository(folder, icechunk.local_filesystem_storage(str(folder.parent / "repo")))
    session = await repository.writable_session_async("main")
    await get_virtual(session, prefix_of(folder) + "f")
    await session.commit_async("one")
    copy = pickle.loads(pickle.dumps(await repository.readonly_session_async("main")))
    assert await read(copy.store, "a/c/0") == FILE_BYTES[5:15]


# -- web servers ------------------------------------------------------------------------------------------------------


async def test_ranges_are_read_from_web_servers_with_the_containers_headers(web: WebServer) -> None:
    repository = await web_repository(web, {"Authorization": "Bearer x", "X-Key": "k"})
    session = await repository.writable_session_async("main")
    assert await get_virtual(session, f"{web.url}base/f?version=2") == FILE_BYTES[5:15]
    path, headers = web.requests[-1]
    assert path == "/base/f?version=2"
    assert (headers["authorization"], headers["x-key"]) == ("Bearer x", "k")
    assert headers["range"] == "bytes=5-14"
    await repository.aclose()


async def test_checksums_of_web_files_are_compared_with_the_headers_of_the_answer(web: WebServer) -> None:
    repository = await web_repository(web)
    session = await repository.writable_session_async("main")
    location = f"{web.url}base/f"
    when = datetime.fromtimestamp(1_700_000_000, UTC)
    for good in ('"abc"', "abc", 'W/"abc"', when, when + timedelta(seconds=1)):
        assert await get_virtual(session, location, checksum=good) == FILE_BYTES[5:15]
    kind = ErrorKind.VIRTUAL_CHUNK_MODIFIED
    for bad in ("zzz", when - timedelta(seconds=1)):
        await fails(session, location, kind, checksum=bad)
    web.etag = web.modified = None
    for bad in ("abd", when + timedelta(days=1)):
        await fails(session, location, kind, checksum=bad)
    await repository.aclose()


async def test_refusals_of_web_servers_are_errors_and_transient_failures_are_tried_again(web: WebServer) -> None:
    repository = await web_repository(web)
    session = await repository.writable_session_async("main")
    location = f"{web.url}base/f"
    kind = ErrorKind.VIRTUAL_CHUNK_FETCH
    for status in (404, 410, 403, 401, 416, 500):
        web.status = status
        await fails(session, location, kind)
    web.status, web.ranges = None, False
    error = await fails(session, location, kind)
    assert "ranges" in error.message
    web.ranges, web.failures = True, 2
    assert await get_virtual(session, location) == FILE_BYTES[5:15]
    await fails(session, location, kind, offset=995)
    await fails(session, location, kind, offset=2000)
    await repository.aclose()


async def test_redirects_to_another_host_are_followed_without_the_headers(web: WebServer) -> None:
    repository = await web_repository(web, {"X-Key": "k"})
    session = await repository.writable_session_async("main")
    with serve() as elsewhere:
        for server, target in ((web, "/moved/f"), (elsewhere, f"{elsewhere.url}f")):
            web.redirect = target
            assert await get_virtual(session, f"{web.url}base/{server.url[-6:-1]}") == FILE_BYTES[5:15]
            assert ("x-key" in server.requests[-1][1]) == (server is web)
        kind = ErrorKind.VIRTUAL_CHUNK_FETCH
        for target in ("file:///etc/passwd", "/base/loop"):
            web.redirect = target
            await fails(session, f"{web.url}base/g", kind)
    await repository.aclose()


# -- S3 ---------------------------------------------------------------------------------------------------------------


async def s3_repository(
    service: services.S3Service, prefix: str, storage: icechunk.Storage | None = None, secret: str | None = None
) -> Repository:
    url = f"s3://{BUCKET}/{prefix}/"
    store = icechunk.s3_store(
        region=service.region, endpoint_url=service.endpoint, allow_http=True, s3_compatible=True, force_path_style=True
    )
    keys = icechunk.s3_static_credentials(
        access_key_id=service.access_key, secret_access_key=secret or service.secret_key
    )
    return await Repository.create_async(
        storage or icechunk.in_memory_storage(),
        config_of(VirtualChunkContainer(url, store, "s3")),
        icechunk.containers_credentials({url: keys}),
    )


async def test_ranges_of_s3_objects_are_read_and_their_checksums_verified(moto_service: services.S3Service) -> None:
    objects = s3_storage_on(moto_service, prefix="virtual-reads")
    for key in ("f", "sp ace", "p%20q", "é"):
        await objects.put(key, FILE_BYTES)
    info = await objects.head("f")
    when = datetime.fromtimestamp(info.modified_us / 1e6, UTC)
    repository = await s3_repository(moto_service, "virtual-reads")
    session = await repository.writable_session_async("main")
    prefix = f"s3://{BUCKET}/virtual-reads/"
    for tail in ("f", "sp ace", "sp%20ace", "p%2520q", "é"):
        assert await get_virtual(session, prefix + tail) == FILE_BYTES[5:15]
        assert await get_virtual(session, f"vcc://s3/{tail}") == FILE_BYTES[5:15]
    for good in (info.version, f'"{info.version}"', when, when + timedelta(seconds=1)):
        assert await get_virtual(session, prefix + "f", checksum=good) == FILE_BYTES[5:15]
    for bad in ("zzz", when - timedelta(seconds=1)):
        await fails(session, prefix + "f", ErrorKind.VIRTUAL_CHUNK_MODIFIED, checksum=bad)
    await fails(session, prefix + "none", ErrorKind.VIRTUAL_CHUNK_FETCH)
    await fails(session, prefix + "f", ErrorKind.VIRTUAL_CHUNK_FETCH, offset=995)
    await fails(session, prefix + "f", ErrorKind.VIRTUAL_CHUNK_FETCH, offset=5000)
    await repository.aclose()
    await objects.aclose()


# -- many small references --------------------------------------------------------------------------------------------


async def test_small_references_into_one_file_share_requests(web: WebServer) -> None:
    web.body = bytes(np.random.default_rng(1).integers(0, 256, 1_000_000, np.uint8))
    repository = await web_repository(web)
    store = (await repository.writable_session_async("main")).store
    await asyncio.to_thread(array, store, (1_000_000,), (1000,))
    offsets = np.arange(1000, dtype=np.uint64) * np.uint64(1000)
    when = datetime.fromtimestamp(1_700_000_000, UTC)
    await store.set_virtual_refs_arr_async(
        "a", (1000,), [f"{web.url}base/f"] * 1000, offsets, np.full(1000, 1000, np.uint64), checksum=when
    )
    together = await asyncio.gather(*(read(store, f"a/c/{i}") for i in range(1000)))
    assert b"".join(chunk or b"" for chunk in together) == web.body
    assert len(web.requests) < 20
    web.requests.clear()
    one_by_one = [await read(store, f"a/c/{i}") for i in range(1000)]
    assert one_by_one == together
    assert len(web.requests) < 20
    await repository.aclose()


async def test_bytes_that_passed_one_check_do_not_answer_another(web: WebServer) -> None:
    repository = await web_repository(web)
    session = await repository.writable_session_async("main")
    location = f"{web.url}base/f"
    for i in range(8):
        await get_virtual(session, location, offset=i * 10, checksum="abc")
    web.etag = '"new"'
    web.body = bytes(reversed(FILE_BYTES))
    await fails(session, location, ErrorKind.VIRTUAL_CHUNK_MODIFIED, checksum="abd")
    assert await get_virtual(session, location, checksum="new") == web.body[5:15]
    await repository.aclose()
