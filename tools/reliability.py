"""``python -m tools.reliability``: run every machine that looks for faults for a while, and write the ledger of it.

    python -m tools.reliability [--minutes 2] [--only simulator,model] [--write]

``--write`` makes ``docs/reliability.md``: each promise, how it is tested, and the counts of each machine's last run.
The command ends with 1 where a machine found something.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PAGE = PROJECT / "docs" / "reliability.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A program that looks for faults."""

    name: str
    promises: str
    how: str
    words: Callable[[float], list[str]]
    """Of Python's command line, for a run of so many seconds."""
    figures: str
    """Pattern of the lines to be written down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a machine."""

    machine: Machine
    words: list[str]
    seconds: float
    code: int
    figures: tuple[str, ...]


MACHINES = (
    Machine(
        name="simulator",
        promises="Acknowledged changes stay, refused ones never happen, each branch is strictly serialisable, "
        "snapshots are isolated, collections take nothing that is needed: in all three layouts.",
        how="Schedules of several clients, conversions, collections and crashes on a store that loses, delays, "
        "doubles, reorders, refuses and truncates; deterministic by seed; histories judged by a checker that knows no "
        "engine.",
        words=lambda s: ["-m", "tools.simulate", "--seconds", f"{s:.0f}", "--workers", "2"],
        figures=r"^\d+ schedules|^operations|^\d+ crashes|^faults|broke a promise",
    ),
    Machine(
        name="model",
        promises="The rules of spec/repository-log.md keep every promise, and each of them is needed.",
        how="Explicit-state exploration of swap, settle, checkpoint, pruning, conversion and collection; each rule "
        "left out in turn must break a promise.",
        words=lambda s: ["-m", "spec.model"] + (["--quick"] if s < 300 else []),
        figures=r"states, ",
    ),
    Machine(
        name="appender, kill -9",
        promises="Each row of an appender is committed once, whenever it is killed.",
        how="Two consumers of one array, one of them killed with SIGKILL at a random moment, again and again.",
        words=lambda s: ["-m", "tools.kill_appender", "--kills", f"{max(4, s):.0f}"],
        figures=r"kills in",
    ),
    Machine(
        name="sessions, kill -9",
        promises="A session that was checkpointed commits after the death of its process, once.",
        how="Processes that hold sessions, and forks that join them, killed with SIGKILL; resumed by others.",
        words=lambda s: ["tools/kill_sessions.py", "--kills", f"{max(6, s):.0f}", "--at-once", "2"],
        figures=r"sessions in",
    ),
    Machine(
        name="power loss",
        promises="What a commit on local disk acknowledged is there after a power failure at any point.",
        how="Every enumerated point between two syncs of a commit, with unsynced writes dropped, torn and reordered.",
        words=lambda s: ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/simulator/test_power_loss.py"],
        figures=r"passed|failed",
    ),
    Machine(
        name="fuzz",
        promises="A corrupt file is refused with a format error, in bounded time and memory.",
        how="Mutations of official files, decompressed and sealed again, through every decoder.",
        words=lambda s: ["-m", "tools.fuzz", "--seconds", f"{s:.0f}", "--workers", "2"],
        figures=r"inputs from",
    ),
)


def run(machine: Machine, seconds: float) -> Run:
    """Run a machine."""
    words = machine.words(seconds)
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, *words], cwd=PROJECT, env=environment, capture_output=True, text=True)
    said = (done.stdout + "\n" + done.stderr).splitlines()
    figures = tuple(line.strip() for line in said if re.search(machine.figures, line))
    took = time.perf_counter() - began
    return Run(machine=machine, words=words, seconds=took, code=done.returncode, figures=figures)


def page(runs: Sequence[Run], commit: str) -> str:
    """The document."""
    lines = [
        "# Reliability: promises, and the search for faults",
        "",
        f"Made by `python -m tools.reliability --write` on {datetime.now(UTC):%Y-%m-%d}, commit {commit}, Python "
        f"{sys.version.split()[0]}, {os.cpu_count()} cores. Each machine can run for any time; a seed that breaks a "
        "promise is printed with the command that replays it. The tests that notice an engine broken on "
        "purpose: [mutants.md](mutants.md). The rules and their safety argument: [spec](../spec/README.md).",
    ]
    for one in runs:
        found = "nothing was found" if one.code == 0 else f"**it ended with {one.code}**"
        lines += [
            "",
            f"## {one.machine.name[0].upper()}{one.machine.name[1:]}",
            "",
            f"{one.machine.promises}",
            "",
            f"{one.machine.how}",
            "",
            f"`python {' '.join(one.words)}`, {one.seconds:.0f} s; {found}:",
            "",
            *(f"- {figure}" for figure in one.figures),
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.reliability", description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="of each machine (default 2)")
    parser.add_argument("--only", help="names of machines, separated by commas")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(PROJECT)}")
    args = parser.parse_args()
    chosen = [one for one in MACHINES if args.only is None or one.name in args.only.split(",")]
    runs = []
    for machine in chosen:
        runs.append(run(machine, 60 * args.minutes))
        print(f"{machine.name}: {runs[-1].seconds:.0f} s, exit code {runs[-1].code}", flush=True)
        print("\n".join(f"    {figure}" for figure in runs[-1].figures), flush=True)
    if args.write:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=PROJECT, capture_output=True, text=True)
        PAGE.write_text(page(runs, commit.stdout.strip()), encoding="utf-8")
    return 1 if any(one.code for one in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
