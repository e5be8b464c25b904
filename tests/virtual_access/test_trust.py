"""Credentials go to no endpoint that only the repository names."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import zarr

import icechunk
from icechunk import ErrorKind, InvalidInputError, Repository, VirtualChunkContainer
from icechunk.credentials import Credentials, GcsCredentials, S3Credentials
from icechunk.virtual_access.trust import require_named
from tests.storage.s3.faulty_s3 import FaultyS3, serving
from tests.virtual_builders import FILE_BYTES, array, config_of

PREFIX = "s3://trusted/"
KEYS = icechunk.s3_static_credentials(access_key_id="AKIA", secret_access_key="hush")
ANONYMOUS = icechunk.s3_anonymous_credentials()


pytestmark = pytest.mark.filterwarnings("ignore:None in authorize_virtual_chunk_access")


@pytest.fixture
async def server() -> AsyncIterator[FaultyS3]:
    async with serving() as made:
        made.objects["/trusted/f"] = (FILE_BYTES, {})
        yield made


def container(server: FaultyS3, **options: Any) -> VirtualChunkContainer:
    store = icechunk.s3_store(
        region="us-east-1", endpoint_url=server.endpoint, allow_http=True, force_path_style=True, **options
    )
    return VirtualChunkContainer(PREFIX, store, "data")


async def made_by_somebody(server: FaultyS3, storage: icechunk.Storage, **options: Any) -> None:
    """A repository whose persisted configuration names the server as the endpoint of a well-known bucket."""
    repository = await Repository.create_async(
        storage, config_of(container(server, **options)), icechunk.containers_credentials({PREFIX: ANONYMOUS})
    )
    session = await repository.writable_session_async("main")
    array(session.store)
    await session.store.set_virtual_ref_async("a/c/0", f"{PREFIX}f", offset=5, length=10)
    await session.commit_async("references")
    await repository.aclose()


async def read(repository: Repository) -> np.ndarray[Any, Any]:
    session = await repository.readonly_session_async("main")
    found = await zarr.api.asynchronous.open_array(store=session.store, path="a", mode="r")
    return np.asarray(await found.getitem(slice(0, 10)))


async def refused(repository: Repository, server: FaultyS3) -> None:
    before = len(server.seen)
    with pytest.raises(InvalidInputError) as caught:
        await read(repository)
    assert caught.value.kind == ErrorKind.UNAUTHORIZED_VIRTUAL_CHUNK_CONTAINER
    assert server.endpoint in caught.value.message
    assert len(server.seen) == before


@pytest.mark.parametrize("credentials", [KEYS, icechunk.s3_from_env_credentials(), None])
async def test_keys_are_not_sent_to_an_endpoint_that_only_the_repository_names(
    credentials: Any, server: FaultyS3
) -> None:
    storage = icechunk.in_memory_storage()
    await made_by_somebody(server, storage)
    access = icechunk.containers_credentials({PREFIX: credentials})
    repository = await Repository.open_async(storage, authorize_virtual_chunk_access=access)
    await refused(repository, server)
    await refused(await repository.reopen_async(), server)
    await repository.aclose()


async def test_pickles_of_a_reader_trust_no_more_than_the_reader(server: FaultyS3, tmp_path: Any) -> None:
    storage = icechunk.local_filesystem_storage(str(tmp_path))
    await made_by_somebody(server, storage)
    access = icechunk.containers_credentials({PREFIX: KEYS})
    repository = await Repository.open_async(storage, authorize_virtual_chunk_access=access)
    await refused(pickle.loads(pickle.dumps(repository)), server)
    named = await Repository.open_async(storage, config_of(container(server)), access)
    assert (await read(pickle.loads(pickle.dumps(named))) == np.frombuffer(FILE_BYTES[5:15], "u1")).all()


async def test_readers_whose_own_configuration_has_the_endpoint_are_served(server: FaultyS3) -> None:
    storage = icechunk.in_memory_storage()
    await made_by_somebody(server, storage)
    access = icechunk.containers_credentials({PREFIX: KEYS})
    repository = await Repository.open_async(storage, config_of(container(server)), access)
    assert (await read(repository) == np.frombuffer(FILE_BYTES[5:15], "u1")).all()
    assert "authorization" in server.seen[-1].headers
    again = await repository.reopen_async()
    assert (await read(again) == np.frombuffer(FILE_BYTES[5:15], "u1")).all()
    for each in (repository, again):
        await each.aclose()


@pytest.mark.parametrize("how", ["credentials", "options"])
async def test_the_repository_chooses_the_endpoint_if_no_secret_is_sent(how: str, server: FaultyS3) -> None:
    storage = icechunk.in_memory_storage()
    await made_by_somebody(server, storage, anonymous=how == "options")
    access = icechunk.containers_credentials({PREFIX: ANONYMOUS if how == "credentials" else None})
    repository = await Repository.open_async(storage, authorize_virtual_chunk_access=access)
    assert (await read(repository) == np.frombuffer(FILE_BYTES[5:15], "u1")).all()
    assert "authorization" not in server.seen[-1].headers
    await repository.aclose()


async def test_the_endpoint_of_the_repositorys_own_storage_is_named_already(
    server: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.clock_s = None
    storage = icechunk.s3_storage(
        bucket="b",
        prefix="r",
        region="us-east-1",
        endpoint_url=server.endpoint,
        allow_http=True,
        force_path_style=True,
        access_key_id="AKIA",
        secret_access_key="hush",
    )
    await made_by_somebody(server, storage)
    access = icechunk.containers_credentials({PREFIX: KEYS})
    repository = await Repository.open_async(storage, authorize_virtual_chunk_access=access)
    assert (await read(repository) == np.frombuffer(FILE_BYTES[5:15], "u1")).all()
    await repository.aclose()
    elsewhere = icechunk.in_memory_storage()
    await made_by_somebody(server, elsewhere)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
    repository = await Repository.open_async(elsewhere, authorize_virtual_chunk_access=access)
    assert (await read(repository) == np.frombuffer(FILE_BYTES[5:15], "u1")).all()
    await repository.aclose()


@pytest.mark.parametrize(
    ("store", "allowed"),
    [
        (icechunk.s3_store(region="eu-west-1", requester_pays=True), True),
        (icechunk.s3_store(endpoint_url="https://evil"), False),
        (icechunk.gcs_store({"google_base_url": "https://evil"}), False),
        (icechunk.gcs_store({"timeout": "30s"}), True),
        (icechunk.gcs_store({"proxy_url": "https://evil"}), False),
        (icechunk.azure_store(account="a"), True),
        (icechunk.azure_store(account="a", config={"Endpoint": "https://evil"}), False),
        (icechunk.azure_store(account="a", config={"use_emulator": "true"}), False),
        (icechunk.http_store({"timeout": "30s"}), True),
        (icechunk.http_store({"proxy_url": "https://evil"}), False),
        (icechunk.http_store({"allow_invalid_certificates": "true"}), False),
        (icechunk.local_filesystem_store("/x"), True),
    ],
)
def test_options_that_redirect_requests_have_to_be_named(store: Any, allowed: bool) -> None:
    persisted = VirtualChunkContainer("x://y/", store)
    require_named(persisted, None, {"x://y/": persisted}, None)
    if allowed:
        require_named(persisted, None, {}, None)
    else:
        with pytest.raises(InvalidInputError) as caught:
            require_named(persisted, None, {}, None)
        assert caught.value.kind == ErrorKind.UNAUTHORIZED_VIRTUAL_CHUNK_CONTAINER
        other = VirtualChunkContainer("x://y/", icechunk.s3_store(endpoint_url="https://other"))
        with pytest.raises(InvalidInputError):
            require_named(persisted, None, {"x://y/": other}, None)
        anonymous: Any = Credentials.Gcs(GcsCredentials.Anonymous())
        require_named(persisted, anonymous, {}, None)
        require_named(persisted, Credentials.S3(S3Credentials.Anonymous()), {}, None)
