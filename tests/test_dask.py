"""Dask writes through forks: by threads, and by the processes of a real cluster."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

import icechunk
from icechunk import ForkSession, Repository
from icechunk.errors import ErrorKind, InvalidInputError, SessionStateError
from icechunk.xarray import to_icechunk

dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")

from icechunk.dask import computing_meta, session_merge_reduction, store_dask  # noqa: E402


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two worker processes; they are the default scheduler while the fixture is active."""
    with warnings.catch_warnings():
        # Tornado and the workers leave sockets to the garbage collector; this package cannot repair that.
        warnings.simplefilter("ignore")
        running = distributed.LocalCluster(
            n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None, worker_dashboard_address=None
        )
        client = distributed.Client(running)
        yield client
        client.close()
        running.close()


@pytest.fixture
def repo(tmp_path: Path) -> Repository:
    return Repository.create(
        icechunk.local_filesystem_storage(str(tmp_path / "repo")),
        icechunk.RepositoryConfig(inline_chunk_threshold_bytes=16),
    )


def numbers(rows: int = 24) -> Any:
    return dask.array.from_array(np.arange(rows * 8.0).reshape(rows, 8), chunks=(2, 4))


def empty(session: icechunk.Session, name: str, rows: int = 24) -> None:
    zarr.create_array(session.store, name=name, shape=(rows, 8), chunks=(2, 4), dtype="f8", fill_value=0)


def check_stored(repo: Repository, split_every: int | None) -> None:
    session = repo.writable_session("main")
    for name in ("a", "b"):
        empty(session, name)
    fork = session.fork()
    targets = [zarr.open_array(fork.store, path=name) for name in ("a", "b")]
    sources = [numbers(), numbers(8) * 2]
    regions: list[tuple[slice, ...]] = [(slice(None), slice(None)), (slice(8, 16), slice(None))]
    merged = store_dask(sources=sources, targets=targets, regions=regions, split_every=split_every)
    assert isinstance(merged, ForkSession)
    session.merge(merged)
    session.commit("stored")
    store = repo.readonly_session("main").store
    np.testing.assert_array_equal(zarr.open_array(store, path="a", mode="r")[:], numbers().compute())
    expected = np.zeros((24, 8))
    expected[8:16] = (numbers(8) * 2).compute()
    np.testing.assert_array_equal(zarr.open_array(store, path="b", mode="r")[:], expected)


@pytest.mark.parametrize("split_every", [None, 2])
def test_threads_store_dask_arrays_through_one_fork(repo: Repository, split_every: int | None) -> None:
    with dask.config.set(scheduler="threads"):
        check_stored(repo, split_every)


@pytest.mark.thorough
@pytest.mark.parametrize("split_every", [None, 2, 100])
def test_processes_of_a_cluster_store_dask_arrays_and_every_chunk_arrives(
    repo: Repository, cluster: Any, split_every: int | None
) -> None:
    check_stored(repo, split_every)


def check_handed_over(repo: Repository, location: str) -> None:
    session = repo.writable_session("main")
    for name in ("a", "b"):
        empty(session, name)
    id = session.checkpoint()
    fork = Repository.open(icechunk.local_filesystem_storage(location)).join_session(id)
    targets = [zarr.open_array(fork.store, path=name) for name in ("a", "b")]
    returned = store_dask(sources=[numbers(), numbers() * 2], targets=targets, through_storage=True)
    assert isinstance(returned, ForkSession)
    assert session.collect_forks() > 0
    assert session.collect_forks() == 0
    session.commit("handed over")
    store = repo.readonly_session("main").store
    np.testing.assert_array_equal(zarr.open_array(store, path="a", mode="r")[:], numbers().compute())
    np.testing.assert_array_equal(zarr.open_array(store, path="b", mode="r")[:], (numbers() * 2).compute())


def test_threads_hand_over_through_storage(repo: Repository, tmp_path: Path) -> None:
    with dask.config.set(scheduler="threads"):
        check_handed_over(repo, str(tmp_path / "repo"))


def test_processes_of_a_cluster_hand_over_through_storage(repo: Repository, tmp_path: Path, cluster: Any) -> None:
    check_handed_over(repo, str(tmp_path / "repo"))


def test_xarray_lets_tasks_hand_over_through_storage(repo: Repository, cluster: Any) -> None:
    dataset = xr.Dataset({"v": (("time", "x"), numbers()), "w": ("x", np.arange(8.0))})
    session = repo.writable_session("main")
    to_icechunk(dataset, session, through_storage=True)
    assert session.id is not None
    session.commit("dataset")
    found = xr.open_zarr(repo.readonly_session("main").store, consolidated=False)
    xr.testing.assert_equal(found.compute(), dataset.compute())
    assert repo.sessions() == []


def test_only_forks_that_joined_hand_over_through_storage(repo: Repository) -> None:
    session = repo.writable_session("main")
    empty(session, "a")
    fork = session.fork()
    for refused in (
        lambda: store_dask(sources=[numbers()], targets=[zarr.open_array(fork.store, path="a")], through_storage=True),
        lambda: to_icechunk(xr.Dataset({"v": (("t", "x"), numbers())}), fork, group="g", through_storage=True),
    ):
        with pytest.raises(SessionStateError) as error:
            refused()
        assert error.value.kind == ErrorKind.NOT_ALLOWED


def test_a_scheduler_can_be_named(repo: Repository) -> None:
    session = repo.writable_session("main")
    empty(session, "a")
    target = zarr.open_array(session.fork().store, path="a")
    session.merge(store_dask(sources=[numbers()], targets=[target], scheduler="synchronous"))
    assert zarr.open_array(session.store, path="a")[23, 7] == 191


def test_functions_for_reductions_of_array_libraries() -> None:
    counted: Any = computing_meta(len)
    assert counted([1, 2]) == 2
    assert counted([1, 2], computing_meta=True).dtype == object


@pytest.mark.parametrize("wrong", [1, [1], np.arange(3), [np.arange(3)]], ids=repr)
def test_a_reduction_of_anything_but_dask_arrays_is_a_type_error(wrong: Any) -> None:
    with pytest.raises(TypeError):
        session_merge_reduction(wrong, split_every=None)


def test_nothing_to_store_and_a_tree_without_branches_are_refused(repo: Repository) -> None:
    with pytest.raises(InvalidInputError):
        store_dask(sources=[], targets=[])
    with pytest.raises(InvalidInputError):
        session_merge_reduction([], split_every=1)


def dataset(times: range = range(12)) -> xr.Dataset:
    values = np.arange(len(times) * 40.0).reshape(len(times), 5, 8) + times.start
    return xr.Dataset(
        {"t": (("time", "y", "x"), values, {"units": "K"}), "s": (("y", "x"), np.arange(40).reshape(5, 8))},
        coords={"time": np.array(times), "x": np.arange(8)},
        attrs={"title": "made up"},
    )


def check_xarray(repo: Repository) -> None:
    session = repo.writable_session("main")
    to_icechunk(dataset().chunk(time=2), session, split_every=2)
    session.commit("first")
    session = repo.writable_session("main")
    to_icechunk(dataset(range(12, 20)).chunk(time=2).drop_vars("s"), session, append_dim="time")
    session.commit("appended")
    session = repo.writable_session("main")
    patch = (dataset(range(4, 8)) * -1).assign_coords(time=np.arange(4, 8)).chunk(time=2)
    to_icechunk(patch[["t"]].drop_vars("x"), session, region={"time": slice(4, 8)})
    session.commit("patched")
    found = xr.open_zarr(repo.readonly_session("main").store, consolidated=False, chunks=None).load()
    expected = xr.concat([dataset(), dataset(range(12, 20)).drop_vars("s")], "time", data_vars="minimal")
    expected["t"][4:8] = -dataset(range(4, 8))["t"].values
    xr.testing.assert_equal(found, expected)
    assert found.attrs == dataset().attrs


def test_xarray_writes_appends_and_patches_dask_arrays_by_threads(repo: Repository) -> None:
    with dask.config.set(scheduler="threads"):
        check_xarray(repo)


def test_xarray_writes_appends_and_patches_dask_arrays_on_a_cluster(repo: Repository, cluster: Any) -> None:
    check_xarray(repo)


def test_a_dask_data_array_keeps_its_name_or_namelessness(repo: Repository) -> None:
    session = repo.writable_session("main")
    array = dataset()["t"].chunk(time=4)
    with dask.config.set(scheduler="threads"):
        to_icechunk(array, session, group="named")
        to_icechunk(array.rename(None), session, group="nameless")
    named = xr.open_zarr(session.store, group="named", consolidated=False, chunks=None)
    assert set(named.data_vars) == {"t"}
    nameless = xr.open_zarr(session.store, group="nameless", consolidated=False, chunks=None)
    assert set(nameless.data_vars) == {"__xarray_dataarray_variable__"}


def fail_at_the_end(block: np.ndarray, block_info: object = None) -> np.ndarray:
    if (block == 191).any():
        raise RuntimeError("no")
    return block


def test_a_task_that_fails_leaves_the_session_without_the_fork_s_changes(repo: Repository, cluster: Any) -> None:
    session = repo.writable_session("main")
    empty(session, "a")
    before = str(session.status())
    target = zarr.open_array(session.fork().store, path="a")
    with pytest.raises(RuntimeError, match=re.escape("no")):
        store_dask(sources=[numbers().map_blocks(fail_at_the_end, dtype="f8")], targets=[target])
    assert str(session.status()) == before


def test_futures_of_a_cluster_write_regions_of_one_dataset_through_forks(repo: Repository, cluster: Any) -> None:
    session = repo.writable_session("main")
    template = dataset().chunk(time=2)
    template.to_zarr(session.store, compute=False, consolidated=False, zarr_format=3)
    forks = [session.fork() for _ in range(3)]
    futures = [
        cluster.submit(write_region, fork, dataset(range(4 * i, 4 * i + 4)), slice(4 * i, 4 * i + 4), pure=False)
        for i, fork in enumerate(forks)
    ]
    session.merge(*cluster.gather(futures))
    session.commit("regions")
    found = xr.open_zarr(repo.readonly_session("main").store, consolidated=False, chunks=None).load()
    for i in range(3):
        written = dataset(range(4 * i, 4 * i + 4))["t"].values
        np.testing.assert_array_equal(found["t"].values[4 * i : 4 * i + 4], written)


def write_region(fork: ForkSession, part: xr.Dataset, where: slice) -> ForkSession:
    part[["t"]].drop_vars(["time", "x"]).to_zarr(fork.store, region={"time": where}, consolidated=False)
    return fork
