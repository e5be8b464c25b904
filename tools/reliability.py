"""``python -m tools.reliability``: run the machines that look for faults, and write the ledger of what they found.

    python -m tools.reliability [--only simulator,model]            # each for a minute or two
    python -m tools.reliability --long --only simulator             # the figures of a release: hours
    python -m tools.reliability --write                             # docs/reliability.md, of what is recorded

Each run is kept in ``tools/records/runs.json``: its command, date, commit, time and figures; of each machine the newest
short run and the newest long one. ``--record NAME FILE`` keeps a run that was started by hand, from its output. The
command ends with 1 where a machine found something.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from tools.mutants import read_records as read_mutants
from tools.records import commit_here
from tools.simulator.faults import Fault, described

PROJECT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = PROJECT / "docs" / "reliability.md"
RECORDS: Final = PROJECT / "tools" / "records" / "runs.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A program that looks for faults."""

    name: str
    promises: str
    how: str
    short: str
    """Arguments of Python's command line for a minute or two."""
    long: str
    """Arguments for the figures of a release."""
    figures: str
    """Pattern of the lines of its output to be written down."""

    def words(self, *, long: bool) -> list[str]:
        """Words of the arguments of Python's command line."""
        return (self.long if long else self.short).split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a machine."""

    name: str
    """Name of the machine."""
    long: bool
    words: list[str]
    date: str
    commit: str
    """A plus: of a package with changes that were not committed."""
    seconds: float
    code: int
    """0: nothing was found."""
    figures: list[str]
    note: str = ""
    """The promise that was broken, what that means for data, and whether it is mended; if something was found."""


MACHINES: Final = (
    Machine(
        name="simulator",
        promises="Acknowledged changes stay, refused ones never happen, each branch is strictly serialisable, "
        "snapshots are isolated, collections take nothing that is needed: in all three layouts.",
        how="Schedules of several clients, conversions, collections, leases of sessions, other libraries, earlier and "
        "later versions of this one, and crashes on a store that loses, delays, doubles, reorders, refuses and "
        "truncates, or on a local disk whose power fails; deterministic by seed; histories judged by a checker "
        "that knows no engine. Schedules without a fault are not counted. A seed that breaks a promise is printed with "
        "the command that shows it, request by request.",
        short="-m tools.simulate --runs 2000 --seconds 600 --workers 2",
        long="-m tools.simulate --runs 210000 --seconds 36000 --workers 2",
        figures=r"^\d+ schedules|^seeds|^operations|^\d+ crashes|kinds of faults|^schedules|broke a promise",
    ),
    Machine(
        name="model",
        promises="The rules of spec/repository-log.md keep every promise, and each of them is needed.",
        how="Explicit-state exploration of swap, settle, checkpoint, pruning, conversion and collection; each rule "
        "left out in turn must break a promise.",
        short="-m spec.model --quick",
        long="-m spec.model --jobs 2",
        figures=r"states, ",
    ),
    Machine(
        name="traces",
        promises="The engine takes no step that the rules forbid.",
        how="Schedules of the simulator, with all their faults, written down request by request and judged by the "
        "model's replay; 200 of them in CI.",
        short="-m tools.simulator.replay --traces 200",
        long="-m tools.simulator.replay --traces 5000",
        figures=r"traces with|callers were told",
    ),
    Machine(
        name="known faults",
        promises="A fault that was mended does not come back unnoticed.",
        how="Faults that users, field tests and the simulator met, with their fixes taken out one at a time: the "
        "simulator and the tests of the room must find each again; in CI, within its eight minutes.",
        short="-m tools.mutants --known",
        long="-m tools.mutants --known --simulator --at-least 5",
        figures=r"known faults are found|^[a-z].*: [0-9.]+ s, ",
    ),
    Machine(
        name="kill -9 on local disk",
        promises="Nothing acknowledged is lost and nothing becomes unreadable when processes are killed while they "
        "ingest, commit, write checkpoints, persist sessions, collect or repack.",
        how="Processes on one repository, killed with SIGKILL at random moments; each writes down what was "
        "acknowledged to it; a fresh process reads all of it, and the whole history, and resumes the sessions.",
        short="-m tools.kills --kills 100 --on local",
        long="-m tools.kills --kills 1000 --on local",
        figures=r"^kills:|^acknowledged:|^told:|kills on",
    ),
    Machine(
        name="kill -9 on MinIO",
        promises="The same on an object store.",
        how="The same on a MinIO server.",
        short="-m tools.kills --kills 100 --on minio",
        long="-m tools.kills --kills 1000 --on minio",
        figures=r"^kills:|^acknowledged:|^told:|kills on",
    ),
    Machine(
        name="kill -9 of appenders",
        promises="Each row of an appender is committed once, whenever it is killed.",
        how="Two consumers of one array, one of them killed with SIGKILL at a random moment, again and again.",
        short="-m tools.kill_appender --kills 60",
        long="-m tools.kill_appender --kills 1000",
        figures=r"kills in",
    ),
    Machine(
        name="kill -9 of sessions",
        promises="A session that was checkpointed commits after the death of its process, once.",
        how="Processes that hold sessions, and forks that join them, killed with SIGKILL; resumed by others.",
        short="tools/kill_sessions.py --kills 60 --at-once 2",
        long="tools/kill_sessions.py --kills 1000 --at-once 2",
        figures=r"sessions in",
    ),
    Machine(
        name="power loss",
        promises="What a commit on local disk acknowledged is there after a power failure at any point; a conversion "
        "or an upgrade that one interrupts is finished, and a persisted session resumed.",
        how="Every point between two calls of the system in commits, conversions, upgrades and persisted sessions, "
        "with unsynced writes dropped, torn and reordered; fresh clients read the whole history, and go on.",
        short="-m pytest -q -p no:cacheprovider -m thorough tests/simulator/test_power_loss.py",
        long="-m pytest -q -p no:cacheprovider -m thorough tests/simulator/test_power_loss.py",
        figures=r"passed|failed",
    ),
    Machine(
        name="fuzz",
        promises="What others wrote is read, or refused with an error that says so, in bounded time and memory.",
        how="Mutations, guided by coverage, of official files (decompressed and sealed again), log entries, segments "
        "of sessions, markers, answers of HTTP and S3, kerchunk documents and virtual locations.",
        short="-m tools.fuzz --inputs 100000 --workers 2",
        long="-m tools.fuzz --inputs 5000000 --workers 2",
        figures=r"inputs from|inputs of each|became examples",
    ),
)
_BY_NAME: Final = {machine.name: machine for machine in MACHINES}


def run(machine: Machine, *, long: bool) -> Run:
    """Run a machine."""
    words = machine.words(long=long)
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, *words], cwd=PROJECT, env=environment, capture_output=True, text=True)
    took = time.perf_counter() - began
    return record(machine, words, done.stdout + "\n" + done.stderr, long=long, seconds=took, code=done.returncode)


def record(machine: Machine, words: Sequence[str], said: str, *, long: bool, seconds: float, code: int) -> Run:
    """A run, by its output."""
    figures = [line.strip() for line in said.splitlines() if re.search(machine.figures, line)]
    return Run(
        name=machine.name,
        long=long,
        words=list(words),
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        commit=commit_here(PROJECT),
        seconds=round(seconds, 1),
        code=code,
        figures=figures,
    )


def read_runs() -> list[Run]:
    """The recorded runs, in the order of the machines, short runs first."""
    if not RECORDS.exists():
        return []
    runs = [Run(**one) for one in json.loads(RECORDS.read_text(encoding="utf-8"))]
    order = list(_BY_NAME)
    return sorted((one for one in runs if one.name in order), key=lambda one: (order.index(one.name), one.long))


def keep(new: Run) -> None:
    """Record a run instead of the last one of its kind."""
    runs = [one for one in read_runs() if (one.name, one.long) != (new.name, new.long)]
    RECORDS.write_text(json.dumps([asdict(one) for one in [*runs, new]], indent=1) + "\n", encoding="utf-8")


def page(runs: Sequence[Run]) -> str:
    """The document."""
    lines = [
        "# Reliability: what is promised, and how it is looked for",
        "",
        "Made by `python -m tools.reliability --write` of the runs that are recorded in `tools/records/runs.json`. "
        "Each machine can run for any time: `python -m tools.reliability --only NAME` runs it for a minute or two, "
        "`--long` for the figures of a release. The rules and their safety argument: [spec](../spec/README.md).",
        "",
        "| machine | what is promised | runs |",
        "|---|---|---|",
    ]
    by_name = {machine.name: [one for one in runs if one.name == machine.name] for machine in MACHINES}
    for machine in MACHINES:
        told = "; ".join(_in_short(one) for one in by_name[machine.name]) or "not yet"
        lines.append(f"| [{machine.name}](#{_anchor(machine.name)}) | {machine.promises} | {told} |")
    lines.append(
        f"| [mutants](mutants.md) | What the tests notice when the engine is broken on purpose. | {_mutants()} |"
    )
    for machine in MACHINES:
        lines += ["", f"## {machine.name}", "", machine.promises, "", machine.how]
        if machine.name == "simulator":
            lines += ["", f"{len(Fault)} kinds of faults (`python -m tools.simulate --kinds`):", ""]
            lines += [f"- *{fault.value}*: {what}" for fault, what in described().items()]
        for one in by_name[machine.name]:
            found = "nothing was found" if one.code == 0 else f"**it ended with {one.code}**"
            lines += [
                "",
                f"`python {' '.join(one.words)}`, {one.date}, commit {one.commit}, {_time(one.seconds)}; {found}:",
                "",
                *(f"- {figure}" for figure in one.figures),
            ]
            if one.code:
                lines += ["", f"What was found: {one.note or NOT_EXPLAINED}"]
        lines += ["", f"Long: `python {' '.join(machine.words(long=True))}`."]
    return "\n".join(lines) + "\n"


NOT_EXPLAINED: Final = "not explained yet; until it is, take it for a fault of the engine."


def _in_short(one: Run) -> str:
    found = "nothing found" if one.code == 0 else "**found something**, see below"
    return f"{one.date}, {_time(one.seconds)}, {found}"


def _mutants() -> str:
    records = read_mutants().values()
    return f"{sum(one.by is not None for one in records)} of {len(records)} caught"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9 -]", "", name.lower()).replace(" ", "-")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.reliability", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="names of machines, separated by commas: " + ", ".join(_BY_NAME))
    parser.add_argument("--long", action="store_true", help="as long as for a release")
    parser.add_argument("--record", nargs=2, metavar=("NAME", "FILE"), help="keep a long run by its output")
    parser.add_argument("--took", type=float, default=0.0, help="with --record: seconds")
    parser.add_argument("--commit", help="with --record: the commit that was run, if it is not the one here")
    parser.add_argument("--code", type=int, default=0, help="with --record: exit code; 0: nothing was found")
    parser.add_argument("--note", default="", help="with --record: what was found, if anything was")
    parser.add_argument("--command", help="with --record: what was run, if it was not the long command")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(PROJECT)}, and run nothing")
    args = parser.parse_args()
    if args.record:
        machine = _BY_NAME[args.record[0]]
        words = args.command.split() if args.command else machine.words(long=True)
        said = Path(args.record[1]).read_text(encoding="utf-8")
        kept = record(machine, words, said, long=True, seconds=args.took, code=args.code)
        keep(replace(kept, commit=args.commit or kept.commit, note=args.note))
        return 0
    if args.write:
        PAGE.write_text(page(read_runs()), encoding="utf-8")
        return 0
    chosen = [one for one in MACHINES if args.only is None or one.name in args.only.split(",")]
    failed = False
    for machine in chosen:
        found = run(machine, long=args.long)
        keep(found)
        failed |= bool(found.code)
        print(f"{found.name}: {found.seconds:.0f} s, exit code {found.code}", flush=True)
        print("\n".join(f"    {figure}" for figure in found.figures), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
