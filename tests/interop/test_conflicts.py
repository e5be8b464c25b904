"""Two sessions at once have the same result in both libraries, except where the official one loses one side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.official import need_official
from tools import oracle
from tools.interop.conflicts import answers

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(600)]

OURS_ALONE = {
    # The official library lets these pass: then /h/y cannot be found from the root any more,
    "new node in a deleted group": "NewNodeInInvalidGroup",
    # their node cannot,
    "new node, deleted group around it": "DeleteOfUpdatedGroup",
    # one of the two arrays is overwritten,
    "made anew, made anew": "NewNodeConflictsWithExistingNode",
    # or the commit after the rebase fails.
    "deleted array, move": "MoveOperationCannotBeRebased",
}


@pytest.fixture(autouse=True)
def _official() -> None:
    need_official()


def test_conflicts_and_their_solutions_are_those_of_the_official_library(tmp_path: Path) -> None:
    theirs = oracle.run(oracle.OFFICIAL_CURRENT, "tools.interop.conflicts", str(tmp_path / "official"), timeout_s=300)
    ours = json.loads(json.dumps(answers(str(tmp_path / "ours"))))
    for found in ours.values():
        for conflict in (one for each in found.values() if isinstance(each, list) for one in each):
            # Ours names the node that moved, the official library nothing.
            if conflict[0] == "MoveOperationCannotBeRebased":
                conflict[1] = ""
    assert ours.keys() == theirs.keys()
    different = {name for name in ours if ours[name] != theirs[name]}
    assert {name: (ours[name], theirs[name]) for name in different - OURS_ALONE.keys()} == {}
    for name, conflict in OURS_ALONE.items():
        assert [found[0] for found in ours[name]["detect"]] == [conflict]
