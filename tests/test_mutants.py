"""The mutants fit the code as it is: a table of changes that cannot be made would prove nothing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tools.mutant_list import CONTROL, MUTANTS, Mutant
from tools.mutants import read_records

PROJECT = Path(__file__).parent.parent


@pytest.mark.parametrize("mutant", [CONTROL, *MUTANTS], ids=lambda mutant: mutant.name)
def test_a_mutant_changes_its_file_and_leaves_valid_python(mutant: Mutant) -> None:
    text = (PROJECT / mutant.file).read_text(encoding="utf-8")
    changed = mutant.apply(text)
    assert (changed == text) == (mutant is CONTROL)
    ast.parse(changed)
    assert all((PROJECT / path).exists() for tests in mutant.tests for path in tests.split())


def test_the_tests_that_caught_mutants_exist() -> None:
    """After a test is renamed, its name in the records, and in the page that is made of them, has to be changed too."""
    for found in read_records().values():
        for path, name in re.findall(r"(tests/\S+?\.py)::(test_\w+)", found.by or ""):
            assert f"def {name}(" in (PROJECT / path).read_text(encoding="utf-8"), (found.name, path, name)


def test_there_are_enough_mutants_and_no_name_twice() -> None:
    assert len(MUTANTS) >= 60
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
