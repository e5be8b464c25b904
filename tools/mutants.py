"""``python -m tools.mutants``: break the engine in known ways, one at a time, and see that the tests notice.

    python -m tools.mutants [--only NAME,NAME] [--workers 2] [--schedules 1500] [--write]

A mutant is one small change of one file: a retry, a fence, a sync or a check removed or inverted. For each, the package
is copied, changed, and given to hunters: first the simulator, then the tests of the room. The first that fails
catches it. ``--write`` makes ``docs/mutants.md`` of what was found. The command ends with 1 where one is not caught,
and with 2 where the simulator finds something in the unchanged package.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tools.mutant_list import CONTROL, MUTANTS, Mutant

PROJECT = Path(__file__).resolve().parent.parent
PAGE = PROJECT / "docs" / "mutants.md"
TIMEOUT_S = 300.0
_BROKEN = re.compile(r"seed (\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Caught:
    """What became of a mutant."""

    mutant: Mutant
    by: str | None
    """The hunter that failed; None: none did."""
    schedules: int | None
    """Of the simulator, until it failed."""
    seconds: float


@contextmanager
def mutated(mutant: Mutant) -> Iterator[Path]:
    """A folder that is the project with the one change."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as made:
        folder = Path(made)
        for entry in PROJECT.iterdir():
            if entry.name == "icechunk":
                shutil.copytree(entry, folder / entry.name, ignore=shutil.ignore_patterns("__pycache__"))
            elif not entry.name.startswith("."):
                (folder / entry.name).symlink_to(entry)
        target = folder / mutant.file
        target.write_text(mutant.apply(target.read_text(encoding="utf-8")), encoding="utf-8")
        yield folder


def hunt(mutant: Mutant, schedules: int) -> Caught:
    """Give a mutant to its hunters."""
    began = time.perf_counter()
    with mutated(mutant) as folder:
        for layout in mutant.layouts:
            words = ["tools.simulate", "--runs", str(schedules), "--seconds", "100", "--layout", layout, "--stop"]
            code, said = _run(folder, ["-m", *words])
            if code:
                found = _BROKEN.search(said)
                run = None if found is None else int(found[1]) + 1
                return Caught(mutant=mutant, by=f"simulator, {layout}", schedules=run, seconds=_since(began))
        for tests in mutant.tests:
            code, said = _run(folder, ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()])
            if code not in (0, 5):
                return Caught(mutant=mutant, by=_failed(said) or tests, schedules=None, seconds=_since(began))
    return Caught(mutant=mutant, by=None, schedules=None, seconds=_since(began))


def _run(folder: Path, words: Sequence[str]) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return 1, "it hangs"
    return done.returncode, done.stdout + done.stderr


def _failed(said: str) -> str | None:
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
    return None if found is None else found[1]


def _since(began: float) -> float:
    return time.perf_counter() - began


def page(results: Sequence[Caught], commit: str) -> str:
    """The document."""
    caught = sum(one.by is not None for one in results)
    lines = [
        "# Mutants: what the tests notice",
        "",
        f"Made by `python -m tools.mutants --write` on {datetime.now(UTC):%Y-%m-%d}, commit {commit}: {caught} of "
        f"{len(results)} mutants were caught. A mutant is one change of one file that breaks a promise; it is caught "
        "when the simulator or a test of its room fails. Schedules: how many the simulator ran until then.",
        "",
        "| mutant | promise that it breaks | file | caught by | schedules | s |",
        "|---|---|---|---|---|---|",
    ]
    for one in results:
        where = one.mutant.file.removeprefix("icechunk/")
        by = "**nothing**" if one.by is None else one.by
        schedules = "" if one.schedules is None else str(one.schedules)
        lines.append(
            f"| {one.mutant.name} | {one.mutant.promise} | `{where}` | {by} | {schedules} | {one.seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--workers", type=int, default=2, help="mutants at a time")
    parser.add_argument("--schedules", type=int, default=1500, help="of the simulator, for each layout (default 1500)")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(PROJECT)}")
    parser.add_argument("--list", action="store_true", help="name the mutants")
    args = parser.parse_args()
    chosen = [one for one in MUTANTS if args.only is None or one.name in args.only.split(",")]
    if args.list:
        print("\n".join(f"{one.name:40}{one.promise}" for one in chosen))
        return 0

    def one(mutant: Mutant) -> Caught:
        found = hunt(mutant, args.schedules)
        told = "NOT CAUGHT" if found.by is None else f"caught by {found.by}"
        print(f"{mutant.name:40}{found.seconds:6.1f} s  {told}", flush=True)
        return found

    if hunt(CONTROL, args.schedules).by is not None:
        print("the simulator finds a broken promise without any mutant: repair that first")
        return 2
    with ThreadPoolExecutor(args.workers) as pool:
        results = list(pool.map(one, chosen))
    missed = [found.mutant.name for found in results if found.by is None]
    print(f"{len(results) - len(missed)} of {len(results)} caught")
    if args.write:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=PROJECT, capture_output=True, text=True)
        PAGE.write_text(page(results, commit.stdout.strip()), encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
