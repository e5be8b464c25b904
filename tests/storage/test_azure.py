"""Azure Blob Storage, on Microsoft's own emulator: the contract, credentials, settings."""

from __future__ import annotations

import uuid
from typing import ClassVar

import pytest

from icechunk.config import StorageRetriesSettings, StorageSettings
from icechunk.credentials import azure_credentials
from icechunk.sources import SYSTEM
from icechunk.storage.base import Storage
from icechunk.storage.obstore_places import AzurePlace
from icechunk.storage.obstore_storage import ObstoreStorage
from icechunk.testing.storage_contract import StorageContract
from tests.conftest import BUCKET
from tools import services

pytest.importorskip("obstore", reason="the extra obstore")
pytestmark = pytest.mark.azurite

QUICK = StorageSettings(retries=StorageRetriesSettings(max_tries=4, initial_backoff_ms=10))


def storage_on(azurite: services.AzureService, **options: object) -> ObstoreStorage:
    place = AzurePlace(
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
