"""Locations compressed with a dictionary: the same references come back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.errors import InvalidInputError
from icechunk.format.envelope import FileType, unseal
from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.manifest import decode_manifest, encode_manifest
from icechunk.format.manifest.location_compression import LocationCompression, LocationDictionary
from icechunk.format.values import INLINE, NATIVE, VIRTUAL, ChunkRef, ChunkRefs, Manifest
from icechunk.log.session.columns import from_rows
from icechunk.runtime.zstd import zstd
from tests.raising import raises

ALWAYS = LocationCompression(min_refs=1)
ID = ObjectId(b"manifest-id!")


def location(i: int) -> str:
    return f"s3://some-bucket/a/long/prefix/that/repeats/year={1950 + i % 70}/measurement-{i:07d}-ü.nc"


def virtual(count: int, make=location) -> ChunkRefs:  # type: ignore[no-untyped-def]
    rows = {
        (i,): ChunkRef(VIRTUAL, None, None, make(i), i, i + 1, "tag" if i % 3 else None, None) for i in range(count)
    }
    return from_rows(rows, 1)  # type: ignore[arg-type]


def rows(refs: ChunkRefs) -> list[ChunkRef]:
    return [refs.row(i) for i in range(len(refs))]


def encoded(refs: ChunkRefs, how: LocationCompression | None, spec_version: int = 2) -> bytes:
    return encode_manifest(Manifest(id=ID, arrays={NodeId(b"array-01"): refs}), spec_version, 3, how)


def payload(data: bytes) -> bytes:
    return unseal(data, FileType.MANIFEST)[1][:]


def test_compressed_locations_come_back_and_take_less_room() -> None:
    refs = virtual(2000)
    data = encoded(refs, LocationCompression())
    assert rows(decode_manifest(data).arrays[NodeId(b"array-01")]) == rows(refs)
    assert len(payload(data)) < 0.7 * len(payload(encoded(refs, None)))


def test_below_the_minimum_and_in_format_1_locations_stay_plain() -> None:
    refs = virtual(50)
    plain = encoded(refs, None)
    assert encoded(refs, LocationCompression(min_refs=51)) == plain
    assert encoded(refs, LocationCompression(min_refs=50)) != plain
    assert encoded(refs, ALWAYS, spec_version=1) == encoded(refs, None, spec_version=1)


def test_only_virtual_references_count_and_the_others_stay_as_they_are() -> None:
    mixed = {(i,): ChunkRef(VIRTUAL, None, None, location(i), 0, 1) for i in range(30)}
    mixed |= {(100 + i,): ChunkRef(NATIVE, None, ObjectId(bytes([i]) * 12), None, 0, 9) for i in range(30)}
    mixed |= {(200 + i,): ChunkRef(INLINE, bytes([i] * 5), None, None, 0, 5) for i in range(30)}
    refs = from_rows(mixed, 1)  # type: ignore[arg-type]
    assert encoded(refs, LocationCompression(min_refs=31)) == encoded(refs, None)
    back = decode_manifest(encoded(refs, LocationCompression(min_refs=30))).arrays[NodeId(b"array-01")]
    assert rows(back) == rows(refs)


@pytest.mark.parametrize(
    "how",
    [
        LocationCompression(min_refs=1, samples=0),
        LocationCompression(min_refs=1, samples=1),
        LocationCompression(min_refs=1, dictionary_bytes=0),
        LocationCompression(min_refs=1, dictionary_bytes=10),
    ],
    ids=["no samples", "one sample", "no dictionary", "tiny dictionary"],
)
def test_locations_stay_plain_if_no_dictionary_can_be_trained(how: LocationCompression) -> None:
    refs = virtual(100)
    assert encoded(refs, how) == encoded(refs, None)


def test_settings_reach_the_dictionary_and_levels_are_clamped() -> None:
    refs = virtual(3000)
    for size in (300, 1000):
        data = payload(encoded(refs, LocationCompression(min_refs=1, dictionary_bytes=size)))
        assert 0 < len(data) < len(payload(encoded(refs, None)))
    best = encoded(refs, LocationCompression(min_refs=1, level=1_000))
    assert rows(decode_manifest(best).arrays[NodeId(b"array-01")]) == rows(refs)
    least = encoded(refs, LocationCompression(min_refs=1, level=-(2**31)))
    assert len(payload(best)) < len(payload(least))


def test_shared_locations_are_compressed_once() -> None:
    few = virtual(2000, lambda i: location(i // 100))
    distinct = virtual(2000)
    assert len(payload(encoded(few, ALWAYS))) < 0.7 * len(payload(encoded(distinct, ALWAYS)))
    assert rows(decode_manifest(encoded(few, ALWAYS)).arrays[NodeId(b"array-01")]) == rows(few)


def test_a_location_that_is_not_unicode_is_refused() -> None:
    with raises(InvalidInputError, "serialization"):
        encoded(virtual(50, lambda i: location(i) + "\ud800"), ALWAYS)


@pytest.mark.parametrize("count", [500, 10_000])
def test_without_the_fast_path_of_zstandard_the_bytes_are_the_same(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    texts = [location(i).encode() for i in range(count)]
    made = LocationDictionary(zstd.train_dictionary(500, [*texts[:100]]), 3)
    fast = made.frames(texts)
    monkeypatch.setattr(zstd, "backend_features", set())
    slow = made.frames(texts)
    assert fast[0] == slow[0]
    assert np.array_equal(fast[1], slow[1])


@settings(max_examples=40)
@given(
    st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=40), min_size=1, max_size=60),
    st.integers(1, 100),
    st.integers(0, 600),
)
def test_any_locations_come_back(texts: list[str], samples: int, size: int) -> None:
    refs = virtual(len(texts), texts.__getitem__)
    how = LocationCompression(min_refs=1, samples=samples, dictionary_bytes=size)
    assert rows(decode_manifest(encoded(refs, how)).arrays[NodeId(b"array-01")]) == rows(refs)
