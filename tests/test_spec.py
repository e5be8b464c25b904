"""The pages of ``spec/`` tell the truth: their examples decode with our code, and our files with their tables."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, get_args

import numpy as np
import orjson
import pytest
from flatbuffers.table import Table

from icechunk.format import keys
from icechunk.format import repo_values as stored
from icechunk.format.envelope import COMPRESSION_ZSTD, HEADER_SIZE, FileType, seal, unseal
from icechunk.format.flat_writer import MAX_TABLES
from icechunk.format.flexbuffers import MAX_DEPTH
from icechunk.format.ids import FIRST_SNAPSHOT, NodeId, ObjectId, encode_id
from icechunk.format.manifest import encode_manifest
from icechunk.format.repo import encode_repo
from icechunk.format.repo_values import SnapshotRecord, Status
from icechunk.format.snapshot import encode_snapshot
from icechunk.format.tables import (
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
from icechunk.format.transaction import decode_transaction_log, encode_transaction_log
from icechunk.log import events as session_events
from icechunk.log.compaction import Policy
from icechunk.log.layers import LARGE_LAYER, MANY_LAYERS, OPEN_ROWS
from icechunk.log.session_log import SessionLog
from icechunk.log.transaction_parts import MAX_CHUNKS
from icechunk.refs import events as e
from icechunk.refs.commit_queue import MAX_MEMBERS
from icechunk.refs.entry import Entry, decode_entry, encode_entry, encode_events, new_epoch, parse_slot_key, slot_key
from icechunk.refs.marker import decode_marker, encode_marker
from icechunk.refs.proof import MAX_SKEW_US, PRUNE_WAIT_US, TRUST_US
from icechunk.refs.state import initial_state, try_apply_all
from icechunk.session.base import Phase

ROOT = Path(__file__).resolve().parents[1]
SPEC = ROOT / "spec"
PAGES = sorted(SPEC.rglob("*.md"))

A, B, C = (ObjectId(bytes([i]) * 12) for i in (1, 2, 3))
N1, N2 = (NodeId(bytes([i]) * 8) for i in (1, 2))


def page(name: str) -> str:
    return (SPEC / name).read_text("utf-8")


def block(name: str, language: str) -> str:
    """The one fenced block of a page that begins with this language."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", page(name), re.MULTILINE | re.DOTALL)
    assert len(found) == 1, f"{name} has {len(found)} blocks of {language!r}"
    return str(found[0])


def rows(text: str, header: str) -> list[list[str]]:
    """The cells of the table whose header line begins so."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(header):
            break
    else:
        raise AssertionError(f"no table {header!r}")
    next(lines)
    out = []
    for line in lines:
        if not line.startswith("|"):
            break
        out.append([cell.strip() for cell in line.strip().strip("|").split(" | ")])
    return out


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def hexdump(text: str) -> bytes:
    return b"".join(bytes.fromhex(line.split("  ", 1)[1]) for line in text.splitlines())


# -- links, names, numbers ---------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_inside_the_project_leads_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        place, _, anchor = target.partition("#")
        file = (path.parent / place).resolve() if place else path
        assert file.exists(), f"{path.name}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text("utf-8")), f"{path.name}: {target}"


def test_the_index_names_every_page_and_note() -> None:
    index = page("README.md")
    assert [path.name for path in PAGES if path.name != "README.md" and f"{path.name})" not in index] == []


def test_the_glossary_has_every_word_once() -> None:
    words = [row[0] for row in rows(page("README.md"), "| word")]
    assert len(words) == len(set(words)) > 40


def test_every_rule_that_code_cites_is_on_the_page() -> None:
    cited: set[str] = set()
    for path in (ROOT / "icechunk").rglob("*.py"):
        for numbers in re.findall(r"\brules? (\d+(?:(?:, | and )\d+)*)", path.read_text("utf-8")):
            cited.update(re.findall(r"\d+", numbers))
    known = set(re.findall(r"^### Rule (\d+) ", page("repository-log.md"), re.MULTILINE))
    assert known == {str(i) for i in range(1, 16)}
    assert cited <= known


@pytest.mark.parametrize(
    ("name", "phrase", "value"),
    [
        ("repository-log.md", "*G* is seven days", PRUNE_WAIT_US == 7 * 86_400_000_000),
        ("repository-log.md", "at most G/2", TRUST_US * 2 == PRUNE_WAIT_US),
        ("repository-log.md", "more than 10 minutes off", MAX_SKEW_US == 600_000_000),
        ("repository-log.md", "up to 1000 of them", MAX_MEMBERS == 1000),
        ("session-log.md", "at 16 384 rows", OPEN_ROWS == 16_384),
        ("session-log.md", "more than 1 048 576 rows together", LARGE_LAYER == 1_048_576),
        ("session-log.md", "of more than 64", MANY_LAYERS == 64),
        ("session-log.md", "at most 65 536 references", Policy().max_refs_per_manifest == 65_536),
        ("session-log.md", "8 388 608 chunks", MAX_CHUNKS == 8_388_608),
        ("session-log.md", "50 million tables", MAX_TABLES == 50_000_000),
        ("session-log.md", "fewer than 4096 references", Policy().share_below_refs == 4096),
        ("session-log.md", "With *f* = 8", Policy().fan_in == 8),
        ("tables.md", "| FlexBuffers | 100 levels", MAX_DEPTH == 100),
        ("objects.md", "begin with 39 bytes", HEADER_SIZE == 39),
    ],
)
def test_numbers_on_the_pages_are_those_of_the_code(name: str, phrase: str, value: bool) -> None:
    assert phrase in " ".join(page(name).split())
    assert value, phrase


# -- objects.md --------------------------------------------------------------------------------------------------------


def test_the_hex_example_is_a_transaction_log_and_begins_as_ours_do() -> None:
    data = hexdump(block("objects.md", "hexdump"))
    log = decode_transaction_log(data, expected_id=FIRST_SNAPSHOT)
    assert log == TransactionLog(id=FIRST_SNAPSHOT)
    ours = encode_transaction_log(log)
    assert (data[:12], data[36:HEADER_SIZE]) == (ours[:12], ours[36:HEADER_SIZE])
    # The version behind the name may have moved on since.
    assert data[12:24] == ours[12:24] == b"aioicechunk-"
    assert f"{len(data)} bytes, as our code writes it" in " ".join(page("objects.md").split())


def test_the_payload_example_is_what_the_hex_example_holds() -> None:
    payload = hexdump(block("objects.md", "payload"))
    assert unseal(hexdump(block("objects.md", "hexdump")), FileType.TRANSACTION_LOG) == (2, payload)
    assert unseal(encode_transaction_log(TransactionLog(id=FIRST_SNAPSHOT)), FileType.TRANSACTION_LOG) == (2, payload)


def test_every_kind_of_key_is_listed() -> None:
    listed = " ".join(row[0] for row in rows(page("objects.md"), "| key |"))
    made = {
        keys.REPO_KEY: "`repo`",
        keys.snapshot_key(A): "`snapshots/{id}`",
        keys.manifest_key(A): "`manifests/{id}`",
        keys.transaction_key(A): "`transactions/{id}`",
        keys.chunk_key(A): "`chunks/{id}`",
        keys.CONFIG_KEY: "`config.yaml`",
        keys.REFS_PREFIX: "`refs/",
        keys.overwritten_repo_key(keys.overwritten_repo_name(0, bytes(12))): "`overwritten/repo.{T}.{R}`",
        slot_key("E", 1): "`log/{epoch}/{slot}`",
    }
    for key, text in made.items():
        assert text in listed
        assert key.startswith(text.strip("`").partition("{")[0])


def test_file_types_and_compression_are_those_listed() -> None:
    described = next(row[2] for row in rows(page("objects.md"), "| offset | bytes | field |") if row[0] == "37")
    assert [int(number) for number in re.findall(r"\d+", described)] == [int(kind) for kind in FileType]
    assert COMPRESSION_ZSTD == 1


def test_the_first_snapshots_id_is_the_one_on_the_page() -> None:
    assert f"`{encode_id(FIRST_SNAPSHOT)}`, bytes `{FIRST_SNAPSHOT.hex()}`" in page("objects.md")


# -- tables.md ---------------------------------------------------------------------------------------------------------


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


ZARR_ARRAY = orjson.dumps(
    {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [5, 4],
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2, 4]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "bytes"}],
    }
)
ZARR_GROUP = b'{"zarr_format":3,"node_type":"group"}'


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
    read = Reader(payload).root("Manifest")
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
    read = Reader(payload).root("Snapshot")
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
    read = Reader(payload).root("TransactionLog")
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
    reader = Reader(payload)
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
        reader = Reader(payload)
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


# -- repository-log.md -------------------------------------------------------------------------------------------------

RECORD = SnapshotRecord(id=A, parent=FIRST_SNAPSHOT, flushed_at_us=9, message="m")
EVENTS: list[e.Event] = [
    e.CommitAdded(branch="main", snapshot=RECORD),
    e.CommitAmended(branch="main", previous=B, snapshot=RECORD),
    e.DetachedSnapshotAdded(snapshot=RECORD),
    e.BranchCreated(name="b", snapshot=A),
    e.BranchReset(name="b", snapshot=A, expected=None),
    e.BranchDeleted(name="b"),
    e.TagCreated(name="t", snapshot=A),
    e.TagDeleted(name="t"),
    e.ConfigReplaced(config=None),
    e.MetadataReplaced(metadata={}),
    e.MetadataUpdated(metadata={}),
    e.StatusSet(availability=1),
    e.FeatureFlagSet(flag=3, value=None),
    e.ExpirationRan(released=(A,), reparented=(e.Reparented(id=B, parent=None, pruned_ancestor_tx_logs=(A,)),)),
    e.CollectionRan(cutoff_us=1),
    e.RepositoryMigrated(from_version=1, to_version=2),
    e.Sealed(),
    e.Void(nonce=bytes(16)),
]


def test_the_event_table_lists_every_kind_with_its_fields() -> None:
    assert {type(event) for event in EVENTS} == set(get_args(e.Event))
    written = {event.pop("kind"): set(event) for event in encode_events(EVENTS)}
    listed = {code(row[0])[0]: set(code(row[1])) for row in rows(page("repository-log.md"), "| kind | fields |")}
    assert listed == written


def test_the_fields_of_a_new_snapshot_and_of_a_survivor_are_named() -> None:
    commit, *_ = encode_events(EVENTS)
    text = page("repository-log.md")
    sentence = text[text.index("A **new snapshot**") :].partition("\n\n")[0]
    assert set(commit["snapshot"]) <= set(code(sentence))
    expiration = next(row for row in rows(text, "| kind | fields |") if row[0] == "`expiration`")
    reparented = encode_events(EVENTS[13:14])[0]["reparented"][0]
    assert set(reparented) == set(code(expiration[3]))


def the_entry() -> tuple[bytes, Entry]:
    data = block("repository-log.md", "json entry").strip().encode()
    return data, decode_entry(data, n=1)


def test_the_entry_example_is_byte_for_byte_what_we_write() -> None:
    data, entry = the_entry()
    again = encode_entry(
        n=entry.n,
        nonce=entry.nonce,
        time_us=entry.time_us,
        since_us=entry.since_us,
        events=encode_events(entry.events),
    )
    assert again == data
    fields = {code(row[0])[0] for row in rows(page("repository-log.md"), "| field | value |")}
    assert fields == {*orjson.loads(data), "objects"}


def test_the_entry_example_commits_and_tags_at_once_and_not_the_other_way_round() -> None:
    _, entry = the_entry()
    root = SnapshotRecord(id=FIRST_SNAPSHOT, parent=None, flushed_at_us=1, message="Repository initialized")
    state = initial_state(root, time_us=1, config=None)
    after = try_apply_all(state, entry.events, time_us=entry.time_us, since_us=entry.since_us)
    assert after is not None
    assert after.tags["v1"] == after.branches["main"] != FIRST_SNAPSHOT
    assert try_apply_all(state, entry.events[::-1], time_us=entry.time_us, since_us=entry.since_us) is None


def test_the_slot_keys_on_the_page_are_those_of_their_slots() -> None:
    found = rows(page("repository-log.md"), "| *n* | key |")
    assert len(found) == 3
    for number, key in found:
        epoch, n = parse_slot_key(code(key)[0]) or ("", 0)
        assert (n, slot_key(epoch, n)) == (int(number), code(key)[0])
        assert len(epoch) == len(new_epoch(bytes(12), 0)) == 28


def test_the_marker_example_is_byte_for_byte_what_we_write() -> None:
    data = block("repository-log.md", "json marker").strip().encode()
    marker = decode_marker(data)
    assert marker is not None
    assert encode_marker(marker) == data
    text = page("repository-log.md").partition("```json marker")[2]
    fields = {name for row in rows(text, "| field | value |") for name in code(row[0])}
    assert fields == {*orjson.loads(data), "files"}
    copies = replace(marker, files={"snapshots/X": b"bytes"})
    assert decode_marker(encode_marker(copies)) == copies


# -- session-log.md ----------------------------------------------------------------------------------------------------


def counted_ids() -> Iterator[NodeId]:
    return (NodeId(bytes(range(start, start + 8))) for start in count(1, 10))


def test_the_serialised_session_log_of_the_page_is_what_we_write() -> None:
    base = Snapshot(id=FIRST_SNAPSHOT, flushed_at_us=1, message="Repository initialized")
    ids = counted_ids()
    log = SessionLog(base, lambda: next(ids))
    log.set_metadata("/", ZARR_GROUP)
    header = orjson.loads(block("session-log.md", "json session-log"))
    size = header["events"][1]["blobs"][0]
    document = orjson.loads(ZARR_ARRAY)
    document["shape"], document["chunk_grid"]["configuration"]["chunk_shape"] = [4], [2]
    log.set_metadata("/t", orjson.dumps(document).ljust(size))
    node = log.node("/t")
    assert node is not None
    log.set_inline(node, (1,), b"\x07\x08")
    data = log.to_bytes()
    magic, version, length = struct.unpack_from("<8sHI", data)
    assert (magic, version, (14 + length) % 8) == (b"ICESLOG\n", 1, 0)
    assert orjson.loads(data[14 : 14 + length]) == header
    assert SessionLog.from_bytes(data, base, lambda: next(ids)).to_bytes() == data


def test_the_session_event_table_lists_every_event_with_its_tag() -> None:
    listed = {row[1]: code(row[0])[0] for row in rows(page("session-log.md"), "| tag | event |")}
    assert set(listed) == {event.__name__ for event in get_args(session_events.Event)}
    source = (ROOT / "icechunk/log/wire.py").read_text("utf-8")
    assert set(listed.values()) == set(re.findall(r'^_[A-Z_]+: Final = "([a-z-]+)"$', source, re.MULTILINE))


def test_the_phases_of_a_session_are_those_of_the_table() -> None:
    listed = {code(row[0])[0] for row in rows(page("session-log.md"), "| phase |")}
    assert listed == {phase.value for phase in Phase}


def test_the_diagram_of_the_session_shows_those_phases_too() -> None:
    text = page("session-log.md")
    diagram = text[text.index("stateDiagram") :].partition("```")[0]
    aliases = {alias: name for name, alias in re.findall(r'state "([^"]+)" as (\w+)', diagram)}
    ends = {end for pair in re.findall(r"(\S+) --> ([^\s:]+)", diagram) for end in pair} - {"[*]"}
    assert {aliases.get(end, end) for end in ends} == {phase.value for phase in Phase}


def test_every_seal_names_its_spec_version_and_type_where_the_page_says() -> None:
    data = seal(FileType.MANIFEST, 1, b"\0\0\0\0Ichk")
    assert (data[36], data[37], data[38]) == (1, 2, 1)
