"""Encoding of the lines (updates) of the ops log, and of the status that one kind of update holds.

Updates of an older repo info are copied into a new one; commits, which nearly all updates are, take no Python step
each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from icechunk.errors import ErrorKind
from icechunk.format.flat.flatbuffers import FlatTable, FlatWriter, Scalar, Table, Value, id_struct, required, u8, u64
from icechunk.format.flat.vectors import LazyTables, Positions, TableColumns, Vectors, any_of, copy_spans, gather, put
from icechunk.format.ids import ObjectId
from icechunk.format.repo.repo_info import (
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

__all__ = ["NEW_COMMIT", "read_status", "read_update", "status_table", "update_table", "write_update_blocks"]

NEW_COMMIT: Final = 10
"""The number of the type that nearly all updates have."""
_ID_SIZE: Final = 12


def status_table(status: Status) -> FlatTable:
    """A status as its table."""
    return FlatTable({0: u8(status.availability), 1: u64(status.set_at_us), 2: status.reason})


def read_status(table: Table) -> Status:
    """Read `status_table` back; `FormatError` if it is corrupt."""
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
    """Read `update_table` back; `FormatError` if it is corrupt, or of an unknown type."""
    number = table.u8(0)
    reader = _CHANGES.get(number)
    if reader is None:
        raise table.buffer.fail(
            f"update type {number} is unknown; use a newer version of the library", ErrorKind.UNSUPPORTED_SPEC_VERSION
        )
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


_TYPE, _CHANGE, _UPDATED_AT, _BACKUP = range(4)
_BRANCH, _SNAPSHOT = range(2)
_ID_BYTES: Final = 12
_FEW = 12
"""Up to this number, writing one by one takes less time than writing columns."""
_UPDATE: Final = np.dtype(
    [
        ("vtable", "<i4"),
        ("updated_at", "<u8"),
        ("change", "<u4"),
        ("backup", "<u4"),
        ("type", "u1"),
        ("padding", "V3"),
        ("change_vtable", "<i4"),
        ("branch", "<u4"),
        ("snapshot", "V12"),
    ]
)
"""Layout of an update's table, which begins 4 bytes before a multiple of 8, followed by the table of its commit."""
_UPDATE_BYTES: Final = 24
_CHANGE_BYTES: Final = 20
_OFFSETS: Final = {_UPDATED_AT: 4, _CHANGE: 12, _BACKUP: 16, _TYPE: 20}


def write_update_blocks(writer: FlatWriter, tables: LazyTables, rows: range, backup: str | None) -> Positions:
    """Write some updates of an older file; returns the position of the table of each.

    Parameters
    ----------
    rows
        Numbers of the updates to write.
    backup
        The backup path of those that have none of their own; None: they have none.

    Raises
    ------
    FormatError
        If the older file is corrupt.
    """
    if len(rows) <= _FEW:
        return np.array([_write_one(writer, tables, row, backup) for row in rows], np.int64)
    numbers = np.arange(rows.start, rows.stop)
    positions = np.zeros(len(rows), np.int64)
    _, columns = tables.columns(numbers)
    commits = columns.numbers(_TYPE, "u1") == NEW_COMMIT
    if any_of(commits):
        positions[commits] = _write_commits(writer, tables, numbers[commits], backup)
    for i in np.flatnonzero(~commits).tolist():
        positions[i] = _write_one(writer, tables, rows[i], backup)
    return positions


def _write_one(writer: FlatWriter, tables: LazyTables, row: int, backup: str | None) -> int:
    update = read_update(tables.table(row))
    if update.backup_path is None and backup is not None:
        update = replace(update, backup_path=backup)
    return writer.table(update_table(update))


def _write_commits(writer: FlatWriter, tables: LazyTables, rows: npt.NDArray[np.intp], backup: str | None) -> Positions:
    buffer, columns = tables.columns(rows)
    changes = columns.column(_CHANGE, 4)
    if changes is None or changes.rows is not None:
        raise buffer.fail("required field 'update_type' is missing")
    buffer.charge_tables(len(rows))
    commits = TableColumns(buffer, changes.positions + gather(buffer, changes.positions, "<u4"))
    branches = commits.vectors(_BRANCH, 1)
    if branches is None or branches.rows is not None:
        raise buffer.fail("required field 'branch' is missing")
    snapshots = commits.column(_SNAPSHOT, _ID_BYTES)
    if snapshots is None or snapshots.rows is not None:
        raise buffer.fail("required field 'new_snap_id' is missing")
    paths = columns.vectors(_BACKUP, 1)
    path_starts, path_bytes, has_path = _backups(paths, len(rows))
    buffer.charge(int(branches.counts.sum() + path_bytes.sum()))
    given = has_path if backup is None else np.ones(len(rows), np.bool_)
    default = b"" if backup is None else backup.encode()
    path_bytes[~has_path] = len(default)

    branch_at = np.full(len(rows), _UPDATE.itemsize, np.int64)
    path_at = branch_at + _string_bytes(branches.counts)
    sizes = (path_at + np.where(given, _string_bytes(path_bytes), 0) + 7) & -8
    starts = np.cumsum(sizes) - sizes
    vtable = writer.vtable(_OFFSETS, _UPDATE_BYTES)
    change_vtable = writer.vtable({_BRANCH: 4, _SNAPSHOT: 8}, _CHANGE_BYTES)
    bare = writer.vtable({slot: at for slot, at in _OFFSETS.items() if slot != _BACKUP}, _UPDATE_BYTES)
    writer.align(8, 4)
    base = len(writer.out)
    block = np.zeros(int(sizes.sum()), np.uint8)

    filled = np.zeros(len(rows), _UPDATE)
    filled["vtable"] = base + starts - np.where(given, vtable, bare)
    filled["updated_at"] = columns.numbers(_UPDATED_AT, "<u8")
    filled["change"] = _UPDATE_BYTES - 12
    filled["backup"] = np.where(given, path_at - 16, 0)
    filled["type"] = NEW_COMMIT
    filled["change_vtable"] = base + starts + _UPDATE_BYTES - change_vtable
    filled["branch"] = branch_at - (_UPDATE_BYTES + 4)
    filled["snapshot"] = gather(buffer, snapshots.positions, f"V{_ID_BYTES}")
    put(block, starts, filled)
    put(block, starts + branch_at, branches.counts.astype("<u4"))
    copy_spans(block, starts + branch_at + 4, buffer.data, branches.starts, branches.counts)
    put(block, (starts + path_at)[given], path_bytes[given].astype("<u4"))
    own = (starts + path_at + 4)[has_path]
    copy_spans(block, own, buffer.data, path_starts[has_path], path_bytes[has_path])
    if default:
        put(block, (starts + path_at + 4)[~has_path], np.full((~has_path).sum(), default, f"V{len(default)}"))
    writer.out += block.data
    positions: Positions = base + starts
    return positions


def _backups(found: Vectors | None, count: int) -> tuple[Positions, Positions, npt.NDArray[np.bool_]]:
    """Position of the backup path of each update, its length, and whether the update has one."""
    starts, counts, present = np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, np.bool_)
    if found is not None:
        rows = slice(None) if found.rows is None else found.rows
        starts[rows], counts[rows], present[rows] = found.starts, found.counts, True
    return starts, counts, present


def _string_bytes(counts: Positions) -> Positions:
    """Size of a string with its length before it and a zero byte after it, rounded up to a multiple of 4."""
    return (counts + 8) & -4
