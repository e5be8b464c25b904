"""Corrupt and hostile files: FormatError, soon, and nothing else."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.errors import FormatError
from icechunk.format.envelope import FileType, seal, unseal
from icechunk.format.flat.flatbuffers import Buffer, FlatTable, FlatWriter, Items, Value, id_struct
from icechunk.format.manifest import decode_manifest
from icechunk.format.metadata import metadata_from_tables
from icechunk.format.repo.codec import decode_repo
from icechunk.format.snapshot.codec import decode_snapshot
from icechunk.format.transaction import decode_transaction_log
from tests.raising import raises
from tools.fuzz.decoders import DECODERS, FLEXBUFFERS, attempt, fixtures, mutate, mutate_file, targets


@pytest.mark.parametrize("target", sorted(targets()))
@settings(max_examples=150)
@given(seed=st.integers(0, 2**63))
def test_mutated_files_are_read_or_refused_with_a_format_error(target: str, seed: int) -> None:
    decoder, mutator, seeds = targets_of(target)
    chance = random.Random(seed)
    assert attempt(decoder, mutator(chance, chance.choice(seeds))) is None


_TARGETS = targets()


def targets_of(name: str) -> Any:
    return _TARGETS[name]


def test_the_fuzz_target_notices_another_error() -> None:
    def broken(data: bytes) -> None:
        raise IndexError("out of range")

    assert attempt(broken, b"") == "IndexError: out of range"
    assert attempt(decode_repo, b"") is None
    chance = random.Random(0)
    assert mutate(chance, FLEXBUFFERS[2]) != FLEXBUFFERS[2]
    assert mutate_file(chance, fixtures(FileType.REPO_INFO)[0]) != fixtures(FileType.REPO_INFO)[0]


@pytest.mark.parametrize("file_type", list(DECODERS))
def test_every_truncation_of_the_payload_is_a_format_error(file_type: FileType) -> None:
    smallest = min(fixtures(file_type), key=len)
    version, payload = unseal(smallest, file_type)
    for size in range(8, len(payload), max(1, len(payload) // 100)):
        assert attempt(DECODERS[file_type], seal(file_type, version, payload[:size], 1)) is None


@pytest.mark.parametrize("file_type", list(DECODERS))
def test_every_word_replaced_by_a_wild_offset_is_a_value_or_a_format_error(file_type: FileType) -> None:
    smallest = min(fixtures(file_type), key=len)
    version, payload = unseal(smallest, file_type)
    for start, wild in enumerate((0, 0x7FFFFFFF, 0xFFFFFFFF)):
        for at in range(4 * start, len(payload) - 3, 12):
            data = payload[:at] + struct.pack("<I", wild) + payload[at + 4 :]
            assert attempt(DECODERS[file_type], seal(file_type, version, data, 1)) is None


def refused(decoder: Callable[[bytes], Any], data: bytes, reason: str) -> None:
    start = time.perf_counter()
    with pytest.raises(FormatError, match=reason):  # words: only they tell the defect
        decoder(data)
    assert time.perf_counter() - start < 2


def test_a_vector_of_absurd_length_is_refused_at_once() -> None:
    slots: dict[int, Value] = {0: id_struct(bytes(12)), 1: Items(b"", 2**32 - 1)}
    payload = FlatWriter().finish(FlatTable(slots))
    refused(decode_manifest, seal(FileType.MANIFEST, 2, payload), "4294967295 items")


def test_many_offsets_to_one_large_array_are_refused_before_memory_fills() -> None:
    # a thousand arrays whose references are the same vector of a hundred thousand
    writer = FlatWriter()
    payload = writer.finish(FlatTable({0: id_struct(bytes(12)), 1: Items(bytes(4000), 1000, 4)}))
    root = struct.unpack_from("<I", payload)[0]
    fields = root - struct.unpack_from("<i", payload, root)[0]
    arrays_field = root + struct.unpack_from("<H", payload, fields + 6)[0]
    first = arrays_field + struct.unpack_from("<I", payload, arrays_field)[0] + 4
    array = writer.table(FlatTable({0: id_struct(b"n" * 8), 1: Items(bytes(400_000), 100_000, 4)}))
    for i in range(1000):
        struct.pack_into("<I", writer.out, first + 4 * i, array - first - 4 * i)
    refused(decode_manifest, seal(FileType.MANIFEST, 2, writer.out), "overlap|is in it twice|more tables")


def test_a_snapshot_that_repeats_one_node_many_times_is_refused() -> None:
    data = max(fixtures(FileType.SNAPSHOT), key=len)
    version, payload = unseal(data, FileType.SNAPSHOT)
    octets = bytearray(payload)
    root = struct.unpack_from("<I", octets)[0]
    fields = root - struct.unpack_from("<i", octets, root)[0]
    nodes_field = root + struct.unpack_from("<H", octets, fields + 4 + 2 * 2)[0]
    vector = nodes_field + struct.unpack_from("<I", octets, nodes_field)[0]
    count = struct.unpack_from("<I", octets, vector)[0]
    target = vector + 4 + struct.unpack_from("<I", octets, vector + 4)[0]
    for i in range(count):
        at = vector + 4 + 4 * i
        if target > at:
            struct.pack_into("<I", octets, at, target - at)
    refused(decode_snapshot, seal(FileType.SNAPSHOT, version, octets), "twice")


def test_message_pack_that_is_corrupt_or_deep_is_a_format_error() -> None:
    for value in (
        b"\xc1",
        b"\x91" * 5000,
        b"\xdd\xff\xff\xff\xff",
        b"\xa2\xff\xff",
        b"\x81\x90\x01",
        b"\xd4\x01\x01",
        b"",
    ):
        payload = FlatWriter().finish(FlatTable({0: [FlatTable({0: "name", 1: value})]}))
        items = Buffer(bytes(payload), "test").root().tables(0)
        assert items is not None
        with raises(FormatError, "deserialization", "MessagePack"):
            metadata_from_tables(items, 1)


def test_a_transaction_log_whose_chunks_differ_in_rank_has_those_of_the_most_frequent_rank() -> None:
    def chunk(coords: list[int]) -> FlatTable:
        return FlatTable({0: Items(struct.pack(f"<{len(coords)}I", *coords), len(coords), 4)})

    ids = Items(b"", 0)
    updated = FlatTable({0: id_struct(b"n" * 8), 1: [chunk([0]), chunk([0, 1]), chunk([0, 2])]})
    slots: dict[int, Value] = {0: id_struct(bytes(12)), **dict.fromkeys(range(1, 7), ids), 7: [updated]}
    payload = FlatWriter().finish(FlatTable(slots))
    log = decode_transaction_log(seal(FileType.TRANSACTION_LOG, 2, payload))
    assert {node: coords.tolist() for node, coords in log.updated_chunks.items()} == {b"n" * 8: [[0, 1], [0, 2]]}
