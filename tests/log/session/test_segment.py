"""Segments of persisted sessions as bytes and keys."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.errors import FormatError
from icechunk.format.ids import encode_id
from icechunk.log.session.events import Event
from icechunk.log.session.segment import (
    HEAD_BYTES,
    SegmentHead,
    SegmentKind,
    Slot,
    common_prefix,
    decode_head,
    decode_segment,
    encode_segment,
    events_of,
    segment_key,
    slot_of,
)
from tests.log.session.builders import EMPTY, object_id
from tests.log.session.test_wire import sample

HEAD = SegmentHead(
    kind=SegmentKind.COMMITTING,
    nonce=bytes(range(16)),
    base=EMPTY.id,
    keep=3,
    branch="main",
    rearrange=True,
    since_us=1,
    created_us=2,
    lease_us=3,
    attempts=(object_id(1), object_id(2)),
    claims=(2, 7),
    snapshot=object_id(3),
    joined_at=4,
    earlier_bases=(object_id(5), object_id(6)),
    lineage=(object_id(4), (b"one", b"two")),
)
EVENTS = sample().events
DATA = encode_segment(HEAD, EVENTS)


def test_a_segment_read_back_is_the_same() -> None:
    head, events = decode_segment(DATA)
    assert head == HEAD
    assert encode_segment(head, events) == DATA
    assert len(events) == len(EVENTS)
    bare = replace(HEAD, branch=None, snapshot=None, lineage=None, attempts=(), earlier_bases=())
    assert decode_segment(encode_segment(bare, ())) == (bare, ())


def test_the_head_is_read_from_the_first_bytes() -> None:
    assert decode_head(DATA[:HEAD_BYTES]) == HEAD
    assert decode_head(DATA[:20]) is None
    assert decode_head(DATA[:9]) is None
    assert decode_head(b"") is None


@pytest.mark.parametrize("data", [b"x", b"x" * 100, b"ICESEGM\n\x02\x00\x02\x00\x00\x00{}", DATA + b"\0"])
def test_bytes_that_are_no_segment_are_a_format_error(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode_segment(data)


@settings(max_examples=300)
@given(st.integers(0, len(DATA) - 1), st.integers(0, 255), st.booleans())
def test_corrupt_bytes_are_a_format_error_or_a_segment(at: int, value: int, cut: bool) -> None:
    data = DATA[:at] if cut else DATA[:at] + bytes([value]) + DATA[at + 1 :]
    with suppress(FormatError):
        head, events = decode_segment(data)
        assert head == decode_head(data)
        assert all(isinstance(event, get_args(Event)) for event in events)
    with suppress(FormatError):
        assert isinstance(decode_head(data), SegmentHead | None)


def test_events_are_those_that_are_kept_and_those_that_are_new() -> None:
    a, b, c, d, *_ = EVENTS
    assert events_of([(0, (a, b)), (2, (c,)), (1, (d,)), (2, ())]) == (a, d)
    assert events_of([]) == ()
    with pytest.raises(FormatError):
        events_of([(0, (a,)), (2, (b,))])
    assert common_prefix((a, b, c), (a, b, d)) == common_prefix((a, b), (a, b, c)) == 2
    assert common_prefix((a,), (replace(a),)) == 0


def test_a_key_names_its_slot() -> None:
    session, worker = object_id(1), object_id(2)
    for slot in (Slot(session, None, 1), Slot(session, worker, 12_345_678)):
        assert slot_of(segment_key(slot)) == slot
    assert segment_key(Slot(session, None, 7)) == f"sessions/{encode_id(session)}/00000007"
    good = segment_key(Slot(session, worker, 1))
    for bad in (
        good[:-1],
        good + "0",
        good.lower(),
        good.replace("/0", "//0"),
        "sessions/readme",
        "sessions/x/00000001",
    ):
        assert slot_of(bad) is None
