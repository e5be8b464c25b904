"""The state of a repository: a value, the fold of its events, and its conversion from and to a ``repo`` object. Pure.

`apply` checks an event's preconditions and returns the next state, or raises and leaves the old one unchanged.
It is total and deterministic: two readers that fold the same bytes never differ. Costs grow with
the logarithm of the history, except for expirations and collections, which look at all of it.

States are persistent: a state shares with the one before it everything that did not change, and most of the history is
kept in the bytes of the ``repo`` object that it was read from or written to (`icechunk.format.repo.snapshot_graph`).
Adding an update to the ops log costs O(log n), and older states keep their own ops log.

An event that a ``repo`` object cannot hold is refused (`require_storable`): once acknowledged, it would stop all
checkpoints for good.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final, TypeAlias, assert_never

from icechunk.errors import (
    AlreadyExistsError,
    ConflictError,
    ErrorKind,
    FormatError,
    IcechunkError,
    InvalidInputError,
    ReadOnlyError,
    RefNotFoundError,
    SessionStateError,
    SnapshotNotFoundError,
    branch_moved,
)
from icechunk.format.ids import ObjectId, encode_id, object_id_from_text
from icechunk.format.metadata import flexible
from icechunk.format.repo import repo_info as stored
from icechunk.format.repo.repo_info import OFFLINE, ONLINE, READ_ONLY, RepoInfo, SnapshotRecord, Status, Update
from icechunk.format.repo.snapshot_graph import ChildrenLeftError, SnapshotGraph
from icechunk.format.repo.stored_snapshots import StoredSnapshots
from icechunk.format.repo.updates import UpdateList
from icechunk.log.repository import events as e
from icechunk.log.repository.events import Reparented
from icechunk.runtime.late_dataclass import dataclass, replace
from icechunk.runtime.persistent_map import Map

__all__ = [
    "LAST_TIME_US",
    "MAIN",
    "OFFLINE",
    "ONLINE",
    "READ_ONLY",
    "RepoState",
    "UpdateLog",
    "apply",
    "from_repo_info",
    "initial_state",
    "is_rewritten_as",
    "reparented",
    "require_snapshot",
    "require_storable",
    "require_time",
    "resting_on",
    "rewritten_as",
    "to_repo_info",
    "try_apply_all",
]

_MANY: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UpdateLog:
    """Updates in the order in which they happened; iterates newest first."""

    stored: UpdateList
    """The older ones, most of them in the bytes of a file."""
    fresh: Map[int, Update]
    """Updates since, by running number from 0."""

    @staticmethod
    def of(newest_first: Iterable[Update] = ()) -> UpdateLog:
        """A log with these updates, given newest first."""
        return UpdateLog(stored=UpdateList.of(newest_first), fresh=Map())

    def __len__(self) -> int:
        return len(self.fresh) + len(self.stored)

    def __iter__(self) -> Iterator[Update]:
        yield from self._fresh()
        yield from self.stored

    def _fresh(self) -> Iterator[Update]:
        return (self.fresh[i] for i in range(len(self.fresh) - 1, -1, -1))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UpdateLog) and self.newest() == other.newest()

    def __hash__(self) -> int:
        return hash(tuple(self))

    def pushed(self, update: Update) -> UpdateLog:
        """The same log with one more, the newest."""
        log = replace(self, fresh=self.fresh.set(len(self.fresh), update))
        # An update as an object takes some hundred bytes, in a file's form a few dozen.
        return log if len(log.fresh) < _MANY else UpdateLog.of(log.newest().packed(_MANY))

    def resting_on(self, stored: UpdateList) -> UpdateLog:
        """The log that continues what a newer file holds of it."""
        newer = self.newer_than(stored[0].updated_at_us if stored else -1)
        return UpdateLog(stored=stored, fresh=Map(enumerate(newer[::-1])))

    def newest(self, count: int | None = None) -> UpdateList:
        """The newest updates, so many at most; None: all. Costs what has been pushed since they were stored."""
        everything = self.stored.after(self._fresh()) if self.fresh else self.stored
        return everything if count is None else everything[:count]

    def newer_than(self, time_us: int) -> tuple[Update, ...]:
        """Updates made after that time (exclusive), newest first; costs no more than what it returns."""
        found: list[Update] = []
        for update in self:
            if update.updated_at_us <= time_us:
                break
            found.append(update)
        return tuple(found)


Json: TypeAlias = Any

MAIN = "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class RepoState:
    """Everything about a repository but the contents of its files."""

    branches: Map[str, ObjectId]
    """Name → tip. ``main`` is always there."""
    tags: Map[str, ObjectId]
    """Name → snapshot."""
    deleted_tags: Map[str, None]
    """Names that no tag may ever have again (a set)."""
    snapshots: SnapshotGraph
    """The graph: every snapshot that exists, by id; each one's parent is in it too."""
    status: Status
    """The real status, also where the ``repo`` object shows read-only for the sake of other readers."""
    metadata: Map[str, Json]
    config: Json | None
    """The persisted configuration, snake_case keys; None where none is."""
    enabled_feature_flags: frozenset[int] | None
    disabled_feature_flags: frozenset[int] | None
    updates: UpdateLog
    """The newest part of the ops log, newest first; older ones are in ``repo_before_updates``."""
    repo_before_updates: str | None
    """Bare name of the backup under ``overwritten/`` with the updates before those; None: there are none."""
    last_time_us: int
    """Time of the newest event, µs; the next one is later."""
    gc_cutoff_us: int = 0
    """Store time, µs: a commit with files that may be older than this is invalid."""
    seal: e.Sealed | None = None
    """The event that ended the log; None: it goes on."""
    spec_version: int = 2

    @property
    def sealed(self) -> bool:
        """Whether the log has ended."""
        return self.seal is not None

    def ancestry(self, snapshot: ObjectId) -> Iterator[SnapshotRecord]:
        """A snapshot and its ancestors, newest first.

        Raises
        ------
        SnapshotNotFoundError
            If it is not in the graph.
        """
        require_snapshot(self, snapshot)
        yield from self.snapshots.lineage(snapshot)

    def tips(self) -> set[ObjectId]:
        """The snapshots that branches and tags point to."""
        return {*self.branches.values(), *self.tags.values()}

    def reachable(self) -> set[ObjectId]:
        """Every snapshot that a branch or tag reaches."""
        parents = dict(self.snapshots.parents())
        reached: set[ObjectId] = set()
        for start in self.tips():
            current: ObjectId | None = start
            while current is not None and current not in reached and current in parents:
                reached.add(current)
                current = parents[current]
        return reached

    def branch_tip(self, name: str) -> ObjectId:
        """The snapshot that a branch points to. Raises `RefNotFoundError`."""
        return _ref(self.branches, "branch", name)

    def tag_target(self, name: str) -> ObjectId:
        """The snapshot that a tag points to. Raises `RefNotFoundError`."""
        return _ref(self.tags, "tag", name)


def _ref(refs: Map[str, ObjectId], what: str, name: str) -> ObjectId:
    found = refs.get(name)
    if found is None:
        raise RefNotFoundError(
            f"ref not found: no {what} {name!r} in this repository; check the name, or list those that exist"
        )
    return found


def require_snapshot(state: RepoState, snapshot: ObjectId) -> SnapshotRecord:
    """The record of a snapshot of the graph. Raises `SnapshotNotFoundError`."""
    record = state.snapshots.get(snapshot)
    if record is None:
        raise SnapshotNotFoundError(
            f"snapshot id not found: {encode_id(snapshot)} is not in this repository; it never existed, was expired, "
            "or was collected"
        )
    return record


def initial_state(root: SnapshotRecord, *, time_us: int, config: Json | None, spec_version: int = 2) -> RepoState:
    """The state of a repository that was just created with this first snapshot."""
    initialized = stored.Update(change=stored.RepoInitialized(), updated_at_us=time_us, backup_path=None)
    return RepoState(
        branches=Map({MAIN: root.id}),
        tags=Map(),
        deleted_tags=Map(),
        snapshots=SnapshotGraph.of({root.id: root}),
        status=Status(availability=ONLINE, set_at_us=time_us, reason=None),
        metadata=Map(),
        config=config,
        enabled_feature_flags=None,
        disabled_feature_flags=None,
        updates=UpdateLog.of((initialized,)),
        repo_before_updates=None,
        last_time_us=time_us,
        spec_version=spec_version,
    )


def from_repo_info(
    info: RepoInfo,
    *,
    status: Status | None = None,
    gc_cutoff_us: int = 0,
    last_time_us: int | None = None,
) -> RepoState:
    """The state that a ``repo`` object describes.

    Parameters
    ----------
    status
        The real one, where the object shows another; None: the object's own.
    last_time_us
        Time of the last event folded into it; None: that of its newest update.
    """
    newest = info.updates[0].updated_at_us if info.updates else 0
    return RepoState(
        branches=Map(info.branches),
        tags=Map(info.tags),
        deleted_tags=Map(dict.fromkeys(info.deleted_tags)),
        snapshots=SnapshotGraph.of(info.snapshots),
        status=status if status is not None else info.status,
        metadata=Map(info.metadata),
        config=info.config,
        enabled_feature_flags=info.enabled_feature_flags,
        disabled_feature_flags=info.disabled_feature_flags,
        updates=UpdateLog.of(info.updates),
        repo_before_updates=info.repo_before_updates,
        last_time_us=max(newest, last_time_us or 0),
        gc_cutoff_us=gc_cutoff_us,
        spec_version=info.spec_version,
    )


def to_repo_info(
    state: RepoState,
    *,
    status: Status | None = None,
    updates: Sequence[stored.Update] | None = None,
    repo_before_updates: str | None = None,
    extra: bytes | None = None,
) -> RepoInfo:
    """The state as a ``repo`` object holds it.

    Parameters
    ----------
    status
        What to show instead of the real status; None: the real one.
    updates
        The ops log to write, newest first, with ``repo_before_updates`` for what came before; None: the state's own.
    """
    return RepoInfo(
        spec_version=state.spec_version,
        tags=dict(state.tags),
        branches=dict(state.branches),
        deleted_tags=frozenset(state.deleted_tags),
        snapshots=state.snapshots,
        status=status if status is not None else state.status,
        metadata=dict(state.metadata),
        updates=state.updates.newest() if updates is None else updates,
        repo_before_updates=state.repo_before_updates if updates is None else repo_before_updates,
        config=state.config,
        enabled_feature_flags=state.enabled_feature_flags,
        disabled_feature_flags=state.disabled_feature_flags,
        extra=extra,
    )


def resting_on(state: RepoState, info: RepoInfo, written: RepoState | None) -> RepoState:
    """The same state in less memory: the part that a newer ``repo`` object of its history holds is kept as its bytes.

    Parameters
    ----------
    info
        As read or encoded, and not newer than the state. The ops log begins where its list does.
    written
        The state that was encoded, or None if another client wrote the object: then the snapshots are not replaced.
    """
    snapshots = state.snapshots
    if written is not None and isinstance(info.snapshots, StoredSnapshots):
        snapshots = snapshots.based_on(info.snapshots, written.snapshots)
    return replace(
        state,
        snapshots=snapshots,
        updates=state.updates.resting_on(UpdateList.of(info.updates)),
        repo_before_updates=info.repo_before_updates,
    )


def reparented(
    snapshots: SnapshotGraph, released: AbstractSet[ObjectId], *, onto_first: bool
) -> tuple[Reparented, ...]:
    """Survivors whose parent is released, each with its new parent.

    The transaction logs of the ancestors in between go on a survivor's list, oldest first and before those already
    there, so that diffs and rebases still know what every commit changed.

    Parameters
    ----------
    snapshots
        The whole graph, with those that leave it.
    onto_first
        Whether the new parent is the first snapshot, as after an expiration by the official library; else it is the
        nearest remaining ancestor, as after a collection.
    """
    if not released:
        return ()
    changes: list[Reparented] = []
    known = snapshots.pruned_transactions()
    for id, ancestors in snapshots.children_of(released):
        above, parent = _passed(ancestors, released, onto_first=onto_first)
        pruned = list(known.get(id, ())[::-1])
        if known:
            for one in above:
                pruned += (one, *known.get(one, ())[::-1])
        else:
            pruned += above
        changes.append(Reparented(id=id, parent=parent, pruned_ancestor_tx_logs=tuple(pruned[::-1])))
    return tuple(changes)


def _passed(
    ancestors: Iterator[ObjectId], released: AbstractSet[ObjectId], *, onto_first: bool
) -> tuple[list[ObjectId], ObjectId | None]:
    """The ancestors that a survivor loses, nearest first, and its new parent; parameters as `reparented`."""
    if onto_first:
        passed = list(ancestors)
        return passed, None if passed[-1] in released else passed.pop()
    passed = []
    for id in ancestors:
        if id not in released:
            return passed, id
        passed.append(id)
    return passed, None


LAST_TIME_US: Final = 253_402_300_799_999_999
"""The last µs of the year 9999, after which calendars end."""


def require_time(what: str, time_us: int) -> None:
    """Refuse a time (µs since 1970) that no calendar has. Raises `InvalidInputError`."""
    _require_number(what, time_us, 0, LAST_TIME_US)


def require_storable(event: e.Event) -> None:
    """Refuse an event with a value that the ``repo`` object has no room for.

    Raises
    ------
    InvalidInputError
        A number out of range, text that is no UTF-8, or metadata or configuration that FlexBuffers cannot hold.
    """
    match event:
        case e.CommitAdded(branch=name, snapshot=snapshot) | e.CommitAmended(branch=name, snapshot=snapshot):
            _require_texts(name)
            _require_snapshot(snapshot)
        case e.DetachedSnapshotAdded(snapshot=snapshot):
            _require_snapshot(snapshot)
        case e.BranchCreated(name=name) | e.BranchReset(name=name) | e.BranchDeleted(name=name):
            _require_texts(name)
        case e.TagCreated(name=name) | e.TagDeleted(name=name):
            _require_texts(name)
        case e.ConfigReplaced(config=config):
            _require_json("configuration", config)
        case e.MetadataReplaced(metadata=metadata) | e.MetadataUpdated(metadata=metadata):
            _require_metadata(metadata)
        case e.StatusSet(availability=availability, reason=reason):
            if availability not in (ONLINE, READ_ONLY, OFFLINE):
                raise InvalidInputError(
                    f"availability {availability} is not 0 online, 1 read-only or 2 offline", ErrorKind.INVALID_SETTING
                )
            if reason is not None:
                _require_texts(reason)
        case e.FeatureFlagSet(flag=flag):
            _require_number("feature flag", flag, 0, (1 << 16) - 1)
        case e.RepositoryMigrated(from_version=old, to_version=new):
            _require_number("format version", old, 0, (1 << 8) - 1)
            _require_number("format version", new, 0, (1 << 8) - 1)
        case e.CollectionRan(cutoff_us=cutoff_us):
            require_time("cutoff of the collection", cutoff_us)
        case e.ExpirationRan(deleted_branches=branches, deleted_tags=tags):
            _require_texts(*branches, *tags)
        case e.SnapshotsRewritten() | e.Sealed() | e.Void():
            pass
        case _:
            assert_never(event)


def _require_snapshot(snapshot: SnapshotRecord) -> None:
    require_time("time of the snapshot", snapshot.flushed_at_us)
    _require_texts(snapshot.message)
    _require_metadata(snapshot.metadata)


def _require_number(what: str, value: int, first: int, last: int) -> None:
    if not first <= value <= last:
        raise InvalidInputError(f"{what} {value} is out of range: {first} to {last}", ErrorKind.INVALID_SETTING)


def _require_texts(*texts: str) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidInputError(f"text {text!r} cannot be written as UTF-8", ErrorKind.SERIALIZATION) from None


def _require_metadata(metadata: Mapping[str, Json]) -> None:
    for name, value in metadata.items():
        _require_texts(name)
        if "\0" in name:
            # The format could, entries cannot: NUL marks their reserved keys.
            raise InvalidInputError(f"metadata key {name!r} holds a NUL character", ErrorKind.SERIALIZATION)
        _require_json("metadata", value)


def _require_json(what: str, value: Json) -> None:
    try:
        flexible(value)
    except InvalidInputError as error:
        raise InvalidInputError(f"{what} cannot be stored: {error}", ErrorKind.SERIALIZATION) from error


def apply(state: RepoState, event: e.Event, *, time_us: int, since_us: int | None) -> RepoState:
    """The state after an event, if its preconditions hold.

    Parameters
    ----------
    time_us
        Time written in the entry; the event gets it, or 1 µs more than the last event's where that is later (rule 13).
    since_us
        The entry's: store time not later than the Last-Modified of anything it adds.

    Raises
    ------
    ConflictError
        The branch is not where the event expects it.
    AlreadyExistsError
        The name is taken (kinds ``branch-already-exists``, ``tag-already-exists``, ``tag-previously-deleted``).
    RefNotFoundError, SnapshotNotFoundError
        A name, or a snapshot of the graph, that is not there.
    ReadOnlyError
        The repository's status allows nothing but changes of status (kind ``read-only-repository``).
    SessionStateError
        ``main`` would be deleted, the first snapshot amended, files are older than the last collection's cutoff,
        or the log is sealed.
    InvalidInputError
        A new snapshot whose time is not later than its parent's, or whose id exists; or a value that a checkpoint
        could not hold (`icechunk.log.repository.state`).
    """
    _require_open(state, event)
    require_storable(event)
    now = max(time_us, state.last_time_us + 1)
    require_time("time of the event", now)
    last = now
    further: tuple[stored.UpdateChange, ...] = ()
    match event:
        case e.Void():
            return state
        case e.Sealed():
            return replace(state, seal=event)
        case e.CommitAdded(branch=branch, snapshot=snapshot):
            _require_tip(state, branch, snapshot.parent)
            _require_new_snapshot(state, snapshot, since_us)
            change: stored.UpdateChange = stored.NewCommit(branch=branch, snapshot=snapshot.id)
            state = replace(
                state,
                branches=state.branches.set(branch, snapshot.id),
                snapshots=state.snapshots.set(snapshot.id, snapshot),
            )
        case e.CommitAmended(branch=branch, previous=previous, snapshot=snapshot):
            _require_tip(state, branch, previous)
            _require_same_parent(state, previous, snapshot)
            _require_new_snapshot(state, snapshot, since_us)
            change = stored.CommitAmended(branch=branch, previous_snapshot=previous, snapshot=snapshot.id)
            state = replace(
                state,
                branches=state.branches.set(branch, snapshot.id),
                snapshots=state.snapshots.set(snapshot.id, snapshot),
            )
        case e.DetachedSnapshotAdded(snapshot=snapshot):
            _require_new_snapshot(state, snapshot, since_us)
            change = stored.NewDetachedSnapshot(snapshot=snapshot.id)
            state = replace(state, snapshots=state.snapshots.set(snapshot.id, snapshot))
        case e.BranchCreated(name=name, snapshot=target):
            if name in state.branches:
                raise AlreadyExistsError(
                    f"branch already exists: {name!r} points to {encode_id(state.branches[name])}; choose another "
                    "name, or reset it",
                    ErrorKind.BRANCH_ALREADY_EXISTS,
                )
            require_snapshot(state, target)
            change = stored.BranchCreated(name=name)
            state = replace(state, branches=state.branches.set(name, target))
        case e.BranchReset(name=name, snapshot=target, expected=expected):
            tip = state.branch_tip(name)
            if expected is not None and expected != tip:
                raise ConflictError(
                    encode_id(expected),
                    encode_id(tip),
                    f"branch update conflict: cannot reset branch {name!r}: expected at {encode_id(expected)}, it is "
                    f"at {encode_id(tip)}; look at it again",
                    ErrorKind.BRANCH_UPDATE_CONFLICT,
                )
            require_snapshot(state, target)
            change = stored.BranchReset(name=name, previous_snapshot=tip)
            state = replace(state, branches=state.branches.set(name, target))
        case e.BranchDeleted(name=name):
            if name == MAIN:
                raise SessionStateError("branch 'main' cannot be deleted", ErrorKind.CANNOT_DELETE_MAIN)
            change = stored.BranchDeleted(name=name, previous_snapshot=state.branch_tip(name))
            state = replace(state, branches=state.branches.delete(name))
        case e.TagCreated(name=name, snapshot=target):
            _require_fresh_tag(state, name)
            require_snapshot(state, target)
            change = stored.TagCreated(name=name)
            state = replace(state, tags=state.tags.set(name, target))
        case e.TagDeleted(name=name):
            change = stored.TagDeleted(name=name, previous_snapshot=state.tag_target(name))
            state = replace(state, tags=state.tags.delete(name), deleted_tags=state.deleted_tags.set(name, None))
        case e.ConfigReplaced(config=config, expected=expected_config, check=check):
            if check and expected_config != state.config:
                raise ConflictError(
                    None,
                    None,
                    "cannot save the configuration: another client changed it since it was read; read it again",
                    ErrorKind.CONFIG_UPDATED,
                )
            change = stored.ConfigChanged()
            state = replace(state, config=config)
        case e.MetadataReplaced(metadata=metadata):
            change = stored.MetadataChanged()
            state = replace(state, metadata=Map(metadata))
        case e.MetadataUpdated(metadata=metadata):
            change = stored.MetadataChanged()
            state = replace(state, metadata=state.metadata.update(metadata))
        case e.StatusSet(availability=availability, reason=reason):
            status = Status(availability=availability, set_at_us=now, reason=reason)
            change = stored.StatusChanged(status=status)
            state = replace(state, status=status)
        case e.FeatureFlagSet(flag=flag, value=value):
            change = stored.FeatureFlagChanged(id=flag, new_value=bool(value), is_set=value is not None)
            state = _with_flag(state, flag, value)
        case e.ExpirationRan():
            change = stored.ExpirationRan()
            state = _expired(state, event)
        case e.SnapshotsRewritten():
            change, *others = _amendments(state, event) or [stored.GCRan()]
            further = tuple(others)
            last = now + max(len(further), len(event.replaced))
            require_time("time of the event", last)
            state = _rewritten(state, event, now, since_us)
        case e.CollectionRan(cutoff_us=cutoff_us):
            change = stored.GCRan()
            state = _collected(state, cutoff_us)
        case e.RepositoryMigrated(from_version=old, to_version=new):
            change = stored.RepoMigrated(from_version=old, to_version=new)
        case _:
            assert_never(event)
    updates = state.updates
    for i, each in enumerate((change, *further)):
        updates = updates.pushed(stored.Update(change=each, updated_at_us=now + i, backup_path=None))
    # In format 1 only the parents that were requested are known, so the graph is not one that a file could hold.
    snapshots = state.snapshots.compacted() if state.spec_version >= 2 else state.snapshots
    return replace(state, snapshots=snapshots, updates=updates, last_time_us=last)


def try_apply_all(
    state: RepoState, events: tuple[e.Event, ...], *, time_us: int, since_us: int | None
) -> RepoState | None:
    """The state after all of the events, each applied after the ones before; None if one does not apply (rule 4).

    Raises `FormatError` if the file that holds part of the state is corrupt: whether an event applies is not known
    then.
    """
    try:
        for event in events:
            state = apply(state, event, time_us=time_us, since_us=since_us)
    except FormatError:
        raise
    except IcechunkError:
        return None
    return state


def _require_open(state: RepoState, event: e.Event) -> None:
    if state.sealed:
        raise SessionStateError(
            "this repository's log is sealed: it is being converted; open the repository again", ErrorKind.NOT_ALLOWED
        )
    if state.status.availability != ONLINE and not isinstance(event, e.StatusSet | e.Sealed | e.Void):
        reason = f": {state.status.reason}" if state.status.reason else ""
        raise ReadOnlyError(
            f"the repository status is {'read-only' if state.status.availability == READ_ONLY else 'offline'}"
            f"{reason}; set its status to online first",
            ErrorKind.READ_ONLY_REPOSITORY,
        )


def _require_tip(state: RepoState, branch: str, expected: ObjectId | None) -> None:
    tip = state.branches.get(branch)
    if tip is None:
        raise RefNotFoundError(f"cannot commit: branch {branch!r} does not exist (any more)")
    if tip != expected:
        raise branch_moved(encode_id(expected) if expected else None, encode_id(tip))


def _require_new_snapshot(state: RepoState, snapshot: SnapshotRecord, since_us: int | None) -> None:
    _require_new_id(state, snapshot.id)
    _require_fresh_files(state, since_us)
    if snapshot.parent is None:
        return
    _require_younger(snapshot, require_snapshot(state, snapshot.parent))


def _require_new_id(state: RepoState, id: ObjectId) -> None:
    if id in state.snapshots:
        raise InvalidInputError(f"snapshot {encode_id(id)} exists already", ErrorKind.DUPLICATE_SNAPSHOT_ID)


def _require_fresh_files(state: RepoState, since_us: int | None) -> None:
    if state.gc_cutoff_us and (since_us is None or since_us < state.gc_cutoff_us):
        raise SessionStateError(
            "cannot commit: a collection since the session's first upload may have deleted some of its files; "
            "repeat the work in a new session",
            ErrorKind.COMMIT_NOT_ALLOWED,
        )


def _require_younger(snapshot: SnapshotRecord, parent: SnapshotRecord) -> None:
    if snapshot.flushed_at_us <= parent.flushed_at_us:
        raise InvalidInputError(
            f"snapshot {encode_id(snapshot.id)} is not younger than its parent {encode_id(parent.id)} "
            f"({snapshot.flushed_at_us} µs, {parent.flushed_at_us} µs)",
            ErrorKind.SNAPSHOT_TIMESTAMP,
        )


def _require_same_parent(state: RepoState, previous: ObjectId, snapshot: SnapshotRecord) -> None:
    replaced = require_snapshot(state, previous)
    if replaced.parent is None:
        raise SessionStateError("the first snapshot cannot be amended", ErrorKind.NO_AMEND_FOR_INITIAL_COMMIT)
    if replaced.parent != snapshot.parent:
        parent = None if snapshot.parent is None else encode_id(snapshot.parent)
        raise ConflictError(
            parent,
            encode_id(replaced.parent),
            f"cannot amend snapshot {encode_id(previous)}: its parent is {encode_id(replaced.parent)}, not {parent}, "
            "because of an expiration meanwhile; amend again",
        )


def _require_fresh_tag(state: RepoState, name: str) -> None:
    if name in state.tags:
        raise AlreadyExistsError(
            f"tag already exists: {name!r} points to {encode_id(state.tags[name])}; choose another name",
            ErrorKind.TAG_ALREADY_EXISTS,
        )
    if name in state.deleted_tags:
        raise AlreadyExistsError(
            f"cannot create tag {name!r}: a tag of that name was deleted, and names of tags are never reused; "
            "choose another name",
            ErrorKind.TAG_PREVIOUSLY_DELETED,
        )


def _with_flag(state: RepoState, flag: int, value: bool | None) -> RepoState:
    enabled = (state.enabled_feature_flags or frozenset()) - {flag}
    disabled = (state.disabled_feature_flags or frozenset()) - {flag}
    if value is True:
        enabled |= {flag}
    elif value is False:
        disabled |= {flag}
    return replace(state, enabled_feature_flags=enabled, disabled_feature_flags=disabled)


def _expired(state: RepoState, event: e.ExpirationRan) -> RepoState:
    released = frozenset(event.released)
    snapshots, branches, tags, deleted = state.snapshots, state.branches, state.tags, state.deleted_tags
    for name in frozenset(event.deleted_branches):
        if name == MAIN:
            raise SessionStateError("branch 'main' cannot be deleted", ErrorKind.CANNOT_DELETE_MAIN)
        state.branch_tip(name)
        branches = branches.delete(name)
    for name in frozenset(event.deleted_tags):
        state.tag_target(name)
        tags, deleted = tags.delete(name), deleted.set(name, None)
    for change in event.reparented:
        record = require_snapshot(state, change.id)
        if change.parent is not None:
            # Also keeps history free of circles.
            _require_younger(record, require_snapshot(state, change.parent))
        snapshots = snapshots.set(
            change.id,
            replace(record, parent=change.parent, pruned_ancestor_tx_logs=change.pruned_ancestor_tx_logs),
        )
    try:
        snapshots = snapshots.released(released)
        is_needed = not released.isdisjoint({*branches.values(), *tags.values()})
    except KeyError as missing:
        require_snapshot(state, missing.args[0])
        raise
    except ChildrenLeftError:
        is_needed = True
    if is_needed:
        raise ConflictError(
            None,
            None,
            "cannot expire: a branch, tag or snapshot that is new since the history was read needs an expired one; "
            "run it again",
            ErrorKind.REPO_INFO_UPDATED,
        )
    return replace(state, snapshots=snapshots, branches=branches, tags=tags, deleted_tags=deleted)


def _amendments(state: RepoState, event: e.SnapshotsRewritten) -> list[stored.UpdateChange]:
    """The lines of the ops log: each branch whose tip was replaced was amended."""
    new = dict(event.replaced)
    return [
        stored.CommitAmended(branch=name, previous_snapshot=tip, snapshot=new[tip])
        for name, tip in sorted(state.branches.items())
        if tip in new
    ]


REWRITTEN_AS: Final = "rewritten_as"
"""Key, under ``__icechunk`` in the metadata of a replaced snapshot that stays, of the new snapshot's id, as text."""
_OURS: Final = "__icechunk"


def rewritten_as(state: RepoState, id: ObjectId) -> ObjectId:
    """The snapshot that has a snapshot's content now: itself, or its replacement while the graph still names it."""
    for _ in range(len(state.snapshots)):
        text = _replacement(state, id)
        if text is None:
            break
        id = object_id_from_text(text)
    return id


def is_rewritten_as(state: RepoState, id: ObjectId, other: ObjectId) -> bool:
    """Whether a collection replaced a snapshot, which the graph still names, by this other one of the same content."""
    return _replacement(state, id) == encode_id(other)


def _replacement(state: RepoState, id: ObjectId) -> str | None:
    record = state.snapshots.get(id)
    noted = None if record is None else record.metadata.get(_OURS)
    text = noted.get(REWRITTEN_AS) if isinstance(noted, Mapping) else None
    return text if isinstance(text, str) else None


def _rewritten(state: RepoState, event: e.SnapshotsRewritten, now_us: int, since_us: int | None) -> RepoState:
    new = dict(event.replaced)
    if len(set(new.values())) != len(event.replaced) or len(new) != len(event.replaced):
        raise InvalidInputError("a snapshot is rewritten twice, or two of them as one", ErrorKind.DUPLICATE_SNAPSHOT_ID)
    _require_fresh_files(state, since_us)
    for previous, id in event.replaced:
        if require_snapshot(state, previous).parent is None:
            raise SessionStateError("the first snapshot cannot be replaced", ErrorKind.NO_AMEND_FOR_INITIAL_COMMIT)
        _require_new_id(state, id)
    before, snapshots = state.snapshots, state.snapshots
    for id, parent in before.parents():
        if parent in new and id not in new:
            snapshots = snapshots.set(id, replace(before[id], parent=new[parent]))
    # Ancestors first: each one stays younger than its parent.
    replaced = sorted((before[id] for id in new), key=lambda record: (record.flushed_at_us, record.id))
    for i, record in enumerate(replaced):
        parent = record.parent
        assert parent is not None
        instead = replace(
            record, id=new[record.id], parent=new.get(parent, parent), metadata=_noted(record.metadata, None)
        )
        snapshots = snapshots.set(instead.id, instead)
        if event.keep:
            metadata = _noted(record.metadata, encode_id(instead.id))
            snapshots = snapshots.set(record.id, replace(record, flushed_at_us=now_us + i, metadata=metadata))
        else:
            snapshots = snapshots.delete(record.id)
    branches, tags = state.branches, state.tags
    for name, tip in state.branches.items():
        if tip in new:
            branches = branches.set(name, new[tip])
    for name, target in state.tags.items():
        if target in new:
            tags = tags.set(name, new[target])
    return replace(state, snapshots=snapshots, branches=branches, tags=tags)


def _noted(metadata: Mapping[str, Json], id: str | None) -> dict[str, Json]:
    """The metadata of a snapshot that was replaced by the one of this id, or, None, of one that was not."""
    known = metadata.get(_OURS)
    ours = {key: value for key, value in known.items() if key != REWRITTEN_AS} if isinstance(known, Mapping) else {}
    if id is not None:
        ours[REWRITTEN_AS] = id
    others = {key: value for key, value in metadata.items() if key != _OURS or not isinstance(known, Mapping)}
    return {**others, _OURS: ours} if ours else others


def _collected(state: RepoState, cutoff_us: int) -> RepoState:
    """Keep what a branch or tag reaches, the first snapshot, and younger detached snapshots."""
    reached = state.reachable()
    released = {
        id
        for id, time_us in state.snapshots.times()
        if time_us < cutoff_us and id not in reached and state.snapshots[id].parent is not None
    }
    snapshots = state.snapshots
    for change in reparented(snapshots, released, onto_first=False):
        record = replace(
            snapshots[change.id], parent=change.parent, pruned_ancestor_tx_logs=change.pruned_ancestor_tx_logs
        )
        snapshots = snapshots.set(change.id, record)
    snapshots = snapshots.without(released) if released else snapshots
    return replace(state, snapshots=snapshots, gc_cutoff_us=max(state.gc_cutoff_us, cutoff_us))
