"""Fixtures that every test may use: storages of each kind, and the services behind them."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from icechunk.config import S3Options, StorageRetriesSettings, StorageSettings
from icechunk.credentials import S3Credentials, S3StaticCredentials
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import Storage
from icechunk.storage.s3.storage import S3Storage
from tools import services

BUCKET = "icechunk-tests"

# A slow machine is no failure.
settings.register_profile("any machine", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_configure(config: pytest.Config) -> None:
    """``ICECHUNK_TEST_LOOP=uvloop``: every event loop of the tests, and the engine's own, is one of uvloop."""
    if os.environ.get("ICECHUNK_TEST_LOOP") == "uvloop":
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


def s3_storage_on(
    service: services.S3Service,
    *,
    bucket: str = BUCKET,
    prefix: str | None = None,
    settings: StorageSettings | None = None,
) -> S3Storage:
    """A storage on a fresh prefix of a running service."""
    return S3Storage(
        bucket,
        prefix or uuid.uuid4().hex,
        options=S3Options(region=service.region, endpoint_url=service.endpoint, allow_http=True, force_path_style=True),
        credentials=S3Credentials.Static(S3StaticCredentials(service.access_key, service.secret_key)),
        settings=settings or StorageSettings(retries=StorageRetriesSettings(initial_backoff_ms=10)),
    )


@pytest.fixture(scope="session")
def moto_service() -> Iterator[services.S3Service]:
    """A moto server, one for each xdist worker, with the bucket `BUCKET`."""
    with services.moto(buckets=[BUCKET]) as service:
        yield service


@pytest.fixture(scope="session")
def moto_endpoint(moto_service: services.S3Service) -> str:
    """URL of the moto server."""
    return moto_service.endpoint


@pytest.fixture(scope="session")
def minio() -> Iterator[services.S3Service]:
    """A MinIO, one for each xdist worker, with the bucket `BUCKET`; skips where there is none.

    With ``ICECHUNK_REQUIRE_SERVICES=1`` it fails instead.
    """
    try:
        starting = services.minio(buckets=[BUCKET])
        service = starting.__enter__()
    except services.Unavailable as error:
        if os.environ.get("ICECHUNK_REQUIRE_SERVICES") == "1":
            pytest.fail(str(error))
        pytest.skip(str(error))
    try:
        yield service
    finally:
        starting.__exit__(None, None, None)


@pytest.fixture(scope="session")
def azurite() -> Iterator[services.AzureService]:
    """An Azurite, one for each xdist worker, with the container `BUCKET`; skips where there is none.

    With ``ICECHUNK_REQUIRE_SERVICES=1`` it fails instead.
    """
    try:
        starting = services.azurite(containers=[BUCKET])
        service = starting.__enter__()
    except services.Unavailable as error:
        if os.environ.get("ICECHUNK_REQUIRE_SERVICES") == "1":
            pytest.fail(str(error))
        pytest.skip(str(error))
    try:
        yield service
    finally:
        starting.__exit__(None, None, None)


@pytest.fixture
def moto_storage(moto_service: services.S3Service) -> S3Storage:
    """An empty storage on moto."""
    return s3_storage_on(moto_service)


@pytest.fixture
def minio_storage(minio: services.S3Service) -> S3Storage:
    """An empty storage on MinIO; mark the test ``minio``."""
    return s3_storage_on(minio)


@pytest.fixture(params=["memory", "local", "moto"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage of each kind that needs no binary."""
    match request.param:
        case "memory":
            return MemoryStorage()
        case "local":
            return LocalStorage(tmp_path / "storage")
        case _:
            return s3_storage_on(request.getfixturevalue("moto_service"))
