"""The short ways to stored bytes give the bytes of xarray and zarr; of zstd, a frame of the same bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
import zarr.api.asynchronous as azarr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from xarray.conventions import encode_cf_variable
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, TransposeCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import MemoryStore

from icechunk.appender.chunk_encoding import Block, ChunkEncoder, Unfit, encode, shown_label, stored_values, whole_units
from icechunk.runtime.zstd import zstd

HOUR_NS = 3_600_000_000_000
COMPRESSORS: list[Any] = [
    [],
    [ZstdCodec(level=3)],
    [BloscCodec(cname="lz4", typesize=4)],
    [ZstdCodec(), Crc32cCodec()],
]


@settings(max_examples=60)
@given(
    data=st.data(),
    shape=hnp.array_shapes(min_dims=1, max_dims=3, max_side=7),
    dtype=st.sampled_from(["u1", "<i4", ">f4", "f8", "c8", "M8[s]", "bool"]),
    compressors=st.sampled_from(COMPRESSORS),
    transposed=st.booleans(),
    empty=st.booleans(),
)
async def test_chunks_equal_those_that_zarr_writes(
    data: st.DataObject, shape: tuple[int, ...], dtype: str, compressors: Any, transposed: bool, empty: bool
) -> None:
    chunks = tuple(data.draw(st.integers(1, n + 1)) for n in shape)
    values = data.draw(hnp.arrays(np.dtype(dtype), shape))
    if empty:
        values[...] = np.zeros(1, dtype)[0]
    store: dict[str, Any] = {}
    array = await azarr.create_array(
        store=MemoryStore(store),
        name="a",
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        compressors=compressors,
        serializer=BytesCodec(),
        filters=[TransposeCodec(order=tuple(reversed(range(len(shape)))))] if transposed else None,
    )
    meta = array.metadata
    assert isinstance(meta, ArrayV3Metadata)
    encoder = ChunkEncoder.of(meta)
    assert encoder is not None
    block = Block("a", encoder, values, (0,) * len(shape))
    ours = {f"a/{meta.encode_chunk_key(at)}": chunk for _, at, chunk in encode([block])}
    await array.setitem(Ellipsis, values)
    theirs = {key: chunk for key, chunk in store.items() if key != "a/zarr.json" and not key.endswith("zarr.json")}
    stored = {key: chunk for key, chunk in ours.items() if chunk is not None}
    assert stored.keys() == theirs.keys()
    if not isinstance(meta.codecs[-1], ZstdCodec):
        assert {k: bytes(chunk) for k, chunk in stored.items()} == {k: c.to_bytes() for k, c in theirs.items()}
    # zarr may have another version of zstd than the encoder, which gives other bytes.
    store |= {key: default_buffer_prototype().buffer.from_bytes(bytes(chunk)) for key, chunk in stored.items()}
    np.testing.assert_array_equal(np.asarray(await array.getitem(Ellipsis)), values)


@pytest.mark.parametrize(("number", "row_bytes"), [(1, 8192), (7, 8192), (8, 8192), (300, 8192), (20, 512)])
async def test_any_number_of_chunks_is_compressed_in_their_order(number: int, row_bytes: int) -> None:
    array = await azarr.create_array(
        store=MemoryStore(), name="a", shape=(number, row_bytes // 4), chunks=(1, row_bytes // 4), dtype="i4"
    )
    assert isinstance(array.metadata, ArrayV3Metadata)
    encoder = ChunkEncoder.of(array.metadata)
    assert encoder is not None
    values = np.arange(number * row_bytes // 4, dtype="i4").reshape(number, -1)
    values[number // 2] = 0
    found = list(encode([Block("a", encoder, values, (0, 0))]))
    assert [chunk.coords for chunk in found] == [(i, 0) for i in range(number)]
    assert [i for i, chunk in enumerate(found) if chunk.data is None] == [number // 2]
    for chunk, row in zip(found, values, strict=True):
        if chunk.data is not None:
            assert zstd.ZstdDecompressor().decompress(bytes(chunk.data)) == row.tobytes()


async def test_texts_are_left_to_zarr() -> None:
    array = await azarr.create_array(store={}, name="a", shape=(3,), chunks=(2,), dtype=str)
    assert isinstance(array.metadata, ArrayV3Metadata)
    assert ChunkEncoder.of(array.metadata) is None


UNIT_S = {"days": 86400, "hours": 3600, "seconds": 1}


@settings(max_examples=100)
@example(hours=[-562048, 2_000_000], resolution="s", units="seconds", since="1850-06-15T00:30:00", calendar=None)
@example(hours=[2_000_000] * 12, resolution="ns", units="seconds", since="1850-06-15T00:30:00", calendar=None)
@given(
    hours=st.lists(st.integers(-2_000_000, 2_000_000), min_size=1, max_size=12),
    resolution=st.sampled_from(["s", "ms", "ns"]),
    units=st.sampled_from(list(UNIT_S)),
    since=st.sampled_from(["1970-01-01", "2000-01-01 12:00:00", "1850-06-15T00:30:00"]),
    calendar=st.sampled_from([None, "standard", "proleptic_gregorian"]),
)
def test_times_are_kept_in_whole_units_or_refused(
    hours: list[int], resolution: str, units: str, since: str, calendar: str | None
) -> None:
    times = np.array(hours, "M8[h]").astype(f"M8[{resolution}]")
    attributes = {"units": f"{units} since {since}"} | ({} if calendar is None else {"calendar": calendar})
    since_s = int(np.datetime64(since.replace(" ", "T"), "s").astype(int))
    exact = [divmod(hour * 3600 - since_s, UNIT_S[units]) for hour in hours]
    if any(rest for _, rest in exact):
        with pytest.raises(Unfit):
            stored_values("time", xr.Variable(("time",), times), attributes, np.dtype("i8"))
    else:
        found = stored_values("time", xr.Variable(("time",), times), attributes, np.dtype("i8"))
        assert found.tolist() == [number for number, _ in exact]


@given(
    passed=st.lists(
        st.one_of(
            st.just(-(2**63)), st.integers(-(2**63), 2**63 - 1), st.integers(-200, 200).map(lambda h: h * HOUR_NS)
        ),
        min_size=1,
        max_size=8,
    ),
    units=st.sampled_from(["nanoseconds since 1750-01-01", "hours since 1970-01-01", "hours since 2190-01-01"]),
)
def test_few_times_are_kept_as_many_are(passed: list[int], units: str) -> None:
    few = np.array(passed, "i8").view("M8[ns]")
    expected = whole_units(np.tile(few, 9), {"units": units})
    for shape in ((-1,), (-1, 1)):
        found = whole_units(few.reshape(shape), {"units": units})
        if expected is None:
            assert found is None
        else:
            assert found is not None
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected[: len(few)].reshape(shape))


@pytest.mark.parametrize(
    ("units", "times"),
    [
        ("nanoseconds since 1750-01-01", ["2200-01-01"]),
        ("nanoseconds since 2200-01-01", ["1750-01-01"]),
        ("days since 1850-06-15T00:30:00", ["1905-11-19T08", "2198-02-28T08"]),
    ],
)
def test_times_too_far_from_their_units_are_refused(units: str, times: list[str]) -> None:
    variable = xr.Variable(("time",), np.array(times, "M8[ns]"))
    with pytest.raises(Unfit):
        stored_values("time", variable, {"units": units}, np.dtype("i8"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("units", ["hours since 1200-01-01", "hours since 2000-01-01", "days since 2000-01-01 +01:00"])
@pytest.mark.parametrize("calendar", ["standard", "noleap"])
def test_other_times_are_left_to_xarray(units: str, calendar: str) -> None:
    times = np.array(["2001-01-01", "2001-01-02T05"], "M8[ns]")
    attributes = {"units": units, "calendar": calendar}
    variable = xr.Variable(("time",), times, {}, attributes | {"dtype": np.dtype("i8")})
    expected: Any = encode_cf_variable(variable, name="time")
    if expected.attrs["units"] != units:
        with pytest.raises(Unfit):
            stored_values("time", xr.Variable(("time",), times), attributes, np.dtype("i8"))
    else:
        found = stored_values("time", xr.Variable(("time",), times), attributes, np.dtype("i8"))
        np.testing.assert_array_equal(found, expected.values)


def test_scaled_values_are_packed_as_xarray_packs_them() -> None:
    values = xr.Variable(("x",), np.array([1.5, np.nan, 3.0]))
    attributes = {"scale_factor": 0.5, "add_offset": 1.0, "_FillValue": -1}
    np.testing.assert_array_equal(stored_values("v", values, attributes, np.dtype("i2")), [1, -1, 4])


def test_an_array_of_today_can_be_encoded_without_zarr() -> None:
    array = zarr.create_array(store={}, name="a", shape=(4,), chunks=(2,), dtype="f4")
    assert isinstance(array.metadata, ArrayV3Metadata)
    assert ChunkEncoder.of(array.metadata) is not None


def test_an_absent_time_that_xarray_could_not_read_back_is_refused() -> None:
    times = xr.Variable(("time",), np.array(["2001-01-01", "NaT"], "M8[ns]"))
    with pytest.raises(Unfit):
        stored_values("time", times, {"units": "hours since 2000-01-01", "calendar": "noleap"}, np.dtype("i8"))


def test_labels_are_shown_as_times_where_their_units_are_known() -> None:
    units = {"units": "nanoseconds since 1970-01-01"}
    assert shown_label(np.int64(1767225602000000000), units) == "2026-01-01T00:00:02"
    assert shown_label(np.int64(36), {"units": "hours since 2000-01-01"}) == "2000-01-02T12:00"
    assert shown_label(np.int64(2**62), {"units": "days since 2000-01-01"}) == str(2**62)
    assert shown_label(np.int64(7), {"units": "days since 2000-01-01", "calendar": "noleap"}) == "7"
    assert shown_label(np.float32(0.5), {}) == "0.5"
    assert shown_label(np.str_("a"), {}) == "'a'"
    assert shown_label(np.datetime64("2026-01-01"), {}) == "2026-01-01"
