"""``spec/repository-log.md``: its events are those of the code, and its examples are encoded byte for byte."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId
from icechunk.format.repo.repo_info import SnapshotRecord
from icechunk.log.repository import events as e
from icechunk.log.repository.entry import (
    Entry,
    decode_entry,
    encode_entry,
    floor_key,
    new_epoch,
    parse_slot_key,
    slot_key,
)
from icechunk.log.repository.event_json import encode_events
from icechunk.log.repository.marker import decode_marker, encode_marker
from icechunk.log.repository.state import initial_state, try_apply_all
from icechunk.runtime import json_codec
from tests.spec.pages import block, code, page, rows

A, B = (ObjectId(bytes([i]) * 12) for i in (1, 2))
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
    e.SnapshotsRewritten(replaced=((A, B),), keep=True),
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


def test_the_entry_example_is_encoded_byte_for_byte() -> None:
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
    assert fields == {*json_codec.loads(data), "objects"}


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


def test_the_floor_on_the_page_has_the_key_that_we_write() -> None:
    sentence = " ".join(page("repository-log.md").partition("### Rule 9 ")[2].split())
    assert f"floor 37 is `{floor_key('E', 37).removeprefix('log/E.floor/')}`" in sentence


def test_the_marker_example_is_encoded_byte_for_byte() -> None:
    data = block("repository-log.md", "json marker").strip().encode()
    marker = decode_marker(data)
    assert marker is not None
    assert encode_marker(marker) == data
    text = page("repository-log.md").partition("```json marker")[2]
    fields = {name for row in rows(text, "| field | value |") for name in code(row[0])}
    assert fields == {*json_codec.loads(data), "durable", "files"}
    copies = replace(marker, files={"snapshots/X": b"bytes"})
    assert decode_marker(encode_marker(copies)) == copies
