"""Events: every kind of change to a repository, as values.

An event is a past-tense fact. It counts only in a log entry in whose place its preconditions hold;
`icechunk.log.repository.state.apply` has the preconditions and the effects.

Two helpers of events are here too. `pack` and `unpack` make JSON that round-trips every value that metadata and
configuration may hold: bytes, infinities and NaN become a map with one reserved key that begins with NUL, which no
other key holds, since FlexBuffers, in which checkpoints keep the same values, end keys there. And there are the rules
for names of branches and tags: format 2 keeps names in a table and takes any text, as the official library does
(``..``, ``/`` and the empty string included); format 1 writes them into keys, where ``/`` would name another object.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Final, TypeAlias

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.format.ids import ObjectId
from icechunk.format.repo.repo_info import SnapshotRecord
from icechunk.runtime.checks import WrongTypeError
from icechunk.runtime.late_dataclass import dataclass

__all__ = [
    "CONVERT",
    "TAKEOVER",
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
    "SnapshotsRewritten",
    "StatusSet",
    "TagCreated",
    "TagDeleted",
    "Void",
    "pack",
    "unpack",
    "validate_branch_name",
    "validate_tag_name",
]

Json: TypeAlias = Any

CONVERT: Final = "convert"
"""Reason of a seal: ``repo`` goes on from the state at the seal."""
TAKEOVER: Final = "takeover"
"""Reason of a seal: another library lifted the read-only status of ``repo``, which goes on from an older state."""


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
    """Id of a snapshot of the graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchReset:
    """A branch was pointed to another snapshot."""

    name: str
    snapshot: ObjectId
    """Id of a snapshot of the graph."""
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
    """Id of a snapshot of the graph."""


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
    """The configuration that the caller read; compared only where ``check`` is set."""
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
    """The reason why it is limited, shown to clients that are refused."""


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
class SnapshotsRewritten:
    """Snapshots were replaced by others of the same content, whose references are in other files."""

    replaced: tuple[tuple[ObjectId, ObjectId], ...]
    """Each one's id, and the id of the new one, which takes its place everywhere: refs, parents of others."""
    keep: bool
    """Whether those that were replaced stay in the graph, as if they had been written now, until a collection; or leave
    it at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionRan:
    """Unreferenced snapshots left the graph, and no commit with older files is valid any more (rule 10)."""

    cutoff_us: int
    """Store time, µs: files older than this that nothing refers to are deleted after this event has folded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryMigrated:
    """The repository came from another version of the format."""

    from_version: int
    to_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """The log ended: nothing may follow it, and ``repo`` becomes authoritative (rule 8)."""

    reason: str = ""
    """`CONVERT` or `TAKEOVER`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Void:
    """Nothing happened; the slot is filled so that no late entry can land there (rule 3)."""

    nonce: bytes = field(default=b"")
    """Nonce of the entry that was kept out."""


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
    | SnapshotsRewritten
    | CollectionRan
    | RepositoryMigrated
    | Sealed
    | Void
)
"""Any event of an entry of the repository log."""


_BYTES: Final = "\x00bytes"
_FLOAT: Final = "\x00float"
_MAX_INT: Final = 2**64 - 1
_MIN_INT: Final = -(2**63)
_MAX_DEPTH: Final = 100


def pack(value: Json, depth: int = 0) -> Json:
    """A value that orjson writes without loss.

    Raises
    ------
    InvalidInputError
        A value that is no JSON and no bytes, an integer beyond 64 bits, text that is no UTF-8, a key that is not text
        or holds a NUL character, or nesting deeper than 100.
    """
    if depth > _MAX_DEPTH:
        raise InvalidInputError(f"metadata is nested deeper than {_MAX_DEPTH} levels", ErrorKind.SERIALIZATION)
    match value:
        case None | bool():
            return value
        case str():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise InvalidInputError(f"text {value!r} cannot be written as UTF-8", ErrorKind.SERIALIZATION) from None
            return str(value)
        case int():
            if not _MIN_INT <= value <= _MAX_INT:
                raise InvalidInputError(f"integer {value} does not fit into 64 bits", ErrorKind.SERIALIZATION)
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else {_FLOAT: repr(float(value))}
        case bytes():
            return {_BYTES: base64.b64encode(value).decode()}
        case list() | tuple():
            return [pack(item, depth + 1) for item in value]
    if hasattr(value, "items"):
        items = [(key, pack(item, depth + 1)) for key, item in value.items()]
        for key, _ in items:
            if not isinstance(key, str):
                raise InvalidInputError(f"metadata key {key!r} is not text", ErrorKind.SERIALIZATION)
            if "\x00" in pack(key):
                raise InvalidInputError(f"metadata key {key!r} holds a NUL character", ErrorKind.SERIALIZATION)
        return dict(items)
    raise InvalidInputError(f"{type(value).__name__} cannot be written as JSON: {value!r}", ErrorKind.SERIALIZATION)


def unpack(value: Json) -> Json:
    """Read `pack` back. Raises ValueError on a reserved key with a foreign value."""
    match value:
        case list():
            return [unpack(item) for item in value]
        case dict():
            if len(value) == 1:
                ((key, inner),) = value.items()
                if key == _BYTES:
                    return base64.b64decode(inner, validate=True)
                if key == _FLOAT:
                    if inner not in ("nan", "inf", "-inf"):
                        raise ValueError(f"bad float {inner!r}")
                    return float(inner)
            return {key: unpack(item) for key, item in value.items()}
    return value


def _validate(what: str, name: object) -> None:
    if not isinstance(name, str):
        raise WrongTypeError(
            f"invalid {what} name {name!r}: a str expected, not {type(name).__name__}", ErrorKind.INVALID_REF_NAME
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"invalid {what} name {name!r}: it cannot be written as UTF-8 ({error.reason}); choose another name",
            ErrorKind.INVALID_REF_NAME,
        ) from None


def validate_branch_name(name: str) -> None:
    """Refuse a name that no branch can have.

    Raises
    ------
    InvalidInputError
        Kind ``invalid-ref-name``: not text, or not UTF-8. Format 1 refuses more when it writes the ref.
    """
    _validate("branch", name)


def validate_tag_name(name: str) -> None:
    """Refuse a name that no tag can have; as `validate_branch_name`."""
    _validate("tag", name)
