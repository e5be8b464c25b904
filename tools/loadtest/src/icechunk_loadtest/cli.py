"""The command line of the load test.

Exit codes: 0 success, 1 an operation failed, bytes were wrong or a threshold was missed, 2 bad input or a missing
component (one line names the remedy), 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from icechunk_loadtest import place as places
from icechunk_loadtest import plan
from icechunk_loadtest.errors import LoadTestError
from icechunk_loadtest.limits import measure_machine
from icechunk_loadtest.progress import Progress, point_text
from icechunk_loadtest.report.html import render
from icechunk_loadtest.report.text import overview
from icechunk_loadtest.results import Measurement, Results, summarize
from icechunk_loadtest.runner import Runner, interpreters
from icechunk_loadtest.thresholds import judge, load_thresholds, parse_threshold

__all__ = ["main"]

PROGRAM = "icechunk-loadtest"
LIMIT_S = 3_600.0
"""No measurement begins after this many seconds, unless ``--time-limit`` sets another limit."""
QUICK_LIMIT_S = 60.0
"""The same limit with ``--quick``."""
INTERRUPTED = "interrupted; the results hold the measurements until then"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(arguments)
    if threading.current_thread() is threading.main_thread():
        # on SIGTERM (from `timeout`, from CI) servers and workers are ended, as after Ctrl-C
        signal.signal(signal.SIGTERM, _end)
        # A shell without job control starts background commands with SIGINT ignored; the clean-up goes by it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return _list() if args.list else _main(args, shlex.join([PROGRAM, *arguments]))
    except LoadTestError as error:
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted", file=sys.stderr)
        return 130


def _end(number: int, _: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # `timeout` sends it twice; a second Ctrl-C would cut the clean-up short
    signal.raise_signal(signal.SIGINT)


def _main(args: argparse.Namespace, command: str) -> int:
    thresholds = [parse_threshold(text) for text in args.require]
    if args.check:
        thresholds += load_thresholds(args.check)
    for path in filter(None, (args.json, args.html)):
        if not path.absolute().parent.is_dir():
            raise LoadTestError(f"{path}: there is no folder {path.absolute().parent}")
    order = _order(args)
    if args.dry_run:
        for case in order.cases(order.systems):
            print(f"{case.point.workload} {case.system} ({point_text(case.point)})")
        return 0
    results = Results.load(args.load) if args.load else _measure(args, order, command)
    verdicts = judge(thresholds, summarize(results.measurements))
    if thresholds:
        results = replace(results, verdicts=tuple(asdict(verdict) for verdict in verdicts))
    print(overview(results))
    if args.json:
        results.save(args.json)
        print(f"results: {args.json}")
    if args.html:
        args.html.write_text(render(results), encoding="utf-8")
        print(f"report: {args.html}")
    if INTERRUPTED in results.notes and not args.load:
        print(f"{PROGRAM}: {INTERRUPTED}", file=sys.stderr)
        return 130
    sound = all(each.ok for each in results.measurements)
    return 0 if sound and all(verdict["ok"] for verdict in results.verdicts) else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """The checked arguments of the command line."""

    systems: tuple[str, ...]
    """Keys of `SYSTEMS`."""
    points: list[plan.Point]
    """Workloads and sizes to run on each system."""
    repeats: int
    """Runs of each point."""
    kind: str
    """Kind of storage: ``s3``, ``local`` or ``memory``."""
    delayed: bool
    """Whether the command line asks for latency; a workload's usual latency does not count."""

    def cases(self, systems: Sequence[str]) -> list[plan.Case]:
        """All cases on `systems`."""
        return plan.cases(self.points, systems, repeats=self.repeats, kind=self.kind)


def _order(args: argparse.Namespace) -> _Order:
    overrides = _overrides(args)
    usual = ",".join(plan.QUICK_SYSTEMS) if args.quick else "all"
    systems = plan.pick(args.systems or usual, plan.SYSTEMS, "system")
    workloads = plan.pick(args.workloads or "all", plan.WORKLOADS, "workload")
    sweeps = [plan.parse_sweep(text) for text in args.sweep]
    kind = "s3" if args.endpoint else args.on
    delayed = bool(args.latency_ms) or any(sweep.parameter == "latency_ms" for sweep in sweeps)
    if kind != "s3" and delayed:
        raise LoadTestError(f"latency can be added to S3 only, not with --on {kind}")
    return _Order(
        systems=systems,
        points=list(plan.points(workloads, sweeps, quick=args.quick, overrides=overrides)),
        repeats=args.repeat or 1,
        kind=kind,
        delayed=delayed,
    )


def _measure(args: argparse.Namespace, order: _Order, command: str) -> Results:
    started, began = datetime.now(UTC), time.perf_counter()
    pythons, notes = interpreters(order.systems)
    limits = measure_machine()
    limit_s = args.time_limit or (QUICK_LIMIT_S if args.quick else LIMIT_S)
    with _place(args, order) as place:
        order = _without_latency(order, place, args, notes)
        todo = order.cases(tuple(pythons))
        progress = Progress(len(todo), sys.stderr, quiet=args.quiet)
        for note in notes:
            progress.note(note)
        measurements: list[Measurement] = []
        runner = Runner(place, pythons, progress, reuse=args.quick)
        try:
            asyncio.run(_run(todo, runner, progress, measurements, limit_s=limit_s))
        except KeyboardInterrupt:
            notes.append(INTERRUPTED)
        finally:
            progress.close()
    if len(measurements) < len(todo):
        notes.append(f"only {len(measurements)} of {len(todo)} measurements were made; the limit was {limit_s:g} s")
    zarrs = {name: versions["zarr"] for name, versions in runner.versions.items() if "zarr" in versions}
    if len({zarrs.get("ours"), zarrs.get("official")} - {None}) > 1:
        notes.append(
            f"ours ran on zarr {zarrs['ours']}, official on {zarrs['official']}: part of the difference may be zarr's; "
            "run the load test in an environment with the same zarr to compare the libraries alone"
        )
    return Results(
        started=started.isoformat(timespec="seconds"),
        seconds=time.perf_counter() - began,
        command=command,
        place=place.about,
        machine=_machine(),
        versions=runner.versions,
        measurements=tuple(measurements),
        kind=order.kind,
        limits=None if args.endpoint else asdict(limits),
        notes=tuple(notes),
    )


async def _run(
    todo: Sequence[plan.Case], runner: Runner, progress: Progress, measurements: list[Measurement], *, limit_s: float
) -> None:
    began = time.perf_counter()
    async with runner:
        for case in todo:
            if time.perf_counter() - began > limit_s:
                break
            progress.preparing(case)
            measurement = await runner.measure(case)
            progress.finished(measurement)
            measurements.append(measurement)


def _place(args: argparse.Namespace, order: _Order) -> contextlib.AbstractContextManager[places.Place]:
    if order.kind != "s3":
        return places.memory_or_local(order.kind)
    if args.endpoint:
        return places.named_endpoint(args.endpoint, args.bucket, region=args.region, delay=order.delayed)
    return places.own_server(args.server)


def _without_latency(order: _Order, place: places.Place, args: argparse.Namespace, notes: list[str]) -> _Order:
    """Leave out a workload's usual latency where none can be added; refuse one that the command line asks for."""
    if place.proxy is not None or not any(point.size.latency_ms for point in order.points):
        return order
    if order.delayed:
        raise LoadTestError("latency needs toxiproxy: python -m icechunk_loadtest.services install toxiproxy")
    if place.kind == "s3" and not args.endpoint:
        notes.append("toxiproxy is not installed: all figures are without added latency")
    here = [replace(point, size=replace(point.size, latency_ms=0)) for point in order.points]
    return replace(order, points=here)


def _overrides(args: argparse.Namespace) -> dict[str, float]:
    """Sizes of the command line, checked, by the field of `Size` that they replace."""
    found: dict[str, float] = {}
    for name, option, low, high in (
        ("chunks", "--chunks", 1, 10_000_000),
        ("ops", "--ops", 1, 10_000_000),
        ("tasks", "--concurrency", 1, 4_096),
        ("latency_ms", "--latency-ms", 0, 10_000),
    ):
        value = getattr(args, name)
        if value is not None:
            if not low <= value <= high:
                raise LoadTestError(f"{option} {value} is not between {low} and {high}")
            found[name] = value
    if args.chunk_size is not None:
        size = plan.parse_size(args.chunk_size)
        if not 64 <= size <= 512 * plan.MIB:
            raise LoadTestError(f"--chunk-size {args.chunk_size} is not between 64 bytes and 512 MiB")
        found["chunk_bytes"] = size
    if args.soak is not None:
        if not 0 < args.soak <= 7 * 86_400:
            raise LoadTestError(f"--soak {args.soak:g} is not between 0 seconds and a week")
        found["soak_s"] = args.soak
    if args.repeat is not None and not 1 <= args.repeat <= 100:
        raise LoadTestError(f"--repeat {args.repeat} is not between 1 and 100")
    if args.time_limit is not None and not args.time_limit > 0:
        raise LoadTestError(f"--time-limit {args.time_limit:g} is not more than 0 seconds")
    return found


def _machine() -> dict[str, str]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": f"{usable} × {_processor()}",
        "load": " ".join(f"{value:.1f}" for value in os.getloadavg()),
    }


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _list() -> int:
    print("workloads")
    for name, workload in plan.WORKLOADS.items():
        print(f"  {name:17} {workload.about}")
    print("systems")
    for name, system in plan.SYSTEMS.items():
        print(f"  {name:17} {system.title}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Measure how fast chunks are written, read and committed — by this library, by the official one, "
        "and by plain objects and plain zarr —, and verify every byte. Starts a server of its own unless an endpoint "
        "is named; nothing else on the network is touched.",
        epilog="Exit codes: 0 success; 1 an operation failed, bytes were wrong or a threshold was missed; 2 bad input.",
    )
    what = parser.add_argument_group("what to run")
    what.add_argument("--quick", action="store_true", help="small sizes and few systems: a minute and a half at most")
    what.add_argument("--workloads", metavar="NAMES", help="comma-separated (default: all; see --list)")
    what.add_argument("--systems", metavar="NAMES", help="comma-separated (default: all there are; see --list)")
    what.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="WHAT[=VALUES]",
        help="also vary concurrency, chunk-size or latency, e.g. concurrency=1,4,16 (may be repeated)",
    )
    what.add_argument("--repeat", type=int, metavar="N", help="measure everything so often; medians count (default 1)")
    what.add_argument("--soak", type=float, metavar="SECONDS", help="how long the soak lasts (default 30)")
    what.add_argument("--list", action="store_true", help="list workloads and systems")
    what.add_argument("--dry-run", action="store_true", help="list the measurements without running them")
    sizes = parser.add_argument_group("sizes, instead of each workload's own")
    sizes.add_argument("--chunks", type=int, metavar="N", help="chunks in the array")
    sizes.add_argument("--chunk-size", metavar="SIZE", help="of one chunk, e.g. 64KiB")
    sizes.add_argument("--ops", type=int, metavar="N", help="operations, where a workload counts them")
    sizes.add_argument("--concurrency", dest="tasks", type=int, metavar="N", help="tasks at a time")
    sizes.add_argument("--latency-ms", type=int, metavar="MS", help="added to every answer (toxiproxy)")
    where = parser.add_argument_group("where")
    where.add_argument("--on", choices=("s3", "local", "memory"), default="s3", help="kind of storage (default: s3)")
    where.add_argument(
        "--server", choices=sorted(places.SERVERS), default="minio", help="to start, for s3 (default: minio)"
    )
    where.add_argument("--endpoint", metavar="URL", help="an S3 endpoint of yours; credentials from AWS_* variables")
    where.add_argument("--bucket", default=places.BUCKET, help=f"at that endpoint (default: {places.BUCKET})")
    where.add_argument("--region", default="us-east-1", help="of that endpoint (default: us-east-1)")
    outcome = parser.add_argument_group("outcome")
    outcome.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    outcome.add_argument("--html", type=Path, metavar="FILE", help="write the report here: one file, no other needed")
    outcome.add_argument("--load", type=Path, metavar="FILE", help="measure nothing, take the results of --json")
    outcome.add_argument("--require", action="append", default=[], metavar="THRESHOLD", help="e.g. 'write_small>=2x'")
    outcome.add_argument("--check", type=Path, metavar="FILE", help="thresholds in YAML or JSON")
    outcome.add_argument("--time-limit", type=float, metavar="SECONDS", help="begin nothing later")
    outcome.add_argument("--quiet", action="store_true", help="no progress")
    return parser
