"""Rules 7 and 8 of the log layout: checkpoints, conversions, and the ops log that they carry.

Each test fails where its rule is left out. Where the loss can be shown, the test runs a second time with the rule
switched off, and sees the loss.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import NoReturn

import pytest

from icechunk.errors import (
    ErrorKind,
    InvalidInputError,
    ReadOnlyError,
    SessionStateError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT
from icechunk.format.keys import REPO_KEY, overwritten_repo_key
from icechunk.format.repo.codec import decode_repo, encode_repo
from icechunk.format.repo.repo_info import NewCommit, Status
from icechunk.log.repository import events as e
from icechunk.log.repository import objects
from icechunk.log.repository.convert import convert_to_log
from icechunk.log.repository.entries.checkpoint import write_checkpoint
from icechunk.log.repository.entries.embedded import EmbeddedInTail
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.entries.takeover import seal_abandoned, seal_log
from icechunk.log.repository.entry import decode_entry, encode_entry, epoch_prefix, slot_key
from icechunk.log.repository.event_json import encode_events
from icechunk.log.repository.marker import decode_marker
from icechunk.log.repository.objects import read_repo
from icechunk.log.repository.open import detect, open_repository
from icechunk.log.repository.port import Layout
from icechunk.storage.port import GetResult, Matches, PutResult
from icechunk.testing.scripted import ManualClock, Request, ScriptedStorage, Send, lost_answer
from tests.log.repository.strategies import an_id
from tests.log.repository.world import World, open_log, put_entry, replaces_repo, settled, slots, until
from tests.raising import raises

# ---------------------------------------------------------------- rule 7


async def test_an_older_checkpoint_never_replaces_a_newer_one(world: World) -> None:
    log, _ = await world.create()
    old, storage = await world.open()
    await log.append(world.commit(1))
    behind = await world.store.get("repo")

    await log.append(world.commit(2))
    await log.checkpoint()
    await old.refresh()
    await log.append(world.commit(3))
    await log.checkpoint()
    newest = await world.store.get("repo")

    async def trust_what_it_once_read(request: Request, send: Send) -> object:
        return (
            behind
            if request.key == "repo" and request.verb == "get" and len(storage.of("get", "repo")) == 2
            else await send()
        )

    storage.script = trust_what_it_once_read
    await old.checkpoint()
    now = await world.store.get("repo")
    assert (now.version, now.data) == (newest.version, newest.data)
    assert all(isinstance(request.precondition, Matches) for request in storage.of("put", "repo"))


async def test_a_checkpoint_of_an_earlier_epoch_is_not_written(world: World) -> None:
    log, _ = await world.create()
    sleeper, _ = await world.open()
    for i in (1, 2, 3):
        await log.append(world.commit(i))
    await sleeper.refresh()
    head, known = sleeper.view.head, sleeper.view.known
    await log.convert_to_repo_object()
    await convert_to_log(world.store, world.clock.sources())
    now = await world.store.get("repo")
    marker = decode_marker(decode_repo(now.data).extra)
    assert marker is not None
    assert marker.n == 0 < head.n
    nothing = EmbeddedInTail(world.store, ())
    await write_checkpoint(world.store, world.clock.sources(), head, known, embedded=nothing, updates_per_file=1000)
    await sleeper.checkpoint()
    assert await world.store.get("repo") == now


async def test_the_marker_holds_values_that_the_format_has_no_field_for(world: World) -> None:
    log, _ = await world.create()
    await log.append(lambda state: [e.StatusSet(availability=1, reason="frozen"), e.StatusSet(availability=0)])
    await log.append(lambda state: [e.CollectionRan(cutoff_us=12345)])
    await log.checkpoint()
    info = decode_repo((await world.store.get("repo")).data)
    assert info.status.availability == 1
    assert "log/" in (info.status.reason or "")
    other, _ = await world.open()
    assert other.state == log.state
    assert other.state.status.availability == 0
    assert other.state.gc_cutoff_us == 12345


async def test_a_real_read_only_status_is_kept_by_checkpoint_and_open(world: World) -> None:
    log, _ = await world.create()
    await log.append(lambda state: [e.StatusSet(availability=1, reason="frozen")])
    await log.aclose()
    other, _ = await world.open()
    with raises(ReadOnlyError, "read-only-repository", "frozen"):
        await other.append(world.commit(1))


# ---------------------------------------------------------------- rule 8


async def test_a_conversion_leaves_a_repo_object_without_marker_and_nothing_lands_after_it(world: World) -> None:
    log, _ = await world.create()
    other, _ = await world.open()
    await log.append(world.commit(1))
    await log.convert_to_repo_object()
    with raises(SessionStateError, "not-allowed", "open it again"):  # words: the remedy
        await other.append(world.commit(2))
    info = decode_repo((await world.store.get("repo")).data)
    assert info.extra is None
    assert info.status.availability == 0
    assert set(info.snapshots) == {FIRST_SNAPSHOT, an_id(1)}
    assert await detect(world.store) is Layout.REPO


@pytest.mark.parametrize("who", ["opener", "writer", "reader"])
async def test_a_client_that_folds_a_seal_finishes_the_conversion(world: World, who: str) -> None:
    log, storage = await world.create()
    other, _ = await world.open()
    await log.append(world.commit(1))

    async def die_after_the_seal(request: Request, send: Send) -> object:
        if request.key == "repo":
            raise lost_answer()
        return await send()

    storage.script = die_after_the_seal
    with pytest.raises(StorageError):
        await log.convert_to_repo_object()
    assert await detect(world.store) is Layout.LOG
    match who:
        case "opener":
            opened = await open_repository(world.store, world.clock.sources())
            assert opened.layout is Layout.REPO
            await opened.aclose()
        case "writer":
            with pytest.raises(SessionStateError):
                await other.append(world.commit(2))
        case "reader":
            assert (await other.refresh()).branch_tip("main") == an_id(1)
    assert await detect(world.store) is Layout.REPO
    found = await read_repo(world.store, world.clock.sources())
    assert found is not None
    assert found.info.branches["main"] == an_id(1)
    storage.script = None


async def test_after_a_conversion_there_and_back_a_reader_follows_into_the_new_log(world: World) -> None:
    log, _ = await world.create()
    reader, _ = await world.open()
    await log.append(world.commit(1))
    await log.convert_to_repo_object()
    await convert_to_log(world.store, world.clock.sources())
    new, _ = await world.open()
    await new.append(world.commit(2))
    assert (await reader.refresh()).branch_tip("main") == an_id(2)


async def convert_there_and_back(world: World, *between: e.Event) -> LogLayout:
    """Convert a log, make these changes in the repo object, and convert that; returns a client of the new log."""
    first, _ = await world.open()
    await first.convert_to_repo_object()
    repo, _ = await world.open()
    for event in between:
        await repo.append(lambda _, event=event: [event])
    await convert_to_log(world.store, world.clock.sources())
    new, _ = await world.open()
    assert isinstance(new, LogLayout)
    return new


async def test_after_there_and_back_a_reader_follows_although_its_tip_was_collected(world: World) -> None:
    log, _ = await world.create()
    await log.append(lambda _: [e.BranchCreated(name="b", snapshot=FIRST_SNAPSHOT)])
    await log.append(world.commit(1, "b"))
    reader, _ = await world.open()
    assert reader.state.branches["b"] == an_id(1)
    new = await convert_there_and_back(
        world, e.BranchDeleted(name="b"), e.CollectionRan(cutoff_us=world.clock.now_us + 10**6)
    )
    assert an_id(1) not in new.state.snapshots
    assert await reader.refresh() == await new.refresh()
    assert "b" not in reader.state.branches


@pytest.mark.parametrize("back", [False, True])
async def test_a_reader_does_not_go_back_to_an_older_copy_of_repo(world: World, back: bool) -> None:
    """A user restores a copy of ``repo`` from before what a reader has shown."""
    log, _ = await world.create()
    await log.append(world.commit(1))
    await log.convert_to_repo_object()
    older = await world.store.get(REPO_KEY)
    await convert_to_log(world.store, world.clock.sources())
    older_log = await world.store.get(REPO_KEY)
    second, _ = await world.open()
    await second.append(world.commit(2))
    reader, _ = await world.open()
    await second.convert_to_repo_object()
    await world.store.put(REPO_KEY, (older_log if back else older).data)
    with contextlib.suppress(SessionStateError):
        await reader.refresh()
    assert reader.state.branch_tip("main") == an_id(2)


@pytest.mark.parametrize("back", [False, True])
async def test_a_client_that_slept_while_its_log_was_converted_and_pruned_follows_and_writes_nothing(
    world: World, back: bool
) -> None:
    log, _ = await world.create()
    await log.append(world.commit(1))
    reader, storage = await world.open()
    epoch, n = log.epoch, log.n
    await log.append(world.commit(2))
    await (convert_there_and_back(world) if back else log.convert_to_repo_object())
    await world.prune(epoch, n + 2)
    storage.requests.clear()
    assert (await reader.refresh()).branches["main"] == an_id(2)
    await reader.checkpoint()
    await reader.aclose()
    assert not storage.of("put")
    assert not [key async for page in world.store.list_pages(f"log/{epoch}/") for key in page]


async def test_a_client_that_slept_does_not_rely_on_a_slot_that_was_pruned_and_filled_again(world: World) -> None:
    log, _ = await world.create()
    await log.append(world.commit(1))
    reader, storage = await world.open()
    epoch, n = log.epoch, log.n
    late = world.commit(7)(log.state)
    await log.append(world.commit(2))
    new = await convert_there_and_back(world)
    await world.prune(epoch, n + 2)
    await put_entry(world.store, epoch, n + 1, *late, time_us=world.clock.now_us)
    await new.append(world.commit(3))
    storage.requests.clear()
    with raises(SessionStateError, "not-allowed", "open it again"):  # words: the remedy
        await reader.refresh()
    assert an_id(7) not in reader.state.snapshots
    await reader.aclose()
    assert not storage.of("put")


async def take_over(world: World) -> None:
    """Set the status online as the official library does: copy `repo`, drop `extra`."""
    info = decode_repo((await world.store.get("repo")).data)
    await world.store.copy("repo", "overwritten/repo.taken")
    newest = info.updates[0]
    await world.store.put(
        "repo",
        encode_repo(
            replace(
                info,
                extra=None,
                status=Status(availability=0, set_at_us=newest.updated_at_us + 1, reason=None),
                updates=(
                    replace(newest, updated_at_us=newest.updated_at_us + 1),
                    replace(newest, backup_path="repo.taken"),
                    *info.updates[1:],
                ),
            )
        ),
    )


async def test_a_takeover_is_found_at_the_next_checkpoint_sealed_and_reported(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    log, storage = await world.create()

    async def no_checkpoint(request: Request, send: Send) -> object:
        if replaces_repo(request):
            raise lost_answer()
        return await send()

    await log.append(world.commit(1))
    await log.checkpoint()
    storage.script = no_checkpoint
    await log.append(world.commit(2))
    await until(lambda: all(task.done() for task in log.tasks))
    storage.script = None
    await take_over(world)
    taken = await world.store.get("repo")
    await log.checkpoint()
    assert log.view.stranded is not None
    assert [entry.n for entry in log.view.stranded.entries] == [2]
    with raises(SessionStateError, "not-allowed", epoch_prefix(log.epoch)) as caught:
        await log.append(world.commit(3))
    assert "only" in str(caught.value)
    assert await world.store.get("repo") == taken
    last = decode_entry((await world.store.get(slot_key(log.epoch, 3))).data, n=3)
    assert last.events == (e.Sealed(reason="takeover"),)
    await world.store.get(slot_key(log.epoch, 2))


async def test_a_reader_of_a_log_that_was_taken_over_gets_an_error(world: World) -> None:
    log, storage = await world.create()
    await log.append(world.commit(1))
    await log.checkpoint()
    reader, _ = await world.open()

    async def no_checkpoint(request: Request, send: Send) -> object:
        if replaces_repo(request):
            raise lost_answer()
        return await send()

    storage.script = no_checkpoint
    await log.append(world.commit(2))
    assert (await reader.refresh()).branches["main"] == an_id(2)
    await take_over(world)
    await seal_log(world.store, world.clock.sources(), log.epoch, log.n)
    for _ in range(2):
        with raises(SessionStateError, "not-allowed", "taken over"):  # words: a conversion ends the same way
            await reader.refresh()
    assert reader.state.branches["main"] == an_id(2)


async def test_the_bytes_of_a_seal_do_not_change_from_try_to_try(world: World) -> None:
    log, _ = await world.create()
    storage = ScriptedStorage(world.store)

    async def no_answer(request: Request, send: Send) -> object:
        if slots(request) and len([each for each in storage.requests if slots(each)]) < 4:
            world.clock.move(1)
            raise lost_answer()
        return await send()

    storage.script = no_answer
    assert await seal_log(storage, world.clock.sources(), log.epoch, 0) == (0, e.Sealed(reason="takeover"))
    tries = [request.data for request in storage.requests if slots(request)]
    assert len(tries) == 4
    assert len(set(tries)) == 1


async def test_an_opening_during_a_conversion_to_the_log_does_not_seal_that_log(world: World) -> None:
    log, _ = await world.create()
    await log.convert_to_repo_object()
    found = await read_repo(world.store, world.clock.sources())
    assert found is not None
    # So that the new log is the first one of a listing.
    world.clock.move(2)
    await convert_to_log(world.store, world.clock.sources())
    new, _ = await world.open()
    await new.append(world.commit(1))
    assert await seal_abandoned(world.store, world.clock.sources(), found) is None
    await new.append(world.commit(2))
    assert await world.history() == [an_id(1), an_id(2)]


async def test_a_takeover_is_found_when_opening(world: World, caplog: pytest.LogCaptureFixture) -> None:
    log, _ = await world.create()
    await log.append(world.commit(1))
    await log.aclose()
    epoch = log.epoch
    await put_entry(world.store, epoch, 2, *world.commit(2)(log.state), time_us=world.clock.now_us)
    await take_over(world)
    found = await read_repo(world.store, world.clock.sources())
    assert found is not None
    opened = await open_repository(world.store, world.clock.sources())
    assert opened.layout is Layout.REPO
    await opened.aclose()
    assert "1 entries after slot 1 are in the log only" in caplog.text
    await world.store.delete([slot_key(epoch, 3)])
    stranded = await seal_abandoned(world.store, world.clock.sources(), found)
    assert stranded is not None
    assert (stranded.after, [entry.n for entry in stranded.entries]) == (1, [2])
    assert await seal_abandoned(world.store, world.clock.sources(), found) is None


# ---------------------------------------------------------------- ops log


async def test_no_backup_is_made_of_a_repo_that_another_client_has_replaced(world: World) -> None:
    log, _ = await world.create(updates_per_file=3)
    other, _ = await world.open(updates_per_file=3)
    for i in range(1, 12):
        writer = (log, other)[i % 2]
        await writer.refresh()
        await writer.append(world.commit(i))
        await writer.checkpoint()
    named: list[str] = []
    before = decode_repo((await world.store.get(REPO_KEY)).data).repo_before_updates
    while before is not None:
        named.append(overwritten_repo_key(before))
        before = decode_repo((await world.store.get(named[-1])).data).repo_before_updates
    made = [item.key async for page in world.store.list_pages("overwritten/") for item in page]
    assert sorted(named) == made
    assert len(made) >= 3


async def test_a_long_ops_log_continues_in_backups_and_lists_each_update_once(world: World) -> None:
    log, _ = await world.create(updates_per_file=3)
    for i in range(1, 12):
        await log.append(world.commit(i))
        await log.checkpoint()
    info = decode_repo((await world.store.get("repo")).data)
    assert len(info.updates) <= 3
    assert info.repo_before_updates is not None
    other, _ = await world.open()
    for one in (log, other):
        assert [u.change.snapshot async for u in one.updates() if isinstance(u.change, NewCommit)] == [
            an_id(i) for i in range(11, 0, -1)
        ]
    assert len(other.state.updates) <= 3


async def put_embedding(world: World, log: LogLayout) -> None:
    """The first entry of another client, with a small file in it."""
    events, objects = world.commit(1)(log.state), {"snapshots/SMALL": b"small"}
    await put_entry(world.store, log.epoch, 1, *events, time_us=world.clock.now_us, objects=objects)


async def test_files_embedded_in_entries_become_objects_before_a_checkpoint_passes_them(world: World) -> None:
    log, storage = await world.create()
    await put_embedding(world, log)
    await log.refresh()
    assert log.view.embedded.find("snapshots/SMALL") == b"small"
    storage.requests.clear()
    await log.checkpoint()
    assert [request.key for request in storage.of("put")] == ["snapshots/SMALL", "repo"]
    assert isinstance(await world.store.get("snapshots/SMALL"), GetResult)
    assert log.view.embedded.find("snapshots/SMALL") is None


async def test_a_store_without_a_clock_is_trusted_by_the_clients_own(world: World) -> None:
    log, _ = await world.create()
    storage = ScriptedStorage(world.store)

    async def no_date(request: Request, send: Send) -> object:
        answer = await send()
        if isinstance(answer, PutResult):
            return PutResult(version=answer.version, date_us=None)
        if isinstance(answer, GetResult):
            return GetResult(
                body=answer.data, size=answer.size, version=answer.version, modified_us=answer.modified_us, date_us=None
            )
        return answer

    storage.script = no_date
    reader = await open_repository(storage, world.clock.sources())
    world.logs.append(reader)
    await log.append(world.commit(1))
    await log.checkpoint()
    await world.prune(log.epoch, 1)
    assert (await reader.refresh()).branch_tip("main") == an_id(1)
    await reader.append(world.commit(2))
    assert await world.history() == [an_id(1), an_id(2)]


@pytest.mark.parametrize("who", ["converter", "opener"])
async def test_files_embedded_in_entries_become_objects_before_a_conversion_ends_the_log(
    world: World, who: str
) -> None:
    log, storage = await settled(world)
    await put_embedding(world, log)
    if who == "converter":
        await log.convert_to_repo_object()
    else:
        seal = encode_entry(n=2, nonce=b"y" * 16, time_us=1, since_us=None, events=encode_events([e.Sealed()]))
        await world.store.put(slot_key(log.epoch, 2), seal)
        storage = ScriptedStorage(world.store)
        opened = await open_repository(storage, world.clock.sources())
        assert opened.layout is Layout.REPO
        await opened.aclose()
    assert [r.key for r in storage.of("put") if not slots(r)][-2:] == ["snapshots/SMALL", "repo"]
    assert await detect(world.store) is Layout.REPO


async def test_a_checkpoint_that_fails_unexpectedly_is_reported_and_commits_go_on(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, _ = await world.create()

    def fail(info: object) -> bytes:
        raise OverflowError("too much")

    with monkeypatch.context() as patch:
        patch.setattr(objects, "encode_and_keep", fail)
        await log.append(world.commit(1))
        await until(lambda: all(task.done() for task in log.tasks))
        assert "report this" in caplog.text
    await log.append(world.commit(2))
    await until(lambda: all(task.done() for task in log.tasks))
    assert log.view.checkpoint_n == 2


async def test_checkpoints_take_a_small_share_of_the_time_however_long_they_take(world: World) -> None:
    log, storage = await settled(world)

    async def slow(request: Request, send: Send) -> object:
        if replaces_repo(request):
            world.clock.move(0.1)
        return await send()

    storage.script = slow
    began_us = world.clock.now_us
    for i in range(1, 40):
        await log.append(world.commit(i))
        await asyncio.sleep(0)
    await until(lambda: all(task.done() for task in log.tasks))
    assert log.view.checkpoint_n == log.n == 39, "the last one is written, sooner or later"
    checkpoints = len(storage.of("put", "repo")) - 1
    assert checkpoints * 0.1 <= (world.clock.now_us - began_us) / 1e6 / 8


async def test_closing_does_not_wait_for_a_pause_between_checkpoints(world: World) -> None:
    _, storage = await settled(world)
    clock = ManualClock(world.clock.now_us)

    async def for_ever(seconds: float) -> None:
        await asyncio.Event().wait()

    patient = await open_log(storage, replace(clock.sources(), sleep=for_ever))
    await patient.append(world.commit(1))
    await until(lambda: patient.view.checkpoint_n == 1)
    await patient.append(world.commit(2))
    await asyncio.sleep(0)
    assert not all(task.done() for task in patient.tasks)
    await asyncio.wait_for(patient.aclose(), 5)
    assert patient.view.checkpoint_n == 2


async def test_a_repository_that_cannot_be_asked_for_credentials_is_not_taken_for_removed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failed checkpoint is logged; the error of a user's callback for credentials does not end the task."""
    log, _ = await world.create()

    async def refuse(key: str) -> NoReturn:
        raise InvalidInputError("refreshing failed with RuntimeError", ErrorKind.INVALID_CREDENTIALS)

    monkeypatch.setattr(log.view.storage, "head", refuse)
    assert await log.view.is_gone() is False
