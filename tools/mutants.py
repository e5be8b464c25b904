"""``python -m tools.mutants``: break the engine in known ways, one at a time, and see that the tests notice.

    python -m tools.mutants [--only NAME,NAME] [--workers 2] [--seconds 120] [--fresh] [--write]
    python -m tools.mutants --known [--simulator]      # the faults that were met: are they found again?

A mutant is one small change of one file: a retry, a fence, a sync or a check removed or inverted. For each, the package
is copied, changed, and given to hunters, the likeliest first: the one that caught it last time, a few schedules of the
simulator, the tests of the room, those that speak of the changed file first, and many schedules. The first that fails
catches it.

What was found is kept in ``tools/records/mutants.json``, mutant by mutant. A command that was interrupted goes on where
it was: a mutant is not run again for the same package; ``--fresh`` runs all. ``--write`` makes ``docs/mutants.md`` of
the records. The command ends with 1 where a mutant is not caught, and with 2 where the simulator finds something in the
unchanged package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from tools.mutant_list import CONTROL, MUTANTS, Mutant
from tools.records import commit_here

PROJECT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = PROJECT / "docs" / "mutants.md"
RECORDS: Final = PROJECT / "tools" / "records" / "mutants.json"
HANG_S: Final = 150.0
"""A test that takes longer hangs; pytest's own limit is 120 s."""
HANG_CPU_S: Final = 10.0
"""A schedule that takes more processor time hangs; most take some milliseconds."""
_HANGS: Final = " (it hangs)"
_ENDS: Final = " (the process ends)"
_FEW, _MANY = 150, 1500
"""Schedules of each layout: at first, and when the tests found nothing."""
_MARKERS: Final = "not minio and not azurite and not oracle"
_LATE: Final = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
"""Plugins of pytest are imported before it starts, here."""
_PRELOAD: Final = ["numpy", "zarr", "orjson", "zstandard", "pytest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Caught:
    """The result of a mutant's run."""

    name: str
    by: str | None
    """The hunter that failed: a test, or ``simulator, LAYOUT``; None: none did."""
    schedules: int | None
    """Schedules of the simulator until it failed."""
    seconds: float
    state: str
    """Digest of the package that was changed."""
    commit: str
    date: str


@contextmanager
def mutated(mutant: Mutant) -> Iterator[Path]:
    """A folder that is the project with the one change."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as made:
        folder = Path(made)
        # Some tests have users of their own.
        folder.chmod(0o755)
        for entry in PROJECT.iterdir():
            if entry.name == "icechunk":
                shutil.copytree(entry, folder / entry.name, ignore=shutil.ignore_patterns("__pycache__"))
            elif not entry.name.startswith("."):
                (folder / entry.name).symlink_to(entry)
        target = folder / mutant.file
        target.write_text(mutant.apply(target.read_text(encoding="utf-8")), encoding="utf-8")
        yield folder


# ------------------------------------------------------------------------------------------------------------ hunters


@dataclass(frozen=True, slots=True)
class Schedules:
    """Schedules of the simulator, from seed 0 on."""

    layout: str
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Tests:
    """Arguments of pytest, in this order."""

    paths: tuple[str, ...]


Hunter = Schedules | Tests


def hunters(mutant: Mutant, last: Caught | None, *, simulator_only: bool = False) -> list[Hunter]:
    """The hunters to try, in this order; ``last``: the one that caught it before."""
    found: list[Hunter] = []
    if last is not None and last.by is not None and not simulator_only:
        if last.by.startswith("simulator, "):
            layout = last.by.removeprefix("simulator, ").removesuffix(_HANGS)
            found.append(Schedules(layout, 0, (last.schedules or 0) + 10))
        elif (PROJECT / last.by.split("::", maxsplit=1)[0]).exists():
            found.append(Tests((last.by,)))
    found += [Schedules(layout, 0, _FEW) for layout in mutant.layouts]
    if not simulator_only and mutant.tests:
        found.append(Tests(relevant_first(mutant)))
    return found + [Schedules(layout, _FEW, _MANY) for layout in mutant.layouts]


def relevant_first(mutant: Mutant) -> tuple[str, ...]:
    """The files of the mutant's tests: those first that name its module, or share words with its path."""
    files: dict[str, int] = {}
    module = mutant.file.removesuffix(".py").replace("/", ".")
    words = set(re.findall(r"[a-z]+", mutant.file.removeprefix("icechunk/").removesuffix(".py")))
    for n, given in enumerate(path for tests in mutant.tests for path in tests.split()):
        paths = sorted((PROJECT / given).rglob("test_*.py")) if (PROJECT / given).is_dir() else [PROJECT / given]
        for path in paths:
            text = path.read_text(encoding="utf-8")
            score = 3 * (module in text) + 6 * ("outcome_contract" in path.name)
            score += len(words.intersection(re.findall(r"[a-z]+", path.as_posix().partition("/tests/")[2])))
            # Processes that are started see the change as well, and take long.
            score -= 4 * any(word in text for word in ("multiprocessing", "subprocess", "mark.thorough"))
            files.setdefault(path.relative_to(PROJECT).as_posix(), 100 * (n == 0 and given.endswith(".py")) + score)
    return tuple(sorted(files, key=lambda path: -files[path]))


def _work(folder: str, tried: Sequence[Hunter], said: Connection) -> None:
    """In a process of its own: let the hunters try, and tell which of them failed."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = folder
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    # The table itself, and the tools, are read from the folder too: they are links.
    for name in [name for name in sys.modules if name.partition(".")[0] in ("icechunk", "tools", "spec", "tests")]:
        del sys.modules[name]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        for hunter in tried:
            try:
                found = _schedules(hunter, said) if isinstance(hunter, Schedules) else _tests(hunter, said)
            except BaseException:
                said.send(("error", traceback.format_exc(), None))
                return
            if found is not None:
                said.send(("caught", *found))
                return
    said.send(("missed", None, None))


def _schedules(hunter: Schedules, said: Connection) -> tuple[str, int] | None:
    try:
        from icechunk.log.repository.port import Layout
        from tools.simulator.simulation import plan_of, simulate
    except Exception:  # a change that cannot be imported is noticed by every test
        return f"simulator, {hunter.layout}", 0
    layout = Layout(hunter.layout)
    seed = hunter.first

    def hangs(*_: object) -> None:
        # The engine may not come back from where it is, so nothing can be raised into it.
        said.send(("caught", f"simulator, {hunter.layout}{_HANGS}", seed + 1))
        os._exit(0)

    signal.signal(signal.SIGVTALRM, hangs)
    try:
        for seed in range(hunter.first, hunter.first + hunter.count):
            signal.setitimer(signal.ITIMER_VIRTUAL, HANG_CPU_S)
            if simulate(seed, plan_of(seed, layout)).problems:
                return f"simulator, {hunter.layout}", seed + 1
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return None


def _tests(hunter: Tests, said: Connection) -> tuple[str, None] | None:
    import pytest

    class Listener:
        failed: str | None = None
        broken: str | None = None

        def pytest_runtest_logstart(self, nodeid: str) -> None:
            said.send(("test", nodeid, None))

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed and self.failed is None:
                self.failed = report.nodeid

        def pytest_collectreport(self, report: Any) -> None:
            # Tests that cannot be collected would catch every mutant.
            if report.failed:
                self.broken = str(report.longrepr)

    listener = Listener()
    words = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", _MARKERS, *_LATE]
    code = pytest.main([*words, *hunter.paths], plugins=[listener])
    if listener.broken is not None:
        raise ValueError(f"pytest cannot collect {hunter.paths}: {listener.broken}")
    if code == pytest.ExitCode.USAGE_ERROR and "::" in hunter.paths[0]:
        return None  # the test that caught it last time has another name now
    if code == pytest.ExitCode.USAGE_ERROR:
        raise ValueError(f"pytest cannot run {hunter.paths}")
    return None if code in (0, 5) else (listener.failed or hunter.paths[0], None)


def hunt(mutant: Mutant, tried: Sequence[Hunter], *, seconds: float) -> tuple[str | None, int | None, float]:
    """Give a mutant to its hunters: which of them caught it, after how many schedules, in how many seconds."""
    began = time.monotonic()
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with mutated(mutant) as folder:
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(str(folder), list(tried), theirs), daemon=False)
        with _starting:
            process.start()
        theirs.close()
        by: str | None = None
        schedules: int | None = None
        test, since = "", time.monotonic()
        try:
            while time.monotonic() - began < seconds:
                if test and time.monotonic() - since > HANG_S:
                    by = f"{test}{_HANGS}"
                    break
                if not mine.poll(0.5):
                    continue
                kind, what, count = mine.recv()
                if kind == "test":
                    test, since = what, time.monotonic()
                    continue
                if kind == "error":
                    raise RuntimeError(f"the hunters of {mutant.name} fail by themselves: {what}")
                by, schedules = what, count
                break
        except EOFError:
            if not test:
                raise RuntimeError(f"the process that hunts {mutant.name} has ended") from None
            by = f"{test}{_ENDS}"
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            process.join()
            mine.close()
    return by, schedules, time.monotonic() - began


_starting = threading.Lock()


def catch(mutant: Mutant, tried: Sequence[Hunter], *, seconds: float) -> tuple[str | None, int | None, float]:
    """As `hunt`; a test that fails on the unchanged package as well has caught nothing."""
    by, schedules, took = hunt(mutant, tried, seconds=seconds)
    if by is not None and "::" in by:
        test = by.removesuffix(_HANGS).removesuffix(_ENDS)
        if hunt(CONTROL, [Tests((test,))], seconds=seconds)[0] is not None:
            print(f"{test} fails without {mutant.name} as well", flush=True)
            return None, None, took
    return by, schedules, took


# ------------------------------------------------------------------------------------------------------------ records


def package_state(mutant: Mutant) -> str:
    """Digest of the code and the tests that decide about a mutant."""
    hashed = hashlib.sha256(f"{mutant.file}{mutant.old}{mutant.new}".encode())
    for path in sorted((PROJECT / "icechunk").rglob("*.py")):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()[:12]


def read_records() -> dict[str, Caught]:
    """The results, by the name of the mutant."""
    if not RECORDS.exists():
        return {}
    return {one["name"]: Caught(**one) for one in json.loads(RECORDS.read_text(encoding="utf-8"))}


def write_records(records: dict[str, Caught]) -> None:
    """Keep what was found, of mutants that exist, in their order."""
    known = [asdict(records[one.name]) for one in MUTANTS if one.name in records]
    RECORDS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def page(records: dict[str, Caught]) -> str:
    """The document."""
    rows = [(one, records[one.name]) for one in MUTANTS if one.name in records]
    caught = sum(found.by is not None for _, found in rows)
    by_simulator = [found for _, found in rows if found.by is not None and found.by.startswith("simulator")]
    dates, commits = {found.date for _, found in rows}, {found.commit for _, found in rows}
    lines = [
        "# Mutants: what the tests notice",
        "",
        f"Made by `python -m tools.mutants --write` on {max(dates, default='')} ({', '.join(sorted(commits))}): "
        f"{caught} of {len(MUTANTS)} mutants were caught, {len(by_simulator)} of them by the simulator"
        + (f"; not run: {len(MUTANTS) - len(rows)}" if len(rows) < len(MUTANTS) else "")
        + ". A mutant is one change of one file that breaks a promise; it is caught when the simulator or a test of "
        "its room fails. The hunter that caught it last time is tried first. Schedules: how many the simulator ran "
        "until then. Seconds: until it was caught, on a machine that had other work.",
        "",
        "| mutant | promise that it breaks | file | caught by | schedules | s |",
        "|---|---|---|---|---|---|",
    ]
    for one, found in rows:
        where = one.file.removeprefix("icechunk/")
        by = "**nothing**" if found.by is None else found.by.replace("|", "\\|")
        schedules = "" if found.schedules is None else str(found.schedules)
        lines.append(f"| {one.name} | {one.promise} | `{where}` | {by} | {schedules} | {found.seconds:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--workers", type=int, default=2, help="mutants at a time")
    parser.add_argument("--seconds", type=float, default=120.0, help="most of one mutant (default 120)")
    parser.add_argument("--fresh", action="store_true", help="run those again that were run on this package")
    parser.add_argument("--known", action="store_true", help="faults that were met: are they found again?")
    parser.add_argument("--simulator", action="store_true", help="with --known: by the simulator alone")
    parser.add_argument("--at-least", type=int, default=None, help="with --known: so many must be found")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(PROJECT)}")
    parser.add_argument("--list", action="store_true", help="name the mutants")
    args = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":
        # As in the command that replays a seed.
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tools.mutants", *sys.argv[1:]])
    chosen = [one for one in MUTANTS if args.only is None or one.name in args.only.split(",")]
    if args.list:
        print("\n".join(f"{one.name:40}{one.promise}" for one in chosen))
        return 0
    if args.known:
        return _known(args.workers, args.seconds, args.at_least, simulator_only=args.simulator)
    began = time.monotonic()
    records, commit = read_records(), commit_here(PROJECT)
    todo = [one for one in chosen if args.fresh or not _is_done(records.get(one.name), one)]
    if todo and hunt(CONTROL, [Schedules(layout, 0, 60) for layout in CONTROL.layouts], seconds=300)[0] is not None:
        print("the simulator finds a broken promise without any mutant: repair that first")
        return 2
    lock = threading.Lock()

    def one(mutant: Mutant) -> None:
        by, schedules, seconds = catch(mutant, hunters(mutant, records.get(mutant.name)), seconds=args.seconds)
        with lock:
            records[mutant.name] = Caught(
                name=mutant.name,
                by=by,
                schedules=schedules,
                seconds=round(seconds, 1),
                state=package_state(mutant),
                commit=commit,
                date=f"{datetime.now(UTC):%Y-%m-%d}",
            )
            write_records(records)
        verdict = "NOT CAUGHT" if by is None else f"caught by {by}"
        print(f"{mutant.name:40}{seconds:6.1f} s  {verdict}", flush=True)

    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(one, todo))
    missed = [mutant.name for mutant in chosen if records[mutant.name].by is None]
    took = time.monotonic() - began
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught; {len(todo)} were run in {took:.0f} s")
    if args.write:
        PAGE.write_text(page(records), encoding="utf-8")
    return 1 if missed else 0


def _is_done(found: Caught | None, mutant: Mutant) -> bool:
    return found is not None and found.by is not None and found.state == package_state(mutant)


def _known(workers: int, seconds: float, at_least: int | None, *, simulator_only: bool) -> int:
    """Whether the faults that users, field tests and the simulator found are found again without their fixes."""
    faults, records, began = [one for one in MUTANTS if one.known], read_records(), time.monotonic()

    def one(mutant: Mutant) -> bool:
        tried = hunters(mutant, records.get(mutant.name), simulator_only=simulator_only)
        by, schedules, took = catch(mutant, tried, seconds=seconds)
        after = f" after {schedules} schedules" if schedules is not None else ""
        verdict = "NOT FOUND" if by is None else f"found by {by}{after}"
        print(f"{mutant.known}: {took:.1f} s, {verdict}", flush=True)
        return by is not None

    with ThreadPoolExecutor(workers) as pool:
        found = sum(pool.map(one, faults))
    who = "the simulator alone" if simulator_only else "the simulator and the tests"
    took = time.monotonic() - began
    print(f"{found} of {len(faults)} known faults are found by {who} with their fixes taken out, in {took:.0f} s")
    return 0 if found >= (len(faults) if at_least is None else at_least) else 1


if __name__ == "__main__":
    sys.exit(main())
