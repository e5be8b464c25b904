"""The examples of the page on inspecting run, one after the other."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "inspecting.md"


def test_the_examples_run_and_the_drawing_looks_as_shown(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), namespace)
    (shown,) = re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert _without_ids(capsys.readouterr().out) == _without_ids(shown)


def test_the_targets_of_log_filters_on_the_page_are_packages() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## Logging")[2]
    targets = set(re.findall(r"icechunk\.[a-z]+\b(?!\.)", section))
    assert len(targets) > 2
    assert [target for target in sorted(targets) if importlib.util.find_spec(target) is None] == []


def _without_ids(drawing: str) -> list[str]:
    return [re.sub(r"\b[0-9A-Z]{8} ", "", line).rstrip() for line in drawing.strip("\n").splitlines()]
