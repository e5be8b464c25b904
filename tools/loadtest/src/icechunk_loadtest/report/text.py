"""The overview that a load test prints at its end."""

from __future__ import annotations

import math

from icechunk_loadtest.limits import Cost, Machine, idle_line, month_line, share, unit_cost
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
    lines += _limits(results, summaries)
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


def _limits(results: Results, summaries: list[Summary]) -> list[str]:
    """A table of the shares of the limits, and the cost of requests."""
    if results.limits is None:
        return []
    machine = Machine(**dict(results.limits))  # type: ignore[arg-type]
    lines = ["", f"Share of what this machine allows: {machine.processors} processors, loopback "]
    lines[-1] += f"{machine.loopback_mib_s:.0f} MiB/s, disk {machine.disk_mib_s:.0f} MiB/s with sync"
    heads = "".join(f"{name:>10}" for name in ("client", "/request", "/MiB"))
    heads += f"{'trips':>6}{'requests':>16}{'$/million':>11}"
    lines.append(f"  {'workload':18}{'system':14}{'share':>6}  {'nearest':12}{heads}")
    advice: dict[str, str] = {}
    for summary in summaries:
        run = sorted(summary.runs, key=lambda one: one.throughput)[len(summary.runs) // 2]
        found = share(run, machine, results.kind)
        if found is None or summary.point.swept is not None or summary.point.workload == "idle":
            continue
        each = unit_cost(summary)
        name = summary.point.workload
        times = (seconds_text(found.client_cpu_s), _or_dash(found.server_cpu_s), _or_dash(found.server_cpu_mib_s))
        lines.append(
            f"  {name:18}{summary.system:14}{found.nearest:>6.0%}  {found.limit:12}"
            + "".join(f"{text:>10}" for text in times)
            + f"{'–' if found.round_trips is None else f'{found.round_trips:.0f}':>6}"
            + (f"{'–':>16}{'–':>11}" if each is None else f"{_classes(each):>16}{each.usd * 1e6:>11.2f}")
        )
        if summary.system == "ours" and found.advice():
            advice[name] = found.advice()
    lines += [
        "  client: its processor time of one unit of throughput; /request, /MiB: the server's; requests (PUT/GET/LIST)",
        "  of one unit; $: S3's price of the requests of a million units",
    ]
    lines += [f"  {name}, ours: {text}" for name, text in advice.items()]
    costs = [make(summaries, system) for system in ("ours", BASELINE) for make in (month_line, idle_line)]
    return lines + [f"  {line}" for line in costs if line is not None]


def _classes(each: Cost) -> str:
    return "/".join(f"{each.by_class[name]:.3g}" for name in ("PUT", "GET", "LIST"))


def _or_dash(seconds: float | None) -> str:
    return "–" if seconds is None else seconds_text(seconds)


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
