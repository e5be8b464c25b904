"""Virtual chunk containers on Azure, on Google Cloud Storage and on a web server, end to end through a repository."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import icechunk
from icechunk import ErrorKind, IcechunkError, Repository, VirtualChunkContainer
from icechunk.config.storage import AnyObjectStoreConfig
from icechunk.credentials import HttpAccess
from icechunk.runtime.clock import SYSTEM
from icechunk.storage.http.storage import HttpStorage
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.obstore.buckets import AzureContainer, GcsBucket
from icechunk.storage.obstore.storage import ObstoreStorage
from icechunk.storage.port import Storage
from tests.conftest import BUCKET
from tests.storage.http.web_server import serving_files
from tests.storage.obstore.fake_gcs import serving_gcs
from tests.virtual_builders import FILE_BYTES, array, config_of
from tools import services

pytest.importorskip("obstore", reason="the extra obstore")

QUICK = icechunk.StorageSettings(
    retries=icechunk.StorageRetriesSettings(max_tries=2, initial_backoff_ms=1, max_backoff_ms=1)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A container that tests can change the objects of."""

    prefix: str
    store: AnyObjectStoreConfig
    credential: Any
    wrong: Any
    """Credentials that the service refuses; None: it accepts every request until `lock` is called."""
    objects: Storage
    seen: Storage
    """The same objects as the service shows them: their ETags and times."""
    lock: Callable[[], None] = lambda: None

    @property
    def config(self) -> icechunk.RepositoryConfig:
        config = config_of(VirtualChunkContainer(self.prefix, self.store, "there"))
        config.storage = QUICK
        return config


@contextmanager
def _azure(request: pytest.FixtureRequest, folder: Path) -> Iterator[Place]:
    service: services.AzureService = request.getfixturevalue("azurite")
    options = {"endpoint": service.endpoint, "allow_http": "true"}
    key = icechunk.azure_credentials(access_key=service.access_key)
    root = uuid.uuid4().hex
    place = AzureContainer(
        service.account,
        BUCKET,
        f"{root}/",
        credentials=key,
        config=options,
        read_headers={},
        write_headers={},
        sources=SYSTEM,
    )
    objects = ObstoreStorage(place)
    yield Place(
        prefix=f"az://{BUCKET}/{root}/",
        store=icechunk.azure_store(account=service.account, config=options),
        credential=key,
        wrong=icechunk.azure_credentials(access_key="aHVzaA=="),
        objects=objects,
        seen=objects,
    )


@contextmanager
def _gcs(request: pytest.FixtureRequest, folder: Path) -> Iterator[Place]:
    with serving_gcs() as server:
        server.tokens = {"token"}
        token = icechunk.gcs_credentials(bearer_token="token")
        place = GcsBucket(
            "bucket",
            "root/",
            credentials=token,
            config=server.config(),
            read_headers={},
            write_headers={},
            sources=SYSTEM,
        )
        objects = ObstoreStorage(place)
        yield Place(
            prefix="gs://bucket/root/",
            store=icechunk.gcs_store(server.config()),
            credential=token,
            wrong=icechunk.gcs_credentials(bearer_token="hush"),
            objects=objects,
            seen=objects,
        )


@contextmanager
def _http(request: pytest.FixtureRequest, folder: Path) -> Iterator[Place]:
    with serving_files(folder) as server:
        yield Place(
            prefix=f"{server.url}/",
            store=icechunk.http_store(),
            credential=HttpAccess,
            wrong=None,
            objects=LocalStorage(folder),
            seen=HttpStorage(server.url),
            lock=lambda: server.statuses.update({"/f g": [403] * 10}),
        )


PLACES: Mapping[str, Callable[[pytest.FixtureRequest, Path], AbstractContextManager[Place]]] = {
    "azure": _azure,
    "gcs": _gcs,
    "http": _http,
}


@pytest.fixture(params=[pytest.param("azure", marks=pytest.mark.azurite), "gcs", "http"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with PLACES[request.param](request, tmp_path / "served") as found:
        yield found


async def repository_on(
    place: Place, location: str | None = None, checksum: str | datetime | None = None
) -> icechunk.Storage:
    """Storage of a repository whose array ``a`` has one virtual chunk, of ten bytes."""
    storage = icechunk.in_memory_storage()
    repo = await Repository.create_async(storage, place.config)
    session = await repo.writable_session_async("main")
    array(session.store)
    await session.store.set_virtual_ref_async(
        "a/c/1", location or f"{place.prefix}f g", offset=5, length=10, checksum=checksum, validate_container=True
    )
    await session.commit_async("refers")
    return storage


async def read_again(place: Place, storage: icechunk.Storage, credential: Any = "right") -> np.ndarray[Any, Any]:
    """The array, by a repository opened anew."""
    given = place.credential if credential == "right" else credential
    access = icechunk.containers_credentials({place.prefix: given})
    repo = await Repository.open_async(storage, place.config, access)
    session = await repo.readonly_session_async("main")
    found = await zarr.api.asynchronous.open_array(store=session.store, path="a", mode="r")
    return np.asarray(await found.getitem(slice(None)))


async def refusal(place: Place, storage: icechunk.Storage, kind: ErrorKind, credential: Any = "right") -> IcechunkError:
    with pytest.raises(IcechunkError) as caught:
        await read_again(place, storage, credential)
    assert caught.value.kind == kind, caught.value
    return caught.value


EXPECTED = np.array([7] * 10 + list(FILE_BYTES[5:15]) + [7] * 20, "u1")


@pytest.mark.parametrize("checksum", [None, "etag", "time"])
async def test_a_reference_is_read_by_a_repository_opened_with_credentials(place: Place, checksum: str | None) -> None:
    await place.objects.put("f g", FILE_BYTES)
    info = await place.seen.head("f g")
    await place.seen.aclose()
    etag = f'"{info.version}"'
    given = {None: None, "etag": etag, "time": datetime.fromtimestamp(info.modified_us / 1_000_000, UTC)}
    storage = await repository_on(place, checksum=given[checksum])
    np.testing.assert_array_equal(await read_again(place, storage), EXPECTED)


async def test_relative_and_encoded_locations_are_the_same_object(place: Place) -> None:
    await place.objects.put("f g", FILE_BYTES)
    for location in ("vcc://there/f g", f"{place.prefix}f%20g", f"{place.prefix}x/../f%20g"):
        storage = await repository_on(place, location)
        np.testing.assert_array_equal(await read_again(place, storage), EXPECTED)


async def test_an_object_that_is_not_the_one_referred_to_is_an_error(place: Place) -> None:
    await place.objects.put("f g", FILE_BYTES)
    other = hashlib.md5(b"other").hexdigest()
    for checksum in (other, datetime(2001, 1, 1, tzinfo=UTC)):
        error = await refusal(place, await repository_on(place, checksum=checksum), ErrorKind.VIRTUAL_CHUNK_MODIFIED)
        assert "write the references again" in error.message


async def test_an_object_that_is_replaced_after_it_was_referred_to_is_an_error(place: Place) -> None:
    await place.objects.put("f g", FILE_BYTES)
    etag = str((await place.seen.head("f g")).version)
    await place.seen.aclose()
    storage = await repository_on(place, checksum=etag)
    await place.objects.put("f g", FILE_BYTES[::-1])
    await refusal(place, storage, ErrorKind.VIRTUAL_CHUNK_MODIFIED)


async def test_a_missing_or_too_short_object_is_an_error_that_says_so(place: Place) -> None:
    storage = await repository_on(place)
    assert "does not exist" in (await refusal(place, storage, ErrorKind.VIRTUAL_CHUNK_FETCH)).message
    for size in (0, 5, 9):
        await place.objects.put("f g", FILE_BYTES[:size])
        message = (await refusal(place, storage, ErrorKind.VIRTUAL_CHUNK_FETCH)).message
        assert "f g" in message, size
        assert ("bytes" in message.split("cannot be fetched")[1]) or "416" in message, message


async def test_a_container_that_is_not_authorised_is_not_asked(place: Place) -> None:
    storage = await repository_on(place)
    repo = await Repository.open_async(storage)
    session = await repo.readonly_session_async("main")
    found = await zarr.api.asynchronous.open_array(store=session.store, path="a", mode="r")
    with pytest.raises(IcechunkError) as caught:
        await found.getitem(slice(None))
    assert caught.value.kind == ErrorKind.UNAUTHORIZED_VIRTUAL_CHUNK_CONTAINER


async def test_a_refusal_of_the_service_is_an_error_that_names_the_object_and_no_secret(place: Place) -> None:
    await place.objects.put("f g", FILE_BYTES)
    storage = await repository_on(place)
    place.lock()
    credential = place.credential if place.wrong is None else place.wrong
    error = await refusal(place, storage, ErrorKind.VIRTUAL_CHUNK_FETCH, credential)
    assert "f g" in error.message
    assert "credentials" in error.message or "403" in error.message
    assert "hush" not in error.message
    assert "aHVzaA" not in error.message


async def test_an_option_that_the_service_does_not_know_is_an_error_that_names_it(place: Place) -> None:
    store: Any = place.store
    changed = replace(place, store=type(store)({**(store.opts or {}), "bogus": "hush"}))
    error = await refusal(changed, await repository_on(changed), ErrorKind.VIRTUAL_CHUNK_FETCH)
    assert "bogus" in error.message
    assert "hush" not in error.message


async def test_an_azure_container_without_its_account_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    place = Place(
        prefix="az://box/",
        store=icechunk.ObjectStoreConfig.Azure({}),
        credential=icechunk.azure_credentials(access_key="a2V5"),
        wrong=None,
        objects=icechunk.in_memory_storage(),
        seen=icechunk.in_memory_storage(),
    )
    error = await refusal(place, await repository_on(place), ErrorKind.VIRTUAL_CHUNK_FETCH)
    assert "account" in error.message
