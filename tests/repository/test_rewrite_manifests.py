"""`Repository.rewrite_manifests`: other manifests, the same content."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import zarr

import icechunk
from icechunk.format.ids import object_id_from_text
from icechunk.format.values import ManifestRef, TransactionLog
from icechunk.runtime.twins import run_sync
from icechunk.session.commit import How, write_snapshot
from tests.inside import content_of
from tests.raising import raises

Condition = icechunk.ManifestSplitCondition
Dim = icechunk.ManifestSplitDimCondition

LAYOUTS = ["log", "repo", "refs"]


def config(layout: Any, rows: int | None) -> icechunk.RepositoryConfig:
    options = icechunk.RepositoryConfig.default()
    options.inline_chunk_threshold_bytes = 0
    options.engine = icechunk.config.EngineConfig(layout=layout)
    if rows is not None:
        rules: dict[Any, Any] = {Condition.AnyArray(): {Dim.Axis(0): rows}}
        options.manifest = icechunk.ManifestConfig(splitting=icechunk.ManifestSplittingConfig.from_dict(rules))
    return options


def filled(layout: str, rows: int | None = None) -> icechunk.Repository:
    repo = icechunk.Repository.create(icechunk.in_memory_storage(), config(layout, rows))
    with repo.transaction("main", message="filled") as store:
        array = zarr.create_array(store, name="a", shape=(6, 2), chunks=(1, 1), dtype="i4")
        array[:] = np.arange(12).reshape(6, 2)
    return repo


def manifests(repo: icechunk.Repository) -> tuple[ManifestRef, ...]:
    tip = object_id_from_text(repo.lookup_branch("main"))
    return run_sync(repo._core.assets.snapshot(tip)).nodes["/a"].manifests


def rows_of(repo: icechunk.Repository) -> list[tuple[int, int]]:
    return [ref.extents[0] for ref in manifests(repo)]


def values(repo: icechunk.Repository) -> list[int]:
    array = zarr.open_array(repo.readonly_session("main").store, path="a", mode="r")
    return np.asarray(array[:]).ravel().tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_new_splitting_applies_to_existing_manifests_and_changes_no_chunk(layout: str) -> None:
    repo = filled(layout, 4)
    assert rows_of(repo) == [(0, 4), (4, 6)]
    repo = repo.reopen(config(layout, 3))
    before = repo.lookup_branch("main")
    tip = repo.rewrite_manifests("by three", branch="main", metadata={"k": 1})
    assert repo.lookup_branch("main") == tip
    assert rows_of(repo) == [(0, 3), (3, 6)]
    assert values(repo) == list(range(12))
    assert repo.diff(from_snapshot_id=before, to_snapshot_id=tip).is_empty()
    newest, parent, *_ = repo.ancestry(branch="main")
    assert (newest.message, parent.id) == ("by three", before)
    assert newest.metadata == {
        "k": 1,
        "__icechunk": {
            "splitting_config": {"split_sizes": [["any_array", [{"condition": {"Axis": 0}, "num_chunks": 3}]]]}
        },
    }
    record = run_sync(repo._core.assets.transaction_log(object_id_from_text(tip)))
    assert record == TransactionLog(id=object_id_from_text(tip))


@pytest.mark.parametrize("layout", ["log", "repo"])
def test_amending_replaces_the_newest_commit(layout: str) -> None:
    repo = filled(layout, 4).reopen(config(layout, 3))
    tip = repo.rewrite_manifests("by three", branch="main", commit_method="amend")
    assert [s.message for s in repo.ancestry(branch="main")] == ["by three", "Repository initialized"]
    assert rows_of(repo) == [(0, 3), (3, 6)]
    assert repo.diff(from_snapshot_id=list(repo.ancestry(branch="main"))[1].id, to_snapshot_id=tip).new_arrays == {"/a"}


def test_amending_in_format_1_is_refused_and_nothing_is_written() -> None:
    repo = filled("refs")
    tip = repo.lookup_branch("main")
    with raises(icechunk.FormatError, "unsupported-spec-version", "upgrade_icechunk_repository"):
        repo.rewrite_manifests("no", branch="main", commit_method="amend")
    assert repo.lookup_branch("main") == tip


def test_many_small_manifests_of_the_log_layout_become_few() -> None:
    options = config("log", None)
    options.engine = icechunk.config.EngineConfig(max_refs_per_manifest=2)
    repo = icechunk.Repository.create(icechunk.in_memory_storage(), options)
    with repo.transaction("main", message="filled") as store:
        zarr.create_array(store, name="a", shape=(6, 2), chunks=(1, 1), dtype="i4")[:] = np.arange(12).reshape(6, 2)
    assert len(manifests(repo)) == 6
    options.engine = icechunk.config.EngineConfig(max_refs_per_manifest=100)
    repo = repo.reopen(options)
    repo.rewrite_manifests("together", branch="main")
    assert len(manifests(repo)) == 1
    assert values(repo) == list(range(12))


async def test_a_commit_of_another_client_meanwhile_is_a_conflict() -> None:
    repo = await icechunk.Repository.create_async(icechunk.in_memory_storage(), config("log", None))
    session = await repo.writable_session_async("main")
    other = await repo.writable_session_async("main")
    await other.commit_async("first", allow_empty=True)
    with pytest.raises(icechunk.ConflictError):
        # A rewrite that began before the branch moved.
        await write_snapshot(content_of(session), How.COMMIT, "late", None, allow_empty=True, rewrite=True)


def test_bad_arguments_are_refused() -> None:
    repo = filled("log")
    tip = repo.lookup_branch("main")
    with pytest.raises(ValueError, match=re.escape("commit_method")):
        repo.rewrite_manifests("no", branch="main", commit_method="replace")  # type: ignore[arg-type]
    with pytest.raises(icechunk.RefNotFoundError):
        repo.rewrite_manifests("no", branch="gone")
    with raises(icechunk.InvalidInputError, "bad-metadata", "metadata['k']"):
        repo.rewrite_manifests("no", branch="main", metadata={"k": object()})
    repo.set_status(icechunk.RepoStatus(icechunk.RepoAvailability.read_only, limited_availability_reason="archived"))
    with raises(icechunk.ReadOnlyError, "read-only-repository", "archived"):
        repo.rewrite_manifests("no", branch="main")
    assert repo.lookup_branch("main") == tip
