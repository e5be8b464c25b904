"""The ledger of reliability: every machine that it names can be run, and what was recorded is on the page."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tools import reliability
from tools.reliability import MACHINES, NOT_EXPLAINED, PAGE, PROJECT, Machine, Run, keep, page, read_runs, record


def program_of(machine: Machine, *, long: bool) -> Path:
    words = machine.words(long=long)
    path = words[0] if words[0] != "-m" else words[1].replace(".", "/")
    return PROJECT / (words[-1] if path == "pytest" else path)


@pytest.mark.parametrize("long", [False, True])
def test_every_machine_is_a_program_of_this_project(long: bool) -> None:
    for machine in MACHINES:
        path = program_of(machine, long=long)
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


def a_run(machine: Machine, *, long: bool, code: int = 0, figure: str = "7 found") -> Run:
    words = machine.words(long=long)
    return Run(
        name=machine.name,
        long=long,
        words=words,
        date="2026-01-02",
        commit="abc1234",
        seconds=7200.0 if long else 60.0,
        code=code,
        figures=[figure],
    )


def test_the_page_names_each_machine_its_commands_and_its_figures() -> None:
    runs = [a_run(machine, long=long, code=n % 2) for n, machine in enumerate(MACHINES) for long in (False, True)]
    text = page(runs)
    assert re.findall("^## (.*)$", text, re.MULTILINE) == [machine.name for machine in MACHINES]
    assert text.count("- 7 found") == 2 * len(MACHINES)
    assert text.count("**it ended with 1**") == 2 * (len(MACHINES) // 2)
    assert text.count(f"What was found: {NOT_EXPLAINED}") == 2 * (len(MACHINES) // 2)
    assert "What was found: a known limit." in page([replace(runs[-1], code=1, note="a known limit.")])
    assert text.count("2.0 h") == 2 * len(MACHINES)
    for machine in MACHINES:
        assert f"`python {' '.join(machine.words(long=True))}`" in text


def test_the_newest_run_of_each_kind_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reliability, "RECORDS", tmp_path / "runs.json")
    first, last = MACHINES[0], MACHINES[-1]
    for run in (
        a_run(last, long=False),
        a_run(first, long=True),
        a_run(first, long=False, figure="old"),
        a_run(first, long=False, figure="new"),
    ):
        keep(run)
    found = read_runs()
    assert [(run.name, run.long) for run in found] == [(first.name, False), (first.name, True), (last.name, False)]
    assert found[0].figures == ["new"]


def test_figures_are_the_lines_that_the_machine_prints() -> None:
    simulator = MACHINES[0]
    said = "seed 7 (log): bad\n10 schedules in 1 s\nseeds 0 to 9\n0 schedules broke a promise\n"
    assert record(simulator, ["x"], said, long=False, seconds=1, code=0).figures == said.splitlines()[1:]


def test_the_page_is_that_of_the_records() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(read_runs())
