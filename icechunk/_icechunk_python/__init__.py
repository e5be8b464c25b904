"""The names that the official library keeps in its compiled module, for code that imports them from there.

All are our public classes under their own names, but for three: `PyRepository`, `PySession` and `PyStore` are adapters
that hold one of our objects each and hand every call on to it. ``repo._repository``, ``session._session`` and
``store._store`` give them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, TypeVar

from icechunk import (
    AncestryGraph,
    Attribution,
    AzureCredentials,
    AzureRefreshableCredential,
    AzureStaticCredentials,
    BasicConflictSolver,
    CachingConfig,
    ChecksumAlgorithm,
    ChunkType,
    CompressionAlgorithm,
    CompressionConfig,
    Conflict,
    ConflictDetector,
    ConflictError,
    ConflictSolver,
    ConflictType,
    Credentials,
    Diff,
    FeatureFlag,
    GcsBearerCredential,
    GcsCredentials,
    GcsStaticCredentials,
    GCSummary,
    IcechunkError,
    ManifestConfig,
    ManifestFileInfo,
    ManifestPreloadCondition,
    ManifestPreloadConfig,
    ManifestSplitCondition,
    ManifestSplitDimCondition,
    ManifestSplittingConfig,
    ManifestVirtualChunkLocationCompressionConfig,
    ObjectStoreConfig,
    RebaseFailedError,
    RepoAvailability,
    Repository,
    RepositoryConfig,
    RepoStatus,
    S3Credentials,
    S3Options,
    S3StaticCredentials,
    SessionMode,
    SnapshotInfo,
    SpecVersion,
    Storage,
    StorageConcurrencySettings,
    StorageRetriesSettings,
    StorageSettings,
    StorageTimeoutSettings,
    Update,
    UpdateType,
    VersionSelection,
    VirtualChunkContainer,
    VirtualChunkSpec,
    __version__,
    initialize_logs,
    set_logs_filter,
    shutdown_telemetry,
    spec_version,
    upgrade_icechunk_repository,
    user_agent,
)
from icechunk._icechunk_python.repository import PyRepository
from icechunk._icechunk_python.session import PySession
from icechunk._icechunk_python.store import PyStore
from icechunk.config.repository import RepoUpdateRetryConfig
from icechunk.errors import ErrorKind
from icechunk.ops import ChunkStorageStats
from icechunk.storage.facade import StorageObjectInfo
from icechunk.testing.latency import LatencyStorage

__all__ = [
    "AncestryGraph",
    "AsyncCloseableIterator",
    "Attribution",
    "AzureCredentials",
    "AzureRefreshableCredential",
    "AzureStaticCredentials",
    "BasicConflictSolver",
    "CachingConfig",
    "ChecksumAlgorithm",
    "ChunkStorageStats",
    "ChunkType",
    "CompressionAlgorithm",
    "CompressionConfig",
    "Conflict",
    "ConflictDetector",
    "ConflictError",
    "ConflictSolver",
    "ConflictType",
    "Credentials",
    "Diff",
    "FeatureFlag",
    "GCSummary",
    "GcsBearerCredential",
    "GcsCredentials",
    "GcsStaticCredentials",
    "IcechunkError",
    "LatencyStorage",
    "ManifestConfig",
    "ManifestFileInfo",
    "ManifestPreloadCondition",
    "ManifestPreloadConfig",
    "ManifestSplitCondition",
    "ManifestSplitDimCondition",
    "ManifestSplittingConfig",
    "ManifestVirtualChunkLocationCompressionConfig",
    "ObjectStoreConfig",
    "PyRepository",
    "PySession",
    "PyStore",
    "RebaseFailedError",
    "RepoAvailability",
    "RepoStatus",
    "RepoUpdateRetryConfig",
    "RepositoryConfig",
    "S3Credentials",
    "S3Options",
    "S3StaticCredentials",
    "SessionMode",
    "SnapshotInfo",
    "SpecVersion",
    "Storage",
    "StorageConcurrencySettings",
    "StorageObjectInfo",
    "StorageRetriesSettings",
    "StorageSettings",
    "StorageTimeoutSettings",
    "Update",
    "UpdateType",
    "VersionSelection",
    "VirtualChunkContainer",
    "VirtualChunkSpec",
    "__version__",
    "_all_error_kinds",
    "_upgrade_icechunk_repository",
    "cli_entrypoint",
    "initialize_logs",
    "set_logs_filter",
    "shutdown_telemetry",
    "spec_version",
    "user_agent",
]

T_co = TypeVar("T_co", covariant=True)


class AsyncCloseableIterator(AsyncIterator[T_co]):
    """What our asynchronous listings are instances of: iterators that ``aclose`` ends early. Never made by hand."""

    @classmethod
    def __subclasshook__(cls, other: type) -> Any:
        if cls is AsyncCloseableIterator:
            return all(hasattr(other, name) for name in ("__aiter__", "__anext__", "aclose"))
        return NotImplemented

    async def __anext__(self) -> T_co:
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the iteration, and free what it holds."""


def cli_entrypoint() -> int:
    """What the console command ``icechunk`` runs."""
    from icechunk.cli import main

    return main()


def _all_error_kinds() -> list[str]:
    return [str(kind) for kind in ErrorKind]


def _upgrade_icechunk_repository(
    repo: PyRepository,
    *,
    dry_run: bool = True,
    delete_unused_v1_files: bool = True,
    prefetch_concurrency: int | None = None,
) -> PyRepository:
    upgraded = upgrade_icechunk_repository(
        Repository(repo),
        dry_run=dry_run,
        delete_unused_v1_files=delete_unused_v1_files,
        prefetch_concurrency=prefetch_concurrency,
    )
    return PyRepository(upgraded)
