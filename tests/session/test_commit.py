"""Commits: what they cost in round trips, and what is left of those that fail, are cancelled, or lose their answer."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import icechunk
from icechunk.config import EngineConfig, RepositoryConfig
from icechunk.errors import (
    CommitOutcomeUnknown,
    ConflictError,
    ErrorKind,
    InvalidInputError,
    ReadOnlyError,
    SessionStateError,
    StorageError,
)
from icechunk.format.manifest import encode_manifest
from icechunk.log.repository.create import create_log
from icechunk.repository import Repository
from icechunk.runtime.clock import SYSTEM, Sources
from icechunk.session import commit
from icechunk.session.core import Core
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import ByteRange, GetResult, Storage
from icechunk.testing.faulty import Fault, FaultyStorage, PlannedRequest, scripted
from icechunk.testing.recording import RecordingStorage
from icechunk.testing.wrapping import WrappingStorage
from tests.inside import prepare_writes
from tests.raising import raises

GROUP = b'{"zarr_format": 3, "node_type": "group", "attributes": {}}'
ARRAY = (
    b'{"zarr_format": 3, "node_type": "array", "shape": [%d], "data_type": "int8", "chunk_grid": {"name": "regular", '
    b'"configuration": {"chunk_shape": [1]}}, "chunk_key_encoding": {"name": "default"}, "fill_value": 0, '
    b'"codecs": [{"name": "bytes"}], "attributes": {}}'
)


async def messages(repository: Repository) -> list[str]:
    return [info.message async for info in repository.async_ancestry(branch="main")]


async def changed(repository: Repository, name: str = "x") -> icechunk.Session:
    session = await repository.writable_session_async("main")
    session._content.set_metadata(f"/{name}", GROUP)
    return session


# -- round trips -------------------------------------------------------------------------------------------------------


async def settled(recording: RecordingStorage, repository: Repository) -> None:
    """Let background work end, and count from here."""
    await repository.checkpoint_async()
    recording.clear()


def of_the_commit(recording: RecordingStorage) -> RecordingStorage:
    """Without the checkpoint and the files of a small commit, which go on behind it."""
    recording.requests = [
        request for request in recording.requests if request.key != "repo" and request.ended is not None
    ]
    return recording


APART = RepositoryConfig(engine=EngineConfig(small_commit_bytes=0))
"""No commit is embedded in the log."""


async def test_creating_and_opening_cost_few_round_trips() -> None:
    recording = RecordingStorage(MemoryStorage())
    repository = await Repository.create_async(recording)
    assert recording.dependent_rounds() == 4  # clean? → first snapshot → repo → still no format 1?
    recording.clear()
    opened = await Repository.open_async(recording)
    assert recording.dependent_rounds() == 1  # repo and the listing of the log
    recording.clear()
    await (await changed(repository)).commit_async("first")
    await settled(recording, repository)
    opened = await Repository.open_async(recording)
    assert recording.dependent_rounds() == 1
    await opened.readonly_session_async("main")
    assert recording.dependent_rounds() == 2  # the entries acknowledged since; repo has the snapshot


async def test_a_session_right_after_the_open_has_commits_acknowledged_in_between() -> None:
    memory = MemoryStorage()
    writer = await Repository.create_async(memory)
    acknowledged: list[str] = []

    class Slow(WrappingStorage):
        async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
            answer = await self.inner.get(key, byte_range)
            if key == "repo" and not acknowledged:
                # Another thread commits while the answer is under way.
                acknowledged.append(await (await changed(writer, "theirs")).commit_async("theirs"))
            return answer

    opened = await Repository.open_async(Slow(memory))
    session = await opened.readonly_session_async("main")
    assert session.snapshot_id == acknowledged[0]


async def test_a_tail_after_the_checkpoint_costs_one_round_trip_more() -> None:
    recording = RecordingStorage(FaultyStorage(MemoryStorage()))
    repository = await Repository.create_async(recording)
    faulty = recording.inner
    assert isinstance(faulty, FaultyStorage)
    faulty.plan = lambda request: Fault.FAIL_BEFORE if (request.verb, request.key) == ("put", "repo") else Fault.NONE
    for n in range(3):
        await (await changed(repository, f"n{n}")).commit_async("x")
    recording.clear()
    await Repository.open_async(MemoryCopy(recording))
    # Objects that the writer still puts in the background do not belong to the open.
    recording.requests = [request for request in recording.requests if request.verb != "put"]
    assert recording.dependent_rounds() == 2


class MemoryCopy(WrappingStorage):
    """The same requests under another identity."""


@pytest.mark.parametrize(("config", "rounds"), [(None, 1), (APART, 2)], ids=["small", "files apart"])
async def test_a_session_begins_in_one_round_trip_and_commits_in_one_more_or_two(
    config: RepositoryConfig | None, rounds: int
) -> None:
    recording = RecordingStorage(MemoryStorage())
    repository = await Repository.create_async(recording, config)
    await (await changed(repository, "warm")).commit_async("warm")
    for n in range(3):
        await settled(recording, repository)
        session = await changed(repository, f"n{n}")
        assert recording.dependent_rounds() == 1  # one look at the next slot; the snapshot was written here
        recording.clear()
        await session.commit_async(f"n{n}")
        assert of_the_commit(recording).dependent_rounds() == rounds  # files?, swap
        assert recording.count("put") == (1 if config is None else 3)
        assert recording.count("get") == recording.count("list") == recording.count("head") == 0


async def test_an_append_to_a_large_array_reads_no_manifest_and_puts_one() -> None:
    recording = RecordingStorage(MemoryStorage())
    repository = await Repository.create_async(recording)
    most = 200_000
    for first, last in ((0, most), (most, most + 1000)):
        await settled(recording, repository)
        # Another repository object: nothing is cached that the append could read without a request.
        opened = await Repository.open_async(MemoryCopy(recording))
        session = await opened.writable_session_async("main")
        session._content.set_metadata("/a", ARRAY % last)
        recording.clear()
        session.store.set_virtual_refs_arr(
            "a",
            (last - first,),
            ["s3://bucket/object"] * (last - first),
            np.arange(first, last, dtype=np.uint64),
            np.full(last - first, 7, np.uint64),
            arr_offset=(first,),
            validate_containers=False,
        )
        await session.commit_async("references")
        await opened.checkpoint_async()  # the manifest of a small commit is put behind it
        verbs = [request.verb for request in recording.requests if request.key.startswith("manifests/")]
        assert verbs == ["put"] * (4 if last == most else 1)


@pytest.mark.parametrize("known", [True, False], ids=["repo has a file", "repo has none"])
async def test_the_first_commit_of_a_process_checks_the_store_behind_its_session(known: bool) -> None:
    memory = MemoryStorage()
    first = await Repository.create_async(memory)
    if known:
        await (await changed(first)).commit_async("warm")
    await first.aclose()
    recording = RecordingStorage(memory)
    repository = await Repository.open_async(MemoryCopy(recording))
    session = await changed(repository, "y")
    await session.commit_async("first")
    # open; what was acknowledged since; the check, with the bytes of a file that it has to read where it has none; swap
    assert of_the_commit(recording).dependent_rounds() == (4 if known else 5)
    assert recording.count("put") == 2


async def test_a_store_that_was_checked_behind_the_session_is_not_waited_for_by_the_first_commit() -> None:
    memory = MemoryStorage()
    await (await Repository.create_async(memory)).aclose()
    recording = RecordingStorage(memory)
    repository = await Repository.open_async(MemoryCopy(recording))
    session = await changed(repository)
    await prepare_writes(repository)
    recording.clear()
    await session.commit_async("first")
    assert of_the_commit(recording).dependent_rounds() == 1


async def test_a_session_on_a_snapshot_of_another_process_begins_in_two_round_trips() -> None:
    recording = RecordingStorage(MemoryStorage())
    ours = await Repository.create_async(recording)
    theirs = await Repository.open_async(recording)
    await settled(recording, theirs)
    await (await changed(ours)).commit_async("ours")
    await settled(recording, ours)
    await theirs.writable_session_async("main")
    assert recording.dependent_rounds() == 2  # the new entry, with the snapshot; a look at the next slot


@pytest.mark.parametrize("chunk", [b"x" * 10, b"x" * 10_000], ids=["inline", "objects"])
async def test_chunks_in_flight_and_appends_add_no_round_trip(chunk: bytes) -> None:
    recording = RecordingStorage(MemoryStorage())
    repository = await Repository.create_async(recording)
    await (await changed(repository, "warm")).commit_async("warm")
    for n in range(3):
        # The first one makes the array, the others append to it.
        session = await repository.writable_session_async("main")
        session._content.set_metadata("/array", ARRAY % (20 * (n + 1)))
        await settled(recording, repository)
        for i in range(20):
            await session._content.set_chunk("/array", (20 * n + i,), chunk)
        await session.commit_async(f"append {n}")
        # Chunks are not embedded: they exist before the entry that refers to them.
        assert of_the_commit(recording).dependent_rounds() == (1 if len(chunk) == 10 else 2)
        assert recording.count("get") == 0


def many_references(session: icechunk.Session, count: int) -> None:
    session._content.set_metadata("/a", ARRAY % count)
    session.store.set_virtual_refs_arr(
        "a",
        (count,),
        [f"s3://bucket/{i:08d}" for i in range(count)],
        np.arange(count, dtype=np.uint64),
        np.full(count, 7, np.uint64),
        validate_containers=False,
    )


@pytest.mark.parametrize("from_references", [0, 1 << 40])
async def test_manifests_that_are_encoded_together_are_those_of_one_after_another(
    monkeypatch: pytest.MonkeyPatch, from_references: int
) -> None:
    monkeypatch.setattr(commit, "_TOGETHER_FROM", from_references)
    count = 150_000
    storage = MemoryStorage()
    repository = await Repository.create_async(storage)
    session = await repository.writable_session_async("main")
    many_references(session, count)
    await session.commit_async("references")
    reader = await (await Repository.open_async(storage)).readonly_session_async("main")
    (array,) = [node for node in reader._content.nodes("/") if node.path == "/a"]
    assert len(array.manifests) == 3
    found = [refs async for refs in reader._content.chunk_references("/a")]
    order = np.concatenate([refs.coords[:, 0] for refs in found])
    offsets = np.concatenate([refs.offset for refs in found])
    assert np.array_equal(np.sort(order), np.arange(count))
    assert np.array_equal(offsets, order)
    assert all(refs.locations[int(refs.location[0])] == f"s3://bucket/{refs.coords[0, 0]:08d}" for refs in found)


@pytest.mark.parametrize("failing_one", [0, 1, 2])
async def test_a_manifest_that_cannot_be_encoded_ends_the_commit_and_the_other_encodings(
    monkeypatch: pytest.MonkeyPatch, failing_one: int
) -> None:
    monkeypatch.setattr(commit, "_TOGETHER_FROM", 0)
    calls = itertools.count()

    def failing(*args: Any, **options: Any) -> bytes:
        if next(calls) == failing_one:
            raise InvalidInputError("no", ErrorKind.SERIALIZATION)
        return encode_manifest(*args, **options)

    monkeypatch.setattr(commit, "encode_manifest", failing)
    repository = await Repository.create_async(MemoryStorage())
    session = await repository.writable_session_async("main")
    many_references(session, 150_000)
    before = asyncio.all_tasks()
    with raises(InvalidInputError, "serialization"):
        await session.commit_async("fails")
    assert not [task for task in asyncio.all_tasks() - before if "encoding" in task.get_name()]
    await session.commit_async("works")
    assert await messages(repository) == ["works", "Repository initialized"]


async def test_replacing_chunks_reads_their_manifest_once() -> None:
    storage = MemoryStorage()
    recording = RecordingStorage(storage)
    repository = await Repository.create_async(storage, APART)
    session = await repository.writable_session_async("main")
    session._content.set_metadata("/array", ARRAY % 20)
    for i in range(20):
        await session._content.set_chunk("/array", (i,), b"1")
    await session.commit_async("all")
    other = await Repository.open_async(recording)
    session = await other.writable_session_async("main")
    await session._content.set_chunk("/array", (3,), b"2")
    await prepare_writes(other)
    await settled(recording, other)
    await session.commit_async("one")
    assert of_the_commit(recording).dependent_rounds() == 3
    assert recording.count("get") == 1


async def test_a_conflict_that_is_known_uploads_nothing() -> None:
    recording = RecordingStorage(MemoryStorage())
    repository = await Repository.create_async(recording)
    winner, loser = await changed(repository, "winner"), await changed(repository, "loser")
    await winner.commit_async("winner")
    await settled(recording, repository)
    with pytest.raises(ConflictError):
        await loser.commit_async("loser")
    assert recording.count("put") == 0


# -- failures ----------------------------------------------------------------------------------------------------------


def failing(verb: str, prefix: str, fault: Fault = Fault.FAIL_BEFORE) -> Callable[[PlannedRequest], Fault]:
    return lambda request: fault if request.verb == verb and request.key.startswith(prefix) else Fault.NONE


@pytest.mark.parametrize("prefix", ["snapshots/", "transactions/", "manifests/", "chunks/"])
async def test_a_commit_whose_file_cannot_be_written_leaves_the_session_as_it_was(prefix: str) -> None:
    faulty = FaultyStorage(MemoryStorage())
    repository = await Repository.create_async(faulty, APART)
    await (await changed(repository, "first")).commit_async("first")
    session = await repository.writable_session_async("main")
    session._content.set_metadata("/array", ARRAY % 4)
    faulty.plan = failing("put", prefix)
    for i in range(4):
        # More than fits into the entry of the log, and into a manifest.
        await session._content.set_chunk("/array", (i,), b"x" * 100_000)
    with pytest.raises(StorageError):
        await session.commit_async("fails")
    assert await messages(repository) == ["first", "Repository initialized"]
    assert not session.read_only
    assert session.has_uncommitted_changes
    faulty.plan = lambda request: Fault.NONE
    await session.commit_async("works")
    assert await messages(await Repository.open_async(faulty)) == ["works", "first", "Repository initialized"]
    for i in range(4):
        assert await session._content.get_chunk("/array", (i,), None) == b"x" * 100_000


async def test_an_answer_of_the_swap_that_is_lost_is_found_again_and_nothing_is_committed_twice() -> None:
    faulty = FaultyStorage(MemoryStorage())
    repository = await Repository.create_async(faulty)
    session = await changed(repository)
    faulty.plan = scripted({("put", 0): Fault.LOSE_ANSWER}, prefix="log/")
    snapshot_id = await session.commit_async("once")
    assert await messages(repository) == ["once", "Repository initialized"]
    assert await repository.lookup_branch_async("main") == snapshot_id


async def no_pause(_: float) -> None:
    await asyncio.sleep(0)


IMPATIENT = replace(SYSTEM, sleep=no_pause)


async def repository_with(storage: Storage, sources: Sources) -> Repository:
    """Open with sources of our own."""
    core = Core(storage, RepositoryConfig(), sources=sources)
    await core.load_config()
    return Repository(core)


@pytest.mark.parametrize("landed", [True, False])
async def test_a_swap_without_any_answer_is_of_unknown_outcome_until_its_token_is_settled(landed: bool) -> None:
    memory = MemoryStorage()
    faulty = FaultyStorage(memory)
    await Repository.create_async(memory)
    repository = await repository_with(faulty, IMPATIENT)
    await (await changed(repository, "warm")).commit_async("warm")
    session = await changed(repository)

    def dark(request: PlannedRequest) -> Fault:
        if not request.key.startswith("log/"):
            return Fault.NONE
        return Fault.LOSE_ANSWER if landed and request.verb == "put" else Fault.FAIL_BEFORE

    faulty.plan = dark
    with pytest.raises(CommitOutcomeUnknown) as unknown:
        await session.commit_async("lost?")
    assert session.unsettled_commit == unknown.value.token
    with raises(SessionStateError, "not-allowed", "session.unsettled_commit"):
        session._content.set_metadata("/y", GROUP)
    with pytest.raises(SessionStateError):
        await session.commit_async("again")
    with pytest.raises(StorageError):
        await repository.settle_async(unknown.value.token)
    faulty.plan = lambda request: Fault.NONE
    # Any client can settle it: it needs nothing but the token.
    settling = repository if landed else await Repository.open_async(MemoryCopy(memory))
    assert await settling.settle_async(unknown.value.token) is landed
    assert await repository.settle_async(unknown.value.token) is landed
    # Where it is certain that nothing landed, the session goes on.
    assert (session.unsettled_commit is None) is not landed
    if not landed:
        session._content.set_metadata("/y", GROUP)
    expected = ["lost?", "warm", "Repository initialized"] if landed else ["warm", "Repository initialized"]
    assert await messages(repository) == expected
    await (await changed(repository, "next")).commit_async("next")
    assert await messages(await Repository.open_async(memory)) == ["next", *expected]


# -- concurrency within one session ------------------------------------------------------------------------------------


class GatedStorage(WrappingStorage):
    """Holds puts below a prefix until they are let through."""

    def __init__(self, inner: Storage, prefix: str) -> None:
        super().__init__(inner)
        self.prefix = prefix
        self.reached = asyncio.Event()
        self.gate = asyncio.Event()

    async def put(self, key, data, precondition=icechunk.storage.port.ANY, *, kind="metadata", metadata=None):  # type: ignore[no-untyped-def]
        # The check of the store, under way behind a new session, is not meant.
        if key.startswith(self.prefix) and (self.prefix == "log/" or precondition is icechunk.storage.port.ANY):
            self.reached.set()
            await self.gate.wait()
        return await self.inner.put(key, data, precondition, kind=kind, metadata=metadata)


async def gated(prefix: str) -> tuple[GatedStorage, Repository]:
    memory = MemoryStorage()
    first = await Repository.create_async(memory)
    await (await changed(first, "warm")).commit_async("warm")
    await first.aclose()
    storage = GatedStorage(memory, prefix)
    return storage, await Repository.open_async(storage, APART)


@pytest.mark.parametrize("prefix", ["snapshots/", "log/"])
async def test_writes_during_a_commit_are_refused_not_lost(prefix: str) -> None:
    storage, repository = await gated(prefix)
    session = await changed(repository)
    committing = asyncio.ensure_future(session.commit_async("first"))
    await storage.reached.wait()
    with raises(SessionStateError, "not-allowed", "is running"):  # words: nothing is to be settled yet
        session._content.set_metadata("/y", GROUP)
    with pytest.raises(SessionStateError):
        session.discard_changes()
    with pytest.raises(SessionStateError):
        await session.commit_async("second")
    storage.gate.set()
    await committing
    assert session.read_only
    assert await messages(repository) == ["first", "warm", "Repository initialized"]


@pytest.mark.parametrize("size", [1, 100_000], ids=["inline", "an object"])
async def test_a_committed_session_takes_no_chunks(size: int) -> None:
    repository = await Repository.create_async(MemoryStorage())
    session = await repository.writable_session_async("main")
    session._content.set_metadata("/array", ARRAY % 2)
    await session._content.set_chunk("/array", (0,), b"1" * size)
    await session.commit_async("first")
    with raises(ReadOnlyError, ReadOnlyError.default_kind):
        await session._content.set_chunk("/array", (1,), b"1" * size)


async def test_a_commit_cancelled_before_its_swap_leaves_the_session_as_it_was() -> None:
    storage, repository = await gated("transactions/")
    session = await changed(repository)
    committing = asyncio.ensure_future(session.commit_async("first"))
    await storage.reached.wait()
    committing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await committing
    assert not session.read_only
    assert session.has_uncommitted_changes
    storage.gate.set()
    await session.commit_async("second")
    assert await messages(repository) == ["second", "warm", "Repository initialized"]


async def test_a_commit_cancelled_during_its_swap_goes_on_without_its_caller() -> None:
    storage, repository = await gated("log/")
    session = await changed(repository)
    committing = asyncio.ensure_future(session.commit_async("first"))
    await storage.reached.wait()
    committing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await committing
    with raises(SessionStateError, "not-allowed", "session.unsettled_commit"):
        session._content.set_metadata("/y", GROUP)
    storage.gate.set()
    assert session.unsettled_commit is not None
    assert await repository.settle_async(session.unsettled_commit)
    assert await messages(repository) == ["first", "warm", "Repository initialized"]


# -- sources -----------------------------------------------------------------------------------------------------------


async def test_ids_and_times_come_from_the_injected_sources_only() -> None:
    def sources() -> Sources:
        numbers, clock = itertools.count(1), itertools.count(1_700_000_000_000_000, 1_000)
        return Sources(
            wall_us=lambda: next(clock),
            elapsed_us=lambda: 0,
            random_bytes=lambda n: next(numbers).to_bytes(n),
            sleep=no_pause,
        )

    async def run() -> dict[str, bytes]:
        made = sources()
        memory = MemoryStorage(made)
        await (await create_log(memory, made)).aclose()
        repository = await repository_with(memory, made)
        session = await repository.writable_session_async("main")
        session._content.set_metadata("/array", ARRAY % 4)
        for i in range(4):
            await session._content.set_chunk("/array", (i,), b"x" * 600)
        await session.commit_async("first")
        await repository.aclose()
        return {item.key: (await memory.get(item.key)).data async for page in memory.list_pages() for item in page}

    assert await run() == await run()


async def test_a_commit_cancelled_during_a_swap_that_is_lost_leaves_the_session_writable_once_that_is_certain() -> None:
    storage, repository = await gated("log/")
    session = await changed(repository)
    committing = asyncio.ensure_future(session.commit_async("ours"))
    await storage.reached.wait()
    committing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await committing
    token = session.unsettled_commit
    assert token is not None
    theirs = await Repository.open_async(storage.inner)
    await (await changed(theirs, "theirs")).commit_async("theirs")
    storage.gate.set()
    assert not await repository.settle_async(token)
    assert session.unsettled_commit is None
    session._content.set_metadata("/y", GROUP)
    with pytest.raises(ConflictError):
        await session.commit_async("ours, again")
    assert await messages(repository) == ["theirs", "warm", "Repository initialized"]


async def test_the_event_loop_has_its_turn_between_commits_that_wait_for_nothing() -> None:
    repository = await Repository.create_async(MemoryStorage())
    sessions = [await changed(repository, f"a{i}") for i in range(40)]
    turns, ended = 0, asyncio.Event()

    async def heartbeat() -> None:
        nonlocal turns
        while not ended.is_set():
            turns += 1
            await asyncio.sleep(0)

    async def committed() -> list[int]:
        async def one(session: icechunk.Session) -> int:
            before = turns
            await session.commit_async("one of many", rebase_with=icechunk.ConflictDetector())
            return turns - before

        try:
            return await asyncio.gather(*map(one, sessions))
        finally:
            ended.set()

    _, waited = await asyncio.gather(heartbeat(), committed())
    assert max(waited) >= 40 // 8
    # The first ones land before the last ones are made.
    assert min(waited) < max(waited)
    assert len(await messages(repository)) == 41
