"""Results as a load test would have measured them."""

from __future__ import annotations

import random

from icechunk_loadtest.plan import WORKLOADS, Point, Size
from icechunk_loadtest.results import Bin, Measurement, Results
from icechunk_loadtest.worker.histogram import Histogram


def measurement(
    workload: str = "read_random",
    system: str = "ours",
    *,
    seconds: float = 1.0,
    swept: str | None = None,
    size: Size | None = None,
    repeat: int = 0,
    problems: tuple[str, ...] = (),
    errors: int = 0,
    samples: int = 50,
) -> Measurement:
    """One run of 100 chunks in `seconds`, with latencies around 10 ms."""
    chance = random.Random(f"{workload}{system}{repeat}")
    histogram = Histogram()
    for _ in range(samples):
        histogram.record(0.01 * chance.lognormvariate(0, 0.5) * seconds)
    return Measurement(
        point=Point(workload=workload, size=size or WORKLOADS[workload].quick, swept=swept),
        system=system,
        repeat=repeat,
        seconds=seconds,
        units=100,
        bytes_read=100 * 2**20,
        bytes_written=0,
        bytes_verified=100 * 2**20,
        errors=errors,
        conflicts=0,
        messages=("OSError: <gone & lost>",) * errors,
        problems=problems,
        cpu_s=0.5,
        rss_before_bytes=2**26,
        rss_peak_bytes=2**27,
        requests={"GetObject": 100},
        server_received_bytes=0,
        server_sent_bytes=100 * 2**20,
        latencies={"read": histogram},
        bin_s=0.25,
        bins=tuple(Bin(units=10 + i, bytes=10, errors=0, p50_s=0.01, p99_s=0.02 * (1 + i)) for i in range(8)),
    )


def results(*measurements: Measurement) -> Results:
    """A load test that found these."""
    return Results(
        started="2026-01-02T03:04:05+00:00",
        seconds=12.0,
        command="icechunk-loadtest --quick",
        place="MinIO on this machine",
        machine={"processor": "2 × <fast>"},
        versions={"ours": {"zarr": "3.1.6"}},
        measurements=measurements,
        notes=("zarr-fsspec was left out",),
    )
