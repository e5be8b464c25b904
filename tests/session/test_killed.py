"""Processes that hold persisted sessions are killed at random moments; each session is committed once, whole."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tools.kill_sessions import Runs

pytestmark = pytest.mark.thorough


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL, and processes by fork")
def test_sessions_whose_processes_are_killed_are_committed_once_and_whole(tmp_path: Path) -> None:
    runs = Runs(str(tmp_path / "repo"), kills=20, seed=1)
    runs.run(at_once=2)
    runs.check()
    assert runs.failures == []
    assert runs.counts["kills"] == 20
    assert runs.counts["committed"] + runs.counts["session-committed"] == len(runs.names)


def test_the_page_about_sessions_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "sessions.md").read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "__main__"}
    for source in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(compile(source, "docs/sessions.md", "exec"), names)
    assert capsys.readouterr().out.splitlines() == ["1 session to go on with", "committed 1 time", "4 forks"]
