"""The actors of a simulation that work with repositories and sessions as users do: chunks, packs, forks, rebases."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Final

import zarr.core.buffer

from icechunk import Repository, Session
from icechunk.config import RepositoryConfig
from icechunk.conflicts import BasicConflictSolver, ConflictDetector, ConflictSolver
from icechunk.errors import CommitOutcomeUnknown, ConflictError, ErrorKind, IcechunkError, SessionEndedError
from icechunk.log.repository.port import SwapToken
from icechunk.runtime.clock import moment
from icechunk.session.core import Core
from icechunk.storage.port import Storage
from tools.simulator.checker import ROOT, Operation, Outcome
from tools.simulator.cluster import Client, Cluster
from tools.simulator.faults import Fault
from tools.simulator.loop import DAY_S

__all__ = [
    "CHUNKS",
    "FIRST",
    "content_collector",
    "content_reader",
    "content_writer",
    "first_content",
    "get_chunk",
    "lease_holder",
    "make_array",
    "set_chunk",
    "verify_content",
]

FIRST: Final = "c0"
"""The commit that makes the array."""
CHUNKS: Final = tuple(f"a/c/{i}" for i in range(4))
_WIDTH: Final = 24
_GROUP: Final = b'{"zarr_format":3,"node_type":"group"}'
_ARRAY: Final = (
    b'{"zarr_format":3,"node_type":"array","shape":[4],"data_type":"uint8","fill_value":0,"codecs":[{"name":"bytes"}],'
    b'"chunk_grid":{"name":"regular","configuration":{"chunk_shape":[1]}},"chunk_key_encoding":{"name":"default"}}'
)
_PROTOTYPE: Final = zarr.core.buffer.default_buffer_prototype()
_SOLVERS: Final[tuple[ConflictSolver | None, ...]] = (None, BasicConflictSolver(), ConflictDetector())


def _core(client: Client, storage: Storage) -> Core:
    # Chunks of a few bytes are objects of their own or share one, instead of standing in manifests.
    config = RepositoryConfig(inline_chunk_threshold_bytes=4)
    return Core(storage, config, sources=client.sources)


async def _open(client: Client) -> Repository | None:
    """Open the repository as `Repository.open_async` does, on virtual time."""
    rng = client.cluster.rng
    for _ in range(30):
        if client.dead:
            return None
        core = _core(client, client.storage)

        async def load(core: Core = core) -> Repository:
            await core.load_config()
            return Repository(core)

        repository = await client.run(load())
        if repository is not None:
            return repository
        await asyncio.sleep(rng.choice((1, 30)))
    return None


async def first_content(client: Client) -> None:
    """Commit an array of four chunks to a new repository."""
    core = _core(client, client.storage)
    await core.load_config()
    repository = Repository(core)
    await make_array(repository)
    await repository.aclose()


async def make_array(repository: Repository) -> None:
    """Commit an array of four chunks, without any of them."""
    session = await repository.writable_session_async("main")
    await session.store.set("zarr.json", _buffer(_GROUP))
    await session.store.set("a/zarr.json", _buffer(_ARRAY))
    await session.commit_async(FIRST)


def _buffer(data: bytes) -> zarr.core.buffer.Buffer:
    return _PROTOTYPE.buffer.from_bytes(data)


async def content_writer(cluster: Cluster, rounds: int) -> None:
    """Writes chunks and commits them, also through forks, also again after a failure."""
    rng = cluster.rng
    client = cluster.client("s")
    repository = await _open(client)
    for _ in range(rounds):
        if client.dead or repository is None:
            client = cluster.client("s")
            repository = await _open(client)
            if repository is None:
                continue
        if rng.random() < 0.1:
            await asyncio.sleep(rng.choice((5.0, 3600.0, 4 * DAY_S)) * rng.random())
        await _work(cluster, client, repository)
    if repository is not None and not client.dead:
        await client.run(repository.aclose())


async def _work(cluster: Cluster, client: Client, repository: Repository) -> None:
    rng = cluster.rng
    session = await client.run(repository.writable_session_async("main"))
    if session is None:
        return
    writes: dict[str, str] = {}
    if rng.random() < 0.25:
        await _fork(cluster, client, session, writes)
    else:
        await _write(cluster, client, session, writes)
    if writes and rng.random() < 0.3:
        resumed = await _resumed(cluster, client, repository, session)
        if resumed is None:
            return
        client, repository, session = resumed
    if rng.random() < 0.1:
        await asyncio.sleep(rng.choice((1, 2000, DAY_S)) * rng.random())
    for _ in range(rng.choice((1, 1, 2))):
        if client.dead or not writes:
            return
        # A commit that failed after it was rebased leaves the session on its new base.
        base = await _name(cluster, client, repository, session.snapshot_id)
        if base is None or await _commit(cluster, client, repository, session, base, writes):
            return


async def _resumed(
    cluster: Cluster, client: Client, repository: Repository, session: Session
) -> tuple[Client, Repository, Session] | None:
    """Persist a session, and go on with it: in this process, or in another one after the death of this one.

    None: it was not persisted for certain, or cannot be resumed; then it is left, as its writes may be there.
    """
    rng = cluster.rng
    id = await client.run(session.checkpoint_async())
    if id is None:
        return None
    cluster.note(client.name, "has persisted its session")
    if rng.random() < 0.4:
        return client, repository, session
    if rng.random() < 0.5:
        client.crash()
    other = cluster.client("s")
    opened = await _open(other)
    if opened is None:
        return None
    found = await other.run(opened.resume_session_async(id))
    if found is None:
        return None
    cluster.note(other.name, f"goes on with the session of {client.name}")
    if not client.dead and rng.random() < 0.7:
        # The process that held it does not know that it lost it: whatever it does with it now must not happen.
        await _fenced(cluster, client, session)
    return other, opened, found


async def _fenced(cluster: Cluster, client: Client, session: Session) -> None:
    name = cluster.new_name()
    op = cluster.begin(Operation(client=client.name, verb="commit", ref="main", commit=name, began=0))
    if await client.run(session.commit_async(name)) is not None:
        cluster.problem(f"{client.name} commits a session that another process has resumed")
        cluster.end(op, "ok")
        return
    cluster.end(op, "open" if client.dead else "failed", "another process has the session")


async def _write(cluster: Cluster, client: Client, session: Session, writes: dict[str, str]) -> None:
    for key in cluster.rng.sample(CHUNKS, cluster.rng.choice((1, 1, 2, 3))):
        value = f"v{cluster.tick()}"
        if not await client.run(set_chunk(session, key, value)):
            # It may be there all the same, or come back when it is tried again: such a session is left.
            writes.clear()
            return
        writes[key] = value


async def set_chunk(session: Session, key: str, value: str) -> bool:
    """Write a text into a chunk."""
    await session.store.set(key, _buffer(value.encode().ljust(_WIDTH)))
    return True


async def _fork(cluster: Cluster, client: Client, session: Session, writes: dict[str, str]) -> None:
    """Two forks write different chunks, and come back."""
    forks, written = [session.fork(), session.fork()], list[dict[str, str]]()
    for fork, key in zip(forks, cluster.rng.sample(CHUNKS, 2), strict=True):
        value = f"v{cluster.tick()}"
        if not await client.run(set_chunk(fork, key, value)):
            return
        written.append({key: value})

    async def merge() -> bool:
        await session.merge_async(*forks)
        return True

    if await client.run(merge()):
        for part in written:
            writes.update(part)


async def _commit(
    cluster: Cluster, client: Client, repository: Repository, session: Session, base: str, writes: dict[str, str]
) -> bool:
    """Commit, and enter the outcome; returns whether this session has nothing left to try."""
    rng = cluster.rng
    solver = rng.choice(_SOLVERS)
    amends = base not in (ROOT, FIRST) and rng.random() < 0.1 and cluster.amends
    op = Operation(
        client=client.name,
        verb="amend" if amends else "commit",
        ref="main",
        commit=cluster.new_name(),
        parent=base if amends or solver is None else None,
        writes=dict(writes),
        began=0,
    )
    cluster.begin(op)
    if amends:
        work = session.amend_async(op.commit)
    else:
        work = session.commit_async(op.commit, rebase_with=solver, rebase_tries=5)
    task = client.own(work)
    if cluster.mix.chance(Fault.CANCELLED, rng):
        await asyncio.wait({task}, timeout=rng.uniform(0, 0.3))
        if not task.done():
            task.cancel()
            cluster.inject(Fault.CANCELLED, client.name, "its caller gives up")
    await client.cluster.loop.finished(task)
    token: SwapToken | None = session.unsettled_commit
    if client.dead:
        if not task.cancelled():
            task.exception()
        if token is not None and rng.random() < 0.5:
            cluster.told(op, token)
        return True
    if task.cancelled():
        if token is None and session.read_only:
            # It was cancelled behind the commit, while what was persisted was being ended.
            cluster.end(op, "ok", "cancelled after it had landed")
            return True
        if token is None:
            cluster.end(op, "failed", "cancelled before anything was sent")
            return False
        cluster.end(op, "unknown", "cancelled")
        await _settle(cluster, client, repository, op, token)
        return True
    error = task.exception()
    if error is None:
        cluster.end(op, "ok")
        return True
    if isinstance(error, CommitOutcomeUnknown):
        cluster.end(op, "unknown", str(error))
        await _settle(cluster, client, repository, op, error.token)
        return True
    if not isinstance(error, IcechunkError):
        raise error
    way = isinstance(error, ConflictError) and error.kind != ErrorKind.UPDATE_ATTEMPTS_EXHAUSTED
    outcome: Outcome = "refused" if way and op.parent is not None else "failed"
    cluster.end(op, outcome, f"{type(error).__name__}: {error}")
    return isinstance(error, ConflictError)


async def _settle(
    cluster: Cluster, client: Client, repository: Repository, op: Operation, token: SwapToken | None
) -> None:
    if not cluster.unknown(op, token):
        return
    for _ in range(3):
        await asyncio.sleep(cluster.rng.choice((0.01, 1, 5)))
        landed = None if client.dead else await client.run(repository.settle_async(token))
        if landed is not None:
            cluster.settled_as(op, client.name, landed)
            return


async def _name(cluster: Cluster, client: Client, repository: Repository, snapshot_id: str) -> str | None:
    """The name of a snapshot, which is its message."""

    async def first() -> str:
        async for info in repository.async_ancestry(snapshot_id=snapshot_id):
            return ROOT if info.parent_id is None else info.message
        return ""

    return await client.run(first())


async def content_reader(cluster: Cluster, looks: int) -> None:
    """Reads chunks of one snapshot, some now and some later."""
    rng = cluster.rng
    client = cluster.client("r")
    repository = await _open(client)
    for _ in range(looks):
        if client.dead or repository is None:
            client = cluster.client("r")
            repository = await _open(client)
            if repository is None:
                return
        await asyncio.sleep(rng.choice((0.05, 2, 1000, 2 * DAY_S)) * rng.random())
        await read_content(cluster, client, repository, pause_s=rng.choice((0, 0, 1)))
    if repository is not None and not client.dead:
        await client.run(repository.aclose())


async def read_content(cluster: Cluster, client: Client, repository: Repository, *, pause_s: float = 0.0) -> bool:
    """Read all chunks of the newest snapshot of ``main``, and enter them into the history; whether that worked."""
    session = await client.run(repository.readonly_session_async("main"))
    if session is None:
        return False
    name = await _name(cluster, client, repository, session.snapshot_id)
    if name is None:
        return False
    op = Operation(client=client.name, verb="read-content", commit=name, began=cluster.tick())
    content: dict[str, str] = {}
    for key in CHUNKS:
        found = await client.run(get_chunk(session, key))
        if found is None:
            return False
        content[key] = found
        if pause_s:
            await asyncio.sleep(pause_s)
    op.content, op.outcome, op.ended = content, "ok", cluster.tick()
    cluster.history.append(op)
    cluster.note(client.name, f"reads {' '.join(content.values())} in {name}")
    return True


async def get_chunk(session: Session, key: str) -> str:
    """The text in a chunk; empty where nothing was written."""
    found = await session.store.get(key, _PROTOTYPE)
    return "" if found is None else found.to_bytes().decode().strip()


async def content_collector(cluster: Cluster, rounds: int, *, age_s: float, pause_s: float | None = None) -> None:
    """Expires snapshots and collects garbage as users do.

    Parameters
    ----------
    age_s
        Age of the cutoff.
    pause_s
        Longest time between two collections; None: twice the age.
    """
    rng = cluster.rng
    for _ in range(rounds):
        await asyncio.sleep((2 * age_s if pause_s is None else pause_s) * rng.random() + 5)
        client = cluster.client("g")
        if pause_s is not None:
            # The store says what time it is: a collector that must believe its own clock may end a session early.
            client.storage.dated = True
        repository = await _open(client)
        if repository is None:
            continue
        older_than = moment(cluster.loop.now_us() - int(age_s * 1e6))
        if rng.random() < 0.7:
            await client.run(repository.expire_snapshots_async(older_than))
        summary = await client.run(repository.garbage_collect_async(older_than))
        if summary is not None:
            cluster.report.collected += summary.snapshots_deleted + summary.chunks_deleted
            await client.run(repository.aclose())


async def lease_holder(cluster: Cluster, rounds: int, *, lease_s: float) -> None:
    """Persists sessions with a lease, leaves them for a good part of it or longer, and commits them, also elsewhere.

    No collection may end one of them, or take its chunks, before its lease is over.
    """
    rng, loop = cluster.rng, cluster.loop
    for _ in range(rounds):
        client = cluster.client("s")
        repository = await _open(client)
        session = None if repository is None else await client.run(repository.writable_session_async("main"))
        if repository is None or session is None:
            continue
        writes: dict[str, str] = {}
        await _write(cluster, client, session, writes)
        if not writes:
            continue
        ends_s = loop.now_s + lease_s
        id = await client.run(session.checkpoint_async(lease=timedelta(seconds=lease_s)))
        if id is None:
            continue
        cluster.note(client.name, f"has persisted its session, with a lease of {lease_s:.0f} s")
        await asyncio.sleep(lease_s * rng.choice((0.3, 0.7, 0.9, 0.9, 1.3)) * rng.uniform(0.9, 1))
        if client.dead or rng.random() < 0.5:
            client = cluster.client("s")
            repository = await _open(client)
            if repository is None:
                continue
            resumed = await _resume_leased(cluster, client, repository, id, ends_s)
            if resumed is None:
                continue
            session = resumed
        base = await _name(cluster, client, repository, session.snapshot_id)
        if base is None:
            continue
        await _commit(cluster, client, repository, session, base, writes)
        op = next((one for one in reversed(cluster.history) if one.client == client.name), None)
        if op is not None and "SessionEndedError" in op.note:
            _check_lease(cluster, client, op.note, ends_s)
        if not client.dead:
            await read_content(cluster, client, repository)


async def _resume_leased(
    cluster: Cluster, client: Client, repository: Repository, id: str, ends_s: float
) -> Session | None:
    for _ in range(5):
        task = client.own(repository.resume_session_async(id))
        await cluster.loop.finished(task)
        if client.dead or task.cancelled():
            return None
        error = task.exception()
        if error is None:
            cluster.note(client.name, "goes on with a leased session")
            return task.result()
        if isinstance(error, SessionEndedError):
            _check_lease(cluster, client, f"{error.kind}: {error}", ends_s)
            return None
        if not isinstance(error, IcechunkError):
            raise error
        await asyncio.sleep(1)
    return None


def _check_lease(cluster: Cluster, client: Client, why: str, ends_s: float) -> None:
    if "expired" in why and cluster.loop.now_s < ends_s:
        cluster.problem(f"a collection ended a session of {client.name} before its lease was over: {why}")


async def verify_content(cluster: Cluster, client: Client) -> None:
    """Check that everything that the newest snapshot has can be read in the end."""
    repository = await _open(client)
    if repository is None or not await read_content(cluster, client, repository):
        cluster.problem("the chunks of the newest snapshot cannot be read in the end")
    if repository is not None:
        await repository.aclose()
