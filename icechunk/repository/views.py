"""Stored values as the public classes show them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Final, assert_never

from icechunk.errors import ErrorKind, InvalidInputError, SessionStateError
from icechunk.format.ids import ObjectId, encode_id
from icechunk.format.repo import repo_info as stored
from icechunk.format.repo.snapshot_graph import SnapshotGraph
from icechunk.format.values import ManifestFile
from icechunk.ops import AnyUpdateType, FeatureFlag, RepoAvailability, RepoStatus, Update, UpdateType
from icechunk.runtime.clock import moment
from icechunk.snapshots import ManifestFileInfo, SnapshotInfo, read_later

__all__ = [
    "feature_flag_id",
    "feature_flags",
    "lineage_infos",
    "manifest_file",
    "repo_status",
    "require_feature",
    "snapshot_info",
    "update",
]

_FLAGS: Final = {"move_node": 3, "create_tag": 4, "delete_tag": 5}
"""Numbers of the format; all of them are on by default."""


def snapshot_info(record: stored.SnapshotRecord) -> SnapshotInfo:
    """A snapshot of the history."""
    return SnapshotInfo(
        id=encode_id(record.id),
        parent_id=None if record.parent is None else encode_id(record.parent),
        written_at=moment(record.flushed_at_us),
        message=record.message,
        metadata=dict(record.metadata),
    )


def lineage_infos(snapshots: SnapshotGraph, id: ObjectId) -> Iterator[SnapshotInfo]:
    """A snapshot and its ancestors, newest first. Those of a file that need no check are read when they are looked at,
    which most of a long history never is."""
    stored = snapshots.stored

    def read(row: int) -> dict[str, Any]:
        own, parent, flushed_at_us, message = stored.plain(row)
        return {
            "id": encode_id(own),
            "parent_id": None if parent is None else encode_id(parent),
            "written_at": moment(flushed_at_us),
            "message": message,
            "metadata": {},
        }

    rows: list[int] = []
    for one in snapshots.lineage_rows(id):
        if isinstance(one, int):
            rows.append(one)
            continue
        yield from read_later(SnapshotInfo, read, rows)
        rows.clear()
        yield snapshot_info(one)
    yield from read_later(SnapshotInfo, read, rows)


def manifest_file(file: ManifestFile) -> ManifestFileInfo:
    """A manifest object of a snapshot."""
    return ManifestFileInfo(
        id=encode_id(file.object_id), size_bytes=file.size_bytes, num_chunk_refs=file.num_chunk_refs
    )


def repo_status(status: stored.Status) -> RepoStatus:
    """The status of a repository; an offline one is shown as read-only."""
    online = status.availability == stored.ONLINE
    return RepoStatus(
        RepoAvailability.online if online else RepoAvailability.read_only, moment(status.set_at_us), status.reason
    )


def feature_flags(enabled: Collection[int], disabled: Collection[int]) -> list[FeatureFlag]:
    """Every feature that can be switched, by name."""
    return [
        FeatureFlag(
            id=number,
            name=name,
            default_enabled=True,
            setting=True if number in enabled else False if number in disabled else None,
        )
        for name, number in _FLAGS.items()
    ]


def feature_flag_id(name: str) -> int:
    """The format's number of a feature. Raises `InvalidInputError` for a name that is none."""
    number = _FLAGS.get(name)
    if number is None:
        raise InvalidInputError(
            f"there is no feature flag {name!r}; the flags are {', '.join(_FLAGS)}", ErrorKind.INVALID_FEATURE_FLAG
        )
    return number


def require_feature(disabled: Collection[int], name: str) -> None:
    """Refuse a feature that the repository's owner has switched off. Raises `SessionStateError`."""
    if _FLAGS[name] in disabled:
        raise SessionStateError(
            f"the feature {name!r} of this repository is switched off; Repository.set_feature_flag switches it on",
            ErrorKind.FEATURE_FLAG_DISABLED,
        )


def update(entry: stored.Update) -> Update:
    """One line of the ops log."""
    return Update(
        kind=_kind(entry.change, entry.updated_at_us),
        updated_at=moment(entry.updated_at_us),
        backup_path=entry.backup_path,
    )


def _kind(change: stored.UpdateChange, entry_time_us: int) -> AnyUpdateType:
    match change:
        case stored.RepoInitialized():
            return UpdateType.RepoInitialized()
        case stored.RepoMigrated(from_version=old, to_version=new):
            return UpdateType.RepoMigrated(old, new)
        case stored.ConfigChanged():
            return UpdateType.ConfigChanged()
        case stored.MetadataChanged():
            return UpdateType.MetadataChanged()
        case stored.TagCreated(name=name):
            return UpdateType.TagCreated(name)
        case stored.TagDeleted(name=name, previous_snapshot=previous):
            return UpdateType.TagDeleted(name, encode_id(previous))
        case stored.BranchCreated(name=name):
            return UpdateType.BranchCreated(name)
        case stored.BranchDeleted(name=name, previous_snapshot=previous):
            return UpdateType.BranchDeleted(name, encode_id(previous))
        case stored.BranchReset(name=name, previous_snapshot=previous):
            return UpdateType.BranchReset(name, encode_id(previous))
        case stored.NewCommit(branch=branch, snapshot=snapshot):
            return UpdateType.NewCommit(branch, encode_id(snapshot))
        case stored.CommitAmended(branch=branch, previous_snapshot=previous, snapshot=snapshot):
            return UpdateType.CommitAmended(branch, encode_id(previous), encode_id(snapshot))
        case stored.NewDetachedSnapshot(snapshot=snapshot):
            return UpdateType.NewDetachedSnapshot(encode_id(snapshot))
        case stored.GCRan():
            return UpdateType.GCRan()
        case stored.ExpirationRan():
            return UpdateType.ExpirationRan()
        case stored.FeatureFlagChanged(id=number, new_value=value, is_set=is_set):
            return UpdateType.FeatureFlagChanged(number, value if is_set else None)
        case stored.StatusChanged(status=status):
            known = status or stored.Status(set_at_us=entry_time_us)
            return UpdateType.RepoStatusChanged(repo_status(known))
        case _:
            assert_never(change)
