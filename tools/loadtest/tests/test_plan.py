"""The command line's sizes, sweeps and names become cases, or are refused with the reason."""

from __future__ import annotations

import pytest

from icechunk_loadtest.errors import LoadTestError
from icechunk_loadtest.plan import SYSTEMS, WORKLOADS, cases, parse_size, parse_sweep, pick, points
from icechunk_loadtest.worker.workloads import WORKLOADS as WORK
from tools.loadtest.tests.raising import raises


@pytest.mark.parametrize(
    ("text", "size"), [("16KiB", 16384), ("4 MiB", 4 << 20), ("500", 500), ("1k", 1024), ("2GB", 2 << 30)]
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "KiB", "a lot", "inf", "1e400"])
def test_text_that_is_no_size_is_refused(text: str) -> None:
    with raises(LoadTestError, repr(text)):
        parse_size(text)


def test_sweeps_are_sorted_and_have_usual_values() -> None:
    assert parse_sweep("concurrency=16,1,4,4").values == (1, 4, 16)
    assert parse_sweep("chunk-size=1MiB,4KiB").values == (4096, 1 << 20)
    assert parse_sweep("latency=20ms").values == (20,)
    assert len(parse_sweep("latency").values) > 2


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("speed=1", ["speed"]),
        ("latency=fast", ["latency", "fast"]),
        ("concurrency=0", ["concurrency", "0"]),
        ("chunk-size=1", ["chunk-size", "1"]),
    ],
)
def test_sweeps_without_valid_values_are_refused(text: str, names: list[str]) -> None:
    with raises(LoadTestError, *names):
        parse_sweep(text)


def test_names_are_picked_in_the_order_of_the_catalogue() -> None:
    assert pick("obstore, ours", SYSTEMS, "system") == ("ours", "obstore")
    assert pick("all", SYSTEMS, "system") == tuple(SYSTEMS)
    with raises(LoadTestError, "system", repr("hdf5"), *SYSTEMS):
        pick("hdf5", SYSTEMS, "system")
    with raises(LoadTestError, "system", *SYSTEMS):
        pick(",", SYSTEMS, "system")


def test_every_workload_of_the_catalogue_can_be_done() -> None:
    assert set(WORKLOADS) == set(WORK)


def test_only_icechunk_commits_and_only_s3_has_everything() -> None:
    chosen = list(points(["commit", "read_small"], [], quick=True, overrides={}))
    made = {(case.point.workload, case.system) for case in cases(chosen, tuple(SYSTEMS), repeats=1)}
    assert {system for workload, system in made if workload == "commit"} == {"ours", "official"}
    assert {system for workload, system in made if workload == "read_small"} == set(SYSTEMS)
    local = {case.system for case in cases(chosen, tuple(SYSTEMS), repeats=1, kind="local")}
    assert not local & {"aiobotocore", "zarr-fsspec"}


def test_a_sweep_of_chunk_sizes_keeps_the_array_small() -> None:
    swept = [
        point.size
        for point in points(["write_small"], [parse_sweep("chunk-size=4KiB,64MiB")], quick=False, overrides={})
        if point.swept
    ]
    assert [size.chunks for size in swept] == [1000, 1]


def test_no_cases_and_far_too_many_are_refused() -> None:
    chosen = list(points(["commit"], [], quick=True, overrides={}))
    with raises(LoadTestError, "commit", "obstore"):
        cases(chosen, ("obstore",), repeats=1)
    with raises(LoadTestError, 5000):
        cases(chosen, ("ours",), repeats=5000)
