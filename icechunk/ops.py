"""What happened to a repository, and what maintenance did."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import ClassVar, TypeAlias, final

from icechunk.status import RepoStatus
from icechunk.values import Described, Represented, VariantMeta

__all__ = ["AnyUpdateType", "ChunkStorageStats", "GCSummary", "Update", "UpdateType"]


class _Kind(Represented):
    """Base of the kinds of update: shown as the call that makes them."""

    __slots__ = ()

    @property
    def _public_name(self) -> str:  # type: ignore[override]
        return f"icechunk.ops.{type(self).__qualname__}"

    def __repr__(self) -> str:
        shown = ", ".join(
            f'{name}="{value}"' if isinstance(value, str) else f"{name}={value!r}" for name, value, _ in self._shown()
        )
        return f"{self._public_name}({shown})"

    def __str__(self) -> str:
        return repr(self)


class UpdateType(metaclass=VariantMeta):
    """What happened. One of the nested classes; snapshot ids are texts."""

    @final
    @dataclass(frozen=True, slots=True, repr=False)
    class RepoInitialized(_Kind):
        """The repository was created."""

    @final
    @dataclass(frozen=True, slots=True, repr=False)
    class RepoMigrated(_Kind):
        """The repository was upgraded to another format."""

        from_version: int
        to_version: int

    @final
    @dataclass(frozen=True, slots=True, repr=False)
    class RepoStatusChanged(_Kind):
        """The repository's status was set."""

        status: RepoStatus

    @final
    @dataclass(frozen=True, slots=True, repr=False)
    class ConfigChanged(_Kind):
        """The stored configuration was replaced."""

    @final
    @dataclass(frozen=True, slots=True, repr=False)
    class MetadataChanged(_Kind):
        """The repository's metadata was changed."""

    @final
    @dataclass(frozen=True, slots=True, repr=False)
    class TagCreated(_Kind):
        """A tag was created."""

        name: str

    @final
    @dataclass(frozen=True, slots=True, repr=False)
    class TagDeleted(_Kind):
        """A tag was deleted."""

        name: str
        previous_snap_id: str

    @final
    @dataclass(frozen=True, slots=True, repr=False)
    class BranchCreated(_Kind):
        """A branch was created."""

        name: str

    @final
    @dataclass(frozen=True, slots=True, repr=False)
    class BranchDeleted(_Kind):
        """A branch was deleted."""

        name: str
        previous_snap_id: str

    @final
    @dataclass(frozen=True, slots=True, repr=False)
    class BranchReset(_Kind):
        """A branch was pointed elsewhere."""

        name: str
        previous_snap_id: str

    @final
    @dataclass(frozen=True, slots=True, repr=False)
    class NewCommit(_Kind):
        """A snapshot was added to a branch."""

        branch: str
        new_snap_id: str

    @final
    @dataclass(frozen=True, slots=True, repr=False)
    class CommitAmended(_Kind):
        """A branch's newest snapshot was replaced."""

        branch: str
        previous_snap_id: str
        new_snap_id: str

    @final
    @dataclass(frozen=True, slots=True, repr=False)
    class NewDetachedSnapshot(_Kind):
        """A snapshot was written that no branch points to."""

        new_snap_id: str

    @final
    @dataclass(frozen=True, slots=True, repr=False)
    class GCRan(_Kind):
        """Garbage was collected."""

    @final
    @dataclass(frozen=True, slots=True, repr=False)
    class ExpirationRan(_Kind):
        """Old snapshots were expired."""

    @final
    @dataclass(frozen=True, slots=True, repr=False)
    class FeatureFlagChanged(_Kind):
        """A feature flag was set, or unset where ``new_value`` is None."""

        id: int
        new_value: bool | None


AnyUpdateType: TypeAlias = (
    UpdateType.RepoInitialized
    | UpdateType.RepoMigrated
    | UpdateType.RepoStatusChanged
    | UpdateType.ConfigChanged
    | UpdateType.MetadataChanged
    | UpdateType.TagCreated
    | UpdateType.TagDeleted
    | UpdateType.BranchCreated
    | UpdateType.BranchDeleted
    | UpdateType.BranchReset
    | UpdateType.NewCommit
    | UpdateType.CommitAmended
    | UpdateType.NewDetachedSnapshot
    | UpdateType.GCRan
    | UpdateType.ExpirationRan
    | UpdateType.FeatureFlagChanged
)


@final
@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class Update(Described):
    """One entry of a repository's operations log."""

    _public_name: ClassVar[str] = "icechunk.ops.Update"

    kind: AnyUpdateType
    updated_at: datetime
    """With a time zone (UTC)."""
    backup_path: str | None = None
    """Name of the copy of the ``repo`` object before this update, where that layout keeps one."""


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class GCSummary(Described):
    """What a collection of garbage deleted (or would delete, on a dry run)."""

    _public_name: ClassVar[str] = "icechunk.ops.GCSummary"

    bytes_deleted: int = 0
    chunks_deleted: int = 0
    manifests_deleted: int = 0
    snapshots_deleted: int = 0
    attributes_deleted: int = 0
    transaction_logs_deleted: int = 0
    objects_failed_to_delete: int = 0
    """Still there; the next collection tries again."""
    throttled_batches: int = 0
    """Batches that the storage asked to slow down."""
    delete_errors: list[str] = field(default_factory=list)
    """Why objects could not be deleted."""
    skipped_phases: list[str] = field(default_factory=list)
    """Kinds of object that were not collected, for the safety of others."""


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class ChunkStorageStats(Described):
    """Bytes of a repository's chunks, by where they are."""

    _public_name: ClassVar[str] = "icechunk.stats.ChunkStorageStats"

    native_bytes: int = 0
    """In chunk objects of the repository."""
    virtual_bytes: int = 0
    """In files of others."""
    inlined_bytes: int = 0
    """In manifests."""

    def non_virtual_bytes(self) -> int:
        """Bytes that the repository itself stores."""
        return self.native_bytes + self.inlined_bytes

    def total_bytes(self) -> int:
        """All bytes."""
        return self.native_bytes + self.virtual_bytes + self.inlined_bytes

    def __add__(self, other: ChunkStorageStats, /) -> ChunkStorageStats:
        if not isinstance(other, ChunkStorageStats):
            return NotImplemented
        return ChunkStorageStats(
            native_bytes=self.native_bytes + other.native_bytes,
            virtual_bytes=self.virtual_bytes + other.virtual_bytes,
            inlined_bytes=self.inlined_bytes + other.inlined_bytes,
        )
