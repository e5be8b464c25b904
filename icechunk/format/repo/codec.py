"""The repo info object: encode and decode (format 2 only; format 1 has ref files instead)."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Final, NamedTuple

from icechunk.errors import ErrorKind, FormatError, InvalidInputError
from icechunk.format.envelope import FileType, seal, unseal
from icechunk.format.flat import flexbuffers
from icechunk.format.flat.flatbuffers import (
    Buffer,
    FlatTable,
    FlatWriter,
    Items,
    Run,
    Table,
    Value,
    Written,
    required,
    u8,
    utf8,
)
from icechunk.format.ids import ObjectId
from icechunk.format.metadata import metadata_from_tables, metadata_tables
from icechunk.format.repo.repo_info import (
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
from icechunk.format.repo.snapshot_encoding import SnapshotRows
from icechunk.format.repo.snapshot_graph import SnapshotGraph
from icechunk.format.repo.stored_snapshots import SnapshotRun, StoredSnapshots
from icechunk.format.repo.update_encoding import read_status, status_table
from icechunk.format.repo.updates import UpdateList

__all__ = [
    "OFFLINE",
    "ONLINE",
    "READ_ONLY",
    "BranchCreated",
    "BranchDeleted",
    "BranchReset",
    "CommitAmended",
    "ConfigChanged",
    "EncodedRepo",
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
    "encode_and_keep",
    "encode_repo",
]

# Slots of the table Repo.
_SPEC_VERSION, _TAGS, _BRANCHES, _DELETED_TAGS, _SNAPSHOTS, _STATUS, _METADATA = range(7)
_UPDATES, _BEFORE_UPDATES, _CONFIG, _ENABLED, _DISABLED, _EXTRA = range(7, 13)

_FEW = 12
_LEVEL = -1
"""Compression level of zstd. Every opening unpacks this file, and writers write it again and again: this level takes
half (reading) and a third (writing) of the time of level 3, for 7 % more bytes."""


class EncodedRepo(NamedTuple):
    """A repo info and its file."""

    data: bytes
    """The whole file."""
    info: RepoInfo
    """Equal to the encoded one; unless they are few, snapshots and updates stay in the file's bytes instead of one
    object each."""


def encode_repo(info: RepoInfo, level: int = _LEVEL) -> bytes:
    """The whole file of a repo info.

    Parameters
    ----------
    info
        Its tags and branches must point to its snapshots; a parent that is not among them becomes "no parent".
    level
        Compression level of zstd.

    Raises
    ------
    InvalidInputError
        If a branch or tag points to a snapshot that is not there, or a value cannot be encoded.
    FormatError
        If parts of it are copied from an older file, which is corrupt.
    """
    return seal(FileType.REPO_INFO, 2, _payload(info)[0], level)


def encode_and_keep(info: RepoInfo, level: int = _LEVEL) -> EncodedRepo:
    """As `encode_repo`; also returns the same repo info in a form that takes the least memory."""
    written, rows, update_run = _payload(info)
    payload = bytes(written)
    if len(info.snapshots) <= _FEW and len(info.updates) <= _FEW:
        return EncodedRepo(seal(FileType.REPO_INFO, 2, payload, level), info)
    root = Buffer(payload, "repo info").root()
    snapshots = _stored_snapshots(root, rows.run())
    updates = _stored_updates(root, update_run, info.updates[0] if info.updates else None)
    return EncodedRepo(seal(FileType.REPO_INFO, 2, payload, level), replace(info, snapshots=snapshots, updates=updates))


def _payload(info: RepoInfo) -> tuple[bytearray, SnapshotRows, Run]:
    """The payload, its snapshots, and where its updates are."""
    rows = SnapshotGraph.of(info.snapshots).rows()
    update_runs: list[Run] = []

    def write_updates(writer: FlatWriter) -> int:
        position, run = UpdateList.of(info.updates).write_run(writer)
        update_runs.append(run)
        return position

    root: dict[int, Value] = {
        _SPEC_VERSION: u8(info.spec_version),
        _TAGS: _refs_vector("tag", info.tags, rows),
        _BRANCHES: _refs_vector("branch", info.branches, rows),
        _DELETED_TAGS: sorted(info.deleted_tags, key=_utf8),
        _SNAPSHOTS: Written(rows.write),
        _STATUS: status_table(info.status),
        _METADATA: metadata_tables(info.metadata, 2),
        _UPDATES: Written(write_updates),
        _BEFORE_UPDATES: info.repo_before_updates,
        _CONFIG: None if info.config is None else flexbuffers.dumps(info.config),
        _ENABLED: _flags(info.enabled_feature_flags),
        _DISABLED: _flags(info.disabled_feature_flags),
        _EXTRA: info.extra,
    }
    return FlatWriter().finish(FlatTable(root)), rows, update_runs[0]


_REF: Final = struct.Struct("<iIII")
"""A branch's or tag's table (its vtable, its name, the number of its snapshot), and the length of the name."""


_ZEROS: Final = [bytes(count) for count in range(5)]


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _refs_vector(what: str, refs: Mapping[str, ObjectId], rows: SnapshotRows) -> Written:
    """The vector of the tables of branches or tags, which is written again with every change of the repository."""
    names = sorted([(utf8(name), name) for name in refs])
    # Many refs may point to one snapshot: it is searched for once.
    number_of = {target: rows.number(target) for target in set(refs.values())}
    numbers = [number_of[refs[name]] for _, name in names]
    for (_, name), number in zip(names, numbers, strict=True):
        if number < 0:
            raise InvalidInputError(
                f"cannot encode the repo info: {what} {name!r} points to a snapshot that is not in it",
                ErrorKind.SERIALIZATION,
            )

    def write(writer: FlatWriter) -> int:
        out = writer.out
        writer.align(4)
        start = len(out)
        out += bytes(4 + 4 * len(names))
        words = [len(names)]
        vtable = writer.vtable({0: 4, 1: 8}, _REF.size - 4) if names else 0
        writer.align(4)
        pieces: list[bytes] = []
        at, field, pack, fixed = len(out), start + 4, _REF.pack, _REF.size
        for (name, _), number in zip(names, numbers, strict=True):
            words.append(at - field)
            # The name follows its table, 8 bytes behind the field that points to it; then come one to four zeros.
            size = len(name)
            padding = 4 - size % 4
            pieces += (pack(at - vtable, 8, number, size), name, _ZEROS[padding])
            at += fixed + size + padding
            field += 4
        if pieces:
            # All but the first zero behind the last name would be padding of a next table.
            pieces[-1] = _ZEROS[1]
        out += b"".join(pieces)
        out[start : start + 4 * len(words)] = struct.pack(f"<{len(words)}I", *words)
        return start

    return Written(write)


def _flags(flags: frozenset[int] | None) -> Items | None:
    if flags is None:
        return None
    return Items(b"".join(flag.to_bytes(2, "little") for flag in sorted(flags)), len(flags), 2)


def decode_repo(data: bytes) -> RepoInfo:
    """Read a repo info.

    Snapshots and updates are decoded when they are accessed; a corrupt one raises `FormatError` at that time. The first
    lookup of a snapshot checks that ids are unique and parents exist.

    Raises
    ------
    FormatError
        If the file is not a repo info, or is corrupt.
    """
    version, payload = unseal(data, FileType.REPO_INFO, what="repo info")
    if version < 2:
        raise FormatError("cannot read repo info: it claims spec version 1, which has none")
    root = Buffer(payload, "repo info").root()
    snapshots = _stored_snapshots(root)
    config = root.blob(_CONFIG)
    return RepoInfo(
        spec_version=root.u8(_SPEC_VERSION, 2),
        tags=_refs(root, _TAGS, "tags", snapshots),
        branches=_refs(root, _BRANCHES, "branches", snapshots),
        deleted_tags=frozenset(required(root.strings(_DELETED_TAGS), root, "deleted_tags")),
        snapshots=snapshots,
        status=read_status(required(root.table(_STATUS), root, "status")),
        metadata=metadata_from_tables(root.tables(_METADATA) or (), 2),
        updates=_stored_updates(root),
        repo_before_updates=root.string(_BEFORE_UPDATES),
        config=None if config is None else flexbuffers.loads(config),
        enabled_feature_flags=_flag_set(root.items(_ENABLED, 2)),
        disabled_feature_flags=_flag_set(root.items(_DISABLED, 2)),
        extra=root.blob(_EXTRA),
    )


def _stored_snapshots(root: Table, run: SnapshotRun | None = None) -> StoredSnapshots:
    return StoredSnapshots(root.buffer, *required(root.vector(_SNAPSHOTS, 4), root, "snapshots"), run)


def _stored_updates(root: Table, run: Run | None = None, newest: Update | None = None) -> UpdateList:
    return UpdateList.stored(root.buffer, *required(root.vector(_UPDATES, 4), root, "latest_updates"), run, newest)


def _refs(root: Table, slot: int, field: str, snapshots: StoredSnapshots) -> dict[str, ObjectId]:
    found: dict[str, ObjectId] = {}
    for table in required(root.tables(slot), root, field):
        name = required(table.string(0), table, "name")
        index = table.u32(1)
        if index >= len(snapshots):
            raise root.buffer.fail(f"{name!r} of its {field} points to snapshot number {index} of {len(snapshots)}")
        if name in found:
            raise root.buffer.fail(f"{name!r} is in its {field} twice")
        found[name] = snapshots.id(index)
    return found


def _flag_set(items: bytes | None) -> frozenset[int] | None:
    if items is None:
        return None
    return frozenset(int.from_bytes(items[i : i + 2], "little") for i in range(0, len(items), 2))
