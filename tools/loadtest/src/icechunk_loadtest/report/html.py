"""The report: one HTML file with everything in it, no script and nothing to fetch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from icechunk_loadtest.plan import SYSTEMS, WORKLOADS, Point
from icechunk_loadtest.progress import point_text
from icechunk_loadtest.report import svg
from icechunk_loadtest.report.style import COLOURS, CSS
from icechunk_loadtest.report.text import BASELINE, ratio_to
from icechunk_loadtest.results import Measurement, Results, Summary, summarize
from icechunk_loadtest.units import bytes_text, number_text, rate_text, ratio_text, seconds_text

__all__ = ["render"]

_Text = Callable[[float], str]
_SWEPT: Mapping[str, tuple[str, _Text]] = {
    "tasks": ("concurrency", lambda value: f"{value:g}"),
    "chunk_bytes": ("chunk size", bytes_text),
    "latency_ms": ("added latency", lambda value: f"{value:g} ms"),
}
MIN_SAMPLES = 4
"""Fewer make no distribution worth drawing."""


def render(results: Results) -> str:
    """The whole page."""
    summaries = summarize(results.measurements)
    own = [summary for summary in summaries if summary.point.swept is None]
    swept = [summary for summary in summaries if summary.point.swept is not None]
    body = [
        _head(results),
        _glance(own, summaries),
        _thresholds(results),
        "<h2>Workloads</h2>" if own else "",
        *(_workload(name, list(group)) for name, group in itertools.groupby(own, key=lambda each: each.point.workload)),
        _sweeps(swept),
        _about(results),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Load test, {escape(results.started[:16].replace('T', ' '))}</title><style>{CSS}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _head(results: Results) -> str:
    runs = results.measurements
    bad = sum(not run.ok for run in runs)
    missed = sum(not verdict["ok"] for verdict in results.verdicts)
    verified = bytes_text(sum(run.bytes_verified for run in runs))
    badges = [_badge(f"{verified} verified byte by byte", "good" if not any(run.problems for run in runs) else "bad")]
    badges.append(
        _badge(
            f"{bad} of {len(runs)} measurements failed" if bad else f"{len(runs)} measurements, no errors",
            "bad" if bad else "good",
        )
    )
    if results.verdicts:
        count = len(results.verdicts)
        badges.append(
            _badge(
                f"{missed} of {count} thresholds missed" if missed else f"all {count} thresholds hold",
                "bad" if missed else "good",
            )
        )
    when = results.started[:16].replace("T", " ")
    return (
        f"<header><h1>Load test</h1><p class='sub'>{escape(results.place)} · {when} UTC · "
        f"{results.seconds:.0f} s · {escape(results.machine.get('processor', ''))}</p>"
        f"<div class='badges'>{''.join(badges)}</div></header>"
    )


def _badge(text: str, kind: str) -> str:
    return f'<span class="badge {kind}">{escape(text)}</span>'


def _glance(own: Sequence[Summary], summaries: list[Summary]) -> str:
    cards = []
    for summary in own:
        ratio = ratio_to(summary, summaries)
        if summary.system != "ours" or math.isnan(ratio):
            continue
        workload = WORKLOADS[summary.point.workload]
        official = next(each for each in own if each.point == summary.point and each.system == BASELINE)
        figures = f"{number_text(summary.throughput)} against {number_text(official.throughput)} {workload.unit}/s"
        cards.append(
            f'<a class="card" href="#{summary.point.workload}"><div class="what">{escape(workload.title)}</div>'
            f'<div class="ratio {"ahead" if ratio >= 1 else "behind"}">{ratio_text(ratio)}</div>'
            f'<div class="figures">{figures}'
            "</div></a>"
        )
    if not cards:
        return ""
    return f"<h2>Throughput, as a multiple of the official library's</h2><div class='cards'>{''.join(cards)}</div>"


def _thresholds(results: Results) -> str:
    if not results.verdicts:
        return ""
    rows = "".join(
        f"<tr><td><code>{escape(verdict['text'])}</code></td><td>{escape(verdict['found'])}</td>"
        f"<td class='{'ok' if verdict['ok'] else 'missed'}'>{'holds' if verdict['ok'] else 'missed'}</td></tr>"
        for verdict in results.verdicts
    )
    return (
        "<h2>Thresholds</h2><div class='panel'><div class='scroll' style='margin:0'><table>"
        f"<tr><th>required</th><th>found</th><th></th></tr>{rows}</table></div></div>"
    )


def _workload(name: str, group: list[Summary]) -> str:
    workload = WORKLOADS[name]
    plots = [_figure(f"Throughput, {workload.unit} per second", _bars(group))]
    if name == "soak":
        plots = [_timeline(group, "units"), _timeline(group, "p99_s"), *plots]
    distribution = _ecdf(group)
    if distribution:
        labels = sorted({label for each in group for run in each.runs for label in run.latencies if label != "refresh"})
        plots.append(
            _figure(f"Latency of “{' / '.join(labels)}”, share of operations that took at most …", distribution)
        )
    else:
        plots.append(_figure("CPU time of the client", _cpu_bars(group)))
    return (
        f"<section class='panel' id='{name}'><h3>{escape(workload.title)}</h3>"
        f"<p class='about'>{escape(workload.about)}</p>"
        f"<p class='sizes'>{escape(point_text(group[0].point))}{_repeats(group)}</p>"
        f"<div class='plots'>{''.join(plots)}</div>{_table(group)}{_trouble(group)}</section>"
    )


def _repeats(group: Sequence[Summary]) -> str:
    count = max(len(each.runs) for each in group)
    return f" · median of {count} runs, whiskers from slowest to fastest" if count > 1 else ""


def _figure(caption: str, drawing: str, legend: str = "") -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{legend}{drawing}</figure>"


def _bars(group: Sequence[Summary]) -> str:
    rows = []
    for summary in group:
        ratio = ratio_to(summary, list(group))
        low, high = summary.throughput_range
        rows.append(
            svg.Bar(
                colour=f"var(--{summary.system})",
                label=summary.system,
                value=summary.throughput,
                low=low,
                high=high,
                text=number_text(summary.throughput),
                aside="baseline"
                if summary.system == BASELINE
                else ""
                if math.isnan(ratio)
                else f"{ratio_text(ratio)} official",
                failed=not summary.ok,
            )
        )
    return svg.bars(rows, title=f"throughput of {WORKLOADS[group[0].point.workload].title}")


def _cpu_bars(group: Sequence[Summary]) -> str:
    rows = [
        svg.Bar(
            colour=f"var(--{each.system})",
            label=each.system,
            value=each.cpu_s,
            low=min(run.cpu_s for run in each.runs),
            high=max(run.cpu_s for run in each.runs),
            text=seconds_text(each.cpu_s),
            aside="" if math.isnan(each.requests) else f"{each.requests:.0f} requests",
            failed=not each.ok,
        )
        for each in group
    ]
    return svg.bars(rows, title="CPU time")


def _ecdf(group: Sequence[Summary]) -> str:
    lines = []
    for summary in group:
        histogram = summary.latency
        if histogram.n < MIN_SAMPLES:
            continue
        points = histogram.ecdf()
        half, most = (seconds_text(histogram.percentile(percent)) for percent in (50, 99))
        lines.append(
            svg.Line(
                colour=f"var(--{summary.system})",
                label=f"{summary.system}: p50 {half}, p99 {most}",
                points=list(_steps([(seconds, share * 100) for seconds, share in points])),
                strong=summary.system == "ours",
            )
        )
    if not lines:
        return ""
    return svg.curves(
        lines,
        title="distribution of latencies",
        x_text=_short_seconds,
        y_text=lambda value: f"{value:g} %",
        x_label="latency, logarithmic",
        y_label="",
        x_log=True,
        y_max=100,
    )


def _steps(points: Sequence[tuple[float, float]]) -> Iterable[tuple[float, float]]:
    before = 0.0
    for x, y in points:
        yield x, before
        yield x, y
        before = y


def _short_seconds(seconds: float) -> str:
    if seconds < 0.999e-3:
        return f"{seconds * 1e6:g} µs"
    return f"{seconds * 1e3:g} ms" if seconds < 0.999 else f"{seconds:g} s"


def _timeline(group: Sequence[Summary], quantity: str) -> str:
    lines = []
    for summary in group:
        run = summary.runs[0]
        strong = summary.system == "ours"
        if quantity == "units":
            # the last bin is cut off by the end of the run
            points = [((i + 0.5) * run.bin_s, each.units / run.bin_s) for i, each in enumerate(run.bins[:-1])]
            lines.append(_over_time(summary, points, strong=strong))
            continue
        for key, dashed in (("p50_s", False), ("p99_s", True)):
            points = [
                ((i + 0.5) * run.bin_s, value * 1e3)
                for i, each in enumerate(run.bins[:-1])
                if (value := getattr(each, key)) is not None
            ]
            lines.append(_over_time(summary, points, strong=strong, dashed=dashed))
    drawing = svg.curves(
        lines,
        title="over time",
        x_text=lambda value: f"{value:g} s",
        y_text=lambda value: f"{value:g}",
        x_label="time since the beginning",
        y_label="",
        y_log=quantity != "units",
        height=250,
    )
    caption = (
        "Operations per second, over time"
        if quantity == "units"
        else "Latency in ms, logarithmic, over time: median (solid), p99 (dotted)"
    )
    return _figure(caption, drawing, _legend(group)) if drawing else ""


def _over_time(summary: Summary, points: list[tuple[float, float]], *, strong: bool, dashed: bool = False) -> svg.Line:
    return svg.Line(
        colour=f"var(--{summary.system})", label=summary.system, points=points, strong=strong, dashed=dashed
    )


def _legend(group: Iterable[Summary]) -> str:
    names = dict.fromkeys(summary.system for summary in group)
    return (
        "<div class='legend'>"
        + "".join(f'<span><i style="background:var(--{name})"></i>{name}</span>' for name in COLOURS if name in names)
        + "</div>"
    )


def _table(group: Sequence[Summary]) -> str:
    contended = any(run.conflicts for summary in group for run in summary.runs)
    repeated = any(run.hedged or run.abandoned for summary in group for run in summary.runs)
    # of one or two calls there are no percentiles
    percents = (50, 90, 99, 100) if any(each.latency.n >= MIN_SAMPLES for each in group) else (50,)
    heads = ["", "throughput", *(("p50", "p90", "p99", "max") if len(percents) > 1 else ("took",))]
    heads += ["requests", "CPU", "CPU per MiB", "peak memory", *["lost races"] * contended]
    heads += [*["sent twice", "given up"] * repeated, "verified", "errors"]
    rows = []
    for summary in group:
        run = summary.runs[0]
        unit = WORKLOADS[summary.point.workload].unit
        moved = (run.bytes_read + run.bytes_written) / 2**20
        cells = [
            f'<i style="background:var(--{summary.system})"></i>{escape(SYSTEMS[summary.system].title)}',
            rate_text(summary.throughput, unit),
            *(seconds_text(summary.percentile_s(percent)) for percent in percents),
            _requests(run, summary),
            seconds_text(summary.cpu_s),
            seconds_text(summary.cpu_s / moved) if moved else "–",
            bytes_text(summary.rss_peak_bytes),
        ]
        if contended:
            cells.append(str(sum(each.conflicts for each in summary.runs)))
        if repeated:
            cells += [str(sum(each.hedged for each in summary.runs)), str(sum(each.abandoned for each in summary.runs))]
        cells += [bytes_text(sum(each.bytes_verified for each in summary.runs)), str(summary.errors or "–")]
        rows.append(f"<tr class='{summary.system}'>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<div class='scroll'><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _requests(run: Measurement, summary: Summary) -> str:
    if run.requests is None:
        return "–"
    names = ", ".join(f"{count} {name}" for name, count in sorted(run.requests.items()))
    return f'<span title="{escape(names)}">{summary.requests:.0f}</span>'


def _trouble(group: Iterable[Summary]) -> str:
    texts = [
        f"<b>{summary.system}</b>: {escape(text)}"
        for summary in group
        for run in summary.runs
        for text in (*run.problems, *run.messages)
    ]
    return f"<p class='trouble'>{'<br>'.join(dict.fromkeys(texts))}</p>" if texts else ""


def _sweeps(swept: Sequence[Summary]) -> str:
    if not swept:
        return ""
    panels = []
    kinds = dict.fromkeys((each.point.workload, str(each.point.swept)) for each in swept)
    for name, parameter in kinds:
        group = [each for each in swept if (each.point.workload, each.point.swept) == (name, parameter)]
        workload, what = WORKLOADS[name], _SWEPT[parameter][0]
        values = sorted({_value(each.point, parameter) for each in group})
        plots = [
            _figure(
                f"Throughput, {workload.unit} per second"
                if parameter != "chunk_bytes"
                else "Throughput, MiB per second",
                _sweep_lines(group, parameter, values, _rate(parameter), _tick_text),
                _legend(group),
            )
        ]
        if any(each.latency.n >= MIN_SAMPLES for each in group):
            plots.append(
                _figure(
                    "Median latency",
                    _sweep_lines(group, parameter, values, lambda each: each.percentile_s(50), seconds_text),
                    _legend(group),
                )
            )
        else:
            cpu = _sweep_lines(group, parameter, values, lambda each: each.cpu_s, seconds_text)
            plots.append(_figure("CPU time of the client", cpu, _legend(group)))
        panels.append(
            f"<section class='panel'><h3>{escape(workload.title)}, by {what}</h3>"
            f"<p class='about'>{escape(workload.about)}</p><div class='plots'>{''.join(plots)}</div>"
            f"{_sweep_table(group, parameter, values)}{_trouble(group)}</section>"
        )
    return f"<h2>Sweeps</h2>{''.join(panels)}"


def _value(point: Point, parameter: str) -> float:
    return float(getattr(point.size, parameter))


def _rate(parameter: str) -> Callable[[Summary], float]:
    """Throughput of a summary. Along a sweep of chunk sizes it is MiB per second: chunks differ in size."""
    return _mib_per_second if parameter == "chunk_bytes" else lambda each: each.throughput


def _mib_per_second(summary: Summary) -> float:
    run = summary.runs[0]
    return (run.bytes_read + run.bytes_written) / 2**20 / run.seconds if run.seconds else 0.0


def _tick_text(value: float) -> str:
    return f"{value:g}" if value == round(value) and value < 1000 else number_text(value)


def _sweep_lines(
    group: Sequence[Summary], parameter: str, values: Sequence[float], figure: Callable[[Summary], float], y_text: _Text
) -> str:
    what, x_text = _SWEPT[parameter]
    lines = [
        svg.Line(
            colour=f"var(--{system})",
            label=system,
            points=[
                (_value(each.point, parameter), found)
                for each in sorted(group, key=lambda each: _value(each.point, parameter))
                if each.system == system and not math.isnan(found := figure(each))
            ],
            strong=system == "ours",
            marks=True,
        )
        for system in dict.fromkeys(each.system for each in group)
    ]
    return svg.curves(
        lines, title=f"by {what}", x_text=x_text, y_text=y_text, x_label=what, y_label="", x_values=values, height=250
    )


def _sweep_table(group: Sequence[Summary], parameter: str, values: Sequence[float]) -> str:
    what, text = _SWEPT[parameter]
    rate = _rate(parameter)
    head = f"<th>{what}</th>" + "".join(f"<th>{text(value)}</th>" for value in values)
    rows = []
    for system in dict.fromkeys(each.system for each in group):
        found = {_value(each.point, parameter): each for each in group if each.system == system}
        cells = []
        for value in values:
            summary = found.get(value)
            if summary is None:
                cells.append("<td>–</td>")
                continue
            ratio = ratio_to(summary, list(group))
            aside = (
                "" if math.isnan(ratio) or system == BASELINE else f" <span class='sizes'>{ratio_text(ratio)}</span>"
            )
            cells.append(f"<td>{number_text(rate(summary))}{aside}</td>")
        name = f'<td><i style="background:var(--{system})"></i>{escape(SYSTEMS[system].title)}</td>'
        rows.append(f"<tr class='{system}'>{name}{''.join(cells)}</tr>")
    return f"<div class='scroll'><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _about(results: Results) -> str:
    rows = [("command", f"<code>{escape(results.command)}</code>"), ("storage", escape(results.place))]
    rows += [(name, escape(value)) for name, value in results.machine.items()]
    for system, versions in results.versions.items():
        rows.append((escape(system), escape(", ".join(f"{name} {version}" for name, version in versions.items()))))
    rows += [("note", escape(note)) for note in results.notes]
    return (
        "<h2>How it was measured</h2><div class='panel'><dl>"
        + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
        + "</dl></div><footer>Each system ran in a worker process of its own, one after the other, through its public "
        "API at its defaults. Where the server is on this machine, they share its processors. Requests are counted by "
        "the server. CPU and memory are the worker's. Latencies are kept in buckets 1 % wide.</footer>"
    )
