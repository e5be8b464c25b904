"""Thresholds: conditions on the figures of a load test, for CI.

A threshold reads ``[SYSTEM:]WORKLOAD[.METRIC] OP NUMBER[UNIT]``, for instance::

    write_small >= 2x              ours writes at least twice as fast as the official library
    read_large >= 0.85x obstore    … as 0.85 times obstore
    cold_open.p50 <= 80ms          half of our cold opens take at most 80 ms
    official:commit.p99 <= 1s      a figure of another system
    read_small.requests <= 400     the server counted at most that many requests
    append.rss <= 300MiB           peak memory of the workers

Metrics are ``throughput`` (the default, in the workload's unit per second), ``p50``, ``p90``, ``p95``, ``p99``,
``max``, ``cpu`` (all in seconds), ``rss`` (bytes), ``requests`` and ``errors``. A number with ``x`` is a ratio, of ours
to ``official`` unless another system is named. Only the workload's own sizes count, not the points of sweeps.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from icechunk_loadtest.errors import LoadTestError
from icechunk_loadtest.plan import SYSTEMS, WORKLOADS, parse_size
from icechunk_loadtest.results import Summary
from icechunk_loadtest.units import bytes_text, number_text, ratio_text, seconds_text

__all__ = ["Threshold", "Verdict", "judge", "load_thresholds", "parse_threshold"]

METRICS = ("throughput", "p50", "p90", "p95", "p99", "max", "cpu", "rss", "requests", "errors")
_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_PATTERN = re.compile(
    r"\s*(?:(?P<system>[\w-]+):)?(?P<workload>\w+)(?:\.(?P<metric>\w+))?\s*(?P<operator>>=|<=|>|<)\s*"
    r"(?P<number>[\d.]+)\s*(?P<unit>[A-Za-zµ]*)(?:[\s:]+(?P<other>[\w-]+))?\s*"
)
_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """A condition on one figure."""

    text: str
    """As it was written."""
    system: str
    """System whose figure it is."""
    workload: str
    """Workload, at its own sizes."""
    metric: str
    """One of `METRICS`."""
    operator: str
    """``>=``, ``<=``, ``>`` or ``<``."""
    number: float
    """Bound in the metric's base unit, or a ratio."""
    other: str | None
    """The system that the figure is divided by; None where `number` is no ratio."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a threshold holds."""

    text: str
    """The threshold as it was written."""
    found: str
    """The figure, or the reason why there is none."""
    ok: bool
    """It holds."""


def parse_threshold(text: str) -> Threshold:
    """Read one threshold.

    Raises
    ------
    LoadTestError
        `text` is no threshold; the message gives the reason.
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise LoadTestError(f"{text!r} is no threshold; write it like 'write_small>=2x' or 'cold_open.p50<=80ms'")
    system, workload = match["system"] or "ours", match["workload"]
    metric, unit = match["metric"] or "throughput", match["unit"]
    if workload not in WORKLOADS:
        raise LoadTestError(f"{text!r}: no workload is called {workload!r}; there are {', '.join(WORKLOADS)}")
    if metric not in METRICS:
        raise LoadTestError(f"{text!r}: no metric is called {metric!r}; there are {', '.join(METRICS)}")
    other = (match["other"] or "official") if unit == "x" else None
    for name in filter(None, (system, other)):
        if name not in SYSTEMS:
            raise LoadTestError(f"{text!r}: no system is called {name!r}; there are {', '.join(SYSTEMS)}")
    if match["other"] and unit != "x":
        raise LoadTestError(f"{text!r}: only a ratio (like 2x) has another system to compare with")
    try:
        number = float(match["number"])
    except ValueError:
        raise LoadTestError(f"{text!r}: {match['number']!r} is no number") from None
    if unit != "x":
        number = _in_base_unit(text, metric, number, unit)
    return Threshold(
        text=text.strip(),
        system=system,
        workload=workload,
        metric=metric,
        operator=match["operator"],
        number=number,
        other=other,
    )


def load_thresholds(path: Path) -> list[Threshold]:
    """Thresholds of a JSON or YAML file: a list of texts, or an object whose ``require`` is one.

    Raises
    ------
    LoadTestError
        The file cannot be read, or does not hold a list of thresholds.
    """
    try:
        body = path.read_text(encoding="utf-8")
        value = json.loads(body) if path.suffix == ".json" else yaml.safe_load(body)
    except OSError as error:
        raise LoadTestError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise LoadTestError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}") from error
    wanted = value.get("require") if isinstance(value, Mapping) else value
    if not isinstance(wanted, list) or not wanted or not all(isinstance(text, str) for text in wanted):
        raise LoadTestError(f"{path} must hold a list of thresholds, or an object with such a list called 'require'")
    return [parse_threshold(text) for text in wanted]


def judge(thresholds: Sequence[Threshold], summaries: Sequence[Summary]) -> list[Verdict]:
    """Compare each threshold with the measurements; one whose figure was not measured does not hold."""
    own = {(each.point.workload, each.system): each for each in summaries if each.point.swept is None}
    return [_judge(threshold, own) for threshold in thresholds]


def _judge(threshold: Threshold, own: Mapping[tuple[str, str], Summary]) -> Verdict:
    def verdict(found: str, ok: bool) -> Verdict:
        return Verdict(text=threshold.text, found=found, ok=ok)

    values = []
    for system in filter(None, (threshold.system, threshold.other)):
        summary = own.get((threshold.workload, system))
        if summary is None:
            return verdict(f"{threshold.workload} was not measured on {system}", False)
        values.append(_value(summary, threshold.metric))
    value = values[0]
    if threshold.other is not None:
        value = values[0] / values[1] if values[1] else math.nan
    if math.isnan(value):
        return verdict("nothing was measured", False)
    shown = ratio_text(value) if threshold.other is not None else _shown(value, threshold.metric)
    compare: Any = _OPERATORS[threshold.operator]
    return verdict(shown, bool(compare(value, threshold.number)))


def _value(summary: Summary, metric: str) -> float:
    match metric:
        case "throughput":
            return summary.throughput
        case "cpu":
            return summary.cpu_s
        case "rss":
            return summary.rss_peak_bytes
        case "requests":
            return summary.requests
        case "errors":
            return summary.errors
        case "max":
            return summary.percentile_s(100)
        case _:
            return summary.percentile_s(float(metric[1:]))


def _in_base_unit(text: str, metric: str, number: float, unit: str) -> float:
    if metric == "rss":
        return parse_size(f"{number}{unit}")
    if metric in ("throughput", "requests", "errors"):
        if unit:
            raise LoadTestError(f"{text!r}: {metric} takes a plain number or a ratio like 2x, not {unit!r}")
        return number
    if unit not in _SECONDS:
        raise LoadTestError(f"{text!r}: {unit!r} is no unit of time; there are us, ms and s")
    return number * _SECONDS[unit]


def _shown(value: float, metric: str) -> str:
    if metric == "rss":
        return bytes_text(value)
    return number_text(value) if metric in ("throughput", "requests", "errors") else seconds_text(value)
