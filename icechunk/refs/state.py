"""The state of a repository as the fold of its events.

`apply` checks an event's preconditions and returns the next state, or raises and leaves the old one as it was.
It is total, pure and deterministic: two readers that fold the same bytes never differ. Costs grow with
the logarithm of the history, except for expirations and collections, which look at all of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from immutables import Map

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
)
from icechunk.format import repo_values as stored
from icechunk.format.ids import ObjectId, encode_id
from icechunk.format.repo_values import OFFLINE, ONLINE, READ_ONLY, SnapshotRecord, Status
from icechunk.refs import events as e
from icechunk.refs.releasing import reparented
from icechunk.refs.repo_state import (
    MAIN,
    RepoState,
    from_repo_info,
    initial_state,
    require_snapshot,
    resting_on,
    to_repo_info,
)
from icechunk.refs.storable import require_storable, require_time

__all__ = [
    "MAIN",
    "OFFLINE",
    "ONLINE",
    "READ_ONLY",
    "RepoState",
    "apply",
    "from_repo_info",
    "initial_state",
    "require_snapshot",
    "resting_on",
    "to_repo_info",
    "try_apply_all",
]


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
        could not hold (`icechunk.refs.storable`).
    """
    _require_open(state, event)
    require_storable(event)
    now = max(time_us, state.last_time_us + 1)
    require_time("time of the event", now)
    match event:
        case e.Void():
            return state
        case e.Sealed():
            return replace(state, sealed=True)
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
                    "cannot save the configuration: it was changed by somebody else since it was read; read it again",
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
        case e.CollectionRan(cutoff_us=cutoff_us):
            change = stored.GCRan()
            state = _collected(state, cutoff_us)
        case e.RepositoryMigrated(from_version=old, to_version=new):
            change = stored.RepoMigrated(from_version=old, to_version=new)
        case _:
            assert_never(event)
    update = stored.Update(change=change, updated_at_us=now, backup_path=None)
    # In format 1 only the parents that somebody asked for are known, so the graph is not one that a file could hold.
    snapshots = state.snapshots.compacted() if state.spec_version >= 2 else state.snapshots
    return replace(state, snapshots=snapshots, updates=state.updates.pushed(update), last_time_us=now)


def try_apply_all(
    state: RepoState, events: tuple[e.Event, ...], *, time_us: int, since_us: int | None
) -> RepoState | None:
    """The state after all of the events, each applied after the ones before; None if one does not apply (rule 4).

    Raises `FormatError` where the state stands in a file that turns out to be corrupt: whether an event applies is not
    known then.
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
        raise ConflictError(encode_id(expected) if expected else None, encode_id(tip))


def _require_new_snapshot(state: RepoState, snapshot: SnapshotRecord, since_us: int | None) -> None:
    if snapshot.id in state.snapshots:
        raise InvalidInputError(f"snapshot {encode_id(snapshot.id)} exists already", ErrorKind.DUPLICATE_SNAPSHOT_ID)
    if state.gc_cutoff_us and (since_us is None or since_us < state.gc_cutoff_us):
        raise SessionStateError(
            "cannot commit: garbage collected since the session's first upload may have taken some of its files; "
            "repeat the work in a new session",
            ErrorKind.COMMIT_NOT_ALLOWED,
        )
    if snapshot.parent is None:
        return
    _require_younger(snapshot, require_snapshot(state, snapshot.parent))


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
        raise ConflictError(encode_id(snapshot.parent) if snapshot.parent else None, encode_id(replaced.parent))


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
    for gone in released:
        require_snapshot(state, gone)
        snapshots = snapshots.delete(gone)
    parents = dict(snapshots.parents())
    if released & {*branches.values(), *tags.values()} or any(
        parent is not None and parent not in parents for parent in parents.values()
    ):
        raise ConflictError(
            None,
            None,
            "cannot expire: a branch, tag or snapshot that is new since the history was read needs what would go; "
            "run it again",
            ErrorKind.REPO_INFO_UPDATED,
        )
    return replace(state, snapshots=snapshots, branches=branches, tags=tags, deleted_tags=deleted)


def _collected(state: RepoState, cutoff_us: int) -> RepoState:
    """Keep what a branch or tag reaches, the first snapshot, and younger detached snapshots."""
    reached = state.reachable()
    released = {
        record.id
        for record in state.snapshots.values()
        if record.id not in reached and record.parent is not None and record.flushed_at_us < cutoff_us
    }
    snapshots = state.snapshots
    for change in reparented(snapshots, released, onto_first=False):
        record = replace(
            snapshots[change.id], parent=change.parent, pruned_ancestor_tx_logs=change.pruned_ancestor_tx_logs
        )
        snapshots = snapshots.set(change.id, record)
    for gone in released:
        snapshots = snapshots.delete(gone)
    return replace(state, snapshots=snapshots, gc_cutoff_us=max(state.gc_cutoff_us, cutoff_us))
