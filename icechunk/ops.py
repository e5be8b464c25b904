"""Values that describe a repository's state (format version, availability, feature flags), its operations log, the
results of maintenance, and the attribution of requests.
"""

from __future__ import annotations

import json
import re
from dataclasses import field
from datetime import UTC, datetime
from typing import Any, ClassVar, Final, TypeAlias, final

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.runtime.checks import aware, boolean, instance_of, optional, text, unsigned
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.representation import Described, IntLikeEnum, Represented, VariantMeta

__all__ = [
    "AnyUpdateType",
    "Attribution",
    "ChunkStorageStats",
    "FeatureFlag",
    "GCSummary",
    "PersistedSession",
    "RepoAvailability",
    "RepoStatus",
    "SessionMode",
    "SpecVersion",
    "Update",
    "UpdateType",
]


class SpecVersion(IntLikeEnum):
    """Version of the on-disk format."""

    v1 = 1
    v2 = 2

    @staticmethod
    def current() -> SpecVersion:
        """The newest version."""
        return SpecVersion.v2

    def __eq__(self, other: object, /) -> bool:
        return IntLikeEnum.__eq__(self, other)

    def __hash__(self) -> int:
        return hash(self.value)

    def __lt__(self, other: object, /) -> bool:
        return self.value < int(other) if isinstance(other, int | SpecVersion) else NotImplemented

    def __le__(self, other: object, /) -> bool:
        return self.value <= int(other) if isinstance(other, int | SpecVersion) else NotImplemented

    def __gt__(self, other: object, /) -> bool:
        return self.value > int(other) if isinstance(other, int | SpecVersion) else NotImplemented

    def __ge__(self, other: object, /) -> bool:
        return self.value >= int(other) if isinstance(other, int | SpecVersion) else NotImplemented

    def __repr__(self) -> str:
        return f"SpecVersion.{self.name}" + (" (current)" if self is SpecVersion.v2 else "")


class SessionMode(IntLikeEnum):
    """The operations that a session allows."""

    readonly = 0
    writable = 1
    rearrange = 2

    # The official library compares these by identity only.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return hash(self.value)


class RepoAvailability(IntLikeEnum):
    """Kinds of access that the repository's owner allows."""

    online = 0
    read_only = 1


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, repr=False)
class RepoStatus(Described):
    """Availability of a repository, with the time since when it holds and the reason."""

    _public_name: ClassVar[str] = "icechunk.repository.RepoStatus"

    availability: RepoAvailability
    set_at: datetime = None  # type: ignore[assignment]
    """Time with a time zone; None gives the current time."""
    limited_availability_reason: str | None = None
    """Reason that is shown to clients whose access is refused."""

    def __post_init__(self) -> None:
        instance_of(RepoAvailability)("RepoStatus.availability", self.availability)
        optional(text)("RepoStatus.limited_availability_reason", self.limited_availability_reason)
        set_at: Any = self.set_at
        object.__setattr__(self, "set_at", _now() if set_at is None else aware("RepoStatus.set_at", set_at))


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class FeatureFlag(Described):
    """A feature that the repository's owner can switch off."""

    _public_name: ClassVar[str] = "icechunk.config.FeatureFlag"

    id: int
    """Number on storage."""
    name: str
    default_enabled: bool
    setting: bool | None = None
    """The owner's setting; None: the default applies."""
    enabled: bool = field(init=False)
    """The effective value: the setting, or the default."""

    def __post_init__(self) -> None:
        unsigned(16)("FeatureFlag.id", self.id)
        optional(boolean)("FeatureFlag.setting", self.setting)
        object.__setattr__(self, "enabled", self.default_enabled if self.setting is None else self.setting)


_MAX_ATTRIBUTION_BYTES: Final = 128
_TOKEN: Final = r"[A-Za-z0-9!#$%&'*+\-.^_`|~]+"
_CLIENT: Final = re.compile(f"{_TOKEN}(/{_TOKEN})?")


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class Attribution(Represented):
    """Client, workload and principal, sent in the ``User-Agent`` of every request to a store, for its logs."""

    _public_name: ClassVar[str] = "icechunk.Attribution"

    client: str | None = None
    """Program, ``name`` or ``name/version``."""
    workload: str | None = None
    """Job, in printable ASCII without any of ``"();=\\``."""
    principal: str | None = None
    """Person or service, in printable ASCII without any of ``"();=\\``."""

    def __post_init__(self) -> None:
        for name in ("client", "workload", "principal"):
            value = getattr(self, name)
            if value is None:
                continue
            text(f"Attribution.{name}", value)
            if len(value.encode(errors="surrogatepass")) > _MAX_ATTRIBUTION_BYTES:
                raise _refused(name, f"is longer than {_MAX_ATTRIBUTION_BYTES} bytes")
            if name == "client" and not _CLIENT.fullmatch(value):
                raise _refused(name, f"must be `name` or `name/version` in token characters, got {json.dumps(value)}")
            if name != "client":
                for char in value:
                    if not " " <= char <= "~" or char in '"();=\\':
                        raise _refused(name, f"contains the forbidden character {char!r}")

    def user_agent(self, program: str) -> str:
        """The header of requests by ``program``: ``client program (workload=…; principal=…)``."""
        about = "; ".join(
            f"{name}={value}"
            for name, value in (("workload", self.workload), ("principal", self.principal))
            if value is not None
        )
        return " ".join(part for part in (self.client, program, f"({about})" if about else None) if part)


def _refused(name: str, reason: str) -> InvalidInputError:
    return InvalidInputError(f"attribution `{name}` {reason}", ErrorKind.INVALID_SETTING)


class _Kind(Represented):
    """Base of the kinds of update: shown as the call that makes them."""

    __slots__ = ()

    def __repr__(self) -> str:
        shown = ", ".join(
            f'{name}="{value}"' if isinstance(value, str) else f"{name}={value!r}" for name, value, _ in self._shown()
        )
        return f"{self._public_name}({shown})"

    def __str__(self) -> str:
        return repr(self)


class UpdateType(metaclass=VariantMeta):
    """Kind of an update. One of the nested classes; snapshot ids are texts."""

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

    kind: AnyUpdateType
    updated_at: datetime
    """Time of the update, with a time zone (UTC)."""
    backup_path: str | None = None
    """Name of the copy of the ``repo`` object before this update, if the layout keeps such copies."""


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class GCSummary(Described):
    """Objects and bytes that a garbage collection deleted (or would delete, on a dry run)."""

    bytes_deleted: int = 0
    chunks_deleted: int = 0
    manifests_deleted: int = 0
    snapshots_deleted: int = 0
    attributes_deleted: int = 0
    transaction_logs_deleted: int = 0
    objects_failed_to_delete: int = 0
    """Number of objects that could not be deleted; the next collection tries again."""
    throttled_batches: int = 0
    """Number of batches for which the storage asked to slow down."""
    delete_errors: list[str] = field(default_factory=list)
    """Reasons why objects could not be deleted."""
    skipped_phases: list[str] = field(default_factory=list)
    """Kinds of object that were not collected, because that could harm concurrent clients."""
    packs_rewritten: int = 0
    """Number of chunk objects shared by several chunks whose live bytes were copied to new objects."""
    manifests_rewritten: int = 0
    """Number of manifests rewritten, to drop dead references or because their chunks were copied."""
    snapshots_rewritten: int = 0
    """Number of snapshots rewritten; they have new ids."""
    chunk_bytes_copied: int = 0
    """Live bytes copied from the rewritten packs."""


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class ChunkStorageStats(Described):
    """Bytes of a repository's chunks, by where they are."""

    _public_name: ClassVar[str] = "icechunk.stats.ChunkStorageStats"

    native_bytes: int = 0
    """Bytes in chunk objects of the repository."""
    virtual_bytes: int = 0
    """Bytes in files outside the repository."""
    inlined_bytes: int = 0
    """Bytes in manifests."""
    dead_bytes: int | None = None
    """Bytes of chunks that no branch or tag reaches any more, in chunk objects beside bytes that count as native. A
    collection that repacks frees them. None: chunk objects were not listed."""
    unreferenced_bytes: int | None = None
    """Bytes of chunk objects that no branch or tag reaches, those of commits that are on their way among them. None:
    chunk objects were not listed."""

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


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class PersistedSession(Described):
    """A session that was checkpointed, and has not ended; see `Repository.sessions`."""

    id: str
    """Id to pass to `Repository.resume_session` and `Repository.join_session`."""
    branch: str
    """Branch that it commits to."""
    snapshot_id: str
    """The snapshot that it is based on."""
    created_at: datetime
    """Time of its first checkpoint, by the store's clock."""
    written_at: datetime
    """Time of its newest checkpoint, those of forks that joined it included, by the store's clock."""
    leased_until: datetime
    """Until then collections keep it, and its chunks. Afterwards it can be resumed until a collection runs."""
