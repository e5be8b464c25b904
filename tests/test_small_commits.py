"""Small commits are embedded in the log: their cost, and that nothing depends on their objects before a checkpoint."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import icechunk
from icechunk.config import EngineConfig, RepositoryConfig
from icechunk.errors import IcechunkError, ObjectNotFoundError, StorageError
from icechunk.format.ids import object_id_from_text
from icechunk.format.keys import transaction_key
from icechunk.format.repo.codec import decode_repo
from icechunk.log.repository.entries import embedded
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.entry import decode_entry, parse_slot_key
from icechunk.log.repository.events import CollectionRan
from icechunk.repository import Repository
from icechunk.session.content import SessionContent
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import ANY, Storage
from icechunk.testing.faulty import Fault, FaultyStorage, PlannedRequest
from icechunk.testing.recording import RecordingStorage
from icechunk.testing.wrapping import WrappingStorage
from tests.inside import content_of, core_of, log_of, prepare_writes
from tests.nodes import read_chunk, write_chunk, write_node
from tests.raising import raises

GROUP = b'{"zarr_format": 3, "node_type": "group", "attributes": {}}'
ARRAY = (
    b'{"zarr_format": 3, "node_type": "array", "shape": [%d], "data_type": "int8", "chunk_grid": {"name": "regular", '
    b'"configuration": {"chunk_shape": [1]}}, "chunk_key_encoding": {"name": "default"}, "fill_value": 0, '
    b'"codecs": [{"name": "bytes"}], "attributes": {}}'
)
FILES = ("snapshots/", "manifests/", "transactions/")


class Elsewhere(WrappingStorage):
    """The same place seen from another process: nothing is shared with who else uses it."""


async def write(repository: Repository, name: str, chunk: bytes = b"x", message: str = "") -> str:
    session = await repository.writable_session_async("main")
    await write_node(session, f"/{name}", ARRAY % 4)
    await write_chunk(session, f"/{name}", (0,), chunk)
    return await session.commit_async(message or name)


async def read(repository: Repository, name: str) -> bytes | memoryview | None:
    return await read_chunk(await repository.readonly_session_async("main"), f"/{name}", (0,))


async def keys(storage: Storage, *prefixes: str) -> set[str]:
    found = {item.key async for page in storage.list_pages() for item in page}
    return {key for key in found if key.startswith(prefixes)}


def only_the_log(request: PlannedRequest) -> Fault:
    """A writer that does nothing more, as if killed, once its entries have landed."""
    return Fault.FAIL_BEFORE if request.verb == "put" and not request.key.startswith("log/") else Fault.NONE


async def dead_after_its_commits(memory: MemoryStorage, *names: str) -> list[str]:
    """Commits whose files are in the log only."""
    faulty = FaultyStorage(Elsewhere(memory))
    repository = await Repository.open_async(faulty)
    await prepare_writes(repository)
    faulty.plan = only_the_log
    made = [await write(repository, name, name.encode()) for name in names]
    log = await log_of(repository)
    assert isinstance(log, LogLayout)
    for task in log.tasks:
        task.cancel()
    return made


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")


# -- where the files are -----------------------------------------------------------------------------------------------


async def test_a_small_commit_has_objects_soon_after_it_and_at_the_latest_at_the_close() -> None:
    memory = MemoryStorage()
    repository = await Repository.create_async(memory)
    before = await keys(memory, *FILES)
    await write(repository, "a")
    await repository.aclose()
    assert {key.split("/")[0] for key in await keys(memory, *FILES) - before} == {
        "snapshots",
        "manifests",
        "transactions",
    }
    assert await read(await Repository.open_async(Elsewhere(memory)), "a") == b"x"


async def test_a_commit_above_the_limit_is_written_as_objects_and_with_limit_zero_every_commit_is() -> None:
    for limit, chunk_bytes in ((None, 500), (0, 1)):
        memory = MemoryStorage()
        config = RepositoryConfig(engine=EngineConfig(small_commit_bytes=limit))
        repository = await Repository.create_async(memory, config)
        session = await repository.writable_session_async("main")
        await write_node(session, "/a", ARRAY % 200)
        for i in range(200):
            await write_chunk(session, "/a", (i,), _noise(i, chunk_bytes))
        await session.commit_async("a")
        assert await _embedded_in_entries(memory) == [set()]
        await repository.aclose()


def _noise(seed: int, n: int) -> bytes:
    return random.Random(seed).randbytes(n)


async def _embedded_in_entries(memory: Storage) -> list[set[str]]:
    """Kinds of the files in each entry, oldest entry first."""
    found = []
    for key in sorted(await keys(memory, "log/"), reverse=True):
        slot = parse_slot_key(key)
        assert slot is not None
        entry = decode_entry((await memory.get(key)).data, n=slot[1])
        found.append({key.split("/")[0] for key in entry.objects})
    return found


async def test_another_client_reads_compares_and_rebases_on_files_that_only_the_log_has() -> None:
    memory = MemoryStorage()
    base = await write(await Repository.create_async(memory), "base")
    early = await Repository.open_async(Elsewhere(memory))
    behind = await early.writable_session_async("main")
    before = await keys(memory, *FILES)
    made = await dead_after_its_commits(memory, "a", "b")
    assert {key.partition("/")[2] for key in await keys(memory, *FILES) - before}.isdisjoint(made)
    late = await Repository.open_async(Elsewhere(memory))
    for repository in (early, late):
        assert await read(repository, "a") == b"a"
        assert await read(repository, "b") == b"b"
        assert [info.message async for info in repository.async_ancestry(branch="main")][:3] == ["b", "a", "base"]
        diff = await repository.diff_async(from_snapshot_id=base, to_snapshot_id=made[1])
        assert diff.new_arrays == {"/a", "/b"}
    await write_node(behind, "/mine", GROUP)
    await behind.commit_async("mine", rebase_with=icechunk.ConflictDetector())
    assert await read(late, "b") == b"b"


async def test_a_client_that_writes_a_checkpoint_puts_the_files_that_others_embedded_in_the_log() -> None:
    memory = MemoryStorage()
    await Repository.create_async(memory)
    made = await dead_after_its_commits(memory, "a", "b")
    repository = await Repository.open_async(Elsewhere(memory))
    await repository.checkpoint_async()
    assert {f"{kind}/{id}" for kind in ("snapshots", "transactions") for id in made} <= await keys(memory, *FILES)
    without_log = MemoryStorage()
    for key in await keys(memory, "repo", "chunks/", *FILES):
        await without_log.put(key, (await memory.get(key)).data)
    assert await read(await Repository.open_async(without_log), "b") == b"b"


async def test_a_checkpoint_that_cannot_put_a_file_first_is_not_written() -> None:
    memory = MemoryStorage()
    await Repository.create_async(memory)
    await dead_after_its_commits(memory, "a")
    before = (await memory.get("repo")).data
    for prefix in FILES:
        faulty = FaultyStorage(Elsewhere(memory))
        repository = await Repository.open_async(faulty)
        faulty.plan = lambda request: (
            Fault.FAIL_BEFORE if request.verb == "put" and request.key.startswith(prefix) else Fault.NONE  # noqa: B023
        )
        with pytest.raises(StorageError):
            await repository.checkpoint_async()
        assert (await memory.get("repo")).data == before


async def test_a_conversion_puts_the_files_that_others_left_in_the_log() -> None:
    memory = MemoryStorage()
    await Repository.create_async(memory)
    await dead_after_its_commits(memory, "a")
    repository = await Repository.open_async(Elsewhere(memory))
    await repository.convert_async("repo")
    assert await read(await Repository.open_async(Elsewhere(memory)), "a") == b"a"


async def test_a_commit_that_is_refused_leaves_no_object() -> None:
    memory = MemoryStorage()
    repository = await Repository.create_async(memory)
    loser = await (await Repository.open_async(Elsewhere(memory))).writable_session_async("main")
    await write_node(loser, "/loser", GROUP)
    await write(repository, "winner")
    await repository.checkpoint_async()
    before = await keys(memory, *FILES)
    with pytest.raises(icechunk.ConflictError):
        await loser.commit_async("loser")
    assert await keys(memory, *FILES) == before


async def test_a_session_sent_to_another_process_reads_a_manifest_that_only_the_log_has() -> None:
    memory = MemoryStorage()
    await Repository.create_async(memory)
    await dead_after_its_commits(memory, "a")
    repository = await Repository.open_async(Elsewhere(memory))
    session = await repository.readonly_session_async("main")
    # As in a process that has not read the log yet.
    fresh = await Repository.open_async(Elsewhere(memory))
    core_of(fresh).files = type(core_of(fresh).files)(0)
    core_of(fresh)._configure(core_of(fresh).storage, core_of(fresh).config)  # private: a client that remembers no file
    await core_of(fresh)._logs.aclose()  # private: a client that remembers no file
    # A session of another process.
    travelled = icechunk.Session(SessionContent.on(core_of(fresh), content_of(session).log.base))
    assert await read_chunk(travelled, "/a", (0,)) == b"a"


async def test_a_file_that_is_nowhere_is_missed_by_its_name() -> None:
    memory = MemoryStorage()
    repository = await Repository.create_async(memory)
    with raises(ObjectNotFoundError, "object-not-found", "transactions/7DVXGGF4S2JKJ9WRT0K0"):
        await core_of(repository).assets.transaction_log(object_id_from_text("7DVXGGF4S2JKJ9WRT0K0"))


async def test_a_writer_whose_background_puts_fail_tries_again_and_leaves_the_rest_to_the_checkpoint() -> None:
    memory = MemoryStorage()
    faulty = FaultyStorage(memory)
    repository = await Repository.create_async(faulty)
    await write(repository, "warm")
    await repository.checkpoint_async()
    failures = iter([Fault.FAIL_BEFORE, Fault.LOSE_ANSWER, Fault.FAIL_BEFORE])
    faulty.plan = lambda request: (
        next(failures, Fault.NONE) if request.verb == "put" and request.key.startswith(FILES) else Fault.NONE
    )
    snapshot = await write(repository, "a")
    await repository.aclose()
    assert f"snapshots/{snapshot}" in await keys(memory, *FILES)
    marker = decode_repo((await memory.get("repo")).data).snapshots
    assert object_id_from_text(snapshot) in marker


SCRIPT = textwrap.dedent(
    """
    import asyncio, os, sys
    import icechunk
    from icechunk.storage.port import ANY
    from icechunk.testing.wrapping import WrappingStorage
    from tests.nodes import write_chunk, write_node

    class Stuck(WrappingStorage):
        stuck = False
        async def put(self, key, data, precondition=ANY, **options):
            if self.stuck and not key.startswith("log/"):
                await asyncio.sleep(3600)
            return await self.inner.put(key, data, precondition, **options)

    async def main():
        storage = Stuck(icechunk.local_filesystem_storage(sys.argv[1]))
        repository = await icechunk.Repository.open_async(storage)
        await (await repository._core.log()).prepare_writes()  # private: the check of the store is not what is counted
        storage.stuck = True
        session = await repository.writable_session_async("main")
        await write_node(session, "/a", %r)
        await write_chunk(session, "/a", (0,), b"kept")
        print(await session.commit_async("a"), flush=True)
        os.kill(os.getpid(), 9)

    asyncio.run(main())
    """
) % (ARRAY % 4)


async def test_a_process_killed_right_after_its_commit_leaves_a_commit_that_all_clients_read(tmp_path: Path) -> None:
    place = str(tmp_path / "repo")
    await (await Repository.create_async(icechunk.local_filesystem_storage(place))).aclose()
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", SCRIPT, place], capture_output=True, text=True, timeout=60, check=False
    )
    snapshot = done.stdout.strip()
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "repo" / "snapshots" / snapshot).exists()
    repository = await Repository.open_async(icechunk.local_filesystem_storage(place))
    assert await repository.lookup_branch_async("main") == snapshot
    assert await read(repository, "a") == b"kept"
    await repository.checkpoint_async()
    assert (tmp_path / "repo" / "snapshots" / snapshot).exists()
    await repository.aclose()


# -- bounds ------------------------------------------------------------------------------------------------------------


async def test_a_reader_drops_old_files_and_finds_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = MemoryStorage()
    await Repository.create_async(memory)
    reader = await Repository.open_async(Elsewhere(memory))
    log = await log_of(reader)
    assert isinstance(log, LogLayout)
    monkeypatch.setattr(embedded, "_MAX_BYTES", 4_000)  # private: small numbers stand for large ones
    made = await dead_after_its_commits(memory, *"abcdefgh")
    await reader.lookup_branch_async("main")
    core_of(reader).files = type(core_of(reader).files)(0)
    log.share_files(core_of(reader).files)
    old = transaction_key(object_id_from_text(made[0]))
    assert log.view.embedded.find(old) is None
    assert await log.find_file(old) is not None
    await reader.checkpoint_async()
    assert {f"snapshots/{id}" for id in made} <= await keys(memory, *FILES)


async def test_entries_shared_by_many_sessions_stay_small() -> None:
    memory = MemoryStorage()
    repository = await Repository.create_async(memory)
    sessions = []
    for i in range(40):
        await repository.create_branch_async(f"b{i}", await repository.lookup_branch_async("main"))
        session = await repository.writable_session_async(f"b{i}")
        await write_node(session, "/a", ARRAY % 100)
        for j in range(100):
            await write_chunk(session, "/a", (j,), _noise(i * 1000 + j, 500))
        sessions.append(session)
    await asyncio.gather(*(session.commit_async("x") for session in sessions))
    sizes = [item.size async for page in memory.list_pages("log/") for item in page]
    assert max(sizes) < 1_200_000
    shared = [kinds for kinds in await _embedded_in_entries(memory) if kinds]
    assert len(shared) < 40
    assert all(kinds == {"snapshots", "manifests", "transactions"} for kinds in shared)
    await repository.aclose()


async def test_a_late_checkpointer_that_brings_a_collected_file_back_brings_only_garbage() -> None:
    """It puts the embedded files before the marker it knows, and then its own PUT of repo is refused."""
    memory = MemoryStorage()
    repository = await Repository.create_async(memory)
    session = await repository.writable_session_async("main")
    await write_node(session, "/gone", GROUP)
    gone = await session.flush_async("detached")
    log = await log_of(repository)
    assert isinstance(log, LogLayout)
    late = await Repository.open_async(Elsewhere(memory))
    late_log = await log_of(late)
    assert isinstance(late_log, LogLayout)
    late_log.view.embedded.remember(1, {f"snapshots/{gone}": b"the same bytes"})
    await log.append(lambda _: [CollectionRan(cutoff_us=log.store_time_us + 10**9)])
    await log.checkpoint()
    await memory.delete([f"snapshots/{gone}", f"transactions/{gone}"])
    await late_log.checkpoint()
    assert object_id_from_text(gone) not in decode_repo((await memory.get("repo")).data).snapshots
    for client in (repository, late):
        with pytest.raises(IcechunkError):
            await client.readonly_session_async(snapshot_id=gone)


# -- what it costs -----------------------------------------------------------------------------------------------------


async def first_chunk(storage: Storage) -> bytes | memoryview | None:
    repository = await Repository.open_async(storage)
    session = await repository.readonly_session_async("main")
    return await read_chunk(session, "/a", (0,))


@pytest.mark.parametrize(("chunk", "rounds"), [(b"x", 2), (b"x" * 10_000, 3)], ids=["inline", "native"])
async def test_from_nothing_to_the_first_chunk_where_the_checkpoint_is_fresh(chunk: bytes, rounds: int) -> None:
    memory = MemoryStorage()
    repository = await Repository.create_async(memory)
    await write(repository, "a", chunk)
    await repository.aclose()
    recording = RecordingStorage(Elsewhere(memory))
    assert await first_chunk(recording) == chunk
    assert recording.dependent_rounds() == rounds  # repo and the listing; what was acknowledged since; the chunk


@pytest.mark.parametrize(("chunk", "rounds"), [(b"x", 2), (b"x" * 10_000, 3)], ids=["inline", "native"])
async def test_from_nothing_to_the_first_chunk_where_the_checkpoint_is_old(chunk: bytes, rounds: int) -> None:
    memory = MemoryStorage()
    repository = await Repository.create_async(memory)
    await write(repository, "a", chunk)
    await repository.aclose()
    await dead_after_its_commits(memory, "b", "c")
    recording = RecordingStorage(Elsewhere(memory))
    assert await first_chunk(recording) == chunk
    assert recording.dependent_rounds() == rounds + 1  # the tail besides


async def test_from_nothing_to_the_first_chunk_where_the_files_are_too_large_to_be_copied() -> None:
    memory = MemoryStorage()
    repository = await Repository.create_async(memory)
    session = await repository.writable_session_async("main")
    await write_node(session, "/a", ARRAY % 300)
    for i in range(300):
        await write_chunk(session, "/a", (i,), _noise(i, 500))
    await session.commit_async("a")
    await repository.aclose()
    assert len((await memory.get("repo")).data) < 32_000
    recording = RecordingStorage(Elsewhere(memory))
    assert await first_chunk(recording) == _noise(0, 500)
    # repo and the listing; what was acknowledged since; the snapshot; the manifest with the chunk in it
    assert recording.dependent_rounds() == 4


async def test_a_session_long_after_the_open_refreshes_first() -> None:
    memory = MemoryStorage()
    ours = await Repository.create_async(memory)
    theirs = await Repository.open_async(Elsewhere(memory))
    await write(ours, "a")
    assert await read(theirs, "a") == b"x"


async def test_writers_of_one_branch_follow_each_other_in_shared_entries() -> None:
    recording = RecordingStorage(MemoryStorage())
    repository = await Repository.create_async(recording)
    await write(repository, "warm")
    await repository.checkpoint_async()
    recording.clear()

    async def one(i: int) -> None:
        session = await repository.writable_session_async("main")
        await write_node(session, f"/n{i}", GROUP)
        await session.commit_async(f"n{i}", rebase_with=icechunk.ConflictDetector())

    await asyncio.gather(*(one(i) for i in range(64)))
    await repository.checkpoint_async()
    history = [info.message async for info in repository.async_ancestry(branch="main")]
    assert len(history) == 66
    assert recording.count("put", "log/") <= 24
    assert recording.count("get", "log/") <= 8
    # Two files of each commit, and what they share.
    assert recording.count() <= 64 * 2 + 48
    await repository.aclose()


async def test_writers_that_conflict_with_a_pending_commit_are_refused_once_it_has_landed() -> None:
    recording = RecordingStorage(MemoryStorage())
    repository = await Repository.create_async(recording)
    await write(repository, "a")
    sessions = [await repository.writable_session_async("main") for _ in range(8)]
    for i, session in enumerate(sessions):
        await write_chunk(session, "/a", (0,), bytes([i]))
    recording.clear()

    async def one(i: int) -> str:
        return await sessions[i].commit_async(f"n{i}", rebase_with=icechunk.ConflictDetector())

    outcomes = await asyncio.gather(*(one(i) for i in range(8)), return_exceptions=True)
    assert sum(isinstance(outcome, str) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, icechunk.RebaseFailedError) for outcome in outcomes) == 7
    # They wait for its outcome; they do not look again and again.
    assert recording.count("get", "log/") <= 4 * 8
    await repository.aclose()


async def test_those_behind_a_commit_that_is_given_up_go_on_without_it() -> None:
    class Gated(WrappingStorage):
        gate = asyncio.Event()
        reached = asyncio.Event()
        closed = False

        async def put(self, key, data, precondition=ANY, *, kind="metadata", metadata=None):  # type: ignore[no-untyped-def]
            if self.closed and key.startswith("log/"):
                self.reached.set()
                await self.gate.wait()
            return await self.inner.put(key, data, precondition, kind=kind, metadata=metadata)

    storage = Gated(MemoryStorage())
    repository = await Repository.create_async(storage)
    await write(repository, "warm")
    storage.closed = True

    async def one(i: int) -> str:
        session = await repository.writable_session_async("main")
        await write_node(session, f"/n{i}", GROUP)
        return await session.commit_async(f"n{i}", rebase_with=icechunk.ConflictDetector())

    tasks = [asyncio.ensure_future(one(0))]
    await storage.reached.wait()
    tasks += [asyncio.ensure_future(one(i)) for i in range(1, 4)]
    log = await log_of(repository)
    for _ in range(10_000):
        if len(log.expected().snapshots) == 6:
            break
        await asyncio.sleep(0)
    tasks[1].cancel()
    storage.gate.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(outcomes[1], asyncio.CancelledError)
    history = {info.message async for info in repository.async_ancestry(branch="main")}
    assert history == {"n0", "n2", "n3", "warm", "Repository initialized"}
    await repository.aclose()
