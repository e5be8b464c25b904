"""Shares of limits and costs of requests follow from what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from icechunk_loadtest.limits import Machine, cost, idle_line, measure_machine, month_line, share, unit_cost
from icechunk_loadtest.plan import WORKLOADS
from icechunk_loadtest.report.text import overview
from icechunk_loadtest.results import summarize
from icechunk_loadtest.worker.histogram import Histogram
from tools.loadtest.tests.builders import measurement, results

MACHINE = Machine(processors=2, loopback_mib_s=1000.0, disk_mib_s=200.0)


def test_the_nearest_limit_is_that_with_the_largest_share() -> None:
    # 0.5 s of the client and 1.0 s of the server in 1 s on two processors; 100 MiB over a line of 1000 MiB/s.
    found = share(replace(measurement(), server_cpu_s=1.0), MACHINE, "s3")
    assert found is not None
    assert (found.limit, found.nearest) == ("processors", 0.75)
    assert found.parts["loopback"] == pytest.approx(0.1)
    assert (found.client_cpu_s, found.server_cpu_s, found.server_cpu_mib_s) == (0.005, 0.01, 0.01)
    assert found.advice()


def test_round_trips_are_those_that_an_operation_waits_for() -> None:
    run = measurement("commit", size=replace(WORKLOADS["commit"].quick, latency_ms=20))
    histogram = Histogram()
    histogram.record(0.045)
    found = share(replace(run, latencies={"commit": histogram}, cpu_s=0.0, bytes_read=0), MACHINE, "s3")
    assert found is not None
    assert found.round_trips == 2
    assert found.limit == "round trips"
    assert found.nearest == pytest.approx(40 / 45, rel=0.02)
    assert not found.advice()


def test_a_run_of_one_long_call_says_nothing_about_round_trips() -> None:
    run = measurement("commit", size=replace(WORKLOADS["commit"].quick, latency_ms=20))
    histogram = Histogram()
    histogram.record(5.0)
    found = share(replace(run, latencies={"write": histogram}), MACHINE, "s3")
    assert found is not None
    assert found.round_trips is None


def test_bytes_to_local_disk_count_against_the_disk() -> None:
    found = share(replace(measurement(), bytes_written=100 * 2**20, cpu_s=0.1), MACHINE, "local")
    assert found is not None
    assert found.parts["disk"] == pytest.approx(0.5)


def test_a_run_without_a_result_has_no_share() -> None:
    assert share(replace(measurement(), units=0), MACHINE, "s3") is None


def test_requests_are_billed_by_their_class() -> None:
    found = cost(
        {"PutObject": 2, "CopyObject": 1, "GetObject": 10, "HeadObject": 5, "ListObjectsV2": 1, "DeleteObject": 9}
    )
    assert found.by_class == {"PUT": 3, "GET": 15, "LIST": 1, "DELETE": 9}
    assert found.usd == pytest.approx((3 + 1) * 5e-6 + 15 * 4e-7)


def test_a_month_of_commits_and_an_idle_repository_have_their_lines() -> None:
    commits = replace(measurement("commit"), units=10, requests={"PutObject": 20, "GetObject": 10})
    idle = replace(measurement("idle"), requests={})
    summaries = summarize([commits, idle])
    each = unit_cost(summaries[0])
    assert each is not None
    assert each.by_class == {"PUT": 2, "GET": 1, "LIST": 0, "DELETE": 0}
    month, nothing = month_line(summaries, "ours"), idle_line(summaries, "ours")
    assert month is not None
    assert f"${43_200 * each.usd:.2f}" in month
    assert nothing is not None
    assert "no requests" in nothing
    assert month_line(summaries, "official") is None


def test_the_overview_has_the_shares_where_the_machine_was_measured() -> None:
    found = results(measurement("commit"))
    assert "processors" not in overview(found)
    limits = {"processors": 2, "loopback_mib_s": 1000.0, "disk_mib_s": 200.0}
    assert "processors" in overview(replace(found, limits=limits))


def test_the_machine_is_measured() -> None:
    found = measure_machine()
    assert found.processors >= 1
    assert found.loopback_mib_s > 0
    assert found.disk_mib_s > 0
