"""``python -m spec.model``: explore the model, and say what each rule is for.

Without options: every world under all rules, then every rule left out in its own small world. The exit code is 1 if a
promise breaks that should hold, or holds where its rule is left out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from spec.model.explore import Result, explore
from spec.model.rules import RULES
from spec.model.scenarios import LARGE, LIMITS, QUICK, SMALL, space_of

__all__ = ["main", "markdown", "rule_rows", "world_rows"]


class _Run(NamedTuple):
    world: str
    without: tuple[str, ...] = ()


class _Row(NamedTuple):
    run: _Run
    result: Result
    seconds: float


def _explore(run: _Run) -> _Row:
    scenario = {**SMALL, **LARGE, **LIMITS}[run.world]
    started = time.perf_counter()
    result = explore(space_of(scenario, run.without))
    return _Row(run, result, time.perf_counter() - started)


def _all(runs: Iterable[_Run], jobs: int) -> Iterator[_Row]:
    if jobs == 1:
        yield from map(_explore, runs)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(_explore, runs)


def world_rows(names: Iterable[str], jobs: int = 1) -> Iterator[_Row]:
    """Explore worlds under all rules."""
    return _all([_Run(name) for name in names], jobs)


def rule_rows(jobs: int = 1) -> Iterator[_Row]:
    """Leave out each rule in its own world."""
    return _all([_Run(name, (name,)) for name in SMALL], jobs)


def markdown(rows: Iterable[_Row]) -> Iterator[str]:
    """The table of the rules, as in ``README.md``."""
    yield "| rule | left out | what breaks | steps | states |"
    yield "|---|---|---|---|---|"
    for run, result, _ in rows:
        number, says = RULES[run.world]
        promise, _, what = result.broken.partition(": ")
        breaks = f"{promise.lower()}: {what}"
        yield f"| {number} | `{run.world}`: {says} | {breaks} | {len(result.history)} | {result.states:,} |"


def _print_worlds(names: Iterable[str], jobs: int) -> tuple[int, int]:
    total = wrong = 0
    for run, result, seconds in world_rows(names, jobs):
        total += result.states
        wrong += bool(result.broken) or not result.complete
        title = {**SMALL, **LARGE}[run.world].name
        print(
            f"{result.states:>9,}  {seconds:6.1f} s  {run.world}: {title}: {result.broken or 'every promise holds'}",
            flush=True,
        )
        for line in result.history:
            print(f"                       {line}")
    return total, wrong


def _print_without(rules: tuple[str, ...], world: str) -> int:
    _, result, _ = _explore(_Run(world, rules))
    print(f"{SMALL[world].name if world in SMALL else LARGE[world].name}, without {', '.join(rules)}:")
    for number, line in enumerate(result.history, 1):
        print(f"  {number:2}  {line}")
    print(f"{result.broken or 'every promise holds'} ({result.states:,} states)")
    return 0 if result.broken else 1


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m spec.model", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="only worlds that are explored within seconds")
    parser.add_argument(
        "--without",
        metavar="RULE",
        action="append",
        choices=RULES,
        help="leave a rule out, and print the shortest history that breaks a promise; may be given several times",
    )
    parser.add_argument(
        "--world",
        choices=[*SMALL, *LARGE],
        help="the world for --without (default: that of the rule), or the only one to explore",
    )
    parser.add_argument("--table", action="store_true", help="only the table of the rules, as Markdown")
    parser.add_argument("--jobs", type=int, default=1, help="processes; worlds are explored side by side")
    options = parser.parse_args(arguments)
    if options.without:
        return _print_without(tuple(options.without), options.world or options.without[0])
    if options.world:
        return int(_print_worlds([options.world], 1)[1] > 0)
    if options.table:
        print(*markdown(rule_rows(options.jobs)), sep="\n")
        return 0
    started = time.perf_counter()
    total, wrong = _print_worlds([*SMALL, *(QUICK if options.quick else LARGE)], options.jobs)
    print()
    for run, result, _ in rule_rows(options.jobs):
        wrong += not result.broken
        print(f"without {run.world:16} {len(result.history):3} steps  {result.broken or 'NOT FOUND'}")
    print()
    for name in LIMITS:
        _, result, _ = _explore(_Run(name))
        wrong += not result.broken
        print(f"limit: {LIMITS[name].name}: {result.broken}")
    print(f"\n{total:,} states, {time.perf_counter() - started:.0f} s, {wrong} unexpected")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
