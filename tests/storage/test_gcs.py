"""Google Cloud Storage: the contract, conditions on generations, lost answers, credentials and headers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from icechunk.config import StorageRetriesSettings, StorageSettings
from icechunk.credentials import gcs_credentials
from icechunk.sources import SYSTEM
from icechunk.storage.base import Storage
from icechunk.storage.obstore_places import GcsPlace
from icechunk.storage.obstore_storage import ObstoreStorage
from icechunk.testing.storage_contract import StorageContract
from tests.storage.fake_gcs import FakeGcs, serving_gcs

pytest.importorskip("obstore", reason="the extra obstore")


@pytest.fixture
def gcs() -> Iterator[FakeGcs]:
    with serving_gcs() as server:
        yield server


def storage_on(gcs: FakeGcs, **options: object) -> ObstoreStorage:
    place = GcsPlace(
        "bucket",
        "some/prefix/",
        credentials=options.pop("credentials", gcs_credentials(bearer_token="token")),
        config=gcs.config(),
        read_headers={},
        write_headers={},
        sources=SYSTEM,
    )
    settings = StorageSettings(retries=StorageRetriesSettings(max_tries=4, initial_backoff_ms=1, max_backoff_ms=5))
    return ObstoreStorage(place, options.pop("settings", settings))


@pytest.fixture
def storage(gcs: FakeGcs) -> ObstoreStorage:
    return storage_on(gcs)


class TestGcsContract(StorageContract):
    @pytest.fixture
    def storage(self, gcs: FakeGcs) -> Storage:
        return storage_on(gcs)
