"""What the ``repo`` object says of a repository that comes from format 1. Pure.

Format 1 has no ops log, so one is told from what is known: each commit at its time, under the branch that has it
(``main`` before the others, these in the order of their names), a branch or tag 1 ms after the snapshot that it
points to, the deletion of a tag 2 ms after. The order is that of the official library, so both tell the same story.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from icechunk.format import repo_values as stored
from icechunk.format.ids import ObjectId
from icechunk.format.repo_values import RepoInfo, SnapshotRecord, Status
from icechunk.refs.state import MAIN, ONLINE, READ_ONLY

__all__ = ["RefValues", "lineage", "migrated_info"]

Json: TypeAlias = Any
_CREATED_AFTER_US: Final = 1_000
_DELETED_AFTER_US: Final = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RefValues:
    """All refs of a repository of format 1."""

    branches: Mapping[str, ObjectId]
    """Name → tip."""
    tags: Mapping[str, ObjectId]
    """Name → snapshot; without the deleted ones."""
    deleted_tags: Mapping[str, ObjectId | None]
    """Name → snapshot that it pointed to; None where that is not known any more."""


def lineage(records: Mapping[ObjectId, SnapshotRecord], tip: ObjectId) -> Iterator[SnapshotRecord]:
    """A snapshot and its ancestors, youngest first; all of them must be in ``records``."""
    current: ObjectId | None = tip
    while current is not None:
        record = records[current]
        yield record
        current = record.parent


def migrated_info(
    refs: RefValues,
    records: Mapping[ObjectId, SnapshotRecord],
    *,
    config: Json | None,
    now_us: int,
    read_only_reason: str | None = None,
    extra: bytes | None = None,
) -> RepoInfo:
    """The ``repo`` object after the upgrade.

    Parameters
    ----------
    records
        At least the snapshots that branches and tags reach; others are left out.
    now_us
        Time of the upgrade, µs; later than that where the history ends later.
    read_only_reason
        For the object that stands there during the upgrade: its status is read-only, and it does not say yet that it
        was migrated. None: as it is afterwards.
    """
    reached: dict[ObjectId, SnapshotRecord] = {}
    branch_of: dict[ObjectId, str] = {}
    for name in sorted(refs.branches, key=lambda name: (name != MAIN, name)):
        for record in lineage(records, refs.branches[name]):
            if record.id in branch_of:
                break
            branch_of[record.id] = name
            reached[record.id] = record
    for target in refs.tags.values():
        for record in lineage(records, target):
            if record.id in reached:
                break
            reached[record.id] = record
    first_us = min(record.flushed_at_us for record in reached.values())
    told = _ordered(_story(refs, reached, branch_of, records, first_us))
    migrated_us = max(now_us, told[-1].updated_at_us + 1)
    migrated = stored.Update(
        change=stored.RepoMigrated(from_version=1, to_version=2), updated_at_us=migrated_us, backup_path=None
    )
    told.reverse()
    if read_only_reason is None:
        status = Status(availability=ONLINE, set_at_us=first_us, reason=None)
        told.insert(0, migrated)
    else:
        status = Status(availability=READ_ONLY, set_at_us=migrated_us, reason=read_only_reason)
    return RepoInfo(
        spec_version=2,
        tags=dict(refs.tags),
        branches=dict(refs.branches),
        deleted_tags=frozenset(refs.deleted_tags),
        snapshots=reached,
        status=status,
        metadata={},
        updates=tuple(told),
        repo_before_updates=None,
        config=config,
        enabled_feature_flags=None,
        disabled_feature_flags=None,
        extra=extra,
    )


def _story(
    refs: RefValues,
    reached: Mapping[ObjectId, SnapshotRecord],
    branch_of: Mapping[ObjectId, str],
    records: Mapping[ObjectId, SnapshotRecord],
    first_us: int,
) -> Iterator[tuple[int, stored.UpdateChange]]:
    """Changes with their times, those of one time in the order in which they are told."""
    yield first_us, stored.RepoInitialized()
    for id, name in branch_of.items():
        if reached[id].parent is not None:
            yield reached[id].flushed_at_us, stored.NewCommit(branch=name, snapshot=id)
    for name, tip in sorted(refs.branches.items()):
        if name != MAIN:
            yield reached[tip].flushed_at_us + _CREATED_AFTER_US, stored.BranchCreated(name=name)
    for name, target in sorted(refs.tags.items()):
        yield reached[target].flushed_at_us + _CREATED_AFTER_US, stored.TagCreated(name=name)
    for name, gone in sorted(refs.deleted_tags.items()):
        if gone is not None:
            at_us = records[gone].flushed_at_us if gone in records else first_us
            yield at_us + _CREATED_AFTER_US, stored.TagCreated(name=name)
            yield at_us + _DELETED_AFTER_US, stored.TagDeleted(name=name, previous_snapshot=gone)


def _ordered(story: Iterator[tuple[int, stored.UpdateChange]]) -> list[stored.Update]:
    """Oldest first, each later than the one before."""
    updates: list[stored.Update] = []
    last_us = 0
    for time_us, change in sorted(story, key=lambda one: one[0]):
        last_us = max(time_us, last_us + 1)
        updates.append(stored.Update(change=change, updated_at_us=last_us, backup_path=None))
    return updates
