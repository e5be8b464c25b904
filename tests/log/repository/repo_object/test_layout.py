"""The repo-object layout: one object, replaced under If-Match, loses nothing that was acknowledged."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from icechunk.errors import (
    AlreadyExistsError,
    ConflictError,
    InvalidInputError,
    ObjectNotFoundError,
    ReadOnlyError,
    RefNotFoundError,
    RepositoryNotFoundError,
    SessionStateError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT
from icechunk.format.keys import snapshot_key
from icechunk.format.repo.codec import decode_repo
from icechunk.format.repo.repo_info import BranchCreated, NewCommit, RepoInitialized, TagCreated, Update
from icechunk.log.repository import events as e
from icechunk.log.repository.convert import convert_to_log
from icechunk.log.repository.create import create_repo_object
from icechunk.log.repository.port import Layout
from icechunk.log.repository.queue import UpdateRetries
from icechunk.log.repository.repo_object.client import next_window
from icechunk.storage.outcome import refused
from icechunk.testing.scripted import Request, ScriptedStorage, Send, lost_answer
from tests.log.repository.strategies import an_id
from tests.log.repository.world import World, losing_the_answer, replaces_repo
from tests.raising import raises

new_world = partial(World, create_repo_object)


async def test_a_commit_copies_the_object_and_replaces_exactly_that_version(world: World) -> None:
    log, storage = await world.create()
    await log.append(world.commit(1))
    storage.requests.clear()
    await log.append(world.commit(2))
    assert [(request.verb, request.key) for request in storage.requests] == [("copy", "repo"), ("put", "repo")]


async def test_a_commit_whose_copy_was_made_during_the_uploads_is_one_put(world: World) -> None:
    log, storage = await world.create()
    await log.prepare_writes()
    storage.requests.clear()
    await log.append(world.commit(1))
    assert [(request.verb, request.key) for request in storage.requests] == [("put", "repo")]
    await log.prepare_writes()
    other, _ = await world.open()
    await other.append(world.commit(2))
    await log.append(world.commit(3))
    assert await world.history() == [an_id(1), an_id(2), an_id(3)]


async def test_callers_of_one_loop_share_a_put(world: World) -> None:
    log, storage = await world.create()
    await log.append(lambda _: [e.BranchCreated(name=str(i), snapshot=FIRST_SNAPSHOT) for i in range(20)])
    storage.requests.clear()
    await asyncio.gather(*(log.append(world.commit(100 + i, str(i))) for i in range(20)))
    assert len([request for request in storage.requests if replaces_repo(request)]) == 1
    assert set(await world.history()) == {an_id(100 + i) for i in range(20)}


async def test_a_refused_caller_does_not_affect_the_others_of_the_group(world: World) -> None:
    log, _ = await world.create()
    results = await asyncio.gather(
        log.append(world.commit(1)),
        log.append(world.commit(2, parent=FIRST_SNAPSHOT)),
        log.append(lambda _: [e.TagCreated(name="t", snapshot=an_id(1))]),
        return_exceptions=True,
    )
    assert isinstance(results[1], ConflictError)
    assert (await log.refresh()).tags["t"] == an_id(1)
    assert await world.history() == [an_id(1)]


async def test_of_two_clients_one_conflicts_and_another_branch_does_not(world: World) -> None:
    one, _ = await world.create()
    two, _ = await world.open()
    await one.append(lambda _: [e.BranchCreated(name="dev", snapshot=FIRST_SNAPSHOT)])
    await one.append(world.commit(1))
    with pytest.raises(ConflictError):
        await two.append(world.commit(2, parent=FIRST_SNAPSHOT))
    await two.append(world.commit(3, "dev", parent=FIRST_SNAPSHOT))
    assert await world.history() == [an_id(1), an_id(3)]


async def test_a_refusal_is_never_based_on_an_old_state(world: World) -> None:
    one, _ = await world.create()
    two, _ = await world.open()
    await one.append(lambda _: [e.BranchCreated(name="dev", snapshot=FIRST_SNAPSHOT)])
    await two.append(lambda state: [e.TagCreated(name="t", snapshot=state.branch_tip("dev"))])
    with pytest.raises(RefNotFoundError):
        await two.append(lambda state: [e.TagCreated(name="u", snapshot=state.branch_tip("nowhere"))])


async def test_a_read_only_repository_takes_nothing_but_a_change_of_status(world: World) -> None:
    log, _ = await world.create()
    await log.append(lambda _: [e.StatusSet(availability=1, reason="audit")])
    with raises(ReadOnlyError, "read-only-repository", "audit"):
        await log.append(world.commit(1))
    await log.append(lambda _: [e.StatusSet(availability=0)])
    await log.append(world.commit(1))


async def test_everything_a_repository_keeps_is_there_after_opening(world: World) -> None:
    log, _ = await world.create(config={"inline_chunk_threshold_bytes": 7})
    await log.append(world.commit(1))
    await log.append(
        lambda _: [
            e.TagCreated(name="t", snapshot=an_id(1)),
            e.TagCreated(name="gone", snapshot=an_id(1)),
            e.TagDeleted(name="gone"),
            e.BranchCreated(name="a/b", snapshot=FIRST_SNAPSHOT),
            e.MetadataUpdated(metadata={"k": [1, None]}),
            e.FeatureFlagSet(flag=3, value=False),
        ]
    )
    other, _ = await world.open()
    assert other.state == log.state
    assert other.state.config == {"inline_chunk_threshold_bytes": 7}
    with pytest.raises(AlreadyExistsError):
        await other.append(lambda _: [e.TagCreated(name="gone", snapshot=an_id(1))])


async def test_a_refresh_is_one_get_and_decodes_nothing_that_is_known(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, storage = await world.create()
    storage.requests.clear()
    monkeypatch.setattr("icechunk.log.repository.repo_object.client.decode_repo", None)
    await log.refresh()
    assert [(request.verb, request.key) for request in storage.requests] == [("get", "repo")]


async def test_a_lost_race_is_tried_again_as_often_as_the_configuration_says(world: World) -> None:
    log, storage = await world.create(retries=UpdateRetries(tries=3, first_pause_s=0.01))
    other, _ = await world.open()
    puts = 0

    async def always_second(request: Request, send: Send) -> object:
        nonlocal puts
        if replaces_repo(request):
            puts += 1
            await other.append(lambda _: [e.MetadataUpdated(metadata={"n": puts})])
        return await send()

    storage.script = always_second
    with raises(ConflictError, "update-attempts-exhausted", "repo_update_retries") as refused:
        await log.append(world.commit(1))
    assert (puts, refused.value.kind) == (3, "update-attempts-exhausted")
    storage.script = None
    await log.append(world.commit(1))
    assert await world.history() == [an_id(1)]


# ------------------------------------------------------------- the store


async def test_a_store_that_ignores_if_match_is_found_before_anything_is_replaced(world: World) -> None:
    log, storage = await world.create()
    before = (await world.store.get("repo")).data

    async def ignore(request: Request, send: Send) -> object:
        return await (world.store.put(request.key, request.data) if request.verb == "put" else send())

    storage.script = ignore
    with raises(StorageError, "storage-config", "If-Match"):
        await log.append(world.commit(1))
    assert (await world.store.get("repo")).data == before


async def test_a_writer_with_a_wrong_clock_is_refused(world: World) -> None:
    await world.create()
    log, _ = await world.open(skew_s=3600)
    with raises(SessionStateError, "snapshot-timestamp", 3600):
        await log.append(world.commit(1))


async def test_creation_whose_answer_was_lost_is_recognised(world: World) -> None:
    storage = ScriptedStorage(world.store)

    storage.script = losing_the_answer(storage, replaces_repo)
    log = await create_repo_object(storage, world.clock.sources())
    await log.append(world.commit(1))
    other, _ = await world.open()
    assert set(other.state.snapshots) == {FIRST_SNAPSHOT, an_id(1)}
    assert dict(other.state.branches) == {"main": an_id(1)}


async def test_nothing_is_created_over_a_repository_and_each_opens_in_its_own_layout(world: World) -> None:
    with pytest.raises(RepositoryNotFoundError):
        await world.open()
    await world.create()
    with pytest.raises(InvalidInputError):
        await world.create()
    await convert_to_log(world.store, world.clock.sources())
    log, _ = await world.open()
    assert log.layout is Layout.LOG


async def test_a_client_finds_that_the_repository_became_a_log(world: World) -> None:
    log, _ = await world.create()
    await log.append(world.commit(1))
    await convert_to_log(world.store, world.clock.sources())
    with raises(SessionStateError, "not-allowed", "open it again"):  # words: the remedy
        await log.append(world.commit(2))
    await log.refresh()
    assert log.state.branches["main"] == an_id(1)


async def test_a_reader_follows_into_the_log_and_back(world: World) -> None:
    await world.create()
    reader, _ = await world.open()
    await convert_to_log(world.store, world.clock.sources())
    log, storage = await world.open()

    async def no_objects(request: Request, send: Send) -> object:
        if request.verb == "put" and request.key in ("repo", snapshot_key(an_id(1))):
            raise refused(StorageError("no"))
        return await send()

    storage.script = no_objects
    await log.append(world.commit(1), files={snapshot_key(an_id(1)): b"small"})
    assert (await reader.refresh()).branches["main"] == an_id(1)
    assert await reader.find_file(snapshot_key(an_id(1))) == b"small"
    storage.script = None
    await log.append(world.commit(2))
    assert (await reader.refresh()).branches["main"] == an_id(2)
    await log.convert_to_repo_object()
    repo, _ = await world.open()
    await repo.append(world.commit(3))
    assert (await reader.refresh()).branches["main"] == an_id(3)
    await convert_to_log(world.store, world.clock.sources())
    again, _ = await world.open()
    await again.append(world.commit(4))
    assert (await reader.refresh()).branches["main"] == an_id(4)
    assert [update async for update in reader.updates()] == [update async for update in again.updates()]


async def test_a_reader_that_was_away_while_the_repository_was_a_log_goes_on(world: World) -> None:
    await world.create()
    reader, _ = await world.open()
    await convert_to_log(world.store, world.clock.sources())
    log, _ = await world.open()
    await log.append(world.commit(1))
    await log.convert_to_repo_object()
    assert (await reader.refresh()).branches["main"] == an_id(1)


async def test_a_commit_that_landed_before_the_conversion_is_recognised(world: World) -> None:
    log, storage = await world.create()

    async def convert(request: Request, send: Send) -> object:
        answer = await send()
        if replaces_repo(request):
            storage.script = None
            await convert_to_log(world.store, world.clock.sources())
            raise lost_answer()
        return answer

    storage.script = convert
    await log.append(world.commit(1))
    assert decode_repo((await world.store.get("repo")).data).branches["main"] == an_id(1)


# ----------------------------------------------------------- the ops log


async def test_the_ops_log_is_whole_however_few_lines_an_object_holds(world: World) -> None:
    log, _ = await world.create(updates_per_file=3)
    for i in range(1, 8):
        await log.append(world.commit(i))
    await log.append(lambda _: [e.BranchCreated(name=str(i), snapshot=an_id(1)) for i in range(5)])
    for i in range(8, 12):
        await log.append(world.commit(i))
    info = decode_repo((await world.store.get("repo")).data)
    assert len(info.updates) == 3
    assert info.updates[0].backup_path is None
    assert all(update.backup_path for update in info.updates[1:])
    other, _ = await world.open()
    changes = [update.change async for update in other.updates()]
    assert [type(change) for change in changes] == [NewCommit] * 4 + [BranchCreated] * 5 + [NewCommit] * 7 + [
        RepoInitialized
    ]


async def test_a_missing_copy_of_the_ops_log_is_named(world: World) -> None:
    log, _ = await world.create(updates_per_file=1)
    for i in range(1, 5):
        await log.append(world.commit(i))
    keys = [info.key async for page in world.store.list_pages("overwritten/") for info in page]
    await world.store.delete(keys)
    with raises(ObjectNotFoundError, "object-not-found", "overwritten/repo"):
        [update async for update in log.updates()]


def _update(i: int, backup: str | None = None) -> Update:
    return Update(change=TagCreated(name=str(i)), updated_at_us=i, backup_path=backup)


def test_lines_of_one_swap_are_not_torn_apart() -> None:
    stored = (_update(5), _update(4), _update(3, "b"), _update(2, "b"), _update(1, "a"))
    window = next_window([_update(6)], stored, before=None, backup="c", limit=4)
    assert [update.updated_at_us for update in window.updates] == [6, 5, 4]
    assert [update.backup_path for update in window.updates] == [None, "c", "c"]
    assert window.before == "b"
    alone = next_window([_update(7), _update(6)], stored, before=None, backup="c", limit=1)
    assert [update.updated_at_us for update in alone.updates] == [7, 6]
    assert alone.before == "c"
