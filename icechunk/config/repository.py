"""The configuration of a repository."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import KW_ONLY, field
from enum import EnumMeta
from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar

from icechunk.config.containers import VirtualChunkContainer
from icechunk.config.manifest import ManifestConfig, ManifestVirtualChunkLocationCompressionConfig
from icechunk.config.storage import (
    StorageConcurrencySettings,
    StorageRetriesSettings,
    StorageSettings,
    StorageTimeoutSettings,
)
from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.format.envelope import DEFAULT_LEVEL
from icechunk.runtime.checks import U8, U16, U32, U64, instance_of, text, unsigned, whole
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.representation import IntLikeEnum, Setting, redacted_url, unset

__all__ = [
    "DEFAULT_COMPRESSION_LEVEL",
    "DEFAULT_DISK_CACHE_BYTES",
    "DEFAULT_INLINE_CHUNK_THRESHOLD_BYTES",
    "DEFAULT_MAX_BYTES_IN_FLIGHT",
    "DEFAULT_MAX_CONCURRENT_DECODES",
    "DEFAULT_MAX_CONCURRENT_REQUESTS",
    "DEFAULT_NUM_CHUNK_REFS",
    "DEFAULT_NUM_SNAPSHOT_NODES",
    "DEFAULT_NUM_TRANSACTION_CHANGES",
    "DEFAULT_NUM_UPDATES_PER_REPO_INFO_FILE",
    "DEFAULT_PACK_SIZE_BYTES",
    "DEFAULT_PACK_THRESHOLD_BYTES",
    "DEFAULT_PUT_MEMORY_BYTES",
    "DEFAULT_REPACK_BELOW_PERCENT",
    "DEFAULT_SMALL_COMMIT_BYTES",
    "DEFAULT_UPDATE_INITIAL_BACKOFF_MS",
    "DEFAULT_UPDATE_MAX_BACKOFF_MS",
    "DEFAULT_UPDATE_TRIES",
    "CachingConfig",
    "CompressionAlgorithm",
    "CompressionConfig",
    "EngineConfig",
    "LayoutName",
    "RepoUpdateRetryConfig",
    "RepositoryConfig",
]

DEFAULT_INLINE_CHUNK_THRESHOLD_BYTES: Final = 512
DEFAULT_MAX_CONCURRENT_REQUESTS: Final = 256
DEFAULT_NUM_UPDATES_PER_REPO_INFO_FILE: Final = 1000
DEFAULT_COMPRESSION_LEVEL: Final = DEFAULT_LEVEL
DEFAULT_MAX_CONCURRENT_DECODES: Final = 2
DEFAULT_NUM_SNAPSHOT_NODES: Final = 500_000
DEFAULT_NUM_CHUNK_REFS: Final = 15_000_000
DEFAULT_NUM_TRANSACTION_CHANGES: Final = 0
DEFAULT_UPDATE_TRIES: Final = 100
DEFAULT_UPDATE_INITIAL_BACKOFF_MS: Final = 50
DEFAULT_UPDATE_MAX_BACKOFF_MS: Final = 30_000
DEFAULT_DISK_CACHE_BYTES: Final = 10 * 1024**3
DEFAULT_PUT_MEMORY_BYTES: Final = 128 * 1024 * 1024
DEFAULT_MAX_BYTES_IN_FLIGHT: Final = 512 * 1024 * 1024
DEFAULT_PACK_THRESHOLD_BYTES: Final = 512 * 1024
"""Size below which chunks share objects on the log layout; the published layouts have a chunk in each object."""
DEFAULT_PACK_SIZE_BYTES: Final = 4 * 1024 * 1024
DEFAULT_SMALL_COMMIT_BYTES: Final = 64 * 1024
DEFAULT_REPACK_BELOW_PERCENT: Final = 50

LayoutName: TypeAlias = Literal["log", "repo", "refs"]

S = TypeVar("S", bound=Setting)


class _DefaultsToFirst(EnumMeta):
    def __call__(cls, value: Any = 0, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(value, *args, **kwargs)


class CompressionAlgorithm(IntLikeEnum, metaclass=_DefaultsToFirst):
    """Compression of metadata files. ``CompressionAlgorithm()`` is the only one, zstd."""

    Zstd = 0

    @staticmethod
    def default() -> CompressionAlgorithm:
        """zstd."""
        return CompressionAlgorithm.Zstd


@dataclass(slots=True, repr=False)
class CompressionConfig(Setting):
    """Compression of metadata files."""

    algorithm: CompressionAlgorithm | None = unset(CompressionAlgorithm.Zstd)
    level: U8 | None = unset(DEFAULT_COMPRESSION_LEVEL)
    """zstd level; more than 22 is taken as 22."""

    @staticmethod
    def default() -> CompressionConfig:
        """Everything unset."""
        return CompressionConfig()


@dataclass(slots=True, repr=False)
class CachingConfig(Setting):
    """Bounds of the caches in memory."""

    num_snapshot_nodes: U64 | None = unset(DEFAULT_NUM_SNAPSHOT_NODES)
    """Nodes of snapshots that are kept, at most."""
    num_chunk_refs: U64 | None = unset(DEFAULT_NUM_CHUNK_REFS)
    """Chunk references of manifests that are kept, at most."""
    num_transaction_changes: U64 | None = unset(DEFAULT_NUM_TRANSACTION_CHANGES)
    """Changes of transaction logs that are kept, at most."""
    num_bytes_attributes: U64 | None = unset(0)
    """Bytes of attributes files; no format in use has them."""
    num_bytes_chunks: U64 | None = None
    """Bytes of chunks. None: of bytes that were not requested but fetched along with others, 64 MiB; of requested ones
    none."""

    @staticmethod
    def default() -> CachingConfig:
        """Everything unset."""
        return CachingConfig()


@dataclass(slots=True, repr=False)
class RepoUpdateRetryConfig(Setting):
    """Number and pauses of the tries after a lost race for the repository."""

    default: StorageRetriesSettings | None = unset(
        lambda: StorageRetriesSettings(
            DEFAULT_UPDATE_TRIES, DEFAULT_UPDATE_INITIAL_BACKOFF_MS, DEFAULT_UPDATE_MAX_BACKOFF_MS
        )
    )


_Some32: TypeAlias = Annotated[int, unsigned(32, minimum=1)]
_Some64: TypeAlias = Annotated[int, unsigned(64, minimum=1)]


@dataclass(slots=True, repr=False, kw_only=True)
class EngineConfig(Setting):
    """Settings that only this implementation has. None leaves the choice to the engine."""

    layout: LayoutName | None = None
    """The layout of a *new* repository; that of an existing one is recognised. Never stored."""
    put_memory_bytes: _Some64 | None = unset(DEFAULT_PUT_MEMORY_BYTES)
    """Bytes of chunks that may be on their way to the storage, of all sessions, before writers wait."""
    max_bytes_in_flight: _Some64 | None = unset(DEFAULT_MAX_BYTES_IN_FLIGHT)
    """Bytes of requests in flight for the whole repository, in each event loop."""
    hedge_percentile: Annotated[int, whole(50, 100)] | None = None
    """Reads slower than so many percent (50 to 99) of recent ones are sent a second time; None: only reads that are
    probably stuck, at most one in twenty; 100: none."""
    pack_threshold_bytes: U64 | None = None
    """Chunks below this size share chunk objects; 0: every chunk has an object of its own. None: 512 KiB on the log
    layout, 0 on the others."""
    pack_size_bytes: _Some64 | None = unset(DEFAULT_PACK_SIZE_BYTES)
    """Size of an object that chunks share."""
    small_commit_bytes: U32 | None = unset(DEFAULT_SMALL_COMMIT_BYTES)
    """A commit whose metadata files are together no larger is embedded in the log, which saves a round trip; 0: none
    is. Larger values count as 512 KiB."""
    max_refs_per_manifest: _Some32 | None = None
    """Larger manifests are split into tiles, where no splitting is configured."""
    share_manifests_below_refs: U32 | None = None
    """Arrays with fewer references share manifest objects; 0: none do."""
    repack_below_percent: Annotated[int, whole(0, 100)] | None = unset(DEFAULT_REPACK_BELOW_PERCENT)
    """A collection writes objects again of whose bytes less than so many percent are still needed."""
    disk_cache_path: str | None = None
    """A folder on local disk for what was read, for all processes of this user; None: nothing is kept. Never stored."""
    disk_cache_bytes: _Some64 | None = unset(DEFAULT_DISK_CACHE_BYTES)
    """Size of that folder; the least recently used ranges are removed. Never stored."""


NEVER_STORED: Final = frozenset({"layout", "disk_cache_path", "disk_cache_bytes"})
"""Settings of `EngineConfig` that belong to one caller: they are neither stored nor taken from a stored one."""


def _containers(name: str, value: Any) -> dict[str, VirtualChunkContainer]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict of containers, not {type(value).__name__}")
    is_container = instance_of(VirtualChunkContainer)
    return {text(f"each key of {name}", k): is_container(f"{name}[{k!r}]", v) for k, v in value.items()}


@dataclass(slots=True, repr=False)
class RepositoryConfig(Setting):
    """The configuration of a repository; None leaves a setting to the library's default, shown by ``str``."""

    inline_chunk_threshold_bytes: U16 | None = unset(DEFAULT_INLINE_CHUNK_THRESHOLD_BYTES)
    """Chunks of at most so many bytes are kept in the manifest."""
    get_partial_values_concurrency: U16 | None = unset(DEFAULT_MAX_CONCURRENT_REQUESTS)
    """Values that one call of ``get_partial_values`` fetches at a time."""
    compression: CompressionConfig | None = unset(CompressionConfig)
    """Compression of metadata files."""
    max_concurrent_requests: U16 | None = unset(DEFAULT_MAX_CONCURRENT_REQUESTS)
    """Requests in flight for the whole repository."""
    caching: CachingConfig | None = unset(CachingConfig)
    """Sizes of the caches in memory."""
    storage: StorageSettings | None = None
    """Settings of requests to the storage. None: the storage's own defaults."""
    virtual_chunk_containers: Annotated[dict[str, VirtualChunkContainer], _containers] | None = None
    """Containers by URL prefix, or by the key chosen at construction."""
    manifest: ManifestConfig | None = unset(ManifestConfig)
    """Splitting, preloading and compression of manifests."""
    repo_update_retries: RepoUpdateRetryConfig | None = unset(RepoUpdateRetryConfig)
    """Tries after a lost race for the repository."""
    num_updates_per_repo_info_file: U16 | None = unset(DEFAULT_NUM_UPDATES_PER_REPO_INFO_FILE)
    """Entries of the operations log that a ``repo`` object keeps itself."""
    max_concurrent_decodes: U16 | None = unset(DEFAULT_MAX_CONCURRENT_DECODES)
    """Large metadata files decoded at a time, in threads, for each event loop."""
    _: KW_ONLY
    engine: EngineConfig | None = unset(EngineConfig)
    """Settings that only this implementation has."""
    previous_file: str | None = field(default=None, init=False, repr=False)
    """Name of the copy of the configuration before this one; None if it is not known."""

    def _shown(self) -> list[tuple[str, Any, Any]]:
        # The containers' keys are URLs as a rule.
        rows = Setting._shown(self)
        return [(n, {redacted_url(k): c for k, c in v.items()} if isinstance(v, dict) else v, d) for n, v, d in rows]

    @staticmethod
    def default() -> RepositoryConfig:
        """Everything unset."""
        return RepositoryConfig()

    def get_virtual_chunk_container(self, name: str) -> VirtualChunkContainer | None:
        """The container kept under this key (its URL prefix, unless chosen otherwise), or None."""
        return (self.virtual_chunk_containers or {}).get(name)

    def set_virtual_chunk_container(self, cont: VirtualChunkContainer) -> None:
        """Add a container under its URL prefix, replacing the one there and any other of the same name.

        Raises
        ------
        InvalidInputError
            As `VirtualChunkContainer.validate`.
        """
        instance_of(VirtualChunkContainer)("the container", cont)
        cont.validate()
        kept = {
            key: other
            for key, other in (self.virtual_chunk_containers or {}).items()
            if cont.name is None or other.name != cont.name
        }
        self.virtual_chunk_containers = kept | {cont.url_prefix: cont}

    def clear_virtual_chunk_containers(self) -> None:
        """Remove all containers."""
        self.virtual_chunk_containers = {}

    def merge(self, other: RepositoryConfig) -> RepositoryConfig:
        """A new configuration: the values that ``other`` sets, and this one's for the rest.

        Preload and splitting settings and the containers are taken from one side as a whole, everything else
        setting by setting.
        """
        instance_of(RepositoryConfig)("the other configuration", other)
        return _overlaid(self, other)

    def validate(self) -> None:
        """Refuse values that no repository can work with; `Repository.create` and `Repository.open` call it.

        Raises
        ------
        InvalidInputError
            A container that `VirtualChunkContainer.validate` refuses, or a limit of no requests at all.
        """
        for container in (self.virtual_chunk_containers or {}).values():
            container.validate()
        for name in ("get_partial_values_concurrency", "max_concurrent_requests", "max_concurrent_decodes"):
            if getattr(self, name) == 0:
                raise InvalidInputError(
                    f"RepositoryConfig.{name} is 0, so no request could be made: set at least 1, or None",
                    ErrorKind.INVALID_SETTING,
                )


_MERGED_BY_FIELD: Final = (
    CachingConfig,
    CompressionConfig,
    EngineConfig,
    ManifestConfig,
    ManifestVirtualChunkLocationCompressionConfig,
    RepoUpdateRetryConfig,
    RepositoryConfig,
    StorageConcurrencySettings,
    StorageRetriesSettings,
    StorageSettings,
    StorageTimeoutSettings,
)


def _overlaid(base: S, other: S) -> S:
    result = copy.copy(base)
    for f in dataclasses.fields(other):  # type: ignore[arg-type]
        ours, theirs = getattr(base, f.name), getattr(other, f.name)
        if isinstance(ours, _MERGED_BY_FIELD) and theirs is not None:
            value = _overlaid(ours, theirs)
        else:
            # Copied, so that a later change of a part does not reach into the configuration it came from.
            value = copy.deepcopy(ours if theirs is None else theirs)
        setattr(result, f.name, value)
    return result
