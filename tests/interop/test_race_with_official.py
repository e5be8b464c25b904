"""Both libraries commit to one branch of an object store at the same time: every commit is there, once."""

from __future__ import annotations

import os
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

import icechunk
from tests.conftest import BUCKET
from tools import oracle, services
from tools.interop.race import commits, storage_on

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(600)]

CASES = [
    pytest.param(oracle.OFFICIAL_CURRENT, 2, id="format 2, 2.3.0"),
    pytest.param(oracle.OFFICIAL_CURRENT, 1, id="format 1, 2.3.0"),
    pytest.param(oracle.OFFICIAL_FORMAT_1, 1, id="format 1, 1.1.21"),
]


Place = tuple[str, str, str, str, str]


@pytest.fixture(params=["moto", pytest.param("minio", marks=pytest.mark.minio)])
def place(request: pytest.FixtureRequest) -> Place:
    """A fresh prefix of a bucket, as arguments of a script."""
    name = "minio" if request.param == "minio" else "moto_service"
    service: services.S3Service = request.getfixturevalue(name)
    return (service.endpoint, service.access_key, service.secret_key, BUCKET, uuid.uuid4().hex)


def need(version: str) -> None:
    if os.environ.get("ICECHUNK_REQUIRE_ORACLE") == "1":
        oracle.ensure(version)
    elif oracle.find(version) is None:
        pytest.skip(f"the official library has no environment here; `python tools/oracle.py {version}` makes one")


@pytest.mark.parametrize(("version", "spec_version"), CASES)
def test_every_commit_of_both_is_in_history_once(place: Place, version: str, spec_version: int) -> None:
    need(version)
    repo = icechunk.Repository.create(storage_on(*place), spec_version=spec_version)
    count = 6
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(oracle.run, version, "tools.interop.race", *place, "official", str(count))
        ours: list[str] = []
        pause = 0.0
        # Until they are there and have finished, so that both really meet.
        while not theirs.done() or len(ours) < count:
            # The quicker library wins every race: without growing pauses the other would never have a turn.
            alone = bool(ours) and repo.lookup_branch("main") == ours[-1]
            pause = min(2 * pause + 0.01, 5.0) if alone else 0.0
            time.sleep(pause)
            ours += commits(repo, f"ours_{len(ours)}", 1)
    history = [info.id for info in repo.ancestry(branch="main")][::-1][1:]
    assert len(history) == len(set(history))
    assert sorted(history) == sorted([*ours, *theirs.result()])
    assert [id for id in history if id in ours] == ours
    assert [id for id in history if id not in ours] == theirs.result()
    read = icechunk.Repository.open(storage_on(*place))
    assert [info.id for info in read.ancestry(branch="main")][::-1][1:] == history


@pytest.mark.parametrize("version", [oracle.OFFICIAL_CURRENT, oracle.OFFICIAL_FORMAT_1])
def test_commits_of_the_official_library_during_our_upgrade_are_kept(place: Place, version: str) -> None:
    need(version)
    repo = icechunk.Repository.create(storage_on(*place), spec_version=1)
    first = repo.lookup_branch("main")
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(oracle.run, version, "tools.interop.race", *place, "official", "until-refused")
        # Until they are in full swing.
        while repo.lookup_branch("main") == first and not theirs.done():
            pass
        upgraded = icechunk.upgrade_icechunk_repository(repo, dry_run=False)
        acknowledged = theirs.result()
    history = [info.id for info in upgraded.ancestry(branch="main")][::-1][1:]
    assert acknowledged
    # An unacknowledged one may have landed: its answer met the end of format 1.
    assert history[: len(acknowledged)] == acknowledged
    assert len(history) <= len(acknowledged) + 1


def test_our_conversions_and_the_official_librarys_commits_at_the_same_time_lose_nothing(place: Place) -> None:
    need(oracle.OFFICIAL_CURRENT)
    repo = icechunk.Repository.create(storage_on(*place), spec_version=2)
    first = repo.lookup_branch("main")
    acknowledged: list[str] = []
    for life in range(2):
        with ThreadPoolExecutor(1) as pool:
            theirs = pool.submit(
                oracle.run, oracle.OFFICIAL_CURRENT, "tools.interop.race", *place, f"life{life}", "until-refused"
            )
            while repo.lookup_branch("main") == first and not theirs.done():
                pass
            repo.convert("log")
            found = theirs.result()
        assert found
        acknowledged += [*found, *commits(repo, f"ours{life}", 1)]
        history = [info.id for info in repo.ancestry(branch="main")][::-1][1:]
        assert [id for id in history if id in set(acknowledged)] == acknowledged
        repo.convert("repo")
        first = repo.lookup_branch("main")
