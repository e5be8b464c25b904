"""``python -m tools.fuzz``: what is fuzzed, how examples are found, and that faults are told with their command."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from icechunk.errors import FormatError
from tools.fuzz.guided import Coverage, outcome, work
from tools.fuzz.targets import Target, all_targets

# zarr warns of what kerchunk documents ask for.
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
TARGETS = {target.name: target for target in all_targets()}


def test_everything_that_reads_what_others_wrote_is_fuzzed() -> None:
    assert {target.group for target in TARGETS.values()} == {"decoders", "log", "http", "kerchunk", "locations"}


@pytest.mark.parametrize("name", TARGETS)
def test_the_examples_are_readable_and_their_mutations_only_refused(name: str) -> None:
    target, chance = TARGETS[name], random.Random(name)
    assert target.examples
    assert any(outcome(target, data) == ("read", None) for data in target.examples)
    for _ in range(30):
        data = target.mutate(chance, chance.choice(target.examples))
        assert outcome(target, data)[1] is None, f"python -m tools.fuzz --target {name!r} --input {data.hex()}"


def test_an_error_that_is_no_refusal_is_a_fault() -> None:
    def read(data: bytes) -> None:
        if data == b"bad":
            raise FormatError("bad")
        if data == b"worse":
            raise IndexError("out of range")

    target = Target(name="x", group="decoders", read=read, examples=[b"good"])
    assert outcome(target, b"good") == ("read", None)
    assert outcome(target, b"bad") == ("FormatError: bad", None)
    assert outcome(target, b"worse") == ("fault", "IndexError: out of range")


def test_an_input_that_reaches_new_lines_is_noticed_once() -> None:
    target, coverage = TARGETS["log entry"], Coverage()
    assert coverage.reaches_new(target, target.examples[0])
    assert not coverage.reaches_new(target, target.examples[0])
    assert coverage.reaches_new(target, b"{")


def test_a_run_counts_its_inputs_and_finds_examples() -> None:
    found = work(7, ["log entry", "marker"], 600, 60.0)
    assert found.inputs == {"log": 600}
    assert found.failures == []
    assert found.examples
    assert found.lines


@pytest.mark.thorough
def test_the_command_runs_workers_and_repeats_an_input() -> None:
    def run(*words: str) -> str:
        command = [sys.executable, "-m", "tools.fuzz", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    words = ("--seed", "1", "--target", "marker")
    assert run("--inputs", "800", "--workers", "2", *words).startswith("800 inputs from seed 1 in ")
    assert run("--target", "marker", "--input", b"[]".hex()).strip() == "read"
