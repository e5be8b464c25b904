"""``spec/tables.md``: our files, and the official library's, read with its tables and nothing else."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pytest
from flatbuffers.table import Table

from icechunk.format.envelope import FileType, unseal
from icechunk.format.ids import FIRST_SNAPSHOT, NodeId, ObjectId
from icechunk.format.manifest import encode_manifest
from icechunk.format.repo import repo_info as stored
from icechunk.format.repo.codec import encode_repo
from icechunk.format.repo.repo_info import SnapshotRecord, Status
from icechunk.format.snapshot.codec import encode_snapshot
from icechunk.format.transaction import encode_transaction_log
from icechunk.format.values import (
    ID12,
    INLINE,
    NATIVE,
    VIRTUAL,
    ChunkRefs,
    DimensionShape,
    Manifest,
    ManifestFile,
    ManifestRef,
    Move,
    NodeKind,
    NodeSnapshot,
    Snapshot,
    TransactionLog,
)
from tests.spec.pages import ROOT, ZARR_ARRAY, ZARR_GROUP, code, page, rows

A, B, C = (ObjectId(bytes([i]) * 12) for i in (1, 2, 3))
N1, N2 = (NodeId(bytes([i]) * 8) for i in (1, 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    slot: int
    name: str
    type: str
    must: bool


SCALARS = {"u8": "<B", "u16": "<H", "u32": "<I", "i32": "<i", "u64": "<Q", "bool": "<?"}
SIZES = {**{name: struct.calcsize(form) for name, form in SCALARS.items()}, "Id8": 8, "Id12": 12}


def schema() -> dict[str, list[Field]]:
    """The tables of tables.md."""
    text = page("tables.md")
    found: dict[str, list[Field]] = {}
    for name, body in re.findall(r"^### (\w+)\n\n(\| slot .*?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL):
        found[name] = [
            Field(slot=int(row[0].split(", ")[-1]), name=row[1], type=row[2], must=row[3].startswith("must"))
            for row in rows(body, "| slot")
        ]
    for names, slots in rows(text, "| table | slots |"):
        fields = [part.removesuffix(", must").split(" ") for part in slots.split(" · ") if part != "–"]
        musts = [part.endswith(", must") for part in slots.split(" · ")]
        for name in names.split(", "):
            found[name] = [
                Field(slot=int(slot), name=field, type=kind, must=must)
                for (slot, field, kind), must in zip(fields, musts, strict=False)
            ]
    return found


SCHEMA = schema()
SIZES.update({row[0]: int(row[1]) for row in rows(page("tables.md"), "| struct | bytes |")})
STRUCTS = set(SIZES) - set(SCALARS)


class Reader:
    """Reads a payload with the documented tables and the official FlatBuffers runtime, and nothing else."""

    def __init__(self, payload: bytes) -> None:
        self.data = bytearray(payload)
        self.met: set[str] = set()

    def root(self, name: str) -> dict[str, Any]:
        return self.table(struct.unpack_from("<I", self.data)[0], name)

    def table(self, pos: int, name: str) -> dict[str, Any]:
        self.met.add(name)
        fields = SCHEMA[name]
        table = Table(self.data, pos)
        vtable = pos - struct.unpack_from("<i", self.data, pos)[0]
        slots = (struct.unpack_from("<H", self.data, vtable)[0] - 4) // 2
        documented = {field.slot for field in fields} | {field.slot - 1 for field in fields if "union" in field.type}
        assert {slot for slot in range(slots) if table.Offset(4 + 2 * slot)} <= documented, name
        out: dict[str, Any] = {}
        for field in fields:
            offset = table.Offset(4 + 2 * field.slot)
            assert offset or not field.must, f"{name}.{field.name}"
            out[field.name] = self.field(table, pos + offset, field) if offset else None
        return out

    def field(self, table: Table, at: int, field: Field) -> Any:
        kind = field.type
        if kind in SIZES:
            return self.inline(at, kind)
        target = at + struct.unpack_from("<I", self.data, at)[0]
        if kind.startswith("union"):
            members = dict(re.findall(r"(\d+) (\w+)", kind))
            number = self.data[table.Pos + table.Offset(4 + 2 * (field.slot - 1))]
            member = members[str(number)]
            return member, self.table(target, member)
        if kind == "string":
            return self.string(target)
        if not kind.startswith("["):
            return self.table(target, kind)
        item = kind[1:-1]
        length = struct.unpack_from("<I", self.data, target)[0]
        if item in SIZES:
            return [self.inline(target + 4 + i * SIZES[item], item) for i in range(length)]
        places = [target + 4 + 4 * i for i in range(length)]
        targets = [place + struct.unpack_from("<I", self.data, place)[0] for place in places]
        return [self.string(t) if item == "string" else self.table(t, item) for t in targets]

    def inline(self, at: int, kind: str) -> Any:
        if kind in SCALARS:
            return struct.unpack_from(SCALARS[kind], self.data, at)[0]
        return bytes(self.data[at : at + SIZES[kind]])

    def string(self, at: int) -> str:
        length = struct.unpack_from("<I", self.data, at)[0]
        return self.data[at + 4 : at + 4 + length].decode()


def a_manifest() -> Manifest:
    chunk_ids = np.zeros(3, ID12)
    chunk_ids[1] = np.frombuffer(C, ID12)[0]
    refs = ChunkRefs(
        coords=np.array([[0, 0], [1, 0], [2, 0]], np.uint32),
        kind=np.array([INLINE, NATIVE, VIRTUAL], np.uint8),
        offset=np.array([0, 7, 9], np.uint64),
        length=np.array([2, 8, 10], np.uint64),
        chunk_id=chunk_ids,
        location=np.array([-1, -1, 0], np.int32),
        locations=("s3://b/k",),
        checksum_kind=np.array([0, 0, 1], np.uint8),
        checksum=np.array([0, 0, 0], np.int64),
        etags=("tag",),
        inline_data=b"hi",
    )
    return Manifest(id=B, arrays={N2: refs})


def a_snapshot() -> Snapshot:
    array = NodeSnapshot(
        id=N2,
        path="/a",
        kind=NodeKind.ARRAY,
        user_data=ZARR_ARRAY,
        shape=(DimensionShape(5, 3), DimensionShape(4, 1)),
        dimension_names=("t", None),
        manifests=(ManifestRef(B, ((0, 3), (0, 1))),),
    )
    group = NodeSnapshot(id=N1, path="/", kind=NodeKind.GROUP, user_data=ZARR_GROUP)
    return Snapshot(
        id=A,
        parent_id=FIRST_SNAPSHOT,
        nodes={"/": group, "/a": array},
        flushed_at_us=77,
        message="hello",
        metadata={"k": [1, None]},
        manifest_files={B: ManifestFile(B, 1234, 3)},
    )


def test_a_manifest_of_ours_reads_with_the_tables_of_the_page() -> None:
    _, payload = unseal(encode_manifest(a_manifest()), FileType.MANIFEST)
    read = Reader(payload[:]).root("Manifest")
    (array,) = read["arrays"]
    inline, native, virtual = array["refs"]
    assert (read["id"], array["node_id"], read["compression_algorithm"]) == (B, N2, 0)
    assert [ref["index"] for ref in array["refs"]] == [[0, 0], [1, 0], [2, 0]]
    assert (bytes(inline["inline"]), inline["chunk_id"], inline["location"]) == (b"hi", None, None)
    assert (native["chunk_id"], native["offset"], native["length"], native["inline"]) == (C, 7, 8, None)
    assert (virtual["location"], virtual["checksum_etag"], virtual["offset"]) == ("s3://b/k", "tag", 9)


@pytest.mark.parametrize("version", [1, 2])
def test_a_snapshot_of_ours_reads_with_the_tables_of_the_page(version: int) -> None:
    _, payload = unseal(encode_snapshot(a_snapshot(), version), FileType.SNAPSHOT)
    read = Reader(payload[:]).root("Snapshot")
    root, array = read["nodes"]
    assert (read["id"], read["flushed_at"], read["message"]) == (A, 77, "hello")
    assert [item["name"] for item in read["metadata"]] == ["k"]
    assert (root["path"], root["node_data"]) == ("/", ("GroupNodeData", {}))
    kind, data = array["node_data"]
    assert (kind, [name["name"] for name in data["dimension_names"]]) == ("ArrayNodeData", ["t", None])
    (ref,) = data["manifests"]
    assert [struct.unpack("<II", extent) for extent in ref["extents"]] == [(0, 3), (0, 1)]
    if version == 1:
        (file,) = read["manifest_files"]
        assert (file[:12], *struct.unpack("<QI", file[16:28])) == (B, 1234, 3)
        assert [struct.unpack("<QQ", dim) for dim in data["shape"]] == [(5, 2), (4, 4)]
        assert (read["parent_id"], read["manifest_files_v2"], data["shape_v2"]) == (FIRST_SNAPSHOT, None, None)
    else:
        (entry,) = read["manifest_files_v2"]
        assert (entry["id"], entry["size_bytes"], entry["num_chunk_refs"]) == (B, 1234, 3)
        assert [(dim["array_length"], dim["num_chunks"]) for dim in data["shape_v2"]] == [(5, 3), (4, 1)]
        assert (read["parent_id"], read["manifest_files"], data["shape"]) == (None, [], [])


def test_a_transaction_log_of_ours_reads_with_the_tables_of_the_page() -> None:
    log = TransactionLog(
        id=A,
        updated_arrays=frozenset({N1}),
        updated_groups=frozenset({N2}),
        updated_chunks={N1: np.array([[3, 4]], np.uint32)},
        moved_nodes=(Move("/a", "/b", N1, NodeKind.ARRAY),),
    )
    _, payload = unseal(encode_transaction_log(log), FileType.TRANSACTION_LOG)
    read = Reader(payload[:]).root("TransactionLog")
    assert (read["id"], read["updated_arrays"], read["updated_groups"], read["new_groups"]) == (A, [N1], [N2], [])
    assert read["updated_chunks"] == [{"node_id": N1, "chunks": [{"coords": [3, 4]}]}]
    assert read["moved_nodes"] == [{"from": "/a", "to": "/b", "node_id": N1, "node_type": 1}]


CHANGES: list[stored.UpdateChange] = [
    stored.RepoInitialized(),
    stored.RepoMigrated(from_version=1, to_version=2),
    stored.ConfigChanged(),
    stored.MetadataChanged(),
    stored.TagCreated(name="t"),
    stored.TagDeleted(name="t", previous_snapshot=A),
    stored.BranchCreated(name="b"),
    stored.BranchDeleted(name="b", previous_snapshot=A),
    stored.BranchReset(name="b", previous_snapshot=A),
    stored.NewCommit(branch="b", snapshot=A),
    stored.CommitAmended(branch="b", previous_snapshot=A, snapshot=B),
    stored.NewDetachedSnapshot(snapshot=A),
    stored.GCRan(),
    stored.ExpirationRan(),
    stored.FeatureFlagChanged(id=3, new_value=True, is_set=True),
    stored.StatusChanged(status=Status(availability=1, set_at_us=5, reason="r")),
]


def test_a_repo_of_ours_reads_with_the_tables_of_the_page() -> None:
    info = stored.RepoInfo(
        status=Status(availability=1, set_at_us=5, reason="r"),
        branches={"main": B},
        tags={"v1": A},
        deleted_tags=frozenset({"v0"}),
        snapshots={
            A: SnapshotRecord(id=A, parent=None, flushed_at_us=1, message="a"),
            B: SnapshotRecord(id=B, parent=A, flushed_at_us=2, message="b", pruned_ancestor_tx_logs=(C,)),
        },
        metadata={"k": 1},
        updates=tuple(
            stored.Update(change=change, updated_at_us=100 - i, backup_path="repo.x" if i else None)
            for i, change in enumerate(CHANGES)
        ),
        repo_before_updates="repo.y",
        config={"inline_chunk_threshold_bytes": 512},
        enabled_feature_flags=frozenset({4, 3}),
        extra=b"marker",
    )
    _, payload = unseal(encode_repo(info), FileType.REPO_INFO)
    reader = Reader(payload[:])
    read = reader.root("Repo")
    assert (read["spec_version"], read["repo_before_updates"], bytes(read["extra"])) == (2, "repo.y", b"marker")
    assert (read["enabled_feature_flags"], read["disabled_feature_flags"]) == ([3, 4], None)
    assert read["deleted_tags"] == ["v0"]
    first, second = read["snapshots"]
    assert (first["id"], first["parent_offset"], second["parent_offset"]) == (A, -1, 0)
    assert (first["pruned_ancestor_tx_logs"], second["pruned_ancestor_tx_logs"]) == (None, [C])
    assert [(ref["name"], ref["snapshot_index"]) for ref in read["branches"]] == [("main", 1)]
    assert read["status"]["limited_availability_reason"] == "r"
    updates = [update["update_type"] for update in read["latest_updates"]]
    assert [name.replace("RepoStatus", "Status") for name, _ in updates] == [
        type(change).__name__ for change in CHANGES
    ]
    assert updates[10][1] == {"branch": "b", "previous_snap_id": A, "new_snap_id": B}
    assert set(get_args(stored.UpdateChange)) == {type(change) for change in CHANGES}


ROOTS = {
    FileType.SNAPSHOT: "Snapshot",
    FileType.MANIFEST: "Manifest",
    FileType.TRANSACTION_LOG: "TransactionLog",
    FileType.REPO_INFO: "Repo",
}
FIXTURES = ROOT / "tests/format/fixtures"
OFFICIAL = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())


def official_files(folder: str) -> Iterator[tuple[str, bytes]]:
    for path in sorted((FIXTURES / folder).rglob("*")):
        if path.is_file() and path.name != "inspect.json":
            yield path.relative_to(FIXTURES / folder).as_posix(), path.read_bytes()


@pytest.mark.parametrize("folder", OFFICIAL)
def test_every_file_of_the_official_library_reads_with_the_tables_of_the_page(folder: str) -> None:
    met: set[str] = set()
    for key, data in official_files(folder):
        if data[:3] != b"ICE":
            continue
        _, payload = unseal(data, FileType(data[37]), what=key)
        reader = Reader(payload[:])
        read = reader.root(ROOTS[FileType(data[37])])
        met |= reader.met
        for name in ("nodes", "arrays", "branches", "tags", "snapshots", "updated_chunks", "manifest_files_v2"):
            order = [
                item.get("path", item.get("name", item.get("id", item.get("node_id")))) for item in read.get(name) or ()
            ]
            assert order == sorted(order, key=lambda key: key.encode() if isinstance(key, str) else key), (key, name)
    assert {"Snapshot", "NodeSnapshot", "Manifest", "ChunkRef", "TransactionLog"} <= met
    assert ("Repo" in met) == (folder == "v2")


@pytest.mark.parametrize("folder", OFFICIAL)
def test_every_key_of_the_official_library_is_listed(folder: str) -> None:
    cells = " ".join(row[0] + row[3] for row in rows(page("objects.md"), "| key |"))
    patterns = [re.sub(r"\\\{[^}]*\\\}", "[^/]+", re.escape(key)) for key in code(cells) if key != "{id}"]
    for key, _ in official_files(folder):
        key = key.removesuffix(".deleted")
        assert any(re.fullmatch(pattern, key) for pattern in patterns), key
