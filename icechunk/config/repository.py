"""The configuration of a repository."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import EnumMeta
from typing import Any, ClassVar, Final, Literal, TypeAlias, TypeVar, cast

from icechunk.config.containers import VirtualChunkContainer
from icechunk.config.manifest import ManifestConfig, ManifestVirtualChunkLocationCompressionConfig
from icechunk.config.storage import (
    StorageConcurrencySettings,
    StorageRetriesSettings,
    StorageSettings,
    StorageTimeoutSettings,
)
from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.runtime.representation import (
    IntLikeEnum,
    Setting,
    checked,
    instance_of,
    optional,
    redacted_url,
    text,
    unsigned,
)

__all__ = [
    "DEFAULT_COMPRESSION_LEVEL",
    "DEFAULT_INLINE_CHUNK_THRESHOLD_BYTES",
    "DEFAULT_MAX_CONCURRENT_REQUESTS",
    "DEFAULT_NUM_UPDATES_PER_REPO_INFO_FILE",
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
DEFAULT_COMPRESSION_LEVEL: Final = 3

LayoutName: TypeAlias = Literal["log", "repo", "refs"]

S = TypeVar("S", bound=Setting)


class _DefaultsToFirst(EnumMeta):
    def __call__(cls, value: Any = 0, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(value, *args, **kwargs)


class CompressionAlgorithm(IntLikeEnum, metaclass=_DefaultsToFirst):
    """How metadata files are compressed. ``CompressionAlgorithm()`` is the only one, zstd."""

    Zstd = 0

    @staticmethod
    def default() -> CompressionAlgorithm:
        """zstd."""
        return CompressionAlgorithm.Zstd


@dataclass(slots=True, repr=False)
class CompressionConfig(Setting):
    """Compression of metadata files."""

    _public_name: ClassVar[str] = "icechunk.config.CompressionConfig"

    algorithm: CompressionAlgorithm | None = field(
        default=None,
        metadata=checked(optional(instance_of(CompressionAlgorithm)), effective=CompressionAlgorithm.Zstd),
    )
    level: int | None = field(
        default=None, metadata=checked(optional(unsigned(8)), effective=DEFAULT_COMPRESSION_LEVEL)
    )
    """zstd level; more than 22 is taken as 22."""

    @staticmethod
    def default() -> CompressionConfig:
        """Everything unset."""
        return CompressionConfig()


@dataclass(slots=True, repr=False)
class CachingConfig(Setting):
    """How much stays in memory."""

    _public_name: ClassVar[str] = "icechunk.config.CachingConfig"

    num_snapshot_nodes: int | None = field(default=None, metadata=checked(optional(unsigned(64)), effective=500_000))
    """Nodes of snapshots."""
    num_chunk_refs: int | None = field(default=None, metadata=checked(optional(unsigned(64)), effective=15_000_000))
    """Chunk references of manifests."""
    num_transaction_changes: int | None = field(default=None, metadata=checked(optional(unsigned(64)), effective=0))
    """Changes of transaction logs."""
    num_bytes_attributes: int | None = field(default=None, metadata=checked(optional(unsigned(64)), effective=0))
    """Bytes of attributes files; no format in use has them."""
    num_bytes_chunks: int | None = field(default=None, metadata=checked(optional(unsigned(64)), effective=0))
    """Bytes of chunks."""

    @staticmethod
    def default() -> CachingConfig:
        """Everything unset."""
        return CachingConfig()


@dataclass(slots=True, repr=False)
class RepoUpdateRetryConfig(Setting):
    """How often and how soon a lost race for the repository is tried again."""

    _public_name: ClassVar[str] = "icechunk.config.RepoUpdateRetryConfig"

    default: StorageRetriesSettings | None = field(
        default=None,
        metadata=checked(
            optional(instance_of(StorageRetriesSettings)), effective=StorageRetriesSettings(100, 50, 30_000)
        ),
    )


def _layout(name: str, value: Any) -> LayoutName:
    if text(name, value) in ("log", "repo", "refs"):
        return cast("LayoutName", value)
    raise InvalidInputError(f"{name} must be 'log', 'repo' or 'refs', not {value!r}", ErrorKind.INVALID_SETTING)


def _percentile(name: str, value: Any) -> int:
    number: int = unsigned(8)(name, value)
    if not 50 <= number <= 99:
        raise InvalidInputError(f"{name} must be from 50 to 99, not {number}", ErrorKind.INVALID_SETTING)
    return number


@dataclass(slots=True, repr=False, kw_only=True)
class EngineConfig(Setting):
    """Settings that only this implementation has. None leaves the choice to the engine."""

    _public_name: ClassVar[str] = "icechunk.config.EngineConfig"

    layout: LayoutName | None = field(default=None, metadata=checked(optional(_layout)))
    """How the log of a *new* repository is persisted; existing ones are recognised. Never stored."""
    put_memory_bytes: int | None = field(default=None, metadata=checked(optional(unsigned(64, minimum=1))))
    """Bytes of chunks that may be on their way to the storage, of all sessions, before writers wait (128 MiB)."""
    max_bytes_in_flight: int | None = field(default=None, metadata=checked(optional(unsigned(64, minimum=1))))
    """Bytes of requests in flight for the whole repository, in each event loop (512 MiB)."""
    hedge_percentile: int | None = field(default=None, metadata=checked(optional(_percentile)))
    """Reads slower than so many percent (50 to 99) of recent ones are sent a second time; None: none are."""
    pack_threshold_bytes: int | None = field(default=None, metadata=checked(optional(unsigned(64))))
    """Chunks below this size share chunk objects (512 KiB); 0: every chunk has an object of its own."""
    pack_size_bytes: int | None = field(default=None, metadata=checked(optional(unsigned(64, minimum=1))))
    """Size of an object that chunks share (4 MiB)."""
    small_commit_bytes: int | None = field(default=None, metadata=checked(optional(unsigned(32))))
    """A commit whose metadata files are together no larger (64 KiB) rides in the log, which saves a round trip; 0: none
    does. At most 512 KiB count."""
    max_refs_per_manifest: int | None = field(default=None, metadata=checked(optional(unsigned(32, minimum=1))))
    """Larger manifests are split into tiles, where no splitting is configured."""
    share_manifests_below_refs: int | None = field(default=None, metadata=checked(optional(unsigned(32))))
    """Arrays with fewer references share manifest objects; 0: none do."""


def _containers(name: str, value: Any) -> dict[str, VirtualChunkContainer]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict of containers, not {type(value).__name__}")
    is_container = instance_of(VirtualChunkContainer)
    return {text(f"each key of {name}", k): is_container(f"{name}[{k!r}]", v) for k, v in value.items()}


@dataclass(slots=True, repr=False)
class RepositoryConfig(Setting):
    """The configuration of a repository; None leaves a setting to the library's default, shown by ``str``."""

    _public_name: ClassVar[str] = "icechunk.config.RepositoryConfig"

    inline_chunk_threshold_bytes: int | None = field(
        default=None, metadata=checked(optional(unsigned(16)), effective=DEFAULT_INLINE_CHUNK_THRESHOLD_BYTES)
    )
    """Chunks of at most so many bytes are kept in the manifest."""
    get_partial_values_concurrency: int | None = field(
        default=None, metadata=checked(optional(unsigned(16)), effective=10)
    )
    """Requests in flight for one call of ``get_partial_values``; unset, as many as for the whole repository."""
    compression: CompressionConfig | None = field(
        default=None, metadata=checked(optional(instance_of(CompressionConfig)), effective=CompressionConfig())
    )
    """Of metadata files."""
    max_concurrent_requests: int | None = field(
        default=None, metadata=checked(optional(unsigned(16)), effective=DEFAULT_MAX_CONCURRENT_REQUESTS)
    )
    """Requests in flight for the whole repository."""
    caching: CachingConfig | None = field(
        default=None, metadata=checked(optional(instance_of(CachingConfig)), effective=CachingConfig())
    )
    """In memory."""
    storage: StorageSettings | None = field(default=None, metadata=checked(optional(instance_of(StorageSettings))))
    """None: the storage's own defaults."""
    virtual_chunk_containers: dict[str, VirtualChunkContainer] | None = field(
        default=None, metadata=checked(optional(_containers))
    )
    """By URL prefix, or by the key chosen at construction."""
    manifest: ManifestConfig | None = field(
        default=None, metadata=checked(optional(instance_of(ManifestConfig)), effective=ManifestConfig())
    )
    """Splitting, preloading and compression of manifests."""
    repo_update_retries: RepoUpdateRetryConfig | None = field(
        default=None, metadata=checked(optional(instance_of(RepoUpdateRetryConfig)), effective=RepoUpdateRetryConfig())
    )
    """Races for the repository."""
    num_updates_per_repo_info_file: int | None = field(
        default=None, metadata=checked(optional(unsigned(16)), effective=DEFAULT_NUM_UPDATES_PER_REPO_INFO_FILE)
    )
    """Entries of the operations log that a ``repo`` object keeps itself."""
    max_concurrent_decodes: int | None = field(default=None, metadata=checked(optional(unsigned(16)), effective=2))
    """Large metadata files decoded at a time, in threads, for each event loop."""
    engine: EngineConfig | None = field(
        default=None, metadata=checked(optional(instance_of(EngineConfig))), kw_only=True
    )
    """Settings that only this implementation has."""
    previous_file: str | None = field(default=None, init=False, repr=False, metadata=checked(optional(text)))
    """Name of the copy of the configuration before this one, where the storage tells."""

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
        """A new configuration: what ``other`` sets, and this one's for the rest.

        Preload and splitting settings and the containers are taken from one side as a whole, everything else
        setting by setting.
        """
        instance_of(RepositoryConfig)("the other configuration", other)
        return _overlaid(self, other)

    def validate(self) -> None:
        """Refuse what no repository can work with; `Repository.create` and `Repository.open` call it.

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
                    f"RepositoryConfig.{name} is 0, so nothing could ever run: set at least 1, or None",
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
