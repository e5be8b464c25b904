"""``python -m tools.bench``: how fast we are, as ratios to the official library in the same run.

    python -m tools.bench [--only small,commit,wire] [--repeat 3] [--json FILE] [--check]
    python -m tools.bench --only growth [--commits 10000]
    python -m tools.bench --only huge [--references 100000000]
    python -m tools.bench --only large
    python -m tools.bench --only feed [--commits 10000] [--references 100000000]

Each case runs in fresh processes, ours and the official one's in turn, and the best of the repeats counts: what the
machine did besides is the same for both. With ``--check`` the exit code is 1 when a floor is missed.

``growth`` and ``huge`` take minutes, have no official counterpart, and run on request only: ours at the beginning of a
long history beside ours at its end, as `tools.bench.growth` tells, and the memory of a commit of very many references,
as `tools.bench.huge` tells. ``large`` runs on request too: large chunks, as `tools.bench.large` tells; ``feed``:
questions about changes, writers and coverage, as `tools.bench.feed` tells; and so do ``wide``, ``history`` and
``contend-processes``, which compare with the official library: many arrays, many commits, many processes on one branch;
and ``sync``, which compares with zarr's own stores, as `tools.bench.sync_path` tells.

Measure ``import`` with a Python that has the package's own dependencies and no others: zarr looks through all installed
distributions when it is imported, and the official library has an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools import oracle
from tools.bench import feed, growth, history, huge, large, page, sync_path, wire
from tools.bench.history import LENGTHS
from tools.bench.processes import COUNTS
from tools.bench.wide import WIDTHS
from tools.bench.workload import CASES

_BOTH = ("", ", CPU")
"""The time that passes, and the CPU time."""
_REFERENCES = ("statistics", "diff", "diff again", "200 branches")
_LONG = ("open", "ancestry", "expire half", "collect half", "collect nothing")
FLOORS = {
    ("small", "set"): 10.0,
    ("small", "get uncommitted"): 10.0,
    ("small", "get committed"): 10.0,
    ("commit", "commit"): 0.5,
    ("references", "1 M set and commit"): 1.5,
    ("references", "append 1 000 to 1 M"): 20.0,
    ("arrays", "create: commit"): 8.0,
    ("arrays", "create: commit, CPU"): 8.0,
    ("arrays", "update: commit"): 8.0,
    ("arrays", "update: commit, CPU"): 8.0,
    ("virtual-distinct", "1 M distinct: set"): 2.0,
    ("virtual-distinct", "1 M distinct: commit"): 2.0,
    **{("contend", f"{tasks} tasks{sessions}, CPU"): 1.0 for tasks in (64, 256) for sessions in ("", ", new sessions")},
    **{
        ("contend-processes", f"{count} processes{behind}"): 3.0
        for count in COUNTS
        for behind in ("", f", {wire.LATENCY_MS} ms")
    },
    ("local-commits", "1 000 tiny commits"): 1.0,
    ("import", "import"): 1.0,
    ("import", "import and open"): 1.0,
    ("append", "a step a commit"): 5.0,
    # Of large steps the writes alone ("1 000 steps, writes") take 1/30 to 1/130 of official's time, which waits for
    # no disk; copying and compressing them takes twice as long again.
    ("append", "1 000 steps a commit"): 50.0,
    ("append", "1 000 small steps"): 50.0,
    ("append-wire", "a step a commit"): 10.0,
    ("append-wire", "1 000 steps a commit"): 50.0,
    ("append-wire", "1 000 small steps"): 50.0,
    ("merge", "merge and commit"): 1.0,
    ("shards", "one at a time"): 2.0,
    ("wire", "write and commit"): 8.0,
    ("wire", "read"): 8.0,
    ("wire", "open to first chunk"): 1.5,
    ("wire", "random reads"): 3.0,
    ("wire", "tiny session and commit"): 2.5,
    ("wire", "tiny commit"): 4.0,
    **{("wide", f"{what} one of {width}"): 1.5 for what in ("open", "change") for width in WIDTHS},
    **{("history", f"{what}, {length}{cpu}"): 1.0 for what in _LONG for length in LENGTHS for cpu in _BOTH},
    **{("history", f"{what}{cpu}"): 1.0 for what in _REFERENCES for cpu in _BOTH},
}
"""Least ratio of the official library's time to ours."""

ON_REQUEST = ("wide", "history", "contend-processes")
"""Cases that take minutes, and are not measured unless they are asked for."""
TIMEOUT_S = 900.0


def main() -> int:
    """Run the benchmarks that the command line asks for and print a table."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__.split("\n\n")[0])
    known = [*CASES, growth.CASE, huge.CASE, large.CASE, feed.CASE, sync_path.CASE]
    parser.add_argument(
        "--only",
        default=",".join(case for case in CASES if case not in ON_REQUEST),
        help=f"comma-separated, of {', '.join(known)}",
    )
    parser.add_argument("--repeat", type=int, default=3, help="runs of each case and library (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a floor is missed")
    parser.add_argument("--commits", type=int, default=10_000, help="length of the history of growth (default 10000)")
    parser.add_argument("--references", type=int, default=100_000_000, help="of each commit of huge (default 10^8)")
    parser.add_argument("--write", action="store_true", help=f"also put the results into {page.PAGE.name}")
    args = parser.parse_args()
    cases = args.only.split(",")
    unknown = set(cases) - set(known)
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    rows = [row for case in cases if case in CASES for row in _measure(case, args.repeat)]
    if sync_path.CASE in cases:
        rows += sync_path.rows(args.repeat)
    if rows:
        print(_table(rows))
    if growth.CASE in cases:
        grown = growth.rows(args.commits)
        print(growth.table(grown))
        rows += grown
    if huge.CASE in cases:
        committed = huge.rows(args.references)
        print(huge.table(committed))
        rows += committed
    if feed.CASE in cases:
        asked = feed.rows(args.commits, args.references)
        print(feed.table(asked))
        rows += asked
    if large.CASE in cases:
        measured = large.rows(args.repeat)
        print(large.table(measured))
        rows += measured
    if args.write:
        page.write(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 1 if args.check and not all(row["ok"] for row in rows) else 0


def _measure(case: str, repeat: int) -> list[dict[str, Any]]:
    ours: dict[str, float] = {}
    official: dict[str, float] = {}
    with _options(case) as options:
        for turn in range(repeat):
            print(f"{case} {turn + 1}/{repeat}", file=sys.stderr, flush=True)
            _best(ours, _ours(case, options.get("ours", options)))
            _best(official, _official(case, options.get("official", options)))
    return [
        {
            "case": case,
            "what": what,
            "ours_s": ours[what],
            "official_s": official[what],
            "times_as_fast": official[what] / ours[what],
            "floor": FLOORS.get((case, what)),
            "ok": official[what] / ours[what] >= FLOORS.get((case, what), 0.0),
        }
        for what in ours
    ]


def _best(best: dict[str, float], seconds: Mapping[str, float]) -> None:
    for what, value in seconds.items():
        best[what] = min(best.get(what, value), value)


def _official(case: str, options: Mapping[str, Any]) -> Any:
    for tries_left in (2, 1, 0):
        try:
            words = ("tools.bench.workload", case, json.dumps(options))
            return oracle.run(oracle.OFFICIAL_CURRENT, *words, timeout_s=TIMEOUT_S)
        except oracle.OracleError as error:
            # The official library sometimes ends with a segmentation fault at the end of a process.
            if not tries_left or "ended with -11" not in str(error):
                raise
    raise AssertionError("unreachable")


def _ours(case: str, options: Mapping[str, Any]) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench.workload", case, json.dumps(options)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=oracle.PROJECT,
        # Compiled once, as an installed package is.
        env={name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        | {"PYTHONPYCACHEPREFIX": str(Path(tempfile.gettempdir()) / "icechunk-bench-compiled")},
        check=True,
        timeout=TIMEOUT_S,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


@contextmanager
def _options(case: str) -> Iterator[dict[str, Any]]:
    """Options of the case, by ``ours`` and ``official`` if they differ between the libraries: for the wire, a MinIO
    behind a proxy that adds latency; for the history, repositories."""
    if case == "history":
        with history.places() as options:
            yield options
        return
    if case == "contend-processes":
        with wire.near_and_far() as options:
            yield options
    elif case in ("wire", "append-wire", "shards", "merge"):
        with wire.minio(wire.LATENCY_MS) as options:
            yield options
    else:
        yield {}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'case':14}{'what':26}{'ours':>12}{'official':>12}{'× as fast':>11}{'floor':>8}"]
    for row in rows:
        floor = "" if row["floor"] is None else f"{row['floor']:.1f}" + ("" if row["ok"] else " !")
        lines.append(
            f"{row['case']:14}{row['what']:26}{page.time_text(row['ours_s']):>12}{page.time_text(row['official_s']):>12}"
            f"{row['times_as_fast']:>11.2f}{floor:>8}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
