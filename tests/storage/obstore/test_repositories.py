"""Repositories on Azure and on Google Cloud Storage: what a repository needs of them beyond the storage contract."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

import icechunk
from icechunk.config import StorageRetriesSettings, StorageSettings
from icechunk.credentials import azure_credentials, gcs_credentials
from icechunk.errors import ConflictError
from icechunk.format.ids import FIRST_SNAPSHOT
from icechunk.log.repository import objects
from icechunk.log.repository.create import create_log
from icechunk.log.repository.entries import client as log_view
from icechunk.log.repository.entries import layout
from icechunk.log.repository.entries import reader as log_reader
from icechunk.log.repository.entry import slot_key
from icechunk.log.repository.open import open_repository
from icechunk.runtime.clock import Sources
from icechunk.storage.obstore.buckets import AzureContainer, GcsBucket
from icechunk.storage.obstore.storage import ObstoreStorage
from icechunk.storage.port import Storage
from icechunk.testing.scripted import ManualClock, Request, ScriptedStorage, Send
from tests.conftest import BUCKET
from tests.log.repository.strategies import an_id
from tests.log.repository.world import open_log
from tests.maintenance.helpers import AgedStorage, History, ago, by_layout, folders, sizes
from tests.storage.obstore.fake_gcs import serving_gcs
from tools import services
from tools.simulator.simulation import commit_proposal

pytestmark = pytest.mark.thorough

pytest.importorskip("obstore", reason="the extra obstore")

QUICK = StorageSettings(retries=StorageRetriesSettings(max_tries=4, initial_backoff_ms=5))
DAY_S = 24 * 3600.0
HEADERS: dict[str, Any] = {"read_headers": {}, "write_headers": {}}


@pytest.fixture(params=[pytest.param("azure", marks=pytest.mark.azurite), "gcs"])
def bucket(request: pytest.FixtureRequest) -> Iterator[Storage]:
    """An empty storage in a bucket, of the machine's own clock."""
    root = f"{uuid.uuid4().hex}/"
    sources = Sources()
    if request.param == "azure":
        service: services.AzureService = request.getfixturevalue("azurite")
        azure = AzureContainer(
            service.account,
            BUCKET,
            root,
            credentials=azure_credentials(access_key=service.access_key),
            config={"endpoint": service.endpoint, "allow_http": "true"},
            sources=sources,
            **HEADERS,
        )
        yield ObstoreStorage(azure, QUICK)
        return
    with serving_gcs() as server:
        # Several pages of every listing.
        server.page = 7
        gcs = GcsBucket(
            "bucket",
            root,
            credentials=gcs_credentials(bearer_token="t"),
            config=server.config(),
            sources=sources,
            **HEADERS,
        )
        yield ObstoreStorage(gcs, QUICK)


# -- rule 5: the store does not say when it answered ------------------------------------------------------------------


def without_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (layout, log_view, log_reader, objects):
        monkeypatch.setattr(module, "is_fresh", lambda freshness, answer: True)


class Clocks:
    """A client's two clocks, of which a sleep may stop one."""

    def __init__(self) -> None:
        self.manual = ManualClock()
        self.behind_us = 0
        """Lag of the clock that never goes back, µs."""

    def sources(self) -> Sources:
        theirs = self.manual.sources()
        return Sources(
            wall_us=theirs.wall_us,
            elapsed_us=lambda: self.manual.now_us - self.behind_us,
            random_bytes=theirs.random_bytes,
            sleep=theirs.sleep,
        )


@pytest.mark.parametrize("stopped", [False, True], ids=["both clocks", "wall clock alone"])
@pytest.mark.parametrize("rule", [True, False])
async def test_a_writer_that_slept_while_its_slot_was_pruned_does_not_report_a_commit(
    bucket: Storage, rule: bool, stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not rule:
        without_proof(monkeypatch)
    clocks = Clocks()
    storage = ScriptedStorage(bucket)
    log = await create_log(storage, clocks.sources())
    await log.prepare_writes()
    other = await open_log(bucket, clocks.manual.sources())
    slept = False

    async def sleep_before_sending(request: Request, send: Send) -> object:
        nonlocal slept
        if request.verb == "put" and request.key.startswith("log/") and not slept:
            slept = True
            for i in (1, 2):
                await other.append(commit_proposal(an_id(i), "main", now_us=clocks.manual.now_us))
            await other.checkpoint()
            clocks.manual.move(7.1 * DAY_S)
            if stopped:
                clocks.behind_us += int(7.1 * DAY_S * 1e6)
            await bucket.delete([slot_key(other.epoch, n) for n in (1, 2)])
        answer = await send()
        assert getattr(answer, "date_us", None) is None, "then the store's own clock would be the proof"
        return answer

    storage.script = sleep_before_sending
    try:
        await log.append(commit_proposal(an_id(9), "main", parent=FIRST_SNAPSHOT, now_us=clocks.manual.now_us))
        acknowledged = True
    except ConflictError:
        acknowledged = False
    for each in (log, other):
        await each.aclose()
    assert slept
    assert acknowledged is not rule


@pytest.mark.parametrize("rule", [True, False])
async def test_a_reader_that_slept_does_not_take_a_pruned_slot_for_the_end_of_the_log(
    bucket: Storage, rule: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not rule:
        without_proof(monkeypatch)
    clocks = Clocks()
    log = await create_log(bucket, clocks.sources())
    reader = await open_repository(bucket, clocks.sources())
    await log.append(commit_proposal(an_id(1), "main", parent=None, now_us=clocks.manual.now_us))
    await log.checkpoint()
    clocks.manual.move(3.6 * DAY_S)
    await bucket.delete([slot_key(log.epoch, 1)])
    state = await reader.refresh()
    assert (state.branch_tip("main") == an_id(1)) is rule
    for each in (log, reader):
        await each.aclose()


# -- upkeep -----------------------------------------------------------------------------------------------------------


@by_layout
async def test_expired_objects_are_collected_and_others_stay(bucket: Storage, version: int | None) -> None:
    history = await History.create(AgedStorage(bucket), version)
    await history.repo.create_branch_async("gone", history.ids["first"])
    await history.commit("g1", 1, branch="gone")
    await history.repo.delete_branch_async("gone")
    await history.commit("c1", 3)
    c1 = await history.commit("c2", 4)
    when = (await history.repo.lookup_snapshot_async(c1)).written_at
    expired = await history.repo.expire_snapshots_async(when)
    assert {history.ids["first"], history.ids["c1"]} <= set(expired)
    await history.repo.checkpoint_async()  # so that files embedded in a log's entries are objects
    before = await sizes(bucket)
    # Nothing is as old as that by the store's own times: they come with the listing.
    young = await icechunk.Repository.open_async(bucket)
    assert (await young.garbage_collect_async(ago(hours=1))).bytes_deleted == 0
    await young.aclose()
    dry = await history.repo.garbage_collect_async(ago(hours=-1), dry_run=True)
    assert await sizes(bucket) == before
    done = await history.repo.garbage_collect_async(ago(hours=-1))
    assert done == dry
    after = await sizes(bucket)
    gone = {key: before[key] for key in before.keys() - after.keys()}
    found = folders(gone)
    assert (found["snapshots"], found["manifests"], found["chunks"]) == (
        done.snapshots_deleted,
        done.manifests_deleted,
        done.chunks_deleted,
    )
    assert found["snapshots"] == 3
    assert sum(gone.values()) == done.bytes_deleted
    assert (done.objects_failed_to_delete, done.delete_errors) == (0, [])
    await history.check({"c2"})
    await history.commit("c3", 5)
    await history.check({"c2", "c3"})
    await history.repo.aclose()
