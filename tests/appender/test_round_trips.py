"""Datasets that an appender stores are read back as they were, or refused: no value becomes another one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr.api.asynchronous as azarr

import icechunk
from icechunk.errors import InvalidInputError, SessionStateError
from tests.appender.test_appender import new_repo, rows

FIRST = np.datetime64("2020-01-01", "ns")


def days(begin: int, end: int) -> Any:
    return FIRST + np.arange(begin, end).astype("m8[D]").astype("m8[ns]")


def dataset(begin: int, end: int, values: Any = None, **coords: Any) -> xr.Dataset:
    values = np.arange(begin, end) * 1.5 if values is None else values
    values = values if isinstance(values, tuple) else ("time", values)
    return xr.Dataset({"v": values}, coords={"time": days(begin, end), **coords})


async def read(repo: icechunk.Repository) -> xr.Dataset:
    session = await repo.readonly_session_async("main")
    return await asyncio.to_thread(lambda: xr.open_zarr(session.store, consolidated=False).load())


async def appended(*datasets: xr.Dataset, **options: Any) -> xr.Dataset:
    repo = await new_repo()
    async with repo.appender("main", dim="time", source="s", **options) as appender:
        for offset, each in enumerate(datasets):
            await appender.put(each, offset=offset)
    return await read(repo)


DATASETS: dict[str, Callable[[int, int], xr.Dataset]] = {
    "scalar coordinate": lambda a, b: dataset(a, b, crs=5),
    "coordinates of two dimensions": lambda a, b: dataset(
        a, b, (("time", "y", "x"), np.ones((b - a, 2, 3))), lat=(("y", "x"), np.ones((2, 3)))
    ),
    "coordinate that grows": lambda a, b: dataset(a, b, step=("time", np.arange(a, b))),
    "bool": lambda a, b: dataset(a, b, np.arange(a, b) % 2 == 0),
    "complex": lambda a, b: dataset(a, b, np.arange(a, b) * 1j),
    "fixed texts": lambda a, b: dataset(a, b, np.array([f"s{n}" for n in range(a, b)])),
    "object texts": lambda a, b: dataset(a, b, np.array([f"s{n**9}" for n in range(a, b)], object)),
    "text labels": lambda a, b: dataset(a, b).assign_coords(time=[f"{n:03}" for n in range(a, b)]),
    "seconds": lambda a, b: dataset(a, b).assign_coords(time=days(a, b).astype("M8[s]")),
    "times of seconds": lambda a, b: dataset(a, b, days(a, b).astype("M8[s]")),
    "absent times of seconds": lambda a, b: dataset(a, b, np.array(["NaT"] * (b - a), "M8[s]")),
    "durations of seconds": lambda a, b: dataset(a, b, np.arange(a, b).astype("m8[s]")),
    "attributes of numpy": lambda a, b: dataset(a, b).assign_attrs(n=3, values=[1, 2]),
    "bounds": lambda a, b: (
        dataset(a, b)
        .assign(time_bnds=(("time", "nv"), np.stack([days(a, b), days(a + 1, b + 1)], 1)))
        .assign_coords(time=("time", days(a, b), {"bounds": "time_bnds"}))
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", DATASETS)
async def test_rows_are_read_back_as_they_were_put(kind: str) -> None:
    parts = [DATASETS[kind](0, 3), DATASETS[kind](3, 5)]
    expected = xr.concat(parts, "time", data_vars="minimal", coords="minimal", compat="override", join="override")
    if kind == "attributes of numpy":
        parts[0].attrs |= {"n": np.int64(3), "values": np.array([1, 2])}
    xr.testing.assert_identical(await appended(*parts), expected)


async def test_times_beyond_nanoseconds_are_kept() -> None:
    def years(begin: int, end: int) -> xr.Dataset:
        return dataset(begin, end).assign_coords(time=np.arange(880 + begin, 880 + end).astype("M8[Y]").astype("M8[s]"))

    repo = await new_repo()
    async with repo.appender("main", dim="time", source="s") as appender:
        await appender.put(years(0, 3), offset=0)
        await appender.put(years(3, 5), offset=1)
    session = await repo.readonly_session_async("main")
    time = await azarr.open_array(store=session.store, path="time", mode="r")
    assert time.attrs["units"] == "seconds since 1970-01-01"
    np.testing.assert_array_equal(np.asarray(await time.getitem(Ellipsis)), years(0, 5).time.values.astype("i8"))


async def test_times_of_other_calendars_are_kept_to_the_microsecond() -> None:
    cftime = pytest.importorskip("cftime")

    def steps(begin: int, end: int) -> xr.Dataset:
        times = [cftime.DatetimeNoLeap(2000, 1, 1 + n, n, n, n, n) for n in range(begin, end)]
        return dataset(begin, end).assign_coords(time=times)

    found = await appended(steps(0, 3), steps(3, 5))
    assert found.time.values.tolist() == steps(0, 5).time.values.tolist()


@pytest.mark.parametrize("unit", ["s", "us"])
async def test_an_absent_time_of_another_dtype_leaves_the_other_times_as_they_are(unit: str) -> None:
    later = np.array(["2021-01-01", "NaT"], f"M8[{unit}]")
    found = await appended(dataset(0, 3, days(0, 3)), dataset(3, 5, later))
    assert found.v.values.tolist() == np.concatenate([days(0, 3), later.astype("M8[ns]")]).tolist()


@pytest.mark.parametrize("encoding", [{"scale_factor": 0.01}, {"scale_factor": 0.01, "_FillValue": -32768}])
@pytest.mark.parametrize("value", [1e6, -1e6, 327.68, np.inf])
async def test_values_beyond_the_range_of_packed_integers_are_refused(encoding: Any, value: float) -> None:
    first = dataset(0, 3)
    first.v.encoding = {"dtype": "i2", **encoding}
    repo = await new_repo()
    async with repo.appender("main", dim="time", source="s") as appender:
        await appender.put(first, offset=0)
        with pytest.raises(InvalidInputError):
            await appender.put(dataset(3, 4, np.array([value])), offset=1)
        await appender.put(dataset(3, 4, np.array([7.0])), offset=1)
    assert (await read(repo)).v.values.tolist() == [0, 1.5, 3, 7]


async def test_absent_values_need_a_fill_value() -> None:
    first = dataset(0, 3)
    first.v.encoding = {"dtype": "i2"}
    repo = await new_repo()
    absent = dataset(3, 4, np.array([np.nan]))
    async with repo.appender("main", dim="time", source="s") as appender:
        absent.v.encoding = {"dtype": "i2"}
        with pytest.raises(InvalidInputError):
            await appender.put(absent, offset=0)
        await appender.put(first, offset=0)
        with pytest.raises(InvalidInputError):
            await appender.put(absent, offset=1)


@pytest.mark.parametrize(
    ("dtype", "given"),
    [
        ("f8", np.array([2**53 + 1])),
        ("f4", np.array([2**24 + 1], "i4")),
        ("M8[ns]", np.array(["2500-01-01"], "M8[D]")),
        ("U21", np.array([5])),
        ("i2", np.array([5])),
    ],
)
@pytest.mark.filterwarnings("ignore")
async def test_numbers_that_the_dtype_does_not_have_are_refused(dtype: str, given: Any) -> None:
    repo = await new_repo()
    session = await repo.writable_session_async("main")
    await azarr.create_array(
        store=session.store, name="v", shape=(0,), chunks=(4,), dtype=dtype, dimension_names=("time",)
    )
    await session.commit_async("arrays")
    async with repo.appender("main", dim="time", source="s") as appender:
        with pytest.raises(InvalidInputError):
            await appender.put({"v": given}, offset=0)
        assert appender.stats().rows_buffered == 0


@pytest.mark.parametrize(
    "data",
    [
        dataset(0, 2, np.array([1, "a"], object)),
        dataset(0, 2).assign_attrs(owner=object()),
    ],
)
@pytest.mark.filterwarnings("ignore")
async def test_a_first_dataset_that_cannot_be_stored_is_refused(data: xr.Dataset) -> None:
    repo = await new_repo()
    async with repo.appender("main", dim="time", source="s") as appender:
        with pytest.raises(InvalidInputError):
            await appender.put(data, offset=0)
        await appender.put(dataset(0, 2), offset=0)
    assert (await read(repo)).sizes["time"] == 2


async def test_of_two_first_datasets_both_must_have_the_same_fixed_coordinates() -> None:
    repo = await new_repo()
    other = await icechunk.Repository.open_async(repo.storage)
    one, two = repo.appender("main", dim="time", source="a"), other.appender("main", dim="time", source="b")
    await one.__aenter__()
    await two.__aenter__()
    await one.put(rows(0, 2), offset=0)
    await two.put(rows(2, 2).assign_coords(x=[10, 11, 12, 13]), offset=0)
    await one.__aexit__()
    with pytest.raises(SessionStateError):
        await two.__aexit__()
    assert (await read(repo)).sizes["time"] == 2


async def test_a_window_of_rows_is_kept_of_arrays_that_the_first_dataset_made() -> None:
    repo = await new_repo()
    async with repo.appender("main", dim="time", source="s", keep=40) as appender:
        for n in range(0, 200, 5):
            await appender.put(rows(n, 5).assign(w=(("time", "z"), np.ones((5, 7)))), offset=n, durable=True)
    assert 40 <= (await read(repo)).sizes["time"] < 50


async def test_as_many_rows_as_a_chunk_has_go_before_the_first() -> None:
    repo = await new_repo()
    wide = {"w": (("time", "z"), np.ones((1, 4095))), "u": (("time", "y"), np.ones((1, 12000)))}
    async with repo.appender("main", dim="time", source="s") as appender:
        await appender.put(dataset(0, 1).assign(wide).drop_vars("v").reset_index("time").drop_vars("time"), offset=0)
        more = xr.Dataset({"w": (("time", "z"), np.ones((8, 4095))), "u": (("time", "y"), np.ones((8, 12000)))})
        await appender.prepend(more)
    assert (await read(repo)).sizes["time"] == 9


@pytest.mark.parametrize(
    "options",
    [
        {"gaps": "typo"},
        {"every": float("nan")},
        {"every": "5"},
        {"every": True},
        {"max_rows": 1.5},
        {"max_bytes": None},
        {"keep": 2.5},
        {"group": "a//b"},
        {"group": "a/../b"},
        {"source": "\ud800"},
        {"message": "\ud800"},
        {"message": None},
    ],
)
async def test_settings_of_another_kind_are_refused_at_once(options: Any) -> None:
    repo = await new_repo()
    with pytest.raises(InvalidInputError):
        repo.appender("main", **{"dim": "time", "source": "s"} | options)
