"""The first dataset creates arrays beside those that exist: it replaces none of them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr.api.asynchronous as azarr

import icechunk
from icechunk.errors import ErrorKind, InvalidInputError, SessionStateError
from icechunk.xarray import to_icechunk
from tests.appender.test_appender import new_repo, rows
from tests.raising import raises

X = np.array([10, 20, 30, 40])


def first(**variables: Any) -> xr.Dataset:
    """A dataset of one row; each variable by its dimensions and values."""
    return xr.Dataset(variables, coords={"time": [0]})


def fixed() -> xr.Dataset:
    """Arrays that do not grow."""
    return xr.Dataset({"mask": (("y", "x"), np.full((2, 4), 7.0))}, coords={"x": X})


async def repo_with(dataset: xr.Dataset) -> icechunk.Repository:
    repo = await new_repo()
    await add(repo, dataset)
    return repo


async def add(repo: icechunk.Repository, dataset: xr.Dataset, group: str | None = None) -> None:
    session = await repo.writable_session_async("main")
    await asyncio.to_thread(to_icechunk, dataset, session, group=group, mode="a")
    await session.commit_async("arrays")


async def contents(repo: icechunk.Repository) -> dict[str, Any]:
    """Every array of the root: dimensions and values."""
    session = await repo.readonly_session_async("main")
    group = await azarr.open_group(store=session.store, mode="r")
    return {
        name: (tuple(array.metadata.dimension_names or ()), np.asarray(await array.getitem(...)).tolist())
        async for name, array in group.arrays()
    }


async def loaded(repo: icechunk.Repository) -> xr.Dataset:
    session = await repo.readonly_session_async("main")
    return await asyncio.to_thread(lambda: xr.open_zarr(session.store, consolidated=False).load())


@pytest.mark.parametrize(
    "variables",
    [
        {"mask": (("time", "y", "x"), np.ones((1, 2, 4)))},
        {"mask": (("y", "x"), np.ones((2, 4))), "v": (("time", "x"), np.ones((1, 4)))},
        {"mask": (("y",), np.ones(2)), "v": (("time", "x"), np.ones((1, 4)))},
        {"v": (("time", "x"), np.ones((1, 4))), "x": (("x",), np.arange(4))},
        {"v": (("time", "x"), np.ones((1, 3))), "x": (("x",), X[:3])},
        {"v": (("time", "x"), np.ones((1, 3)))},
        {"v": (("time", "y"), np.ones((1, 3)))},
    ],
    ids=["grows", "other values", "other dimensions", "other coordinate", "shorter", "size of x", "size of y"],
)
async def test_a_first_dataset_that_does_not_fit_the_arrays_that_exist_is_refused(variables: Mapping[str, Any]) -> None:
    repo = await repo_with(fixed())
    before = await contents(repo)
    async with repo.appender("main", dim="time", source="s") as appender:
        with pytest.raises(InvalidInputError) as refused:
            await appender.put(first(**variables), offset=1, durable=True)
        assert refused.value.kind == ErrorKind.INVALID_SETTING
        assert any(name in refused.value.message for name in variables)
        assert appender.stats().rows_buffered == 0
        # Nothing is decided: another dataset may come first.
        await appender.put(first(v=(("time", "x"), np.ones((1, 4)))), offset=1, durable=True)
    after = await contents(repo)
    assert {name: after[name] for name in before} == before
    assert after["v"] == (("time", "x"), [[1.0] * 4])


@pytest.mark.parametrize("names", [None, ("t",)])
async def test_an_array_without_the_name_of_the_dimension_is_not_replaced(names: tuple[str, ...] | None) -> None:
    repo = await new_repo()
    session = await repo.writable_session_async("main")
    array = await azarr.create_array(store=session.store, name="v", shape=(3,), dtype="f8", dimension_names=names)
    await array.setitem(..., np.arange(3.0))
    await session.commit_async("an array")
    before = await contents(repo)
    async with repo.appender("main", dim="time", source="s") as appender:
        with raises(InvalidInputError, ErrorKind.INVALID_SETTING, "'v'"):
            await appender.put(first(v=(("time",), np.ones(1))), offset=1)
    assert await contents(repo) == before


async def test_a_group_is_not_replaced() -> None:
    repo = await new_repo()
    await add(repo, fixed(), group="v")
    async with repo.appender("main", dim="time", source="s") as appender:
        with raises(InvalidInputError, ErrorKind.INVALID_SETTING, "'v'"):
            await appender.put(first(v=(("time",), np.ones(1))), offset=1)
    session = await repo.readonly_session_async("main")
    assert (await azarr.open_array(store=session.store, path="v/mask")).shape == (2, 4)


@pytest.mark.parametrize("group", ["mask", "mask/below"])
async def test_an_array_is_no_group_to_append_to(group: str) -> None:
    repo = await repo_with(fixed())
    with raises(InvalidInputError, ErrorKind.INVALID_SETTING, "mask"):
        async with repo.appender("main", dim="time", source="s", group=group):
            pass


@pytest.mark.parametrize("name", ["a/b", "mask/v", "..", ""])
async def test_a_variable_whose_name_is_a_path_is_refused(name: str) -> None:
    repo = await repo_with(fixed())
    async with repo.appender("main", dim="time", source="s") as appender:
        with pytest.raises(InvalidInputError):
            await appender.put(first(**{name: (("time",), np.ones(1))}), offset=1)


@pytest.mark.parametrize("given", ["none", "equal", "transposed", "smaller dtype"])
async def test_arrays_that_exist_are_kept_and_may_be_given_again(given: str) -> None:
    repo = await repo_with(fixed())
    dataset = first(v=(("time", "y", "x"), np.ones((1, 2, 4))))
    if given != "none":
        dataset = dataset.merge(fixed())
    if given == "transposed":
        dataset["mask"] = dataset.mask.transpose()
    if given == "smaller dtype":
        dataset["x"] = dataset.x.astype("i2")
    before = await contents(repo)
    async with repo.appender("main", dim="time", source="s") as appender:
        await appender.put(dataset, offset=1)
        await appender.put(dataset.assign_coords(time=[1]), offset=2, durable=True)
        with pytest.raises(InvalidInputError):
            await appender.put(dataset.assign_coords(time=[2], x=X + 1), offset=3)
    after = await contents(repo)
    assert {name: after[name] for name in before} == before
    found = await loaded(repo)
    assert found.sizes == {"time": 2, "y": 2, "x": 4}
    assert found.x.values.tolist() == X.tolist()


@pytest.mark.parametrize("when", ["before the put", "while buffered"])
@pytest.mark.parametrize("other", ["array", "group", "coordinate", "size"])
async def test_what_another_writer_creates_meanwhile_is_not_replaced(when: str, other: str) -> None:
    repo = await new_repo()
    await add(repo, xr.Dataset({"old": ((), 1.0)}))
    writer = await icechunk.Repository.open_async(repo.storage)
    async with repo.appender("main", dim="time", source="a") as appender:
        if when == "while buffered":
            await appender.put(rows(0), offset=0)
        match other:
            case "array":
                await add(writer, xr.Dataset({"v": (("a",), [5.0])}))
            case "group":
                await add(writer, fixed(), group="v")
            case "coordinate":
                await add(writer, xr.Dataset(coords={"x": X}))
            case "size":
                await add(writer, xr.Dataset({"z": (("x",), np.ones(7))}))
        before = await contents(writer)
        if when == "before the put":
            await appender.put(rows(0), offset=0)
        with pytest.raises(SessionStateError):
            await appender.flush()
    assert await contents(writer) == before
    async with repo.appender("main", dim="time", source="a") as appender:
        assert appender.position is None


async def test_what_fits_may_be_created_by_another_writer_meanwhile() -> None:
    repo = await new_repo()
    await add(repo, fixed())
    writer = await icechunk.Repository.open_async(repo.storage)
    dataset = first(v=(("time", "x"), np.ones((1, 4)))).merge(fixed())
    async with repo.appender("main", dim="time", source="a") as appender:
        await appender.put(dataset, offset=0)
        await add(writer, xr.Dataset({"z": (("x",), np.ones(4))}), group="other")
        session = await writer.writable_session_async("main")
        await azarr.create_array(store=session.store, name="z", shape=(4,), dtype="f8", dimension_names=("x",))
        await session.commit_async("z")
    assert set(await loaded(repo)) == {"mask", "v", "z"}


async def test_a_kept_array_that_another_writer_changes_meanwhile_ends_the_appender() -> None:
    repo = await repo_with(fixed())
    writer = await icechunk.Repository.open_async(repo.storage)
    dataset = first(v=(("time", "x"), np.ones((1, 4)))).merge(fixed())
    async with repo.appender("main", dim="time", source="a") as appender:
        await appender.put(dataset, offset=0)
        session = await writer.writable_session_async("main")
        array = await azarr.open_array(store=session.store, path="x", mode="r+")
        await array.setitem(..., X + 1)
        await session.commit_async("x")
        with pytest.raises(SessionStateError):
            await appender.flush()
    assert (await contents(repo))["x"][1] == (X + 1).tolist()
