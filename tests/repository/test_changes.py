"""Changed places of data: chunks, boxes, slices and labels; blame; coverage."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import icechunk
from icechunk.errors import ErrorKind, InvalidInputError, NodeNotFoundError
from icechunk.format.transaction import in_parts
from icechunk.repository.changes import boxes_of
from icechunk.session import commit as commit_files
from icechunk.testing.recording import RecordingStorage
from icechunk.xarray import to_icechunk

VERSIONS = pytest.mark.parametrize("spec_version", [None, 2, 1])


def repository(spec_version: int | None) -> tuple[icechunk.Repository, list[str]]:
    """An array of 4 × 3 chunks: written whole but for one chunk, then a corner, then appended to."""
    repo = icechunk.Repository.create(icechunk.in_memory_storage(), spec_version=spec_version)
    ids = []
    with repo.transaction("main", message="all") as store:
        array = zarr.create_array(
            store, name="g/a", shape=(8, 6), chunks=(2, 2), dtype="i4", dimension_names=("y", "x"), fill_value=0
        )
        array[:] = 1
        array[2:4, 2:4] = 0
    ids.append(repo.lookup_branch("main"))
    with repo.transaction("main", message="corner") as store:
        zarr.open_array(store, path="g/a")[0:4, 0:2] = 2
    ids.append(repo.lookup_branch("main"))
    with repo.transaction("main", message="append") as store:
        array = zarr.open_array(store, path="g/a")
        array.resize((9, 6))
        array[8] = 3
    ids.append(repo.lookup_branch("main"))
    return repo, ids


@VERSIONS
def test_changes_name_boxes_and_slices(spec_version: int | None) -> None:
    repo, ids = repository(spec_version)
    change = repo.changes(ids[0], ids[1]).arrays["/g/a"]
    assert change.chunks.tolist() == [[0, 0], [1, 0]]
    assert change.boxes == [(slice(0, 2), slice(0, 1))]
    assert change.slices == [(slice(0, 4), slice(0, 2))]
    assert change.indexers == [{"y": slice(0, 4), "x": slice(0, 2)}]
    assert not change.metadata_changed
    assert not change.is_new
    both = repo.changes(ids[0])
    assert both.until == ids[2]
    assert both.arrays["/g/a"].metadata_changed
    assert both.arrays["/g/a"].slices == [(slice(0, 4), slice(0, 2)), (slice(8, 9), slice(0, 6))]
    first = next(iter(repo.ancestry(snapshot_id=ids[0]))).parent_id
    assert first is not None
    assert repo.changes(first).arrays["/g/a"].is_new
    with pytest.raises(InvalidInputError) as caught:
        repo.changes(ids[1], ids[0])
    assert caught.value.kind == ErrorKind.BAD_SNAPSHOT_CHAIN_FOR_DIFF


def test_deleted_and_moved_nodes_are_named() -> None:
    repo, ids = repository(None)
    session = repo.rearrange_session("main")
    session.move("/g/a", "/b")
    session.commit("move")
    with repo.transaction("main", message="delete") as store:
        zarr.open_group(store).__delitem__("g")
    changes = repo.changes(ids[2])
    assert changes.moved == (("/g/a", "/b"),)
    assert changes.deleted == ("/g",)


def test_labels_are_those_of_the_coordinates() -> None:
    repo = icechunk.Repository.create(icechunk.in_memory_storage())
    ds = xr.Dataset({"t": (("time", "x"), np.zeros((6, 4)))}, coords={"time": [10, 20, 30, 40, 50, 60]})
    with repo.transaction("main", message="a") as store:
        to_icechunk(ds, store.session, encoding={"t": {"chunks": (2, 4)}})
    start = repo.lookup_branch("main")
    with repo.transaction("main", message="b") as store:
        zarr.open_array(store, path="t")[2:4] = 1
    changes = repo.changes(start)
    assert repo.changed_labels(changes, "t") == [{"time": slice(30, 40)}]
    opened = xr.open_zarr(repo.readonly_session("main").store, consolidated=False)
    (labels,) = repo.changed_labels(changes, "/t")
    assert float(opened.t.sel(labels).min()) == 1
    with pytest.raises(NodeNotFoundError):
        repo.changed_labels(changes, "time")


@pytest.mark.parametrize(
    ("labels", "encoding"),
    [
        (np.arange("2026-01-01", "2026-01-07", dtype="M8[D]").astype("M8[ns]"), {}),
        (np.arange("2026-01-01", "2026-01-07", dtype="M8[D]").astype("M8[ns]"), {"units": "hours since 2000-01-01"}),
        (np.arange(6) * 0.5 + 7, {"scale_factor": 0.5, "add_offset": 7.0, "dtype": "i2", "_FillValue": -1}),
        (xr.date_range("2026-02-25", periods=6, calendar="360_day", use_cftime=True), {}),
        (np.array(list("abcdef"), object), {}),
    ],
    ids=["times", "hours", "packed", "other calendar", "texts"],
)
def test_labels_are_decoded_as_xarray_decodes_them(labels: Any, encoding: dict[str, Any]) -> None:
    repo = icechunk.Repository.create(icechunk.in_memory_storage())
    ds = xr.Dataset({"t": (("time", "x"), np.zeros((6, 4)))}, coords={"time": labels})
    with repo.transaction("main", message="a") as store:
        to_icechunk(ds, store.session, encoding={"t": {"chunks": (2, 4)}, "time": encoding})
    start = repo.lookup_branch("main")
    with repo.transaction("main", message="b") as store:
        zarr.open_array(store, path="t")[2:4] = 1
    opened = xr.open_zarr(repo.readonly_session("main").store, consolidated=False)
    (found,) = repo.changed_labels(repo.changes(start), "t")
    assert opened.t.sel(found).values.tolist() == [[1.0] * 4] * 2


@VERSIONS
def test_blame_names_the_last_writer_of_each_chunk(spec_version: int | None) -> None:
    repo, ids = repository(spec_version)
    blame = repo.blame("g/a")
    assert blame.index.shape == (5, 3)
    assert [[blame[y, x] for x in range(3)] for y in range(5)] == [
        [ids[1], ids[0], ids[0]],
        [ids[1], None, ids[0]],
        [ids[0]] * 3,
        [ids[0]] * 3,
        [ids[2]] * 3,
    ]
    part = repo.blame("/g/a", (slice(1, 3), 0), snapshot_id=ids[0])
    assert part.origin == (1, 0)
    assert (part[1, 0], part[2, 0]) == (ids[0], ids[0])
    with pytest.raises(InvalidInputError):
        repo.blame("g/a", (slice(None),))
    with pytest.raises(NodeNotFoundError):
        repo.blame("g")


@pytest.mark.parametrize(
    "region",
    [
        (slice(9, 12), slice(None)),
        (slice(-9, -7), slice(None)),
        (slice(3, 1), slice(None)),
        (5, 0),
        (-6, 0),
        (slice(0, 4, 2), 0),
        (0.5, 0),
        ("a", 0),
        (slice("a", "b"), 0),
        (None, 0),
        (..., 0),
        ...,
        {"y": 0, "x": 1},
        "ab",
        5,
    ],
)
def test_a_region_outside_of_the_grid_or_of_another_type_is_refused(region: Any) -> None:
    repo, _ = repository(None)
    with pytest.raises(InvalidInputError) as error:
        repo.blame("g/a", region)
    assert error.value.kind == ErrorKind.INVALID_SETTING


def test_a_region_is_of_chunks_and_counts_as_numpy_does() -> None:
    repo, _ = repository(None)
    assert repo.blame("g/a", (-1, slice(1, 1))).index.shape == (1, 0)
    assert repo.blame("g/a", [-1, 2]).origin == (4, 2)
    assert repo.blame("g/a", (slice(3, 99), 0)).index.shape == (2, 1)


@VERSIONS
def test_changes_since_the_beginning_are_whole_after_an_expiration(spec_version: int | None) -> None:
    repo, ids = repository(spec_version)
    first = [info.id for info in repo.ancestry(branch="main")][-1]
    with repo.transaction("main", message="others") as store:
        zarr.create_array(store, name="scalar", shape=(), dtype="i4")[...] = 1
        zarr.create_array(store, name="empty", shape=(3,), chunks=(1,), dtype="i4")
    with repo.transaction("main", message="more") as store:
        zarr.open_array(store, path="g/a")[8] = 4
    repo.expire_snapshots(datetime.now(UTC) + timedelta(days=1))
    assert repo.lookup_snapshot(repo.lookup_branch("main")).parent_id == first
    again = icechunk.Repository.open(repo.storage)
    changes = again.changes(first)
    assert {path: (one.is_new, len(one.chunks)) for path, one in changes.arrays.items()} == {
        "/empty": (True, 0),
        "/g/a": (True, 14 if spec_version == 1 else 15),
        "/scalar": (True, 1),
    }
    assert ids[0] not in {info.id for info in again.ancestry(branch="main")}


@VERSIONS
def test_changes_of_one_commit_read_no_other_commits(spec_version: int | None) -> None:
    storage = RecordingStorage(icechunk.in_memory_storage())
    repo = icechunk.Repository.create(storage, spec_version=spec_version)
    for i in range(30):
        with repo.transaction("main", message=f"{i}") as store:
            zarr.create_group(store, path=f"g{i}")
    tip = repo.lookup_snapshot(repo.lookup_branch("main"))
    assert tip.parent_id is not None
    again = icechunk.Repository.open(storage)
    storage.requests.clear()
    assert not again.changes(tip.parent_id, tip.id).arrays
    assert len(storage.requests) < 10


def test_changes_refuse_names_of_branches() -> None:
    repo, ids = repository(None)
    for since, until in (("main", None), (ids[0], "main"), (5, None)):
        with pytest.raises(InvalidInputError) as error:
            repo.changes(since, until)  # type: ignore[arg-type]  # that is the point
        assert error.value.kind == ErrorKind.INVALID_SNAPSHOT_ID


def test_blame_reads_all_parts_of_the_commit_that_created_the_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_files, "in_parts", partial(in_parts, max_chunks=3))
    repo, ids = repository(2)
    with repo.transaction("main", message="most") as store:
        zarr.open_array(store, path="g/a")[4:] = 7
    last = repo.lookup_branch("main")
    blame = repo.blame("g/a")
    assert [[blame[y, x] for x in range(3)] for y in range(5)] == [
        [ids[1], ids[0], ids[0]],
        [ids[1], None, ids[0]],
        [last] * 3,
        [last] * 3,
        [last] * 3,
    ]
    assert blame.snapshots == (last, ids[1], ids[0])


@pytest.mark.thorough
@settings(max_examples=15)
@given(st.data())
def test_blame_is_that_of_a_model(data: st.DataObject) -> None:
    repo = icechunk.Repository.create(icechunk.in_memory_storage())
    expected = np.full((4, 3), None, object)
    places = st.tuples(st.integers(0, 3), st.integers(0, 2))
    for number in range(data.draw(st.integers(1, 40))):
        session = repo.writable_session("main")
        if not number:
            zarr.create_array(session.store, name="a", shape=(4, 3), chunks=(1, 1), dtype="i1", fill_value=0)
        array = zarr.open_array(session.store, path="a")
        cells = data.draw(st.sets(places, max_size=3))
        for y, x in cells:
            array[y, x] = number + 1
        made = session.commit("cells", allow_empty=True)
        for cell in cells:
            expected[cell] = made
    blame = repo.blame("a")
    assert [[blame[y, x] for x in range(3)] for y in range(4)] == expected.tolist()
    order = [info.id for info in repo.ancestry(branch="main")]
    assert list(blame.snapshots) == [id for id in order if id in set(expected[expected != None])]  # noqa: E711
    part = repo.blame("a", (slice(1, 3), 2))
    assert [part[y, 2] for y in (1, 2)] == expected[1:3, 2].tolist()


@VERSIONS
def test_coverage_shows_the_chunks_that_exist(spec_version: int | None) -> None:
    repo, ids = repository(spec_version)
    expected = np.ones((5, 3), bool)
    expected[1, 1] = False
    np.testing.assert_array_equal(repo.coverage("g/a"), expected)
    np.testing.assert_array_equal(repo.coverage("g/a", snapshot_id=ids[0]), expected[:4])
    with repo.transaction("main", message="none") as store:
        zarr.create_array(store, name="empty", shape=(4,), chunks=(2,), dtype="i1")
        zarr.create_array(store, name="scalar", shape=(), dtype="i1")[...] = 5
    assert not repo.coverage("empty").any()
    assert repo.coverage("scalar").all()


@given(
    st.integers(1, 3).flatmap(
        lambda rank: st.lists(st.tuples(*[st.integers(0, 4)] * rank), unique=True, min_size=1, max_size=60)
    )
)
def test_boxes_are_disjoint_and_cover_the_coordinates(cells: list[tuple[int, ...]]) -> None:
    boxes = boxes_of(np.array(sorted(cells), np.uint32))
    found = [
        tuple(c + a for c, (a, _) in zip(cell, box, strict=True))
        for box in boxes
        for cell in np.ndindex(*(b - a for a, b in box))
    ]
    assert len(found) == len(set(found))
    assert set(found) == set(cells)
