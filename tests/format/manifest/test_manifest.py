from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from random import Random
from typing import Any
from unittest import mock

import flatbuffers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.errors import FormatError, InvalidInputError
from icechunk.format.envelope import FileType, seal, unseal
from icechunk.format.ids import NodeId, ObjectId, encode_id
from icechunk.format.manifest import decode_manifest, encode_manifest, encoding
from icechunk.format.manifest.decoding import decode_coords, decode_manifests
from icechunk.format.manifest.refs_by_node import of_rank
from icechunk.format.values import INLINE, LAST_MODIFIED, NATIVE, VIRTUAL, ChunkRef, ChunkRefs, Manifest
from icechunk.runtime.zstd import zstd
from tests.raising import raises
from tools.fuzz.strategies import chunk_refs, contents, manifests, rows

NODE = NodeId(b"n" * 8)
ID = ObjectId(b"m" * 12)


def one_array(refs: ChunkRefs) -> Manifest:
    return Manifest(id=ID, arrays={NODE: refs})


def native(coords: list[tuple[int, ...]]) -> ChunkRefs:
    n = len(coords)
    return ChunkRefs(
        coords=np.array(coords, np.uint32),
        kind=np.full(n, NATIVE, np.uint8),
        offset=np.arange(n, dtype=np.uint64),
        length=np.full(n, 7, np.uint64),
        chunk_id=np.frombuffer(bytes(range(12)) * n, "V12"),
        location=np.full(n, -1, np.int32),
    )


@settings(max_examples=100)
@given(manifests(), st.sampled_from((1, 2)))
def test_manifests_come_back_as_they_were(manifest: Manifest, spec_version: int) -> None:
    again = decode_manifest(encode_manifest(manifest, spec_version), expected_id=manifest.id)
    assert contents(again) == contents(manifest)
    assert all(refs.coords.dtype == np.uint32 for refs in again.arrays.values())


@settings(max_examples=100)
@given(manifests(), st.sampled_from((1, 2)))
def test_few_native_and_inline_references_are_written_to_the_same_bytes_as_many(
    manifest: Manifest, spec_version: int
) -> None:
    arrays = {id: refs.take(refs.kind != VIRTUAL) for id, refs in manifest.arrays.items()}
    few = replace(manifest, arrays=arrays)
    # private: the number from which rows are written together
    with mock.patch.object(encoding, "_FEW", -1):
        together = encode_manifest(few, spec_version)
    assert encode_manifest(few, spec_version) == together


def read_independently(payload: bytes) -> list[tuple[Any, ...]]:
    """The references of the first array, by the accessors of the flatbuffers package."""

    def field(table: flatbuffers.table.Table, slot: int) -> int:
        return int(table.Offset(4 + 2 * slot))

    def vector(table: flatbuffers.table.Table, slot: int) -> tuple[int, int]:
        return table.Vector(field(table, slot)), table.VectorLen(field(table, slot))

    def tables(table: flatbuffers.table.Table, slot: int) -> list[flatbuffers.table.Table]:
        start, n = vector(table, slot)
        return [flatbuffers.table.Table(table.Bytes, table.Indirect(start + 4 * i)) for i in range(n)]

    def number(table: flatbuffers.table.Table, slot: int, flags: Any) -> Any:
        at = field(table, slot)
        return table.Get(flags, table.Pos + at) if at else 0

    root = flatbuffers.table.Table(payload, struct.unpack_from("<I", payload)[0])
    found = []
    for ref in tables(tables(root, 1)[0], 1):
        start, n = vector(ref, 0)
        offset_at, length_at = field(ref, 2), field(ref, 3)
        assert not offset_at or (ref.Pos + offset_at) % 8 == 0
        assert not length_at or (ref.Pos + length_at) % 8 == 0
        assert ref.Pos % 4 == 0
        assert start % 4 == 0
        coords = struct.unpack_from(f"<{n}I", payload, start)
        numbers = flatbuffers.number_types
        offset, length = number(ref, 2, numbers.Uint64Flags), number(ref, 3, numbers.Uint64Flags)
        if field(ref, 1):
            start, n = vector(ref, 1)
            found.append((coords, ChunkRef(INLINE, data=payload[start : start + n], length=n)))
        elif at := field(ref, 4):
            id = ObjectId(payload[ref.Pos + at : ref.Pos + at + 12])
            found.append((coords, ChunkRef(NATIVE, chunk_id=id, offset=offset, length=length)))
        else:
            location = ref.String(ref.Pos + field(ref, 5)).decode()
            etag = ref.String(ref.Pos + field(ref, 6)).decode() if field(ref, 6) else None
            modified = number(ref, 7, numbers.Uint32Flags) or None
            found.append((coords, ChunkRef(3, None, None, location, offset, length, etag, modified)))
    return found


@settings(max_examples=60)
@given(chunk_refs())
def test_an_independent_reader_reads_our_bytes_and_finds_them_aligned(refs: ChunkRefs) -> None:
    _, payload = unseal(encode_manifest(one_array(refs)), FileType.MANIFEST)
    assert read_independently(payload[:]) == rows(refs)


def test_plain_manifests_have_compression_0_in_both_spec_versions() -> None:
    for spec_version in (1, 2):
        version, payload = unseal(encode_manifest(one_array(native([(0,)])), spec_version), FileType.MANIFEST)
        assert version == spec_version
        root = flatbuffers.table.Table(payload, struct.unpack_from("<I", payload)[0])
        assert payload[root.Pos + root.Offset(4 + 2 * 3)] == 0


def test_rows_out_of_order_are_sorted_when_written() -> None:
    again = decode_manifest(encode_manifest(one_array(native([(1, 2), (0, 9), (1, 0)]))))
    refs = again.arrays[NODE]
    assert refs.coords.tolist() == [[0, 9], [1, 0], [1, 2]]
    assert refs.offset.tolist() == [1, 2, 0]


def test_two_references_for_one_chunk_are_refused() -> None:
    with raises(InvalidInputError, "invalid-chunk-index", encode_id(NODE)):
        encode_manifest(one_array(native([(1, 2), (0, 0), (1, 2)])))


def test_a_row_of_no_known_kind_is_refused() -> None:
    refs = replace(native([(0,)]), kind=np.array([9], np.uint8))
    with raises(InvalidInputError, "serialization", 9):
        encode_manifest(one_array(refs))


TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=9)


@given(TEXTS, st.data())
def test_many_strings_have_the_bytes_of_one_after_the_other(texts: list[str], data: st.DataObject) -> None:
    used = data.draw(st.lists(st.integers(0, len(texts) - 1))) if texts else []
    start = 4 * data.draw(st.integers(0, 9))
    written, at = encoding.strings(texts, np.array(used, np.int64), start)
    expected, places = b"", {}
    for i in sorted(set(used)):
        raw = texts[i].encode()
        places[i] = start + len(expected)
        expected += struct.pack("<I", len(raw)) + raw + b"\0"
        expected += bytes(-len(expected) % 4)
    assert written == expected
    assert {i: int(at[i]) for i in places} == places


def test_equal_locations_of_many_rows_are_stored_once() -> None:
    n = 100_000
    refs = replace(
        native([(i,) for i in range(n)]),
        kind=np.full(n, 3, np.uint8),
        location=np.zeros(n, np.int32),
        locations=("s3://bucket/key", "unused"),
        checksum_kind=np.full(n, LAST_MODIFIED, np.uint8),
        checksum=np.full(n, 1_700_000_000),
    )
    _, payload = unseal(encode_manifest(one_array(refs)), FileType.MANIFEST)
    assert payload[:].count(b"s3://bucket/key") == 1
    assert b"unused" not in payload
    again = decode_manifest(encode_manifest(one_array(refs))).arrays[NODE]
    assert again.locations == ("s3://bucket/key",)
    assert again.row(n - 1).last_modified == 1_700_000_000


def independent_manifest(refs: Sequence[Mapping[int, Any]], dictionary: bytes | None = None) -> bytes:
    """A manifest from the flatbuffers package's builder, back to front and with every string apart."""
    builder = flatbuffers.Builder()
    tables = []
    for ref in refs:
        offsets = {slot: builder.CreateString(ref[slot]) for slot in (5, 6) if slot in ref}
        offsets |= {slot: builder.CreateByteVector(ref[slot]) for slot in (1, 8) if slot in ref}
        offsets[0] = builder.CreateNumpyVector(np.array(ref[0], np.uint32))
        builder.StartObject(10)
        if 4 in ref:
            builder.Prep(1, 12)
            builder.head -= 12
            builder.Bytes[builder.head : builder.head + 12] = ref[4]
            builder.PrependStructSlot(4, builder.Offset(), 0)
        for slot in (2, 3):
            builder.PrependUint64Slot(slot, ref.get(slot, 0), 0)
        for slot, offset in offsets.items():
            builder.PrependUOffsetTRelativeSlot(slot, offset, 0)
        tables.append(builder.EndObject())
    builder.StartVector(4, len(tables), 4)
    for table in reversed(tables):
        builder.PrependUOffsetTRelative(table)
    vector = builder.EndVector()
    dictionary_at = None if dictionary is None else builder.CreateByteVector(dictionary)
    builder.StartObject(2)
    builder.Prep(1, 8)
    builder.head -= 8
    builder.Bytes[builder.head : builder.head + 8] = NODE
    builder.PrependStructSlot(0, builder.Offset(), 0)
    builder.PrependUOffsetTRelativeSlot(1, vector, 0)
    array = builder.EndObject()
    builder.StartVector(4, 1, 4)
    builder.PrependUOffsetTRelative(array)
    arrays = builder.EndVector()
    builder.StartObject(5)
    builder.Prep(1, 12)
    builder.head -= 12
    builder.Bytes[builder.head : builder.head + 12] = ID
    builder.PrependStructSlot(0, builder.Offset(), 0)
    builder.PrependUOffsetTRelativeSlot(1, arrays, 0)
    if dictionary_at is not None:
        builder.PrependUOffsetTRelativeSlot(2, dictionary_at, 0)
    builder.Finish(builder.EndObject(), file_identifier=b"Ichk")
    return seal(FileType.MANIFEST, 2, bytes(builder.Output()))


def test_another_writer_s_layout_is_read() -> None:
    data = independent_manifest(
        [
            {0: [0, 1], 4: b"c" * 12, 3: 10},
            {0: [0, 2], 5: "s3://a/b", 2: 5, 3: 10, 6: "etag"},
            {0: [0, 3], 1: b"inline"},
            {0: [1, 0], 5: "s3://a/b", 3: 10},
            {0: [1, 1], 1: b""},
        ]
    )
    refs = decode_manifest(data, expected_id=ID).arrays[NODE]
    assert rows(refs) == [
        ((0, 1), ChunkRef(NATIVE, chunk_id=ObjectId(b"c" * 12), length=10)),
        ((0, 2), ChunkRef(3, None, None, "s3://a/b", 5, 10, "etag")),
        ((0, 3), ChunkRef(INLINE, data=b"inline", length=6)),
        ((1, 0), ChunkRef(3, None, None, "s3://a/b", 0, 10)),
        ((1, 1), ChunkRef(INLINE, data=b"")),
    ]
    assert refs.locations == ("s3://a/b",)


def test_unsorted_references_of_another_writer_are_sorted_and_repeated_ones_refused() -> None:
    refs: list[dict[int, Any]] = [{0: [i], 4: bytes([i]) * 12, 3: 1} for i in (5, 1, 3)]
    assert decode_manifest(independent_manifest(refs)).arrays[NODE].coords.tolist() == [[1], [3], [5]]
    with raises(FormatError, "invalid-file-format", "two references for one chunk"):  # words: only they tell the defect
        decode_manifest(independent_manifest([*refs, refs[0]]))


def test_locations_compressed_with_a_dictionary_are_read() -> None:
    samples = [f"s3://bucket/prefix/{i % 7}/file-{i}.nc".encode() for i in range(500)]
    dictionary = zstd.train_dictionary(1024, [*samples])
    compressor = zstd.ZstdCompressor(dict_data=dictionary)
    refs = [{0: [i], 8: compressor.compress(sample), 3: 1} for i, sample in enumerate(samples)]
    again = decode_manifest(independent_manifest(refs, dictionary.as_bytes())).arrays[NODE]
    assert [again.row(i).location for i in range(500)] == [sample.decode() for sample in samples]
    with raises(FormatError, "invalid-file-format", "no dictionary"):  # words: only they tell the defect
        decode_manifest(independent_manifest(refs))
    with raises(FormatError, "invalid-file-format", "corrupt"):  # words: only they tell the defect
        decode_manifest(independent_manifest(refs, bytes(2000)))


@pytest.mark.parametrize(
    ("ref", "reason"),
    [
        ({0: [0]}, "not exactly one"),
        ({0: [0], 4: bytes(12), 1: b"x"}, "not exactly one"),
        ({0: [0], 5: "a", 8: b"x"}, "not exactly one"),
        ({0: [0] * 2000, 4: bytes(12)}, "2000 coordinates"),
    ],
)
def test_a_reference_of_no_kind_or_two_kinds_is_a_format_error(ref: dict[int, Any], reason: str) -> None:
    with raises(FormatError, "invalid-file-format", reason):  # words: only they tell the defect
        decode_manifest(independent_manifest([ref]))


def test_references_of_different_ranks_in_one_array_are_found_by_their_rank() -> None:
    refs = [{0: [0], 4: bytes(12)}, {0: [1, 2], 4: bytes(12)}, {0: [3, 4], 4: bytes(12)}]
    manifest = decode_manifest(independent_manifest(refs))
    (node,) = manifest.arrays
    assert manifest.num_chunk_refs == 3
    assert manifest.arrays[node].coords.tolist() == [[1, 2], [3, 4]]
    found = [of_rank(manifest.arrays, node, ndim) for ndim in range(4)]
    assert [None if refs is None else refs.coords.tolist() for refs in found] == [[], [[0]], [[1, 2], [3, 4]], []]
    assert of_rank(manifest.arrays, NodeId(b"\xff" * 8), 1) is None
    # A manifest of this package has one rank for each array.
    again = decode_manifest(encode_manifest(manifest))
    assert again.arrays[node].coords.tolist() == [[1, 2], [3, 4]]
    assert again.num_chunk_refs == 2


def test_many_small_arrays_share_a_manifest() -> None:
    arrays = {
        NodeId(i.to_bytes(8)): native([(j,) * (i % 4) for j in range(1 if i % 4 == 0 else i % 5)]) for i in range(200)
    }
    arrays = {node: refs for node, refs in arrays.items() if len(refs)}
    manifest = Manifest(id=ID, arrays=arrays)
    assert contents(decode_manifest(encode_manifest(manifest))) == contents(manifest)


def singly(files: Sequence[tuple[ObjectId, bytes]]) -> list[list[tuple[NodeId, list[tuple[Any, ...]]]]]:
    return [contents(decode_manifest(data, expected_id=id)) for id, data in files]


def together(files: Sequence[tuple[ObjectId, bytes]]) -> list[list[tuple[NodeId, list[tuple[Any, ...]]]]]:
    """The same by `decode_manifests`."""
    found: list[dict[NodeId, ChunkRefs]] = [{} for _ in files]
    for some in decode_manifests(files):
        for part in some.parts:
            for i, (array, first, last) in enumerate(
                zip(part.arrays.tolist(), part.edges[:-1].tolist(), part.edges[1:].tolist(), strict=True)
            ):
                assert i == 0 or part.arrays[i - 1] < array
                manifest, node = int(some.manifests[array]), some.nodes[array]
                if last - first >= len(found[manifest].get(node, ())):
                    found[manifest][node] = part.rows.take(slice(first, last))
    manifests = [
        Manifest(id=id, arrays=dict(sorted(arrays.items()))) for (id, _), arrays in zip(files, found, strict=True)
    ]
    return list(map(contents, manifests))


@pytest.mark.thorough
@settings(max_examples=60)
@given(st.lists(st.tuples(manifests(), st.sampled_from((1, 2))), max_size=5))
def test_manifests_that_are_read_together_have_the_contents_of_each(many: list[tuple[Manifest, int]]) -> None:
    files = [(one.id, encode_manifest(one, spec_version)) for one, spec_version in many]
    assert together(files) == singly(files)


@settings(max_examples=200)
@given(st.randoms(use_true_random=False))
def test_of_manifests_that_are_read_together_a_corrupt_one_is_refused_or_read_as_if_it_were_alone(rng: Random) -> None:
    files = []
    for n in range(3):
        refs = native([(n, m) for m in range(rng.randrange(1, 4))])
        one = Manifest(id=ObjectId(bytes([n]) * 12), arrays={NodeId(bytes([i]) * 8): refs for i in range(2)})
        _, payload = unseal(encode_manifest(one), FileType.MANIFEST)
        octets = bytearray(payload)
        if n == 1:
            for _ in range(rng.choice((1, 1, 3))):
                at = rng.randrange(len(octets))
                octets[at] = rng.choice((0, 1, 4, 255, octets[at] ^ 1 << rng.randrange(8)))
        octets[4:8] = b"Ichk"
        files.append((one.id, seal(FileType.MANIFEST, 2, octets)))
    try:
        found = together(files)
    except FormatError:
        return
    assert found == singly(files)


@settings(max_examples=100)
@given(manifests(), st.sampled_from((1, 2)))
def test_coordinates_alone_are_those_of_the_references(manifest: Manifest, spec_version: int) -> None:
    data = encode_manifest(manifest, spec_version)
    for node, refs in manifest.arrays.items():
        found = decode_coords(data, node, refs.ndim, expected_id=manifest.id)
        if not len(refs):
            assert found is None or not len(found)
            continue
        assert found is not None
        assert found.dtype == np.uint32
        assert sorted(found.tolist()) == sorted(refs.coords.tolist())
        assert decode_coords(data, node, refs.ndim + 1) is None
    assert decode_coords(data, NodeId(bytes(8)), 1) is None or NodeId(bytes(8)) in manifest.arrays


@pytest.mark.parametrize("period", [1, 7, 1000, 5000])
def test_coordinates_alone_of_many_references_of_several_kinds(period: int) -> None:
    # Those without an offset, and those in other kinds of chunks, have tables of another length.
    count = 20_000
    numbers = np.arange(count)
    refs = native([(n // 100, n % 100) for n in range(count)])
    refs = replace(refs, offset=(numbers % period).astype(np.uint64), length=(numbers % 3 > 0).astype(np.uint64))
    data = encode_manifest(one_array(refs))
    found = decode_coords(data, NODE, 2)
    assert found is not None
    assert sorted(found.tolist()) == refs.coords.tolist()
    assert decode_coords(data, NODE, 3) is None


@settings(max_examples=300)
@given(st.randoms(use_true_random=False))
def test_coordinates_alone_of_a_corrupt_manifest_are_refused_or_those_of_the_references(rng: Random) -> None:
    _, payload = unseal(encode_manifest(one_array(native([(n, 2 * n) for n in range(50)]))), FileType.MANIFEST)
    octets = bytearray(payload)
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.randrange(len(octets))
        octets[at] = rng.choice((0, 1, 4, 255, octets[at] ^ 1 << rng.randrange(8)))
    octets[4:8] = b"Ichk"
    data = seal(FileType.MANIFEST, 2, octets)
    try:
        expected = decode_manifest(data)
    except FormatError:
        with suppress(FormatError):
            decode_coords(data, NODE, 2)
        return
    found = decode_coords(data, NODE, 2)
    if found is not None:
        assert sorted(found.tolist()) == sorted(expected.arrays[NODE].coords.tolist())


def test_coordinates_of_a_manifest_of_another_id_are_not_read() -> None:
    with pytest.raises(FormatError):
        decode_coords(encode_manifest(one_array(native([(0,)]))), NODE, 1, expected_id=ObjectId(b"o" * 12))
