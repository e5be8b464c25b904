"""Measurements and summaries of a load test, and their JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from icechunk_loadtest.errors import LoadTestError
from icechunk_loadtest.plan import WORKLOADS, Point, Size
from icechunk_loadtest.worker.histogram import Histogram

__all__ = ["Bin", "Measurement", "Results", "Summary", "summarize"]

VERSION = 1
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Figures of one interval of a run; all intervals of a run are equally long."""

    units: float
    """Units of throughput that were completed in it."""
    bytes: int
    """Bytes of array data, read and written."""
    errors: int
    """Operations that failed."""
    p50_s: float | None
    """Median latency in seconds; None where no operation ended."""
    p99_s: float | None
    """99th percentile, likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One run of one workload on one system."""

    point: Point
    """Workload and size."""
    system: str
    """A key of `icechunk_loadtest.plan.SYSTEMS`."""
    repeat: int
    """Number of the repeat, from 0."""
    seconds: float
    """Time from the first operation to the last."""
    units: float
    """Completed units of throughput (see `icechunk_loadtest.plan.Workload.unit`); chunks where the unit is MiB."""
    bytes_read: int
    """Bytes of array data."""
    bytes_written: int
    """Bytes of array data."""
    bytes_verified: int
    """Bytes that were read and compared with the expected ones, during the run or after it."""
    errors: int
    """Operations that failed."""
    conflicts: int
    """Commits that lost a race and were tried again."""
    hedged: int = 0
    """Reads that were sent a second time, since the first took much longer than usual; counted by our library only."""
    abandoned: int = 0
    """Requests that were given up and tried again, since nothing moved for much longer than usual; likewise."""
    messages: tuple[str, ...] = ()
    """The first few errors."""
    problems: tuple[str, ...] = ()
    """Differences between data that were read and data that were written; empty in a sound run."""
    cpu_s: float = 0.0
    """CPU time of all workers in seconds, user and system."""
    server_cpu_s: float | None = None
    """CPU time of the server's process in seconds; None where the load test did not start it."""
    rss_before_bytes: int = 0
    """Resident memory of all workers when the run began."""
    rss_peak_bytes: int = 0
    """Sum of the workers' peaks of resident memory."""
    requests: Mapping[str, int] | None = None
    """Requests by the name of the S3 call, as the server counted them; None where it gives no counters."""
    server_received_bytes: int | None = None
    """Bytes of bodies that the server received."""
    server_sent_bytes: int | None = None
    """Bytes of bodies that the server sent."""
    latencies: Mapping[str, Histogram] = field(default_factory=dict)
    """Durations by kind of operation."""
    bin_s: float = 1.0
    """Width of `bins` in seconds."""
    bins: tuple[Bin, ...] = ()
    """Intervals from the beginning of the run, in order."""

    @property
    def ok(self) -> bool:
        """Whether no operation failed, and all data were as they were written."""
        return not self.errors and not self.problems

    @property
    def throughput(self) -> float:
        """The workload's units per second; 0 of a run that completed none."""
        done = self.units
        if WORKLOADS[self.point.workload].unit == "MiB":
            done = (self.bytes_read + self.bytes_written) / MIB
        return done / self.seconds if self.seconds > 0 else 0.0

    @property
    def latency(self) -> Histogram:
        """Durations of all operations but ``refresh``."""
        return Histogram.merged(value for name, value in self.latencies.items() if name != "refresh")


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """A whole load test."""

    started: str
    """ISO 8601, UTC."""
    seconds: float
    """Duration, from start to end."""
    command: str
    """As it was typed."""
    place: str
    """Description of the storage."""
    machine: Mapping[str, str]
    """Operating system, processor and load of the machine."""
    versions: Mapping[str, Mapping[str, str]]
    """Versions by system: Python and the packages that it uses."""
    measurements: tuple[Measurement, ...]
    """Measurements in the order in which they were made."""
    kind: str = "s3"
    """Kind of the storage: ``s3``, ``local`` or ``memory``."""
    limits: Mapping[str, float] | None = None
    """The fields of `icechunk_loadtest.limits.Machine`; None where they were not measured."""
    notes: tuple[str, ...] = ()
    """Remarks: systems that were left out with the reason, and limits that were reached."""
    verdicts: tuple[Mapping[str, Any], ...] = ()
    """One for each threshold: ``text``, ``found``, ``ok``."""

    def save(self, path: Path) -> None:
        """Write as JSON.

        Raises
        ------
        OSError
            `path` cannot be written.
        """
        body = {"version": VERSION, **asdict(self)}
        body["measurements"] = [_measurement_to_json(each) for each in self.measurements]
        path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file that `save` wrote.

        Raises
        ------
        LoadTestError
            There is no such file, or it holds no results of this version.
        """
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            if body.pop("version") != VERSION:
                raise ValueError("another version")
            body["measurements"] = tuple(_measurement_from_json(each) for each in body["measurements"])
            return cls(**{**body, "notes": tuple(body["notes"]), "verdicts": tuple(body["verdicts"])})
        except OSError as error:
            raise LoadTestError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LoadTestError(f"{path} is no result of a load test ({type(error).__name__}: {error})") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """All runs of one point on one system."""

    point: Point
    """Workload and size."""
    system: str
    """A key of `icechunk_loadtest.plan.SYSTEMS`."""
    runs: tuple[Measurement, ...]
    """Runs; at least one."""

    @property
    def ok(self) -> bool:
        """Whether all runs were sound."""
        return all(run.ok for run in self.runs)

    @property
    def throughput(self) -> float:
        """Median of the runs, in the workload's units per second."""
        return statistics.median(run.throughput for run in self.runs)

    @property
    def throughput_range(self) -> tuple[float, float]:
        """Throughput of the slowest run and of the fastest."""
        values = [run.throughput for run in self.runs]
        return min(values), max(values)

    @property
    def latency(self) -> Histogram:
        """Durations of all runs together."""
        return Histogram.merged(run.latency for run in self.runs)

    def percentile_s(self, percent: float) -> float:
        """A percentile of the latency in seconds; NaN where no operation ended."""
        return self.latency.percentile(percent)

    @property
    def cpu_s(self) -> float:
        """Median of the runs, in seconds."""
        return statistics.median(run.cpu_s for run in self.runs)

    @property
    def rss_peak_bytes(self) -> int:
        """The greatest peak of the runs."""
        return max(run.rss_peak_bytes for run in self.runs)

    @property
    def requests(self) -> float:
        """Median of the runs; NaN where the server gives no counters."""
        counted = [sum(run.requests.values()) for run in self.runs if run.requests is not None]
        return statistics.median(counted) if counted else math.nan

    @property
    def errors(self) -> int:
        """Errors and problems of all runs."""
        return sum(run.errors + len(run.problems) for run in self.runs)


def summarize(measurements: Sequence[Measurement]) -> list[Summary]:
    """Gather the repeats, in the order in which points and systems first appear."""
    grouped: dict[tuple[Point, str], list[Measurement]] = {}
    for each in measurements:
        grouped.setdefault((each.point, each.system), []).append(each)
    return [Summary(point=point, system=system, runs=tuple(runs)) for (point, system), runs in grouped.items()]


def _measurement_to_json(value: Measurement) -> dict[str, Any]:
    latencies = {name: histogram.to_json() for name, histogram in value.latencies.items()}
    fields = {
        name: getattr(value, name) for name in Measurement.__slots__ if name not in ("latencies", "point", "bins")
    }
    return {
        **fields,
        "point": asdict(value.point),
        "bins": [asdict(each) for each in value.bins],
        "latencies": latencies,
    }


def _measurement_from_json(value: dict[str, Any]) -> Measurement:
    point = value.pop("point")
    return Measurement(
        **{
            **value,
            "point": Point(**{**point, "size": Size(**point["size"])}),
            "messages": tuple(value["messages"]),
            "problems": tuple(value["problems"]),
            "bins": tuple(Bin(**each) for each in value["bins"]),
            "latencies": {name: Histogram.from_json(each) for name, each in value["latencies"].items()},
        }
    )
