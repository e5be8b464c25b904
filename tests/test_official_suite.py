"""The comparison of the official library's own tests: which count as passed, and which differences are explained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.official_suite import compare, outcomes, reason


def test_a_test_passes_if_none_of_its_phases_fails(tmp_path: Path) -> None:
    crash = {"reprcrash": {"message": "AssertionError: no\nmore"}}
    lines: list[dict[str, Any]] = [
        {"$report_type": "SessionStart"},
        *({"nodeid": "x/tests/a.py::ok", "when": when, "outcome": "passed"} for when in ("setup", "call", "teardown")),
        {"nodeid": "x/tests/a.py::bad", "when": "setup", "outcome": "passed"},
        {"nodeid": "x/tests/a.py::bad", "when": "call", "outcome": "failed", "longrepr": crash},
        {"nodeid": "x/tests/a.py::late", "when": "call", "outcome": "passed"},
        {"nodeid": "x/tests/a.py::late", "when": "teardown", "outcome": "failed", "longrepr": "text\nlast line"},
        {"nodeid": "x/tests/a.py::left out", "when": "setup", "outcome": "skipped", "longrepr": "skipped"},
        {"nodeid": "x/tests/a.py::e[VersionSelection.UseTheirs]", "when": "call", "outcome": "passed"},
    ]
    report = tmp_path / "report"
    report.write_text("\n".join(json.dumps({"$report_type": "TestReport", **line}) for line in lines))
    found, messages = outcomes(report)
    assert found == {
        "a.py::ok": "passed",
        "a.py::bad": "failed",
        "a.py::late": "failed",
        "a.py::left out": "skipped",
        "a.py::e[on_chunk_conflict1]": "passed",
    }
    assert messages == {"a.py::bad": "AssertionError: no", "a.py::late": "last line", "a.py::left out": "skipped"}


def test_only_tests_that_pass_on_the_wheel_and_not_here_are_different() -> None:
    wheel = {"both": "passed", "gone": "passed", "worse": "passed", "neither": "failed", "better": "failed"}
    assert compare(wheel, {"both": "passed", "worse": "failed", "neither": "failed", "better": "passed"}) == [
        "gone",
        "worse",
    ]


@pytest.mark.parametrize(
    ("test", "explained"),
    [
        ("test_gc.py::test_expire_and_gc[no-spec-version-True]", True),
        ("test_gc.py::test_expire_and_gc[spec-v2-True]", False),
        ("test_store.py::test_anything", False),
    ],
)
def test_differences_are_explained_for_the_tests_that_they_concern(test: str, explained: bool) -> None:
    assert (reason(test) is not None) == explained
