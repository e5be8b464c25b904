"""``inspect_*``, listings and drawings, compared with the official library's answers about the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import icechunk
from tests.official import need_official
from tools import oracle
from tools.interop.inspections import inspections, make

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(300)]

VERSION = oracle.OFFICIAL_CURRENT


@pytest.fixture(autouse=True)
def _official() -> None:
    need_official(VERSION)


def ours(path: Path) -> dict[str, Any]:
    repo = icechunk.Repository.open(icechunk.local_filesystem_storage(str(path)))
    found: dict[str, Any] = json.loads(json.dumps(inspections(repo, str(path))))
    return found


def official(path: Path, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = oracle.run(VERSION, "tools.interop.inspections", str(path), *options)
    return found


def check_equal(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    # Of history, they leave out names that point to a drawn snapshot, but are not what was asked for.
    graphs = mine.pop("graphs"), theirs.pop("graphs")
    assert mine == theirs
    assert [_without_names(graph) for graph in graphs[0].values()] == [
        _without_names(graph) for graph in graphs[1].values()
    ]


def _without_names(graph: str) -> list[list[str]]:
    return [[line[:10], line.rpartition(") ")[2][-20:]] for line in graph.splitlines()]


@pytest.mark.parametrize("spec_version", [2, 1])
def test_both_libraries_inspect_a_repository_of_theirs_equally(tmp_path: Path, spec_version: int) -> None:
    theirs = official(tmp_path, "--make", str(spec_version))
    compressed = [found[2]["compression"]["num_compressed_refs"] for found in theirs["manifests"].values()]
    assert any(compressed) == (spec_version == 2)
    check_equal(ours(tmp_path), theirs)


@pytest.mark.parametrize("spec_version", [2, 1])
def test_both_libraries_inspect_a_repository_of_ours_equally(tmp_path: Path, spec_version: int) -> None:
    make(str(tmp_path), spec_version)
    check_equal(ours(tmp_path), official(tmp_path))


def test_both_libraries_inspect_a_log_right_after_a_checkpoint_equally(tmp_path: Path) -> None:
    repo = make(str(tmp_path), None)
    repo.checkpoint()
    mine, theirs = ours(tmp_path), official(tmp_path)
    # Their `repo` shows the backups that a checkpoint names instead of those that each change would have made.
    for found in (mine, theirs):
        for update in found["repo"]["latest_updates"]:
            update.pop("backup_path", None)
        found["repo"].pop("repo_before_updates", None)
    check_equal(mine, theirs)
