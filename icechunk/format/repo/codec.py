"""The repo info object: encode and decode (format 2 only; format 1 has ref files instead)."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

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
    all_utf8,
    required,
    u8,
)
from icechunk.format.flat.vectors import copy_spans, put
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
from icechunk.runtime.late_dataclass import replace

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


_REF: Final = np.dtype([("vtable", "<i4"), ("name_at", "<u4"), ("number", "<u4"), ("name_bytes", "<u4")])
"""A branch's or tag's table (its vtable, its name, the number of its snapshot), and the length of the name, which
follows, 8 bytes behind the field that points to it. Then come one to four zeros."""
_NAME_AT: Final = 8
_ONE_REF: Final = struct.Struct("<iIII")
"""The same, of one of a few."""
_ZEROS: Final = [bytes(count) for count in range(5)]
_FEW_REFS: Final = 24
"""Up to so many take less time one by one than as columns."""


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _refs_vector(what: str, refs: Mapping[str, ObjectId], rows: SnapshotRows) -> Written:
    """The vector of the tables of branches or tags, which is written again with every change of the repository."""
    # Texts are in the order of their UTF-8.
    names = sorted(refs)
    raw = all_utf8(names)
    # Many refs may point to one snapshot: it is searched for once.
    number_of = {target: rows.number(target) for target in set(refs.values())}
    numbers = [number_of[refs[name]] for name in names]
    if min(numbers, default=0) < 0:
        name = names[next(i for i, number in enumerate(numbers) if number < 0)]
        raise InvalidInputError(
            f"cannot encode the repo info: {what} {name!r} points to a snapshot that is not in it",
            ErrorKind.SERIALIZATION,
        )
    encode = _refs_one_by_one if len(names) <= _FEW_REFS else _refs_as_columns

    def write(writer: FlatWriter) -> int:
        out = writer.out
        writer.align(4)
        start = len(out)
        out += bytes(4 + 4 * len(names))
        vtable = writer.vtable({0: 4, 1: 8}, _REF.itemsize - 4) if names else 0
        writer.align(4)
        tables, offsets = encode(raw, numbers, len(out), vtable, start + 4)
        out += tables
        out[start : start + 4 + 4 * len(names)] = len(names).to_bytes(4, "little") + offsets
        return start

    return Written(write)


def _refs_one_by_one(
    names: Sequence[bytes], numbers: Sequence[int], at: int, vtable: int, field: int
) -> tuple[bytes, bytes]:
    """The tables, from position ``at`` on, and the offsets to them, of which the first is in the field at ``field``."""
    offsets: list[int] = []
    pieces: list[bytes] = []
    for name, number in zip(names, numbers, strict=True):
        offsets.append(at - field)
        padding = 4 - len(name) % 4
        pieces += (_ONE_REF.pack(at - vtable, _NAME_AT, number, len(name)), name, _ZEROS[padding])
        at += _REF.itemsize + len(name) + padding
        field += 4
    if pieces:
        # All but the first zero behind the last name would be padding of a next table.
        pieces[-1] = _ZEROS[1]
    return b"".join(pieces), struct.pack(f"<{len(offsets)}I", *offsets)


def _refs_as_columns(
    names: Sequence[bytes], numbers: Sequence[int], at: int, vtable: int, field: int
) -> tuple[bytes, bytes]:
    """As `_refs_one_by_one`."""
    lengths = np.fromiter(map(len, names), np.int64, len(names))
    sizes = _REF.itemsize + lengths + 4 - lengths % 4
    ends = np.cumsum(sizes)
    starts = ends - sizes
    tables = np.empty(len(names), _REF)
    tables["vtable"] = at + starts - vtable
    tables["name_at"] = _NAME_AT
    tables["number"] = numbers
    tables["name_bytes"] = lengths
    block = np.zeros(int(ends[-1]), np.uint8)
    put(block, starts, tables)
    copy_spans(block, starts + _REF.itemsize, b"".join(names), np.cumsum(lengths) - lengths, lengths)
    last = int(starts[-1] + _REF.itemsize + lengths[-1])
    offsets = at + starts - np.arange(field, field + 4 * len(names), 4)
    return block[: last + 1].tobytes(), offsets.astype("<u4").tobytes()


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
