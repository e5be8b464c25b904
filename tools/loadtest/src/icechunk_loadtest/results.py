"""What was measured, as values that go to JSON and come back."""

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
    """A stretch of time."""

    units: float
    """What was done in it."""
    bytes: int
    """Array data that moved."""
    errors: int
    """What failed."""
    p50_s: float | None
    """Median latency in seconds; None where nothing ended."""
    p99_s: float | None
    """99th percentile, likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One run of one workload on one system."""

    point: Point
    """What was run."""
    system: str
    """On what."""
    repeat: int
    """Counts from 0."""
    seconds: float
    """From the first operation to the last."""
    units: float
    """What throughput counts (see `icechunk_loadtest.plan.Workload.unit`), except that MiB are still chunks here."""
    bytes_read: int
    """Of array data."""
    bytes_written: int
    """Of array data."""
    bytes_verified: int
    """Read and compared with what was written, during the run or after it."""
    errors: int
    """Operations that failed."""
    conflicts: int
    """Commits that lost a race and were tried again."""
    messages: tuple[str, ...] = ()
    """The first few errors."""
    problems: tuple[str, ...] = ()
    """Wherever what was found is not what was written; empty in a sound run."""
    cpu_s: float = 0.0
    """CPU time of all workers."""
    rss_before_bytes: int = 0
    """Memory of all workers when the run began."""
    rss_peak_bytes: int = 0
    """The most that it came to."""
    requests: Mapping[str, int] | None = None
    """By S3 call, as the server counted them; None where it does not tell."""
    server_received_bytes: int | None = None
    """Bodies that the server received."""
    server_sent_bytes: int | None = None
    """Bodies that the server sent."""
    latencies: Mapping[str, Histogram] = field(default_factory=dict)
    """By kind of operation."""
    bin_s: float = 1.0
    """Width of `bins` in seconds."""
    bins: tuple[Bin, ...] = ()
    """From the beginning of the run."""

    @property
    def ok(self) -> bool:
        """Nothing failed, and everything came back as it was written."""
        return not self.errors and not self.problems

    @property
    def throughput(self) -> float:
        """The workload's unit per second; 0 of a run that did nothing."""
        done = self.units
        if WORKLOADS[self.point.workload].unit == "MiB":
            done = (self.bytes_read + self.bytes_written) / MIB
        return done / self.seconds if self.seconds > 0 else 0.0

    @property
    def latency(self) -> Histogram:
        """Of the operations that carry the workload (refreshing a view is not one)."""
        return Histogram.merged(value for name, value in self.latencies.items() if name != "refresh")


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """A whole load test."""

    started: str
    """ISO 8601, UTC."""
    seconds: float
    """How long it took."""
    command: str
    """As it was typed."""
    place: str
    """Where the chunks were stored."""
    machine: Mapping[str, str]
    """What it ran on."""
    versions: Mapping[str, Mapping[str, str]]
    """By system, the versions of what matters in its interpreter."""
    measurements: tuple[Measurement, ...]
    """In the order in which they were made."""
    notes: tuple[str, ...] = ()
    """What was left out, and why."""
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
        """Read what `save` wrote.

        Raises
        ------
        LoadTestError
            No such file, or it is something else.
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
    """All repeats of one point on one system."""

    point: Point
    """What was run."""
    system: str
    """On what."""
    runs: tuple[Measurement, ...]
    """At least one."""

    @property
    def ok(self) -> bool:
        """All runs were."""
        return all(run.ok for run in self.runs)

    @property
    def throughput(self) -> float:
        """The median of the runs."""
        return statistics.median(run.throughput for run in self.runs)

    @property
    def throughput_range(self) -> tuple[float, float]:
        """The slowest run and the fastest."""
        values = [run.throughput for run in self.runs]
        return min(values), max(values)

    @property
    def latency(self) -> Histogram:
        """Of all runs together."""
        return Histogram.merged(run.latency for run in self.runs)

    def percentile_s(self, percent: float) -> float:
        """A percentile of the latency in seconds; NaN where no operation ended."""
        return self.latency.percentile(percent)

    @property
    def cpu_s(self) -> float:
        """The median of the runs."""
        return statistics.median(run.cpu_s for run in self.runs)

    @property
    def rss_peak_bytes(self) -> int:
        """The greatest of the runs."""
        return max(run.rss_peak_bytes for run in self.runs)

    @property
    def requests(self) -> float:
        """The median of the runs; NaN where the server does not tell."""
        counted = [sum(run.requests.values()) for run in self.runs if run.requests is not None]
        return statistics.median(counted) if counted else math.nan

    @property
    def errors(self) -> int:
        """Of all runs, with every problem counted as one."""
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
