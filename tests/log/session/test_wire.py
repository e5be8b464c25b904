"""The session log as bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from icechunk.errors import FormatError, SessionStateError
from icechunk.format.ids import FIRST_SNAPSHOT, encode_id
from icechunk.format.values import VIRTUAL, ChunkRef
from icechunk.log.session.columns import from_rows
from icechunk.log.session.log import ABSENT, SessionLog
from icechunk.log.session.wire import decode_log, encode_log
from tests.log.session.builders import EMPTY, GROUP, Repo, array_json, native, object_id
from tests.raising import raises


def bytes_of(log: SessionLog) -> bytes:
    return encode_log(log.base.id, log.events)


def sample() -> SessionLog:
    log = Repo().log()
    log.set_metadata("/", GROUP)
    log.set_metadata("/a", array_json((5, 5)))
    log.set_metadata("/s", array_json(()))
    log.set_metadata("/é", array_json((5,)))
    a, s = log.node("/a"), log.node("/s")
    assert a is not None
    assert s is not None
    log.set_inline(s, (), b"scalar")
    log.set_inline(a, (0, 0), b"inline")
    virtual: dict[tuple[int, ...], ChunkRef | None] = {
        (0, 1): ChunkRef(VIRTUAL, None, None, "s3://b/k", 1, 2, "e", None),
        (0, 2): ChunkRef(VIRTUAL, None, None, "s3://b/l", 1, 2, None, 7),
    }
    log.set_refs(a, from_rows(virtual, 2))
    log.set_native(a, (0, 3), object_id(3), 4, 5)
    log.delete_chunk(a, (4, 4))
    log.set_refs(a, native(np.array([[2, 2], [1, 1]])))
    log.move_node("/é", "/e")
    log.delete_node("/e")
    return log


def test_a_log_read_back_reads_the_same() -> None:
    log = sample()
    data = encode_log(log.base.id, log.events)
    back = decode_log(data, EMPTY, Repo().new_node_id)
    assert encode_log(back.base.id, back.events) == data
    node = back.node("/a")
    scalar = back.node("/s")
    assert node is not None
    assert scalar is not None
    assert back.chunk(scalar, ()) == ChunkRef(1, data=b"scalar", length=6)
    assert back.chunk(node, (0, 1)) == ChunkRef(3, location="s3://b/k", offset=1, length=2, etag="e")
    assert back.chunk(node, (0, 2)) == ChunkRef(3, location="s3://b/l", offset=1, length=2, last_modified=7)
    assert back.chunk(node, (4, 4)) is ABSENT
    assert back.changes().updated_chunks["/a"].tolist() == log.changes().updated_chunks["/a"].tolist()


def test_a_log_over_another_base_is_refused() -> None:
    with raises(SessionStateError, "not-allowed", encode_id(FIRST_SNAPSHOT)):
        decode_log(bytes_of(sample()), replace(EMPTY, id=object_id(5)), Repo().new_node_id)


@pytest.mark.parametrize("data", [b"", b"ICESLOG\n", b"x" * 100, b"ICESLOG\n\x02\x00\x02\x00\x00\x00{}"])
def test_bytes_that_are_no_log_are_a_format_error(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode_log(data, EMPTY, Repo().new_node_id)


SAMPLE = bytes_of(sample())


@settings(max_examples=300)
@given(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255), st.booleans())
@example(SAMPLE.rindex(b"\xff\xff\xff\xff") + 3, 0, False)
def test_corrupt_bytes_are_a_format_error_or_a_log(at: int, value: int, cut: bool) -> None:
    data = SAMPLE[:at] if cut else SAMPLE[:at] + bytes([value]) + SAMPLE[at + 1 :]
    try:
        log = decode_log(data, EMPTY, Repo().new_node_id)
    except (FormatError, SessionStateError):
        return
    log.changes()
    for node in log.nodes():
        written, _ = log.overlay(node)
        for i in range(len(written)):
            written.row(i)
