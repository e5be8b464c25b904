"""The files for people: links and paths lead somewhere, and hosted CI runs the steps of ``.ci/run``."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for folder in (".", "docs", "changelog.d", ".github") for path in (ROOT / folder).glob("*.md"))
PATH = re.compile(r"`((?:icechunk|tests|tools|docs|spec|examples|changelog\.d|\.ci|\.github)/[\w./-]*)`")


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_and_paths_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            place, _, anchor = target.partition("#")
            file = path.parent / place if place else path
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target
    assert [name for name in PATH.findall(text) if not (ROOT / name).exists()] == []


def test_hosted_ci_runs_every_step_once() -> None:
    listed = subprocess.run(["bash", ROOT / ".ci" / "run", "--list"], capture_output=True, text=True, check=True)
    job = read_yaml(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["run"]
    hosted = [step for steps in job["strategy"]["matrix"]["steps"] for step in steps.split()]
    assert sorted(hosted) == sorted(listed.stdout.split())
    assert job["steps"][-1]["run"] == "bash .ci/run ${{ matrix.steps }}"


def test_the_paths_in_the_steps_are_there() -> None:
    named = re.findall(r"(?<![\w/$}])(?:tests|tools)/[\w./-]+", (ROOT / ".ci" / "run").read_text("utf-8"))
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_a_step_that_is_not_there_is_refused_before_anything_runs() -> None:
    done = subprocess.run(["bash", ROOT / ".ci" / "run", "wheels"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "wheels" in done.stderr


def test_hooks_run_the_commands_of_the_lint_step() -> None:
    (repo,) = read_yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    run = (ROOT / ".ci" / "run").read_text("utf-8")
    for hook in repo["hooks"]:
        program, command = hook["entry"].split()[:2]
        assert f"{program} {command}" in run, hook["id"]


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")), ids=lambda path: path.name)
def test_issue_forms_have_the_fields_that_the_hosting_site_requires(path: Path) -> None:
    form = read_yaml(path)
    if path.stem == "config":
        assert form["blank_issues_enabled"] is True
        return
    assert {"name", "description", "body"} <= set(form)
    ids = [item["id"] for item in form["body"] if item["type"] != "markdown"]
    assert len(ids) == len(set(ids)) > 0
    assert all(item["attributes"].get("label") or item["attributes"].get("value") for item in form["body"])
