"""Entries: bytes, keys, and what stops a reader."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.errors import FormatError, InvalidInputError
from icechunk.format.ids import FIRST_SNAPSHOT
from icechunk.log.repository import events as e
from icechunk.log.repository.entry import decode_entry, encode_entry, new_epoch, parse_slot_key, slot_key
from icechunk.log.repository.event_json import encode_events
from icechunk.log.repository.events import pack, unpack
from icechunk.runtime import json_codec
from tests.log.repository.strategies import EVENTS
from tests.raising import raises


def encoded(*events: e.Event, n: int = 1) -> bytes:
    return encode_entry(n=n, nonce=b"n" * 16, time_us=5, since_us=None, events=encode_events(events))


def test_later_slots_sort_first() -> None:
    keys = [slot_key("E", n) for n in range(1, 2000)]
    assert keys == sorted(keys, reverse=True)
    assert [parse_slot_key(key) for key in keys[:3]] == [("E", 1), ("E", 2), ("E", 3)]


def test_keys_that_are_no_slots_are_not_taken_for_one() -> None:
    for key in ("log/E.floor/0000000A", "log/E/short", "log/E", "log/E/0000000a", "log/E/0000000A/x", "repo"):
        assert parse_slot_key(key) is None


def test_newer_epochs_sort_before_older_ones() -> None:
    assert new_epoch(b"z" * 12, 2_000_000_000_000_000) < new_epoch(b"a" * 12, 1_900_000_000_000_000)


@settings(max_examples=100)
@given(st.lists(EVENTS, max_size=4), st.none() | st.integers(0, 2**62), st.integers(1, 2**39))
def test_an_entry_is_read_back_as_written(events: list[e.Event], since_us: int | None, n: int) -> None:
    try:
        data = encode_entry(
            n=n,
            nonce=b"n" * 16,
            time_us=7,
            since_us=since_us,
            events=encode_events(events),
            objects={"snapshots/X": b"\x00\xff"},
        )
    except InvalidInputError:
        return
    entry = decode_entry(data, n=n)
    assert list(entry.events) == events
    assert (entry.n, entry.since_us, entry.nonce) == (n, since_us, b"n" * 16)
    assert entry.objects == {"snapshots/X": b"\x00\xff"}


def test_an_unknown_event_field_or_version_stops_the_reader_and_asks_to_upgrade() -> None:
    document = json_codec.loads(encoded(e.TagCreated(name="t", snapshot=FIRST_SNAPSHOT)))
    newer = [
        {**document, "v": 2},
        {**document, "hint": 1},
        {**document, "events": [{"kind": "telepathy"}]},
        {**document, "events": [{**document["events"][0], "colour": "red"}]},
    ]
    for changed in newer:
        with raises(FormatError, "unsupported-spec-version"):
            decode_entry(json_codec.dumps(changed), n=1)


def test_an_entry_in_the_wrong_slot_is_corrupt() -> None:
    with raises(FormatError, "invalid-file-format", "slot 2", "slot 1"):  # words: the numbers of the two slots
        decode_entry(encoded(e.Void()), n=2)


@settings(max_examples=100)
@given(
    st.binary(max_size=60)
    | st.builds(lambda i, b: encoded(e.Void())[:i] + b, st.integers(0, 90), st.binary(max_size=3))
)
def test_hostile_bytes_are_a_format_error(data: bytes) -> None:
    try:
        decode_entry(data, n=1)
    except FormatError:
        return
    assert json_codec.loads(data) == json_codec.loads(encoded(e.Void()))


KEYS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(st.sampled_from(["bytes", "float", "a"]), inner, max_size=2)
    ),
    max_leaves=8,
)


@settings(max_examples=100)
@given(JSON)
def test_every_json_value_and_bytes_round_trip_through_an_entry(value: object) -> None:
    assert unpack(json_codec.loads(json_codec.dumps(pack(value)))) == value


@pytest.mark.parametrize(
    "value", [2**64, {1: 2}, object(), "\ud800", {"\ud800": 1}, {"\0bytes": "AA=="}, {"a\0": 1}, {1, 2}]
)
def test_values_that_json_cannot_hold_are_refused_at_the_boundary(value: object) -> None:
    with pytest.raises(InvalidInputError):
        pack(value)


def test_deep_nesting_is_refused() -> None:
    value: list[object] = []
    for _ in range(200):
        value = [value]
    with pytest.raises(InvalidInputError):
        pack(value)
