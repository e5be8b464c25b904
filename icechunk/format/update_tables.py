"""One line of the ops log as a table, and a status, which one of them holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from icechunk.format.flat_reader import Table, required
from icechunk.format.flat_writer import FlatTable, Scalar, Value, id_struct, u8, u64
from icechunk.format.ids import ObjectId
from icechunk.format.repo_values import (
    BranchCreated,
    BranchDeleted,
    BranchReset,
    CommitAmended,
    ConfigChanged,
    ExpirationRan,
    FeatureFlagChanged,
    GCRan,
    MetadataChanged,
    NewCommit,
    NewDetachedSnapshot,
    RepoInitialized,
    RepoMigrated,
    Status,
    StatusChanged,
    TagCreated,
    TagDeleted,
    Update,
    UpdateChange,
)

__all__ = ["NEW_COMMIT", "read_status", "read_update", "status_table", "update_table"]

NEW_COMMIT: Final = 10
"""The number of the type that nearly all updates have."""
_ID_SIZE: Final = 12


def status_table(status: Status) -> FlatTable:
    """A status as its table."""
    return FlatTable({0: u8(status.availability), 1: u64(status.set_at_us), 2: status.reason})


def read_status(table: Table) -> Status:
    """Read `status_table` back; `FormatError` where it is corrupt."""
    return Status(availability=table.u8(0), set_at_us=table.u64(1), reason=table.string(2))


def update_table(update: Update) -> FlatTable:
    """An update as its table."""
    number, table = _change_table(update.change)
    return FlatTable({0: u8(number), 1: table, 2: u64(update.updated_at_us), 3: update.backup_path})


def _change_table(change: UpdateChange) -> tuple[int, FlatTable]:
    slots: dict[int, Value]
    match change:
        case RepoInitialized():
            number, slots = 1, {}
        case RepoMigrated(from_version=before, to_version=after):
            number, slots = 2, {0: u8(before), 1: u8(after)}
        case ConfigChanged():
            number, slots = 3, {}
        case MetadataChanged():
            number, slots = 4, {}
        case TagCreated(name=name):
            number, slots = 5, {0: name}
        case TagDeleted(name=name, previous_snapshot=previous):
            number, slots = 6, {0: name, 1: id_struct(previous)}
        case BranchCreated(name=name):
            number, slots = 7, {0: name}
        case BranchDeleted(name=name, previous_snapshot=previous):
            number, slots = 8, {0: name, 1: id_struct(previous)}
        case BranchReset(name=name, previous_snapshot=previous):
            number, slots = 9, {0: name, 1: id_struct(previous)}
        case NewCommit(branch=branch, snapshot=snapshot):
            number, slots = NEW_COMMIT, {0: branch, 1: id_struct(snapshot)}
        case CommitAmended(branch=branch, previous_snapshot=previous, snapshot=snapshot):
            number, slots = 11, {0: branch, 1: id_struct(previous), 2: id_struct(snapshot)}
        case NewDetachedSnapshot(snapshot=snapshot):
            number, slots = 12, {0: id_struct(snapshot)}
        case GCRan():
            number, slots = 13, {}
        case ExpirationRan():
            number, slots = 14, {}
        case FeatureFlagChanged(id=id, new_value=new_value, is_set=is_set):
            number, slots = 15, {0: Scalar("H", id), 1: u8(new_value), 2: u8(is_set)}
        case StatusChanged(status=status):
            number, slots = 16, {0: status_table(status)}
    return number, FlatTable(slots)


def read_update(table: Table) -> Update:
    """Read `update_table` back; `FormatError` where it is corrupt, or of an unknown type."""
    number = table.u8(0)
    reader = _CHANGES.get(number)
    if reader is None:
        raise table.buffer.fail(f"update type {number} is unknown; use a newer version of the library")
    value = required(table.table(1), table, "update_type")
    return Update(change=reader(value), updated_at_us=table.u64(2), backup_path=table.string(3))


def _id(table: Table, slot: int, field: str) -> ObjectId:
    return ObjectId(required(table.inline(slot, _ID_SIZE), table, field))


def _name(table: Table) -> str:
    return required(table.string(0), table, "name")


_CHANGES: Final[Mapping[int, Callable[[Table], UpdateChange]]] = {
    1: lambda table: RepoInitialized(),
    2: lambda table: RepoMigrated(from_version=table.u8(0), to_version=table.u8(1)),
    3: lambda table: ConfigChanged(),
    4: lambda table: MetadataChanged(),
    5: lambda table: TagCreated(name=_name(table)),
    6: lambda table: TagDeleted(name=_name(table), previous_snapshot=_id(table, 1, "previous_snap_id")),
    7: lambda table: BranchCreated(name=_name(table)),
    8: lambda table: BranchDeleted(name=_name(table), previous_snapshot=_id(table, 1, "previous_snap_id")),
    9: lambda table: BranchReset(name=_name(table), previous_snapshot=_id(table, 1, "previous_snap_id")),
    NEW_COMMIT: lambda table: NewCommit(branch=_name(table), snapshot=_id(table, 1, "new_snap_id")),
    11: lambda table: CommitAmended(
        branch=_name(table),
        previous_snapshot=_id(table, 1, "previous_snap_id"),
        snapshot=_id(table, 2, "new_snap_id"),
    ),
    12: lambda table: NewDetachedSnapshot(snapshot=_id(table, 0, "new_snap_id")),
    13: lambda table: GCRan(),
    14: lambda table: ExpirationRan(),
    15: lambda table: FeatureFlagChanged(id=table.u16(0), new_value=bool(table.u8(1)), is_set=bool(table.u8(2))),
    16: lambda table: StatusChanged(status=read_status(required(table.table(0), table, "status"))),
}
