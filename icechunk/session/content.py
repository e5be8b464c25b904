"""The state of a session: a committed snapshot, and in writable ones a log of changes on top of it.

A writable session goes through these phases::

    writable ─ commit begins ─▶ committing ─ files written ─▶ swapping ─ landed ─▶ read-only, on the new snapshot
       ▲                            │                            │ │
       └──── refused or failed ─────┴────────────────────────────┘ └─ outcome unknown ─▶ unsettled

A rebase is a phase of its own, between writable and writable; one that a commit does is part of the commit.

The content owns its log and its put pool. Changes of state are short critical sections under one lock and never await,
so event loops and threads may share a session. A write while a commit runs is refused, never silently left out.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Sequence
from enum import Enum
from typing import NamedTuple

from icechunk.errors import (
    CommitOutcomeUnknown,
    ErrorKind,
    InvalidInputError,
    NodeNotFoundError,
    ReadOnlyError,
    SessionStateError,
)
from icechunk.format.ids import ObjectId
from icechunk.format.values import ChunkRef, ChunkRefs, NodeKind, NodeSnapshot, Snapshot
from icechunk.log.repository.port import Layout, SwapToken
from icechunk.log.session.events import Event
from icechunk.log.session.log import ABSENT, IN_BASE, Absent, InBase, Savepoint, SessionLog
from icechunk.log.session.plan.compaction import Plan, plan
from icechunk.log.session.zarr_metadata import require_regular_grid
from icechunk.session.ahead import WrittenChunk, refs_of
from icechunk.session.core import Core
from icechunk.session.persisted import Persisted
from icechunk.session.read import CommittedChunks, all_references, read_chunk, read_chunk_nowait, reference_of
from icechunk.storage.port import ByteRange, Octets
from icechunk.transfer.assets import Unknown
from icechunk.transfer.packs import Packs
from icechunk.virtual_access.locations import Prefixes

__all__ = ["Lineage", "Phase", "SessionContent", "absolute"]


class Phase(Enum):
    """The phase of a session; see ``spec/session-log.md``."""

    READ_ONLY = "read-only"
    WRITABLE = "writable"
    COMMITTING = "committing"
    SWAPPING = "swapping"
    UNSETTLED = "unsettled"
    REBASING = "rebasing"


class Lineage(NamedTuple):
    """The origin of a fork whose inherited changes were written as a snapshot of their own."""

    base: ObjectId
    """Base of the session from which it comes, be it through other forks."""
    last_events: tuple[bytes, ...]
    """Ids of the last events of that session, and of forks in between, that are in the fork's base."""


class SessionContent:
    """The contents of one session; `icechunk.store.port.Content` is the part that its store uses.

    Parameters
    ----------
    core
        What it shares with the other sessions of the repository.
    log
        The base snapshot with the changes so far.
    branch
        Where a commit goes; None for sessions that commit nothing.
    origin
        Of a fork: its own changes begin here. None where all changes are the session's own.
    since_us
        Store time, µs, not later than the first upload for this session.
    rearrange
        Whether it takes moves of nodes, and nothing else.
    lineage
        Of a fork whose base is its parent with all uncommitted changes; None where the base is the parent's.
    persisted
        The segments that it was read from, or that a fork shall write; None: it has none.
    """

    def __init__(
        self,
        core: Core,
        log: SessionLog,
        *,
        branch: str | None = None,
        origin: Savepoint | None = None,
        since_us: int = 0,
        rearrange: bool = False,
        lineage: Lineage | None = None,
        persisted: Persisted | None = None,
    ) -> None:
        self.core = core
        self.log: SessionLog = log
        self.branch = branch
        self.origin = origin
        self.since_us: int = since_us
        self.rearrange = rearrange
        self.lineage = lineage
        self.persisted = persisted
        self.phase = Phase.READ_ONLY if branch is None and origin is None else Phase.WRITABLE
        self.sent: SwapToken | None = None
        """The token of the commit's entry, which has landed or may land."""
        self.puts: Packs = core.packs()
        self.lock: threading.Lock = threading.Lock()
        self._discards = 0
        self._last_read: str | None = None
        self._committed: CommittedChunks | None = None
        """The array that was read last, once the session is read-only."""

    @staticmethod
    def on(
        core: Core, base: Snapshot, *, branch: str | None = None, since_us: int = 0, rearrange: bool = False
    ) -> SessionContent:
        """A session without changes; read-only where there is no branch."""
        log = SessionLog(base, core.sources.new_node_id, b"" if branch is None else core.sources.new_node_id())
        return SessionContent(core, log, branch=branch, since_us=since_us, rearrange=rearrange)

    # -- phases ----------------------------------------------------------------------------------------------------

    @property
    def read_only(self) -> bool:
        """Whether it takes no changes; so it is after the commit, too."""
        return self.phase is Phase.READ_ONLY

    @property
    def origin_base(self) -> ObjectId:
        """The base of the session that a fork comes from; else its own."""
        return self.log.base.id if self.lineage is None else self.lineage.base

    @property
    def is_fork(self) -> bool:
        """Whether it writes on behalf of another session."""
        return self.origin is not None

    def require_changeable(self) -> None:
        """Refuse changes in all phases but one. Raises `ReadOnlyError` or `SessionStateError`."""
        if self.phase is Phase.WRITABLE:
            # First, since this runs for every chunk.
            return
        match self.phase:
            case Phase.READ_ONLY:
                raise ReadOnlyError("this session is read-only; open a writable session on a branch to change anything")
            case Phase.COMMITTING | Phase.SWAPPING:
                raise SessionStateError("a commit of this session is running; wait for it before writing")
            case Phase.REBASING:
                raise SessionStateError("a rebase of this session is running; wait for it before writing")
            case Phase.UNSETTLED:
                raise SessionStateError(
                    "the outcome of this session's commit is not known: Repository.settle(session.unsettled_commit) "
                    "finds out; then open a new session"
                )

    def require_writable(self) -> None:
        """Refuse changes other than moves of nodes in a session for moves, and else as `require_changeable`."""
        self.require_changeable()
        if self.rearrange:
            raise SessionStateError(
                "this session was opened to rearrange the hierarchy, and takes no other changes; commit or discard "
                "it, and open an ordinary writable session",
                ErrorKind.REARRANGE_SESSION_ONLY,
            )

    def begin_commit(self, *, allow_empty: bool) -> str:
        """Take no more changes; returns the branch to commit to."""
        if self.is_fork and self.persisted is not None:
            raise SessionStateError(
                "cannot commit a fork that has joined a session: call its checkpoint(), which hands the changes over, "
                "then collect_forks() and commit() of the session",
                ErrorKind.COMMIT_NOT_ALLOWED,
            )
        if self.is_fork:
            raise SessionStateError(
                "cannot flush a forked session, and commits are not allowed in it: merge it into the session that it "
                "was forked from, and commit or flush that",
                ErrorKind.COMMIT_NOT_ALLOWED,
            )
        with self.lock:
            if self.phase is Phase.UNSETTLED:
                self.require_changeable()
            if self.phase is not Phase.WRITABLE or self.branch is None:
                raise SessionStateError(
                    f"cannot commit a session that is {self.phase.value}; open a writable session on the branch",
                    ErrorKind.COMMIT_NOT_ALLOWED,
                )
            if self.log.is_empty and not allow_empty:
                raise SessionStateError(
                    "cannot commit: no changes made to the session (allow_empty=True commits anyway)",
                    ErrorKind.NO_CHANGES_TO_COMMIT,
                )
            self.phase = Phase.COMMITTING
            return self.branch

    def note_sent(self, token: SwapToken | None) -> None:
        """The entry with the commit is about to be sent; None: it is lost for certain.

        The repository log also calls this after the commit was cancelled; then the session takes changes again.
        """
        with self.lock:
            self.sent = token
            if token is not None:
                self.phase = Phase.SWAPPING
            elif self.phase is Phase.SWAPPING:
                self.phase = Phase.COMMITTING
            elif self.phase is Phase.UNSETTLED:
                self.phase = Phase.WRITABLE

    def end_commit(self, outcome: Snapshot | BaseException) -> None:
        """The commit has landed as a snapshot, or ended with an error."""
        with self.lock:
            if isinstance(outcome, Snapshot):
                self.log = SessionLog(outcome, self.core.sources.new_node_id)
                self.branch = None
                self.phase = Phase.READ_ONLY
            elif isinstance(outcome, Exception):
                # The log may have found out since that it is lost.
                unknown = isinstance(outcome, CommitOutcomeUnknown) and self.sent is not None
                self.phase = Phase.UNSETTLED if unknown else Phase.WRITABLE
            else:
                # The commit was cancelled: an entry that was sent may still land.
                self.phase = Phase.UNSETTLED if self.phase is Phase.SWAPPING else Phase.WRITABLE

    def begin_rebase(self) -> str:
        """Take no more changes for the time being; returns the branch to rebase onto."""
        with self.lock:
            if self.branch is None:
                raise SessionStateError(
                    f"cannot rebase {'a fork' if self.is_fork else 'a read-only session'}: it belongs to no branch; "
                    "rebase the writable session that it belongs to, or open one",
                    ErrorKind.COMMIT_NOT_ALLOWED,
                )
            self.require_changeable()
            self.phase = Phase.REBASING
            return self.branch

    def plan(self, log: SessionLog, *, everything: bool) -> Plan:
        """The plan of a commit of ``log``, this session's changes on some base; see `plan`."""
        # Planning merges the log's rows, which other threads must not see halfway.
        with self.lock:
            return plan(log, self.core.settings.policy, everything=everything)

    # -- changes as a whole ----------------------------------------------------------------------------------------

    @property
    def has_changes(self) -> bool:
        """Whether there are changes of its own."""
        with self.lock:
            return not (self.log if self.origin is None else self.log.since(self.origin)).is_empty

    def own_log(self) -> SessionLog:
        """A log of the session's own changes, to look at, not to read chunks through."""
        with self.lock:
            return self.log if self.origin is None else self.log.since(self.origin)

    def own_events(self) -> tuple[Event, ...]:
        """Under the lock: the events of its own changes."""
        events = self.log.events
        return events if self.origin is None else events[self.origin.position :]

    def give_up(self) -> None:
        """Drop all changes of its own, and take none any more."""
        with self.lock:
            if self.phase is Phase.READ_ONLY:
                return
            self.require_changeable()
            self.log = SessionLog(self.log.base, self.core.sources.new_node_id)
            self.puts.discard()
            self._discards += 1
            self.branch = self.origin = None
            self.phase = Phase.READ_ONLY

    def discard(self) -> None:
        """Drop all changes of its own."""
        with self.lock:
            self.require_changeable()
            if self.origin is None:
                self.log.discard()
            else:
                self.log.rollback(self.origin)
            self.puts.discard()
            self._discards += 1

    # -- nodes -----------------------------------------------------------------------------------------------------

    def node(self, path: str) -> NodeSnapshot | None:
        """As `Content.node`."""
        return self.log.node(path)

    def require_array(self, path: str) -> NodeSnapshot:
        """As `Content.require_array`."""
        node = self.log.node(path)
        if node is None:
            raise NodeNotFoundError(f"node not found at {path!r}; create the array before its chunks")
        require_array_node(node)
        return node

    def nodes(self, under: str) -> list[NodeSnapshot]:
        """As `Content.nodes`."""
        with self.lock:
            return list(self.log.nodes(under))

    def children(self, path: str) -> list[str]:
        """As `Content.children`."""
        with self.lock:
            return self.log.children(path, implied=True)

    def set_metadata(self, path: str, document: bytes, *, only_new: bool = False) -> bool:
        """As `Content.set_metadata`."""
        with self.lock:
            self.require_writable()
            if only_new and self.log.node(path) is not None:
                return False
            if self.core.layout is Layout.REFS:
                require_regular_grid(document, path)
            self.log.set_metadata(path, document)
            return True

    def delete_node(self, path: str) -> None:
        """As `Content.delete_node`."""
        with self.lock:
            self.require_writable()
            if self.log.node(path) is not None:
                self.log.delete_node(path)

    def clear(self) -> None:
        """As `Content.clear`."""
        with self.lock:
            self.require_writable()
            self.log.clear()

    # -- chunks ----------------------------------------------------------------------------------------------------

    @property
    def values_at_once(self) -> int:
        """As `Content.values_at_once`."""
        return self.core.settings.partial_values_at_once

    @property
    def virtual_prefixes(self) -> Prefixes:
        """As `Content.virtual_prefixes`."""
        return self.core.virtual.prefixes

    async def get_chunk(
        self, path: str, coords: tuple[int, ...], byte_range: ByteRange, *, exact: bool = False
    ) -> Octets | None:
        """As `Content.get_chunk`."""
        node, found = self._look_up(path, coords)
        if found is ABSENT or node is None:
            return None
        return await read_chunk(self.core, self.puts, node, coords, found, byte_range, exact=exact)

    @property
    def answers_nowait(self) -> bool:
        """As `Content.answers_nowait`."""
        return self.core.storage.reads_nowait

    def get_chunk_nowait(self, path: str, coords: tuple[int, ...], byte_range: ByteRange) -> Octets | Unknown | None:
        """As `Content.get_chunk_nowait`."""
        committed = self._committed
        if committed is not None and committed.path == path and committed.log is self.log:
            return committed.read_nowait(coords, byte_range)
        node, found = self._look_up(path, coords)
        if found is ABSENT or node is None:
            return None
        if found is IN_BASE and self.phase is Phase.READ_ONLY:
            self._expect(node)
        return read_chunk_nowait(self.core, self.puts, node, coords, found, byte_range)

    def _expect(self, node: NodeSnapshot) -> None:
        """Prepare for further reads of an array that the last read was of, too."""
        with self.lock:
            log = self.log
            if self.phase is not Phase.READ_ONLY or not log.is_empty:
                return
            if node.path == self._last_read and (table := self.core.assets.table_nowait(node)) is not None:
                self._committed = CommittedChunks(self.core, log, node, table)
            self._last_read = node.path

    async def chunk_reference(self, path: str, coords: tuple[int, ...]) -> ChunkRef | None:
        """As `Content.chunk_reference`."""
        node, found = self._look_up(path, coords)
        return None if found is ABSENT or node is None else await reference_of(self.core, node, coords, found)

    async def chunk_references(self, path: str) -> AsyncGenerator[ChunkRefs, None]:
        """As `Content.chunk_references`."""
        with self.lock:
            node = self.log.node(path)
            if node is None or node.kind is not NodeKind.ARRAY:
                return
            written, deleted = self.log.overlay(node)
        async for refs in all_references(self.core, node, written, deleted):
            yield refs

    def set_chunk_nowait(self, path: str, coords: tuple[int, ...], data: bytes | memoryview) -> bool:
        """As `Content.set_chunk_nowait`."""
        with self.lock:
            self.require_writable()
            return self._set_nowait(path, coords, data)

    def _set_nowait(self, path: str, coords: tuple[int, ...], data: bytes | memoryview) -> bool:
        node = self._check_chunk(path, coords, data)
        if len(data) <= self.core.settings.inline_threshold_bytes:
            self.log.set_inline(node, coords, bytes(data))
            return True
        place = self.puts.put_nowait(data)
        if place is not None:
            self.log.set_native(node, coords, *place, len(data))
        return place is not None

    async def set_chunk(
        self, path: str, coords: tuple[int, ...], data: bytes | memoryview, *, only_new: bool = False
    ) -> bool:
        """As `Content.set_chunk`: small chunks are kept in the log, others are on their way when this returns."""
        inline = len(data) <= self.core.settings.inline_threshold_bytes
        place: tuple[ObjectId, int] | None = None
        discards = 0
        vacant: object = None
        while True:
            with self.lock:
                # Again after every wait: the session may have been committed, or the array deleted.
                self.require_writable()
                node = self._check_chunk(path, coords, data)
                exists = self._exists(node, coords, vacant) if only_new else False
                if exists:
                    return False
                if exists is False:
                    if inline:
                        self.log.set_inline(node, coords, bytes(data))
                        return True
                    if place is None or discards != self._discards:
                        place = self.puts.put_nowait(data)
                    if place is not None:
                        self.log.set_native(node, coords, *place, len(data))
                        return True
                    discards = self._discards
            if exists is False:
                place = await self.puts.put(data)
            elif await self.core.assets.reference(node, coords) is not None:
                return False
            else:
                vacant = node.manifests

    async def set_chunks(self, path: str, chunks: Sequence[tuple[tuple[int, ...], bytes | memoryview]]) -> None:
        """As `set_chunk` of each of these chunks of an array, in their order."""
        done = 0
        while done < len(chunks):
            with self.lock:
                self.require_writable()
                while done < len(chunks) and self._set_nowait(path, *chunks[done]):
                    done += 1
            if done < len(chunks):
                await self.set_chunk(path, *chunks[done])
                done += 1

    def set_written(self, path: str, chunks: Sequence[WrittenChunk], since_us: int) -> None:
        """Refer to chunks of an array that were written ahead (`icechunk.session.ahead`), since that store time."""
        with self.lock:
            self.require_writable()
            node = self.require_array(path)
            self.since_us = min(self.since_us, since_us)
            if (refs := refs_of(chunks)) is not None:
                self.log.set_refs(node, refs)
                return
            for coords, written in chunks:
                if written is None:
                    self.log.delete_chunk(node, coords)
                elif isinstance(written, bytes):
                    self.log.set_inline(node, coords, written)
                else:
                    self.log.set_native(node, coords, *written)

    def set_references(self, path: str, refs: ChunkRefs) -> None:
        """As `Content.set_references`."""
        with self.lock:
            self.require_writable()
            self.log.set_refs(self.require_array(path), refs)

    def delete_chunk(self, path: str, coords: tuple[int, ...]) -> None:
        """As `Content.delete_chunk`."""
        with self.lock:
            self.require_writable()
            node = self.log.node(path)
            if node is not None and node.kind is NodeKind.ARRAY and in_grid(node, coords):
                self.log.delete_chunk(node, coords)

    def _look_up(self, path: str, coords: tuple[int, ...]) -> tuple[NodeSnapshot | None, ChunkRef | Absent | InBase]:
        with self.lock:
            # Node and reference from the same log: a commit on another thread replaces it.
            node = self.log.node(path)
            if node is None:
                return None, ABSENT
            require_array_node(node)
            return node, self.log.chunk(node, coords)

    def _exists(self, node: NodeSnapshot, coords: tuple[int, ...], vacant: object) -> bool | None:
        """Whether there is a chunk; None: the node's manifests must be asked, which are not those in ``vacant``."""
        found = self.log.chunk(node, coords)
        if found is not IN_BASE:
            return found is not ABSENT
        return False if node.manifests is vacant else None

    def _check_chunk(self, path: str, coords: tuple[int, ...], data: bytes | memoryview) -> NodeSnapshot:
        node = self.require_array(path)
        if not in_grid(node, coords):
            raise InvalidInputError(
                f"no chunk {list(coords)} in the grid of array {path!r}, which has {len(node.shape)} dimensions; "
                "resize the array, or give coordinates inside its grid",
                ErrorKind.INVALID_CHUNK_INDEX,
            )
        if not data:
            raise InvalidInputError(
                f"chunk {list(coords)} of array {path!r} has no bytes; delete it instead", ErrorKind.ZERO_LENGTH_CHUNK
            )
        return node


def absolute(path: str) -> str:
    """A path that a user gave, without a slash at its end. Raises `InvalidInputError` (kind ``invalid-path``)."""
    if not path.startswith("/"):
        raise InvalidInputError(f"path {path!r} must start with '/'", ErrorKind.INVALID_PATH)
    return path.rstrip("/") or "/"


def require_array_node(node: NodeSnapshot) -> None:
    if node.kind is not NodeKind.ARRAY:
        raise InvalidInputError(f"the node at {node.path!r} is a group, not an array", ErrorKind.NOT_AN_ARRAY)


def in_grid(node: NodeSnapshot, coords: tuple[int, ...]) -> bool:
    if len(coords) != len(node.shape):
        return False
    for coord, dimension in zip(coords, node.shape, strict=True):  # noqa: SIM110  # for every chunk: all() costs twice
        if coord >= dimension.num_chunks:
            return False
    return True
