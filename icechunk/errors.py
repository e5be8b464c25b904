"""Every error this package raises.

One root, few classes, chosen by the caller's next step; the finer cause is the stable string in
``kind``. Class names and kinds are those of the official library, so ``except`` clauses written for
it keep working.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

__all__ = [
    "AccessDeniedError",
    "AlreadyExistsError",
    "CommitOutcomeUnknown",
    "ConflictError",
    "ErrorKind",
    "FormatError",
    "IcechunkError",
    "InternalError",
    "InvalidInputError",
    "NodeNotFoundError",
    "NotFoundError",
    "ObjectNotFoundError",
    "PreconditionFailedError",
    "ReadOnlyError",
    "RefNotFoundError",
    "RepositoryNotFoundError",
    "SessionEndedError",
    "SessionNotFoundError",
    "SessionStateError",
    "SnapshotNotFoundError",
    "StorageError",
]


class ErrorKind(StrEnum):
    """The exact reason; the stable part of an error that programs compare with."""

    COMMIT_CONFLICT = "commit-conflict"
    BRANCH_UPDATE_CONFLICT = "branch-update-conflict"
    REBASE_FAILED = "rebase-failed"
    CONFIG_UPDATED = "config-updated"
    REPO_INFO_UPDATED = "repo-info-updated"
    UPDATE_ATTEMPTS_EXHAUSTED = "update-attempts-exhausted"
    GC_DELETES_FAILING = "gc-deletes-failing"
    NODE_NOT_FOUND = "node-not-found"
    ANCESTOR_NODE_NOT_FOUND = "ancestor-node-not-found"
    CHUNK_NOT_FOUND = "chunk-not-found"
    KEY_NOT_FOUND = "key-not-found"
    SNAPSHOT_NOT_FOUND = "snapshot-not-found"
    NO_SNAPSHOT_AT_TIME = "no-snapshot-at-time"
    REF_NOT_FOUND = "ref-not-found"
    BRANCH_NOT_FOUND = "branch-not-found"
    TAG_NOT_FOUND = "tag-not-found"
    REPOSITORY_NOT_FOUND = "repository-not-found"
    MANIFEST_INFO_NOT_FOUND = "manifest-info-not-found"
    NODE_ALREADY_EXISTS = "node-already-exists"
    BRANCH_ALREADY_EXISTS = "branch-already-exists"
    TAG_ALREADY_EXISTS = "tag-already-exists"
    TAG_PREVIOUSLY_DELETED = "tag-previously-deleted"
    MOVE_WONT_OVERWRITE = "move-wont-overwrite"
    READ_ONLY_SESSION = "read-only-session"
    READ_ONLY_STORE = "read-only-store"
    READ_ONLY_STORAGE = "read-only-storage"
    READ_ONLY_REPOSITORY = "read-only-repository"
    INVALID_KEY = "invalid-key"
    INVALID_CHUNK_INDEX = "invalid-chunk-index"
    ZERO_LENGTH_CHUNK = "zero-length-chunk"
    INVALID_MANIFEST_SPLIT_INDEX = "invalid-manifest-split-index"
    INVALID_REF_TYPE = "invalid-ref-type"
    INVALID_REF_NAME = "invalid-ref-name"
    INVALID_SNAPSHOT_ID = "invalid-snapshot-id"
    INVALID_PATH = "invalid-path"
    BAD_KEY_PREFIX = "bad-key-prefix"
    BAD_METADATA = "bad-metadata"
    BAD_PREFIX = "bad-prefix"
    NOT_AN_ARRAY = "not-an-array"
    NOT_A_GROUP = "not-a-group"
    INVALID_BYTE_RANGE = "invalid-byte-range"
    INVALID_COMMIT_CONFIGURATION = "invalid-commit-configuration"
    INVALID_ARRAY_METADATA = "invalid-array-metadata"
    INVALID_FEATURE_FLAG = "invalid-feature-flag"
    INVALID_VIRTUAL_REF = "invalid-virtual-ref"
    INVALID_CREDENTIALS = "invalid-credentials"
    INVALID_SETTING = "invalid-setting"
    NO_CONTAINER_FOR_VIRTUAL_CHUNK = "no-container-for-virtual-chunk"
    UNAUTHORIZED_VIRTUAL_CHUNK_CONTAINER = "unauthorized-virtual-chunk-container"
    EMPTY_PREFIX_CREATION = "empty-prefix-creation"
    PARENT_DIRECTORY_NOT_CLEAN = "parent-directory-not-clean"
    BAD_SNAPSHOT_CHAIN_FOR_DIFF = "bad-snapshot-chain-for-diff"
    COMMIT_NOT_ALLOWED = "commit-not-allowed"
    MERGE_NOT_ALLOWED = "merge-not-allowed"
    CANNOT_FORK_READ_ONLY_SESSION = "cannot-fork-read-only-session"
    REARRANGE_SESSION_ONLY = "rearrange-session-only"
    NON_REARRANGE_SESSION = "non-rearrange-session"
    MOVE_INTO_SELF_OR_DESCENDANT = "move-into-self-or-descendant"
    MOVE_DESTINATION_PARENT_MISSING = "move-destination-parent-missing"
    MOVE_DESTINATION_PARENT_NOT_GROUP = "move-destination-parent-not-group"
    NO_CHANGES_TO_COMMIT = "no-changes-to-commit"
    NO_AMEND_FOR_INITIAL_COMMIT = "no-amend-for-initial-commit"
    NOT_ON_BRANCH = "not-on-branch"
    NO_SNAPSHOT = "no-snapshot"
    CANNOT_DELETE_MAIN = "cannot-delete-main"
    UNCOMMITTED_CHANGES = "uncommitted-changes"
    MERGE_FAILED = "merge-failed"
    NOT_ALLOWED = "not-allowed"
    UNIMPLEMENTED = "unimplemented"
    REBASE_TX_LOG_PRUNED = "rebase-tx-log-pruned"
    FEATURE_FLAG_DISABLED = "feature-flag-disabled"
    TAG_ERROR = "tag-error"
    INVALID_REPOSITORY_MIGRATION = "invalid-repository-migration"
    OBJECT_NOT_FOUND = "object-not-found"
    OBJECT_STORE = "object-store"
    IO = "io"
    STORAGE_CONFIG = "storage-config"
    CANNOT_PARSE_URL = "cannot-parse-url"
    BAD_REDIRECT = "bad-redirect"
    SEMAPHORE_ACQUIRE = "semaphore-acquire"
    THROTTLED = "throttled"
    STORAGE_OTHER = "storage-other"
    VIRTUAL_CHUNK_FETCH = "virtual-chunk-fetch"
    VIRTUAL_CHUNK_MODIFIED = "virtual-chunk-modified"
    INVALID_OBJECT_SIZE = "invalid-object-size"
    SERIALIZATION = "serialization"
    DESERIALIZATION = "deserialization"
    CONFIG_DESERIALIZATION = "config-deserialization"
    INVALID_FILE_FORMAT = "invalid-file-format"
    UNSUPPORTED_SPEC_VERSION = "unsupported-spec-version"
    UNSUPPORTED_OPERATION_FOR_VERSION = "unsupported-operation-for-version"
    SNAPSHOT_TIMESTAMP = "snapshot-timestamp"
    DUPLICATE_SNAPSHOT_ID = "duplicate-snapshot-id"
    CONCURRENCY = "concurrency"
    FLUSH = "flush"
    PARTIAL_VALUES_PANIC = "partial-values-panic"
    CONFLICTING_PATH_NOT_FOUND = "conflicting-path-not-found"
    INCONSISTENT_MANIFESTS = "inconsistent-manifests"
    POISON_LOCK = "poison-lock"
    PICKLE = "pickle"
    UNKNOWN = "unknown"
    COMMIT_OUTCOME_UNKNOWN = "commit-outcome-unknown"
    SESSION_NOT_FOUND = "session-not-found"
    SESSION_COMMITTED = "session-committed"
    SESSION_ABANDONED = "session-abandoned"
    SESSION_EXPIRED = "session-expired"
    SESSION_FENCED = "session-fenced"


class IcechunkError(Exception):
    """The root of the hierarchy.

    Parameters
    ----------
    message
        The attempt, its object, and the remedy.
    kind
        One of `ErrorKind`, or any string; ``"unknown"`` where none is given.
    """

    default_kind: ErrorKind = ErrorKind.UNKNOWN

    def __init__(self, message: str, kind: str | None = None) -> None:
        super().__init__(message)
        self._message = message
        self._kind = str(kind) if kind is not None else str(self.default_kind)

    @property
    def message(self) -> str:
        """The full message."""
        return self._message

    @property
    def kind(self) -> str:
        """The stable identifier of the cause, one of the values of `ErrorKind`."""
        return self._kind

    def __str__(self) -> str:
        return self._message

    def __repr__(self) -> str:
        return f'icechunk.{type(self).__name__}(message="{self._message}", kind="{self._kind}")'

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self._message, self._kind))


class NotFoundError(IcechunkError, KeyError):
    """Something named by the caller does not exist. Check the name, or create it."""

    default_kind = ErrorKind.KEY_NOT_FOUND


class NodeNotFoundError(NotFoundError):
    """No group or array at this path."""

    default_kind = ErrorKind.NODE_NOT_FOUND


class SnapshotNotFoundError(NotFoundError):
    """No snapshot with this id, or none old enough for this time."""

    default_kind = ErrorKind.SNAPSHOT_NOT_FOUND


class RefNotFoundError(NotFoundError):
    """No branch or tag with this name."""

    default_kind = ErrorKind.REF_NOT_FOUND


class SessionNotFoundError(NotFoundError):
    """No persisted session with this id: it was never checkpointed, or ended so long ago that no trace is left."""

    default_kind = ErrorKind.SESSION_NOT_FOUND


class RepositoryNotFoundError(NotFoundError):
    """No repository at this place of the storage. Check bucket and prefix, or create one there.

    A note of the error (``__notes__``) names the objects that were looked for.
    """

    default_kind = ErrorKind.REPOSITORY_NOT_FOUND

    def __init__(self, message: str, kind: str | None = None) -> None:
        super().__init__(message, kind)
        self.add_note("A repository has an object 'repo' (format 2) or a branch 'main' below 'refs/' (format 1).")


class AlreadyExistsError(IcechunkError):
    """The name is taken. Choose another one."""

    default_kind = ErrorKind.NODE_ALREADY_EXISTS


class ReadOnlyError(IcechunkError, ValueError):
    """A write to a read-only session, store, storage or repository; nothing was written.

    A `ValueError`, as zarr's own stores raise.
    """

    default_kind = ErrorKind.READ_ONLY_SESSION


class InvalidInputError(IcechunkError, ValueError):
    """An argument was refused at the boundary; nothing was written."""

    default_kind = ErrorKind.INVALID_KEY


class SessionStateError(IcechunkError):
    """The session, or repository, is in a state that does not allow this operation."""

    default_kind = ErrorKind.NOT_ALLOWED


class SessionEndedError(SessionStateError):
    """A persisted session cannot be written to any more, or not from here.

    The kind says why: ``session-committed``, ``session-abandoned``, ``session-expired`` (its lease had ended, and a
    collection took its chunks) or ``session-fenced`` (another process has resumed it). Nothing was written.

    Attributes
    ----------
    snapshot_id : str or None
        The snapshot that the session became; None unless it was committed.
    """

    default_kind = ErrorKind.SESSION_FENCED

    def __init__(self, message: str, kind: str | None = None, snapshot_id: str | None = None) -> None:
        super().__init__(message, kind)
        self.snapshot_id = snapshot_id

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self._message, self._kind, self.snapshot_id))


class StorageError(IcechunkError):
    """The storage did not carry out a request, after the retries that the settings allow.

    Attributes
    ----------
    refused : bool
        True: this was a write, and the storage refused every try of it (no permission, no space, a method that it does
        not know). Nothing of it was written, nor will be. False does not say whether anything was written.
    unsent : bool
        True: this was a write, and no try of it ever reached the storage (no connection, no folder's lock). Nothing of
        it was written, nor will be; a later try may succeed.
    lost : bool
        True: bytes of objects that had been written before, and were to be made durable, may be gone. The system says
        so once: another try would seem to succeed.
    """

    default_kind = ErrorKind.STORAGE_OTHER
    refused = False
    unsent = False
    lost = False

    def __reduce__(self) -> tuple[Any, ...]:
        state = {name: True for name in ("refused", "unsent", "lost") if getattr(self, name)}
        return (*super().__reduce__(), state) if state else super().__reduce__()


class AccessDeniedError(StorageError):
    """The storage refuses this request to the caller's credentials. Grant the right that is missing, and try again.

    Parameters
    ----------
    right
        ``"read"``, ``"list"``, ``"write"`` or ``"delete"``.
    action
        That right in the service's own words, ``s3:GetObject`` for one; empty where it has none.
    key
        Of the object, relative to the repository's root; for ``"list"`` the beginning of the keys.
    may_be_absent
        Of a read: whether the object may just not exist, since many services say so only to clients with the right to
        list.
    """

    default_kind = ErrorKind.OBJECT_STORE

    def __init__(
        self,
        message: str,
        kind: str | None = None,
        *,
        right: str = "",
        action: str = "",
        key: str = "",
        may_be_absent: bool = False,
    ) -> None:
        super().__init__(message, kind)
        self.right = right
        self.action = action
        self.key = key
        self.may_be_absent = may_be_absent

    def with_message(self, message: str, kind: str | None = None) -> AccessDeniedError:
        """The same refusal with another message, for a larger operation that it ended."""
        return AccessDeniedError(
            message,
            kind or self.kind,
            right=self.right,
            action=self.action,
            key=self.key,
            may_be_absent=self.may_be_absent,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        names = ("right", "action", "key", "may_be_absent", "refused", "unsent")
        return (type(self), (self._message, self._kind), {name: getattr(self, name) for name in names})


class ObjectNotFoundError(StorageError):
    """The storage has no object at this key."""

    default_kind = ErrorKind.OBJECT_NOT_FOUND


class PreconditionFailedError(StorageError):
    """The storage refused a conditional write, for certain, and this write did not land earlier either."""

    default_kind = ErrorKind.OBJECT_STORE


class FormatError(IcechunkError):
    """An object's bytes do not have the form that the format demands: corrupt, truncated, foreign, or hostile."""

    default_kind = ErrorKind.INVALID_FILE_FORMAT


class InternalError(IcechunkError):
    """A bug of ours. Please report it with the message."""


class ConflictError(IcechunkError):
    """The branch moved since the session began; nothing of this commit is visible, nor ever will be.

    Open a new session on the branch and repeat the work there, or rebase.

    Parameters
    ----------
    expected_parent
        Snapshot id that the session is based on.
    actual_parent
        Snapshot id that the branch points to now; None if the branch is gone.
    """

    default_kind = ErrorKind.COMMIT_CONFLICT

    def __init__(
        self,
        expected_parent: str | None = None,
        actual_parent: str | None = None,
        message: str | None = None,
        kind: str | None = None,
    ) -> None:
        if message is None:
            expected, actual = ("None" if id is None else f'Some("{id}")' for id in (expected_parent, actual_parent))
            message = f"Failed to commit, expected parent: {expected}, actual parent: {actual}"
        super().__init__(message, kind)
        self._expected_parent = expected_parent
        self._actual_parent = actual_parent

    @property
    def expected_parent(self) -> str | None:
        """Snapshot id that the session is based on."""
        return self._expected_parent

    @property
    def actual_parent(self) -> str | None:
        """Snapshot id that the branch points to now; None if the branch is gone."""
        return self._actual_parent

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self._expected_parent, self._actual_parent, self._message, self._kind))


def branch_moved(expected: str | None, actual: str | None) -> ConflictError:
    """The error for a commit whose branch has moved, given ids of snapshots, or None where the tip is not known; see
    `ConflictError`."""
    tip = "the branch has moved" if actual is None else f"the branch is at {actual} now"
    return ConflictError(
        expected,
        actual,
        f"cannot commit: the session is based on snapshot {expected}, but {tip}; open a new session on the "
        "branch, or rebase",
    )


def branch_deleted(expected: str) -> ConflictError:
    """The error for a commit whose branch was deleted, given the id of the session's snapshot; see `ConflictError`."""
    return ConflictError(
        expected,
        None,
        f"cannot commit: the branch of the session, which is based on snapshot {expected}, was deleted; create it "
        "again, or take the changes to another branch",
    )


class CommitOutcomeUnknown(IcechunkError):
    """No certain answer came before the deadline or the cancellation: the commit may have landed, or may yet.

    `Repository.settle_async(error.token)` finds out, or makes failure certain.

    Parameters
    ----------
    token
        Opaque, picklable; names the log's slot, the entry's nonce and its snapshots.
    """

    default_kind = ErrorKind.COMMIT_OUTCOME_UNKNOWN

    def __init__(self, message: str, token: Any = None) -> None:
        super().__init__(message)
        self.token = token

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self._message, self.token))
