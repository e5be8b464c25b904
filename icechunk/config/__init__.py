"""Configuration of repositories and of the storage under them: values, their checks, and their stored forms.

Modules: `storage` (object stores and requests to them), `containers` (virtual chunk containers), `manifest` and
`manifest_rules` (splitting, preloading), `patterns` (their regular expressions), `repository` (the whole), `serialise`
and `yaml_text` (the stored forms). Pickles of configurations name these modules, so their names stay. Not here: the
effect of a setting on requests (`storage.settings`, `transfer`) or sessions (`session.core`).
"""

from __future__ import annotations

from icechunk.config.containers import VirtualChunkContainer
from icechunk.config.manifest import (
    ManifestConfig,
    ManifestPreloadCondition,
    ManifestPreloadConfig,
    ManifestSplitCondition,
    ManifestSplitDimCondition,
    ManifestSplittingConfig,
    ManifestSplitValues,
    ManifestVirtualChunkLocationCompressionConfig,
    SplitSizesDict,
    from_dict,
    to_dict,
)
from icechunk.config.repository import (
    CachingConfig,
    CompressionAlgorithm,
    CompressionConfig,
    EngineConfig,
    RepositoryConfig,
    RepoUpdateRetryConfig,
)
from icechunk.config.serialise import config_from_dict, config_to_dict
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
from icechunk.ops import Attribution, FeatureFlag
from icechunk.runtime.logging import initialize_logs, set_logs_filter, shutdown_telemetry

__all__ = [
    "AnyObjectStoreConfig",
    "Attribution",
    "CachingConfig",
    "ChecksumAlgorithm",
    "CompressionAlgorithm",
    "CompressionConfig",
    "EngineConfig",
    "FeatureFlag",
    "ManifestConfig",
    "ManifestPreloadCondition",
    "ManifestPreloadConfig",
    "ManifestSplitCondition",
    "ManifestSplitDimCondition",
    "ManifestSplitValues",
    "ManifestSplittingConfig",
    "ManifestVirtualChunkLocationCompressionConfig",
    "ObjectStoreConfig",
    "RepoUpdateRetryConfig",
    "RepositoryConfig",
    "S3Options",
    "SplitSizesDict",
    "StorageConcurrencySettings",
    "StorageRetriesSettings",
    "StorageSettings",
    "StorageTimeoutSettings",
    "VirtualChunkContainer",
    "config_from_dict",
    "config_to_dict",
    "from_dict",
    "initialize_logs",
    "set_logs_filter",
    "shutdown_telemetry",
    "to_dict",
]
