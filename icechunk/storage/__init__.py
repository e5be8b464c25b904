"""Storages: one small async port (`icechunk.storage.base`), its adapters, and the official constructors."""

from __future__ import annotations

from icechunk.storage.base import Storage
from icechunk.storage.constructors import in_memory_storage, local_filesystem_storage
from icechunk.storage.facade import StorageObjectInfo

__all__ = ["Storage", "StorageObjectInfo", "in_memory_storage", "local_filesystem_storage"]
