"""Values of the repo info object of format 2, with indices resolved to ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Final, TypeAlias

from icechunk.format.ids import ObjectId
from icechunk.format.values import Json, Snapshot
from icechunk.runtime.late_dataclass import dataclass

__all__ = [
    "OFFLINE",
    "ONLINE",
    "READ_ONLY",
    "BranchCreated",
    "BranchDeleted",
    "BranchReset",
    "CommitAmended",
    "ConfigChanged",
    "ExpirationRan",
    "FeatureFlagChanged",
    "GCRan",
    "MetadataChanged",
    "NewCommit",
    "NewDetachedSnapshot",
    "RepoInfo",
    "RepoInitialized",
    "RepoMigrated",
    "SnapshotRecord",
    "Status",
    "StatusChanged",
    "TagCreated",
    "TagDeleted",
    "Update",
    "UpdateChange",
]

ONLINE: Final = 0
READ_ONLY: Final = 1
OFFLINE: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Whether the repository accepts reads and writes."""

    availability: int = ONLINE
    """`ONLINE`, `READ_ONLY` or `OFFLINE`."""
    set_at_us: int
    """µs since the epoch."""
    reason: str | None = None
    """The reason why it is limited, for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotRecord:
    """A snapshot in the repository's history."""

    id: ObjectId
    parent: ObjectId | None
    """Id of the parent; None for the first snapshot."""
    flushed_at_us: int
    """µs since the epoch; later than the parent's."""
    message: str
    metadata: Mapping[str, Json] = field(default_factory=dict)
    pruned_ancestor_tx_logs: tuple[ObjectId, ...] = ()
    """Transaction logs of expired ancestors between the parent and this one, oldest first."""

    @staticmethod
    def of(snapshot: Snapshot) -> SnapshotRecord:
        """The record of a snapshot, made from the snapshot's own file."""
        return SnapshotRecord(
            id=snapshot.id,
            parent=snapshot.parent_id,
            flushed_at_us=snapshot.flushed_at_us,
            message=snapshot.message,
            metadata=snapshot.metadata,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RepoInitialized:
    """The repository was created."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepoMigrated:
    """The repository moved from one format to another."""

    from_version: int
    to_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigChanged:
    """The persisted configuration was replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataChanged:
    """The repository's metadata was replaced or updated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TagCreated:
    """A tag was created."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TagDeleted:
    """A tag was deleted; its name is never used again."""

    name: str
    previous_snapshot: ObjectId


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchCreated:
    """A branch was created."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchDeleted:
    """A branch was deleted."""

    name: str
    previous_snapshot: ObjectId


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchReset:
    """A branch was pointed elsewhere."""

    name: str
    previous_snapshot: ObjectId


@dataclass(frozen=True, slots=True, kw_only=True)
class NewCommit:
    """A commit landed on a branch."""

    branch: str
    snapshot: ObjectId


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitAmended:
    """The newest commit of a branch was replaced."""

    branch: str
    previous_snapshot: ObjectId
    snapshot: ObjectId


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDetachedSnapshot:
    """A snapshot was added that no branch points to."""

    snapshot: ObjectId


@dataclass(frozen=True, slots=True, kw_only=True)
class GCRan:
    """Garbage was collected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpirationRan:
    """Old snapshots were expired."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureFlagChanged:
    """A feature flag was set, or unset to its default."""

    id: int
    new_value: bool
    """Meaningful when ``is_set``."""
    is_set: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusChanged:
    """The repository's status was set."""

    status: Status


UpdateChange: TypeAlias = (
    RepoInitialized
    | RepoMigrated
    | ConfigChanged
    | MetadataChanged
    | TagCreated
    | TagDeleted
    | BranchCreated
    | BranchDeleted
    | BranchReset
    | NewCommit
    | CommitAmended
    | NewDetachedSnapshot
    | GCRan
    | ExpirationRan
    | FeatureFlagChanged
    | StatusChanged
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One line of the operations log."""

    change: UpdateChange
    updated_at_us: int
    """µs since the epoch; strictly newer than the update before."""
    backup_path: str | None = None
    """Bare name of the copy of `repo` that this update's successor made; None in the newest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepoInfo:
    """The one mutable object of format 2."""

    spec_version: int = 2
    tags: Mapping[str, ObjectId] = field(default_factory=dict)
    branches: Mapping[str, ObjectId] = field(default_factory=dict)
    deleted_tags: frozenset[str] = frozenset()
    snapshots: Mapping[ObjectId, SnapshotRecord] = field(default_factory=dict)
    status: Status
    metadata: Mapping[str, Json] = field(default_factory=dict)
    updates: Sequence[Update] = ()
    """Updates, newest first."""
    repo_before_updates: str | None = None
    """Bare name of the copy of `repo` that holds the updates older than these."""
    config: Json | None = None
    """snake_case configuration; enum variants are one-key maps. None when none is stored."""
    enabled_feature_flags: frozenset[int] | None = None
    """None when the field is absent, which differs from empty."""
    disabled_feature_flags: frozenset[int] | None = None
    """None when the field is absent, which differs from empty."""
    extra: bytes | None = None
