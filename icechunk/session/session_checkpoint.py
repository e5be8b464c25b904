"""Persisting a session: its log as segments in storage, so that another process can go on with it (rule 14).

A checkpoint waits for the chunks that are on their way, then adds one segment with the events that are new. A commit of
a persisted session adds one too, beside its uploads and before the swap, with the id of the snapshot that it is about
to add: so a process that resumes the session finds out whether that landed, and never commits the changes twice.

Segments are added in order, each in the slot after the one before. A process whose slot is taken has lost the session:
to another one that has resumed it, or to a collection after its lease.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Final

from icechunk.errors import (
    ErrorKind,
    IcechunkError,
    InvalidInputError,
    ObjectNotFoundError,
    SessionEndedError,
    SessionNotFoundError,
    SessionStateError,
    StorageError,
)
from icechunk.format.ids import ObjectId, encode_id
from icechunk.log.repository.port import Layout
from icechunk.log.repository.state import RepoState
from icechunk.log.session.segment import (
    SegmentHead,
    SegmentKind,
    common_prefix,
    encode_segment,
    segment_key,
)
from icechunk.log.session.wire import size_of
from icechunk.runtime.checks import require_type
from icechunk.runtime.tasks import run_all
from icechunk.session.content import SessionContent
from icechunk.session.core import Core
from icechunk.session.persisted import Persisted, Written, ended_error
from icechunk.transfer.assets import off_loop
from icechunk.transfer.segments import Listed, add_segment, list_sessions, read_head, remove_segments

__all__ = [
    "abandon",
    "checkpoint",
    "claim",
    "find_landed",
    "landed_error",
    "lease_in_us",
    "note_attempt",
    "note_committed",
    "require_not_landed",
    "require_uncollected",
    "unknown_error",
]

_FIRST_LEASE_US: Final = 7 * 24 * 3600 * 1_000_000
_LOG: Final = logging.getLogger(__name__)


def lease_in_us(lease: timedelta | None) -> int | None:
    """A lease in µs. Raises `InvalidInputError` where it is none."""
    require_type("lease", lease, timedelta, optional=True)
    if lease is not None and lease <= timedelta(0):
        raise InvalidInputError(f"a lease is a time above zero, it cannot be {lease}", ErrorKind.INVALID_SETTING)
    return None if lease is None else lease // timedelta(microseconds=1)


async def checkpoint(content: SessionContent, lease_us: int | None) -> ObjectId:
    """Persist a session, or a fork that joined one, as `Session.checkpoint_async` says; returns the session's id."""
    with content.lock:
        content.require_changeable()
        if content.persisted is None and content.is_fork:
            raise SessionStateError(
                "cannot checkpoint a fork that has not joined a session by its id: Repository.join_session makes one "
                "that can; this one is merged into its session, by Session.merge",
                ErrorKind.NOT_ALLOWED,
            )
    log = await content.core.log()
    with content.lock:
        if content.persisted is None:
            content.persisted = Persisted(
                session=content.core.sources.new_object_id(), created_us=log.store_time_us, lease_us=_FIRST_LEASE_US
            )
        persisted = content.persisted
        if lease_us is not None:
            persisted.lease_us = lease_us
    write = partial(_write, content, persisted, SegmentKind.CHECKPOINT)
    if persisted.worker is not None:
        await run_all(write, partial(_require_open, content.core, persisted))
    elif not persisted.last:
        await write()
        # A collection that lists sessions from now on finds this one; one that has listed them before does not.
        require_uncollected(content, await log.refresh())
    else:
        await run_all(write, log.refresh)
        require_uncollected(content, log.state)
    return persisted.session


async def claim(content: SessionContent) -> None:
    """Continue a session that was just read from its segments: no other process can write to it afterwards."""
    persisted = content.persisted
    assert persisted is not None
    await _write(content, persisted, SegmentKind.RESUMED)
    # The slot may have been free because the session has ended since it was read, and its segments were removed.
    await _require_open(content.core, persisted)


async def note_attempt(content: SessionContent, snapshot: ObjectId) -> None:
    """Persist that a snapshot is about to be committed, with its events; its chunks are durable.

    Nothing happens for a session that is not persisted. Raises `SessionEndedError`: it must not be committed.
    """
    persisted = content.persisted
    if persisted is not None and persisted.worker is None:
        await _write(content, persisted, SegmentKind.COMMITTING, attempt=snapshot)


async def note_committed(content: SessionContent, snapshot: ObjectId) -> None:
    """Persist that the session was committed, and remove its segments.

    The commit has landed: a failure here is logged, and left to the next collection.
    """
    await _end_quietly(content, SegmentKind.COMMITTED, snapshot)


async def abandon(content: SessionContent) -> None:
    """End a session, as `Session.abandon_async` says."""
    with content.lock:
        if content.read_only:
            return
        content.require_changeable()
    persisted = content.persisted
    if persisted is not None:
        if persisted.worker is None:
            await _write(content, persisted, SegmentKind.ABANDONED)
        else:
            keys = [segment_key(slot) for slot in persisted.slots]
            await remove_segments(content.core.storage, keys)
    content.give_up()
    if persisted is not None and persisted.worker is None:
        await _remove_quietly(content.core, persisted, is_committed=False)


async def _end_quietly(content: SessionContent, kind: SegmentKind, snapshot: ObjectId | None) -> None:
    persisted = content.persisted
    if persisted is None or persisted.worker is not None:
        return
    try:
        await _write(content, persisted, kind, snapshot=snapshot)
    except IcechunkError as error:
        _LOG.warning("session %s has ended, which could not be written: %s", encode_id(persisted.session), error)
        return
    await _remove_quietly(content.core, persisted, is_committed=kind is SegmentKind.COMMITTED)


async def _remove_quietly(core: Core, persisted: Persisted, *, is_committed: bool) -> None:
    """Remove the segments of an ended session, except its end and the claims; a collection removes the rest."""
    try:
        listed = (await list_sessions(core.storage, persisted.session)).get(persisted.session)
        if listed is not None:
            if is_committed:
                _warn_of_uncollected(persisted, listed)
            await remove_segments(core.storage, listed.keys_but(persisted.last, *persisted.claims))
    except IcechunkError as error:
        _LOG.warning("segments of session %s stay for now: %s", encode_id(persisted.session), error)


def _warn_of_uncollected(persisted: Persisted, listed: Listed) -> None:
    """Log that a commit lacks changes that forks had handed over before it."""
    lacking = [
        worker for worker, slots in listed.workers.items() if max(slots) > persisted.collected.get(worker, (0, ()))[0]
    ]
    if lacking:
        _LOG.warning(
            "session %s was committed without changes that %d of its forks had handed over, as this process has not "
            "collected them; call Session.collect_forks before commit",
            encode_id(persisted.session),
            len(lacking),
        )


async def _write(
    content: SessionContent,
    persisted: Persisted,
    kind: SegmentKind,
    *,
    attempt: ObjectId | None = None,
    snapshot: ObjectId | None = None,
) -> None:
    """Add the next segment.

    Raises
    ------
    SessionEndedError
        Its slot is taken; nothing was written.
    StorageError
        A chunk or the segment could not be written; the next call tries again.
    """
    core = content.core
    async with persisted.turn:
        if persisted.ended is not None:
            raise persisted.ended
        if attempt is not None:
            persisted.attempts += (attempt,)
        while True:
            with content.lock:
                if kind is SegmentKind.CHECKPOINT:
                    content.require_changeable()
                base, since_us = content.log.base.id, content.since_us
                events = () if kind.is_end else content.own_events()
            keep = common_prefix(persisted.events, events)
            new = events[keep:]
            if persisted.worker is not None and not new and keep == len(persisted.events):
                return
            if not kind.is_end:
                # After the events were taken: the chunks that they refer to are durable before they are.
                await content.puts.flush()
            nonce = core.sources.random_bytes(16)
            claims = persisted.claims
            if kind is SegmentKind.RESUMED:
                claims += (persisted.next_slot.number,)
            head = SegmentHead(
                kind=kind,
                nonce=nonce,
                base=base,
                keep=keep,
                branch=content.branch,
                rearrange=content.rearrange,
                since_us=since_us,
                created_us=persisted.created_us,
                lease_us=persisted.lease_us,
                attempts=persisted.attempts,
                claims=claims,
                snapshot=snapshot,
                joined_at=persisted.joined_at,
                earlier_bases=tuple(id for id in persisted.earlier_bases if id != base),
                lineage=content.lineage,
            )
            data = await off_loop(sum(map(size_of, new)), partial(encode_segment, head, new))
            persisted.tries[nonce] = Written(base, keep, new, events)
            try:
                there = await add_segment(core.storage, core.sources, persisted.next_slot, nonce, data)
            except ObjectNotFoundError:
                # The slot was taken, and its segment was removed since: as happens once a session has ended.
                await _require_open(core, persisted)
                raise
            if there is None:
                persisted.advance(nonce)
                persisted.claims = claims
                return
            if there.nonce not in persisted.tries:
                persisted.ended = ended_error(persisted.session, there)
                raise persisted.ended
            # The segment of an earlier call has landed after all.
            persisted.advance(there.nonce)
            persisted.claims = claims


async def _require_open(core: Core, persisted: Persisted) -> None:
    """Refuse a session that has gone on elsewhere, or a fork whose session has ended.

    Raises `SessionEndedError` or `SessionNotFoundError`.
    """
    listed = (await list_sessions(core.storage, persisted.session)).get(persisted.session)
    if listed is None or not listed.own:
        raise unknown_error(persisted.session)
    if listed.last > max(persisted.seen, persisted.last if persisted.worker is None else 0):
        head = await read_head(core.storage, listed.own[listed.last].key)
        if head.kind.is_end or persisted.worker is None:
            raise ended_error(persisted.session, head)
        persisted.seen = listed.last


def unknown_error(session: ObjectId) -> SessionNotFoundError:
    """The error for an id without segments."""
    return SessionNotFoundError(
        f"no session {encode_id(session)} is persisted in this repository; those that are: Repository.sessions, or "
        "`icechunk session list URL`"
    )


def require_uncollected(content: SessionContent, state: RepoState) -> None:
    """Refuse a session whose chunks a collection may have taken. Raises `SessionEndedError`."""
    if content.since_us < state.gc_cutoff_us:
        assert content.persisted is not None
        raise SessionEndedError(
            f"session {encode_id(content.persisted.session)} has expired: a collection of files younger than its "
            "first upload has run before it was persisted; repeat the work in a new session",
            ErrorKind.SESSION_EXPIRED,
        )


async def find_landed(core: Core, branch: str | None, attempts: tuple[ObjectId, ...]) -> ObjectId | None:
    """The one of the snapshots that is in the history by now; None where there is none."""
    if not attempts:
        return None
    state = await core.state()
    if core.layout is Layout.REFS:
        tip = None if branch is None else state.branches.get(branch)
        if tip is None:
            return None
        ancestry = (await core.learn(tip, ancestry=True)).ancestry(tip)
        return next((record.id for record in ancestry if record.id in attempts), None)
    return next((id for id in attempts if id in state.snapshots), None)


def landed_error(session: ObjectId, snapshot: ObjectId) -> SessionEndedError:
    """The error for a session of which an earlier commit has landed, perhaps another process's."""
    id = encode_id(snapshot)
    return SessionEndedError(
        f"session {encode_id(session)} was committed, as snapshot {id}, by a commit whose outcome was open; later "
        "changes are not part of it. Open a new session on the branch",
        ErrorKind.SESSION_COMMITTED,
        id,
    )


async def require_not_landed(content: SessionContent) -> None:
    """Refuse a persisted session of which an earlier commit has landed, or that another process has taken over.

    Raises `SessionEndedError`.
    """
    persisted = content.persisted
    if persisted is None:
        return
    if persisted.ended is not None:
        raise persisted.ended
    landed = await find_landed(content.core, content.branch, persisted.attempts)
    if landed is not None:
        await _end_quietly(content, SegmentKind.COMMITTED, landed)
        persisted.ended = landed_error(persisted.session, landed)
        raise persisted.ended
    # Where it cannot be read, the segment of the next attempt decides.
    with suppress(StorageError):
        persisted.ended = ended_error(
            persisted.session, await read_head(content.core.storage, segment_key(persisted.next_slot))
        )
        raise persisted.ended
