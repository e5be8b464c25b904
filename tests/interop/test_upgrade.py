"""A repository of format 1 comes out of our upgrade as it does out of the official one, and both go on with either."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import icechunk
from icechunk.format.repo.codec import decode_repo
from icechunk.format.repo.repo_info import RepoInfo, RepoMigrated
from tools import oracle
from tools.interop.dump import dump
from tools.interop.generate import carry_on
from tools.interop.upgrade import upgrade

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(600)]


@pytest.fixture(params=[oracle.OFFICIAL_CURRENT, oracle.OFFICIAL_FORMAT_1])
def version(request: pytest.FixtureRequest) -> str:
    for needed in (oracle.OFFICIAL_CURRENT, request.param):
        if os.environ.get("ICECHUNK_REQUIRE_ORACLE") == "1":
            oracle.ensure(needed)
        elif oracle.find(needed) is None:
            pytest.skip(f"the official library has no environment here; `python tools/oracle.py {needed}` makes one")
    return str(request.param)


def information(path: Path) -> RepoInfo:
    return decode_repo((path / "repo").read_bytes())


def our_dump(path: Path) -> dict[str, Any]:
    return dump(icechunk.Repository.open(icechunk.local_filesystem_storage(str(path))))


def files(path: Path) -> set[str]:
    """All but those that say nothing: our lock."""
    found = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    return {name for name in found if not name.startswith(".aioicechunk/")}


def test_both_upgrades_come_to_the_same_and_either_library_goes_on(version: str, tmp_path: Path) -> None:
    official, ours = tmp_path / "official", tmp_path / "ours"
    spec = "1" if version == oracle.OFFICIAL_CURRENT else "-"
    oracle.run(version, "tools.interop.generate", str(official), "-", spec, "structured", timeout_s=300)
    shutil.copytree(official, ours)
    before = our_dump(ours)
    kinds = oracle.run(oracle.OFFICIAL_CURRENT, "tools.interop.upgrade", str(official))
    assert [type(update.kind).__name__ for update in upgrade(str(ours)).ops_log()] == kinds
    assert files(ours) == files(official)

    theirs, mine = information(official), information(ours)
    assert isinstance(mine.updates[0].change, RepoMigrated)
    assert (mine.updates[0].change, mine.updates[1:]) == (theirs.updates[0].change, theirs.updates[1:])
    assert replace(mine, updates=(), extra=None) == replace(theirs, updates=(), extra=None)

    after = {**before, "metadata": {}}
    assert our_dump(official) == our_dump(ours) == after
    assert oracle.run(oracle.OFFICIAL_CURRENT, "tools.interop.dump", str(ours), timeout_s=300) == after

    # Each goes on with what the other has upgraded.
    repo = icechunk.Repository.open(icechunk.local_filesystem_storage(str(official)))
    committed = [carry_on(repo, "dev", 0)]
    committed += oracle.run(oracle.OFFICIAL_CURRENT, "tools.interop.generate", str(official), "--carry-on", "dev", "1")
    theirs_first = oracle.run(oracle.OFFICIAL_CURRENT, "tools.interop.generate", str(ours), "--carry-on", "main", "0")
    repo = icechunk.Repository.open(icechunk.local_filesystem_storage(str(ours)))
    repo.convert("log")
    theirs_first += [carry_on(repo, "main", 1)]
    repo.checkpoint()
    for path, commits in ((official, committed), (ours, theirs_first)):
        read = our_dump(path)
        assert json.loads(json.dumps(read)) == oracle.run(oracle.OFFICIAL_CURRENT, "tools.interop.dump", str(path))
        for commit in commits:
            nodes = read["snapshots"][commit["snapshot"]]["nodes"]
            assert {path: nodes[path]["values"] for path in commit["values"]} == commit["values"]
