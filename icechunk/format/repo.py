"""The repo info object: encode and decode (format 2 only; format 1 has ref files instead)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

from icechunk.errors import FormatError, InvalidInputError
from icechunk.format import flexbuffers
from icechunk.format.envelope import FileType, seal, unseal
from icechunk.format.flat_reader import Buffer, Table, required
from icechunk.format.flat_writer import FlatTable, FlatWriter, Items, Scalar, Value, Written, id_struct, u8, u64
from icechunk.format.ids import ObjectId, encode_id
from icechunk.format.metadata import metadata_from_tables, metadata_tables
from icechunk.format.repo_values import (
    OFFLINE,
    ONLINE,
    READ_ONLY,
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
    RepoInfo,
    RepoInitialized,
    RepoMigrated,
    SnapshotRecord,
    Status,
    StatusChanged,
    TagCreated,
    TagDeleted,
    Update,
    UpdateChange,
)

__all__ = [
    "OFFLINE",
    "ONLINE",
    "READ_ONLY",
    "BranchCreated",
    "BranchDeleted",
    "BranchReset",
    "CommitAmended",
    "ConfigChanged",
    "ExpirationRan",
    "FeatureFlagChanged",
    "GCRan",
    "MetadataChanged",
    "NewCommit",
    "NewDetachedSnapshot",
    "RepoInfo",
    "RepoInitialized",
    "RepoMigrated",
    "SnapshotRecord",
    "Status",
    "StatusChanged",
    "TagCreated",
    "TagDeleted",
    "Update",
    "UpdateChange",
    "decode_repo",
    "encode_repo",
]

# Slots of the table Repo.
_SPEC_VERSION, _TAGS, _BRANCHES, _DELETED_TAGS, _SNAPSHOTS, _STATUS, _METADATA = range(7)
_UPDATES, _BEFORE_UPDATES, _CONFIG, _ENABLED, _DISABLED, _EXTRA = range(7, 13)

_ID_SIZE: Final = 12
_NO_PARENT: Final = -1


def encode_repo(info: RepoInfo, level: int = 3) -> bytes:
    """The whole file of a repo info.

    Parameters
    ----------
    info
        Tags, branches and parents must be among its snapshots; a parent that is not becomes "no parent".
    level
        Of zstd.

    Raises
    ------
    InvalidInputError
        If a branch or tag points to a snapshot that is not there, or a value cannot be encoded.
    """
    ids = sorted(info.snapshots)
    index = {id: i for i, id in enumerate(ids)}
    root: dict[int, Value] = {
        _SPEC_VERSION: u8(info.spec_version),
        _TAGS: _ref_tables("tag", info.tags, index),
        _BRANCHES: _ref_tables("branch", info.branches, index),
        _DELETED_TAGS: sorted(info.deleted_tags, key=_utf8),
        _SNAPSHOTS: Written(partial(_write_snapshots, [info.snapshots[id] for id in ids], index)),
        _STATUS: _status_table(info.status),
        _METADATA: metadata_tables(info.metadata, 2),
        _UPDATES: [_update_table(update) for update in info.updates],
        _BEFORE_UPDATES: info.repo_before_updates,
        _CONFIG: None if info.config is None else flexbuffers.dumps(info.config),
        _ENABLED: _flags(info.enabled_feature_flags),
        _DISABLED: _flags(info.disabled_feature_flags),
        _EXTRA: info.extra,
    }
    return seal(FileType.REPO_INFO, 2, FlatWriter().finish(FlatTable(root)), level)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _ref_tables(what: str, refs: Mapping[str, ObjectId], index: Mapping[ObjectId, int]) -> list[FlatTable]:
    tables = []
    for name in sorted(refs, key=_utf8):
        position = index.get(refs[name])
        if position is None:
            raise InvalidInputError(
                f"cannot encode the repo info: {what} {name!r} points to a snapshot that is not in it"
            )
        tables.append(FlatTable({0: name, 1: Scalar("I", position)}))
    return tables


def _write_snapshots(records: Sequence[SnapshotRecord], index: Mapping[ObjectId, int], writer: FlatWriter) -> int:
    """The vector of snapshots.

    Every checkpoint writes all of history: those that have no metadata, as most have none, are laid out by hand, in
    a tenth of the time that a table takes.
    """
    writer.align(4)
    out = writer.out
    vector = len(out)
    out += len(records).to_bytes(4, "little") + bytes(4 * len(records))
    positions = []
    plain = writer.vtable({0: 20, 1: 12, 2: 4, 3: 16, 4: 32}, 36)
    for i, record in enumerate(records):
        if record.metadata or record.pruned_ancestor_tx_logs:
            start = writer.table(_snapshot_table(record, index))
        else:
            # The 8-byte field follows the first word of the table.
            out += bytes((4 - len(out)) % 8)
            start = len(out)
            try:
                message = record.message.encode()
                parent = _NO_PARENT if record.parent is None else index.get(record.parent, _NO_PARENT)
                # The message is behind the table and the empty vector of metadata, to which they point.
                out += _PLAIN.pack(start - plain, record.flushed_at_us, parent, 24, record.id, 4, 0, len(message))
            except (struct.error, UnicodeEncodeError) as error:
                raise InvalidInputError(f"cannot encode snapshot {encode_id(record.id)}: {error}") from error
            out += message
            out += b"\0"
        positions.append(start - (vector + 4 + 4 * i))
    struct.pack_into(f"<{len(records)}I", out, vector + 4, *positions)
    return vector


_PLAIN: Final = struct.Struct("<iQiI12sIII")
"""A snapshot's table: its vtable, time, parent, message, id, metadata; then an empty vector, and a string's length."""


def _snapshot_table(record: SnapshotRecord, index: Mapping[ObjectId, int]) -> FlatTable:
    parent = _NO_PARENT if record.parent is None else index.get(record.parent, _NO_PARENT)
    pruned = record.pruned_ancestor_tx_logs
    return FlatTable(
        {
            0: id_struct(record.id),
            1: Scalar("i", parent),
            2: u64(record.flushed_at_us),
            3: record.message,
            4: metadata_tables(record.metadata, 2),
            5: Items(b"".join(pruned), len(pruned)) if pruned else None,
        }
    )


def _status_table(status: Status) -> FlatTable:
    return FlatTable({0: u8(status.availability), 1: u64(status.set_at_us), 2: status.reason})


def _flags(flags: frozenset[int] | None) -> Items | None:
    if flags is None:
        return None
    return Items(b"".join(flag.to_bytes(2, "little") for flag in sorted(flags)), len(flags), 2)


def _update_table(update: Update) -> FlatTable:
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
            number, slots = 10, {0: branch, 1: id_struct(snapshot)}
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
            number, slots = 16, {0: _status_table(status)}
    return number, FlatTable(slots)


def decode_repo(data: bytes) -> RepoInfo:
    """Read a repo info.

    Raises
    ------
    FormatError
        If the file is not one, or is corrupt.
    """
    version, payload = unseal(data, FileType.REPO_INFO, what="repo info")
    if version < 2:
        raise FormatError("cannot read repo info: it claims spec version 1, which has none")
    buffer = Buffer(payload, "repo info")
    root = buffer.root()
    tables = required(root.tables(_SNAPSHOTS), root, "snapshots")
    snapshots = _snapshots(buffer, list(tables))
    ids = list(snapshots)
    config = root.blob(_CONFIG)
    return RepoInfo(
        spec_version=root.u8(_SPEC_VERSION, 2),
        tags=_refs(root, _TAGS, "tags", ids),
        branches=_refs(root, _BRANCHES, "branches", ids),
        deleted_tags=frozenset(required(root.strings(_DELETED_TAGS), root, "deleted_tags")),
        snapshots=snapshots,
        status=_status(required(root.table(_STATUS), root, "status")),
        metadata=metadata_from_tables(root.tables(_METADATA) or (), 2),
        updates=tuple(_update(table) for table in required(root.tables(_UPDATES), root, "latest_updates")),
        repo_before_updates=root.string(_BEFORE_UPDATES),
        config=None if config is None else flexbuffers.loads(config),
        enabled_feature_flags=_flag_set(root.items(_ENABLED, 2)),
        disabled_feature_flags=_flag_set(root.items(_DISABLED, 2)),
        extra=root.blob(_EXTRA),
    )


def _id(table: Table, slot: int, field: str) -> ObjectId:
    return ObjectId(required(table.inline(slot, _ID_SIZE), table, field))


def _snapshots(buffer: Buffer, tables: list[Table]) -> dict[ObjectId, SnapshotRecord]:
    ids = [_id(table, 0, "id") for table in tables]
    records: dict[ObjectId, SnapshotRecord] = {}
    for id, table in zip(ids, tables, strict=True):
        if id in records:
            raise buffer.fail(f"snapshot {id.hex()} stands in it twice")
        parent = table.i32(1)
        if not _NO_PARENT <= parent < len(ids):
            raise buffer.fail(f"snapshot {id.hex()} has parent number {parent} of {len(ids)}")
        pruned = table.items(5, _ID_SIZE) or b""
        records[id] = SnapshotRecord(
            id=id,
            parent=None if parent == _NO_PARENT else ids[parent],
            flushed_at_us=table.u64(2),
            message=required(table.string(3), table, "message"),
            metadata=metadata_from_tables(table.tables(4) or (), 2),
            pruned_ancestor_tx_logs=tuple(ObjectId(pruned[i : i + _ID_SIZE]) for i in range(0, len(pruned), _ID_SIZE)),
        )
    return records


def _refs(root: Table, slot: int, field: str, ids: list[ObjectId]) -> dict[str, ObjectId]:
    found: dict[str, ObjectId] = {}
    for table in required(root.tables(slot), root, field):
        name = required(table.string(0), table, "name")
        index = table.u32(1)
        if index >= len(ids):
            raise root.buffer.fail(f"{name!r} of its {field} points to snapshot number {index} of {len(ids)}")
        if name in found:
            raise root.buffer.fail(f"{name!r} stands in its {field} twice")
        found[name] = ids[index]
    return found


def _status(table: Table) -> Status:
    return Status(availability=table.u8(0), set_at_us=table.u64(1), reason=table.string(2))


def _flag_set(items: bytes | None) -> frozenset[int] | None:
    if items is None:
        return None
    return frozenset(int.from_bytes(items[i : i + 2], "little") for i in range(0, len(items), 2))


def _update(table: Table) -> Update:
    number = table.u8(0)
    reader = _CHANGES.get(number)
    if reader is None:
        raise table.buffer.fail(f"update type {number} is unknown; use a newer version of the library")
    value = required(table.table(1), table, "update_type")
    return Update(change=reader(value), updated_at_us=table.u64(2), backup_path=table.string(3))


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
    10: lambda table: NewCommit(branch=_name(table), snapshot=_id(table, 1, "new_snap_id")),
    11: lambda table: CommitAmended(
        branch=_name(table),
        previous_snapshot=_id(table, 1, "previous_snap_id"),
        snapshot=_id(table, 2, "new_snap_id"),
    ),
    12: lambda table: NewDetachedSnapshot(snapshot=_id(table, 0, "new_snap_id")),
    13: lambda table: GCRan(),
    14: lambda table: ExpirationRan(),
    15: lambda table: FeatureFlagChanged(id=table.u16(0), new_value=bool(table.u8(1)), is_set=bool(table.u8(2))),
    16: lambda table: StatusChanged(status=_status(required(table.table(0), table, "status"))),
}
