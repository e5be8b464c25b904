"""Both libraries commit to one branch of an object store at the same time: every commit is there, once."""

from __future__ import annotations

import os
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


@pytest.mark.parametrize(("version", "spec_version"), CASES)
def test_every_commit_of_both_is_in_history_once(
    moto_service: services.S3Service, version: str, spec_version: int
) -> None:
    if os.environ.get("ICECHUNK_REQUIRE_ORACLE") == "1":
        oracle.ensure(version)
    elif oracle.find(version) is None:
        pytest.skip(f"the official library has no environment here; `python tools/oracle.py {version}` makes one")
    service = moto_service
    place = (service.endpoint, service.access_key, service.secret_key, BUCKET, uuid.uuid4().hex)
    repo = icechunk.Repository.create(storage_on(*place), spec_version=spec_version)
    count = 6
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(oracle.run, version, "tools.interop.race", *place, "official", str(count))
        ours = []
        # Until they are there and have finished, so that both really meet.
        while not theirs.done() or len(ours) < count:
            ours += commits(repo, f"ours_{len(ours)}", 1)
    history = [info.id for info in repo.ancestry(branch="main")][::-1][1:]
    assert len(history) == len(set(history))
    assert sorted(history) == sorted([*ours, *theirs.result()])
    assert [id for id in history if id in ours] == ours
    assert [id for id in history if id not in ours] == theirs.result()
    read = icechunk.Repository.open(storage_on(*place))
    assert [info.id for info in read.ancestry(branch="main")][::-1][1:] == history
