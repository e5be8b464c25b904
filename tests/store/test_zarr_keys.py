"""Parsing of zarr keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icechunk.errors import InvalidInputError
from icechunk.store.zarr_keys import ChunkKey, MetadataKey, V2Key, chunk_key_text, metadata_key_text, parse_key, to_path
from tests.raising import raises


@pytest.mark.parametrize(
    ("key", "meaning"),
    [
        ("zarr.json", MetadataKey("/")),
        ("a/b/zarr.json", MetadataKey("/a/b")),
        ("/a//zarr.json", MetadataKey("/a")),
        ("a/c/0/1", ChunkKey("/a", (0, 1))),
        ("c/0", ChunkKey("/", (0,))),
        ("a/c", ChunkKey("/a", ())),
        ("c", ChunkKey("/", ())),
        ("c/c/3", ChunkKey("/c", (3,))),
        ("a/c/b/zarr.json", MetadataKey("/a/c/b")),
        ("a/c/b/c/7", ChunkKey("/a/c/b", (7,))),
        (".zgroup", V2Key(".zgroup")),
        ("a/.zarray", V2Key("a/.zarray")),
    ],
)
def test_keys_of_a_hierarchy_are_understood(key: str, meaning: object) -> None:
    assert parse_key(key) == meaning


@pytest.mark.parametrize("key", ["", "foo", "a/b", "a/zarr.json/x", "a/c/x", "a/c/-1", "a/c/4294967296", "a/c/٣"])
def test_other_keys_are_refused_by_name(key: str) -> None:
    with raises(InvalidInputError, "invalid-key", repr(key)):
        parse_key(key)


names = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1, max_size=4)
paths = st.lists(names, max_size=4).map(lambda parts: "/" + "/".join(parts))


@given(paths, st.lists(st.integers(0, 2**32 - 1), max_size=4).map(tuple))
def test_written_keys_are_read_back(path: str, coords: tuple[int, ...]) -> None:
    assert parse_key(metadata_key_text(path)) == MetadataKey(path)
    assert parse_key(chunk_key_text(path, coords)) == ChunkKey(path, coords)


def test_prefixes_become_paths() -> None:
    assert [to_path(p) for p in ("", "/", "a/", "a/b", "/a//b/")] == ["/", "/", "/a", "/a/b", "/a/b"]
