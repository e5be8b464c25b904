"""Locations: normalisation, containers, and references that try to leave their container."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import icechunk
from icechunk import ErrorKind, InvalidInputError, VirtualChunkContainer
from icechunk.virtual_access.locations import Prefixes, key_of, require_no_way_out, stored_location

S3 = icechunk.s3_store(region="us-east-1")
FILES = icechunk.local_filesystem_store("/")
PREFIXES = Prefixes(
    [
        VirtualChunkContainer("s3://data/pre/", S3, "pre"),
        VirtualChunkContainer("s3://data/pre/deep/", S3, "deep"),
        VirtualChunkContainer("file:///srv/", FILES),
        VirtualChunkContainer("https://web/x/", icechunk.http_store()),
    ]
)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("s3://data/pre/f", "s3://data/pre/f"),
        ("S3://data/pre/f", "s3://data/pre/f"),
        ("s3://b/../c", "s3://b/../c"),
        ("s3://b/sp ace%20é?x#y", "s3://b/sp ace%20é?x#y"),
        ("FILE:///a/b", "file:///a/b"),
        ("file:/a/b", "file:///a/b"),
        ("file:///a/x/../b", "file:///a/b"),
        ("file://localhost/a", "file:///a"),
        ("vcc://pre/a/../f", "vcc://pre/a/../f"),
        ("unknown://x/y", "unknown://x/y"),
    ],
)
def test_locations_are_kept_as_they_were_given_but_for_scheme_and_dots_of_files(given: str, kept: str) -> None:
    assert stored_location(given) == kept


@pytest.mark.parametrize("bad", ["", "f", "/abs/f", "s3://", "s3:///f", "http:///x", "file://host/x", "file:///a//b"])
def test_locations_that_are_no_urls_are_refused(bad: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        stored_location(bad)
    assert caught.value.kind == ErrorKind.INVALID_VIRTUAL_REF


@pytest.mark.parametrize(
    ("location", "prefix", "key"),
    [
        ("s3://data/pre/f", "s3://data/pre/", "pre/f"),
        ("s3://data/pre/deep/f", "s3://data/pre/deep/", "pre/deep/f"),
        ("s3://data/pre/sp%20ace", "s3://data/pre/", "pre/sp ace"),
        ("s3://data/pre/a%2520b", "s3://data/pre/", "pre/a%20b"),
        ("vcc://pre/deep/f", "s3://data/pre/deep/", "pre/deep/f"),
        ("vcc://deep/../f", "s3://data/pre/", "pre/f"),
        ("file:///srv/./a/x/../b", "file:///srv/", "srv/a/b"),
        ("https://web/x/f?token=1", "https://web/x/", "x/f"),
    ],
)
def test_the_longest_prefix_of_the_resolved_location_wins(location: str, prefix: str, key: str) -> None:
    resolved, container = PREFIXES.resolve(location)
    assert container.url_prefix == prefix
    assert key_of(resolved) == key
    assert PREFIXES.holds(location)


@pytest.mark.parametrize(
    "location",
    [
        "s3://data/other/f",
        "s3://data/pre",
        "s3://data/pre/../other",
        "s3://data/pre/%2e%2E/other",
        "s3://DATA/pre/f",
        "s3://data:80/pre/f",
        "file:///srv/../etc/passwd",
        "vcc://nobody/f",
        "vcc://pre",
        "https://web@evil/x/f",
        "http://web/x/f",
    ],
)
def test_a_location_outside_all_containers_is_not_resolved(location: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        PREFIXES.resolve(location)
    assert caught.value.kind == ErrorKind.NO_CONTAINER_FOR_VIRTUAL_CHUNK


@pytest.mark.parametrize("tail", ["..%2fother", "a/..%2F..%2fother", "%00", "", "x%2f..%2f..%2fy", "a%2f.%2fb"])
def test_decoding_never_brings_dots_back(tail: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        key_of(PREFIXES.resolve(f"file:///srv/{tail}")[0]) and key_of(f"file:///{tail}")
    assert caught.value.kind == ErrorKind.INVALID_VIRTUAL_REF


SEGMENT = st.one_of(
    st.sampled_from(
        ["..", ".", "%2e", "%2E%2e", ".%2e", "%2f", "..%2f", "%2f..", "", "a", "a.b", "...", "é", "%zz", "\\"]
    ),
    st.text(max_size=4),
)


@settings(max_examples=300)
@given(st.sampled_from(["s3://data/pre", "file:///srv", "https://web/x", "vcc://pre"]), st.lists(SEGMENT, max_size=6))
def test_no_reference_leaves_its_prefix(start: str, segments: list[str]) -> None:
    location = "/".join([start, *segments])
    try:
        stored = stored_location(location)
        resolved, container = PREFIXES.resolve(stored)
        key = key_of(resolved)
    except InvalidInputError:
        return
    assert resolved.startswith(container.url_prefix)
    parts = key.split("/")
    assert ".." not in parts
    assert "." not in parts
    assert key.startswith(container.url_prefix.split("/", 3)[3])


@settings(max_examples=300)
@given(
    st.sampled_from(["s3://data/pre", "file:///srv", "https://web/x", "S3://data/pre"]), st.lists(SEGMENT, max_size=4)
)
def test_a_plain_location_is_stored_unchanged_and_held(start: str, segments: list[str]) -> None:
    location = "/".join([start, *segments])
    if PREFIXES.is_plain(location):
        assert stored_location(location) == location
        assert PREFIXES.resolve(location)[0] == location
        assert PREFIXES.holds(location)


def test_ordinary_locations_are_plain() -> None:
    ordinary = ["s3://data/pre/a/b.nc", "file:///srv/x/y.h5", "https://web/x/f%20g"]
    for location in ordinary:
        assert PREFIXES.is_plain(location)
    assert PREFIXES.all_plain(ordinary)
    assert PREFIXES.all_plain([f"s3://data/pre/{i}.nc" for i in range(40_000)])
    assert not PREFIXES.all_plain([*(f"s3://data/pre/{i}.nc" for i in range(40_000)), "s3://other/f"])


def test_distinct_plain_locations_ascend_within_and_between_the_batches_that_are_looked_at() -> None:
    plain = [f"s3://data/pre/{i:05}.nc" for i in range(3 * 1024 + 1)]
    for count in (1, 2, 1023, 1024, 1025, 3 * 1024, len(plain)):
        assert PREFIXES.all_plain_and_ascending(plain[:count])
        assert PREFIXES.all_plain_and_ascending(tuple(plain[:count]))
    assert not PREFIXES.all_plain_and_ascending([])
    assert not Prefixes([]).all_plain_and_ascending(plain)
    for at in (1, 2, 1022, 1023, 1024, 1025, 2047, 2048, len(plain) - 1):
        repeated = [*plain[:at], plain[at - 1], *plain[at:]]
        assert not PREFIXES.all_plain_and_ascending(repeated)
        swapped = [*plain[: at - 1], plain[at], plain[at - 1], *plain[at + 1 :]]
        assert not PREFIXES.all_plain_and_ascending(swapped)
        assert not PREFIXES.all_plain_and_ascending([*plain[:at], plain[at] + "/..", *plain[at + 1 :]])


@settings(max_examples=500)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["s3://data/pre", "file:///srv", "https://web/x", "S3://data/pre", "", "s3://data/pre/in/"]
            ),
            st.lists(st.one_of(SEGMENT, st.sampled_from(["\n", "\ns3://data/pre/a", "\x7f", "//"])), max_size=3),
        ).map(lambda parts: "/".join([parts[0], *parts[1]])),
        max_size=5,
    )
)
def test_locations_that_are_plain_together_are_plain_one_by_one(locations: list[str]) -> None:
    nested = Prefixes(
        [
            VirtualChunkContainer("s3://data/pre/", S3),
            VirtualChunkContainer("s3://data/pre/in/", S3),
            VirtualChunkContainer("https://web/x/", S3),
        ]
    )
    for prefixes in (PREFIXES, nested):
        if prefixes.all_plain(locations):
            assert all(map(prefixes.is_plain, locations))
        ascending = bool(locations) and all(a < b for a, b in itertools.pairwise(locations))
        assert prefixes.all_plain_and_ascending(locations) == (ascending and prefixes.all_plain(locations))


@pytest.mark.parametrize("character", ["\t", "\n", "\r", "\0", "\x1f", "\x7f"])
@pytest.mark.parametrize(
    "location", ["vcc://pre/{}../f", "https://web/x/{}../private", "s3://data/pre/a{}b", "s{}3://d/f"]
)
def test_locations_with_control_characters_are_refused_before_anything_reads_them(
    character: str, location: str
) -> None:
    bad = location.format(character)
    for judge in (stored_location, PREFIXES.resolve, key_of):
        with pytest.raises(InvalidInputError) as caught:
            judge(bad)
        if "vcc" not in bad or judge is not key_of:
            assert caught.value.kind == ErrorKind.INVALID_VIRTUAL_REF
    assert not PREFIXES.is_plain(bad)
    assert not Prefixes([VirtualChunkContainer("s3://data/", S3)]).is_plain(bad)


def test_names_that_hold_a_control_character_are_written_with_an_encoding() -> None:
    assert key_of(PREFIXES.resolve("s3://data/pre/a%09b")[0]) == "pre/a\tb"


@pytest.mark.parametrize(
    "location", ["https://web/x/..\\private", "https://web/x/a%5c..%5cb", "https://web/x/%2e%2e%5cb"]
)
def test_backslashes_lead_out_of_no_container_of_a_web_server(location: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        require_no_way_out(PREFIXES.resolve(location)[0])
    assert caught.value.kind == ErrorKind.INVALID_VIRTUAL_REF
    require_no_way_out("https://web/x/a\\b")
