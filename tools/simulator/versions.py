"""Clients of other versions of this library, beside today's, on one log.

`older_writer` follows `spec/repository-log.md` as an earlier version does: it embeds no files, its markers have neither
`durable` nor `files`, and its JSON is arranged otherwise. `newer_writer` writes one thing that today's clients do not
know, at a moment of its choice. From then on none of them may write to the log, whatever it does is refused with an
error that says to upgrade, and nothing that was acknowledged before is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from icechunk.errors import (
    ErrorKind,
    FormatError,
    IcechunkError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
)
from icechunk.format.keys import REPO_KEY
from icechunk.format.repo.codec import decode_repo, encode_repo
from icechunk.format.repo.repo_info import RepoInfo, SnapshotRecord
from icechunk.log.repository import events as e
from icechunk.log.repository.entry import Entry, decode_entry, encode_entry, parse_slot_key, slot_key
from icechunk.log.repository.event_json import encode_events
from icechunk.log.repository.marker import (
    Marker,
    checkpoint_info,
    decode_marker,
    keep_updates,
    state_of,
)
from icechunk.log.repository.open import open_repository
from icechunk.log.repository.state import MAIN, RepoState, try_apply_all
from icechunk.runtime import json_codec
from icechunk.storage.port import Absent, Matches, Version
from tools.simulator.checker import Operation
from tools.simulator.cluster import Client, Cluster
from tools.simulator.faults import Fault
from tools.simulator.official import upload_bare

__all__ = ["as_known", "newer_writer", "older_writer"]

_TRIES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """The repository, as its log has it."""

    info: RepoInfo
    version: Version
    """The version of ``repo``."""
    marker: Marker
    n: int
    """Last slot that is taken."""
    state: RepoState
    embedded: dict[str, bytes]
    """Files in the entries behind the checkpoint."""


async def _look(client: Client) -> _Seen | None:
    """Read the checkpoint and all slots behind it; None where there is no log to write to."""
    found = await client.storage.get(REPO_KEY)
    info = decode_repo(found.data)
    marker = decode_marker(info.extra)
    if marker is None:
        return None
    state, n, embedded = state_of(info, marker), marker.n, dict[str, bytes]()
    while True:
        try:
            entry = decode_entry((await client.storage.get(slot_key(marker.epoch, n + 1))).data, n=n + 1)
        except ObjectNotFoundError:
            break
        n += 1
        state, embedded = _folded(state, entry), embedded | dict(entry.objects)
    if state.seal is not None:
        return None
    return _Seen(info=info, version=found.version, marker=marker, n=n, state=state, embedded=embedded)


def _folded(state: RepoState, entry: Entry) -> RepoState:
    after = try_apply_all(state, entry.events, time_us=entry.time_us, since_us=entry.since_us)
    return state if after is None else after


def _older_entry(n: int, nonce: bytes, time_us: int, since_us: int | None, events: tuple[e.Event, ...]) -> bytes:
    """An entry with its fields in another order, as an earlier version arranged them."""
    return json_codec.dumps(
        {
            "events": encode_events(events),
            "since": since_us,
            "time": time_us,
            "nonce": nonce.hex(),
            "n": n,
            "v": 1,
        }
    )


# ------------------------------------------------------------------ an older version


async def older_writer(cluster: Cluster, rounds: int) -> None:
    """Commits, and writes checkpoints, beside clients of this version."""
    rng = cluster.rng
    # It does not ask how old its knowledge is, and slots that it saw days ago may have been pruned since.
    faulty = Fault.PAUSED not in cluster.mix
    client = cluster.client("e", faulty=faulty)
    for _ in range(rounds):
        await asyncio.sleep(rng.choice((0.05, 0.5, 60.0)) * rng.random())
        if client.dead:
            client = cluster.client("e", faulty=faulty)
        for work in (_commit, _checkpoint) if rng.random() < 0.5 else (_commit,):
            task = client.own(work(cluster, client))
            await cluster.loop.finished(task)
            error = None if task.cancelled() else task.exception()
            if error is not None and not client.dead and not isinstance(error, IcechunkError):
                raise error


async def _commit(cluster: Cluster, client: Client) -> None:
    seen = await _look(client)
    if seen is None:
        return
    # An hour before anything that it uploads, by the store's clock, as a careful writer says it.
    since_us = max(0, cluster.loop.now_us() - 3_600_000_000)
    tip = seen.state.branches[MAIN]
    op = Operation(client=client.name, verb="commit", ref=MAIN, commit=cluster.new_commit(), began=0)
    op.parent = cluster.name_of(tip)
    id = cluster.ids[op.commit]
    cluster.begin(op)
    flushed_at_us = max(cluster.loop.now_us(), seen.state.snapshots[tip].flushed_at_us + 1)
    record = SnapshotRecord(id=id, parent=tip, flushed_at_us=flushed_at_us, message=op.commit, metadata={})
    if not await upload_bare(client, record):
        cluster.end(op, "open" if client.dead else "failed", "a file could not be put")
        return
    events: tuple[e.Event, ...] = (e.CommitAdded(branch=MAIN, snapshot=record),)
    began_s = cluster.loop.now_s
    for _ in range(_TRIES):
        if seen.state.branches.get(MAIN) != tip or cluster.loop.now_s - began_s > 3600:
            cluster.end(op, "failed", "the older client gives up before it sends")
            return
        time_us = cluster.loop.now_us()
        if try_apply_all(seen.state, events, time_us=time_us, since_us=since_us) is None:
            cluster.end(op, "failed", "the event does not apply any more")
            return
        data = _older_entry(seen.n + 1, cluster.rng.randbytes(16), time_us, since_us, events)
        landed = await _take(client, slot_key(seen.marker.epoch, seen.n + 1), data)
        if landed is not False:
            cluster.end(op, "unknown" if landed is None else "ok")
            return
        now = await _look_again(client)
        if now is None:
            cluster.end(op, "failed", "there is no log any more, or it cannot be read")
            return
        seen = now
    cluster.end(op, "failed", "others are always first")


async def _look_again(client: Client) -> _Seen | None:
    for _ in range(_TRIES):
        try:
            return await _look(client)
        except StorageError:
            await asyncio.sleep(0.3)
        except IcechunkError:
            return None
    return None


async def _take(client: Client, key: str, data: bytes) -> bool | None:
    """Put an entry into a slot: whether it is there; None where that is unknown in the end."""
    silent = False
    for _ in range(_TRIES):
        try:
            await client.storage.put(key, data, Absent())
            return True
        except PreconditionFailedError:
            pass
        except StorageError as error:
            silent |= not (error.refused or error.unsent)
            if not silent:
                return False
        try:
            return (await client.storage.get(key)).data == data
        except ObjectNotFoundError:
            # Perhaps it is still on its way: only the same bytes may be sent to this slot.
            pass
        except StorageError:
            await asyncio.sleep(0.3)
    return None if silent else False


async def _checkpoint(cluster: Cluster, client: Client) -> None:
    """Replace ``repo`` by one whose marker has only the fields of an earlier version."""
    seen = await _look(client)
    if seen is None or seen.n <= seen.marker.n:
        return
    for key, data in seen.embedded.items():
        try:
            await client.storage.put(key, data, Absent())
        except PreconditionFailedError:
            continue
    info, state = seen.info, seen.state
    newest_us = info.updates[0].updated_at_us if info.updates else 0
    kept = keep_updates(
        state,
        newest_us=newest_us,
        count=len(info.updates),
        before=info.repo_before_updates,
        limit=10_000,
        backup_name="",
    )
    after = checkpoint_info(state, epoch=seen.marker.epoch, n=seen.n, kept=kept)
    await client.storage.put(REPO_KEY, encode_repo(after), Matches(seen.version))
    cluster.note(client.name, f"has written a checkpoint of slot {seen.n}, without newer fields")


# ------------------------------------------------------------------ a newer version


def _newer_event(document: dict[str, Any]) -> None:
    document["events"] = [{"kind": "rename-everything", "to": "x"}]


def _newer_field(document: dict[str, Any]) -> None:
    document["signature"] = "00"


def _newer_field_of_event(document: dict[str, Any]) -> None:
    document["events"] = [{"kind": "tag-created", "name": "newer", "snapshot": "1CECHNKREP0F1RSTCMT0", "note": ""}]


def _newer_version(document: dict[str, Any]) -> None:
    document["v"] = 2


_NEWS: tuple[Callable[[dict[str, Any]], None], ...] = (
    _newer_event,
    _newer_field,
    _newer_field_of_event,
    _newer_version,
)


async def newer_writer(cluster: Cluster) -> None:
    """Takes one slot with an entry that only newer versions can read, and watches that nothing follows it."""
    rng = cluster.rng
    client = cluster.client("n", faulty=False)
    await asyncio.sleep(rng.choice((0.3, 3.0, 60.0)) * rng.random())
    for _ in range(40):
        seen = await _look(client)
        if seen is None:
            return
        document = {
            "v": 1,
            "n": seen.n + 1,
            "nonce": rng.randbytes(16).hex(),
            "time": cluster.loop.now_us(),
            "since": None,
            "events": encode_events([e.Void(nonce=rng.randbytes(16))]),
        }
        rng.choice(_NEWS)(document)
        key = slot_key(seen.marker.epoch, seen.n + 1)
        try:
            await client.storage.put(key, json_codec.dumps(document), Absent())
        except PreconditionFailedError:
            continue
        cluster.newer_slot = key
        cluster.note(client.name, "has written an entry of a newer version")
        return


async def as_known(cluster: Cluster) -> None:
    """Check that today's clients refuse a log with something newer in it; then put in its place what they know."""
    key = cluster.newer_slot
    if key is None:
        return
    client = cluster.client("q", faulty=False)
    try:
        await open_repository(client.storage, client.sources)
    except FormatError as error:
        if error.kind != ErrorKind.UNSUPPORTED_SPEC_VERSION:
            cluster.problem(f"a log with an entry of a newer version is refused as {error.kind}, not as that")
    else:
        cluster.problem("a log with an entry of a newer version is opened")
    slot = parse_slot_key(key)
    assert slot is not None
    nonce = cluster.rng.randbytes(16)
    events = encode_events([e.Void(nonce=nonce)])
    data = encode_entry(n=slot[1], nonce=nonce, time_us=cluster.loop.now_us(), since_us=None, events=events)
    cluster.store.remove(key)
    cluster.newer_slot = None
    cluster.store.write(key, data, Absent())
