"""The overview that a load test prints at its end."""

from __future__ import annotations

import math

from icechunk_loadtest.plan import WORKLOADS
from icechunk_loadtest.progress import point_text
from icechunk_loadtest.results import Results, Summary, summarize
from icechunk_loadtest.units import bytes_text, rate_text, ratio_text, seconds_text

__all__ = ["overview", "ratio_to"]

BASELINE = "official"
_HEADS = "".join(f"{name:>10}" for name in ("p50", "p99", "cpu", "peak", "requests")) + "  errors"


def overview(results: Results) -> str:
    """Tables of the measurements, ratios to the official library, and the thresholds."""
    lines: list[str] = []
    summaries = summarize(results.measurements)
    last = None
    for summary in summaries:
        if summary.point != last:
            last = summary.point
            workload = WORKLOADS[summary.point.workload]
            lines += ["", f"{workload.title} ({point_text(summary.point)})"]
            lines.append("  " + " " * 13 + f"{'throughput':>20}{'× official':>12}" + _HEADS)
        lines.append(_row(summary, ratio_to(summary, summaries)))
    verified = sum(each.bytes_verified for each in results.measurements)
    bad = sum(not each.ok for each in results.measurements)
    lines += ["", f"{bytes_text(verified)} were read back and compared with what was written, byte by byte."]
    hedged, abandoned = (sum(getattr(each, name) for each in results.measurements) for name in ("hedged", "abandoned"))
    lines += [f"{hedged} reads were sent a second time, {abandoned} requests were given up for silence (ours only)."]
    lines += [
        f"{len(results.measurements)} measurements in {results.seconds:.0f} s; "
        + (f"{bad} FAILED" if bad else "all sound")
    ]
    lines += [f"note: {note}" for note in results.notes]
    lines += [
        f"{'holds ' if verdict['ok'] else 'MISSED'}  {verdict['text']}  (found: {verdict['found']})"
        for verdict in results.verdicts
    ]
    return "\n".join(lines).lstrip("\n")


def ratio_to(summary: Summary, summaries: list[Summary], baseline: str = BASELINE) -> float:
    """Throughput over the baseline's at the same point; NaN where there is none."""
    for other in summaries:
        if other.point == summary.point and other.system == baseline and other.throughput:
            return summary.throughput / other.throughput
    return float("nan")


def _row(summary: Summary, ratio: float) -> str:
    unit = WORKLOADS[summary.point.workload].unit
    return (
        f"  {summary.system:13}{rate_text(summary.throughput, unit):>20}{ratio_text(ratio):>12}"
        f"{seconds_text(summary.percentile_s(50)):>10}{seconds_text(summary.percentile_s(99)):>10}"
        f"{seconds_text(summary.cpu_s):>10}{bytes_text(summary.rss_peak_bytes):>10}{_count(summary.requests):>10}"
        f"  {summary.errors or '–'}"
    )


def _count(number: float) -> str:
    return "–" if math.isnan(number) else f"{number:.0f}"
