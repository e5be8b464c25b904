"""The state of a repository as a value, and what a ``repo`` object says of it.

Persistent: a state shares with the one before it whatever did not change, and most of the history stands in the bytes
of the ``repo`` object that it was read from or written to (`icechunk.format.snapshot_graph`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from immutables import Map

from icechunk.errors import RefNotFoundError, SnapshotNotFoundError
from icechunk.format import repo_values as stored
from icechunk.format.ids import ObjectId, encode_id
from icechunk.format.repo_values import ONLINE, RepoInfo, SnapshotRecord, Status
from icechunk.format.snapshot_graph import SnapshotGraph
from icechunk.format.stored_snapshots import StoredSnapshots
from icechunk.format.update_list import UpdateList
from icechunk.refs.updates import UpdateLog

__all__ = [
    "MAIN",
    "RepoState",
    "from_repo_info",
    "initial_state",
    "require_snapshot",
    "resting_on",
    "to_repo_info",
]

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
    sealed: bool = False
    """Whether the log has ended."""
    spec_version: int = 2

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
        """Where a branch points to. Raises `RefNotFoundError`."""
        return _ref(self.branches, "branch", name)

    def tag_target(self, name: str) -> ObjectId:
        """Where a tag points to. Raises `RefNotFoundError`."""
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
    """What a ``repo`` object says of the state.

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
    """The same state in less memory: what a newer ``repo`` object of its history holds stands in that one's bytes.

    Parameters
    ----------
    info
        As read or encoded, and not newer than the state. The ops log begins where its list does.
    written
        The state that was encoded, or None where the object is somebody else's: then the snapshots stay as they are.
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
