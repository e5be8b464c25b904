"""The formal model judges schedules of the simulator: 200 traces, and traces in which something is wrong."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from icechunk.log.repository.port import Layout
from spec.model.replay import Record, replay
from tools.simulator.replay import judged, recorded
from tools.simulator.simulation import Plan

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
TRACES = 200


def test_the_model_allows_two_hundred_traces_of_the_engine() -> None:
    done: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    for one in itertools.islice(judged(range(10_000, 20_000)), TRACES):
        assert not one.problems, (
            f"seed {one.seed}: {one.problems[:3]}; python -m tools.simulator.replay --seed {one.seed}"
        )
        done.update(str(record["do"]) for record in one.records)
        outcomes.update(str(record["outcome"]) for record in one.records if record["do"] == "tell")
    assert done["exec"] > 10_000
    assert set(outcomes) == {"committed", "conflict", "refused", "unknown", "cancelled"}
    assert done["settle"]
    assert done["end"]


def a_trace(plan: Plan) -> list[Record]:
    return next(records for seed in itertools.count() for report, records in [recorded(seed, plan)] if report.counts)


def test_a_commit_without_its_answer_is_not_allowed() -> None:
    records = a_trace(Plan(layout=Layout.LOG))
    puts = {record["request"] for record in records if record["do"] == "send" and "entry" in record}
    unanswered = [record for record in records if record["do"] != "answer" or record["request"] not in puts]
    assert {problem.rule for problem in replay(unanswered)} & {3, 5}


def with_a_told_attempt() -> tuple[list[Record], int, Record]:
    """A trace, the position at which a caller is told that its outcome is unknown, and the request of its attempt."""
    for seed in itertools.count():
        _, records = recorded(seed, Plan(layout=Layout.LOG, rounds=3))
        for at, record in enumerate(records):
            if record["do"] == "tell" and record["outcome"] in ("unknown", "cancelled"):
                mine = [
                    one["nonce"] for one in records[:at] if one["do"] == "token" and one["caller"] == record["caller"]
                ]
                sent = [one for one in records[:at] if one["do"] == "send" and "entry" in one]
                if again := [one for one in sent if mine and one["entry"]["nonce"] == mine[-1]]:
                    return records, at, again[-1]
    raise AssertionError("there is none")


def test_a_told_attempt_that_is_sent_again_is_not_allowed() -> None:
    records, at, request = with_a_told_attempt()
    again = {**request, "request": "again", "t": records[at]["t"]}
    assert not replay(records)
    assert [(one.line, one.rule) for one in replay([*records[: at + 1], again, *records[at + 1 :]])][:1] == [
        (at + 2, 2)
    ]


def test_the_command_prints_what_it_judged() -> None:
    command = [sys.executable, "-m", "tools.simulator.replay", "--traces", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("5 traces with ")
    assert ": 0 not allowed by the model" in done.stdout
