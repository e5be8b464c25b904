"""The feed: every change of a repository, once, in order.

A watcher holds a *token*: small text that names the last update it has yielded. The ops log of format 2 is a total
order of updates with strictly increasing times, so a token names its update by time and content, survives restarts,
and belongs to one repository. In format 1, which keeps no such log, the token holds the refs as they were: commits
follow from the ancestry between two tips, and several changes of a ref in between are one event.

Each poll asks the repository log for new updates, which costs one small GET at the end of the log (one look at a
folder on local disk). Polls follow one another quickly after something happened and slow down to ``idle_s``.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import zlib
from collections.abc import AsyncIterator, Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any, ClassVar, Final

from icechunk.errors import ErrorKind, InvalidInputError, ObjectNotFoundError, SnapshotNotFoundError
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId, encode_id, object_id_from_text
from icechunk.format.repo import repo_info as stored
from icechunk.format.repo.repo_info import SnapshotRecord
from icechunk.log.repository.port import Layout, RepositoryLog
from icechunk.log.repository.state import MAIN, RepoState, is_rewritten_as
from icechunk.repository.changes import ChangedRegions, Changes
from icechunk.repository.views import snapshot_info, update
from icechunk.runtime import json_codec
from icechunk.runtime.checks import require_type
from icechunk.runtime.clock import moment
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.representation import Described
from icechunk.runtime.twins import iterate_sync
from icechunk.snapshots import SnapshotInfo

__all__ = ["EventKind", "RepositoryEvent", "Watching"]

_FIRST_S: Final = 0.1
"""Pause before the poll that follows a new update; each poll without one doubles it."""
_LOG_TOKEN: Final = "u1"
_GAP_TOKEN: Final = "g1"
"""Version of the token of a gap, which names the update after it."""
_REFS_TOKEN: Final = "r1"


class EventKind(StrEnum):
    """The kind of an event."""

    CREATED = "created"
    """The repository was created, or came from format 1."""
    COMMIT = "commit"
    AMEND = "amend"
    """A commit replaced the tip of a branch: ``previous_snapshot_id`` is the tip that it replaced. Or a collection
    wrote the tip again, with the same contents."""
    DETACHED = "detached"
    """A snapshot that no branch moved to (`Session.flush`)."""
    BRANCH_CREATED = "branch-created"
    BRANCH_RESET = "branch-reset"
    BRANCH_DELETED = "branch-deleted"
    TAG_CREATED = "tag-created"
    TAG_DELETED = "tag-deleted"
    CONFIG = "config"
    METADATA = "metadata"
    STATUS = "status"
    FEATURE_FLAG = "feature-flag"
    EXPIRED = "expired"
    COLLECTED = "collected"
    GAP = "gap"
    """Updates between the token and the next event are no longer known: begin again at ``snapshot_id``, the tip of the
    watched branch (of ``main`` where all are watched) before the next event; None where the branch came later."""


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class RepositoryEvent(Described):
    """One thing that happened to a repository."""

    _public_name: ClassVar[str] = "icechunk.RepositoryEvent"

    kind: EventKind
    token: str
    """Give it to `Repository.watch` as ``since`` to continue after this event."""
    at: datetime
    """Time of the event by the repository's own order: later events are later."""
    branch: str | None = None
    """The branch that it happened to."""
    tag: str | None = None
    """The tag that it happened to."""
    snapshot_id: str | None = None
    """The snapshot that a commit or an amendment made, or that the branch or tag points to now, if known."""
    previous_snapshot_id: str | None = None
    """The snapshot that the branch or tag pointed to before, if known."""
    snapshot: SnapshotInfo | None = None
    """Message, metadata, time and parent of ``snapshot_id``; None where it has expired since."""
    changes: ChangedRegions | None = None
    """The arrays and chunks that a commit changed, or an amendment together with what it replaced (those since the
    parent; none where a collection wrote the tip again and the former one still exists); None unless ``with_changes``
    asks for it, and where a snapshot or transaction log in between no longer exists."""
    detail: Any = None
    """The line of the ops log (`icechunk.Update`); None in format 1 and for a gap."""


class Watching(Changes):
    """The methods that watch for changes."""

    async def watch(
        self,
        branch: str | None = None,
        *,
        since: str | None = None,
        idle_s: float = 5.0,
        stop_at_end: bool = False,
        with_changes: bool = False,
    ) -> AsyncIterator[RepositoryEvent]:
        """Everything that happens to the repository, in order, each event once; ends only when the caller stops.

        Parameters
        ----------
        branch
            Only events of this branch: commits, amendments, resets, creation and deletion. None: all events.
        since
            The token of the last event that was handled; None: begin with the next event. The empty text
            begins with the oldest update that is known.
        idle_s
            Longest pause between two looks where nothing happens, in seconds, more than 0.
        stop_at_end
            End once all events from before the call have been yielded.
        with_changes
            Find out what each commit and amendment changed, as `changes` does: reads its transaction log and
            snapshots, which this process often has.

        Yields
        ------
        RepositoryEvent
            With the ``token`` to go on after it.

        Raises
        ------
        InvalidInputError
            The token is none, or of another repository (kind ``invalid-setting``).
        StorageError
            The store gave no answer; go on with the last token.
        """
        if not isinstance(idle_s, (int, float)) or not idle_s > 0:
            raise InvalidInputError(
                f"idle_s must be a number (of seconds) of more than 0, not {idle_s!r}", ErrorKind.INVALID_SETTING
            )
        if since is not None:
            require_type("since", since, str)
        require_type("branch", branch, str, optional=True)
        log = await self._core.log()
        follower = _RefsFollower(log) if log.layout is Layout.REFS else _OpsFollower(log, branch or "main")
        await follower.begin(since)
        pause_s = _FIRST_S
        while True:
            found = False
            async for event in follower.new_events():
                found = True
                if branch is None or event.branch == branch or (event.kind is EventKind.GAP and event.branch is None):
                    yield await self._with_changes(event) if with_changes else event
            if stop_at_end:
                return
            pause_s = _FIRST_S if found else min(idle_s, pause_s * 2)
            await asyncio.sleep(min(idle_s, pause_s))

    def watch_sync(
        self,
        branch: str | None = None,
        *,
        since: str | None = None,
        idle_s: float = 5.0,
        stop_at_end: bool = False,
        with_changes: bool = False,
    ) -> Iterator[RepositoryEvent]:
        """Synchronous twin of `watch`."""
        return iterate_sync(
            self.watch(branch, since=since, idle_s=idle_s, stop_at_end=stop_at_end, with_changes=with_changes)
        )

    async def _with_changes(self, event: RepositoryEvent) -> RepositoryEvent:
        before = event.previous_snapshot_id
        if event.kind is EventKind.AMEND:
            if await self._is_rewriting(event):
                none = ChangedRegions(since=before or "", until=event.snapshot_id or "", arrays=MappingProxyType({}))
                return replace(event, changes=none)
            before = None if event.snapshot is None else event.snapshot.parent_id
        elif event.kind is not EventKind.COMMIT:
            return event
        if before is None or event.snapshot_id is None:
            return event
        try:
            return replace(event, changes=await self.changes_async(before, event.snapshot_id))
        except (ObjectNotFoundError, SnapshotNotFoundError):
            return event
        except InvalidInputError as error:
            if error.kind != ErrorKind.BAD_SNAPSHOT_CHAIN_FOR_DIFF:
                raise
            return event

    async def _is_rewriting(self, event: RepositoryEvent) -> bool:
        """Whether a collection wrote the snapshot again, with the same content, and the former one still says so."""
        if event.previous_snapshot_id is None or event.snapshot_id is None:
            return False
        former = object_id_from_text(event.previous_snapshot_id)
        return is_rewritten_as(await self._core.learn(former), former, object_id_from_text(event.snapshot_id))


class _OpsFollower:
    """Follows the ops log of format 2: the log layout and the repo object."""

    def __init__(self, log: RepositoryLog, branch: str) -> None:
        self._log = log
        self._branch = branch
        """Whose snapshot is named to begin again from, after a gap."""
        self._at_us = -1
        """Time of the last update that was yielded."""
        self._known: str | None = None
        """The token to be found again on the first look; None where there is nothing to check."""

    async def begin(self, since: str | None) -> None:
        state = await self._log.refresh()
        if since is None:
            newest = next(iter(state.updates), None)
            self._at_us = -1 if newest is None else newest.updated_at_us
        elif since:
            self._at_us, self._known = _parse_ops_token(since), since

    async def new_events(self) -> AsyncIterator[RepositoryEvent]:
        state = await self._log.refresh()
        newer, complete = await self._newer(state)
        targets, tips = _targets(newer, state)
        if not complete:
            # Only with a token from outside: the last update of this watcher is never older than the kept ones.
            self._known = None
            oldest = newer[-1] if newer else None
            tip = tips.get(self._branch)
            yield RepositoryEvent(
                kind=EventKind.GAP,
                token=_ops_token(oldest, version=_GAP_TOKEN) if oldest is not None else "",
                at=moment(self._at_us if oldest is None else oldest.updated_at_us),
                snapshot_id=None if tip is None else encode_id(tip),
            )
        for entry, target in zip(reversed(newer), reversed(targets), strict=True):
            self._at_us = entry.updated_at_us
            yield _event(entry, state, target)

    async def _newer(self, state: RepoState) -> tuple[list[stored.Update], bool]:
        """Updates after the last one yielded, newest first, and whether none is missing in between."""
        newer: list[stored.Update] = []
        last: stored.Update | None = None
        # The token of a gap names the update after it.
        is_gap = self._known is not None and self._known.startswith(f"{_GAP_TOKEN}.")
        try:
            async for entry in self._log.updates():
                if is_gap and entry.updated_at_us == self._at_us:
                    newer.append(entry)
                if entry.updated_at_us <= self._at_us:
                    version = _GAP_TOKEN if is_gap else _LOG_TOKEN
                    if self._known is not None and _ops_token(entry, version=version) != self._known:
                        raise _foreign(self._known)
                    self._known = None
                    return newer, True
                newer.append(entry)
                last = entry
        except ObjectNotFoundError:
            # A copy of ``repo`` with older updates was deleted.
            return newer, self._at_us < 0
        if self._known is not None and last is not None and isinstance(last.change, stored.RepoInitialized):
            raise _foreign(self._known)
        return newer, self._at_us < 0


class _RefsFollower:
    """Follows the refs of format 1, which keeps no ops log."""

    def __init__(self, log: RepositoryLog) -> None:
        self._log = log
        self._branches: dict[str, str] = {}
        self._tags: dict[str, str] = {}
        self._gone = set[str]()
        """Snapshots of the token that branches have left and that no longer exist."""

    async def begin(self, since: str | None) -> None:
        state = await self._log.refresh()
        self._log.require_all_refs()
        if since is None:
            self._branches, self._tags = _refs(state)
        elif since:
            self._branches, self._tags = _parse_refs_token(since)
            await self._require_own(since, *_refs(state))

    async def _require_own(self, token: str, branches: dict[str, str], tags: dict[str, str]) -> None:
        """Refuse a token that has no snapshot of this repository."""
        known = [(self._branches, branches), (self._tags, tags)]
        pairs = [(id, now.get(name)) for was, now in known for name, id in was.items()]
        first = encode_id(FIRST_SNAPSHOT)
        moved = {id for id, now in pairs if id != now} - {first}
        self._gone = {id for id in sorted(moved) if await self._info(id) is None}
        if moved and moved == self._gone and all(id == first for id, now in pairs if id == now):
            raise InvalidInputError(
                f"the token {token[:60]!r} belongs to another repository, or none of its snapshots exists any more; "
                "leave `since` out to begin now, and begin what is derived again at the tips of the branches",
                ErrorKind.INVALID_SETTING,
            )

    async def new_events(self) -> AsyncIterator[RepositoryEvent]:
        state = await self._log.refresh()
        self._log.require_all_refs()
        branches, tags = _refs(state)
        unread = set(self._branches.values())
        for name in sorted(self._branches.keys() - branches.keys()):
            before = self._branches.pop(name)
            yield self._made(EventKind.BRANCH_DELETED, branch=name, previous_snapshot_id=before)
        for name in sorted(self._tags.keys() - tags.keys()):
            before = self._tags.pop(name)
            yield self._made(EventKind.TAG_DELETED, tag=name, previous_snapshot_id=before)
        history = set[ObjectId]()
        for name, tip in sorted(branches.items(), key=lambda item: (item[0] != MAIN, item)):
            old = self._branches.get(name)
            if old is None:
                async for event in self._created(name, tip, unread, history):
                    yield event
            elif old != tip:
                async for event in self._moved(name, old, tip):
                    yield event
            unread.add(tip)
        for name, target in tags.items():
            if self._tags.get(name) != target:
                self._tags[name] = target
                info = await self._info(target)
                yield self._made(EventKind.TAG_CREATED, tag=name, snapshot_id=target, snapshot=info)

    async def _created(
        self, name: str, tip: str, unread: set[str], history: set[ObjectId]
    ) -> AsyncIterator[RepositoryEvent]:
        """A new branch where it left the history of the known tips, and the commits from there on.

        ``history`` has all snapshots that the known tips reach, but for those that are ``unread``; they are read here.
        """
        while unread:
            with suppress(SnapshotNotFoundError):
                history |= {record.id for record in await self._lineage(unread.pop(), history)}
        try:
            *new, start = await self._lineage(tip, history, with_end=True)
        except SnapshotNotFoundError:
            self._branches[name] = tip
            yield self._made(EventKind.BRANCH_CREATED, branch=name, snapshot_id=tip)
            return
        self._branches[name] = encode_id(start.id)
        yield self._made(
            EventKind.BRANCH_CREATED, branch=name, snapshot_id=encode_id(start.id), snapshot=snapshot_info(start)
        )
        for event in self._commits(name, new):
            yield event

    async def _lineage(
        self, tip: str, end: Container[ObjectId] = frozenset(), *, with_end: bool = False
    ) -> list[SnapshotRecord]:
        """A snapshot and its ancestors, newest first, up to the first one in ``end``; that one only ``with_end``."""
        id, found = object_id_from_text(tip), []
        if id in end and not with_end:
            return []
        for record in (await self._log.learn([id], ancestry=True, until=end)).ancestry(id):
            if record.id not in end or with_end:
                found.append(record)
            if record.id in end:
                break
        return found

    async def _moved(self, name: str, old: str, tip: str) -> AsyncIterator[RepositoryEvent]:
        """The commits that lead from one tip to the next, or one event where they do not."""
        if old in self._gone:
            # Whether commits led from there is not known.
            self._branches[name] = tip
            yield self._made(EventKind.GAP, branch=name, snapshot_id=tip)
            return
        try:
            lineage = await self._lineage(tip, {object_id_from_text(old)}, with_end=True)
        except SnapshotNotFoundError:
            self._branches[name] = tip
            yield self._made(EventKind.BRANCH_RESET, branch=name, snapshot_id=tip, previous_snapshot_id=old)
            return
        *new, last = lineage
        if encode_id(last.id) != old:
            self._branches[name] = tip
            info = snapshot_info(lineage[0])
            yield self._made(
                EventKind.BRANCH_RESET, branch=name, snapshot_id=tip, previous_snapshot_id=old, snapshot=info
            )
            return
        for event in self._commits(name, new):
            yield event

    def _commits(self, name: str, new: Sequence[SnapshotRecord]) -> Iterator[RepositoryEvent]:
        """The commits of a branch after its tip, newest first as given."""
        for record in reversed(new):
            id, before = encode_id(record.id), self._branches[name]
            self._branches[name] = id
            yield self._made(
                EventKind.COMMIT,
                branch=name,
                snapshot_id=id,
                previous_snapshot_id=before,
                snapshot=snapshot_info(record),
            )

    async def _info(self, snapshot_id: str) -> SnapshotInfo | None:
        id = object_id_from_text(snapshot_id)
        try:
            return snapshot_info((await self._log.learn([id])).snapshots[id])
        except (SnapshotNotFoundError, KeyError):
            return None

    def _made(self, kind: EventKind, *, snapshot: SnapshotInfo | None = None, **names: Any) -> RepositoryEvent:
        at = moment(self._log.store_time_us) if snapshot is None else snapshot.written_at
        return RepositoryEvent(
            kind=kind, token=_refs_token(self._branches, self._tags), at=at, snapshot=snapshot, **names
        )


def _targets(
    newer: Sequence[stored.Update], state: RepoState
) -> tuple[list[ObjectId | None], dict[str, ObjectId | None]]:
    """The snapshot that the branch of each update, newest first, pointed to after it, and that of each branch before
    all of them; None where it is not known."""
    tips: dict[str, ObjectId | None] = dict(state.branches)
    targets: list[ObjectId | None] = []
    after: ObjectId | None
    before: ObjectId | None
    for entry in newer:
        match entry.change:
            case stored.NewCommit(branch=name, snapshot=snapshot):
                record = state.snapshots.get(snapshot)
                after, before = snapshot, None if record is None else record.parent
            case stored.CommitAmended(branch=name, previous_snapshot=previous, snapshot=snapshot):
                after, before = snapshot, previous
            case stored.BranchReset(name=name, previous_snapshot=previous):
                after, before = tips.get(name), previous
            case stored.BranchDeleted(name=name, previous_snapshot=previous):
                after, before = None, previous
            case stored.BranchCreated(name=name):
                after, before = tips.pop(name, None), None
                targets.append(after)
                continue
            case _:
                targets.append(None)
                continue
        tips[name] = before
        targets.append(after)
    return targets, tips


def _event(entry: stored.Update, state: RepoState, target: ObjectId | None) -> RepositoryEvent:
    """An update of the ops log as an event; ``target`` is where its branch pointed after it, if known."""
    event = RepositoryEvent(
        kind=EventKind.METADATA, token=_ops_token(entry), at=moment(entry.updated_at_us), detail=update(entry)
    )

    def made(
        kind: EventKind, *, snapshot: ObjectId | None = None, previous: ObjectId | None = None, **names: Any
    ) -> RepositoryEvent:
        record = None if snapshot is None else state.snapshots.get(snapshot)
        if previous is None and record is not None and kind is EventKind.COMMIT:
            previous = record.parent
        return replace(
            event,
            kind=kind,
            snapshot_id=None if snapshot is None else encode_id(snapshot),
            previous_snapshot_id=None if previous is None else encode_id(previous),
            snapshot=None if record is None else snapshot_info(record),
            **names,
        )

    match entry.change:
        case stored.RepoInitialized() | stored.RepoMigrated():
            return made(EventKind.CREATED)
        case stored.NewCommit(branch=branch, snapshot=snapshot):
            return made(EventKind.COMMIT, branch=branch, snapshot=snapshot)
        case stored.CommitAmended(branch=branch, previous_snapshot=previous, snapshot=snapshot):
            return made(EventKind.AMEND, branch=branch, snapshot=snapshot, previous=previous)
        case stored.NewDetachedSnapshot(snapshot=snapshot):
            return made(EventKind.DETACHED, snapshot=snapshot)
        case stored.BranchCreated(name=name):
            return made(EventKind.BRANCH_CREATED, branch=name, snapshot=target)
        case stored.BranchReset(name=name, previous_snapshot=previous):
            return made(EventKind.BRANCH_RESET, branch=name, snapshot=target, previous=previous)
        case stored.BranchDeleted(name=name, previous_snapshot=previous):
            return made(EventKind.BRANCH_DELETED, branch=name, previous=previous)
        case stored.TagCreated(name=name):
            return made(EventKind.TAG_CREATED, tag=name, snapshot=state.tags.get(name))
        case stored.TagDeleted(name=name, previous_snapshot=previous):
            return made(EventKind.TAG_DELETED, tag=name, previous=previous)
        case stored.ConfigChanged():
            return made(EventKind.CONFIG)
        case stored.MetadataChanged():
            return event
        case stored.StatusChanged():
            return made(EventKind.STATUS)
        case stored.FeatureFlagChanged():
            return made(EventKind.FEATURE_FLAG)
        case stored.ExpirationRan():
            return made(EventKind.EXPIRED)
        case stored.GCRan():
            return made(EventKind.COLLECTED)


def _ops_token(entry: stored.Update, *, version: str = _LOG_TOKEN) -> str:
    """Names an update by its time, which no other update has, and its content, which another repository's has not."""
    content = hashlib.sha256(repr(entry.change).encode()).hexdigest()[:12]
    return f"{version}.{entry.updated_at_us}.{content}"


def _parse_ops_token(token: str) -> int:
    version, _, rest = token.partition(".")
    time_us, _, content = rest.partition(".")
    if version not in (_LOG_TOKEN, _GAP_TOKEN) or not time_us.isdecimal() or len(content) != 12:
        raise _malformed(token)
    return int(time_us)


def _refs(state: RepoState) -> tuple[dict[str, str], dict[str, str]]:
    branches = {name: encode_id(id) for name, id in sorted(state.branches.items())}
    return branches, {name: encode_id(id) for name, id in sorted(state.tags.items())}


def _refs_token(branches: dict[str, str], tags: dict[str, str]) -> str:
    data = zlib.compress(json_codec.dumps([branches, tags]))
    return f"{_REFS_TOKEN}.{base64.urlsafe_b64encode(data).decode().rstrip('=')}"


def _parse_refs_token(token: str) -> tuple[dict[str, str], dict[str, str]]:
    version, _, data = token.partition(".")
    try:
        if version != _REFS_TOKEN:
            raise ValueError(version)
        packed = base64.urlsafe_b64decode(data + "=" * (-len(data) % 4))
        unpacker = zlib.decompressobj()
        branches, tags = json_codec.loads(unpacker.decompress(packed, _MOST_TOKEN_BYTES))
        return {str(k): str(v) for k, v in branches.items()}, {str(k): str(v) for k, v in tags.items()}
    except (ValueError, binascii.Error, zlib.error, AttributeError, TypeError) as error:
        raise _malformed(token) from error


_MOST_TOKEN_BYTES: Final = 64 * 1024 * 1024
"""Bytes of unpacked refs, at most: a token that claims more is no token of ours."""


def _malformed(token: str) -> InvalidInputError:
    return InvalidInputError(
        f"{token[:60]!r} is no token of a feed of this layout: tokens are those of events (RepositoryEvent.token, or "
        "`icechunk watch --json`), and an upgrade to another format begins a new feed; leave `since` (--since) out to "
        "begin now, or give the empty text for the oldest",
        ErrorKind.INVALID_SETTING,
    )


def _foreign(token: str) -> InvalidInputError:
    return InvalidInputError(
        f"the token {token[:60]!r} belongs to another repository: this one has no such update in its ops log",
        ErrorKind.INVALID_SETTING,
    )
