"""Going on with a persisted session: as the session itself in another process, or as a fork that works for it."""

from __future__ import annotations

from typing import Final, NamedTuple

from icechunk.errors import (
    ErrorKind,
    FormatError,
    ObjectNotFoundError,
    SessionEndedError,
    SessionStateError,
    SnapshotNotFoundError,
)
from icechunk.format.ids import ObjectId, encode_id
from icechunk.format.values import Snapshot
from icechunk.log.session.events import Event
from icechunk.log.session.log import SessionLog
from icechunk.log.session.merge.merging import Fork, MergePolicy
from icechunk.log.session.segment import SegmentHead, events_of
from icechunk.log.session.wire import folded
from icechunk.session.content import SessionContent
from icechunk.session.core import Core
from icechunk.session.merge import Brought, merge_forks
from icechunk.session.persisted import Persisted, ended_error
from icechunk.session.session_checkpoint import claim, require_not_landed, require_uncollected, unknown_error
from icechunk.transfer.segments import Listed, list_sessions, read_segments

__all__ = ["collect_forks", "join", "joined_fork", "resume"]

_TRIES: Final = 5
"""Number of times that a session is read, where it is written to meanwhile."""


class _Found(NamedTuple):
    """A session as its segments have it."""

    head: SegmentHead
    """Head of the newest segment."""
    base: Snapshot
    events: tuple[Event, ...]
    persisted: Persisted


async def resume(core: Core, session: ObjectId, lease_us: int | None) -> SessionContent:
    """Continue a session, as `Repository.resume_session_async` says."""
    for tried in range(_TRIES):
        found = await _read(core, session)
        head, persisted = found.head, found.persisted
        persisted.lease_us = head.lease_us if lease_us is None else lease_us
        content = SessionContent(
            core,
            folded(found.base, found.events, core.sources.new_node_id, core.sources.new_node_id()),
            branch=head.branch,
            since_us=head.since_us,
            rearrange=head.rearrange,
            persisted=persisted,
        )
        try:
            await claim(content)
            break
        except SessionEndedError as error:
            # Another process has written to it since it was read.
            if error.kind != ErrorKind.SESSION_FENCED or tried == _TRIES - 1:
                raise
    # From here on no other process begins a commit; one that was begun before is known by its snapshot.
    await require_not_landed(content)
    require_uncollected(content, await core.state())
    return content


async def join(core: Core, session: ObjectId) -> SessionContent:
    """A fork that joins a session, as `Repository.join_session_async` says."""
    found = await _read(core, session)
    log = folded(found.base, found.events, core.sources.new_node_id, core.sources.new_node_id())
    return SessionContent(
        core,
        log,
        origin=log.savepoint_at(len(found.events)),
        since_us=found.head.since_us,
        rearrange=found.head.rearrange,
        persisted=joined_fork(core, session, found.persisted.last),
    )


def joined_fork(core: Core, session: ObjectId, joined_at: int) -> Persisted:
    """The segments, none yet, of a fork that begins where a session's segment ends."""
    return Persisted(session=session, worker=core.sources.new_object_id(), joined_at=joined_at, seen=joined_at)


async def collect_forks(content: SessionContent, policy: MergePolicy) -> int:
    """Merge the changes of forks that joined a session, as `Session.collect_forks_async` says."""
    persisted = content.persisted
    if persisted is None or persisted.worker is not None:
        raise SessionStateError(
            "cannot collect forks: the session is not persisted, so no fork can have joined it; Session.checkpoint "
            "persists it",
            ErrorKind.NOT_ALLOWED,
        )
    with content.lock:
        content.require_changeable()
    core = content.core
    listed = (await list_sessions(core.storage, persisted.session)).get(persisted.session)
    workers = {} if listed is None else listed.workers
    read: dict[ObjectId, tuple[int, tuple[Event, ...]]] = {}
    forks: list[Brought] = []
    at_segments: dict[int, _Beginning] = {}
    # In the order of their newest segments: the numbers of forks in conflicts follow it.
    for worker in sorted(workers, key=lambda id: (max(info.modified_us for info in workers[id].values()), id)):
        slots = workers[worker]
        before, events = persisted.collected.get(worker, (0, ()))
        fresh = sorted(number for number in slots if number > before)
        if not fresh:
            continue
        segments = await read_segments(core.storage, [slots[number].key for number in fresh])
        events = events_of([(0, events), *((head.keep, new) for head, new in segments)])
        read[worker] = fresh[-1], events
        head = segments[-1][0]
        began = await _beginning_of(content, persisted, head, at_segments)
        forks.append(_brought(content, len(forks), head, events, began))
    if forks:
        await merge_forks(content, forks, policy)
        persisted.collected |= read
    return len(forks)


class _Beginning(NamedTuple):
    """The state in which forks began."""

    base: Snapshot
    inherited: tuple[Event, ...]
    log: SessionLog
    """The inherited events over the base."""
    nodes: Snapshot
    """The base with the nodes that there were then."""

    @staticmethod
    async def of(content: SessionContent, base_id: ObjectId, inherited: tuple[Event, ...]) -> _Beginning:
        core, base = content.core, content.log.base
        if base.id != base_id:
            base = await core.assets.snapshot(base_id)
        log = folded(base, inherited, core.sources.new_node_id)
        return _Beginning(base, inherited, log, base.with_nodes(log.hierarchy()))


async def _beginning_of(
    content: SessionContent, persisted: Persisted, head: SegmentHead, at_segments: dict[int, _Beginning]
) -> _Beginning:
    """The state in which a fork began; ``at_segments`` has those of other forks, so that none is folded twice."""
    if head.lineage is not None:
        return await _Beginning.of(content, head.base, ())
    if head.joined_at not in at_segments:
        found = persisted.inherited_at(head.joined_at)
        if found is None:
            raise FormatError(
                f"cannot read a fork of session {encode_id(persisted.session)}: it joined at segment "
                f"{head.joined_at}, which the session does not have",
                ErrorKind.DESERIALIZATION,
            )
        at_segments[head.joined_at] = await _Beginning.of(content, *found)
    return at_segments[head.joined_at]


def _brought(
    content: SessionContent, number: int, head: SegmentHead, own: tuple[Event, ...], began: _Beginning
) -> Brought:
    """The changes of a fork, as it wrote them. Raises `FormatError` if its events do not follow from its beginning."""
    folded(began.nodes, own, content.core.sources.new_node_id)
    origin, last_inherited = head.lineage or (began.base.id, ())
    fork = Fork(
        number=number,
        base=began.base,
        inherited=began.inherited,
        own=own,
        last_inherited=last_inherited,
        began=began.log,
    )
    return Brought(fork, origin, head.since_us)


async def _read(core: Core, session: ObjectId) -> _Found:
    """Read a session that has not ended.

    Raises
    ------
    SessionNotFoundError
        It has no segments.
    SessionEndedError
        It has ended, or its base is gone.
    FormatError
        A segment cannot be read, or is missing.
    """
    listed, segments, events = await _segments(core, session)
    head = segments[-1][0]
    try:
        base = await core.assets.snapshot(head.base)
    except (ObjectNotFoundError, SnapshotNotFoundError) as error:
        raise SessionEndedError(
            f"session {encode_id(session)} has expired: its base, snapshot {encode_id(head.base)}, is gone; repeat the "
            "work in a new session",
            ErrorKind.SESSION_EXPIRED,
        ) from error
    persisted = Persisted(
        session=session,
        created_us=head.created_us,
        lease_us=head.lease_us,
        last=listed.last,
        events=events,
        attempts=head.attempts,
        claims=head.claims,
        earlier_bases=(*head.earlier_bases, head.base),
        parts={n: (head.base, head.keep, new) for n, (head, new) in enumerate(segments, 1)},
    )
    return _Found(head, base, events, persisted)


async def _segments(
    core: Core, session: ObjectId
) -> tuple[Listed, list[tuple[SegmentHead, tuple[Event, ...]]], tuple[Event, ...]]:
    """The segments of a session that has not ended: as listed, as read, and the events that they make together."""
    before = None
    while True:
        listed = (await list_sessions(core.storage, session)).get(session)
        if listed is None or not listed.own:
            raise unknown_error(session)
        try:
            segments = await read_segments(core.storage, [listed.own[n].key for n in sorted(listed.own)])
            head = segments[-1][0]
            if head.kind.is_end:
                raise ended_error(session, head)
            if len(segments) != listed.last:
                raise FormatError(
                    f"cannot read session {encode_id(session)}: it has {listed.last} segments, of which only "
                    f"{len(segments)} are there",
                    ErrorKind.DESERIALIZATION,
                )
            return listed, segments, events_of((head.keep, new) for head, new in segments)
        except (ObjectNotFoundError, FormatError):
            # It may have ended since it was listed: then segments are removed, and a process that does not know it yet
            # may have written one in a slot that has become free.
            if listed.own == before:
                raise
            before = listed.own
