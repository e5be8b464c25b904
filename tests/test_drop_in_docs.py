"""Programs as the official library's documentation teaches them, in our own words: they run here unchanged."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

import icechunk
import icechunk as ic
from icechunk.xarray import to_icechunk
from tests.raising import raises


@pytest.fixture
def storage(tmp_path: Path) -> ic.Storage:
    return ic.local_filesystem_storage(str(tmp_path / "repo"))


def rainfall(days: int = 6) -> xr.Dataset:
    time = np.datetime64("2001-01-01", "ns") + np.arange(days) * np.timedelta64(1, "D")
    values = np.arange(days * 6.0).reshape(days, 2, 3)
    return xr.Dataset({"rain": (("time", "y", "x"), values)}, coords={"time": time}, attrs={"source": "made up"})


def test_first_steps(storage: ic.Storage) -> None:
    repo = ic.Repository.create(storage)
    session = repo.writable_session("main")
    root = zarr.group(session.store)
    two: Any = 2  # zarr takes it, and its types do not
    array = root.create("ints", shape=10, chunks=two, dtype="i4")
    array[:] = 1
    first = session.commit("first commit")
    with raises(icechunk.ReadOnlyError, "read-only-store"):
        array[:] = 2
    second_session = repo.writable_session("main")
    again = zarr.open_group(second_session.store)["ints"]
    assert isinstance(again, zarr.Array)
    again[:5] = 2
    second = second_session.commit("second commit", metadata={"by": "me"})
    assert [info.id for info in repo.ancestry(branch="main")][:2] == [second, first]
    assert [info.message for info in repo.ancestry(snapshot_id=second)][:2] == ["second commit", "first commit"]
    old = zarr.open_array(repo.readonly_session(snapshot_id=first).store, path="ints", mode="r")
    np.testing.assert_array_equal(old[:], 1)
    assert ic.Repository.exists(storage)
    assert ic.Repository.open_or_create(storage).lookup_branch("main") == second


def test_branches_tags_and_their_differences(storage: ic.Storage) -> None:
    repo = ic.Repository.create(storage)
    with repo.transaction("main", message="root") as store:
        zarr.create_group(store, attributes={"name": "old"})
    repo.create_branch("dev", snapshot_id=repo.lookup_branch("main"))
    session = repo.writable_session("dev")
    root = zarr.open_group(session.store)
    root.attrs["name"] = "new"
    root.create_array("x", shape=(4,), chunks=(2,), dtype="f8")[:2] = 1
    assert session.has_uncommitted_changes
    assert set(session.status().new_arrays) == {"/x"}
    new = session.commit("on dev")
    repo.create_tag("v1.0.0", snapshot_id=new)
    assert repo.list_branches() == {"main", "dev"}
    assert repo.list_tags() == {"v1.0.0"}
    diff = repo.diff(from_branch="main", to_tag="v1.0.0")
    assert set(diff.new_arrays) == {"/x"}
    assert set(diff.updated_groups) == {"/"}
    assert diff.updated_chunks == {"/x": [[0]]}
    repo.reset_branch("main", repo.lookup_tag("v1.0.0"))
    assert zarr.open_group(repo.readonly_session("main").store, mode="r").attrs["name"] == "new"
    repo.delete_branch("dev")
    repo.delete_tag("v1.0.0")
    assert (repo.list_branches(), repo.list_tags()) == ({"main"}, set())
    assert "on dev" in str(repo.ancestry_graph(branch="main", plain=True))


def test_amended_empty_and_detached_snapshots(storage: ic.Storage) -> None:
    repo = ic.Repository.create(storage)
    with repo.transaction("main", message="root") as store:
        zarr.create_group(store)
    session = repo.writable_session("main")
    zarr.open_group(session.store).attrs["typo"] = True
    session.commit("tpyo")
    session = repo.writable_session("main")
    session.amend("typo", allow_empty=True)
    session = repo.writable_session("main")
    session.commit("a milestone", metadata={"reached": True}, allow_empty=True)
    assert [info.message for info in repo.ancestry(branch="main")][:3] == ["a milestone", "typo", "root"]
    session = repo.writable_session("main")
    zarr.open_group(session.store).create_group("draft")
    detached = session.flush("for a colleague to look at")
    assert "draft" in zarr.open_group(repo.readonly_session(snapshot_id=detached).store, mode="r")
    assert "draft" not in zarr.open_group(repo.readonly_session("main").store, mode="r")


def test_conflicts_are_caught_and_rebased(storage: ic.Storage) -> None:
    repo = ic.Repository.create(storage)
    with repo.transaction("main", message="root") as store:
        zarr.create_array(store, name="a", shape=(4,), chunks=(1,), dtype="i4", fill_value=0)
    one, two, three = (repo.writable_session("main") for _ in range(3))
    zarr.open_array(one.store, path="a")[0] = 1
    zarr.open_array(two.store, path="a")[1] = 2
    zarr.open_array(three.store, path="a")[0] = 3
    start, current = repo.lookup_branch("main"), one.commit("one")
    parents: tuple[str | None, str | None] = (None, None)
    try:
        two.commit("two")
    except icechunk.ConflictError as error:
        parents = error.expected_parent, error.actual_parent
        two.rebase(icechunk.ConflictDetector())
        two.commit("two")
    assert parents == (start, current)
    with pytest.raises(icechunk.RebaseFailedError) as caught:
        three.rebase(icechunk.ConflictDetector())
    (conflict,) = caught.value.conflicts
    assert conflict.conflict_type == icechunk.ConflictType.ChunkDoubleUpdate
    assert (conflict.path, conflict.conflicted_chunks) == ("/a", [[0]])
    three.rebase(icechunk.BasicConflictSolver(on_chunk_conflict=icechunk.VersionSelection.UseOurs))
    three.commit("three")
    np.testing.assert_array_equal(
        zarr.open_array(repo.readonly_session("main").store, path="a", mode="r")[:], [3, 2, 0, 0]
    )


def test_errors_have_distinct_kinds(storage: ic.Storage) -> None:
    repo = ic.Repository.create(storage)
    repo.create_tag("v1", snapshot_id=repo.lookup_branch("main"))
    repo.delete_tag("v1")
    with pytest.raises(icechunk.AlreadyExistsError) as caught:
        repo.create_tag("v1", snapshot_id=repo.lookup_branch("main"))
    assert caught.value.kind == icechunk.ErrorKind.TAG_PREVIOUSLY_DELETED
    with pytest.raises(KeyError):
        repo.readonly_session(branch="nope")
    with pytest.raises(icechunk.NotFoundError):
        repo.readonly_session(tag="nope")
    assert repr(caught.value).startswith("icechunk.AlreadyExistsError(message=")


def test_a_rolling_window_of_chunks(storage: ic.Storage) -> None:
    session = ic.Repository.create(storage).writable_session("main")
    array = zarr.create(store=session.store, path="days", shape=(10,), chunks=(2,), dtype="i4", fill_value=-1)
    array[:] = np.arange(10)
    session.shift_array("/days", (-2,))
    np.testing.assert_array_equal(array[:], [4, 5, 6, 7, 8, 9, -1, -1, -1, -1])
    array.resize((14,))
    session.shift_array("/days", (2,))
    np.testing.assert_array_equal(array[:], [-1] * 4 + [4, 5, 6, 7, 8, 9] + [-1] * 4)

    def turned(index: Iterable[int]) -> list[int]:
        (i,) = index
        return [6 - i]

    session.reindex_array("/days", forward=turned, backward=turned)
    np.testing.assert_array_equal(array[:], [-1] * 4 + [8, 9, 6, 7, 4, 5] + [-1] * 4)


def test_nodes_are_moved_in_a_session_of_their_own(storage: ic.Storage) -> None:
    repo = ic.Repository.create(storage)
    with repo.transaction("main", message="root") as store:
        zarr.create_group(store).create_array("old/name", shape=(2,), dtype="i4")[:] = 5
    session = repo.rearrange_session("main")
    session.move("/old/name", "/new")
    snapshot = session.commit("renamed")
    (found,) = repo.diff(
        from_snapshot_id=next(iter(repo.ancestry(branch="main"))).parent_id, to_snapshot_id=snapshot
    ).moved_nodes
    assert found == ("/old/name", "/new")


def test_manifests_are_split_rewritten_and_preloaded(storage: ic.Storage) -> None:
    def configuration(size: int) -> ic.RepositoryConfig:
        condition = ic.config.ManifestSplitCondition.name_matches("^a$") | ic.ManifestSplitCondition.path_matches("b")
        splitting = ic.config.ManifestSplittingConfig.from_dict(
            {condition: {ic.config.ManifestSplitDimCondition.Any(): size}}
        )
        preload = ic.ManifestPreloadConfig(
            preload_if=ic.ManifestPreloadCondition.name_matches("^a$") & ic.ManifestPreloadCondition.num_refs(1, 100),
            max_total_refs=1000,
        )
        return ic.RepositoryConfig(manifest=ic.ManifestConfig(splitting=splitting, preload=preload))

    repo = ic.Repository.create(storage, config=configuration(1))
    session = repo.writable_session("main")
    zarr.create_array(session.store, name="a", shape=(6,), chunks=(1,), dtype="i4")[:] = 1
    assert len(repo.list_manifest_files(session.commit("six"))) == 6
    repo = ic.Repository.open(storage, config=configuration(3))
    rewritten = repo.rewrite_manifests("into two", branch="main")
    assert len(repo.list_manifest_files(rewritten)) == 2
    assert "splitting_config" in str(repo.lookup_snapshot(rewritten).metadata)
    repo.save_config()
    assert ic.Repository.open(storage).config.manifest == repo.config.manifest


def test_configurations_are_set_read_and_kept(storage: ic.Storage) -> None:
    config = ic.RepositoryConfig.default()
    config.inline_chunk_threshold_bytes = 100
    config.caching = ic.CachingConfig(num_bytes_chunks=1_000_000)
    config.storage = ic.StorageSettings(
        concurrency=ic.StorageConcurrencySettings(
            max_concurrent_requests_for_object=10, ideal_concurrent_request_size=1_000_000
        ),
        storage_class="STANDARD",
        retries=ic.StorageRetriesSettings(max_tries=3),
    )
    config.compression = ic.CompressionConfig(level=3, algorithm=ic.CompressionAlgorithm.Zstd)
    repo = ic.Repository.create(storage, config=config)
    assert repo.config.compression is not None
    assert repo.config.compression.level == 3
    fetched = ic.Repository.fetch_config(storage)
    assert fetched is not None
    assert fetched.inline_chunk_threshold_bytes == 100
    repo.set_metadata({"team": "science"})
    repo.update_metadata({"bugs": 42})
    assert repo.get_metadata() == {"team": "science", "bugs": 42}


def test_virtual_chunks_are_read_where_they_are_authorised(storage: ic.Storage, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(np.arange(4, dtype="<i4").tobytes())
    prefix = f"{tmp_path.as_uri()}/"
    config = ic.RepositoryConfig.default()
    config.set_virtual_chunk_container(ic.VirtualChunkContainer(prefix, ic.local_filesystem_store(str(tmp_path))))
    allowed: dict[str, Any] = {prefix: ic.credentials.LocalFileSystemAccess}
    repo = ic.Repository.create(storage, config, authorize_virtual_chunk_access=allowed)
    session = repo.writable_session("main")
    zarr.create_array(session.store, name="v", shape=(4,), chunks=(2,), dtype="<i4", compressors=None, filters=None)
    session.store.set_virtual_ref("v/c/0", f"{prefix}data", offset=0, length=8)
    specs = [ic.VirtualChunkSpec(index=[1], location=f"{prefix}data", offset=8, length=8)]
    assert session.store.set_virtual_refs("/v", specs) is None
    assert session.all_virtual_chunk_locations() == [f"{prefix}data"] * 2
    session.commit("virtual")
    np.testing.assert_array_equal(
        zarr.open_array(repo.readonly_session("main").store, path="v", mode="r")[:], np.arange(4)
    )


def test_old_snapshots_expire_and_are_collected(storage: ic.Storage) -> None:
    repo = ic.Repository.create(storage)
    for number in range(3):
        with repo.transaction("main", message=f"number {number}") as store:
            zarr.create_array(store, name="a", shape=(100,), dtype="i8", overwrite=True)[:] = number + 1
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    assert len(repo.expire_snapshots(older_than=soon)) == 2
    assert next(iter(repo.ancestry(branch="main"))).message == "number 2"
    assert repo.garbage_collect(soon, dry_run=True).snapshots_deleted == 2
    summary = repo.garbage_collect(soon)
    assert summary.snapshots_deleted == 2
    assert summary.bytes_deleted > 0
    np.testing.assert_array_equal(zarr.open_array(repo.readonly_session("main").store, path="a", mode="r")[:], 3)


async def test_everything_has_an_asynchronous_twin(storage: ic.Storage) -> None:
    repo = await ic.Repository.create_async(storage)
    session = await repo.writable_session_async("main")
    group = await zarr.api.asynchronous.create_group(store=session.store)
    await group.create_array(name="a", shape=(2,), dtype="i4")
    snapshot = await session.commit_async("first")
    newest = await anext(repo.async_ancestry(branch="main"))
    assert newest.id == snapshot
    await repo.create_tag_async("v1", snapshot_id=snapshot)
    assert await repo.list_tags_async() == {"v1"}
    assert (await repo.readonly_session_async(tag="v1")).snapshot_id == snapshot


def test_regions_of_one_dataset_are_written_by_threads(storage: ic.Storage) -> None:
    pytest.importorskip("dask")
    repo = ic.Repository.create(storage)
    session = repo.writable_session("main")
    dataset = rainfall()
    dataset.chunk(time=1).to_zarr(session.store, compute=False, encoding={"rain": {"chunks": (1, 2, 3)}}, mode="w")
    session.commit("the frame")
    session = repo.writable_session("main")

    def write(*, day: int, session: ic.Session) -> None:
        rainfall().isel(time=[day]).to_zarr(session.store, region="auto")

    with ThreadPoolExecutor() as executor:
        done, _ = wait([executor.submit(write, day=day, session=session) for day in range(6)])
    assert [future.result() for future in done] == [None] * 6
    session.commit("the days")
    with xr.open_zarr(repo.readonly_session("main").store) as found:
        xr.testing.assert_identical(found.load(), dataset)


def test_a_dataset_is_appended_to_and_read_as_it_was(storage: ic.Storage) -> None:
    repo = ic.Repository.create(storage)
    session = repo.writable_session("main")
    to_icechunk(rainfall().isel(time=slice(None, 4)), session)
    first = session.commit("four days")
    session = repo.writable_session("main")
    to_icechunk(rainfall().isel(time=slice(4, None)), session, append_dim="time")
    session.commit("two more")
    xr.testing.assert_identical(xr.open_zarr(session.store, chunks=None).load(), rainfall())
    old = xr.open_zarr(repo.readonly_session(snapshot_id=first).store, chunks=None)
    assert old.sizes["time"] == 4
