"""Rule 11 of the log layout: creation.

Each test fails where its rule is left out. Where the loss can be shown, the test runs a second time with the rule
switched off, and sees the loss.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from icechunk.errors import (
    AlreadyExistsError,
    ErrorKind,
    FormatError,
    InvalidInputError,
    ObjectNotFoundError,
    RepositoryNotFoundError,
)
from icechunk.format.ids import FIRST_SNAPSHOT
from icechunk.log.repository.create import create_log
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.open import detect, open_repository
from icechunk.log.repository.port import Layout
from icechunk.storage.memory import MemoryStorage
from icechunk.testing.scripted import Request, ScriptedStorage, Send, lost_answer
from tests.log.repository.world import World, open_log
from tests.raising import raises

# ---------------------------------------------------------------- rule 11


async def test_of_racing_creators_exactly_one_wins_and_its_first_snapshot_stays(world: World) -> None:
    for seed in range(6):
        a_world = World()
        sources = a_world.clock.sources()
        outcomes = await asyncio.gather(
            *(create_log(ScriptedStorage(_Jittery(a_world.store, seed * 7 + i)), sources) for i in range(4)),
            return_exceptions=True,
        )
        winners = [outcome for outcome in outcomes if isinstance(outcome, LogLayout)]
        assert len(winners) == 1
        assert all(isinstance(o, LogLayout | AlreadyExistsError | InvalidInputError) for o in outcomes)
        opened = await open_log(a_world.store, sources)
        assert opened.epoch == winners[0].epoch


class _Jittery(ScriptedStorage):
    def __init__(self, inner: MemoryStorage, seed: int) -> None:
        super().__init__(inner)
        rng = random.Random(seed)

        async def jitter(request: Request, send: Send) -> object:
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            answer = await send()
            if request.verb == "put" and rng.random() < 0.3:
                raise lost_answer()
            return answer

        self.script = jitter


async def test_a_creator_whose_answer_was_lost_recognises_its_own_success(world: World) -> None:
    storage = ScriptedStorage(world.store)

    async def lose(request: Request, send: Send) -> object:
        answer = await send()
        if request.verb == "put" and len([r for r in storage.requests if r.key == request.key]) == 1:
            raise lost_answer()
        return answer

    storage.script = lose
    log = await create_log(storage, world.clock.sources())
    assert (await open_log(world.store, world.clock.sources())).epoch == log.epoch


class Died(Exception):
    """The process is gone."""


async def test_a_second_creator_uses_the_first_snapshot_that_is_there(world: World) -> None:
    early = ScriptedStorage(world.store)

    async def die_before_repo(request: Request, send: Send) -> object:
        if request.key == "repo":
            raise Died
        return await send()

    early.script = die_before_repo
    with pytest.raises(Died):
        await create_log(early, world.clock.sources())
    before = await world.store.get("snapshots/1CECHNKREP0F1RSTCMT0")
    born_us = world.clock.now_us
    world.clock.move(60)
    log = await create_log(world.store, world.clock.sources(), check_clean_root=False)
    assert log.state.snapshots[FIRST_SNAPSHOT].flushed_at_us == born_us
    assert (await world.store.get("snapshots/1CECHNKREP0F1RSTCMT0")).data == before.data


@pytest.mark.parametrize("check", [True, False])
async def test_a_repository_of_format_1_is_not_created_over(world: World, check: bool) -> None:
    await world.store.put("refs/branch.main/ref.json", b'{"snapshot":"x"}')
    with pytest.raises(InvalidInputError) as caught:
        await create_log(world.store, world.clock.sources(), check_clean_root=check)
    assert caught.value.kind == "parent-directory-not-clean"
    assert await detect(world.store) is Layout.REFS
    with pytest.raises(ObjectNotFoundError):
        await world.store.get("repo")


async def test_a_repository_of_format_1_that_appears_meanwhile_is_refused(world: World) -> None:
    storage = ScriptedStorage(world.store)

    async def another_creates(request: Request, send: Send) -> object:
        if request.verb == "put" and request.key == "repo":
            await world.store.put("refs/branch.main/ref.json", b'{"snapshot":"x"}')
        return await send()

    storage.script = another_creates
    with raises(InvalidInputError, ErrorKind.PARENT_DIRECTORY_NOT_CLEAN):
        await create_log(storage, world.clock.sources())


async def test_a_root_with_anything_in_it_is_not_clean_and_an_existing_repository_is_not_replaced(world: World) -> None:
    await world.store.put("readme.txt", b"hello")
    with raises(InvalidInputError, "parent-directory-not-clean", "readme.txt"):
        await create_log(world.store, world.clock.sources())
    await create_log(world.store, world.clock.sources(), check_clean_root=False)
    before = await world.store.get("repo")
    with pytest.raises(AlreadyExistsError):
        await create_log(world.store, world.clock.sources(), check_clean_root=False)
    assert await world.store.get("repo") == before


async def test_opening_an_empty_place_is_an_error(world: World) -> None:
    with pytest.raises(RepositoryNotFoundError):
        await open_repository(world.store, world.clock.sources())
    assert await detect(world.store) is None


async def test_a_foreign_repo_object_is_a_format_error(world: World) -> None:
    await world.store.put("repo", b"not ours at all")
    with pytest.raises(FormatError):
        await open_repository(world.store, world.clock.sources())
