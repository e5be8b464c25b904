"""Objects pickle here if they do in the official library; those that it refuses for safety are refused here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools import oracle
from tools.interop.pickling import outcomes

VERSION = oracle.OFFICIAL_CURRENT

TRAVEL = {
    "repository",
    "read-only session",
    "committed session",
    "fork",
    "read-only store",
    "store of a fork",
    "group in a read-only store",
    "group in a fork",
    "error",
    "conflict",
    "kind of error",
}
"""In both."""
REFUSE = dict.fromkeys(
    ["writable session", "changed session", "rearranging session", "writable store", "group in a writable store"],
    "ValueError",
)
"""In both, for two processes would write one history."""
OURS = {
    "storage on disk",
    "storage on S3",
    "credentials",
    "credentials of containers",
    "configuration",
    "container",
    "virtual chunk",
    "solver",
    "snapshot",
    "changes",
}
"""Here only; there they are objects that pickle cannot see into."""
IN_MEMORY = {"repository in memory": "InvalidInputError", "storage in memory": "InvalidInputError"}
"""Here; there such a repository pickles, and is another, empty one where it arrives."""


def test_the_listed_objects_pickle_here(tmp_path: Path) -> None:
    assert outcomes(str(tmp_path)) == dict.fromkeys(TRAVEL | OURS, "travels") | REFUSE | IN_MEMORY


@pytest.mark.oracle
def test_the_listed_objects_pickle_with_the_official_library(tmp_path: Path) -> None:
    if os.environ.get("ICECHUNK_REQUIRE_ORACLE") == "1":
        oracle.ensure(VERSION)
    elif oracle.find(VERSION) is None:
        pytest.skip(f"the official library has no environment here; `python tools/oracle.py {VERSION}` makes one")
    found = oracle.run(VERSION, "tools.interop.pickling", str(tmp_path))
    there = {name: found.pop(name) for name in (*OURS, *IN_MEMORY)}
    assert found == dict.fromkeys(TRAVEL, "travels") | REFUSE
    assert there.pop("repository in memory") == "travels"
    assert set(there.values()) <= {"TypeError", "PicklingError"}
