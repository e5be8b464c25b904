"""The settings that storages use where the configuration gives none."""

from __future__ import annotations

from icechunk.config import StorageConcurrencySettings, StorageRetriesSettings, StorageSettings
from icechunk.config.storage import (
    DEFAULT_IDEAL_REQUEST_BYTES,
    DEFAULT_INITIAL_BACKOFF_MS,
    DEFAULT_MAX_BACKOFF_MS,
    DEFAULT_MAX_REQUESTS_PER_OBJECT,
    DEFAULT_MAX_TRIES,
    DEFAULT_MULTIPART_BYTES,
)

__all__ = ["object_store_settings", "place_settings"]


def object_store_settings() -> StorageSettings:
    """A new value with the official library's defaults for every object store."""
    return StorageSettings(
        concurrency=StorageConcurrencySettings(
            max_concurrent_requests_for_object=DEFAULT_MAX_REQUESTS_PER_OBJECT,
            ideal_concurrent_request_size=DEFAULT_IDEAL_REQUEST_BYTES,
        ),
        retries=StorageRetriesSettings(
            max_tries=DEFAULT_MAX_TRIES,
            initial_backoff_ms=DEFAULT_INITIAL_BACKOFF_MS,
            max_backoff_ms=DEFAULT_MAX_BACKOFF_MS,
        ),
        unsafe_use_conditional_create=True,
        unsafe_use_conditional_update=True,
        unsafe_use_metadata=True,
        minimum_size_for_multipart_upload=DEFAULT_MULTIPART_BYTES,
    )


def place_settings(*, ideal_request_bytes: int) -> StorageSettings:
    """A new value with the official library's defaults for memory and local file systems: one try, no pauses.

    Parameters
    ----------
    ideal_request_bytes
        Of one request, bytes.
    """
    return StorageSettings(
        concurrency=StorageConcurrencySettings(
            max_concurrent_requests_for_object=5, ideal_concurrent_request_size=ideal_request_bytes
        ),
        retries=StorageRetriesSettings(max_tries=1, initial_backoff_ms=0, max_backoff_ms=0),
    )
