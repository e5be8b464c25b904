"""The requests of commits and openings do not grow with the history; counted, not timed."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from unittest import mock

import pytest

from icechunk.format.repo.codec import decode_repo
from icechunk.format.snapshot import codec
from icechunk.format.snapshot.node_encoding import write_nodes
from icechunk.format.snapshot.nodes import SnapshotNodes
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.marker import decode_marker
from icechunk.log.repository.state import RepoState
from icechunk.repository import Repository
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import ANY, ObjectKind, Precondition, PutResult, Storage
from icechunk.testing.recording import RecordingStorage
from icechunk.testing.wrapping import WrappingStorage
from tests import inside
from tests.nodes import read_chunk, write_chunk, write_node

ARRAY = (
    b'{"zarr_format": 3, "node_type": "array", "shape": [4], "data_type": "int8", "chunk_grid": {"name": "regular", '
    b'"configuration": {"chunk_shape": [1]}}, "chunk_key_encoding": {"name": "default"}, "fill_value": 0, '
    b'"codecs": [{"name": "bytes"}], "attributes": {}}'
)
SHORT, LONG, WINDOW = 50, 1500, 20
SMALL_REPO_BYTES = 64 * 1024
"""Below this every commit may have its checkpoint."""
LONG_TAIL = 64
HISTORY_SHARE = 8


class KeepsCheckpoints(WrappingStorage):
    """Remembers what was written to ``repo``."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.checkpoints: list[bytes] = []

    async def put(
        self,
        key: str,
        data: bytes | bytearray | memoryview,
        precondition: Precondition = ANY,
        *,
        kind: ObjectKind = "metadata",
        metadata: Mapping[str, str] | None = None,
    ) -> PutResult:
        put = await super().put(key, data, precondition, kind=kind, metadata=metadata)
        if key == "repo":
            self.checkpoints.append(bytes(data))
        return put


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Costs at one length of the history."""

    puts: dict[str, int]
    """Puts of `WINDOW` commits, by kind of object; without checkpoints."""
    other_requests: int
    bytes_put: int
    open_and_read: list[str]
    """Requests of who opens right after a checkpoint, and reads a chunk; sorted, since some fly at once."""
    tail_gets: int
    """GETs of who opens when the checkpoint is at most `WINDOW` commits old."""
    decoded: tuple[int, int]
    """Snapshots and updates that are decoded for who opens right after a checkpoint, and reads a chunk."""
    ancestors: int


@dataclass(slots=True, kw_only=True)
class Life:
    """One repository and the writer who makes it long."""

    storage: KeepsCheckpoints = field(default_factory=lambda: KeepsCheckpoints(MemoryStorage()))
    rng: random.Random = field(default_factory=lambda: random.Random(7))
    commits: int = 0

    async def commit(self, repository: Repository, count: int) -> None:
        for _ in range(count):
            session = await repository.writable_session_async("main")
            await write_chunk(session, "/a", (self.commits % 4,), b"x%04d" % self.commits)
            # A text that does not compress, so that `repo` soon is large.
            await session.commit_async(self.rng.randbytes(64).hex())
            self.commits += 1

    async def opened(self, *, read: bool) -> tuple[RecordingStorage, RepoState]:
        recording = RecordingStorage(WrappingStorage(self.storage.inner), turns=0)
        repository = await Repository.open_async(recording)
        if read:
            assert await read_chunk(await repository.readonly_session_async("main"), "/a", (0,)) is not None
        state = (await log_of(repository)).state
        await repository.aclose()
        return recording, state


async def log_of(repository: Repository) -> LogLayout:
    log = await inside.log_of(repository)
    assert isinstance(log, LogLayout)
    return log


async def quiet(log: LogLayout) -> None:
    """Wait until nothing is under way but a checkpoint, which may be in the pause after the last one."""
    while tasks := [task for task in log.tasks if not task.done() and task.get_name() != "icechunk log checkpoint"]:
        await asyncio.wait(tasks)


async def costs(life: Life, repository: Repository, recording: RecordingStorage) -> Costs:
    log = await log_of(repository)
    await quiet(log)
    await log.checkpoint()
    recording.clear()
    await life.commit(repository, WINDOW)
    await quiet(log)
    puts: dict[str, int] = {}
    requests = [request for request in recording.requests if request.key != "repo"]
    for request in requests:
        if request.verb == "put":
            kind = request.key.split("/")[0]
            puts[kind] = puts.get(kind, 0) + 1
    behind, _ = await life.opened(read=False)
    await log.checkpoint()
    fresh, state = await life.opened(read=True)
    decoded = state.snapshots.stored.tables.read_count, state.updates.stored.read_count
    return Costs(
        puts=puts,
        other_requests=len(requests) - sum(puts.values()),
        bytes_put=sum(request.size for request in requests if request.verb == "put"),
        open_and_read=sorted(f"{request.verb} {request.key.split('/')[0]}" for request in fresh.requests),
        tail_gets=behind.count("get"),
        decoded=decoded,
        ancestors=sum(1 for _ in state.ancestry(state.branch_tip("main"))),
    )


@pytest.mark.thorough
async def test_a_long_history_makes_neither_commits_nor_openings_ask_for_more() -> None:
    life = Life()
    recording = RecordingStorage(life.storage, turns=0)
    repository = await Repository.create_async(recording)
    session = await repository.writable_session_async("main")
    await write_node(session, "/a", ARRAY)
    await session.commit_async("the array")
    await life.commit(repository, SHORT)
    short = await costs(life, repository, recording)
    life.storage.checkpoints.clear()
    await life.commit(repository, LONG - life.commits - WINDOW)
    unasked = life.storage.checkpoints[:]
    long = await costs(life, repository, recording)
    await repository.aclose()

    assert short.puts == {"log": WINDOW, "snapshots": WINDOW, "manifests": WINDOW, "transactions": WINDOW}
    assert long.puts == short.puts
    assert (short.other_requests, long.other_requests) == (WINDOW, WINDOW)  # the look at the next slot before each
    assert abs(long.bytes_put - short.bytes_put) < 0.1 * short.bytes_put
    assert long.open_and_read == short.open_and_read
    assert len(long.open_and_read) < 8
    assert (short.ancestors, long.ancestors) == (SHORT + WINDOW + 2, LONG + 2)
    assert long.decoded == short.decoded
    assert max(long.decoded) <= 2
    # The checkpoint, the slots after it, and a look past their end.
    assert max(short.tail_gets, long.tail_gets) <= 1 + WINDOW + 4

    marked = [decode_repo(data) for data in unasked if len(data) >= SMALL_REPO_BYTES]
    # On a fast machine the pause between checkpoints may leave none.
    for before, after in itertools.pairwise(marked):
        old, new = decode_marker(before.extra), decode_marker(after.extra)
        assert old is not None
        assert new is not None
        # However fast the writer is, a large `repo` is written once in so many commits, not with each.
        assert new.n - old.n >= min(LONG_TAIL, len(after.snapshots) // HISTORY_SHARE - 1)


@pytest.mark.parametrize("spec_version", [1, 2])
async def test_in_the_published_formats_the_tenth_commit_makes_the_requests_of_the_hundredth(spec_version: int) -> None:
    storage = MemoryStorage()
    recording = RecordingStorage(storage, turns=0)
    repository = await Repository.create_async(recording, spec_version=spec_version)
    session = await repository.writable_session_async("main")
    await write_node(session, "/a", ARRAY)
    await session.commit_async("the array")
    asked: list[list[str]] = []
    for i in range(1, 101):
        recording.clear()
        session = await repository.writable_session_async("main")
        await write_chunk(session, "/a", (i % 4,), b"x%04d" % i)
        await session.commit_async("one more")
        if i in (10, 100):
            requests = sorted(f"{request.verb} {request.key.split('/')[0]}" for request in recording.requests)
            opening = RecordingStorage(WrappingStorage(storage), turns=0)
            other = await Repository.open_async(opening)
            await read_chunk(await other.readonly_session_async("main"), "/a", (0,))
            await other.aclose()
            asked.append(requests + sorted(f"{one.verb} {one.key.split('/')[0]}" for one in opening.requests))
    await repository.aclose()
    assert asked[0] == asked[1]


async def test_a_writer_holds_its_history_in_the_bytes_of_a_file_and_not_as_objects() -> None:
    repository = await Repository.create_async(MemoryStorage())
    session = await repository.writable_session_async("main")
    await write_node(session, "/a", ARRAY)
    await session.commit_async("the array")
    life = Life()
    objects = []
    for _ in range(8):
        await life.commit(repository, 100)
        state = (await log_of(repository)).state
        assert len(state.snapshots) == life.commits + 2
        objects.append((state.snapshots.changed_count, len(state.updates.fresh)))
    await repository.aclose()
    assert max(snapshots for snapshots, _ in objects) <= 300
    assert max(updates for _, updates in objects) <= 600


async def test_a_wide_hierarchy_makes_neither_reading_nor_changing_one_array_decode_or_encode_more_nodes() -> None:
    counted = []
    for width in (300, 3000):
        storage = MemoryStorage()
        async with await Repository.create_async(storage) as repository:
            session = await repository.writable_session_async("main")
            for i in range(width):
                await write_node(session, f"/g{i // 100}/a{i}", ARRAY)
            await session.commit_async("many arrays")
        async with await Repository.open_async(storage) as repository:
            reader = await repository.readonly_session_async("main")
            assert await read_chunk(reader, "/g1/a110", (0,)) is None
            nodes = inside.content_of(reader).log.base.nodes
            assert isinstance(nodes, SnapshotNodes)
            read = len(nodes.stored.known)
            session = await repository.writable_session_async("main")
            await write_node(session, "/g1/a110", ARRAY.replace(b'"attributes": {}', b'"attributes": {"k": 1}'))
            with mock.patch.object(codec, "write_nodes", wraps=write_nodes) as write:
                await session.commit_async("an attribute")
            counted.append((read, len(nodes.stored.known), [len(call.args[1]) for call in write.call_args_list]))
    assert counted[0] == counted[1]
    # Those that a session looks at to choose the manifests that it reads ahead, and the array itself.
    assert counted[0][0] <= 128
    assert counted[0][2] == [1]
