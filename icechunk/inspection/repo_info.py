"""The repository's state, described as the contents of its ``repo`` object."""

from __future__ import annotations

from typing import Any, Final, assert_never

from icechunk.format import repo_values as stored
from icechunk.format.envelope import FileHeader
from icechunk.format.ids import encode_id
from icechunk.format.repo_values import RepoInfo, SnapshotRecord, Update, UpdateChange
from icechunk.inspection.json_values import Json, describe_header, json_value, spec_version, timestamp

__all__ = ["describe_repo_info"]

_AVAILABILITY: Final = {stored.ONLINE: "Online", stored.READ_ONLY: "ReadOnly", stored.OFFLINE: "Offline"}


def describe_repo_info(header: FileHeader, info: RepoInfo) -> Json:
    """Refs by name, every snapshot by id (all ascending), and the newest part of the ops log, newest first."""
    described: Json = {
        "header": describe_header(header),
        "spec_version": spec_version(info.spec_version),
        "branches": {name: encode_id(id) for name, id in sorted(info.branches.items())},
        "tags": {name: encode_id(id) for name, id in sorted(info.tags.items())},
        "deleted_tags": sorted(info.deleted_tags),
        "snapshots": [_snapshot(record) for _, record in sorted(info.snapshots.items())],
        "metadata": json_value(dict(info.metadata)),
        "latest_updates": [_update(update) for update in info.updates],
    }
    if info.repo_before_updates is not None:
        described["repo_before_updates"] = info.repo_before_updates
    return described


def _snapshot(record: SnapshotRecord) -> Json:
    return {
        "id": encode_id(record.id),
        **({} if record.parent is None else {"parent_id": encode_id(record.parent)}),
        "flushed_at": timestamp(record.flushed_at_us),
        "message": record.message,
        "metadata": json_value(dict(record.metadata)),
    }


def _update(update: Update) -> Json:
    name, fields = _change(update.change)
    return {
        "update_type": {"type": name, **fields},
        "updated_at": timestamp(update.updated_at_us),
        **({} if update.backup_path is None else {"backup_path": update.backup_path}),
    }


def _change(change: UpdateChange) -> tuple[str, dict[str, Any]]:
    match change:
        case stored.RepoInitialized():
            return "RepoInitializedUpdate", {}
        case stored.RepoMigrated(from_version=old, to_version=new):
            return "RepoMigratedUpdate", {"from_version": spec_version(old), "to_version": spec_version(new)}
        case stored.ConfigChanged():
            return "ConfigChangedUpdate", {}
        case stored.MetadataChanged():
            return "MetadataChangedUpdate", {}
        case stored.TagCreated(name=name):
            return "TagCreatedUpdate", {"name": name}
        case stored.TagDeleted(name=name, previous_snapshot=previous):
            return "TagDeletedUpdate", {"name": name, "previous_snap_id": encode_id(previous)}
        case stored.BranchCreated(name=name):
            return "BranchCreatedUpdate", {"name": name}
        case stored.BranchDeleted(name=name, previous_snapshot=previous):
            return "BranchDeletedUpdate", {"name": name, "previous_snap_id": encode_id(previous)}
        case stored.BranchReset(name=name, previous_snapshot=previous):
            return "BranchResetUpdate", {"name": name, "previous_snap_id": encode_id(previous)}
        case stored.NewCommit(branch=branch, snapshot=snapshot):
            return "NewCommitUpdate", {"branch": branch, "new_snap_id": encode_id(snapshot)}
        case stored.CommitAmended(branch=branch, previous_snapshot=previous, snapshot=snapshot):
            return "CommitAmendedUpdate", {
                "branch": branch,
                "previous_snap_id": encode_id(previous),
                "new_snap_id": encode_id(snapshot),
            }
        case stored.NewDetachedSnapshot(snapshot=snapshot):
            return "NewDetachedSnapshotUpdate", {"new_snap_id": encode_id(snapshot)}
        case stored.GCRan():
            return "GCRanUpdate", {}
        case stored.ExpirationRan():
            return "ExpirationRanUpdate", {}
        case stored.FeatureFlagChanged(id=id, new_value=value, is_set=is_set):
            return "FeatureFlagChanged", {"id": id, "new_value": value if is_set else None}
        case stored.StatusChanged(status=status):
            return "RepoStatusChangedUpdate", {"status": _status(status)}
        case _:
            assert_never(change)


def _status(status: stored.Status) -> Json:
    return {
        "availability": _AVAILABILITY[status.availability],
        "limited_availability_reason": status.reason,
        "set_at": timestamp(status.set_at_us),
    }
