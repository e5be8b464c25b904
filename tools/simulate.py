"""Run the simulator, seed after seed.

``python -m tools.simulate --seconds 60 --workers 2`` prints how many schedules a second it runs, which faults befell
them, and each seed whose schedule broke a promise or did not end, with the end of its trace and a command that runs it
again. It ends with status 1 if there was one.

``python -m tools.simulate --seed N --runs 1 --trace`` shows one schedule, request by request;
``python -m tools.simulate --kinds`` lists the kinds of faults.
"""

from __future__ import annotations

import argparse
import gc
import logging
import multiprocessing
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from multiprocessing.pool import AsyncResult

from icechunk.log.repository.port import Layout
from tools.simulator.cluster import Report, keep_no_list_of_tasks, told_error
from tools.simulator.faults import Fault, described
from tools.simulator.simulation import plan_of, simulate

__all__ = ["Totals", "main", "run"]

_BATCH = 25
_PATIENCE_S = 150
"""Seconds until a worker that does not answer is given up: one schedule ends by itself (`VirtualLoop.patience_s`)."""
_LONGEST = 2000
"""Lines of a trace that are shown from its beginning, and from its end."""


@dataclass(slots=True)
class Totals:
    """Sums over all seeds."""

    schedules: int = 0
    """Schedules that had at least one fault."""
    calm: int = 0
    """Schedules without any fault; they do not count."""
    requests: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    unknown: int = 0
    crashes: int = 0
    conversions: int = 0
    pruned: int = 0
    collected: int = 0
    undecided: list[int] = field(default_factory=list)
    """Seeds whose histories the checker gave up."""
    injected: Counter[Fault] = field(default_factory=Counter)
    profiles: Counter[str] = field(default_factory=Counter)
    broken: list[Report] = field(default_factory=list)
    seconds: float = 0.0
    first_seed: int = 0
    last_seed: int = 0

    def add(self, report: Report) -> None:
        """Count one schedule."""
        self.last_seed = max(self.last_seed, report.seed)
        if report.problems:
            self.broken.append(report)
        if not report.counts:
            self.calm += 1
            return
        self.schedules += 1
        self.requests += report.requests
        self.operations += report.outcomes
        self.unknown += report.unknown
        self.crashes += report.crashes
        self.conversions += report.conversions
        self.pruned += report.pruned
        self.collected += report.collected
        if report.undecided:
            self.undecided.append(report.seed)
        self.injected += report.injected
        self.profiles[report.profile] += 1

    def include(self, other: Totals) -> None:
        """Count the schedules of other seeds."""
        for each in fields(self):
            if each.name not in ("seconds", "first_seed", "last_seed"):
                setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
        self.last_seed = max(self.last_seed, other.last_seed)

    def lines(self) -> Iterator[str]:
        """Lines for people."""
        rate = self.schedules / self.seconds if self.seconds else 0.0
        yield (
            f"{self.schedules} schedules in {self.seconds:.1f} s: {rate:.0f} a second, "
            f"{self.requests / max(1, self.schedules):.0f} requests each; {self.calm} without faults, not counted"
        )
        yield f"seeds {self.first_seed} to {self.last_seed}"
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.operations.items()))
        yield f"operations: {counts}; {self.unknown} unknown at first"
        yield (
            f"{self.crashes} crashes, {self.conversions} conversions, {self.pruned} slots pruned, "
            f"{self.collected} objects collected; {len(self.undecided)} histories undecided"
            + (f": seeds {', '.join(map(str, sorted(self.undecided)))}" if self.undecided else "")
        )
        befell = (f"{count} {fault.value}" for fault, count in self.injected.most_common())
        yield f"{len(self.injected)} kinds of faults: " + "; ".join(befell)
        yield "schedules: " + ", ".join(f"{count} {profile}" for profile, count in self.profiles.most_common())
        yield f"{len(self.broken)} {'schedule' if len(self.broken) == 1 else 'schedules'} broke a promise"


def run_seeds(seeds: range, layout: Layout | None) -> Totals:
    """Run some seeds."""
    totals = Totals()
    for seed in seeds:
        plan = plan_of(seed, layout)
        try:
            report = simulate(seed, plan)
        except Exception as error:
            # A fault of the simulator itself must not hide which seed met it.
            report = Report(seed=seed, profile=plan.profile, problems=[told_error(error)])
        totals.add(report.without_trace())
    return totals


def run(
    *,
    seed: int,
    runs: int | None,
    seconds: float,
    workers: int,
    layout: Layout | None = None,
    loud: bool = True,
    stop: bool = False,
) -> Totals:
    """Run seeds from ``seed`` on, until there were so many, so much time has passed, or, with ``stop``, one broke."""
    totals, began = Totals(first_seed=seed), time.monotonic()
    last = sys.maxsize if runs is None else seed + runs
    batches = _batches(seed, last, began + seconds)
    if workers == 1:
        collecting = gc.isenabled()
        _settle_down()
        try:
            for batch in batches:
                _include(totals, run_seeds(batch, layout), layout, loud=loud)
                if stop and totals.broken:
                    break
        finally:
            if collecting:
                gc.enable()
    else:
        with multiprocessing.get_context("spawn").Pool(workers, initializer=_begin_worker) as pool:
            # A few batches ahead at the most: a pool asks for all of its work at once otherwise.
            pending: deque[tuple[range, AsyncResult[Totals]]] = deque()
            answered = True
            while answered:
                while len(pending) < 4 * workers and (coming := next(batches, None)) is not None:
                    pending.append((coming, pool.apply_async(run_seeds, (coming, layout))))
                if not pending:
                    break
                batch, result = pending.popleft()
                found, answered = _answer(batch, result)
                _include(totals, found, layout, loud=loud)
    totals.seconds = time.monotonic() - began
    return totals


def _answer(batch: range, result: AsyncResult[Totals]) -> tuple[Totals, bool]:
    """Totals of a worker, and whether it answered; where it hangs or has died, a report names its seeds."""
    try:
        return result.get(_PATIENCE_S), True
    except multiprocessing.TimeoutError:
        totals = Totals()
        why = f"no answer within {_PATIENCE_S} s: it hangs or has died at one of seeds {batch[0]} to {batch[-1]}"
        totals.add(Report(seed=batch[0], profile="a worker", problems=[why]))
        return totals, False


def _batches(seed: int, last: int, end: float) -> Iterator[range]:
    while seed < last and time.monotonic() < end:
        yield range(seed, min(last, seed + _BATCH))
        seed += _BATCH


def _begin_worker() -> None:
    keep_no_list_of_tasks()
    _settle_down()


def _settle_down() -> None:
    # Loaded modules stay: the garbage collector need not look at them again and again. The simulation calls it.
    simulate(0)
    logging.disable(logging.CRITICAL)
    gc.collect()
    gc.freeze()
    gc.disable()


def _include(totals: Totals, found: Totals, layout: Layout | None, *, loud: bool) -> None:
    totals.include(found)
    for report in found.broken if loud else ():
        print(f"seed {report.seed} ({report.profile}): {'; '.join(dict.fromkeys(report.problems))}")
        print("".join(f"    {line}\n" for line in report.last_lines), end="")
        print(f"    {replay_command(report.seed, layout)}", flush=True)


def replay_command(seed: int, layout: Layout | None) -> str:
    """The command that runs a schedule again."""
    return f"python -m tools.simulate --seed {seed} --runs 1 --trace" + (f" --layout {layout.value}" if layout else "")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to go on")
    parser.add_argument("--runs", type=int, default=None, help="how many seeds at most")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--layout", type=Layout, default=None, choices=list(Layout), help="one layout only")
    parser.add_argument("--stop", action="store_true", help="end with the first broken promise (with one worker)")
    parser.add_argument("--trace", action="store_true", help="show what happens, request by request")
    parser.add_argument("--kinds", action="store_true", help="list the kinds of faults, and nothing else")
    options = parser.parse_args()
    if options.kinds:
        print("\n".join(f"{fault.value}: {what}" for fault, what in described().items()))
        return 0
    if os.environ.get("PYTHONHASHSEED") != "0":
        # The order of sets is part of a schedule.
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tools.simulate", *sys.argv[1:]])
    keep_no_list_of_tasks()
    if options.trace:
        return _trace(options.seed, options.runs or 1, options.layout)
    totals = run(
        seed=options.seed,
        runs=options.runs,
        seconds=options.seconds,
        workers=options.workers,
        layout=options.layout,
        stop=options.stop,
    )
    print("\n".join(totals.lines()))
    return 1 if totals.broken else 0


def _trace(first: int, runs: int, layout: Layout | None) -> int:
    broken = 0
    for seed in range(first, first + runs):
        report = simulate(seed, plan_of(seed, layout))
        print(f"seed {seed} ({report.profile}), trace {report.trace.digest}")
        print("\n".join(_shortened(list(report.trace.lines()))))
        print("faults: " + ", ".join(f"{count} {fault.value}" for fault, count in report.injected.most_common()))
        print("\n".join(dict.fromkeys(report.problems)) or "every promise was kept")
        broken += bool(report.problems)
    return 1 if broken else 0


def _shortened(lines: list[str]) -> list[str]:
    """The lines of a trace; of one that does not end, the first and the last."""
    left_out = len(lines) - 2 * _LONGEST
    return lines if left_out <= 0 else [*lines[:_LONGEST], f"… {left_out} lines …", *lines[-_LONGEST:]]


if __name__ == "__main__":
    sys.exit(main())
