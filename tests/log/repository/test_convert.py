"""Conversion between log and repo object while others write, under lost, late and doubled requests."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from icechunk.errors import CommitOutcomeUnknown, SessionStateError
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId
from icechunk.format.keys import snapshot_key
from icechunk.format.repo.repo_info import SnapshotRecord
from icechunk.format.snapshot.codec import encode_snapshot
from icechunk.format.values import Snapshot
from icechunk.log.repository.convert import convert_log
from icechunk.log.repository.create import create_log, create_ref_files, create_repo_object
from icechunk.log.repository.events import CommitAdded, TagCreated
from icechunk.log.repository.objects import read_slot
from icechunk.log.repository.open import detect, open_repository
from icechunk.log.repository.port import Layout, RepositoryLog, SwapToken
from icechunk.log.repository.ref_files.upgrade import upgrade
from icechunk.log.repository.state import RepoState
from icechunk.runtime.clock import SYSTEM
from icechunk.storage.memory import MemoryStorage
from icechunk.testing.scripted import Request, ScriptedStorage, Send, lost_answer
from tests.log.repository.told import Told
from tests.log.repository.world import open_log, until


@pytest.mark.parametrize("landed", [True, False])
async def test_a_token_of_the_log_is_settled_after_the_conversion(landed: bool) -> None:
    storage = MemoryStorage()
    log = await create_log(storage)
    event = TagCreated(name="t", snapshot=FIRST_SNAPSHOT)
    await log.append(lambda _: [event])
    slot = await read_slot(storage, log.epoch, log.n)
    assert slot is not None
    token = SwapToken(
        epoch=log.epoch, n=log.n, nonces=(slot[0].nonce if landed else b"x" * 16,), known_us=slot[1].date_us
    )
    await convert_log(log, storage, SYSTEM, Layout.REPO)
    now = await open_repository(storage)
    assert await now.settle(token) is landed
    for each in (log, now):
        await each.aclose()


async def convert_by_another_client(storage: MemoryStorage, layout: Layout) -> None:
    other = await open_repository(storage)
    await convert_log(other, storage, SYSTEM, layout)
    await other.aclose()


async def test_a_client_that_followed_into_a_log_converts_that_log() -> None:
    storage = MemoryStorage()
    log = await create_repo_object(storage)
    await convert_by_another_client(storage, Layout.LOG)
    await log.refresh()
    await convert_log(log, storage, SYSTEM, Layout.REPO)
    assert await detect(storage) is Layout.REPO
    await log.aclose()


async def test_a_client_of_a_log_that_has_ended_converts_the_repo_object_that_followed() -> None:
    storage = MemoryStorage()
    log = await create_log(storage)
    await convert_by_another_client(storage, Layout.REPO)
    await convert_log(log, storage, SYSTEM, Layout.LOG)
    assert await detect(storage) is Layout.LOG
    await log.aclose()


@pytest.mark.parametrize("target", [Layout.LOG, Layout.REPO])
async def test_a_client_that_another_one_was_faster_than_changes_nothing(target: Layout) -> None:
    storage = MemoryStorage()
    log: RepositoryLog = await (create_repo_object if target is Layout.LOG else create_log)(storage)
    await convert_by_another_client(storage, target)
    before = await storage.get("repo")
    await convert_log(log, storage, SYSTEM, target)
    assert await detect(storage) is target
    assert (await storage.get("repo")).data == before.data
    await log.aclose()


@pytest.mark.parametrize("target", [Layout.LOG, Layout.REPO])
async def test_a_client_whose_layout_ended_and_came_back_converts_the_new_one(target: Layout) -> None:
    storage = MemoryStorage()
    log: RepositoryLog = await (create_repo_object if target is Layout.LOG else create_log)(storage)
    await convert_by_another_client(storage, target)
    await convert_by_another_client(storage, log.layout)
    await convert_log(log, storage, SYSTEM, target)
    assert await detect(storage) is target
    await log.aclose()


# ----------------------------------------------------- tokens of layouts that have ended


async def tag_without_answer(log: RepositoryLog, storage: ScriptedStorage, name: str, landed: bool) -> SwapToken:
    """Ask for a tag whose outcome is unknown: the answers are lost, or the requests."""

    async def lose(request: Request, send: Send) -> object:
        if writes(request):
            if landed:
                await send()
            raise lost_answer()
        return await send()

    tokens = Told()
    storage.requests.clear()
    storage.script = lose
    task = asyncio.ensure_future(log.append(tokens.of(lambda _: [TagCreated(name=name, snapshot=FIRST_SNAPSHOT)])))
    await until(lambda: any(map(writes, storage.requests)))
    task.cancel()
    await asyncio.wait({task})
    storage.script = None
    assert tokens[-1] is not None
    return tokens[-1]


def tagged(name: str, _: RepoState) -> list[TagCreated]:
    return [TagCreated(name=name, snapshot=FIRST_SNAPSHOT)]


def writes(request: Request) -> bool:
    return request.verb == "put" and (request.key == "repo" or request.key.startswith(("log/", "refs/")))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("landed", [True, False])
@pytest.mark.parametrize(
    "steps", ["", "1", "2", "3", "5", "log", "5 log", "log 4", "log 4 repo 3", "3 log repo 5", "log repo log 1"]
)
async def test_a_token_of_the_repo_object_is_settled_after_any_conversion(
    landed: bool, window: int | None, steps: str
) -> None:
    store = MemoryStorage()
    storage = ScriptedStorage(store)
    await (await create_repo_object(storage)).aclose()
    log = await open_repository(storage, updates_per_file=window)
    await log.append(lambda _: [TagCreated(name="before", snapshot=FIRST_SNAPSHOT)])
    token = await tag_without_answer(log, storage, "t", landed)
    await log.aclose()
    for number, step in enumerate(steps.split()):
        log = await open_repository(store, updates_per_file=window)
        if step.isdigit():
            for i in range(int(step)):
                await log.append(partial(tagged, f"{number}.{i}"))
                await log.checkpoint()
        else:
            await convert_log(log, store, SYSTEM, Layout(step))
        await log.aclose()
    now = await open_repository(store, updates_per_file=window)
    assert ("t" in now.state.tags) is landed
    assert await now.settle(token) is landed
    await now.aclose()
    assert ("t" in (await open_repository(store)).state.tags) is landed


async def test_a_token_whose_copy_is_gone_is_not_settled_as_lost() -> None:
    store = MemoryStorage()
    storage = ScriptedStorage(store)
    log = await create_repo_object(storage)
    token = await tag_without_answer(log, storage, "t", True)
    await log.append(lambda _: [TagCreated(name="next", snapshot=FIRST_SNAPSHOT)])
    copies = [item.key async for page in store.list_pages("overwritten/") for item in page]
    await store.delete(copies)
    with pytest.raises(CommitOutcomeUnknown):
        await log.settle(token)
    await log.aclose()


async def test_a_token_of_a_log_that_goes_on_is_left_to_clients_of_that() -> None:
    storage = MemoryStorage()
    old = await create_repo_object(storage)
    await convert_log(old, storage, SYSTEM, Layout.LOG)
    log = await open_log(storage)
    token = SwapToken(epoch=log.epoch, n=1, nonces=(b"x" * 16,), snapshots=(ObjectId(b"y" * 12),))
    with pytest.raises(SessionStateError):
        await old.settle(token)
    assert not await log.settle(token)
    for each in (old, log):
        await each.aclose()


@pytest.mark.parametrize("layout", [Layout.LOG, Layout.REPO])
async def test_a_token_of_format_1_is_settled_after_the_upgrade_where_history_tells(layout: Layout) -> None:
    storage = MemoryStorage()
    first = await create_ref_files(storage)
    key = "refs/branch.main/ref.json"
    commit = await a_commit(storage)
    await first.append(lambda _: [CommitAdded(branch="main", snapshot=commit)])
    await first.aclose()
    await upgrade(storage, SYSTEM, dry_run=False, delete_ref_files=True)
    repo = await open_repository(storage)
    await convert_log(repo, storage, SYSTEM, layout)
    now = await open_repository(storage)
    assert await now.settle(SwapToken(epoch=f"refs:{key}", nonces=(b"v",), snapshots=(commit.id,)))
    assert not await now.settle(SwapToken(epoch=f"refs:{key}", nonces=(b"v",), snapshots=(ObjectId(b"z" * 12),)))
    with pytest.raises(CommitOutcomeUnknown):
        await now.settle(SwapToken(epoch="refs:refs/tag.t/ref.json", nonces=(b"",)))
    for each in (repo, now):
        await each.aclose()


async def a_commit(storage: MemoryStorage) -> SnapshotRecord:
    """Write the file of an empty snapshot of format 1."""
    now_us = SYSTEM.wall_us()
    snapshot = Snapshot(id=ObjectId(b"s" * 12), parent_id=FIRST_SNAPSHOT, flushed_at_us=now_us, message="m", nodes={})
    await storage.put(snapshot_key(snapshot.id), encode_snapshot(snapshot, 1))
    return SnapshotRecord(id=snapshot.id, parent=FIRST_SNAPSHOT, flushed_at_us=now_us, message="m", metadata={})
