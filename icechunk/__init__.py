"""Icechunk for asyncio: a transactional storage engine for Zarr on object storage.

>>> import icechunk, zarr
>>> repo = icechunk.Repository.create(icechunk.in_memory_storage())
>>> session = repo.writable_session("main")
>>> array = zarr.create_array(session.store, name="temperature", shape=(4,), chunks=(2,), dtype="f4")
>>> array[:] = 20.5
>>> snapshot_id = session.commit("first measurements")
>>> float(zarr.open_array(repo.readonly_session("main").store, path="temperature")[0])
20.5
"""

from __future__ import annotations

from icechunk.config import (
    AnyObjectStoreConfig,
    Attribution,
    CachingConfig,
    ChecksumAlgorithm,
    CompressionAlgorithm,
    CompressionConfig,
    EngineConfig,
    FeatureFlag,
    ManifestConfig,
    ManifestPreloadCondition,
    ManifestPreloadConfig,
    ManifestSplitCondition,
    ManifestSplitDimCondition,
    ManifestSplittingConfig,
    ManifestVirtualChunkLocationCompressionConfig,
    ObjectStoreConfig,
    RepositoryConfig,
    S3Options,
    StorageConcurrencySettings,
    StorageRetriesSettings,
    StorageSettings,
    StorageTimeoutSettings,
    VirtualChunkContainer,
)
from icechunk.conflicts import (
    BasicConflictSolver,
    Conflict,
    ConflictDetector,
    ConflictSolver,
    ConflictType,
    MergeFailedError,
    RebaseFailedError,
    VersionSelection,
)
from icechunk.credentials import (
    AnyAzureCredential,
    AnyAzureStaticCredential,
    AnyCredential,
    AnyGcsCredential,
    AnyGcsStaticCredential,
    AnyS3Credential,
    AzureCredentials,
    AzureRefreshableCredential,
    AzureStaticCredentials,
    Credentials,
    GcsBearerCredential,
    GcsCredentials,
    GcsStaticCredentials,
    S3Credentials,
    S3StaticCredentials,
    azure_anonymous_credentials,
    azure_credentials,
    azure_from_env_credentials,
    azure_refreshable_credentials,
    azure_static_credentials,
    containers_credentials,
    gcs_credentials,
    gcs_from_env_credentials,
    gcs_refreshable_credentials,
    gcs_static_credentials,
    s3_anonymous_credentials,
    s3_credentials,
    s3_from_env_credentials,
    s3_refreshable_credentials,
    s3_static_credentials,
)
from icechunk.errors import (
    AlreadyExistsError,
    CommitOutcomeUnknown,
    ConflictError,
    ErrorKind,
    FormatError,
    IcechunkError,
    InternalError,
    InvalidInputError,
    NodeNotFoundError,
    NotFoundError,
    ObjectNotFoundError,
    PreconditionFailedError,
    ReadOnlyError,
    RefNotFoundError,
    RepositoryNotFoundError,
    SessionStateError,
    SnapshotNotFoundError,
    StorageError,
)
from icechunk.inspection.drawing import AncestryGraph
from icechunk.ops import (
    GCSummary,
    RepoAvailability,
    RepoStatus,
    SessionMode,
    SpecVersion,
    Update,
    UpdateType,
)
from icechunk.repository import (
    ArrayChange,
    Blame,
    ChangedRegions,
    EventKind,
    Repository,
    RepositoryEvent,
    open_async,
    upgrade_icechunk_repository,
    upgrade_icechunk_repository_async,
)
from icechunk.repository import open_sync as open
from icechunk.repository.upgrade import _InvalidatedRepository  # noqa: F401
from icechunk.runtime.about import API_VERSION, print_debug_info, user_agent
from icechunk.runtime.logging import initialize_logs, set_logs_filter, shutdown_telemetry
from icechunk.runtime.logging import initialize_on_import as _initialize_logs_on_import
from icechunk.session import ForkSession, Session
from icechunk.snapshots import (
    Diff,
    ManifestFileInfo,
    SnapshotInfo,
)
from icechunk.storage import (
    Storage,
    azure_storage,
    azure_store,
    gcs_storage,
    gcs_store,
    hf_storage,
    http_storage,
    http_store,
    in_memory_storage,
    local_filesystem_storage,
    local_filesystem_store,
    r2_storage,
    redirect_storage,
    s3_storage,
    s3_store,
    tigris_storage,
)
from icechunk.storage.url import storage_from_url
from icechunk.store import IcechunkStore
from icechunk.types import (
    CommitMethod,
)
from icechunk.virtual import (
    ChunkType,
    VirtualChunkSpec,
)

__all__ = [
    "AlreadyExistsError",
    "AncestryGraph",
    "AnyAzureCredential",
    "AnyAzureStaticCredential",
    "AnyCredential",
    "AnyGcsCredential",
    "AnyGcsStaticCredential",
    "AnyObjectStoreConfig",
    "AnyS3Credential",
    "ArrayChange",
    "Attribution",
    "AzureCredentials",
    "AzureRefreshableCredential",
    "AzureStaticCredentials",
    "BasicConflictSolver",
    "Blame",
    "CachingConfig",
    "ChangedRegions",
    "ChecksumAlgorithm",
    "ChunkType",
    "CommitMethod",
    "CommitOutcomeUnknown",
    "CompressionAlgorithm",
    "CompressionConfig",
    "Conflict",
    "ConflictDetector",
    "ConflictError",
    "ConflictSolver",
    "ConflictType",
    "Credentials",
    "Diff",
    "EngineConfig",
    "ErrorKind",
    "EventKind",
    "FeatureFlag",
    "ForkSession",
    "FormatError",
    "GCSummary",
    "GcsBearerCredential",
    "GcsCredentials",
    "GcsStaticCredentials",
    "IcechunkError",
    "IcechunkStore",
    "InternalError",
    "InvalidInputError",
    "ManifestConfig",
    "ManifestFileInfo",
    "ManifestPreloadCondition",
    "ManifestPreloadConfig",
    "ManifestSplitCondition",
    "ManifestSplitDimCondition",
    "ManifestSplittingConfig",
    "ManifestVirtualChunkLocationCompressionConfig",
    "MergeFailedError",
    "NodeNotFoundError",
    "NotFoundError",
    "ObjectNotFoundError",
    "ObjectStoreConfig",
    "PreconditionFailedError",
    "ReadOnlyError",
    "RebaseFailedError",
    "RefNotFoundError",
    "RepoAvailability",
    "RepoStatus",
    "Repository",
    "RepositoryConfig",
    "RepositoryEvent",
    "RepositoryNotFoundError",
    "S3Credentials",
    "S3Options",
    "S3StaticCredentials",
    "Session",
    "SessionMode",
    "SessionStateError",
    "SnapshotInfo",
    "SnapshotNotFoundError",
    "SpecVersion",
    "Storage",
    "StorageConcurrencySettings",
    "StorageError",
    "StorageRetriesSettings",
    "StorageSettings",
    "StorageTimeoutSettings",
    "Update",
    "UpdateType",
    "VersionSelection",
    "VirtualChunkContainer",
    "VirtualChunkSpec",
    "__api_version__",
    "__version__",
    "azure_anonymous_credentials",
    "azure_credentials",
    "azure_from_env_credentials",
    "azure_refreshable_credentials",
    "azure_static_credentials",
    "azure_storage",
    "azure_store",
    "containers_credentials",
    "gcs_credentials",
    "gcs_from_env_credentials",
    "gcs_refreshable_credentials",
    "gcs_static_credentials",
    "gcs_storage",
    "gcs_store",
    "hf_storage",
    "http_storage",
    "http_store",
    "in_memory_storage",
    "initialize_logs",
    "local_filesystem_storage",
    "local_filesystem_store",
    "open",
    "open_async",
    "print_debug_info",
    "r2_storage",
    "redirect_storage",
    "s3_anonymous_credentials",
    "s3_credentials",
    "s3_from_env_credentials",
    "s3_refreshable_credentials",
    "s3_static_credentials",
    "s3_storage",
    "s3_store",
    "set_logs_filter",
    "shutdown_telemetry",
    "spec_version",
    "storage_from_url",
    "supported_spec_versions",
    "tigris_storage",
    "upgrade_icechunk_repository",
    "upgrade_icechunk_repository_async",
    "user_agent",
]


__api_version__ = API_VERSION
"""The version of the official library whose names and semantics this package offers."""
__version__ = API_VERSION
"""The same: other packages compare it with versions of the official library.

The version of this distribution is ``importlib.metadata.version("aioicechunk")``.
"""


def spec_version() -> SpecVersion:
    """The version of the on-disk format that new repositories get."""
    return SpecVersion.current()


def supported_spec_versions() -> list[SpecVersion]:
    """Versions of the on-disk format that can be read and written, newest first."""
    return [SpecVersion.v2, SpecVersion.v1]


_initialize_logs_on_import()
