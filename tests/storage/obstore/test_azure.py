"""Azure Blob Storage, on Microsoft's own emulator: the contract, credentials, settings."""

from __future__ import annotations

import pickle
import uuid
from typing import ClassVar

import pytest

import icechunk
from icechunk.config import StorageConcurrencySettings, StorageRetriesSettings, StorageSettings
from icechunk.credentials import azure_credentials
from icechunk.errors import ObjectNotFoundError, PreconditionFailedError, StorageError
from icechunk.runtime.clock import SYSTEM
from icechunk.storage.obstore.buckets import AzureContainer
from icechunk.storage.obstore.storage import ObstoreStorage
from icechunk.storage.port import Absent, Storage
from icechunk.testing.storage_contract import StorageContract
from tests.conftest import BUCKET
from tests.raising import raises
from tools import services

pytest.importorskip("obstore", reason="the extra obstore")
pytestmark = pytest.mark.azurite

QUICK = StorageSettings(retries=StorageRetriesSettings(max_tries=4, initial_backoff_ms=10))


def storage_on(azurite: services.AzureService, **options: object) -> ObstoreStorage:
    place = AzureContainer(
        azurite.account,
        str(options.pop("container", BUCKET)),
        str(options.pop("prefix", uuid.uuid4().hex)) + "/",
        credentials=options.pop("credentials", azure_credentials(access_key=azurite.access_key)),
        config={"endpoint": azurite.endpoint, "allow_http": "true"},
        read_headers={},
        write_headers={},
        sources=SYSTEM,
    )
    return ObstoreStorage(place, options.pop("settings", QUICK))  # type: ignore[arg-type]


@pytest.fixture
def storage(azurite: services.AzureService) -> ObstoreStorage:
    return storage_on(azurite)


class TestAzureContract(StorageContract):
    refused_keys: ClassVar[frozenset[str]] = frozenset({"a\\b"})

    @pytest.fixture
    def storage(self, azurite: services.AzureService) -> Storage:
        return storage_on(azurite)


async def test_every_kind_of_credential_is_accepted(azurite: services.AzureService) -> None:
    plain = storage_on(azurite, prefix="kinds")
    await plain.put("x", b"1")
    azurite.make_container("open-to-all", public=True)
    public = storage_on(azurite, container="open-to-all", prefix="kinds")
    await public.put("x", b"2")
    anonymous = storage_on(
        azurite, container="open-to-all", prefix="kinds", credentials=azure_credentials(anonymous=True)
    )
    assert (await anonymous.get("x")).data == b"2"
    with pytest.raises(StorageError):
        await anonymous.put("x", b"3", Absent())
    refreshing = storage_on(azurite, prefix="kinds", credentials=azure_credentials(get_credentials=azurites_key))
    copy = pickle.loads(pickle.dumps(refreshing))
    assert (await copy.get("x")).data == b"1"
    wrong = storage_on(azurite, prefix="kinds", credentials=azure_credentials(access_key="aHVzaA=="))
    with pytest.raises(StorageError) as caught:
        await wrong.get("x")
    assert "aHVzaA==" not in caught.value.message + repr(wrong)


def azurites_key() -> icechunk.AzureRefreshableCredential.AccessKey:
    return icechunk.AzureRefreshableCredential.AccessKey(services.AzureService(endpoint="").access_key)


async def test_settings_of_storage_classes_and_parts_are_honoured(azurite: services.AzureService) -> None:
    settings = StorageSettings(
        storage_class="Cool",
        minimum_size_for_multipart_upload=1024,
        concurrency=StorageConcurrencySettings(2, 1),
        retries=StorageRetriesSettings(max_tries=3, initial_backoff_ms=1),
    )
    storage = storage_on(azurite, settings=settings)
    data = bytes(range(256)) * (44 * 1024)
    await storage.put("big", data, metadata={"spec-version": "2"})
    assert (await storage.get("big")).data == data
    await storage.put("slot", data, Absent())
    with pytest.raises(PreconditionFailedError):
        await storage.put("slot", data, Absent())


async def test_a_missing_container_is_said(azurite: services.AzureService) -> None:
    storage = storage_on(azurite, container="no-such-container")
    for attempt in (storage.get("x"), storage.put("x", b""), storage.put("x", b"", Absent())):
        with raises(StorageError, "object-store", storage.describe()) as caught:
            await attempt
        assert not isinstance(caught.value, ObjectNotFoundError)


def test_the_public_constructor_shows_where_and_no_secret() -> None:
    storage = icechunk.azure_storage(account="someone", container="box", prefix="a/b/", sas_token="sig=hush")
    assert repr(storage) == "<icechunk.Storage>\ntype: Azure\naccount: someone\ncontainer: box\nprefix: a/b\n"
    assert storage.describe() == "az://someone/box/a/b/"
    for account, container in (("", "box"), ("someone", "a/b")):
        with pytest.raises(icechunk.IcechunkError):
            icechunk.azure_storage(account=account, container=container, prefix="")
