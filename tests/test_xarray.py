"""`icechunk.xarray.to_icechunk`: what xarray writes through it is what xarray reads back."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import xarray as xr

import icechunk
from icechunk import Repository, Session
from icechunk.xarray import to_icechunk
from tests.raising import raises


@pytest.fixture
def repo() -> Repository:
    return Repository.create(icechunk.in_memory_storage())


@pytest.fixture
def session(repo: Repository) -> Session:
    return repo.writable_session("main")


def read(session: Session, group: str | None = None, **kwargs: Any) -> xr.Dataset:
    found: xr.Dataset = xr.open_zarr(session.store, group=group, consolidated=False, chunks=None, **kwargs).load()
    return found


def table(start: int = 0, n: int = 6) -> xr.Dataset:
    x = np.arange(start, start + n)
    return xr.Dataset(
        {"a": (("x", "y"), np.arange(start * 3.0, (start + n) * 3.0).reshape(n, 3)), "b": ("x", x * 2)},
        coords={"x": x, "y": [10, 20, 30]},
        attrs={"title": "a table"},
    )


def test_a_dataset_comes_back_identical_from_the_session_and_from_the_commit(repo: Repository) -> None:
    session = repo.writable_session("main")
    to_icechunk(table(), session)
    xr.testing.assert_identical(read(session), table())
    session.commit("table")
    xr.testing.assert_identical(read(repo.readonly_session("main")), table())


def test_nothing_is_visible_to_others_before_the_commit(repo: Repository) -> None:
    to_icechunk(table(), repo.writable_session("main"))
    with pytest.raises(FileNotFoundError):
        read(repo.readonly_session("main"))


def test_a_dataset_lands_in_a_nested_group_with_its_parents(session: Session) -> None:
    to_icechunk(table(), session, group="models/north")
    xr.testing.assert_identical(read(session, "models/north"), table())


@pytest.mark.parametrize("name", [None, "b", "x"])
def test_a_data_array_comes_back_under_the_name_that_to_zarr_gives_it(session: Session, name: str | None) -> None:
    array = table()["b"].rename(name)
    to_icechunk(array, session)
    stored = read(session)
    (variable,) = stored.data_vars
    assert variable == ("b" if name == "b" else "__xarray_dataarray_variable__")
    np.testing.assert_array_equal(stored[variable].values, array.values)


def test_append_extends_the_arrays_along_the_dimension(repo: Repository) -> None:
    session = repo.writable_session("main")
    to_icechunk(table(), session, encoding={"a": {"chunks": (4, 3)}})
    session.commit("first")
    session = repo.writable_session("main")
    to_icechunk(table(6), session, append_dim="x")
    session.commit("second")
    xr.testing.assert_identical(read(repo.readonly_session("main")), table(0, 12))


def test_append_along_an_unknown_dimension_is_refused(session: Session) -> None:
    to_icechunk(table(), session)
    with pytest.raises(ValueError, match=re.escape("append_dim")):
        to_icechunk(table(6), session, append_dim="depth")


def test_a_region_changes_its_slice_only(session: Session) -> None:
    to_icechunk(table(), session)
    patch = table().isel(x=slice(2, 4)) * 10
    to_icechunk(patch.drop_vars(["x", "y"]), session, region={"x": slice(2, 4)})
    expected = table()
    expected["a"][2:4] *= 10
    expected["b"][2:4] *= 10
    xr.testing.assert_equal(read(session), expected)


def test_an_automatic_region_is_found_from_the_coordinates(session: Session) -> None:
    to_icechunk(table(), session)
    patch = (table().isel(x=slice(1, 3)) + 100).drop_vars("y")
    to_icechunk(patch, session, region={"x": "auto"})
    np.testing.assert_array_equal(read(session)["b"].values, [0, 102, 104, 6, 8, 10])


@pytest.mark.parametrize("mode", [None, "w-"])
def test_a_group_that_holds_data_is_not_overwritten_unasked(session: Session, mode: Any) -> None:
    to_icechunk(table(), session)
    with pytest.raises(FileExistsError):
        to_icechunk(table(1), session, mode=mode)
    xr.testing.assert_identical(read(session), table())


def test_mode_w_replaces_the_group(session: Session) -> None:
    to_icechunk(table(), session)
    other = xr.Dataset({"c": ("z", np.arange(3))})
    to_icechunk(other, session, mode="w")
    xr.testing.assert_identical(read(session), other)


def test_mode_a_adds_and_replaces_variables(session: Session) -> None:
    to_icechunk(table(), session)
    to_icechunk(xr.Dataset({"c": ("x", np.arange(6.0))}), session, mode="a")
    assert set(read(session).data_vars) == {"a", "b", "c"}


@pytest.mark.parametrize("mode", ["r", "q"])
def test_an_unusable_mode_is_refused(session: Session, mode: Any) -> None:
    with pytest.raises(ValueError, match=re.escape("mode=")):
        to_icechunk(table(), session, mode=mode)


def test_encodings_decide_chunks_and_stored_dtype(session: Session) -> None:
    import zarr

    encoding = {"a": {"chunks": (2, 3), "dtype": "int16", "scale_factor": 0.5, "_FillValue": -1}}
    to_icechunk(table(), session, encoding=encoding)
    array = zarr.open_group(session.store, mode="r")["a"]
    assert isinstance(array, zarr.Array)
    assert array.chunks == (2, 3)
    assert array.dtype == np.dtype("int16")
    np.testing.assert_array_equal(read(session)["a"].values, table()["a"].values)


def test_a_read_only_session_is_refused_with_the_remedy(repo: Repository) -> None:
    with raises(icechunk.ReadOnlyError, "read-only-session", "writable_session"):
        to_icechunk(table(), repo.readonly_session("main"))


def test_something_that_is_no_xarray_object_is_refused(session: Session) -> None:
    with pytest.raises(TypeError, match=re.escape("ndarray")):
        to_icechunk(np.arange(3), session)  # type: ignore[arg-type]


def test_dask_arrays_are_written_from_many_threads(session: Session) -> None:
    pytest.importorskip("dask")
    big = xr.Dataset({"a": (("x", "y"), np.random.default_rng(0).random((64, 64)))})
    to_icechunk(big.chunk(x=8, y=8), session)
    xr.testing.assert_identical(read(session), big)


@pytest.mark.parametrize("name", ["A1B_north_america.nc", "ostia_monthly.nc", "hybrid_height.nc", "SOI_Darwin.nc"])
def test_real_data_comes_back_bit_for_bit(session: Session, name: str) -> None:
    iris_sample_data = pytest.importorskip("iris_sample_data", reason="the data of the demo extra")
    pytest.importorskip("netCDF4", reason="reads the data of the demo extra")
    with xr.open_dataset(f"{iris_sample_data.path}/{name}", engine="netcdf4", decode_times=False) as source:
        ds = source.load()
    to_icechunk(ds, session)
    stored = read(session, decode_times=False)
    assert set(stored.variables) == set(ds.variables)
    for variable in ds.variables:
        assert stored[variable].dtype == ds[variable].dtype
        assert stored[variable].values.tobytes() == ds[variable].values.tobytes()
        assert stored[variable].attrs == ds[variable].attrs
