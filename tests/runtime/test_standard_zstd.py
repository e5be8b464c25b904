"""zstd by the standard library: frames that zstandard reads, and zstandard's refusals."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icechunk.runtime import standard_zstd

zstandard = pytest.importorskip("zstandard")

SAMPLES = [b"s3://bucket/data/%04d/file-%d.nc" % (n, n * 7919) for n in range(200)]
LEVELS = st.integers(-5, 6)


@given(st.binary(max_size=5000), LEVELS, st.booleans(), st.booleans())
def test_each_reads_the_frames_of_the_other(data: bytes, level: int, checksum: bool, sized: bool) -> None:
    how: Any = {"level": level, "write_checksum": checksum, "write_content_size": sized}
    ours = standard_zstd.ZstdCompressor(**how).compress(data)
    theirs = zstandard.ZstdCompressor(**how).compress(data)
    assert standard_zstd.frame_content_size(ours) == zstandard.frame_content_size(ours)
    assert standard_zstd.frame_content_size(theirs) == zstandard.frame_content_size(theirs)
    for frame in (ours, theirs):
        # Without a size both need a limit.
        assert zstandard.ZstdDecompressor().decompress(frame, max_output_size=5000) == data
        assert standard_zstd.ZstdDecompressor().decompress(frame, max_output_size=5000) == data


def test_a_compressor_makes_one_frame_after_the_other() -> None:
    compressor = standard_zstd.ZstdCompressor(write_checksum=True)
    for data in (b"first", b"", b"third" * 1000):
        assert zstandard.ZstdDecompressor().decompress(compressor.compress(data)) == data


@pytest.mark.parametrize("made_by", ["ours", "theirs"])
def test_a_dictionary_is_shared(made_by: str) -> None:
    library = standard_zstd if made_by == "ours" else zstandard
    content = library.train_dictionary(1000, SAMPLES).as_bytes()
    ours, theirs = standard_zstd.ZstdCompressionDict(content), zstandard.ZstdCompressionDict(content)
    assert ours.as_bytes() == theirs.as_bytes()
    compressor = standard_zstd.ZstdCompressor(level=3, dict_data=ours)
    reader = standard_zstd.ZstdDecompressor(dict_data=ours)
    for text in SAMPLES:
        frame = compressor.compress(text)
        assert zstandard.ZstdDecompressor(dict_data=theirs).decompress(frame) == text
        assert reader.decompress(zstandard.ZstdCompressor(dict_data=theirs).compress(text)) == text
    assert len(frame) < len(zstandard.ZstdCompressor().compress(text))


def test_a_dictionary_that_is_not_trained_is_one_of_raw_bytes() -> None:
    content = b"".join(SAMPLES)
    ours, theirs = standard_zstd.ZstdCompressionDict(content), zstandard.ZstdCompressionDict(content)
    frame = zstandard.ZstdCompressor(dict_data=theirs).compress(SAMPLES[7])
    assert standard_zstd.ZstdDecompressor(dict_data=ours).decompress(frame) == SAMPLES[7]


def test_too_few_samples_make_no_dictionary() -> None:
    with pytest.raises(standard_zstd.ZstdError):
        standard_zstd.train_dictionary(1000, [b"a"])


FRAME = zstandard.ZstdCompressor(write_checksum=True).compress(b"contents" * 100)
UNSIZED = zstandard.ZstdCompressor(write_content_size=False).compress(b"contents" * 100)


@pytest.mark.parametrize(
    ("frame", "limit"),
    [
        (FRAME[:-1], 0),
        (FRAME[:20], 0),
        (FRAME[:-1] + bytes([FRAME[-1] ^ 1]), 0),
        (FRAME + b"more", 0),
        (b"no frame at all", 0),
        (b"", 0),
        (UNSIZED, 0),
        (UNSIZED, 799),
        (UNSIZED[:-1], 800),
    ],
)
def test_a_frame_that_zstandard_refuses_is_refused(frame: bytes, limit: int) -> None:
    with pytest.raises(zstandard.ZstdError):
        zstandard.ZstdDecompressor().decompress(frame, limit, allow_extra_data=False)
    with pytest.raises(standard_zstd.ZstdError):
        standard_zstd.ZstdDecompressor().decompress(frame, limit, allow_extra_data=False)


def test_a_frame_without_a_size_is_read_in_pieces() -> None:
    reader = standard_zstd.ZstdDecompressor().decompressobj()
    parts = [reader.decompress(UNSIZED[i : i + 5]) for i in range(0, len(UNSIZED), 5)]
    assert b"".join(parts) == b"contents" * 100
    assert reader.eof
