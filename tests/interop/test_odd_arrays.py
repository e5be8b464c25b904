"""Repositories with arrays and chunks that only the official library takes: their sound parts can be worked with."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

import icechunk
from icechunk import Repository
from icechunk.format.ids import object_id_from_text
from icechunk.runtime.twins import run_sync
from tests.inside import core_of
from tests.store.store_builders import buffer, read
from tools import oracle
from tools.interop.odd_arrays import CHUNK, contents

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(300)]

ARRAYS = [key.removesuffix("/zarr.json") for key in contents() if key.endswith("/zarr.json")]


@pytest.fixture(params=[1, 2], ids=["format 1", "format 2"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if os.environ.get("CI"):
        oracle.ensure(oracle.OFFICIAL_CURRENT)
    elif oracle.find(oracle.OFFICIAL_CURRENT) is None:
        pytest.skip("the official library has no environment here; `python tools/oracle.py 2.3.0` makes one")
    place = str(tmp_path / "repo")
    oracle.run(oracle.OFFICIAL_CURRENT, "tools.interop.odd_arrays", place, str(request.param))
    return place


def get(repo: Repository, key: str) -> bytes | None:
    return run_sync(read(repo.readonly_session("main").store, key))


async def keys(repo: Repository) -> set[str]:
    session = await repo.readonly_session_async("main")
    return {key async for key in session.store.list()}


def test_chunks_that_fit_their_array_are_read_and_listed_and_others_are_not(path: str) -> None:
    repo = Repository.open(icechunk.local_filesystem_storage(path))
    chunks = {"fine/c/0", "both/c", "ranks/c/0/1", "dots/c/0"}
    for key in chunks:
        assert get(repo, key) == CHUNK
    for key in ("scalar/c", "scalar/c/0", "ranks/c/0", "ranks/c/0/1/2", "huge/c/0", "empty/c/0"):
        assert get(repo, key) is None
    documents = {key for key in contents() if key.endswith("zarr.json")}
    assert run_sync(keys(repo)) == documents | chunks


@pytest.mark.parametrize("name", ARRAYS)
def test_attributes_of_each_can_be_changed(path: str, name: str) -> None:
    repo = Repository.open(icechunk.local_filesystem_storage(path))
    key = f"{name}/zarr.json"
    document = contents()[key].replace(b'"attributes": {}', b'"attributes": {"k": 1}')
    session = repo.writable_session("main")
    fork = session.fork()
    run_sync(fork.store.set(key, buffer(document)))
    session.merge(fork)
    session.commit("attributes")
    assert get(repo, key) == document
    assert get(repo, "fine/c/0") == CHUNK


@pytest.mark.parametrize(
    "key", ["scalar/c", "both/c", "ranks/c/0/1", "ranks/c/3/3", "dots/c/0", "dots/c/3", "fine/c/0"]
)
def test_chunks_that_fit_can_be_written_and_deleted(path: str, key: str) -> None:
    repo = Repository.open(icechunk.local_filesystem_storage(path))
    for value in (b"x" * 8, None):
        session = repo.writable_session("main")
        run_sync(session.store.delete(key) if value is None else session.store.set(key, buffer(value)))
        session.commit("changed")
        assert get(repo, key) == value
    if key != "both/c":
        assert get(repo, "both/c") == CHUNK


def test_references_of_different_ranks_block_no_other_operation(path: str) -> None:
    repo = Repository.open(icechunk.local_filesystem_storage(path))
    first = list(repo.ancestry(branch="main"))[-1].id
    assert "/ranks" in repo.diff(from_snapshot_id=first, to_branch="main").new_arrays
    assert repo.chunk_storage_stats().native_bytes > 0
    assert repo.readonly_session("main").all_virtual_chunk_locations() == []
    snapshot = object_id_from_text(repo.lookup_branch("main"))
    assert run_sync(core_of(repo).assets.transaction_log(snapshot)).new_arrays
    repo.rewrite_manifests("together", branch="main")
    now = datetime.now(UTC)
    repo.expire_snapshots(now)
    repo.garbage_collect(now)
    assert get(repo, "ranks/c/0/1") == get(repo, "fine/c/0") == CHUNK
