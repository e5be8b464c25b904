"""Code written for the official library relies on these: private names, testing helpers, and habits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import icechunk
from icechunk.testing.invariants import assert_ancestry_invariants, assert_moves_sorted_by_final_path
from icechunk.testing.models import GroupNode
from icechunk.testing.trees import tree_and_mixed_moves, wrap_tolerant
from icechunk.testing.utils import precommit_postcommit_readonly, tree_to_model_and_icechunk
from tests.raising import raises


def new_repo() -> icechunk.Repository:
    return icechunk.Repository.create(icechunk.in_memory_storage())


def test_a_configuration_given_at_creation_can_be_saved_again() -> None:
    repo = icechunk.Repository.create(
        icechunk.in_memory_storage(), config=icechunk.RepositoryConfig(inline_chunk_threshold_bytes=7)
    )
    repo.save_config()
    assert repo.reopen().config.inline_chunk_threshold_bytes == 7


def test_a_commit_records_how_often_it_was_rebased() -> None:
    repo = new_repo()
    with repo.transaction("main", message="root") as store:
        zarr.create_group(store)
    first, second = repo.writable_session("main"), repo.writable_session("main")
    zarr.create_group(first.store, path="a")
    zarr.create_group(second.store, path="b")
    first.commit("a")
    second.commit("b", rebase_with=icechunk.ConflictDetector())
    newest = next(iter(repo.ancestry(branch="main")))
    assert newest.metadata["__icechunk"] == {"rebase_attempts": 1}


def virtual(location: str, *, validate: bool) -> icechunk.IcechunkStore:
    store = new_repo().writable_session("main").store
    zarr.create_array(store, name="a", shape=(4,), chunks=(1,), dtype="i4")
    store.set_virtual_ref("a/c/0", location, offset=0, length=4, validate_container=validate)
    return store


def s3_with(name: str, value: str) -> object:
    return icechunk.s3_storage(bucket="b", prefix="p", region="us-east-1", anonymous=True, write_headers={name: value})


@pytest.mark.parametrize(
    ("words", "act"),
    [
        ("Unsupported version 5", lambda: icechunk.Repository.create(icechunk.in_memory_storage(), spec_version=5)),
        ("invalid chunk location", lambda: virtual("s3://foo/bar", validate=True)),
        (
            "edit the repository configuration",
            lambda: zarr.open_array(virtual("s3://foo/bar", validate=False), path="a", mode="r")[0],
        ),
        ("error parsing virtual ref URL", lambda: virtual("foo", validate=False)),
        ("error parsing URL", lambda: icechunk.http_storage("foo")),
        ("invalid HTTP header", lambda: s3_with("bad header name", "value")),
        ("invalid HTTP header value", lambda: s3_with("name", "two\nlines")),
    ],
)
def test_words_that_code_for_the_official_library_matches_are_in_the_messages(
    words: str, act: Callable[[], object]
) -> None:
    with pytest.raises(icechunk.IcechunkError, match=words):  # words: a contract
        act()


@pytest.mark.skipif("array.rectilinear_chunks" not in zarr.config, reason="needs a zarr with rectilinear grids")
def test_chunks_of_a_rectilinear_grid_are_not_shifted() -> None:
    session = new_repo().writable_session("main")
    with zarr.config.set({"array.rectilinear_chunks": True}):
        array = zarr.create_array(session.store, name="a", shape=(3,), chunks=((1, 2),), dtype="i4")  # type: ignore
        array[:] = [1, 2, 3]
        before = session.status()
        with raises(icechunk.InvalidInputError, "invalid-array-metadata", "/a", "rectilinear"):
            session.shift_array("/a", (1,))
        assert session.status() == before
        np.testing.assert_array_equal(zarr.open_array(session.store, path="a")[:], [1, 2, 3])


@settings(max_examples=15)
@given(tree_and_mixed_moves(max_leaves=st.just(12), n_moves=st.integers(1, 5)))
def test_moves_of_the_official_strategies_agree_with_the_model(
    tree_moves: tuple[GroupNode, list[tuple[str, str, str | None]]],
) -> None:
    tree, moves = tree_moves
    model, session, repo = tree_to_model_and_icechunk(tree)
    start = session.commit("tree")
    rearrange = repo.rearrange_session("main")
    for source, target, pattern in moves:
        if pattern is not None:
            with pytest.raises(icechunk.IcechunkError, match=wrap_tolerant(pattern)):  # words: of the official suite
                rearrange.move(source, target)
        else:
            zarr.core.sync.sync(model.move(source, target))
            rearrange.move(source, target)
    expected = GroupNode.from_store(model)
    for stage, store in precommit_postcommit_readonly(rearrange, repo, allow_empty=True):
        assert GroupNode.from_store(store) == expected, stage
    assert_ancestry_invariants(list(repo.ancestry(branch="main")))
    assert_moves_sorted_by_final_path(repo.diff(from_snapshot_id=start, to_branch="main").moved_nodes)
