"""Bad input of an appender: refused where it is given, nothing of it stored, nothing else lost."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr.api.asynchronous as azarr
from zarr.core.buffer import default_buffer_prototype

import icechunk
from icechunk.appender import Appender
from icechunk.errors import ErrorKind, InvalidInputError, SessionStateError
from tests.appender.test_appender import chunked, new_repo, plain, rows, stored, values
from tests.raising import raises


async def test_rows_whose_labels_another_source_stored_are_refused_once_and_all_others_are_stored() -> None:
    repo = await new_repo()
    await chunked(repo)
    other = await icechunk.Repository.open_async(repo.storage)
    async with repo.appender("main", dim="time", source="late", key="time") as appender:
        await appender.put(plain(1, 1), offset=1)
        await appender.put(plain(5, 1), offset=2)
        async with other.appender("main", dim="time", source="first", key="time") as first:
            await first.put(plain(0, 3), offset=1)
        with pytest.raises(InvalidInputError):
            await appender.flush()
        assert appender.stats().rows_buffered == 0
        assert appender.position == 2
        await appender.put(plain(6, 1), offset=3)
    assert await values(repo) == [0, 1, 2, 5, 6]


async def test_refused_rows_that_no_caller_waits_for_are_told_by_the_next_call() -> None:
    repo = await new_repo()
    await chunked(repo)
    other = await icechunk.Repository.open_async(repo.storage)
    async with repo.appender("main", dim="time", source="late", key="time", every=0.02) as appender:
        async with other.appender("main", dim="time", source="first", key="time") as first:
            await first.put(plain(0, 3), offset=1)
            await first.flush()
            await appender.put(plain(2, 1), offset=7)
        for _ in range(1000):
            if appender.stats().rows_buffered:
                await asyncio.sleep(0.01)
        with pytest.raises(InvalidInputError):
            await appender.put(plain(4, 1), offset=8)
        # The offset was refused, so rows may come with it again.
        assert await appender.put(plain(3, 1), offset=7) == "buffered"
    assert await values(repo) == [0, 1, 2, 3]


@pytest.mark.parametrize("change", ["added", "removed", "dtype", "row shape", "units"])
async def test_arrays_that_another_writer_changed_end_the_appender(change: str) -> None:
    repo = await new_repo()
    await chunked(repo)
    appender = repo.appender("main", dim="time", source="s")
    await appender.__aenter__()
    await appender.put(plain(0, 3), offset=0, durable=True)
    await appender.put(plain(3, 2), offset=1)
    session = await (await icechunk.Repository.open_async(repo.storage)).writable_session_async("main")
    options: dict[str, Any] = {"store": session.store, "chunks": (4,), "dtype": "f4", "dimension_names": ("time",)}
    if change == "added":
        await azarr.create_array(name="w", shape=(3,), **options)
    elif change == "units":
        time = await azarr.open_array(store=session.store, path="time", mode="r+")
        await time.update_attributes({"units": "days since 2000-01-01"})
    else:
        await session.store.delete_dir("v")
        if change != "removed":
            options |= {
                "dtype": "f8" if change == "dtype" else "f4",
                "chunks": (4, 4),
                "dimension_names": ("time", "x"),
            }
            await azarr.create_array(name="v", shape=(3, 4 if change == "dtype" else 5), **options)
    await session.commit_async("other arrays")
    with pytest.raises(SessionStateError):
        await appender.flush()
    with pytest.raises(SessionStateError):
        await appender.put(plain(5, 1), offset=2)
    await appender.__aexit__()
    assert appender.position == 0
    after = await repo.readonly_session_async("main")
    assert (await azarr.open_array(store=after.store, path="time")).shape == (3,)


@pytest.mark.parametrize("offsets", [[0, 1, 2], [None] * 3])
async def test_a_branch_that_is_reset_to_an_own_older_commit_ends_the_appender(offsets: list[int | None]) -> None:
    repo = await new_repo()
    await chunked(repo)
    other = await icechunk.Repository.open_async(repo.storage)
    async with repo.appender("main", dim="time", source="s") as appender:
        await appender.put(plain(0, 1), offset=offsets[0], durable=True)
        early = await other.lookup_branch_async("main")
        await appender.put(plain(1, 1), offset=offsets[1], durable=True)
        await other.reset_branch_async("main", early)
        await appender.put(plain(2, 1), offset=offsets[2])
        with pytest.raises(SessionStateError):
            await appender.flush()
    # Otherwise row 1 were missing, and the consumer would not know.
    assert await values(repo) == [0]


async def test_an_amended_commit_of_an_appender_keeps_its_position() -> None:
    repo = await new_repo()
    await chunked(repo)
    async with repo.appender("main", dim="time", source="s") as appender:
        await appender.put(plain(0, 1), offset=0, durable=True)
        await appender.put(plain(1, 1), offset=1)
    session = await repo.writable_session_async("main")
    await azarr.create_group(store=session.store, path="g")
    await session.amend_async("amended", metadata={"reviewed": True})
    newest = await anext(repo.async_ancestry(branch="main"))
    assert newest.metadata["reviewed"]
    async with repo.appender("main", dim="time", source="s") as appender:
        assert appender.position == 1


@pytest.mark.parametrize("difference", [None, "dtype", "units"])
async def test_of_two_first_datasets_the_second_must_fit_the_arrays_that_the_first_made(difference: str | None) -> None:
    repo = await new_repo()
    other = await icechunk.Repository.open_async(repo.storage)
    one = repo.appender("main", dim="time", source="a")
    two = other.appender("main", dim="time", source="b")
    await one.__aenter__()
    await two.__aenter__()
    await one.put(rows(0, 2), offset=0)
    second = rows(2, 2)
    if difference == "dtype":
        second["v"] = second.v.astype("f8")
    if difference == "units":
        second.time.encoding = {"units": "days since 1970-01-01", "dtype": np.dtype("f8")}
    await two.put(second, offset=0)
    await one.__aexit__()
    if difference is None:
        await two.__aexit__()
        assert await stored(repo) == [0, 1, 2, 3]
    else:
        with pytest.raises(SessionStateError):
            await two.__aexit__()
        assert await stored(repo) == [0, 1]


async def test_a_commit_that_fails_is_tried_again_after_growing_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    repo = await new_repo()
    await chunked(repo)
    async with repo.appender("main", dim="time", source="s", every=0.001) as appender:
        tries = 0
        third = asyncio.Event()

        async def failing() -> str | None:
            nonlocal tries
            tries += 1
            if tries == 3:
                third.set()
            raise OSError("no answer")

        with monkeypatch.context() as patched:
            patched.setattr(appender, "_commit", failing)
            await appender.put(plain(0, 1), offset=0)
            began = asyncio.get_running_loop().time()
            await third.wait()
            # Without pauses between them, thousands of tries fit into this time.
            assert asyncio.get_running_loop().time() - began >= 0.25
            assert tries == 3
    assert await values(repo) == [0]


async def test_only_rows_that_come_before_the_first_are_prepended() -> None:
    repo = await new_repo()
    async with repo.appender("main", dim="time", source="s") as appender:
        with pytest.raises(InvalidInputError):
            await appender.prepend(rows(0, 4))
    await chunked(repo)
    async with repo.appender("main", dim="time", source="s") as appender:
        await appender.put(plain(10, 4), offset=0)
        descending = {"time": np.array([3, 2, 1, 0]), "v": np.zeros((4, 4), "f4")}
        for wrong in (plain(8, 4), plain(20, 4), descending):
            with pytest.raises(InvalidInputError):
                await appender.prepend(wrong)
        await appender.prepend(plain(6, 4))
    assert await values(repo) == list(range(6, 14))


@pytest.mark.parametrize("label", [np.nan, np.datetime64("NaT", "ns"), np.timedelta64("NaT", "ns")])
async def test_labels_that_are_missing_are_refused(label: Any) -> None:
    def one(time: Any) -> xr.Dataset:
        return xr.Dataset({"v": ("time", [1.0])}, coords={"time": np.array([time])})

    repo = await new_repo()
    async with repo.appender("main", dim="time", source="s") as appender:
        with pytest.raises(InvalidInputError):
            await appender.put(one(label), offset=0)
        await appender.put(one(np.ones(1).astype(np.array(label).dtype)[0]), offset=0)
        with pytest.raises(InvalidInputError):
            await appender.put(one(label), offset=1)
        assert appender.stats().rows_buffered == 1


@pytest.mark.parametrize("offset", [b"x", 1.5, True, (1, 2), {"a": 1}, object(), 2**63, "\ud800"])
async def test_offsets_that_cannot_be_recorded_are_refused(offset: Any) -> None:
    repo = await new_repo()
    async with repo.appender("main", dim="time", source="s") as appender:
        with pytest.raises(InvalidInputError):
            await appender.put(rows(0), offset=offset)
        assert appender.stats().rows_buffered == 0
    with pytest.raises(InvalidInputError):
        repo.appender("main", dim="time", source="s", begin_at=offset)


async def test_integers_of_numpy_are_offsets() -> None:
    repo = await new_repo()
    async with repo.appender("main", dim="time", source="s") as appender:
        await appender.put(rows(0), offset=np.int64(3))
        await appender.put(rows(1), offset=4)
    async with repo.appender("main", dim="time", source="s") as appender:
        assert appender.position == 4


async def test_rows_are_refused_after_the_block() -> None:
    repo = await new_repo()
    async with repo.appender("main", dim="time", source="s") as appender:
        await appender.put(rows(0), offset=0)
    with pytest.raises(SessionStateError):
        await appender.put(rows(1), offset=1)
    with pytest.raises(SessionStateError):
        await appender.prepend(rows(1))
    assert await appender.flush() is None


async def test_of_puts_of_one_offset_at_the_same_time_one_is_accepted() -> None:
    repo = await new_repo()
    await chunked(repo)
    async with repo.appender("main", dim="time", source="s") as appender:
        await appender.put(plain(0, 1), offset=0)
    async with repo.appender("main", dim="time", source="s") as appender:
        found = await asyncio.gather(*(appender.put(plain(1 + n // 2, 1), offset=1 + n // 2) for n in range(6)))
    assert found == ["buffered", "skipped"] * 3
    assert await values(repo) == [0, 1, 2, 3]


async def test_a_durable_put_that_is_repeated_waits_for_the_commit_too() -> None:
    repo = await new_repo()
    async with repo.appender("main", dim="time", source="s", every=1000) as appender:
        await appender.put(rows(0), offset=0)
        assert await appender.put(rows(0), offset=0, durable=True) == "skipped"
        assert appender.position == 0


async def test_an_offset_counts_only_with_all_rows_that_came_with_it() -> None:
    repo = await new_repo()
    await chunked(repo)
    options: dict[str, Any] = {"dim": "time", "source": "s", "key": "time", "on_duplicate": "replace"}
    async with repo.appender("main", **options) as appender:
        await appender.put(plain(0, 3), offset=1)
    killed = repo.appender("main", every=1000, **options)
    await killed.__aenter__()
    # One row is replaced at once; two are buffered, and lost with the process.
    await killed.put(plain(2, 3), offset=2)
    async with repo.appender("main", **options) as appender:
        assert appender.position == 1
        await appender.put(plain(2, 3), offset=2)
    assert await values(repo) == [0, 1, 2, 3, 4]
    with pytest.raises(SessionStateError):
        await killed.__aexit__()


async def test_a_key_needs_its_variable() -> None:
    repo = await new_repo()
    async with repo.appender("main", dim="time", source="s", key="time") as appender:
        with pytest.raises(InvalidInputError):
            await appender.put(xr.Dataset({"v": ("time", [1.0])}), offset=0)


@pytest.mark.parametrize("data", [5, None, [1], {"time": [1], "v": [[1, 2], [3]]}, xr.DataArray([1.0], dims="time")])
async def test_data_of_another_kind_are_refused(data: Any) -> None:
    repo = await new_repo()
    await chunked(repo)
    async with repo.appender("main", dim="time", source="s") as appender:
        with pytest.raises(InvalidInputError):
            await appender.put(data, offset=1)
        assert appender.stats().rows_buffered == 0


async def test_a_first_dataset_that_is_refused_decides_nothing_about_the_arrays() -> None:
    repo = await new_repo()
    async with repo.appender("main", dim="time", source="s") as appender:
        with pytest.raises(InvalidInputError):
            await appender.put(rows(0, 3).isel(time=[2, 1, 0]).assign(extra=("time", np.ones(3))), offset=0)
        await appender.put(rows(0, 3), offset=0)
    assert await stored(repo) == [0, 1, 2]


async def test_a_mapping_may_have_times_where_the_array_has_units() -> None:
    repo = await new_repo()
    async with repo.appender("main", dim="time", source="s") as appender:
        await appender.put(rows(0, 1), offset=0)
        later = {"v": np.full((2, 4), [[1], [2]], "f4"), "time": np.array(["1970-01-01T01", "1970-01-01T02"], "M8[s]")}
        await appender.put(later, offset=1)
        await appender.put({"v": np.full(4, 3, "f4"), "time": np.datetime64("1970-01-01T03")}, offset=2)
        with pytest.raises(InvalidInputError):
            await appender.put(
                {"v": np.full(4, 4, "f4"), "time": np.datetime64("1970-01-01T04:00:00.5", "as")}, offset=3
            )
    assert await stored(repo) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["v", "time"])
@pytest.mark.parametrize("value", ["2026-01-01", np.array("a", "O"), object()])
async def test_texts_and_objects_are_refused_where_the_array_has_numbers(name: str, value: Any) -> None:
    repo = await new_repo()
    async with repo.appender("main", dim="time", source="s") as appender:
        await appender.put(rows(0, 1), offset=0)
        other = rows(1, 1)
        other = other.assign({name: (other[name].dims, np.full(other[name].shape, value))})
        with pytest.raises(InvalidInputError) as error:
            await appender.put(other, offset=1)
        assert error.value.kind == ErrorKind.INVALID_SETTING
        await appender.put(rows(1, 1), offset=1)
    assert await stored(repo) == [0, 1]


async def test_what_to_do_with_duplicates_needs_a_key() -> None:
    repo = await new_repo()
    for asked in ("skip", "replace"):
        with pytest.raises(InvalidInputError) as error:
            repo.appender("main", dim="time", source="s", on_duplicate=asked)
        assert error.value.kind == ErrorKind.INVALID_SETTING


async def test_an_appender_is_no_synchronous_context_manager() -> None:
    repo = await new_repo()
    with pytest.raises(TypeError), repo.appender("main", dim="time", source="s"):
        pass


async def test_a_mapping_may_repeat_a_fixed_time() -> None:
    repo = await new_repo()
    begin = np.datetime64("1969-12-31", "ns")
    async with repo.appender("main", dim="time", source="s") as appender:
        await appender.put(rows(0, 1).assign_coords(begin=begin), offset=0)
        row = {"v": np.full(4, 1, "f4"), "time": np.datetime64("1970-01-01T01")}
        with pytest.raises(InvalidInputError):
            await appender.put(row | {"begin": begin + np.timedelta64(1, "ns")}, offset=1)
        await appender.put(row | {"begin": begin}, offset=1)
    assert await stored(repo) == [0, 1]


async def test_masked_values_are_refused_since_arrays_have_no_mask() -> None:
    repo = await new_repo()
    await chunked(repo)
    data = plain(0, 1)
    async with repo.appender("main", dim="time", source="s") as appender:
        with pytest.raises(InvalidInputError) as caught:
            await appender.put(data | {"v": np.ma.masked_equal(data["v"], 0)})
        assert caught.value.kind == ErrorKind.INVALID_SETTING
        await appender.put(data | {"v": np.ma.masked_equal(data["v"], 7)})
    assert await values(repo) == [0]


async def test_arrays_whose_chunks_are_not_all_of_one_size_are_refused_at_opening() -> None:
    repo = await new_repo()
    await chunked(repo)
    session = await repo.writable_session_async("main")
    prototype = default_buffer_prototype()
    found = await session.store.get("v/zarr.json", prototype)
    assert found is not None
    document = json.loads(found.to_bytes())
    grid = {"name": "rectilinear", "configuration": {"kind": "inline", "chunk_shapes": [4, [1, 3]]}}
    changed = json.dumps(document | {"chunk_grid": grid}).encode()
    await session.store.set("v/zarr.json", prototype.buffer.from_bytes(changed))
    await session.commit_async("chunks of several sizes")
    with pytest.raises(InvalidInputError) as caught:
        async with repo.appender("main", dim="time", source="s"):
            pass
    assert caught.value.kind == ErrorKind.INVALID_SETTING


async def test_an_end_that_no_call_has_raised_is_raised_on_leaving() -> None:
    repo = await new_repo()
    await chunked(repo)
    with pytest.raises(SessionStateError) as ended:
        async with repo.appender("main", dim="time", source="s", every=0.02) as appender:
            await consumed_by_another(repo, appender)
    assert ended.value is appender._error


async def test_an_end_by_a_reset_that_no_call_has_raised_is_raised_on_leaving() -> None:
    repo = await new_repo()
    await chunked(repo)
    early = await repo.lookup_branch_async("main")
    appender = repo.appender("main", dim="time", source="s", every=0.02)
    await appender.__aenter__()
    await appender.put(plain(0, 1), offset=0, durable=True)
    await (await icechunk.Repository.open_async(repo.storage)).reset_branch_async("main", early)
    await appender.put(plain(1, 1), offset=1)
    await ended_alone(appender)
    with pytest.raises(SessionStateError):
        await appender.__aexit__()


async def test_the_exception_of_the_block_has_a_note_of_an_end_that_no_call_has_raised() -> None:
    repo = await new_repo()
    await chunked(repo)

    async def block() -> None:
        async with repo.appender("main", dim="time", source="s", every=0.02) as appender:
            await consumed_by_another(repo, appender)
            raise KeyError("of the block")

    with pytest.raises(KeyError) as raised:
        await block()
    assert any("source 's' has ended" in note for note in raised.value.__notes__)


async def test_an_end_that_a_call_has_raised_is_not_raised_again_on_leaving() -> None:
    repo = await new_repo()
    await chunked(repo)
    async with repo.appender("main", dim="time", source="s", every=0.02) as appender:
        await consumed_by_another(repo, appender)
        with pytest.raises(SessionStateError):
            await appender.put(plain(9, 1), offset=9)


async def consumed_by_another(repo: icechunk.Repository, appender: Appender) -> None:
    """Have an appender ended by its timer, since another consumer of its source commits."""
    other = await icechunk.Repository.open_async(repo.storage)
    async with other.appender("main", dim="time", source="s") as second:
        await second.put(plain(0, 1), offset=0)
    await appender.put(plain(0, 1), offset=0)
    await ended_alone(appender)


async def ended_alone(appender: Appender) -> None:
    for _ in range(1000):
        if appender._error is not None:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the appender has not ended")


async def test_each_refused_put_is_told_of_and_whether_the_rows_of_the_call_were_taken() -> None:
    repo = await new_repo()
    await chunked(repo)
    other = await icechunk.Repository.open_async(repo.storage)
    async with repo.appender("main", dim="time", source="late", key="time", every=0.02) as appender:
        async with other.appender("main", dim="time", source="first", key="time") as first:
            await first.put(plain(0, 3), offset=1)
            await first.flush()
            await appender.put(plain(1, 1), offset=7)
            await appender.put(plain(2, 1), offset=8)
        for _ in range(1000):
            if appender.stats().rows_buffered:
                await asyncio.sleep(0.01)
        with pytest.raises(InvalidInputError) as told:
            await appender.put(plain(4, 1), offset=9)
        assert "offset 7" in told.value.message
        assert "offset 8" in told.value.message
        assert "put them again" in told.value.message
        assert await appender.put(plain(4, 1), offset=9) == "buffered"
    assert await values(repo) == [0, 1, 2, 4]


async def test_rows_that_replace_stored_ones_are_committed_and_counted() -> None:
    repo = await new_repo()
    await chunked(repo)
    async with repo.appender("main", dim="time", source="s", key="time", on_duplicate="replace") as appender:
        await appender.put(plain(0, 4), offset=0, durable=True)
        assert await appender.put(plain(1, 2), offset=1, durable=True) == "committed"
        assert appender.stats().rows_committed == 6
        assert await appender.put(plain(1, 2), offset=2) == "committed"
        assert appender.position == 2
        assert await appender.put(plain(3, 2), offset=3) == "buffered"
        assert appender.stats().rows_committed == 9
        assert await appender.put(plain(1, 2), offset=3) == "skipped"
    assert appender.stats().rows_committed == 10


async def test_rows_that_replace_those_of_another_writer_are_counted() -> None:
    repo = await new_repo()
    await chunked(repo)
    other = await icechunk.Repository.open_async(repo.storage)
    async with repo.appender("main", dim="time", source="s", key="time", on_duplicate="replace") as appender:
        await appender.put(plain(0, 4), offset=0)
        async with other.appender("main", dim="time", source="first", key="time") as first:
            await first.put(plain(0, 3), offset=1)
        await appender.flush()
        assert appender.stats().rows_committed == 4


async def test_an_empty_name_of_a_source_is_refused() -> None:
    with pytest.raises(InvalidInputError):
        (await new_repo()).appender("main", dim="time", source="")


async def test_the_errors_of_text_offsets_say_how_they_are_compared() -> None:
    repo = await new_repo()
    await chunked(repo)
    async with repo.appender("main", dim="time", source="s") as appender:
        await appender.put(plain(0, 1), offset="9")
        with raises(InvalidInputError, ErrorKind.INVALID_SETTING, "characters"):
            await appender.put(plain(1, 1), offset="10")
        with raises(InvalidInputError, ErrorKind.INVALID_SETTING, "texts"):
            await appender.put(plain(1, 1), offset=10)
