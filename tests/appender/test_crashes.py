"""An appender that is killed at any moment: what was committed is there once, and the next one goes on behind it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tools import kill_appender


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killed_services_neither_lose_nor_double_a_row() -> None:
    found = kill_appender.run(6, seed=1)
    assert found.problems == ()
    assert found.rows > 0


def test_the_page_about_appending_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "appending.md").read_text(encoding="utf-8")
    for source in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(compile(source, "docs/appending.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.startswith("99 ")
