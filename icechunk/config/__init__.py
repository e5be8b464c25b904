"""Configuration of repositories and of the storage under them."""

from __future__ import annotations

from icechunk.config.storage import (
    AnyObjectStoreConfig,
    ChecksumAlgorithm,
    ObjectStoreConfig,
    S3Options,
    StorageConcurrencySettings,
    StorageRetriesSettings,
    StorageSettings,
    StorageTimeoutSettings,
)

__all__ = [
    "AnyObjectStoreConfig",
    "ChecksumAlgorithm",
    "ObjectStoreConfig",
    "S3Options",
    "StorageConcurrencySettings",
    "StorageRetriesSettings",
    "StorageSettings",
    "StorageTimeoutSettings",
]
