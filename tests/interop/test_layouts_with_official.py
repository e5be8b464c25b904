"""Both libraries on one repository, in the layouts of the published format: each reads and continues the other's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import icechunk
from tools import oracle
from tools.interop.dump import dump
from tools.interop.generate import carry_on, generate

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(600)]

CASES = [
    pytest.param((oracle.OFFICIAL_CURRENT, 2), id="format 2, 2.3.0"),
    pytest.param((oracle.OFFICIAL_CURRENT, 1), id="format 1, 2.3.0"),
    pytest.param((oracle.OFFICIAL_FORMAT_1, 1), id="format 1, 1.1.21"),
]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, int]:
    version: str = request.param[0]
    if os.environ.get("ICECHUNK_REQUIRE_ORACLE") == "1":
        oracle.ensure(version)
    elif oracle.find(version) is None:
        pytest.skip(f"the official library has no environment here; `python tools/oracle.py {version}` makes one")
    return version, request.param[1]


class Official:
    """The official library, on a folder."""

    def __init__(self, version: str, path: Path) -> None:
        self._version = version
        self._path = str(path)

    def generate(self, spec_version: int) -> dict[str, Any]:
        # 1.x takes no version; and their zarr may be newer than ours, which writes structured types differently.
        version = str(spec_version) if self._version == oracle.OFFICIAL_CURRENT else "-"
        result: dict[str, Any] = oracle.run(
            self._version, "tools.interop.generate", self._path, "-", version, "structured", timeout_s=300
        )
        return result

    def dump(self) -> dict[str, Any]:
        result: dict[str, Any] = oracle.run(self._version, "tools.interop.dump", self._path, timeout_s=300)
        return result

    def carry_on(self, branch: str, *numbers: int) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = oracle.run(
            self._version, "tools.interop.generate", self._path, "--carry-on", branch, *map(str, numbers)
        )
        return result


@pytest.fixture
def official(case: tuple[str, int], tmp_path: Path) -> Official:
    return Official(case[0], tmp_path)


@pytest.fixture
def ours(tmp_path: Path) -> Callable[[], icechunk.Repository]:
    return lambda: icechunk.Repository.open(icechunk.local_filesystem_storage(str(tmp_path)))


def values(dumped: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The digests of all arrays, by snapshot and path."""
    return {
        snapshot: {path: node["values"] for path, node in found["nodes"].items() if "values" in node}
        for snapshot, found in dumped["snapshots"].items()
    }


def check_commits(dumped: dict[str, Any], commits: list[dict[str, Any]]) -> None:
    """Each is in history, with what it was to hold."""
    for commit in commits:
        found = dumped["snapshots"][commit["snapshot"]]["nodes"]
        assert {path: found[path]["values"] for path in commit["values"]} == commit["values"]


def test_their_repositories_read_the_same_with_ours_which_continues_them(
    case: tuple[str, int], official: Official, ours: Callable[[], icechunk.Repository]
) -> None:
    expected = official.generate(case[1])
    repo = ours()
    assert repo.layout == ("repo" if case[1] == 2 else "refs")
    assert repo.spec_version == case[1]
    dumped = dump(repo)
    assert values(dumped) == expected
    assert dumped == official.dump()
    commits = [carry_on(repo, "main", 0), carry_on(repo, "main", 1)]
    repo.create_tag("ours", commits[0]["snapshot"])
    repo.create_branch("our-branch", commits[1]["snapshot"])
    repo.delete_tag("v1")
    read = official.dump()
    assert read == dump(ours())
    check_commits(read, commits)
    assert read["branches"]["main"] == commits[1]["snapshot"] == read["branches"]["our-branch"]
    assert "v1" not in read["tags"]
    assert read["tags"]["ours"] == commits[0]["snapshot"]


def test_our_repositories_read_the_same_with_theirs_which_continues_them(
    case: tuple[str, int], tmp_path: Path, official: Official, ours: Callable[[], icechunk.Repository]
) -> None:
    expected = generate(icechunk.local_filesystem_storage(str(tmp_path)), spec_version=case[1])
    read = official.dump()
    assert values(read) == expected
    assert read == dump(ours())
    commits = official.carry_on("main", 0, 1)
    dumped = dump(ours())
    check_commits(dumped, commits)
    assert dumped == official.dump()


def test_commits_of_both_alternate_on_one_branch(
    case: tuple[str, int], tmp_path: Path, official: Official, ours: Callable[[], icechunk.Repository]
) -> None:
    repo = icechunk.Repository.create(icechunk.local_filesystem_storage(str(tmp_path)), spec_version=case[1])
    commits = [carry_on(repo, "main", 0)]
    commits += official.carry_on("main", 1, 2)
    # The same object goes on without being opened again.
    commits += [carry_on(repo, "main", 3)]
    commits += official.carry_on("main", 4)
    commits += [carry_on(repo, "main", 5)]
    read = official.dump()
    assert read == dump(ours())
    check_commits(read, commits)
    assert read["history"]["branch main"][:-1] == [commit["snapshot"] for commit in reversed(commits)]


def test_a_session_that_began_before_their_commit_conflicts(
    case: tuple[str, int], tmp_path: Path, official: Official
) -> None:
    repo = icechunk.Repository.create(icechunk.local_filesystem_storage(str(tmp_path)), spec_version=case[1])
    session = repo.writable_session("main")
    before = session.snapshot_id
    [theirs] = official.carry_on("main", 0)
    with pytest.raises(icechunk.ConflictError) as refused:
        session.commit("too late", allow_empty=True)
    assert (refused.value.expected_parent, refused.value.actual_parent) == (before, theirs["snapshot"])


def test_the_official_library_writes_a_converted_repository_until_it_is_converted_back(tmp_path: Path) -> None:
    if oracle.find(oracle.OFFICIAL_CURRENT) is None:
        pytest.skip("the official library has no environment here; `python tools/oracle.py 2.3.0` makes one")
    official = Official(oracle.OFFICIAL_CURRENT, tmp_path)
    repo = icechunk.Repository.create(icechunk.local_filesystem_storage(str(tmp_path)))
    commits = [carry_on(repo, "main", 0)]
    with pytest.raises(oracle.OracleError, match="read-only"):  # words: the official library's own
        official.carry_on("main", 1)
    repo.convert("repo")
    commits += official.carry_on("main", 1)
    commits += [carry_on(repo, "main", 2)]
    repo.convert("log")
    with pytest.raises(oracle.OracleError, match="read-only"):  # words: the official library's own
        official.carry_on("main", 3)
    commits += [carry_on(repo, "main", 3)]
    repo.checkpoint()
    read = official.dump()
    assert read == dump(icechunk.Repository.open(icechunk.local_filesystem_storage(str(tmp_path))))
    check_commits(read, commits)
