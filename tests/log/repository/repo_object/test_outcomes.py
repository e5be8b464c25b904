"""The repo-object layout: the reported outcome is right whatever happens to an answer, a caller or a copy."""

from __future__ import annotations

import asyncio
import re
from functools import partial

import pytest

from icechunk.errors import (
    AlreadyExistsError,
    IcechunkError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT
from icechunk.log.repository import events as e
from icechunk.log.repository.create import create_repo_object
from icechunk.log.repository.port import SwapToken
from icechunk.testing.scripted import Request, Send, lost_answer
from tests.log.repository.strategies import an_id
from tests.log.repository.world import World, replaces_repo

new_world = partial(World, create_repo_object)


async def turns(count: int = 200) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("what", ["commit", "tag"])
async def test_a_client_recognises_its_own_write_under_that_of_another(world: World, what: str) -> None:
    log, storage = await world.create()
    other, _ = await world.open()

    async def lose_and_be_overwritten(request: Request, send: Send) -> object:
        answer = await send()
        if replaces_repo(request):
            storage.script = None
            await other.append(lambda _: [e.MetadataUpdated(metadata={"by": "other"})])
            raise lost_answer()
        return answer

    storage.script = lose_and_be_overwritten
    if what == "commit":
        await log.append(world.commit(1))
    else:
        await log.append(lambda _: [e.TagCreated(name="t", snapshot=FIRST_SNAPSHOT)])
    updates = [type(update.change).__name__ async for update in log.updates()]
    assert updates.count("NewCommit" if what == "commit" else "TagCreated") == 1


async def test_the_same_tag_by_another_client_at_the_same_microsecond_is_not_taken_for_the_clients_own(
    world: World,
) -> None:
    log, storage = await world.create()
    other, _ = await world.open()

    async def be_overtaken(request: Request, send: Send) -> object:
        if replaces_repo(request):
            storage.script = None
            await other.append(lambda _: [e.TagCreated(name="t", snapshot=FIRST_SNAPSHOT)])
            await other.append(lambda _: [e.MetadataUpdated(metadata={"by": "other"})])
            raise lost_answer()
        return await send()

    storage.script = be_overtaken
    with pytest.raises(AlreadyExistsError):
        await log.append(lambda _: [e.TagCreated(name="t", snapshot=FIRST_SNAPSHOT)])


async def test_settling_a_token_of_an_earlier_epoch_finds_that_it_did_not_land(world: World) -> None:
    log, _ = await world.create()
    assert not await log.settle(SwapToken(epoch="repo:gone", n=5, nonces=(b"x" * 16,), snapshots=(an_id(9),)))


async def test_a_copy_that_fails_fails_the_commit_with_nothing_landed(world: World) -> None:
    log, storage = await world.create()

    async def no_copy(request: Request, send: Send) -> object:
        if request.verb == "copy":
            raise StorageError("denied")
        return await send()

    storage.script = no_copy
    storage.requests.clear()
    with pytest.raises(StorageError, match=re.escape("denied")):
        await log.append(world.commit(1))
    assert not storage.of("put", "repo")


async def test_a_change_that_cannot_be_encoded_fails_alone(world: World) -> None:
    log, _ = await world.create()
    with pytest.raises(IcechunkError):
        await log.append(lambda _: [e.TagCreated(name="\ud800", snapshot=FIRST_SNAPSHOT)])
    await log.append(world.commit(1))
