"""The appender: each row once, in order, whatever happens."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.codecs import GzipCodec

import icechunk
from icechunk.appender.position import as_metadata, newest_sources, recorded
from icechunk.appender.target import Target
from icechunk.errors import ErrorKind, InvalidInputError, SessionStateError
from icechunk.testing.recording import RecordingStorage


def rows(start: int, count: int = 1, width: int = 4) -> xr.Dataset:
    """A dataset whose values say which row they belong to."""
    steps = np.arange(start, start + count)
    return xr.Dataset(
        {"v": (("time", "x"), np.repeat(steps[:, None], width, 1).astype("f4"))},
        coords={"time": steps.astype("datetime64[h]").astype("datetime64[ns]"), "x": np.arange(width)},
    )


async def new_repo(spec_version: int | None = None) -> icechunk.Repository:
    return await icechunk.Repository.create_async(icechunk.in_memory_storage(), spec_version=spec_version)


async def stored(repo: icechunk.Repository, group: str | None = None) -> list[int]:
    session = await repo.readonly_session_async("main")

    def read() -> list[int]:
        ds = xr.open_zarr(session.store, group=group, consolidated=False)
        hours = ds.time.values.astype("datetime64[h]").astype(int)
        np.testing.assert_array_equal(ds.v.values[:, 0].astype(int), hours)
        found: list[int] = hours.tolist()
        return found

    return await asyncio.to_thread(read)


@pytest.mark.parametrize("spec_version", [None, 2, 1])
async def test_rows_are_committed_and_the_next_appender_starts_at_their_position(spec_version: int | None) -> None:
    repo = await new_repo(spec_version)
    async with repo.appender("main", dim="time", source="s") as appender:
        assert appender.position is None
        for n in range(5):
            assert await appender.put(rows(n), offset=n) == "buffered"
        assert appender.stats().rows_buffered == 5
    assert await stored(repo) == list(range(5))
    async with repo.appender("main", dim="time", source="s") as appender:
        assert appender.position == 4
        assert await appender.put(rows(4), offset=4) == "skipped"
        assert await appender.put(rows(3), offset=3) == "skipped"
        assert await appender.put(rows(5, 3), offset=7, durable=True) == "committed"
        assert appender.position == 7
    assert await stored(repo) == list(range(8))
    newest = await anext(repo.async_ancestry(branch="main"))
    assert newest.metadata["aioicechunk_append"]["sources"]["s"]["offset"] == 7


async def test_texts_grow_along_any_dimension() -> None:
    repo = await new_repo()
    session = await repo.writable_session_async("main")
    await zarr.api.asynchronous.create_array(
        store=session.store, name="v", shape=(3, 0), chunks=(3, 4), dtype=str, dimension_names=("x", "time")
    )
    await session.commit_async("arrays")
    texts = np.array([[f"{x} {step}" for step in range(12)] for x in range(3)], np.dtypes.StringDType())
    async with repo.appender("main", dim="time", source="s") as appender:
        await appender.put({"v": texts[:, :4]}, durable=True)
        await appender.put({"v": texts[:, 4:]})
    reader = await repo.readonly_session_async("main")
    array = await zarr.api.asynchronous.open_array(store=reader.store, path="v")
    np.testing.assert_array_equal(np.asarray(await array.getitem(slice(None))), texts)


@pytest.mark.filterwarnings("ignore:The data type")
@pytest.mark.parametrize("dtype", ["T", "U5", "S5", np.dtype([("a", "i4"), ("b", "f8")]), "M8[ns]"], ids=str)
@pytest.mark.parametrize("durable", [True, False])
async def test_values_of_any_dtype_are_replaced(dtype: Any, durable: bool) -> None:
    repo = await new_repo()
    session = await repo.writable_session_async("main")
    for name, kind in (("v", dtype), ("time", "i8")):
        await zarr.api.asynchronous.create_array(
            store=session.store,
            name=name,
            shape=(0,),
            chunks=(4,),
            dtype=str if kind == "T" else kind,
            dimension_names=("time",),
        )
    await session.commit_async("arrays")
    given = np.arange(30).astype("M8[ns]" if dtype == "M8[ns]" else "i8").astype(dtype)
    async with repo.appender("main", dim="time", source="s", key="time", on_duplicate="replace") as appender:
        await appender.put({"time": np.arange(10), "v": given[:10]}, durable=durable)
        await appender.put({"time": np.arange(2, 7), "v": given[12:17]}, durable=durable)
        await appender.put({"time": np.arange(9, 12), "v": given[19:22]}, durable=durable)
    reader = await repo.readonly_session_async("main")
    array = await zarr.api.asynchronous.open_array(store=reader.store, path="v")
    expected = given[[0, 1, 12, 13, 14, 15, 16, 7, 8, 19, 20, 21]]
    np.testing.assert_array_equal(np.asarray(await array.getitem(slice(None))), expected)


async def test_partial_chunks_are_not_read_back() -> None:
    repo = await new_repo()
    session = await repo.writable_session_async("main")
    await zarr.api.asynchronous.create_array(
        store=session.store, name="v", shape=(0, 2), chunks=(4, 2), dtype="f4", dimension_names=("time", "x")
    )
    await session.commit_async("arrays")
    async with repo.appender("main", dim="time", source="s") as appender:
        for n in range(11):
            await appender.put({"v": np.full((1, 2), n, "f4")}, offset=n)
            await appender.flush()
    reader = await repo.readonly_session_async("main")
    array = await zarr.api.asynchronous.open_array(store=reader.store, path="v")
    found = np.asarray(await array.getitem(slice(None)))
    np.testing.assert_array_equal(found[:, 0], np.arange(11))


async def test_commits_happen_by_rows_bytes_and_time() -> None:
    repo = await new_repo()
    async with repo.appender("main", dim="time", source="s", every=0.1, max_rows=4) as appender:
        for n in range(9):
            await appender.put(rows(n), offset=n)
        for _ in range(200):
            if appender.position == 8:
                break
            await asyncio.sleep(0.02)
        assert appender.position == 8
        assert appender.stats().rows_buffered == 0
        assert appender.stats().lag_s == 0


async def test_two_consumers_of_one_source_cannot_both_commit() -> None:
    repo = await new_repo()
    async with repo.appender("main", dim="time", source="s") as first:
        await first.put(rows(0), offset=0, durable=True)
        async with repo.appender("main", dim="time", source="s") as second:
            await second.put(rows(1), offset=1, durable=True)
            await first.put(rows(1), offset=1)
            with pytest.raises(SessionStateError):
                await first.flush()
            with pytest.raises(SessionStateError):
                await first.put(rows(2), offset=2)
    assert await stored(repo) == [0, 1]


async def test_appenders_of_many_sources_place_their_rows_behind_each_other() -> None:
    repo = await new_repo()
    session = await repo.writable_session_async("main")
    await zarr.api.asynchronous.create_array(
        store=session.store, name="v", shape=(0,), chunks=(8,), dtype="i8", dimension_names=("row",)
    )
    await session.commit_async("arrays")
    others = [await icechunk.Repository.open_async(repo.storage) for _ in range(3)]

    async def consume(number: int) -> None:
        async with others[number].appender("main", dim="row", source=f"s{number}", max_rows=5) as appender:
            for n in range(40):
                await appender.put({"v": np.array([number * 1000 + n])}, offset=n)
                if n % 7 == 0:
                    await appender.flush()

    await asyncio.gather(*(consume(n) for n in range(3)))
    reader = await repo.readonly_session_async("main")
    array = await zarr.api.asynchronous.open_array(store=reader.store, path="v")
    found = np.asarray(await array.getitem(slice(None)))
    assert sorted(found) == [s * 1000 + n for s in range(3) for n in range(40)]
    for s in range(3):
        own = found[found // 1000 == s]
        np.testing.assert_array_equal(own, np.sort(own))


async def test_commits_to_other_arrays_are_rebased_over() -> None:
    repo = await new_repo()
    async with repo.appender("main", dim="time", source="s") as appender:
        await appender.put(rows(0), offset=0, durable=True)
        session = await repo.writable_session_async("main")
        await zarr.api.asynchronous.create_group(store=session.store, path="other")
        await session.commit_async("other")
        await appender.put(rows(1), offset=1, durable=True)
    assert await stored(repo) == [0, 1]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"w": np.zeros((1, 4), "f4")}, "names"),
        ({"v": np.zeros((1, 5), "f4"), "time": np.zeros(1, "i8")}, "shape"),
        ({"v": np.zeros((1, 4), "f8"), "time": np.full(1, 99, "i8")}, "dtype"),
        ({"v": np.zeros((2, 4), "f4"), "time": np.full(1, 99, "i8")}, "rows"),
        (rows(0), "label"),
        (rows(9).isel(x=slice(0, 3)), "fixed coordinate"),
        (rows(9).assign_coords(x=[9, 8, 7, 6]), "fixed coordinate"),
        (rows(9).rename(x="y"), "dimension"),
    ],
)
async def test_data_that_do_not_fit_are_refused_before_anything_is_buffered(data: Any, why: str) -> None:
    repo = await new_repo()
    async with repo.appender("main", dim="time", source="s") as appender:
        await appender.put(rows(0, 2), offset=1, durable=True)
        with pytest.raises(InvalidInputError) as caught:
            await appender.put(data, offset=2)
        assert caught.value.kind == ErrorKind.INVALID_SETTING, why
        assert appender.stats().rows_buffered == 0
        assert await appender.put(rows(2), offset=2) == "buffered"
    assert await stored(repo) == [0, 1, 2]


async def test_offsets_that_go_backwards_or_leave_gaps_are_refused() -> None:
    repo = await new_repo()
    async with repo.appender("main", dim="time", source="s", gaps="error") as appender:
        await appender.put(rows(0), offset=10)
        await appender.put(rows(1), offset=11)
        for offset in (9, 13, "12"):
            with pytest.raises(InvalidInputError):
                await appender.put(rows(2), offset=offset)
    assert await stored(repo) == [0, 1]


async def test_offsets_that_were_seen_are_skipped_before_and_after_their_commit() -> None:
    repo = await new_repo()
    async with repo.appender("main", dim="time", source="s", gaps="error") as appender:
        for offset in (0, 1, 2):
            await appender.put(rows(offset), offset=offset)
        for commits in (0, 1):
            assert appender.stats().commits == commits
            # As after a rebalance: the source begins again at an earlier place.
            assert [await appender.put(rows(offset), offset=offset) for offset in (1, 2)] == ["skipped", "skipped"]
            assert await appender.put(rows(3), offset=3) == ("skipped" if commits else "buffered")
            await appender.flush()
        assert appender.stats().puts_repeated == 5
    assert await stored(repo) == [0, 1, 2, 3]


@pytest.mark.parametrize("limits", [{"max_rows": 40}, {"every": 0.01}], ids=["rows", "seconds"])
async def test_a_source_that_never_waits_lets_commits_and_other_tasks_run(limits: dict[str, Any]) -> None:
    repo = await new_repo()
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.ensure_future(other())
    async with repo.appender("main", dim="time", source="s", **limits) as appender:
        offset = 0
        async with asyncio.timeout(60):
            while appender.stats().commits < 3:
                await appender.put(rows(offset), offset=offset)
                offset += 1
        assert turns > 3
    task.cancel()
    assert await stored(repo) == list(range(offset))


@pytest.mark.parametrize("on_duplicate", ["error", "skip", "replace"])
async def test_labels_that_are_there_are_dealt_with_as_asked(on_duplicate: Any) -> None:
    repo = await new_repo()
    options: dict[str, Any] = {"dim": "time", "source": "s", "key": "time", "on_duplicate": on_duplicate}
    async with repo.appender("main", **options) as appender:
        await appender.put(rows(0, 5), offset=1)
        late = rows(3, 4)
        late["v"] = late.v + 100
        if on_duplicate == "error":
            with pytest.raises(InvalidInputError):
                await appender.put(late, offset=2)
        else:
            await appender.put(late, offset=2)
    session = await repo.readonly_session_async("main")
    ds = await asyncio.to_thread(lambda: xr.open_zarr(session.store, consolidated=False).load())
    expected = {
        "error": [0, 1, 2, 3, 4],
        "skip": [0, 1, 2, 3, 4, 105, 106],
        "replace": [0, 1, 2, 103, 104, 105, 106],
    }[on_duplicate]
    assert ds.v.values[:, 0].astype(int).tolist() == expected


async def chunked(repo: icechunk.Repository) -> None:
    session = await repo.writable_session_async("main")
    for name, dtype, shape in (("v", "f4", (0, 4)), ("time", "i8", (0,))):
        await zarr.api.asynchronous.create_array(
            store=session.store,
            name=name,
            shape=shape,
            chunks=(4, *shape[1:]),
            dtype=dtype,
            dimension_names=("time", "x")[: len(shape)],
        )
    await session.commit_async("arrays")


def plain(start: int, count: int) -> dict[str, Any]:
    steps = np.arange(start, start + count)
    return {"time": steps, "v": np.repeat(steps[:, None], 4, 1).astype("f4")}


async def values(repo: icechunk.Repository) -> list[int]:
    session = await repo.readonly_session_async("main")
    found = {}
    for name in ("v", "time"):
        array = await zarr.api.asynchronous.open_array(store=session.store, path=name)
        found[name] = np.asarray(await array.getitem(slice(None)))
    np.testing.assert_array_equal(found["v"][:, 0], found["time"])
    result: list[int] = found["time"].tolist()
    return result


async def test_rows_behind_replaced_ones_replace_those_that_another_source_has_stored() -> None:
    repo = await new_repo()
    await chunked(repo)
    options: dict[str, Any] = {"dim": "time", "key": "time", "on_duplicate": "replace"}
    async with (
        repo.appender("main", source="a", **options) as first,
        repo.appender("main", source="b", **options) as second,
    ):
        await first.put(plain(0, 4), offset=0, durable=True)
        await first.put(plain(5, 1), offset=1)
        await second.put(plain(5, 3), offset=0, durable=True)
        # The first does not know yet that 6 and 7 are there.
        await first.put({name: data[[3, 5, 6, 7, 8]] for name, data in plain(0, 9).items()}, offset=2)
    assert await values(repo) == [0, 1, 2, 3, 5, 6, 7, 8]


async def test_rows_behind_replaced_ones_are_checked_against_arrays_that_another_writer_changed() -> None:
    repo = await new_repo()
    await chunked(repo)
    options: dict[str, Any] = {"dim": "time", "key": "time", "on_duplicate": "replace"}
    async with repo.appender("main", source="s", **options) as appender:
        await appender.put(plain(0, 4), offset=0, durable=True)
        session = await repo.writable_session_async("main")
        array = await zarr.api.asynchronous.create_array(
            store=session.store,
            name="v",
            shape=(4, 4),
            chunks=(2, 4),
            dtype="f8",
            dimension_names=("time", "x"),
            overwrite=True,
        )
        await array.setitem(Ellipsis, plain(0, 4)["v"])
        await session.commit_async("another dtype")
        assert await appender.put(plain(3, 3), offset=1) == "buffered"
    assert await values(repo) == list(range(6))


async def test_a_rolling_window_keeps_about_so_many_rows() -> None:
    repo = await new_repo()
    await chunked(repo)
    async with repo.appender("main", dim="time", source="s", keep=10) as appender:
        for n in range(0, 40, 2):
            await appender.put(plain(n, 2), offset=n, durable=True)
    found = await values(repo)
    assert found == list(range(found[0], 40))
    assert 10 <= len(found) < 14


async def test_rows_go_before_the_first() -> None:
    repo = await new_repo()
    await chunked(repo)
    async with repo.appender("main", dim="time", source="s") as appender:
        await appender.put(plain(100, 6), offset=1)
        await appender.prepend(plain(92, 8))
        with pytest.raises(InvalidInputError):
            await appender.prepend(plain(90, 2))
        await appender.put(plain(106, 3), offset=2)
    assert await values(repo) == [*range(92, 109)]


async def test_a_reset_branch_ends_the_appender() -> None:
    repo = await new_repo()
    root = await repo.lookup_branch_async("main")
    async with repo.appender("main", dim="time", source="s") as appender:
        await appender.put(rows(0), offset=0, durable=True)
        await repo.reset_branch_async("main", root)
        await appender.put(rows(1), offset=1)
        with pytest.raises(SessionStateError):
            await appender.flush()


async def test_rows_put_before_an_error_in_the_block_are_committed() -> None:
    repo = await new_repo()

    async def fail() -> None:
        async with repo.appender("main", dim="time", source="s") as appender:
            await appender.put(rows(0), offset=0)
            raise RuntimeError("of the service")

    with pytest.raises(RuntimeError):
        await fail()
    assert await stored(repo) == [0]


@pytest.mark.parametrize(
    "options",
    [{"every": 0}, {"max_rows": 0}, {"max_bytes": -1}, {"keep": 0}, {"on_duplicate": "x"}, {"key": "x"}, {"source": 1}],
)
async def test_settings_that_make_no_sense_are_refused(options: Any) -> None:
    repo = await new_repo()
    with pytest.raises(InvalidInputError):
        repo.appender("main", **{"dim": "time", "source": "s"} | options)


async def test_an_appender_that_is_not_open_raises() -> None:
    appender = (await new_repo()).appender("main", dim="time", source="s")
    with pytest.raises(SessionStateError):
        await appender.put(rows(0))


async def test_times_that_the_stored_units_cannot_hold_are_refused() -> None:
    repo = await new_repo()
    first = rows(0)
    first.time.encoding = {"units": "days since 1970-01-01", "dtype": "int64"}
    async with repo.appender("main", dim="time", source="s") as appender:
        await appender.put(first, offset=0)
        with pytest.raises(InvalidInputError):
            await appender.put(rows(1), offset=1)
        await appender.put(rows(24), offset=2)
    assert await stored(repo) == [0, 24]


async def test_a_record_of_another_source_survives_a_replacement_that_was_rebased(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repo = await new_repo()
    async with repo.appender("main", dim="time", source="b", group="other") as other:
        await other.put(rows(0), offset=10)
    replace_rows = Target.replace_rows

    async def overtaken(target: Target, *args: Any) -> Target:
        monkeypatch.undo()
        session = await repo.writable_session_async("main")
        found = await newest_sources(repo.async_ancestry(snapshot_id=session.snapshot_id), repo.ops_log_async)
        array = await zarr.api.asynchronous.open_array(store=session.store, path="other/v")
        await array.setitem(slice(0, 1), 7)
        await session.commit_async(
            "11", as_metadata(recorded(found, "b", offset=11, owner=str(found["b"]["owner"]), rows=1))
        )
        return await replace_rows(target, *args)

    async with repo.appender("main", dim="time", source="a", key="time", on_duplicate="replace") as appender:
        await appender.put(rows(0), offset=0, durable=True)
        monkeypatch.setattr(Target, "replace_rows", overtaken)
        await appender.put(rows(0), offset=1)
        assert appender.stats().rebased == 1
        await appender.put(rows(1), offset=2, durable=True)
    found = await newest_sources(repo.async_ancestry(branch="main"), repo.ops_log_async)
    assert {name: record["offset"] for name, record in found.items()} == {"a": 2, "b": 11}


async def test_chunks_and_codecs_of_a_first_dataset_are_those_of_its_encoding() -> None:
    repo = await new_repo()
    first = rows(0)
    first["v"].encoding = {"chunks": (6, 2), "compressors": [GzipCodec(level=1)]}
    first["time"].encoding = {"units": "hours since 2000-01-01", "dtype": "i8", "chunks": (1, 2, 3)}
    async with repo.appender("main", dim="time", source="s") as appender:
        for n in range(14):
            await appender.put(first if n == 0 else rows(n), offset=n, durable=True)
    assert await stored(repo) == list(range(14))
    reader = await repo.readonly_session_async("main")
    array = await zarr.api.asynchronous.open_array(store=reader.store, path="v")
    assert array.chunks == (6, 2)
    assert [type(codec).__name__ for codec in array.compressors] == ["GzipCodec"]


async def test_rows_go_into_shards() -> None:
    repo = await new_repo()
    first = rows(0, width=6)
    first["v"].encoding = {"chunks": (2, 3), "shards": (4, 6)}
    async with repo.appender("main", dim="time", source="s") as appender:
        for n in range(11):
            await appender.put(first if n == 0 else rows(n, width=6), offset=n, durable=True)
    assert await stored(repo) == list(range(11))


async def test_a_durable_put_right_after_another_asks_the_store_nothing() -> None:
    storage = RecordingStorage(icechunk.in_memory_storage())
    repo = await icechunk.Repository.create_async(storage)
    async with repo.appender("main", dim="time", source="s") as appender:
        await appender.put(rows(0), offset=0, durable=True)
        storage.requests.clear()
        for n in range(1, 4):
            await appender.put(rows(n), offset=n, durable=True)
        assert not [request for request in storage.requests if request.verb != "put" and request.key.startswith("log/")]
        session = await repo.writable_session_async("main")
        await (await zarr.api.asynchronous.open_array(store=session.store, path="v")).setitem((0, 0), 7)
        await session.commit_async("between")
        await appender.put(rows(4), offset=4, durable=True)
        assert appender.position == 4
    found = await repo.readonly_session_async("main")
    array = await zarr.api.asynchronous.open_array(store=found.store, path="v")
    assert np.asarray(await array.getitem(slice(None)))[:, 0].tolist() == [7, 1, 2, 3, 4]


@pytest.mark.parametrize("commits", [1, 40])
async def test_an_appender_knows_its_position_after_two_answers_of_the_store(commits: int) -> None:
    inner = icechunk.in_memory_storage()
    repo = await icechunk.Repository.create_async(inner)
    async with repo.appender("main", dim="time", source="s") as appender:
        for n in range(commits):
            await appender.put(rows(n), offset=n, durable=True)
    storage = RecordingStorage(inner)
    reopened = await icechunk.Repository.open_async(storage)
    storage.clear()
    async with reopened.appender("main", dim="time", source="s") as appender:
        assert appender.position == commits - 1
        assert storage.dependent_rounds() <= 2


@pytest.mark.parametrize("on_duplicate", ["error", "skip", "replace"])
async def test_labels_that_another_source_stored_meanwhile_are_dealt_with_as_asked(on_duplicate: Any) -> None:
    repo = await new_repo()
    await chunked(repo)
    other = await icechunk.Repository.open_async(repo.storage)
    options: dict[str, Any] = {"dim": "time", "key": "time"}
    appender = repo.appender("main", source="late", on_duplicate=on_duplicate, **options)
    await appender.__aenter__()
    late = plain(1, 5)
    late["v"] = late["v"] + 100
    await appender.put(late, offset=1)
    async with other.appender("main", source="first", **options) as first:
        await first.put(plain(0, 3), offset=1)
    if on_duplicate == "error":
        with pytest.raises(InvalidInputError):
            await appender.__aexit__()
        assert appender.stats().rows_buffered == 0
    else:
        await appender.flush()
        await appender.put(plain(6, 1), offset=2)
        await appender.__aexit__()
    found = await repo.readonly_session_async("main")
    array = await zarr.api.asynchronous.open_array(store=found.store, path="v")
    rows_there = np.asarray(await array.getitem(slice(None)))[:, 0].astype(int).tolist()
    expected = {
        "error": [0, 1, 2],
        "skip": [0, 1, 2, 103, 104, 105, 6],
        "replace": [0, 101, 102, 103, 104, 105, 6],
    }
    assert rows_there == expected[on_duplicate]


async def test_an_offset_counts_although_another_source_has_stored_all_its_rows() -> None:
    repo = await new_repo()
    await chunked(repo)
    other = await icechunk.Repository.open_async(repo.storage)
    options: dict[str, Any] = {"dim": "time", "key": "time", "on_duplicate": "skip"}
    async with repo.appender("main", source="late", **options) as appender:
        await appender.put(plain(0, 4), offset=7)
        async with other.appender("main", source="first", **options) as first:
            await first.put(plain(0, 4), offset=1)
    async with repo.appender("main", source="late", **options) as appender:
        assert appender.position == 7
    assert await values(repo) == [0, 1, 2, 3]
