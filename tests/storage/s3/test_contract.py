from __future__ import annotations

import pytest

from icechunk.config import StorageConcurrencySettings, StorageRetriesSettings, StorageSettings
from icechunk.errors import PreconditionFailedError
from icechunk.storage.port import Absent, Storage
from icechunk.storage.s3.storage import S3Storage
from icechunk.testing.storage_contract import StorageContract
from tests.conftest import s3_storage_on
from tools import services


class TestMotoContract(StorageContract):
    @pytest.fixture
    def storage(self, moto_storage: S3Storage) -> Storage:
        return moto_storage


@pytest.mark.minio
class TestMinioContract(StorageContract):
    @pytest.fixture
    def storage(self, minio_storage: S3Storage) -> Storage:
        return minio_storage


@pytest.mark.minio
class TestMinioContractWithoutMetadata(StorageContract):
    @pytest.fixture
    def storage(self, minio: services.S3Service) -> Storage:
        settings = StorageSettings(unsafe_use_metadata=False, retries=StorageRetriesSettings(initial_backoff_ms=10))
        return s3_storage_on(minio, settings=settings)


@pytest.mark.minio
async def test_large_objects_go_in_parts_and_keep_their_conditions(minio: services.S3Service) -> None:
    settings = StorageSettings(
        minimum_size_for_multipart_upload=1024,
        concurrency=StorageConcurrencySettings(max_concurrent_requests_for_object=2, ideal_concurrent_request_size=1),
    )
    storage = s3_storage_on(minio, settings=settings)
    data = bytes(range(256)) * (44 * 1024)  # 11 MiB: parts of 5, 5 and 1
    put = await storage.put("big", data, Absent())
    got = await storage.get("big")
    assert got.data == data
    assert got.version == put.version
    assert got.version.endswith("-3")
    with pytest.raises(PreconditionFailedError):
        await storage.put("big", data, Absent())
    assert (await storage.put("big", data[:2048])).version != put.version
    assert (await storage.get("big")).data == data[:2048]
