"""Repositories in Google's and Azure's buckets, in every layout, and written to by processes that race."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
import uuid
from collections.abc import Iterator

import pytest

import icechunk
from icechunk.log.repository.store_check import StoreCheck
from icechunk.storage.port import Storage
from tests.conftest import BUCKET
from tests.storage.obstore.fake_gcs import serving_gcs
from tests.test_layouts import LAYOUTS, by_layout, messages, read, write
from tools import services

pytest.importorskip("obstore", reason="the extra obstore")

_WRITER = """
import asyncio, pickle, sys
import icechunk

async def main():
    storage = pickle.load(sys.stdin.buffer)
    repo = await icechunk.Repository.open_async(storage)
    for n in range(4):
        while True:
            session = await repo.writable_session_async("main")
            try:
                await session.commit_async(f"{sys.argv[1]} {n}", allow_empty=True)
                break
            except icechunk.ConflictError:
                continue
    await repo.aclose()

asyncio.run(main())
"""


@pytest.fixture(params=["gcs", pytest.param("azure", marks=pytest.mark.azurite)])
def storage(request: pytest.FixtureRequest) -> Iterator[Storage]:
    prefix = uuid.uuid4().hex
    if request.param == "gcs":
        with serving_gcs() as gcs:
            yield icechunk.gcs_storage(bucket="bucket", prefix=prefix, bearer_token="t", config=gcs.config())
        return
    azurite: services.AzureService = request.getfixturevalue("azurite")
    yield icechunk.azure_storage(
        account=azurite.account,
        container=BUCKET,
        prefix=prefix,
        access_key=azurite.access_key,
        config={"endpoint": azurite.endpoint, "allow_http": "true"},
    )


@by_layout
async def test_a_repository_of_each_layout_is_made_written_and_opened_again(
    storage: Storage, asked: int | None, layout: str, version: int
) -> None:
    made = await icechunk.Repository.create_async(storage, spec_version=asked)
    first = await write(made, "a")
    await made.create_tag_async("t", first)
    await made.create_branch_async("dev", first)
    stale = await made.writable_session_async("main")
    await write(made, "b")
    with pytest.raises(icechunk.ConflictError):
        await stale.commit_async("too late", allow_empty=True)
    await made.aclose()
    repo = await icechunk.Repository.open_async(pickle.loads(pickle.dumps(storage)))
    assert repo.layout == layout
    assert await messages(repo) == ["wrote b", "wrote a", "Repository initialized"]
    assert (await read(repo, "a", tag="t")).tolist() == [float(n) for n in range(100)]
    assert await repo.list_branches_async() == {"main", "dev"}
    await repo.aclose()


@pytest.mark.thorough
@pytest.mark.parametrize(("asked", "layout", "version"), LAYOUTS[:2], ids=["log", "repo"])
async def test_no_commit_of_racing_processes_is_lost(
    storage: Storage, asked: int | None, layout: str, version: int
) -> None:
    await (await icechunk.Repository.create_async(storage, spec_version=asked)).aclose()
    given = pickle.dumps(storage)

    def race(name: str) -> None:
        subprocess.run([sys.executable, "-c", _WRITER, name], input=given, check=True, timeout=100)

    await asyncio.gather(*(asyncio.to_thread(race, name) for name in ("one", "two")))
    repo = await icechunk.Repository.open_async(storage)
    found = await messages(repo)
    assert sorted(found) == sorted(["Repository initialized", *(f"{w} {n}" for w in ("one", "two") for n in range(4))])
    await repo.aclose()


async def test_the_stores_are_seen_to_honour_conditions_before_anything_is_written(storage: Storage) -> None:
    await storage.put("immutable", b"bytes")
    check = StoreCheck(storage)
    await check.run(["immutable"])
    assert check.done
    assert (await storage.get("immutable")).data == b"bytes"
