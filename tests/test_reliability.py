"""The ledger of reliability: every machine that it names can be run."""

from __future__ import annotations

import re
from pathlib import Path

from tools.reliability import MACHINES, PROJECT, Machine, Run, page


def module_of(machine: Machine) -> Path:
    words = machine.words(10)
    path = words[0] if words[0] != "-m" else words[1].replace(".", "/")
    return PROJECT / (words[-1] if path == "pytest" else path)


def test_every_machine_is_a_program_of_this_project() -> None:
    for machine in MACHINES:
        path = module_of(machine)
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


def test_the_page_names_each_machine_its_command_and_its_figures() -> None:
    runs = [
        Run(machine=machine, words=machine.words(60), seconds=60.0, code=n % 2, figures=(f"{n} found",))
        for n, machine in enumerate(MACHINES)
    ]
    text = page(runs, "abc1234")
    assert re.findall("^## (.*)$", text, re.MULTILINE) == [m.name[0].upper() + m.name[1:] for m in MACHINES]
    assert all(f"- {n} found" in text for n in range(len(MACHINES)))
    assert text.count("**it ended with 1**") == len(MACHINES) // 2
