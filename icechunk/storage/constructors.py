"""The public functions that make storages, with the official names and signatures."""

from __future__ import annotations

from icechunk.storage.base import Storage
from icechunk.storage.local import LocalStorage
from icechunk.storage.memory import MemoryStorage

__all__ = ["in_memory_storage", "local_filesystem_storage"]


def in_memory_storage() -> Storage:
    """A storage in the memory of this process, gone with it; for tests and experiments."""
    return MemoryStorage()


def local_filesystem_storage(path: str) -> Storage:
    """A storage below a folder, which the first write makes.

    Crash-safe, and safe among threads and processes on one machine. Network mounts are as safe as their hard
    links, exclusive renames or locks are.
    """
    return LocalStorage(path)
