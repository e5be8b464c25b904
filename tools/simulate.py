"""Run the simulator of the log layout for a while, seed after seed.

``python -m tools.simulate --seconds 600 --seed 0 --workers 2`` prints each seed whose schedule broke a promise, and
ends with status 1 if there was one. Any of them is reproduced by ``--seed N --runs 1``.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import time
from dataclasses import dataclass, field

from tools.simulator.clients import Report
from tools.simulator.simulation import simulate


@dataclass(slots=True)
class Totals:
    """Sums over all seeds."""

    runs: int = 0
    acknowledged: int = 0
    failed: int = 0
    unknown: int = 0
    crashes: int = 0
    conversions: int = 0
    pruned: int = 0
    collected: int = 0
    broken: list[int] = field(default_factory=list)

    def add(self, report: Report) -> None:
        """Count one run."""
        self.runs += 1
        self.acknowledged += len(report.acknowledged)
        self.failed += len(report.failed)
        self.unknown += report.unknown
        self.crashes += report.crashes
        self.conversions += report.conversions
        self.pruned += report.pruned
        self.collected += report.collected
        if report.problems:
            self.broken.append(report.seed)


def run_seed(seed: int) -> Report:
    """One schedule; odd seeds convert the repository there and back meanwhile, every third one collects garbage."""
    logging.disable(logging.CRITICAL)
    try:
        return simulate(seed, writers=2 + seed % 4, commits=6 + seed % 7, convert=bool(seed % 2), collect=seed % 3 == 0)
    except Exception as error:
        return Report(seed=seed, problems=[f"{type(error).__name__}: {error}"])


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to go on")
    parser.add_argument("--runs", type=int, default=None, help="how many seeds at most")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    options = parser.parse_args()
    totals, end = Totals(), time.monotonic() + options.seconds
    last = sys.maxsize if options.runs is None else options.seed + options.runs
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers) as pool:
        seed = options.seed
        while seed < last and time.monotonic() < end:
            batch = range(seed, min(last, seed + 4 * options.workers))
            for report in pool.imap_unordered(run_seed, batch):
                totals.add(report)
                if report.problems:
                    print(f"seed {report.seed}: {'; '.join(sorted(set(report.problems)))}", flush=True)
            seed = batch.stop
    print(
        f"{totals.runs} schedules: {totals.acknowledged} commits acknowledged, {totals.failed} refused, "
        f"{totals.unknown} outcomes unknown at first, {totals.crashes} crashes, {totals.conversions} conversions, "
        f"{totals.pruned} slots pruned, {totals.collected} objects collected; "
        f"{len(totals.broken)} schedules broke a promise"
    )
    return 1 if totals.broken else 0


if __name__ == "__main__":
    sys.exit(main())
