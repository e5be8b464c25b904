from __future__ import annotations

import random
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from icechunk.errors import FormatError, InvalidInputError
from icechunk.format import envelope
from icechunk.format.envelope import FileType, allow_metadata_bytes, seal, unseal
from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.manifest.encoding import encode_manifest
from icechunk.format.snapshot import node_encoding
from icechunk.format.snapshot.codec import decode_snapshot, encode_snapshot
from icechunk.format.transaction import encode_transaction_log
from icechunk.format.values import ID12, INLINE, ChunkRefs, Manifest, NodeKind, NodeSnapshot, TransactionLog
from icechunk.runtime.about import CLIENT_NAME
from icechunk.runtime.zstd import zstd
from tests.format.snapshot.test_snapshot import EMPTY
from tests.raising import raises

PAYLOAD = b"\x0c\0\0\0Ichk" + bytes(range(200))
WAYS = [sys.maxsize, *([0] if envelope._CAN_TAKE_LARGE_PAGES else [])]
"""Size from which payloads are decompressed to large pages: none is, or all are."""


@pytest.fixture(params=WAYS)
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Payloads are decompressed to either kind of memory."""
    monkeypatch.setattr(envelope, "_LARGE_PAGES_FROM", request.param)


def test_a_sealed_payload_comes_back_with_its_spec_version() -> None:
    data = seal(FileType.SNAPSHOT, 1, PAYLOAD)
    assert unseal(data, FileType.SNAPSHOT) == (1, PAYLOAD)


def test_the_header_is_laid_out_as_the_format_says() -> None:
    data = seal(FileType.REPO_INFO, 2, PAYLOAD)
    assert data[:12] == bytes.fromhex("494345f09fa78a4348554e4b")
    assert data[12:36] == CLIENT_NAME.encode().ljust(24)
    assert tuple(data[36:39]) == (2, 6, 1)


def test_a_frame_without_its_content_size_is_read() -> None:
    data = seal(FileType.MANIFEST, 2, PAYLOAD)
    frame = zstd.ZstdCompressor(write_content_size=False).compress(PAYLOAD)
    assert unseal(data[:39] + frame, FileType.MANIFEST) == (2, PAYLOAD)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("with_size", [True, False])
def test_truncation_at_any_byte_is_a_format_error(with_size: bool) -> None:
    header = seal(FileType.MANIFEST, 2, PAYLOAD)[:39]
    data = header + zstd.ZstdCompressor(write_content_size=with_size).compress(PAYLOAD)
    for size in range(len(data)):
        with pytest.raises(FormatError):
            unseal(data[:size], FileType.MANIFEST)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("with_checksum", [True, False])
@pytest.mark.parametrize("size", [1, 1000, 2**17, 2**17 + 1, 2**21])
def test_every_payload_is_read_to_either_kind_of_memory(size: int, with_checksum: bool) -> None:
    header = seal(FileType.SNAPSHOT, 2, PAYLOAD)[:39]
    # Blocks of all kinds: compressed, as they are, and of one byte.
    payload = PAYLOAD[:8] + random.Random(size).randbytes(size) + bytes(size) + b"icechunk" * size
    data = header + zstd.ZstdCompressor(write_checksum=with_checksum).compress(payload)
    version, read = unseal(data, FileType.SNAPSHOT)
    assert (version, read[:]) == (2, payload)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("after", [b"\0", bytes(100), zstd.ZstdCompressor().compress(PAYLOAD)])
def test_bytes_after_the_frame_are_a_format_error(after: bytes) -> None:
    with raises(FormatError, "invalid-file-format"):
        unseal(seal(FileType.MANIFEST, 2, PAYLOAD) + after, FileType.MANIFEST)


@pytest.mark.usefixtures("either_way")
def test_a_frame_with_less_or_more_than_it_declares_is_a_format_error() -> None:
    header = seal(FileType.MANIFEST, 2, PAYLOAD)[:39]
    frame = zstd.ZstdCompressor(write_checksum=False).compress(PAYLOAD)
    # a descriptor of one byte, then the size of one byte
    assert frame[4:6] == bytes([0x20, len(PAYLOAD)])
    for size in (len(PAYLOAD) - 1, len(PAYLOAD) + 1):
        with raises(FormatError, "invalid-file-format"):
            unseal(header + frame[:5] + bytes([size]) + frame[6:], FileType.MANIFEST)


def test_a_foreign_file_is_a_format_error_that_names_the_object() -> None:
    with raises(FormatError, "invalid-file-format", "ABC", "magic"):
        unseal(b"PK" + bytes(100), FileType.SNAPSHOT, what="snapshot ABC")


def test_another_file_type_is_a_format_error() -> None:
    with raises(FormatError, "invalid-file-format", "type is 1, 2"):  # words: only they tell the defect
        unseal(seal(FileType.SNAPSHOT, 2, PAYLOAD), FileType.MANIFEST)


def test_a_newer_spec_version_has_a_kind_of_its_own() -> None:
    with raises(FormatError, "unsupported-spec-version", 3):
        unseal(seal(FileType.SNAPSHOT, 3, PAYLOAD), FileType.SNAPSHOT)


def test_unknown_compression_is_a_format_error() -> None:
    data = bytearray(seal(FileType.SNAPSHOT, 2, PAYLOAD))
    data[38] = 0
    with raises(FormatError, "invalid-file-format", "compression 0"):  # words: only they tell the defect
        unseal(bytes(data), FileType.SNAPSHOT)


def test_a_payload_without_the_file_identifier_is_a_format_error() -> None:
    with raises(FormatError, "invalid-file-format", "'Ichk'"):
        unseal(seal(FileType.SNAPSHOT, 2, b"x" * 50), FileType.SNAPSHOT)


def frame_of_zeros(size: int, *, with_size: bool) -> bytes:
    return zstd.ZstdCompressor(write_content_size=with_size).compress(bytes(size))


@pytest.mark.parametrize("with_size", [True, False])
@pytest.mark.parametrize(
    ("file_type", "limit_mib"),
    [(FileType.SNAPSHOT, 256), (FileType.MANIFEST, 256), (FileType.TRANSACTION_LOG, 32), (FileType.REPO_INFO, 128)],
)
def test_a_decompression_bomb_is_refused_before_it_fills_memory(
    file_type: FileType, limit_mib: int, with_size: bool
) -> None:
    size = (limit_mib + 64) * 2**20
    frame = frame_of_zeros(size, with_size=with_size)
    assert len(frame) < 50_000
    head = seal(file_type, 2, PAYLOAD)[:39]
    tracemalloc.start()
    try:
        with raises(FormatError, "invalid-file-format", size if with_size else limit_mib * 2**20):
            unseal(head + frame, file_type)
        assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("file_type", "limit_mib"),
    [(FileType.SNAPSHOT, 256), (FileType.MANIFEST, 256), (FileType.TRANSACTION_LOG, 32), (FileType.REPO_INFO, 128)],
)
def test_a_file_of_any_ratio_is_read_up_to_the_size_that_its_kind_may_have(file_type: FileType, limit_mib: int) -> None:
    data = seal(file_type, 2, PAYLOAD)[:39] + frame_of_zeros(limit_mib * 2**20, with_size=True)
    with raises(FormatError, "invalid-file-format", "'Ichk'"):  # it was decompressed
        unseal(data, file_type)


@pytest.mark.parametrize("with_size", [True, False])
def test_a_large_payload_is_in_memory_once(with_size: bool) -> None:
    frame = frame_of_zeros(200 * 2**20, with_size=with_size)
    tracemalloc.start()
    try:
        with raises(FormatError, "invalid-file-format", "'Ichk'"):
            unseal(seal(FileType.MANIFEST, 2, PAYLOAD)[:39] + frame, FileType.MANIFEST)
        assert tracemalloc.get_traced_memory()[1] < 300 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("file_type", list(FileType))
def test_a_file_with_a_higher_ratio_than_readers_accept_is_written_so_that_it_is_read(
    file_type: FileType, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = envelope._BOUNDS[file_type]
    monkeypatch.setitem(envelope._BOUNDS, file_type, bound._replace(any_ratio_bytes=2**20))
    for repeats in (2**18, 2**22):
        payload = PAYLOAD[:8] + b"abc" * repeats
        read = unseal(seal(file_type, 2, payload), file_type)[1]
        assert read[: len(payload)] == payload
        assert len(read) < len(payload) * 1.05


def test_a_snapshot_of_a_hundred_thousand_arrays_with_the_same_metadata_is_far_from_its_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The official library writes a document for each node.
    monkeypatch.setattr(node_encoding, "_SHARING", 1)
    ids = random.Random(0)
    document = b'{"attributes":{"units":"K","long_name":"' + b"temperature " * 80 + b'"}}'
    nodes = {
        f"/{n}": NodeSnapshot(id=NodeId(ids.randbytes(8)), path=f"/{n}", kind=NodeKind.GROUP, user_data=document)
        for n in range(100_000)
    }
    data = encode_snapshot(EMPTY.with_nodes(nodes))
    assert len(decode_snapshot(data).nodes) == 100_000
    ratio = zstd.frame_content_size(data[39:]) / len(data)
    assert 20 < ratio < envelope._BOUNDS[FileType.SNAPSHOT].ratio * 0.8


@pytest.mark.parametrize("file_type", [FileType.MANIFEST, FileType.TRANSACTION_LOG])
def test_a_file_of_records_that_compress_best_is_far_from_its_bound(file_type: FileType) -> None:
    """Regular coordinates and, in the manifest, equal inline chunks of the size up to which chunks are inline."""
    count, node, id = 100_000, NodeId(bytes(8)), ObjectId(bytes(12))
    coords = np.stack([np.zeros(count), np.arange(count) // 1000, np.arange(count) % 1000], axis=1).astype(np.uint32)
    if file_type == FileType.MANIFEST:
        refs = replace(
            ChunkRefs.empty(3),
            coords=coords,
            kind=np.full(count, INLINE, np.uint8),
            offset=np.zeros(count, np.uint64),
            length=np.full(count, 512, np.uint64),
            chunk_id=np.zeros(count, ID12),
            location=np.full(count, -1, np.int32),
            inline_data=bytes(512),
        )
        data = encode_manifest(Manifest(id=id, arrays={node: refs}))
    else:
        data = encode_transaction_log(TransactionLog(id=id, updated_chunks={node: coords}))
    ratio = zstd.frame_content_size(data[39:]) / len(data)
    assert 5 < ratio < envelope._BOUNDS[file_type].ratio * 0.8
    # Larger files of the same records, beyond the size up to which every ratio is believed, are thus read too.
    assert len(unseal(data, file_type)[1]) == zstd.frame_content_size(data[39:])


def test_a_snapshot_of_many_arrays_with_the_same_long_attributes_is_read() -> None:
    document = b'{"attributes":{"crs_wkt":"' + random.Random(1).randbytes(30_000).hex().encode() + b'"}}'
    nodes = {
        f"/{n}": NodeSnapshot(id=NodeId(n.to_bytes(8)), path=f"/{n}", kind=NodeKind.GROUP, user_data=document)
        for n in range(2000)
    }
    snapshot = EMPTY.with_nodes(nodes)
    data = encode_snapshot(snapshot)
    assert len(data) * 512 < 2000 * len(document)
    assert decode_snapshot(data) == snapshot


def test_a_frame_that_claims_an_absurd_size_is_refused_at_once() -> None:
    # magic, descriptor of a frame with an 8-byte size, window, size
    frame = bytes.fromhex("28b52ffd") + b"\xc0\x00" + (2**60).to_bytes(8, "little") + bytes(10)
    with raises(FormatError, "invalid-file-format", 2**60):
        unseal(seal(FileType.MANIFEST, 2, PAYLOAD)[:39] + frame, FileType.MANIFEST)


@pytest.mark.usefixtures("either_way")
def test_a_flipped_bit_anywhere_after_the_client_name_is_found() -> None:
    data = seal(FileType.SNAPSHOT, 2, PAYLOAD)
    for at in range(36, len(data)):
        for bit in range(8):
            broken = bytearray(data)
            broken[at] ^= 1 << bit
            try:
                found = unseal(bytes(broken), FileType.SNAPSHOT)
            except FormatError:
                continue
            # A bit of the frame's own header may mean nothing; the payload is what was written.
            assert found[1][:] == PAYLOAD


def test_a_trusted_file_of_any_ratio_is_read_once_that_is_allowed() -> None:
    payload = PAYLOAD[:8] + bytes(40 * 2**20)
    header = seal(FileType.TRANSACTION_LOG, 2, PAYLOAD)[:39]
    data = header + zstd.ZstdCompressor(level=3).compress(payload)
    with raises(FormatError, "invalid-file-format", "icechunk.allow_metadata_bytes"):
        unseal(data, FileType.TRANSACTION_LOG)
    allow_metadata_bytes(2**26)
    try:
        assert unseal(data, FileType.TRANSACTION_LOG)[1][:] == payload
    finally:
        allow_metadata_bytes(0)
    with raises(InvalidInputError, "invalid-setting", -1):
        allow_metadata_bytes(-1)
