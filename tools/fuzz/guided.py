"""Mutate what others wrote, and feed it to everything that reads it: only the errors that say so may come out, quickly.

    python -m tools.fuzz --inputs 5000000 --workers 2
    python -m tools.fuzz --seconds 20 [--seed 1] [--target manifest]
    python -m tools.fuzz --target manifest --input HEX       # once more

Guided by coverage: an input whose outcome was never seen, and one in a hundred of the others, is read again under a
tracer; those that reach a line of the package that no input of its target has reached become examples. Each failure is
printed with the command that repeats it. It ends with the number of failures, at most 100.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import re
import resource
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from tools.fuzz.decoders import MEMORY_MB, SLOW_S
from tools.fuzz.targets import Target, all_targets

__all__ = ["Coverage", "Totals", "main", "outcome", "work"]

PACKAGE = str(Path(__file__).resolve().parent.parent.parent / "icechunk")
_TRACED = 0.01
_MOST_EXAMPLES = 2000
_VARIES = re.compile(r"\d+|'[^']*'|\"[^\"]*\"|b'.*|\{.*|\[.*")


@dataclass(slots=True)
class Totals:
    """Inputs that were tried, and faults that were found."""

    inputs: Counter[str] = field(default_factory=Counter)
    """Inputs by group."""
    lines: int = 0
    """Lines of the package that inputs which became examples reached."""
    examples: int = 0
    failures: list[str] = field(default_factory=list)
    peak_mb: float = 0.0


class Coverage:
    """The lines of the package that inputs of one target have reached."""

    def __init__(self) -> None:
        self.lines: set[tuple[CodeType, int]] = set()
        self.outcomes: set[str] = set()
        self._new = False

    def reaches_new(self, target: Target, data: bytes) -> bool:
        """Read an input under a tracer; whether it reaches a line that no other has reached."""
        self._new = False
        sys.settrace(self._called)
        try:
            target.read(data)
        except Exception:
            pass
        finally:
            sys.settrace(None)
        return self._new

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        place = frame.f_code, frame.f_lineno
        if place not in self.lines:
            self.lines.add(place)
            self._new = True
        return self._line


def outcome(target: Target, data: bytes) -> tuple[str, str | None]:
    """The result of an input, and the fault in it; None if there is none."""
    began = time.perf_counter()
    try:
        target.read(data)
        what = "read"
    except target.refusals as error:
        what = f"{type(error).__name__}: {error}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return "fault", f"{type(error).__name__}: {error}"
    took = time.perf_counter() - began
    return what, f"took {took:.1f} s" if took > SLOW_S else None


def work(seed: int, names: list[str] | None, inputs: int | None, seconds: float, loud: bool = True) -> Totals:
    """Fuzz until so many inputs were tried, or so much time has passed."""
    warnings.simplefilter("ignore")
    targets = [target for target in all_targets() if names is None or target.name in names]
    chance = random.Random(seed)
    corpus = {target.name: list(target.examples) for target in targets}
    coverage = {target.name: Coverage() for target in targets}
    for target in targets:
        for data in target.examples:
            coverage[target.name].reaches_new(target, data)
    known = sum(len(one.lines) for one in coverage.values())
    totals, end = Totals(), time.monotonic() + seconds
    shares = [target.share for target in targets]
    tried = 0
    while (inputs is None or tried < inputs) and len(totals.failures) < 100 and time.monotonic() < end:
        for target in chance.choices(targets, shares, k=200):
            examples, seen = corpus[target.name], coverage[target.name]
            data = target.mutate(chance, chance.choice(examples))
            tried += 1
            totals.inputs[target.group] += 1
            what, fault = outcome(target, data)
            if fault is not None:
                again = f"python -m tools.fuzz --target {target.name!r} --input {data.hex()}"
                totals.failures.append(f"{target.name}: {fault}\n    {again}")
                if loud:
                    print(totals.failures[-1], flush=True)
                continue
            kind = _VARIES.sub("", what)[:200]
            is_new = kind not in seen.outcomes and len(seen.outcomes) < 10_000
            if is_new:
                seen.outcomes.add(kind)
            if (is_new or chance.random() < _TRACED) and seen.reaches_new(target, data):
                examples.append(data)
                totals.examples += 1
                if len(examples) > _MOST_EXAMPLES:
                    examples.pop(chance.randrange(len(target.examples), len(examples)))
    totals.lines = sum(len(one.lines) for one in coverage.values()) - known
    totals.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return totals


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=None, help="how many, of all workers together")
    parser.add_argument("--seconds", type=float, default=None, help="how long at most (default 10 without --inputs)")
    parser.add_argument("--seed", type=int, default=None, help="of the mutations; random when not given")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--target", action="append", help="a target's name; several are allowed")
    parser.add_argument("--input", help="one input, in hexadecimal, instead")
    parser.add_argument("--list", action="store_true", help="name the targets")
    options = parser.parse_args()
    if options.list or options.input is not None:
        found = {target.name: target for target in all_targets()}
        if options.list:
            print("\n".join(f"{target.name:20} {target.group}" for target in found.values()))
            return 0
        what, fault = outcome(found[options.target[0]], bytes.fromhex(options.input))
        print(fault or what)
        return int(fault is not None)
    seconds = options.seconds if options.seconds is not None else 10.0 if options.inputs is None else 1e9
    first = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    each = None if options.inputs is None else -(-options.inputs // options.workers)
    began = time.monotonic()
    tasks = [(first + worker, options.target, each, seconds) for worker in range(options.workers)]
    if options.workers == 1:
        all_totals = [work(*tasks[0])]
    else:
        # An executor, not a pool: it says so where a worker dies.
        with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as executor:
            all_totals = list(executor.map(work, *zip(*tasks, strict=True)))
    took = time.monotonic() - began
    inputs = sum((one.inputs for one in all_totals), Counter[str]())
    failed = sum(len(one.failures) for one in all_totals)
    peak_mb = max(one.peak_mb for one in all_totals)
    print(
        f"{inputs.total()} inputs from seed {first} in {took:.0f} s, {inputs.total() / took:.0f} a second: "
        f"{failed} failed, peak {peak_mb:.0f} MB"
    )
    print("inputs of each kind: " + ", ".join(f"{count} {group}" for group, count in inputs.most_common()))
    print(
        f"{sum(one.examples for one in all_totals)} inputs became examples; they reach "
        f"{max(one.lines for one in all_totals)} more lines than the first ones"
    )
    if peak_mb > MEMORY_MB:
        print(f"more than {MEMORY_MB} MB of memory")
        failed += 1
    return min(100, failed)
