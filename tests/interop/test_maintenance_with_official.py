"""Expiration and collection do what the official library's do, and each reads and continues what the other left."""

from __future__ import annotations

import asyncio
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import zarr

import icechunk
from icechunk.format.ids import object_id_from_text
from icechunk.format.snapshot.codec import decode_snapshot
from tests.maintenance.test_repack import window
from tools import oracle
from tools.interop.dump import dump
from tools.interop.generate import carry_on, generate, publish
from tools.interop.maintain import maintain

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(600)]

CASES = [
    pytest.param((oracle.OFFICIAL_CURRENT, 2), id="format 2, 2.3.0"),
    pytest.param((oracle.OFFICIAL_CURRENT, 1), id="format 1, 2.3.0"),
    pytest.param((oracle.OFFICIAL_FORMAT_1, 1), id="format 1, 1.1.21"),
]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, int]:
    require(request.param[0])
    version: tuple[str, int] = request.param
    return version


def require(version: str) -> None:
    if os.environ.get("ICECHUNK_REQUIRE_ORACLE") == "1":
        oracle.ensure(version)
    elif oracle.find(version) is None:
        pytest.skip(f"the official library has no environment here; `python tools/oracle.py {version}` makes one")


def ours(path: Path) -> icechunk.Repository:
    return icechunk.Repository.open(icechunk.local_filesystem_storage(str(path)))


def theirs(version: str, module: str, path: Path, *arguments: object) -> Any:
    return oracle.run(version, f"tools.interop.{module}", str(path), *map(str, arguments), timeout_s=300)


def files(path: Path) -> dict[str, int]:
    """The objects that a collection may delete, with sizes; snapshots that were written again may differ."""
    return {
        f"{folder}/{file.name}": 0 if folder == "snapshots" else file.stat().st_size
        for folder in ("snapshots", "transactions", "manifests", "chunks")
        if (path / folder).is_dir()
        for file in (path / folder).iterdir()
    }


def middle_us(repo: icechunk.Repository) -> int:
    """A time after about half of the commits to main."""
    infos = list(repo.ancestry(branch="main"))
    return int(infos[len(infos) // 2].written_at.timestamp() * 1e6) + 2


def test_both_expire_and_collect_the_same(case: tuple[str, int], tmp_path: Path) -> None:
    # The formats differ most in the objects that a ref keeps; without refs they agree.
    flags: tuple[str, ...] = ("branches", "tags") if case == (oracle.OFFICIAL_CURRENT, 1) else ()
    version, spec = case
    mine, their = tmp_path / "mine", tmp_path / "theirs"
    mine.mkdir()
    generate(icechunk.local_filesystem_storage(str(mine)), spec_version=spec)
    repo = ours(mine)
    tip = repo.lookup_branch("main")
    repo.create_branch("abandoned", tip)
    carry_on(repo, "abandoned", 0)
    repo.delete_branch("abandoned")
    shutil.copytree(mine, their)
    limit = middle_us(repo)
    done = maintain(ours(mine), limit, branches="branches" in flags, tags="tags" in flags)
    expected = theirs(version, "maintain", their, limit, *flags)
    if version == oracle.OFFICIAL_FORMAT_1 or spec == 1:
        # Snapshots that are written again compress differently.
        for found in (done, expected):
            found["dry"].pop("bytes_deleted")
            found["collected"].pop("bytes_deleted")
    assert done == expected
    assert done["collected"]["snapshots_deleted"] > 0
    assert files(mine) == files(their)
    read = theirs(version, "dump", mine)
    assert read == dump(ours(mine))
    assert read == theirs(version, "dump", their)
    # Each goes on with what the other has left.
    commits = [carry_on(ours(their), "main", 0), *theirs(version, "generate", mine, "--carry-on", "main", 0)]
    for path, commit in zip((their, mine), commits, strict=True):
        assert ours(path).lookup_branch("main") == commit["snapshot"]


def test_the_official_library_commits_and_collects_beside_persisted_sessions(
    case: tuple[str, int], tmp_path: Path
) -> None:
    version, spec = case
    generate(icechunk.local_filesystem_storage(str(tmp_path)), spec_version=spec)
    repo = ours(tmp_path)
    limit = middle_us(repo)
    session = repo.writable_session("main")
    # Small chunks, so they are in the segment: objects would be taken by a collection up to the present.
    zarr.create_array(session.store, name="surviving", shape=(4,), chunks=(2,), dtype="f8")[:] = 7
    id = session.checkpoint()
    segments = sorted((tmp_path / "sessions").rglob("*"))
    (commit, *_) = theirs(version, "generate", tmp_path, "--carry-on", "main", 0)
    theirs(version, "maintain", tmp_path, limit)
    assert sorted((tmp_path / "sessions").rglob("*")) == segments
    resumed = ours(tmp_path).resume_session(id)
    snapshot = resumed.commit("survived", rebase_with=icechunk.ConflictDetector())
    assert [info.id for info in ours(tmp_path).ancestry(branch="main")][:2] == [snapshot, commit["snapshot"]]
    assert theirs(version, "dump", tmp_path) == dump(ours(tmp_path))


def test_the_official_library_reads_a_log_after_maintenance(tmp_path: Path) -> None:
    require(oracle.OFFICIAL_CURRENT)
    generate(icechunk.local_filesystem_storage(str(tmp_path)))
    repo = ours(tmp_path)
    before = len(files(tmp_path))
    done = maintain(repo, middle_us(repo), branches=True, tags=True)
    assert done["collected"]["snapshots_deleted"] > 0
    assert len(files(tmp_path)) < before
    publish(repo)
    read = theirs(oracle.OFFICIAL_CURRENT, "dump", tmp_path)
    assert read == dump(ours(tmp_path))
    commit = carry_on(repo, "main", 0)
    publish(repo)
    assert theirs(oracle.OFFICIAL_CURRENT, "dump", tmp_path)["branches"]["main"] == commit["snapshot"]


def test_a_snapshot_of_format_1_is_written_again_with_nothing_else_changed(tmp_path: Path) -> None:
    require(oracle.OFFICIAL_FORMAT_1)
    generate(icechunk.local_filesystem_storage(str(tmp_path)), spec_version=1)
    other = tmp_path.with_name("other")
    shutil.copytree(tmp_path, other)
    limit = middle_us(ours(tmp_path))
    before = {file.name: file.read_bytes() for file in (tmp_path / "snapshots").iterdir()}
    maintain(ours(tmp_path), limit)
    theirs(oracle.OFFICIAL_FORMAT_1, "maintain", other, limit)
    changed = 0
    for file in (tmp_path / "snapshots").iterdir():
        mine = decode_snapshot(file.read_bytes())
        assert mine == decode_snapshot((other / "snapshots" / file.name).read_bytes())
        if file.read_bytes() != before[file.name]:
            changed += 1
            assert mine.parent_id == object_id_from_text("1CECHNKREP0F1RSTCMT0")
    assert changed


@pytest.mark.parametrize("version", [None, 2, 1], ids=["log", "repo", "refs"])
def test_the_official_library_reads_and_continues_a_repacked_repository(tmp_path: Path, version: int | None) -> None:
    require(oracle.OFFICIAL_CURRENT)
    asyncio.run(window(icechunk.local_filesystem_storage(str(tmp_path)), version))
    repo = ours(tmp_path)
    parent = list(repo.ancestry(branch="main"))[1]
    repo.create_tag("yesterday", parent.id)
    repo.expire_snapshots(parent.written_at)
    before = dump(repo)
    done = repo.garbage_collect(datetime.now(UTC), repack_below_percent=100)
    assert done.snapshots_rewritten == 2
    publish(repo)
    read = theirs(oracle.OFFICIAL_CURRENT, "dump", tmp_path)
    assert read == dump(ours(tmp_path))
    assert contents(read, "branch main") == contents(before, "branch main")
    assert contents(read, "tag yesterday") == contents(before, "tag yesterday")
    if version is not None:
        # Nothing is left for it to collect, and nothing that it collects is missed.
        result = theirs(oracle.OFFICIAL_CURRENT, "maintain", tmp_path)
        assert result["collected"]["chunks_deleted"] == result["collected"]["manifests_deleted"] == 0
        assert dump(ours(tmp_path)) == read


def contents(dumped: dict[str, Any], ref: str) -> list[dict[str, Any]]:
    """The contents of each snapshot of a ref's history, newest first, without the ids."""
    return [
        {name: value for name, value in dumped["snapshots"][id].items() if name != "parent"}
        for id in dumped["history"][ref]
    ]
