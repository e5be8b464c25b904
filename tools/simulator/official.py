"""A client that follows the official library's protocol: it changes ``repo``, and knows nothing of a log or of marks.

It reads ``repo``, makes a copy of it below ``overwritten/``, and replaces it if it is unchanged, again and again where
others are first. Where an answer is lost and the next try finds its change made, that library reports a conflict about
its own commit; here the outcome counts as unknown, since the simulator cannot ask it. In the log layout ``repo`` says
that the repository is read-only, and so it changes nothing, and reads what the last checkpoint shows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from icechunk.errors import FormatError, ObjectNotFoundError, PreconditionFailedError, StorageError
from icechunk.format.ids import ObjectId, encode_id
from icechunk.format.keys import REPO_KEY, snapshot_key, transaction_key
from icechunk.format.repo.codec import decode_repo, encode_repo
from icechunk.format.repo.repo_info import (
    ONLINE,
    BranchCreated,
    NewCommit,
    RepoInfo,
    SnapshotRecord,
    Status,
    TagCreated,
    Update,
    UpdateChange,
)
from icechunk.format.transaction import encode_transaction_log
from icechunk.format.values import TransactionLog
from icechunk.log.repository.port import Layout
from icechunk.storage.port import Matches, Version
from tools.simulator.checker import Operation
from tools.simulator.cluster import Client, Cluster
from tools.simulator.files import bare_snapshot
from tools.simulator.loop import DAY_S

__all__ = ["official_writer", "take_over", "upload_bare"]

_TRIES = 6
_MOST_UPDATES = 1000


class _ReadOnlyError(Exception):
    """``repo`` says that it must not be changed."""


async def official_writer(cluster: Cluster, rounds: int) -> None:
    """Commits, and makes branches and tags, beside clients of this library."""
    rng = cluster.rng
    client = cluster.client("o")
    cluster.foreign.add(client.name)
    for _ in range(rounds):
        await asyncio.sleep(rng.choice((0.05, 0.5, 60.0, DAY_S)) * rng.random())
        if client.dead:
            client = cluster.client("o")
            cluster.foreign.add(client.name)
        verb = rng.choice(("commit", "commit", "commit", "create-branch", "create-tag"))
        task = client.own(_change(cluster, client, verb))
        await cluster.loop.finished(task)
        if not task.cancelled() and (error := task.exception()) is not None and not client.dead:
            raise error


async def take_over(cluster: Cluster) -> None:
    """All clients have closed the log; an operator lifts the read-only status, and the official library commits.

    It happens after everything that travels has arrived, and after a checkpoint of the whole log: a log that a client
    still writes to is not to be taken over, as `spec/repository-log.md` says.
    """
    while cluster.store.travelling:
        await asyncio.wait(cluster.store.travelling)
    ours = cluster.client("k", faulty=False)
    log = await ours.open()
    if log is None or log.layout is not Layout.LOG:
        return
    await log.checkpoint()
    await log.aclose()
    client = cluster.client("o", faulty=False)
    cluster.foreign.add(client.name)
    cluster.taken_over = True
    info, version = await _read(client)
    online = replace(info, status=Status(availability=ONLINE, set_at_us=client.sources.wall_us(), reason=None))
    await client.storage.put(REPO_KEY, encode_repo(online), Matches(version))
    cluster.note(client.name, "takes the repository over")
    await _change(cluster, client, "commit")


async def _change(cluster: Cluster, client: Client, verb: str) -> None:
    rng = cluster.rng
    try:
        info, _ = await _read(client)
    except (StorageError, FormatError):
        return
    if info.status.availability != ONLINE:
        await _look(cluster, client)
        return
    branch = rng.choice(sorted(info.branches))
    tip = info.branches[branch]
    op = Operation(client=client.name, verb=verb, ref=branch, began=0)
    if verb == "commit":
        op.commit, op.parent = cluster.new_commit(), cluster.name_of(tip)
    else:
        op.ref, op.commit = f"{verb[7]}{rng.randrange(3)}", cluster.name_of(tip)
    cluster.begin(op)
    id = cluster.ids.get(op.commit, tip)
    if verb == "commit" and not await upload_bare(client, _record(info, id, tip, client, op.commit)):
        cluster.end(op, "open" if client.dead else "failed", "a file could not be put")
        return
    await _replace(cluster, client, op, lambda now: _changed(now, op, id, tip, client))


def _record(info: RepoInfo, id: ObjectId, parent: ObjectId, client: Client, message: str) -> SnapshotRecord:
    flushed_at_us = max(client.sources.wall_us(), info.snapshots[parent].flushed_at_us + 1)
    return SnapshotRecord(id=id, parent=parent, flushed_at_us=flushed_at_us, message=message, metadata={})


def _changed(info: RepoInfo, op: Operation, id: ObjectId, tip: ObjectId, client: Client) -> RepoInfo | None:
    """The next ``repo``; None where the change does not apply."""
    change: UpdateChange
    match op.verb:
        case "commit":
            if info.branches.get(op.ref) != tip:
                return None
            record = _record(info, id, tip, client, op.commit)
            change = NewCommit(branch=op.ref, snapshot=id)
            info = replace(
                info, branches={**info.branches, op.ref: id}, snapshots={**dict(info.snapshots.items()), id: record}
            )
        case "create-branch":
            if op.ref in info.branches or tip not in info.snapshots:
                return None
            change = BranchCreated(name=op.ref)
            info = replace(info, branches={**info.branches, op.ref: tip})
        case _:
            if op.ref in info.tags or op.ref in info.deleted_tags or tip not in info.snapshots:
                return None
            change = TagCreated(name=op.ref)
            info = replace(info, tags={**info.tags, op.ref: tip})
    newest = info.updates[0].updated_at_us if info.updates else 0
    update = Update(change=change, updated_at_us=max(client.sources.wall_us(), newest + 1))
    return replace(info, updates=(update, *info.updates))


async def _replace(
    cluster: Cluster, client: Client, op: Operation, changed: Callable[[RepoInfo], RepoInfo | None]
) -> None:
    """Replace ``repo``, and enter the outcome into the history."""
    silent = False
    for _ in range(_TRIES):
        try:
            info, version = await _read(client)
            if info.status.availability != ONLINE:
                raise _ReadOnlyError
            after = changed(info)
            if after is None:
                cluster.end(op, "unknown" if silent else "refused", "the official library says: conflict")
                return
            copy = f"repo.{client.sources.wall_us()}.{encode_id(ObjectId(cluster.rng.randbytes(12)))}"
            await client.storage.copy(REPO_KEY, f"overwritten/{copy}")
            older = tuple(
                update if update.backup_path else replace(update, backup_path=copy) for update in after.updates[1:]
            )
            after = replace(after, updates=(after.updates[0], *older)[:_MOST_UPDATES])
        except _ReadOnlyError:
            cluster.end(op, "unknown" if silent else "failed", "the repository is read-only")
            return
        except (StorageError, FormatError):
            await asyncio.sleep(0.2)
            continue
        try:
            await client.storage.put(REPO_KEY, encode_repo(after), Matches(version))
        except PreconditionFailedError:
            continue
        except StorageError as error:
            silent |= not (error.refused or error.unsent)
            await asyncio.sleep(0.2)
            continue
        cluster.end(op, "ok")
        return
    cluster.end(op, "unknown" if silent else "failed", "the official library gives up")


async def _read(client: Client) -> tuple[RepoInfo, Version]:
    found = await client.storage.get(REPO_KEY)
    return decode_repo(found.data), found.version


async def upload_bare(client: Client, record: SnapshotRecord) -> bool:
    """Put the files of a snapshot without nodes; whether that worked."""
    files = {
        snapshot_key(record.id): bare_snapshot(record, spec_version=2),
        transaction_key(record.id): encode_transaction_log(TransactionLog(id=record.id), 2),
    }
    for key, data in files.items():
        for _ in range(4):
            try:
                await client.storage.put(key, data)
                break
            except StorageError:
                await asyncio.sleep(0.5)
        else:
            return False
    return True


async def _look(cluster: Cluster, client: Client) -> None:
    """Check that the log's state that the library sees was once true: every snapshot that ``repo`` names is there."""
    try:
        info, _ = await _read(client)
    except (StorageError, FormatError):
        return
    for branch, tip in sorted(info.branches.items()):
        try:
            await client.storage.get(snapshot_key(tip))
        except ObjectNotFoundError:
            if snapshot_key(tip) in cluster.embedded and not cluster.collect:
                cluster.problem(f"repo names the tip of {branch}, whose file the official library does not find")
        except StorageError:
            pass
