"""Rule 6 of the log layout where no listing says how far the log goes, or only one that costs as much as all of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from icechunk.errors import AccessDeniedError, FormatError
from icechunk.format.repo.codec import decode_repo
from icechunk.format.repo.repo_info import RepoInfo
from icechunk.log.repository import events as e
from icechunk.log.repository import objects
from icechunk.log.repository.create import create_log
from icechunk.log.repository.entries.reader import read_until_absent
from icechunk.log.repository.entry import slot_key
from icechunk.log.repository.open import open_repository
from icechunk.runtime.clock import SYSTEM
from icechunk.storage.local.storage import LocalStorage
from icechunk.testing.scripted import Request, ScriptedStorage, Send
from tests.log.repository.strategies import an_id
from tests.log.repository.world import DAY_S, World, open_log, put_entry
from tests.raising import raises


class Unlisted(ScriptedStorage):
    """A storage whose listings cost too much."""

    @property
    def lists_first_keys_fast(self) -> bool:
        return False


class Batched(Unlisted):
    """One that reads several objects in one call."""

    @property
    def batches_reads(self) -> bool:
        return True


@pytest.mark.parametrize("may_be_absent", [True, False])
async def test_slots_that_are_read_together_count_as_absent_only_where_a_refusal_may_mean_that(
    world: World, may_be_absent: bool
) -> None:
    log, _ = await world.create()
    for n in (1, 2):
        await put_entry(world.store, log.epoch, n, e.Void())
    hidden = [slot_key(log.epoch, n) for n in range(3, 60)]

    async def refuse(request: Request, send: Send) -> object:
        if request.key in hidden:
            raise AccessDeniedError("refused", right="read", key=request.key, may_be_absent=may_be_absent)
        return await send()

    storage = Batched(world.store)
    storage.script = refuse
    if not may_be_absent:
        with pytest.raises(AccessDeniedError):
            await read_until_absent(storage, log.epoch, 0)
        return
    entries, newest = await read_until_absent(storage, log.epoch, 0)
    assert ([entry.n for entry in entries], newest) == ([1, 2], 2)


@pytest.mark.parametrize("tail", [*range(10), 60, 131])
async def test_a_tail_of_any_length_is_read_to_its_end_without_a_listing(world: World, tail: int) -> None:
    log, _ = await world.create()
    for n in range(1, tail + 1):
        await put_entry(world.store, log.epoch, n, e.Void())
    storage = Unlisted(world.store)
    opened = await open_log(storage, world.clock.sources())
    assert (opened.epoch, opened.n) == (log.epoch, tail)
    entries, newest = await read_until_absent(world.store, log.epoch, 0)
    assert [entry.n for entry in entries] == list(range(1, tail + 1))
    assert newest == tail
    assert storage.of("list") == []
    # `repo` and the slots, each once, and few beyond the end.
    asked = [request.key for request in storage.requests]
    assert len(asked) <= 1 + tail + 50


async def test_commits_of_other_clients_are_folded_without_a_listing(world: World) -> None:
    ours, _ = await world.create()
    storage = Unlisted(world.store)
    theirs = await open_repository(storage, world.clock.sources())
    for i in range(1, 9):
        await ours.append(world.commit(i))
        if i in (1, 4, 8):
            assert (await theirs.refresh()).branches["main"] == an_id(i)
    assert storage.of("list") == []
    await theirs.aclose()


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 9])
async def test_a_missing_slot_is_an_error_that_names_it_without_a_listing_too(world: World, after: int) -> None:
    log, _ = await world.create()
    for n in range(1, after + 3):
        if n != after + 1:
            await put_entry(world.store, log.epoch, n, e.Void())
    with raises(FormatError, "invalid-file-format", slot_key(log.epoch, after + 1)):
        await open_repository(Unlisted(world.store), world.clock.sources())


async def test_slots_written_while_the_end_is_looked_for_are_no_gap(world: World) -> None:
    log, _ = await world.create()
    storage = Unlisted(world.store)

    async def write_in_between(request: Request, send: Send) -> object:
        # The first slot is seen absent, and the second there.
        if request.key == slot_key(log.epoch, 2) and len(storage.of("get", request.key)) == 1:
            await put_entry(world.store, log.epoch, 1, e.Void())
            await put_entry(world.store, log.epoch, 2, e.Void())
        return await send()

    storage.script = write_in_between
    opened = await open_log(storage, world.clock.sources())
    assert opened.n == 2


async def test_slots_that_were_pruned_while_the_end_was_looked_for_are_not_taken_for_the_end(world: World) -> None:
    log, _ = await world.create()
    for i in (1, 2, 3):
        await log.append(world.commit(i))
    await log.checkpoint()
    old_repo = await world.store.get("repo")
    for i in (4, 5, 6):
        await log.append(world.commit(i))
    await log.checkpoint()
    storage = Unlisted(world.store)

    async def sleep_after_repo(request: Request, send: Send) -> object:
        # GET repo was answered before the checkpoint; then the client slept through the whole of a pruning.
        if request.key == "repo" and len(storage.of("get", "repo")) == 1:
            await world.prune(log.epoch, 6)
            return old_repo
        return await send()

    storage.script = sleep_after_repo
    opened = await open_repository(storage, world.clock.sources())
    assert opened.state.branches["main"] == an_id(6)
    assert world.clock.now_us > 7 * DAY_S * 1e6


async def test_on_local_disk_neither_opening_nor_a_refresh_lists_the_log(tmp_path: Path) -> None:
    ours = ScriptedStorage(LocalStorage(tmp_path))
    log = await create_log(ours)
    storage = ScriptedStorage(LocalStorage(tmp_path))
    other = await open_log(storage)
    for _ in range(3):
        await log.append(lambda state: [e.MetadataUpdated(metadata={"a": 1})])
        await other.refresh()
    assert storage.of("list") == []
    assert other.n == 3
    await asyncio.gather(log.aclose(), other.aclose())


async def test_a_client_that_is_behind_reads_the_slot_after_the_listed_ones_too(world: World) -> None:
    ours, _ = await world.create()
    storage = ScriptedStorage(world.store)
    theirs = await open_repository(storage, world.clock.sources())
    for i in (1, 2, 3):
        await ours.append(world.commit(i))
    late = [4]

    async def commit_after_the_listing(request: Request, send: Send) -> object:
        answer = await send()
        if request.verb == "list" and late:
            await ours.append(world.commit(late.pop()))
        return answer

    storage.script = commit_after_the_listing
    # In a crowd, what a listing shows is too old to commit upon by the time when its entries are read.
    assert (await theirs.refresh()).branches["main"] == an_id(4)
    await theirs.aclose()


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_repo_that_is_read_from_memory_and_then_from_the_disk_is_decoded_once_unless_it_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    world = World()
    log = await create_log(LocalStorage(tmp_path), SYSTEM)
    await log.append(world.commit(1))
    await log.checkpoint()
    earlier = (tmp_path / "repo").read_bytes()
    await log.append(world.commit(2))
    await log.checkpoint()
    await log.aclose()
    storage = LocalStorage(tmp_path)
    if replaced:
        read_first = replace(await storage.get("repo"), body=earlier)
        monkeypatch.setattr(storage, "get_at_once", lambda key, *, unsynced: read_first if unsynced else None)
    decoded: list[bytes] = []

    def noted(data: bytes) -> RepoInfo:
        decoded.append(data)
        return decode_repo(data)

    monkeypatch.setattr(objects, "decode_repo", noted)
    opened = await open_repository(storage, SYSTEM)
    assert len(opened.state.snapshots) == 3
    assert len(decoded) == (2 if replaced else 1)
    await opened.aclose()
