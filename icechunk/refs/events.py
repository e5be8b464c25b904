"""What can happen to a repository: events, as values.

An event is a past-tense fact. It becomes one by standing in a log entry whose preconditions hold where it
stands; `icechunk.refs.state.apply` says what they are and what the event does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from icechunk.format.ids import ObjectId
from icechunk.format.repo_values import SnapshotRecord

__all__ = [
    "BranchCreated",
    "BranchDeleted",
    "BranchReset",
    "CollectionRan",
    "CommitAdded",
    "CommitAmended",
    "ConfigReplaced",
    "DetachedSnapshotAdded",
    "Event",
    "ExpirationRan",
    "FeatureFlagSet",
    "MetadataReplaced",
    "MetadataUpdated",
    "Reparented",
    "RepositoryMigrated",
    "Sealed",
    "StatusSet",
    "TagCreated",
    "TagDeleted",
    "Void",
]

Json: TypeAlias = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitAdded:
    """A branch moved from its tip to a new snapshot whose parent is that tip."""

    branch: str
    snapshot: SnapshotRecord
    """New to the graph; ``parent`` is the branch's tip, ``flushed_at_us`` is later than the parent's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitAmended:
    """A branch's tip was replaced by a new snapshot with the tip's parent."""

    branch: str
    previous: ObjectId
    """The tip that was replaced; it stays in the graph until a collection."""
    snapshot: SnapshotRecord
    """New to the graph; ``parent`` is the parent of ``previous``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DetachedSnapshotAdded:
    """A snapshot was added to the graph that no branch points to."""

    snapshot: SnapshotRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchCreated:
    """A new branch."""

    name: str
    snapshot: ObjectId
    """In the graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchReset:
    """A branch was pointed to another snapshot."""

    name: str
    snapshot: ObjectId
    """In the graph."""
    expected: ObjectId | None
    """The tip that the caller knew; None: whatever it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchDeleted:
    """A branch other than ``main`` is gone; its snapshots stay in the graph until a collection."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TagCreated:
    """A new tag; its name was never used before."""

    name: str
    snapshot: ObjectId
    """In the graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TagDeleted:
    """A tag is gone, and its name with it for ever."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigReplaced:
    """The persisted configuration was replaced as a whole."""

    config: Json | None
    """snake_case keys, as the format keeps it; None: none is persisted."""
    expected: Json | None = None
    """What the caller believed was persisted; only compared where ``check`` is set."""
    check: bool = False
    """Whether the event is refused where the persisted configuration is not ``expected``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataReplaced:
    """The repository's metadata was replaced as a whole."""

    metadata: Mapping[str, Json]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataUpdated:
    """Keys of the repository's metadata were set; others stayed."""

    metadata: Mapping[str, Json]


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusSet:
    """The repository's real status changed."""

    availability: int
    """0 online, 1 read-only, 2 offline."""
    reason: str | None = None
    """Why it is limited, for whoever meets it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureFlagSet:
    """A feature flag was switched, or returned to its default."""

    flag: int
    """The format's number of the feature."""
    value: bool | None
    """None: back to the default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reparented:
    """A snapshot that survived an expiration that took its parent."""

    id: ObjectId
    parent: ObjectId | None
    """An ancestor that is left."""
    pruned_ancestor_tx_logs: tuple[ObjectId, ...]
    """Transaction logs of the ancestors that went, oldest first, before those already listed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpirationRan:
    """Old snapshots left the history."""

    released: tuple[ObjectId, ...]
    """Snapshots that leave the graph."""
    reparented: tuple[Reparented, ...] = ()
    """Survivors whose parent was among them."""
    deleted_branches: tuple[str, ...] = ()
    deleted_tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionRan:
    """What nothing refers to left the graph, and no commit with older files is valid any more (rule 10)."""

    cutoff_us: int
    """Store time, µs: files older than this that nothing refers to are deleted after this event has folded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryMigrated:
    """The repository came from another version of the format."""

    from_version: int
    to_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """The log ended: nothing may follow it, and ``repo`` becomes the truth (rule 8)."""

    reason: str = ""
    """``convert``, or ``takeover`` where somebody lifted the read-only status."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Void:
    """Nothing happened; the slot is filled so that no late entry can land there (rule 3)."""

    nonce: bytes = field(default=b"")
    """Of the entry that was kept out."""


Event: TypeAlias = (
    CommitAdded
    | CommitAmended
    | DetachedSnapshotAdded
    | BranchCreated
    | BranchReset
    | BranchDeleted
    | TagCreated
    | TagDeleted
    | ConfigReplaced
    | MetadataReplaced
    | MetadataUpdated
    | StatusSet
    | FeatureFlagSet
    | ExpirationRan
    | CollectionRan
    | RepositoryMigrated
    | Sealed
    | Void
)
"""Anything that can stand in an entry of the repository log."""
