"""Pruning the log (rule 9): announce, wait, delete; never past the checkpoint, never what was taken over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from icechunk.errors import AccessDeniedError, ReadOnlyError, SessionStateError, StorageError
from icechunk.format.repo.codec import decode_repo, encode_repo
from icechunk.format.repo.repo_info import ONLINE, Status
from icechunk.log.repository.convert import convert_log
from icechunk.log.repository.create import create_log
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.entries.takeover import seal_log
from icechunk.log.repository.entry import floor_key, parse_floor_key, parse_slot_key, slot_key
from icechunk.log.repository.open import open_repository
from icechunk.log.repository.port import Layout
from icechunk.maintenance.prune import prune_log
from icechunk.runtime.clock import Sources
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import ANY, DeleteResult, ObjectInfo, Storage
from icechunk.testing.scripted import ManualClock
from icechunk.testing.wrapping import WrappingStorage
from tests.log.repository.strategies import an_id
from tests.log.repository.world import open_log
from tests.raising import raises
from tools.simulator.simulation import commit_proposal

DAY_S = 24 * 3600.0


class World:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.storage: Storage = MemoryStorage(self.clock.sources())

    @property
    def sources(self) -> Sources:
        return self.clock.sources()

    async def log(self, commits: int) -> LogLayout:
        log = await create_log(self.storage, self.sources)
        await self.commit(log, *range(1, commits + 1))
        await log.checkpoint()
        return log

    async def commit(self, log: LogLayout, *numbers: int) -> None:
        for i in numbers:
            self.clock.move(1)
            await log.append(commit_proposal(an_id(i), "main", now_us=self.clock.now_us))

    async def keys(self) -> list[str]:
        return [item.key async for page in self.storage.list_pages("log/") for item in page]

    async def slots(self) -> list[int]:
        return sorted(slot[1] for key in await self.keys() if (slot := parse_slot_key(key)) is not None)


@pytest.fixture
def world() -> World:
    return World()


async def test_slots_go_a_week_after_they_were_announced(world: World) -> None:
    log = await world.log(5)
    assert await prune_log(log, world.storage, world.sources) == 0
    # The slot of the checkpoint stays, for clients that may not list.
    assert floor_key(log.epoch, 4) in await world.keys()
    await world.commit(log, 6, 7)
    await log.checkpoint()
    world.clock.move(6.9 * DAY_S)
    assert await prune_log(log, world.storage, world.sources) == 0
    assert await world.slots() == [1, 2, 3, 4, 5, 6, 7]
    world.clock.move(0.2 * DAY_S)
    assert await prune_log(log, world.storage, world.sources) == 4
    assert await world.slots() == [5, 6, 7]
    # Nothing is left of the announcement but that of the slots that came later.
    assert [key for key in await world.keys() if ".floor/" in key] == [floor_key(log.epoch, 6)]
    opened = await open_log(world.storage, world.sources)
    assert opened.state.branch_tip("main") == an_id(7)
    await world.commit(opened, 8)
    assert (await log.refresh()).branch_tip("main") == an_id(8)
    await log.aclose()
    await opened.aclose()


async def test_slots_after_the_checkpoint_are_never_announced(world: World) -> None:
    log = await world.log(3)
    other = await open_log(world.storage, world.sources)
    other._checkpointing._stopped = True  # private: a client that died before its checkpoint
    await world.commit(other, 4, 5)
    await prune_log(log, world.storage, world.sources)
    assert floor_key(log.epoch, 2) in await world.keys()
    world.clock.move(8 * DAY_S)
    await prune_log(log, world.storage, world.sources)
    assert await world.slots() == [3, 4, 5]
    assert (await open_repository(world.storage, world.sources)).state.branch_tip("main") == an_id(5)


async def test_announcements_are_few_however_often_a_pruner_runs(world: World) -> None:
    log = await world.log(1)
    for i in range(2, 80):
        await world.commit(log, i)
        await log.checkpoint()
        await prune_log(log, world.storage, world.sources)
        world.clock.move(0.25 * DAY_S)
        assert len([key for key in await world.keys() if ".floor/" in key]) <= 9
    assert len(await world.slots()) < 40
    await log.aclose()


async def test_a_log_that_was_converted_goes_as_a_whole(world: World) -> None:
    log = await world.log(3)
    await convert_log(log, world.storage, world.sources, Layout.REPO)
    repo = await open_repository(world.storage, world.sources)
    await prune_log(repo, world.storage, world.sources)
    assert await world.slots() == [1, 2, 3, 4]
    world.clock.move(8 * DAY_S)
    assert await prune_log(repo, world.storage, world.sources) == 4
    assert await world.keys() == []
    assert (await repo.refresh()).branch_tip("main") == an_id(3)


@pytest.mark.parametrize("lists", [True, False])
async def test_a_client_that_slept_through_a_conversion_does_not_take_it_for_a_takeover(
    world: World, lists: bool
) -> None:
    class Unlisted(WrappingStorage):
        async def list_pages(self, *_: Any, **__: Any) -> AsyncIterator[list[ObjectInfo]]:
            raise AccessDeniedError("no listings for you", right="list")
            yield []

    made = await world.log(3)
    sleeper = await open_log(world.storage if lists else Unlisted(world.storage), world.sources)
    await convert_log(made, world.storage, world.sources, Layout.REPO)
    repo = await open_repository(world.storage, world.sources)
    for _ in range(2):
        await prune_log(repo, world.storage, world.sources)
        world.clock.move(8 * DAY_S)
    assert await world.keys() == []
    if lists:
        assert (await sleeper.refresh()).branch_tip("main") == an_id(3)
    else:
        with pytest.raises(SessionStateError):
            await sleeper.refresh()
    assert sleeper.view.sealer is None
    assert await world.keys() == []
    with pytest.raises(SessionStateError):
        await sleeper.append(commit_proposal(an_id(9), "main", now_us=world.clock.now_us))
    await sleeper.aclose()


async def test_a_log_that_was_taken_over_stays(world: World) -> None:
    log = await world.log(3)
    answer = await world.storage.get("repo")
    info = decode_repo(answer.data)
    online = Status(availability=ONLINE, set_at_us=info.status.set_at_us + 1, reason=None)
    from dataclasses import replace

    await world.storage.put("repo", encode_repo(replace(info, status=online, extra=None)), ANY)
    await seal_log(world.storage, world.sources, log.epoch, 3)
    repo = await open_repository(world.storage, world.sources)
    for _ in range(2):
        assert await prune_log(repo, world.storage, world.sources) == 0
        world.clock.move(8 * DAY_S)
    assert await world.slots() == [1, 2, 3, 4]


async def test_a_pruner_that_is_stopped_on_the_way_is_continued_by_the_next(world: World) -> None:
    log = await world.log(4)
    await prune_log(log, world.storage, world.sources)
    world.clock.move(8 * DAY_S)

    class Stuck(WrappingStorage):
        async def delete(self, keys):  # type: ignore[no-untyped-def]
            wanted = list(keys)
            slots = [key for key in wanted if parse_slot_key(key) is not None]
            if not slots:
                return await self.inner.delete(wanted)
            # Oldest first.
            assert slots == [slot_key(log.epoch, n) for n in range(1, len(slots) + 1)]
            await self.inner.delete(wanted[:2])
            return DeleteResult(deleted=2, failures=((wanted[2], "enough"),))

    with raises(StorageError, "storage-other", slot_key(log.epoch, 3)):
        await prune_log(log, Stuck(world.storage), world.sources)
    assert await world.slots() == [3, 4]
    assert (await open_repository(world.storage, world.sources)).state.branch_tip("main") == an_id(4)
    assert await prune_log(log, world.storage, world.sources) == 1


async def test_a_storage_that_can_only_be_read_is_not_pruned(world: World) -> None:
    class ReadOnly(WrappingStorage):
        @property
        def supports_writes(self) -> bool:
            return False

    log = await world.log(1)
    with pytest.raises(ReadOnlyError):
        await prune_log(log, ReadOnly(world.storage), world.sources)


def test_floors_have_keys_of_their_own_that_no_reader_takes_for_slots() -> None:
    key = floor_key("E" * 28, 77)
    assert parse_floor_key("E" * 28, key) == 77
    assert parse_slot_key(key) is None
    assert parse_floor_key("E" * 28, f"log/{'E' * 28}.floor/now.abc") is None
