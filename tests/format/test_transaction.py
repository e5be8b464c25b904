from __future__ import annotations

from dataclasses import fields, replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.errors import FormatError, InvalidInputError
from icechunk.format import transaction
from icechunk.format.envelope import FileType, seal, unseal
from icechunk.format.ids import NodeId, ObjectId, encode_id
from icechunk.format.transaction import decode_transaction_log, decode_transaction_logs, encode_transaction_log
from icechunk.format.values import Move, NodeKind, TransactionLog
from tests.raising import raises
from tools.fuzz.strategies import transaction_logs

A, B = NodeId(b"a" * 8), NodeId(b"b" * 8)
EMPTY = TransactionLog(id=ObjectId(b"t" * 12))


def comparable(log: TransactionLog) -> list[object]:
    values = {field.name: getattr(log, field.name) for field in fields(log)}
    values["updated_chunks"] = [(node, coords.tolist(), coords.shape) for node, coords in log.updated_chunks.items()]
    return list(values.values())


@settings(max_examples=60)
@given(st.data(), st.sampled_from((1, 2)))
def test_transaction_logs_come_back_as_they_were(data: st.DataObject, spec_version: int) -> None:
    log = data.draw(transaction_logs(spec_version))
    again = decode_transaction_log(encode_transaction_log(log, spec_version), expected_id=log.id)
    assert comparable(again) == comparable(log)


@settings(max_examples=60)
@given(st.data(), st.sampled_from((1, 2)))
def test_few_changed_chunks_are_written_to_the_same_bytes_as_many(data: st.DataObject, spec_version: int) -> None:
    log = data.draw(transaction_logs(spec_version))
    # private: the number from which rows are written together
    with mock.patch.object(transaction, "_FEW", -1):
        together = encode_transaction_log(log, spec_version)
    assert encode_transaction_log(log, spec_version) == together


VERSIONED = st.sampled_from((1, 2)).flatmap(lambda version: st.tuples(st.just(version), transaction_logs(version)))


@settings(max_examples=30)
@given(st.lists(VERSIONED, max_size=4))
def test_logs_that_are_read_together_are_those_that_are_read_alone(logs: list[tuple[int, TransactionLog]]) -> None:
    files = [(log.id, encode_transaction_log(log, version)) for version, log in logs]
    together = decode_transaction_logs(files)
    assert list(map(comparable, together)) == [comparable(decode_transaction_log(data)) for _, data in files]


def test_among_logs_that_are_read_together_the_one_that_is_damaged_is_named() -> None:
    logs = [replace(EMPTY, id=ObjectId(bytes([i]) * 12)) for i in range(3)]
    files = [(log.id, encode_transaction_log(log)) for log in logs]
    files[1] = (files[1][0], files[1][1][:-3])
    with raises(FormatError, "invalid-file-format", encode_id(files[1][0])):
        decode_transaction_logs(files)
    files[1] = (logs[0].id, files[2][1])
    with raises(FormatError, "invalid-file-format", encode_id(logs[0].id), encode_id(logs[2].id)):
        decode_transaction_logs(files)


@pytest.mark.parametrize("others", [0, 3, 40])
def test_an_array_that_a_log_lists_twice_is_refused_but_not_one_of_several_logs(others: int) -> None:
    def log(number: int) -> TransactionLog:
        nodes = [NodeId(bytes([9 - number + i]) * 8) for i in range(6)]
        chunks = {node: np.array([[number]], np.uint32) for node in nodes}
        return TransactionLog(id=ObjectId(bytes([number]) * 12), updated_chunks=chunks)

    logs = [log(number % 9) for number in range(others)]
    files = [(one.id, encode_transaction_log(one)) for one in logs]
    assert [[*found.updated_chunks] for found in decode_transaction_logs(files)] == [[*x.updated_chunks] for x in logs]
    last = log(0)
    version, payload = unseal(encode_transaction_log(last), FileType.TRANSACTION_LOG)
    first, second, *_ = [bytes(node) for node in last.updated_chunks]
    twice = seal(FileType.TRANSACTION_LOG, version, bytes(payload).replace(second, first))
    with raises(FormatError, "invalid-file-format", encode_id(last.id)):
        decode_transaction_logs([*files, (last.id, twice)])
    with raises(FormatError, "invalid-file-format"):
        decode_transaction_log(twice)


def test_coordinates_are_written_sorted_and_once() -> None:
    coords = np.array([[2, 0], [0, 5], [2, 0], [0, 1]], np.uint32)
    again = decode_transaction_log(encode_transaction_log(replace(EMPTY, updated_chunks={B: coords, A: coords})))
    assert list(again.updated_chunks) == [A, B]
    assert again.updated_chunks[A].tolist() == [[0, 1], [0, 5], [2, 0]]


def test_updated_chunks_of_arrays_of_several_ranks_come_back_with_their_arrays() -> None:
    rng = np.random.default_rng(0)
    chunks = {
        NodeId(rng.bytes(8)): np.unique(rng.integers(0, 9, (n, ndim)), axis=0).astype(np.uint32)
        for n, ndim in [(5, 2), (0, 1), (1, 1), (7, 1), (3, 3), (4, 2)]
    }
    again = decode_transaction_log(encode_transaction_log(replace(EMPTY, updated_chunks=chunks))).updated_chunks
    assert list(again) == sorted(chunks)
    assert all(again[node].tolist() == coords.tolist() for node, coords in chunks.items())


def test_moves_are_sorted_segment_by_segment() -> None:
    moves = [Move(path, path + "x", A, NodeKind.GROUP) for path in ("/a-b", "/a/b", "/a")]
    again = decode_transaction_log(encode_transaction_log(replace(EMPTY, moved_nodes=tuple(moves))))
    assert [move.source for move in again.moved_nodes] == ["/a", "/a/b", "/a-b"]


def test_moves_are_refused_in_format_1() -> None:
    log = replace(EMPTY, moved_nodes=(Move("/a", "/b", A, NodeKind.ARRAY),))
    with raises(InvalidInputError, "unsupported-operation-for-version"):
        encode_transaction_log(log, 1)


def test_many_coordinates_come_back() -> None:
    coords = np.stack(np.divmod(np.arange(100_000, dtype=np.uint32), 317), axis=1)
    again = decode_transaction_log(encode_transaction_log(replace(EMPTY, updated_chunks={A: coords})))
    assert np.array_equal(again.updated_chunks[A], coords)


def test_another_id_than_expected_is_a_format_error() -> None:
    with raises(FormatError, "invalid-file-format", encode_id(ObjectId(bytes(12))), encode_id(EMPTY.id)):
        decode_transaction_log(encode_transaction_log(EMPTY), expected_id=ObjectId(bytes(12)))


def test_logs_are_filled_a_block_at_a_time_for_every_size_of_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    chunks = {
        NodeId(rng.bytes(8)): np.unique(rng.integers(0, 9, (n, 2)), axis=0).astype(np.uint32) for n in (5, 0, 1, 20, 3)
    }
    log = replace(EMPTY, updated_chunks=chunks)
    at_once = encode_transaction_log(log)
    monkeypatch.setattr(transaction, "_BLOCK", 3)
    assert encode_transaction_log(log) == at_once


@pytest.mark.parametrize("limit", ["MAX_TABLES", "MAX_BYTES"])
def test_a_log_that_no_reader_would_take_is_refused(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transaction, "_SURELY_FEW", 0)
    monkeypatch.setattr(transaction, "_ROOM", 0)
    monkeypatch.setattr(transaction, limit, {"MAX_TABLES": 100, "MAX_BYTES": 2000}[limit])
    few = replace(EMPTY, updated_chunks={A: np.arange(99, dtype=np.uint32)[:, None][:98]})
    assert decode_transaction_log(encode_transaction_log(few)).updated_chunks[A].shape == (98, 1)
    many = replace(EMPTY, updated_chunks={A: np.arange(101, dtype=np.uint32)[:, None]})
    with raises(InvalidInputError, "serialization", 101):
        encode_transaction_log(many)
