"""The page about format 1 says what the code does."""

from __future__ import annotations

import json

from icechunk.config import RepositoryConfig
from icechunk.config.yaml_text import config_from_yaml, config_to_yaml
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId
from icechunk.format.metadata import metadata_tables
from icechunk.format.repo.repo_info import NewCommit, SnapshotRecord
from icechunk.log.repository.ref_files.names import close_ref, decode_ref, encode_ref, is_closed, read_ref
from icechunk.log.repository.ref_files.upgrade import RefValues, migrated_info
from icechunk.log.repository.state import READ_ONLY
from tests.spec.pages import block, code, page, rows

PAGE = "format-1.md"
ONE, TWO, THREE = (ObjectId(bytes([i]) * 12) for i in (1, 2, 3))


def record(id: ObjectId, parent: ObjectId | None, at_us: int) -> SnapshotRecord:
    return SnapshotRecord(id=id, parent=parent, flushed_at_us=at_us, message="")


RECORDS = {
    FIRST_SNAPSHOT: record(FIRST_SNAPSHOT, None, 10_000),
    ONE: record(ONE, FIRST_SNAPSHOT, 20_000),
    TWO: record(TWO, ONE, 30_000),
    THREE: record(THREE, FIRST_SNAPSHOT, 40_000),
}
REFS = RefValues(
    branches={"main": ONE, "b": TWO, "a": TWO, "on main": ONE},
    tags={"t": ONE},
    deleted_tags={"gone": ONE, "lost": None},
)


def test_the_bodies_of_refs_are_those_on_the_page() -> None:
    body, closed = block(PAGE, "json ref").strip().encode(), block(PAGE, "json closed").strip().encode()
    assert (encode_ref(FIRST_SNAPSHOT), close_ref(FIRST_SNAPSHOT)) == (body, closed)
    assert decode_ref(body, "") == read_ref(closed, "") == FIRST_SNAPSHOT
    assert (is_closed(body), is_closed(closed)) == (False, True)
    assert decode_ref(b' {\n "snapshot" : "1CECHNKREP0F1RSTCMT0", "more": 1}\n', "") == FIRST_SNAPSHOT


def test_the_configuration_on_the_page_is_encoded_byte_for_byte() -> None:
    text = block(PAGE, "yaml config").encode()
    assert config_to_yaml(RepositoryConfig(inline_chunk_threshold_bytes=33)) == text
    assert config_from_yaml(b"inline_chunk_threshold_bytes: 33\n") == config_from_yaml(text)


def test_the_metadata_values_on_the_page_are_encoded_byte_for_byte() -> None:
    found = rows(page(PAGE), "| value | bytes |")
    assert len(found) == 2
    for value, packed in found:
        [table] = metadata_tables({"k": json.loads(code(value)[0])}, 1)
        assert table.slots[1] == bytes.fromhex(code(packed)[0])


def test_the_ops_log_after_the_upgrade_follows_the_page() -> None:
    info = migrated_info(REFS, RECORDS, config=None, now_us=99_000)
    written = [(type(update.change).__name__, update.updated_at_us) for update in info.updates[::-1]]
    assert written == [
        ("RepoInitialized", 10_000),
        ("NewCommit", 20_000),
        ("BranchCreated", 21_000),
        ("TagCreated", 21_001),
        ("TagCreated", 21_002),
        ("TagDeleted", 22_000),
        ("NewCommit", 30_000),
        ("BranchCreated", 31_000),
        ("BranchCreated", 31_001),
        ("RepoMigrated", 99_000),
    ]
    assert {code(row[0])[0] for row in rows(page(PAGE), "| update | time |")} == {name for name, _ in written}
    [commit] = [update.change for update in info.updates if update.updated_at_us == 30_000]
    assert isinstance(commit, NewCommit)
    assert commit.branch == "a"
    assert THREE not in info.snapshots
    assert info.deleted_tags == {"gone", "lost"}


def test_the_announced_repository_is_read_only_and_not_migrated_yet() -> None:
    info = migrated_info(REFS, RECORDS, config=None, now_us=5, read_only_reason="being upgraded")
    assert (info.status.availability, info.status.reason) == (READ_ONLY, "being upgraded")
    assert "RepoMigrated" not in {type(update.change).__name__ for update in info.updates}
