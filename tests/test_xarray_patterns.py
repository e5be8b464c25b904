"""Ways of writing with xarray: groups and trees, and regions by threads, by processes, and by independent writers."""

from __future__ import annotations

import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import icechunk
from icechunk import ForkSession, Repository, Session
from icechunk.xarray import to_icechunk

STEPS = 8
FORMAT: dict[str, Any] = {"zarr_format": 3, "consolidated": False}


@pytest.fixture
def repo(tmp_path: Path) -> Repository:
    return Repository.create(icechunk.local_filesystem_storage(str(tmp_path / "repo")))


def weather(steps: range = range(STEPS)) -> xr.Dataset:
    values = np.arange(steps.start * 6.0, steps.stop * 6.0).reshape(len(steps), 2, 3)
    coords = {"time": np.array(steps), "y": [10, 20], "x": [1, 2, 3]}
    return xr.Dataset({"t": (("time", "y", "x"), values, {"units": "K"})}, coords=coords, attrs={"title": "made up"})


def frame(repo: Repository) -> None:
    """Commit everything but the values."""
    pytest.importorskip("dask")
    session = repo.writable_session("main")
    weather().chunk(time=2).to_zarr(session.store, compute=False, mode="w", **FORMAT)
    session.commit("the frame")


def check(repo: Repository) -> None:
    found = xr.open_zarr(repo.readonly_session("main").store, chunks=None, **FORMAT)
    xr.testing.assert_identical(found.load(), weather())


def write(session: Session, start: int) -> Session:
    weather(range(start, start + 2)).drop_vars(["y", "x"]).to_zarr(session.store, region={"time": "auto"}, **FORMAT)
    return session


def write_fork(fork: ForkSession, start: int) -> ForkSession:
    write(fork, start)
    return fork


def test_the_frame_alone_has_no_values(repo: Repository) -> None:
    frame(repo)
    found = xr.open_zarr(repo.readonly_session("main").store, chunks=None, **FORMAT)
    assert bool(found["t"].isnull().all())
    np.testing.assert_array_equal(found["time"], np.arange(STEPS))


def test_threads_write_regions_through_one_session(repo: Repository) -> None:
    frame(repo)
    session = repo.writable_session("main")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda start: write(session, start), range(0, STEPS, 2)))
    session.commit("the values")
    check(repo)


@pytest.mark.thorough
def test_processes_write_regions_through_forks(repo: Repository) -> None:
    frame(repo)
    session = repo.writable_session("main")
    fork = session.fork()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(write_fork, fork, start) for start in range(0, STEPS, 2)]
        session.merge(*[future.result(100) for future in futures])
    session.commit("the values")
    check(repo)


def test_independent_sessions_write_regions_and_rebase(repo: Repository) -> None:
    frame(repo)
    solver = icechunk.BasicConflictSolver(on_chunk_conflict=icechunk.VersionSelection.UseOurs)

    def write_and_commit(start: int) -> None:
        session = repo.writable_session("main")
        write(session, start)
        session.commit(f"from {start}", rebase_with=solver, rebase_tries=20)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_and_commit, range(0, STEPS, 2)))
    check(repo)
    assert len(list(repo.ancestry(branch="main"))) == 2 + STEPS // 2


def test_every_way_of_opening_gives_the_same(repo: Repository) -> None:
    session = repo.writable_session("main")
    to_icechunk(weather(), session, group="deep/group")
    session.commit("weather")
    store: Any = repo.readonly_session("main").store  # xarray's types know no zarr stores
    for found in (
        xr.open_zarr(store, group="deep/group", chunks=None, **FORMAT),
        xr.open_dataset(store, engine="zarr", group="deep/group", backend_kwargs={"consolidated": False}),
        xr.open_datatree(store, engine="zarr", consolidated=False)["deep/group"].to_dataset(),
        xr.open_groups(store, engine="zarr", consolidated=False)["/deep/group"],
    ):
        xr.testing.assert_identical(found.load(), weather())


def tree() -> xr.DataTree:
    return xr.DataTree.from_dict(
        {"/": xr.Dataset(attrs={"title": "a tree"}), "/one": weather(), "/one/two": weather()[["t"]].mean("time")}
    )


def test_a_tree_is_written_committed_and_opened(repo: Repository) -> None:
    session = repo.writable_session("main")
    tree().to_zarr(session.store, **FORMAT)
    session.commit("a tree")
    store: Any = repo.readonly_session("main").store
    found = xr.open_datatree(store, engine="zarr", consolidated=False)
    xr.testing.assert_identical(found.load(), tree())


def test_a_tree_replaces_and_joins_others(repo: Repository) -> None:
    session = repo.writable_session("main")
    tree().to_zarr(session.store, **FORMAT)
    with pytest.raises(FileExistsError):
        tree().to_zarr(session.store, mode="w-", **FORMAT)
    session.commit("a tree")
    session = repo.writable_session("main")
    smaller = xr.DataTree.from_dict({"/three": weather()})
    smaller.to_zarr(session.store, mode="w", **FORMAT)
    to_icechunk(weather(range(2)), session, group="four")
    session.commit("another")
    store: Any = repo.readonly_session("main").store
    found = xr.open_datatree(store, engine="zarr", consolidated=False)
    assert set(found.children) == {"three", "four"}
    xr.testing.assert_identical(found["three"].to_dataset().load(), weather())
    xr.testing.assert_identical(found["four"].to_dataset().load(), weather(range(2)))


def test_unsafe_chunks_are_refused_until_allowed(repo: Repository) -> None:
    pytest.importorskip("dask")
    session = repo.writable_session("main")
    encoding = {"t": {"chunks": (4, 2, 3)}}
    with pytest.raises(ValueError, match="overlap"):  # words: xarray's own
        to_icechunk(weather().chunk(time=3), session, encoding=encoding)
    session.discard_changes()
    import dask

    with dask.config.set(scheduler="synchronous"):
        to_icechunk(weather().chunk(time=3), session, encoding=encoding, safe_chunks=False)
    session.commit("allowed")
    check(repo)


def test_datasets_opened_synchronously_load_in_any_loop(repo: Repository) -> None:
    session = repo.writable_session("main")
    to_icechunk(weather(), session)
    session.commit("all")
    store = repo.readonly_session("main").store

    async def load(count: int) -> Any:
        opened = [xr.open_zarr(store, chunks=None, **FORMAT) for _ in range(count)]
        return await asyncio.gather(*(ds.load_async() for ds in opened))

    for _ in range(2):  # a loop for each, as services of several workers and notebooks have
        for found in asyncio.run(load(5)):
            xr.testing.assert_identical(found, weather())


async def test_a_repository_opened_before_the_service_began_serves_its_loop(repo: Repository) -> None:
    opened = await asyncio.to_thread(Repository.open, repo.storage)
    session = await opened.writable_session_async("main")
    await asyncio.to_thread(to_icechunk, weather(), session)
    await session.commit_async("all")
    reader = await opened.readonly_session_async("main")
    found = await xr.open_zarr(reader.store, chunks=None, **FORMAT).load_async()
    xr.testing.assert_identical(found, weather())
    assert await asyncio.to_thread(opened.lookup_branch, "main") == reader.snapshot_id
