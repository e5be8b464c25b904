"""``spec/session-log.md``: its events and phases are those of the code, its example is encoded byte for byte."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from itertools import count
from typing import get_args

from icechunk.format.envelope import FileType, seal
from icechunk.format.ids import FIRST_SNAPSHOT, NodeId, ObjectId
from icechunk.format.values import Snapshot
from icechunk.log.session import events as session_events
from icechunk.log.session.log import SessionLog
from icechunk.log.session.segment import SegmentHead, SegmentKind, encode_segment
from icechunk.log.session.wire import decode_log, encode_log
from icechunk.runtime import json_codec
from icechunk.session.content import Phase
from tests.spec.pages import ROOT, ZARR_ARRAY, ZARR_GROUP, block, code, page, rows


def counted_ids() -> Iterator[NodeId]:
    return (NodeId(bytes(range(start, start + 8))) for start in count(1, 10))


def test_the_serialised_session_log_of_the_page_is_encoded_byte_for_byte() -> None:
    base = Snapshot(id=FIRST_SNAPSHOT, flushed_at_us=1, message="Repository initialized")
    ids = counted_ids()
    log = SessionLog(base, lambda: next(ids))
    log.set_metadata("/", ZARR_GROUP)
    header = json_codec.loads(block("session-log.md", "json session-log"))
    size = header["events"][1]["blobs"][0]
    document = json_codec.loads(ZARR_ARRAY)
    document["shape"], document["chunk_grid"]["configuration"]["chunk_shape"] = [4], [2]
    log.set_metadata("/t", json_codec.dumps(document).ljust(size))
    node = log.node("/t")
    assert node is not None
    log.set_inline(node, (1,), b"\x07\x08")
    data = encode_log(base.id, log.events)
    magic, version, length = struct.unpack_from("<8sHI", data)
    assert (magic, version, (14 + length) % 8) == (b"ICESLOG\n", 1, 0)
    assert json_codec.loads(data[14 : 14 + length]) == header
    again = decode_log(data, base, lambda: next(ids))
    assert encode_log(base.id, again.events) == data


def test_the_segment_head_of_the_page_is_the_one_that_we_write() -> None:
    head = SegmentHead(
        kind=SegmentKind.COMMITTING,
        nonce=bytes(range(16)),
        base=FIRST_SNAPSHOT,
        keep=3,
        branch="main",
        since_us=1,
        created_us=2,
        lease_us=604_800_000_000,
        attempts=(ObjectId(bytes(range(1, 13))),),
        claims=(2,),
    )
    data = encode_segment(head, ())
    magic, version, length = struct.unpack_from("<8sHI", data)
    assert (magic, version, (14 + length) % 8, 14 + length) == (b"ICESEGM\n", 1, 0, len(data))
    assert data[14:].decode().rstrip() == block("session-log.md", "json segment-head").strip()
    listed = {code(row[0])[0] for row in rows(page("session-log.md"), "| kind | what it records |")}
    assert listed == {kind.value for kind in SegmentKind}


def test_the_session_event_table_lists_every_event_with_its_tag() -> None:
    listed = {row[1]: code(row[0])[0] for row in rows(page("session-log.md"), "| tag | event |")}
    assert set(listed) == {event.__name__ for event in get_args(session_events.Event)}
    source = (ROOT / "icechunk/log/session/wire.py").read_text("utf-8")
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


def test_every_envelope_has_its_spec_version_and_type_at_the_offsets_of_the_page() -> None:
    data = seal(FileType.MANIFEST, 1, b"\0\0\0\0Ichk")
    assert (data[36], data[37], data[38]) == (1, 2, 1)
