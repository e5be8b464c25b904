"""The actors of a simulation that change a repository through its log, and those that read it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Final

from icechunk.errors import (
    AlreadyExistsError,
    CommitOutcomeUnknown,
    ConflictError,
    ErrorKind,
    IcechunkError,
    ObjectNotFoundError,
    RefNotFoundError,
    StorageError,
)
from icechunk.format.ids import ObjectId
from icechunk.format.keys import snapshot_key
from icechunk.format.repo.repo_info import SnapshotRecord
from icechunk.log.repository import events as e
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.port import Layout, Proposal, Propose, RepositoryLog, SwapToken
from icechunk.log.repository.state import MAIN, RepoState
from tools.simulator.checker import Operation
from tools.simulator.cluster import Client, Cluster
from tools.simulator.faults import Fault
from tools.simulator.files import bare_snapshot, commit_files
from tools.simulator.loop import DAY_S
from tools.simulator.storage import SimulatedStorage

__all__ = ["Powers", "commit", "commit_proposal", "reader", "settle", "writer"]

_NO_WAY: Final = (ConflictError, AlreadyExistsError, RefNotFoundError)
"""Errors that say: the state does not allow it."""


def commit_proposal(
    snapshot: ObjectId, branch: str, *, parent: ObjectId | None = None, now_us: int, message: str = ""
) -> Propose:
    """A commit of an otherwise empty snapshot on the branch's tip, or on a parent that may be stale."""

    def propose(state: RepoState) -> Sequence[e.Event]:
        base = parent if parent is not None else state.branch_tip(branch)
        return [e.CommitAdded(branch=branch, snapshot=_record(state, snapshot, base, now_us, message))]

    return propose


def _record(state: RepoState, snapshot: ObjectId, parent: ObjectId | None, now_us: int, message: str) -> SnapshotRecord:
    known = state.snapshots.get(parent) if parent is not None else None
    flushed_at_us = max(now_us, known.flushed_at_us + 1 if known else 0)
    return SnapshotRecord(id=snapshot, parent=parent, flushed_at_us=flushed_at_us, message=message, metadata={})


class Powers:
    """The kinds of changes of the writers of one schedule, and how often they make them.

    Parameters
    ----------
    only_commits
        They leave branches and tags alone.
    deletes
        Branches are deleted; not where that has no condition, and a late request deletes whatever is there.
    """

    def __init__(self, rng: random.Random, layout: Layout, *, only_commits: bool, deletes: bool) -> None:
        verbs = ["commit"] * rng.choice((2, 4, 8))
        if not only_commits:
            verbs += ["create-branch", "create-tag"] * rng.choice((0, 1, 1))
            verbs += ["delete-tag"] * rng.choice((0, 1))
            moves = ["delete-branch", "reset-branch"] if deletes else ["reset-branch"]
            verbs += moves * rng.choice((0, 1, 1))
            if layout is not Layout.REFS:
                verbs += ["amend"] * rng.choice((0, 1))
        self.verbs = verbs
        self.fresh_branches = layout is Layout.REFS
        """Whether no branch has the name of an earlier one: a creation without answer, of a branch that was deleted
        since, is repeated where each ref is kept by itself."""


async def writer(cluster: Cluster, powers: Powers, rounds: int) -> None:
    """Changes the repository again and again; opens it anew after a crash, and sometimes without one."""
    rng = cluster.rng
    client = cluster.client("w")
    log = await client.open()
    for _ in range(rounds):
        if client.dead or log is None:
            client = cluster.client("w")
            log = await client.open()
            if log is None:
                continue
        if rng.random() < 0.1:
            await asyncio.sleep(rng.choice((5.0, 3600.0, 4 * DAY_S, 20 * DAY_S)) * rng.random())
            if client.dead:
                continue
        at_once = rng.choice((1, 1, 1, 2))
        await asyncio.gather(*(_change(cluster, powers, client, log) for _ in range(at_once)))
        if client.dead:
            continue
        if rng.random() < 0.08:
            await client.run(log.checkpoint())
        if rng.random() < 0.08 or (isinstance(log, LogLayout) and log.view.ended_reason is not None):
            await client.run(log.aclose())
            log = None
    if log is not None and not client.dead:
        await client.run(log.aclose())


async def _change(cluster: Cluster, powers: Powers, client: Client, log: RepositoryLog) -> None:
    """One change, of a kind that fits what the client knows."""
    rng, state = cluster.rng, log.state
    verb = rng.choice(powers.verbs)
    branches = sorted(state.branches)
    deletable = [name for name in branches if name != MAIN and name not in cluster.deleting]
    branch = rng.choice(branches)
    tip = state.branches[branch]
    op = Operation(client=client.name, verb=verb, ref=branch, began=0)
    event: Callable[[RepoState], e.Event]
    match verb:
        case "create-branch":
            op.ref, op.commit = _name(cluster, powers, "b"), cluster.name_of(tip)
            event = lambda _: e.BranchCreated(name=op.ref, snapshot=tip)  # noqa: E731
        case "create-tag":
            op.ref, op.commit = _name(cluster, powers, "t"), cluster.name_of(tip)
            event = lambda _: e.TagCreated(name=op.ref, snapshot=tip)  # noqa: E731
        case "delete-tag":
            op.ref = rng.choice(sorted(state.tags) or ["t0"])
            event = lambda _: e.TagDeleted(name=op.ref)  # noqa: E731
        case "delete-branch" if deletable:
            op.ref = rng.choice(deletable)
            if powers.fresh_branches:
                cluster.deleting.add(op.ref)
            event = lambda _: e.BranchDeleted(name=op.ref)  # noqa: E731
        case "reset-branch":
            target = rng.choice([record.id for record in _known_ancestry(state, rng.choice(branches))])
            expected = tip if rng.random() < 0.5 else None
            op.commit = cluster.name_of(target)
            op.parent = cluster.name_of(tip) if expected is not None else None
            event = lambda _: e.BranchReset(name=branch, snapshot=target, expected=expected)  # noqa: E731
        case _:
            await commit(cluster, client, log, op, tip)
            return
    cluster.begin(op)
    await _append(cluster, client, log, op, lambda now: [event(now)])


def _known_ancestry(state: RepoState, branch: str) -> list[SnapshotRecord]:
    found, id = [], state.branches.get(branch)
    while id is not None and (record := state.snapshots.get(id)) is not None:
        found.append(record)
        id = record.parent
    if not found:
        # Format 1 reads what it is asked for: the tip is known to exist.
        found = [SnapshotRecord(id=state.branches[branch], parent=None, flushed_at_us=0, message="")]
    return found


def _name(cluster: Cluster, powers: Powers, prefix: str) -> str:
    if prefix == "b" and powers.fresh_branches:
        return f"{prefix}{cluster.tick()}"
    return f"{prefix}{cluster.rng.randrange(3)}"


async def commit(
    cluster: Cluster, client: Client, log: RepositoryLog, op: Operation, tip: ObjectId, *, pinned: bool = False
) -> None:
    """Commit, or amend, as ``op`` says, and enter the outcome into it.

    Parameters
    ----------
    tip
        Tip of the branch as the client knows it.
    pinned
        Whether the commit follows just this tip, else it may follow any; in some layouts it always does.
    """
    rng, refs = cluster.rng, log.layout is Layout.REFS
    op.commit = cluster.new_commit()
    id, now_us = cluster.ids[op.commit], client.sources.wall_us()
    previous: ObjectId | None = None
    parent: ObjectId | None = None
    known = log.state.snapshots.get(tip)
    if op.verb == "amend" and known is not None and known.parent is not None:
        previous, parent = tip, known.parent
        op.parent = cluster.name_of(previous)
    else:
        op.verb = "commit"
        if pinned or refs or cluster.collect or rng.random() < 0.4:
            parent = tip
            op.parent = cluster.name_of(parent)
    record = _record(log.state, id, parent, now_us, op.commit)
    cluster.begin(op)
    since_us: int | None = None
    files: dict[str, bytes] = {}
    if cluster.collect:
        since_us = log.store_time_us
        embedded = await _upload(cluster, client, record, spec_version=1 if refs else 2)
        if embedded is None:
            cluster.end(op, "open" if client.dead else "failed", "a file could not be put")
            return
        files = embedded
    elif refs:
        files = {snapshot_key(id): bare_snapshot(record, spec_version=1)}
    elif log.layout is Layout.LOG and rng.random() < 0.8:
        files = {snapshot_key(id): b"the file of " + id}
    cluster.embedded.update(files)

    def propose(state: RepoState) -> Sequence[e.Event]:
        if previous is not None:
            amended = _record(state, id, parent, now_us, op.commit)
            return [e.CommitAmended(branch=op.ref, previous=previous, snapshot=amended)]
        base = parent if parent is not None else state.branch_tip(op.ref)
        exact = record if parent is not None and (refs or cluster.collect) else None
        return [
            e.CommitAdded(branch=op.ref, snapshot=exact or _record(state, id, base, now_us, op.commit)),
        ]

    await _append(cluster, client, log, op, propose, since_us=since_us, files=files)


async def _upload(
    cluster: Cluster, client: Client, record: SnapshotRecord, *, spec_version: int
) -> dict[str, bytes] | None:
    """The uploads of a session before its swap; they may take days, and requests without answer are sent again.

    Returns the files to be embedded; None if a file could not be put.
    """
    rng = cluster.rng
    inherited = cluster.manifests.get(record.parent, ())[:3] if record.parent is not None else ()
    made = commit_files(
        record,
        manifest=ObjectId(rng.randbytes(12)),
        chunk=ObjectId(rng.randbytes(12)),
        inherited=inherited,
        spec_version=spec_version,
    )
    cluster.manifests[record.id] = (made.manifest, *inherited)
    embeds = rng.random() < 0.6
    embedded = {key: data for key, data in made.files if embeds and not key.startswith("chunks/")}
    for key, data in made.files:
        if key in embedded:
            continue
        if rng.random() < 0.06:
            await asyncio.sleep(rng.choice((1, 2000, DAY_S, 4 * DAY_S)) * rng.random())
        for _ in range(4):
            if client.dead:
                return None
            if await client.run(client.storage.put(key, data)) is not None:
                break
            await asyncio.sleep(1)
        else:
            return None
    return embedded


class _Proposal(Proposal):
    """Keeps the newest token that it received."""

    token: SwapToken | None = None

    def __init__(self, propose: Propose) -> None:
        self._propose = propose

    def events(self, state: RepoState) -> Sequence[e.Event]:
        return self._propose(state)

    def sent(self, token: SwapToken | None) -> None:
        self.token = token


async def _append(
    cluster: Cluster,
    client: Client,
    log: RepositoryLog,
    op: Operation,
    propose: Propose,
    *,
    since_us: int | None = None,
    files: dict[str, bytes] | None = None,
) -> None:
    """Make the change, and enter its outcome into the history."""
    rng, mix = cluster.rng, cluster.mix
    deadline_s = rng.choice((0.02, 0.2, 1.0)) if mix.chance(Fault.DEADLINE, rng) else None
    proposal = _Proposal(propose)
    append = log.append(proposal, since_us=since_us, deadline_s=deadline_s, files=files or {})
    task = client.own(append)
    if mix.chance(Fault.CANCELLED, rng):
        await asyncio.wait({task}, timeout=rng.uniform(0, 0.2))
        if not task.done():
            task.cancel()
            cluster.inject(Fault.CANCELLED, client.name, "its caller gives up")
    await client.cluster.loop.finished(task)
    token = proposal.token
    if client.dead:
        # The client has ended, so there is no caller. A token that was kept may still be settled.
        if not task.cancelled():
            task.exception()
        if token is not None and rng.random() < 0.5:
            cluster.told(op, token)
        return
    if task.cancelled():
        if token is None:
            cluster.end(op, "failed", "cancelled before anything was sent")
        else:
            cluster.end(op, "unknown", "cancelled")
            await _unknown(cluster, client, log, op, token)
        return
    error = task.exception()
    if error is None:
        cluster.end(op, "ok")
    elif isinstance(error, CommitOutcomeUnknown):
        if deadline_s is not None and "deadline" in str(error):
            cluster.inject(Fault.DEADLINE, client.name, f"{deadline_s} s have passed")
        cluster.end(op, "unknown", str(error))
        await _unknown(cluster, client, log, op, error.token)
    elif isinstance(error, _NO_WAY) and getattr(error, "kind", None) != ErrorKind.UPDATE_ATTEMPTS_EXHAUSTED:
        # An expiration gives the tip another parent, and the amend of a client that has not read it is refused.
        expired = cluster.collect and op.verb == "amend"
        cluster.end(op, "failed" if expired else "refused", f"{type(error).__name__}: {error}")
    elif isinstance(error, IcechunkError):
        cluster.end(op, "failed", f"{type(error).__name__}: {error}")
    else:
        raise error


async def _unknown(
    cluster: Cluster, client: Client, log: RepositoryLog, op: Operation, token: SwapToken | None
) -> None:
    """The outcome is unknown: sometimes find out, at once or later, here or elsewhere."""
    if not cluster.unknown(op, token):
        return
    if cluster.rng.random() < 0.6:
        await asyncio.sleep(cluster.rng.choice((0.01, 1, 5)))
        await settle(cluster, client, log, op)


async def settle(cluster: Cluster, client: Client, log: RepositoryLog, op: Operation) -> bool:
    """Ask what became of an operation; whether that is certain now."""
    token = cluster.tokens[id(op)]
    for _ in range(4):
        if client.dead:
            return False
        landed = await client.run(log.settle(token))
        if landed is not None:
            cluster.settled_as(op, client.name, landed)
            return True
        await asyncio.sleep(2)
    return False


async def reader(cluster: Cluster, looks: int) -> None:
    """Looks at the repository again and again, also at the files of its history."""
    rng = cluster.rng
    client = cluster.client("r")
    log = await client.open()
    for _ in range(looks):
        if client.dead or log is None:
            client = cluster.client("r")
            log = await client.open()
            if log is None:
                return
        await asyncio.sleep(rng.choice((0.05, 0.3, 2, 1000, 2 * DAY_S, 12 * DAY_S)) * rng.random())
        if await cluster.read(client, log) is None:
            continue
        if not cluster.collect and log.layout is Layout.LOG and not client.dead:
            history = sorted(log.state.snapshots)
            for snapshot in rng.sample(history, min(2, len(history))):
                await _check_file(cluster, client.storage, log, snapshot)
        if rng.random() < 0.15:
            log = None


async def _check_file(cluster: Cluster, storage: SimulatedStorage, log: RepositoryLog, snapshot: ObjectId) -> None:
    """As `icechunk.transfer.assets` reads: the object, else what is embedded, else the object once more."""
    key = snapshot_key(snapshot)
    if key not in cluster.embedded:
        return
    found: bytes | None = None
    try:
        for _ in range(2):
            try:
                found = (await storage.get(key)).data
            except ObjectNotFoundError:
                found = await log.find_file(key)
            if found is not None:
                break
    except (StorageError, asyncio.CancelledError):
        return
    if found != cluster.embedded[key]:
        cluster.problem(f"the file of snapshot {cluster.name_of(snapshot)} is nowhere")
