"""Sessions: a committed snapshot, and in writable ones a log of changes on top of it.

A writable session goes through these states::

    writable ─ commit begins ─▶ committing ─ files written ─▶ swapping ─ landed ─▶ read-only, on the new snapshot
       ▲                            │                            │ │
       └──── refused or failed ─────┴────────────────────────────┘ └─ outcome unknown ─▶ unsettled

A rebase is a state of its own, between writable and writable; one that a commit does is part of the commit.

Who owns what: the session owns its log and its put pool. State changes are short critical sections under one
lock and never await, so loops and threads may share a session; what is written while a commit runs is refused,
never silently left out.
"""

from __future__ import annotations

import html
import itertools
import operator
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from icechunk.committing import Commit, How, commit
from icechunk.config import RepositoryConfig
from icechunk.conflicts import ConflictSolver
from icechunk.core import Core
from icechunk.errors import (
    CommitOutcomeUnknown,
    ConflictError,
    ErrorKind,
    InvalidInputError,
    NodeNotFoundError,
    ReadOnlyError,
    SessionStateError,
)
from icechunk.format.ids import encode_id
from icechunk.format.tables import NATIVE, VIRTUAL, ChunkRef, ChunkRefs, NodeKind, NodeSnapshot, Snapshot
from icechunk.inputs import json_metadata, require_text, require_type
from icechunk.log.columns import concat, normalized
from icechunk.log.compaction import Plan, plan
from icechunk.log.merging import merge
from icechunk.log.reindexing import Reindex, reindexed, shifted
from icechunk.log.session_log import ABSENT, IN_BASE, Savepoint, SessionLog
from icechunk.reading import base_references, read_chunk
from icechunk.rebasing import check_fork, rebase_onto_tip
from icechunk.refs.base import SwapToken
from icechunk.refs.swap import backoff_s
from icechunk.snapshots import Diff
from icechunk.status import SessionMode
from icechunk.storage.base import ByteRange
from icechunk.sync import run_sync
from icechunk.transfer.tasks import run_all
from icechunk.virtual import ChunkType
from icechunk.virtual_access.locations import Prefixes

if TYPE_CHECKING:
    from icechunk.forking import ForkSession
    from icechunk.store import IcechunkStore

__all__ = ["Session"]

_LONGEST_BACKOFF_ROUND = 4
"""Pauses between tries of a commit grow up to this one: a longer one would only let more others pass."""


class _Phase(Enum):
    READ_ONLY = "read-only"
    WRITABLE = "writable"
    COMMITTING = "committing"
    SWAPPING = "swapping"
    UNSETTLED = "unsettled"
    REBASING = "rebasing"


class Session:
    """One consistent view of a repository; writable ones collect changes until `commit`.

    Made by `Repository.readonly_session` and `Repository.writable_session`. Safe to use from several loops and
    threads. A read-only session pickles; a writable one refuses.
    """

    def __init__(
        self,
        core: Core,
        base: Snapshot,
        *,
        branch: str | None = None,
        since_us: int = 0,
        rearrange: bool = False,
    ) -> None:
        self._core = core
        self._rearrange = rearrange
        self._log = SessionLog(base, core.sources.new_node_id)
        self._branch = branch
        self._phase = _Phase.READ_ONLY if branch is None else _Phase.WRITABLE
        self._since_us = since_us
        self._sent: SwapToken | None = None
        self._puts = core.packs()
        self._discards = 0
        self._lock = threading.Lock()

    # -- what it is ----------------------------------------------------------------------------------------------

    @property
    def read_only(self) -> bool:
        """Whether it refuses writes; true for a writable session after its commit."""
        return self._phase is _Phase.READ_ONLY

    @property
    def mode(self) -> SessionMode:
        """Whether the session is for reading, for writing, or for moving nodes only."""
        if self.read_only:
            return SessionMode.readonly
        return SessionMode.rearrange if self._rearrange else SessionMode.writable

    @property
    def snapshot_id(self) -> str:
        """The snapshot that the session stands on; after a commit the new one."""
        return encode_id(self._log.base.id)

    @property
    def branch(self) -> str | None:
        """The branch that a commit goes to; None where the session is read-only."""
        return self._branch

    @property
    def unsettled_commit(self) -> SwapToken | None:
        """Token, for `Repository.settle`, of a commit whose outcome is not known; else None.

        A commit that was cancelled, or interrupted, while its swap was under way leaves one. If it turns out that the
        commit did not land, the session is writable again.
        """
        return self._sent if self._phase is _Phase.UNSETTLED else None

    @property
    def has_uncommitted_changes(self) -> bool:
        """Whether a commit would have something to say."""
        with self._lock:
            return not self._log.is_empty

    @property
    def config(self) -> RepositoryConfig:
        """The repository's configuration."""
        return self._core.config

    @property
    def store(self) -> IcechunkStore:
        """The Zarr store of this session: hand it to zarr or xarray."""
        from icechunk.store import IcechunkStore

        return IcechunkStore(self)

    def status(self) -> Diff:
        """What a commit would change."""
        with self._lock:
            return Diff.of(self._log.changes())

    # -- ending it -----------------------------------------------------------------------------------------------

    def discard_changes(self) -> None:
        """Forget all changes since the session began, or since its last commit.

        Raises
        ------
        ReadOnlyError
            The session is read-only.
        """
        with self._lock:
            self._require_changeable()
            self._log.discard()
            self._puts.discard()
            self._discards += 1

    def savepoint(self) -> Savepoint:
        """Remember the changes as they are now, to return to with `rollback`.

        Raises
        ------
        ReadOnlyError
            The session is read-only.
        """
        with self._lock:
            self._require_changeable()
            return self._log.savepoint()

    def rollback(self, savepoint: Savepoint) -> None:
        """Undo every change since a savepoint, which stays valid; later savepoints do not.

        Raises
        ------
        SessionStateError
            The savepoint is not of this session, or was rolled back itself.
        ReadOnlyError
            The session is read-only.
        """
        with self._lock:
            self._require_changeable()
            self._log.rollback(savepoint)

    async def commit_async(
        self,
        message: str,
        metadata: Mapping[str, Any] | None = None,
        *,
        rebase_with: ConflictSolver | None = None,
        rebase_tries: int = 1000,
        allow_empty: bool = False,
    ) -> str:
        """Make the changes a new snapshot of the branch, atomically.

        Waits for every chunk that is still on its way. Afterwards the session is read-only and stands on the new
        snapshot. After a failure (but `CommitOutcomeUnknown`) nothing is visible and the session is as before; after
        a cancellation that is so unless `unsettled_commit` is set.

        Parameters
        ----------
        message
            For people, kept in the history.
        metadata
            JSON values kept with the snapshot, over the repository's default commit metadata.
        rebase_with
            Where the branch moved since the session began: rebase with this solver and commit again. Chunks are not
            uploaded again, nor are manifests that come out the same.
        rebase_tries
            So many times at the most.
        allow_empty
            Commit even if nothing changed.

        Returns
        -------
        str
            The new snapshot's id.

        Raises
        ------
        ConflictError
            The branch moved since the session began, and no rebase was asked for, or no try is left. Rebase, or open
            a new session on it and repeat the work.
        RebaseFailedError
            The solver does not settle all conflicts, as in `rebase`.
        SessionStateError
            Nothing changed (kind ``no-changes-to-commit``), or the session is read-only or unsettled
            (kind ``commit-not-allowed``).
        InvalidInputError
            The message is not text, or the metadata not JSON.
        StorageError
            Something could not be written; committing again tries again.
        CommitOutcomeUnknown
            No certain answer came before a cancellation or close; `Repository.settle` tells.
        """
        require_type("rebase_with", rebase_with, ConflictSolver, optional=True)
        if rebase_tries < 0:
            raise InvalidInputError(f"rebase_tries is a number of tries, it cannot be {rebase_tries}")
        return await self._write_snapshot(How.COMMIT, message, metadata, allow_empty, rebase_with, rebase_tries)

    def commit(
        self,
        message: str,
        metadata: Mapping[str, Any] | None = None,
        *,
        rebase_with: ConflictSolver | None = None,
        rebase_tries: int = 1000,
        allow_empty: bool = False,
    ) -> str:
        """Synchronous twin of `commit_async`."""
        return run_sync(
            self.commit_async(
                message, metadata, rebase_with=rebase_with, rebase_tries=rebase_tries, allow_empty=allow_empty
            )
        )

    async def amend_async(
        self, message: str, *, metadata: Mapping[str, Any] | None = None, allow_empty: bool = False
    ) -> str:
        """Replace the branch's tip, on which the session stands, by a snapshot that has the session's changes as well.

        Its parent is the tip's. What the tip changed counts as changed by the new snapshot. The old one stays readable
        by its id until a collection. Parameters, errors and what holds after them are those of `commit_async`.

        Raises
        ------
        SessionStateError
            Kind ``no-amend-for-initial-commit``: the branch is at the repository's first snapshot.
        ConflictError
            The branch moved since the session began.
        """
        return await self._write_snapshot(How.AMEND, message, metadata, allow_empty)

    def amend(self, message: str, *, metadata: Mapping[str, Any] | None = None, allow_empty: bool = False) -> str:
        """Synchronous twin of `amend_async`."""
        return run_sync(self.amend_async(message, metadata=metadata, allow_empty=allow_empty))

    async def flush_async(self, message: str, *, metadata: Mapping[str, Any] | None = None) -> str:
        """Make the changes, if there are any, a snapshot that no branch points to.

        It can be read by its id, tagged, and branched from, until a collection removes it. The session is read-only
        then and stands on it. Parameters and errors are those of `commit_async`, but that the branch may have moved.
        """
        return await self._write_snapshot(How.FLUSH, message, metadata, allow_empty=True)

    def flush(self, message: str, *, metadata: Mapping[str, Any] | None = None) -> str:
        """Synchronous twin of `flush_async`."""
        return run_sync(self.flush_async(message, metadata=metadata))

    async def _write_snapshot(
        self,
        how: How,
        message: str,
        metadata: Mapping[str, Any] | None,
        allow_empty: bool,
        solver: ConflictSolver | None = None,
        tries: int = 0,
    ) -> str:
        require_text("message", message)
        described = self._core.default_metadata | json_metadata("metadata", metadata)
        branch = self._begin_commit(allow_empty)
        wanted = Commit(
            how=how,
            branch=branch,
            message=message,
            metadata=described,
            since_us=self._since_us,
            on_sent=self._note_sent,
        )
        try:
            snapshot = await self._commit(wanted, solver, tries)
        except Exception as error:
            self._phase = _Phase.UNSETTLED if isinstance(error, CommitOutcomeUnknown) else _Phase.WRITABLE
            raise
        except BaseException:
            # Cancelled: an entry that was sent goes on without us, and may land.
            self._phase = _Phase.UNSETTLED if self._phase is _Phase.SWAPPING else _Phase.WRITABLE
            raise
        with self._lock:
            self._log = SessionLog(snapshot, self._core.sources.new_node_id)
            self._branch = None
            self._phase = _Phase.READ_ONLY
        return self.snapshot_id

    async def rebase_async(self, solver: ConflictSolver) -> None:
        """Put the session's changes on top of what was committed to its branch since.

        Nothing is uploaded. The commits in between are gone through oldest first; where one conflicts in a way that
        the solver does not settle, the session stands on the commit before it, and can be mended and rebased again.
        Savepoints made before are not valid after it.

        Parameters
        ----------
        solver
            `ConflictDetector` settles nothing, `BasicConflictSolver` what its choices cover.

        Raises
        ------
        RebaseFailedError
            There are conflicts left; its ``conflicts`` say where.
        ConflictError
            The branch was reset to a snapshot that does not come after the session's.
        RefNotFoundError
            The branch is gone.
        SessionStateError
            The session is read-only or a fork (kind ``commit-not-allowed``), a commit of it is running, or a
            transaction log is gone (``rebase-tx-log-pruned``).
        """
        require_type("solver", solver, ConflictSolver)
        with self._lock:
            if self._branch is None:
                raise SessionStateError(
                    f"cannot rebase {self._kind}: it goes to no branch; rebase the writable session that it belongs "
                    "to, or open one",
                    ErrorKind.COMMIT_NOT_ALLOWED,
                )
            self._require_changeable()
            branch, self._phase = self._branch, _Phase.REBASING
        try:
            await self._rebase(branch, solver)
        finally:
            self._phase = _Phase.WRITABLE

    def rebase(self, solver: ConflictSolver) -> None:
        """Synchronous twin of `rebase_async`."""
        run_sync(self.rebase_async(solver))

    async def _commit(self, wanted: Commit, solver: ConflictSolver | None, tries: int) -> Snapshot:
        for tried in itertools.count():
            try:
                return await commit(self._core, self._log.base, self._plan, self._puts, wanted)
            except ConflictError:
                if solver is None or tried == tries:
                    raise
            self._phase = _Phase.COMMITTING
            if tried:
                # Two that lose to each other in turn would otherwise go on in step.
                await self._core.sources.sleep(backoff_s(self._core.sources, min(tried, _LONGEST_BACKOFF_ROUND)))
            await self._rebase(wanted.branch, solver)
        raise AssertionError

    async def _rebase(self, branch: str, solver: ConflictSolver) -> None:
        def keep(log: SessionLog) -> None:
            with self._lock:
                self._log = log

        await rebase_onto_tip(self._core, self._log, branch, solver, guard=self._lock, keep=keep)

    @property
    def _kind(self) -> str:
        return "a read-only session"

    # -- many writers of one session -----------------------------------------------------------------------------

    def fork(self) -> ForkSession:
        """A session that writes on this one's behalf, and can be sent to other processes.

        It stands where this one stands, uncommitted changes included. Waits for the chunks that are on their way.

        Raises
        ------
        SessionStateError
            The session is read-only (kind ``cannot-fork-read-only-session``: send it as it is), or being committed.
        StorageError
            A chunk could not be written.
        """
        from icechunk.forking import ForkSession

        with self._lock:
            if self.read_only:
                raise SessionStateError(
                    "cannot fork a read-only session: it pickles as it is", ErrorKind.CANNOT_FORK_READ_ONLY_SESSION
                )
            self._require_changeable()
        self._land_chunks()
        with self._lock:
            log = self._log.rebased(self._log.base)
        return ForkSession(self._core, log, len(log.events), since_us=self._since_us, rearrange=self._rearrange)

    async def merge_async(self, *others: Session) -> None:
        """Take over what forks changed.

        Where two wrote the same chunk, the one that is merged later wins. The forks stay as they are; merging one
        again does no harm. After an error nothing is merged, of none of them.

        Parameters
        ----------
        others
            Forks of this session, or of one of its forks.

        Raises
        ------
        SessionStateError
            Kind ``merge-failed``: two created different nodes at one path, or gave one node two documents, or one
            deleted what the other changed; or a fork stands on a snapshot that is not in this session's history.
        RebaseFailedError
            This session was rebased since, and a fork conflicts with what landed meanwhile.
        ReadOnlyError
            The session is read-only.
        StorageError
            A fork's chunk could not be written.
        """
        for other in others:
            require_type("others", other, Session)
        with self._lock:
            self._require_changeable()
        forks = [other for other in others if other is not self]
        await run_all(*(fork._puts.flush for fork in forks))
        parts = [fork._own_changes() for fork in forks]
        for log, origin in parts:
            if log.base.id != self._log.base.id:
                with self._lock:
                    now = self._log.base.with_nodes({node.path: node for node in self._log.nodes()})
                await check_fork(self._core, log, origin, now)
        with self._lock:
            self._require_changeable()
            before = self._log.savepoint()
            try:
                for log, origin in parts:
                    merge(self._log, log, origin)
            except BaseException:
                self._log.rollback(before)
                raise
            self._since_us = min([self._since_us, *(fork._since_us for fork in forks)])

    def merge(self, *others: Session) -> None:
        """Synchronous twin of `merge_async`."""
        run_sync(self.merge_async(*others))

    def _own_changes(self) -> tuple[SessionLog, Savepoint]:
        """A copy of the log, which others may merge without this session's lock, and where its own changes begin."""
        with self._lock:
            log = self._log.rebased(self._log.base)
            return log, log.savepoint_at(self._own_position())

    def _own_position(self) -> int:
        return 0

    def _land_chunks(self) -> None:
        if not self._puts.is_idle:
            run_sync(self._puts.flush())

    def _begin_writing(self) -> None:
        self._phase = _Phase.WRITABLE

    def _refuse_commit(self) -> None:
        """Raise where this is not a session that commits."""

    def _begin_commit(self, allow_empty: bool) -> str:
        self._refuse_commit()
        with self._lock:
            if self._phase is not _Phase.WRITABLE or self._branch is None:
                raise SessionStateError(
                    f"cannot commit a session that is {self._phase.value}; open a writable session on the branch",
                    ErrorKind.COMMIT_NOT_ALLOWED,
                )
            if self._log.is_empty and not allow_empty:
                raise SessionStateError(
                    "cannot commit: nothing changed in this session (allow_empty=True commits anyway)",
                    ErrorKind.NO_CHANGES_TO_COMMIT,
                )
            self._phase = _Phase.COMMITTING
            return self._branch

    def _plan(self) -> Plan:
        # Planning merges the log's rows, which other threads must not see halfway.
        with self._lock:
            return plan(self._log, self._core.settings.policy)

    def _note_sent(self, token: SwapToken | None) -> None:
        # None: the entry is lost for certain. The log tells also those who are gone, who then may go on writing.
        with self._lock:
            self._sent = token
            if token is not None:
                self._phase = _Phase.SWAPPING
            elif self._phase is _Phase.SWAPPING:
                self._phase = _Phase.COMMITTING
            elif self._phase is _Phase.UNSETTLED:
                self._phase = _Phase.WRITABLE

    def _require_writable(self) -> None:
        self._require_changeable()
        if self._rearrange:
            raise SessionStateError(
                "this session was opened to rearrange the hierarchy, and takes no other changes; commit it or leave "
                "it, and open an ordinary writable session",
                ErrorKind.REARRANGE_SESSION_ONLY,
            )

    def _require_changeable(self) -> None:
        match self._phase:
            case _Phase.READ_ONLY:
                raise ReadOnlyError("this session is read-only; open a writable session on a branch to change anything")
            case _Phase.COMMITTING | _Phase.SWAPPING:
                raise SessionStateError("a commit of this session is running; wait for it before writing")
            case _Phase.REBASING:
                raise SessionStateError("a rebase of this session is running; wait for it before writing")
            case _Phase.UNSETTLED:
                raise SessionStateError(
                    "the outcome of this session's commit is not known: Repository.settle(session.unsettled_commit) "
                    "finds out; then open a new session"
                )

    # -- nodes and chunks: what the store is made of ------------------------------------------------------------

    def require_array(self, path: str) -> NodeSnapshot:
        """The array at a path, as this session sees it. Raises `NodeNotFoundError` or `InvalidInputError`."""
        node = self._log.node(path)
        if node is None:
            raise NodeNotFoundError(f"node not found at {path!r}; create the array before its chunks")
        _require_array(node)
        return node

    @property
    def hierarchy(self) -> SessionLog:
        """The fold of this session's changes over its snapshot; change nothing through it, and nobody may meanwhile."""
        return self._log

    def node(self, path: str) -> NodeSnapshot | None:
        """The group or array at a path; None where there is none."""
        return self._log.node(path)

    def nodes(self, under: str) -> list[NodeSnapshot]:
        """The node at a path and everything below it, ascending; as of one moment, whoever else is writing."""
        with self._lock:
            return list(self._log.nodes(under))

    def children(self, path: str) -> list[str]:
        """Names directly below a path, ascending: of nodes, and of what only has nodes below it; as of one moment."""
        with self._lock:
            return self._log.children(path, implied=True)

    def set_metadata(self, path: str, document: bytes) -> None:
        """Create a node, or replace its zarr.json."""
        with self._lock:
            self._require_writable()
            self._log.set_metadata(path, document)

    def delete_node(self, path: str) -> None:
        """Delete a node with all below it; a node that does not exist is fine."""
        with self._lock:
            self._require_writable()
            if self._log.node(path) is not None:
                self._log.delete_node(path)

    async def move_async(self, from_path: str, to_path: str) -> None:
        """Move a node, with everything below it, to another path; no data moves.

        Parameters
        ----------
        from_path, to_path
            Absolute. There is nothing at the second yet, and it is not below the first; its parent is a group.

        Raises
        ------
        SessionStateError
            The session was not made by `Repository.rearrange_session` (kind ``non-rearrange-session``); or the
            second path is below the first (``move-into-self-or-descendant``), or has no parent that is a group
            (``move-destination-parent-missing``, ``move-destination-parent-not-group``).
        NodeNotFoundError
            There is nothing at the first path.
        AlreadyExistsError
            There is something at the second (kind ``move-wont-overwrite``).
        ReadOnlyError
            The session is read-only.
        """
        self.move(from_path, to_path)

    def move(self, from_path: str, to_path: str) -> None:
        """Synchronous twin of `move_async`."""
        with self._lock:
            self._require_changeable()
            if not self._rearrange:
                raise SessionStateError(
                    f"cannot move {from_path}: nodes are moved in sessions of their own; open one with "
                    "Repository.rearrange_session",
                    ErrorKind.NON_REARRANGE_SESSION,
                )
            self._log.move_node(_absolute(from_path), _absolute(to_path))

    async def shift_array_async(self, array_path: str, chunk_offset: Iterable[int]) -> None:
        """Move every chunk of an array by an offset; chunks that leave the grid are gone, and no data moves.

        Parameters
        ----------
        array_path
            Absolute.
        chunk_offset
            In chunks, for each dimension one number of either sign.

        Raises
        ------
        InvalidInputError
            Another number of dimensions (kind ``invalid-chunk-index``), or not an array (``not-an-array``).
        NodeNotFoundError
            There is nothing at this path.
        ReadOnlyError
            The session is read-only.
        """
        offset = tuple(operator.index(n) for n in chunk_offset)
        node, refs = await self._all_references(array_path)
        grid = [dimension.num_chunks for dimension in node.shape]
        if len(offset) != len(grid):
            raise InvalidInputError(
                f"cannot shift array {node.path!r} by {list(offset)}: it has {len(grid)} dimensions",
                ErrorKind.INVALID_CHUNK_INDEX,
            )
        if any(offset):
            self._replace_chunks(node, *shifted(refs, grid, offset))

    def shift_array(self, array_path: str, chunk_offset: Iterable[int]) -> None:
        """Synchronous twin of `shift_array_async`."""
        run_sync(self.shift_array_async(array_path, chunk_offset))

    async def reindex_array_async(self, array_path: str, forward: Reindex, backward: Reindex | None = None) -> None:
        """Move the chunks of an array to the places that a function says; no data moves.

        Parameters
        ----------
        array_path
            Absolute.
        forward
            Given the coordinates of a chunk, those that it moves to; None: nowhere.
        backward
            Given the coordinates of a chunk, those from which its place is filled: where there is nothing to fill it
            with, and nothing moves there, the chunk is deleted. Without it, it stays there too.

        Raises
        ------
        InvalidInputError
            ``forward`` gave coordinates outside the grid (kind ``invalid-chunk-index``), or not an array
            (``not-an-array``). Nothing has moved then, nor if one of the functions raises.
        NodeNotFoundError
            There is nothing at this path.
        ReadOnlyError
            The session is read-only.
        """
        node, refs = await self._all_references(array_path)
        grid = [dimension.num_chunks for dimension in node.shape]
        self._replace_chunks(node, *reindexed(refs, grid, forward, backward))

    def reindex_array(self, array_path: str, forward: Reindex, backward: Reindex | None = None) -> None:
        """Synchronous twin of `reindex_array_async`."""
        run_sync(self.reindex_array_async(array_path, forward, backward))

    async def _all_references(self, array_path: str) -> tuple[NodeSnapshot, ChunkRefs]:
        with self._lock:
            self._require_writable()
        node = self.require_array(_absolute(array_path))
        parts = [ChunkRefs.empty(len(node.shape))]
        async with aclosing(self.chunk_references(node.path)) as batches:
            async for refs in batches:
                parts.append(refs)
        return node, normalized(concat(parts))

    def _replace_chunks(self, node: NodeSnapshot, refs: ChunkRefs, vacated: npt.NDArray[np.uint32]) -> None:
        with self._lock:
            self._require_writable()
            before = self._log.savepoint()
            try:
                self._log.set_refs(node, refs)
                self._log.delete_chunks(node, vacated)
            except BaseException:
                self._log.rollback(before)
                raise

    def delete_chunk(self, path: str, coords: tuple[int, ...]) -> None:
        """Delete a chunk; one that does not exist, or lies outside the grid, is fine."""
        with self._lock:
            self._require_writable()
            node = self._log.node(path)
            if node is not None and node.kind is NodeKind.ARRAY and _in_grid(node, coords):
                self._log.delete_chunk(node, coords)

    def clear(self) -> None:
        """Delete every node."""
        with self._lock:
            self._require_writable()
            self._log.clear()

    async def set_chunk(self, path: str, coords: tuple[int, ...], data: bytes) -> None:
        """Write a chunk: small ones stand in the log, others are on their way when this returns.

        Raises
        ------
        InvalidInputError
            No such place in the array's grid (``invalid-chunk-index``), not an array (``not-an-array``), or no
            bytes (``zero-length-chunk``).
        NodeNotFoundError
            No array at this path.
        StorageError
            An earlier chunk could not be written; see `PutPool.put`.
        """
        if len(data) <= self._core.settings.inline_threshold_bytes:
            with self._lock:
                self._require_writable()
                node = self._check_chunk(path, coords, data)
                self._log.set_inline(node, coords, data)
            return
        while True:
            with self._lock:
                self._require_writable()
                self._check_chunk(path, coords, data)
                discards = self._discards
            chunk_id, offset = await self._puts.put(data)
            with self._lock:
                # While the pool was full the session may have been committed, or the array deleted.
                self._require_writable()
                node = self._check_chunk(path, coords, data)
                if self._discards == discards:
                    self._log.set_native(node, coords, chunk_id, offset, len(data))
                    return
            # Another thread discarded the bytes with everything else: this write comes after that, so they go again.

    def set_references(self, path: str, refs: ChunkRefs) -> None:
        """Write many references of an array at once; the columns belong to the session now.

        Raises `InvalidInputError` where one is outside the grid, or `NodeNotFoundError`: nothing is written then.
        """
        with self._lock:
            self._require_writable()
            self._log.set_refs(self.require_array(path), refs)

    @property
    def virtual_prefixes(self) -> Prefixes:
        """The virtual chunk containers, by what their locations begin with."""
        return self._core.virtual.prefixes

    def _check_chunk(self, path: str, coords: tuple[int, ...], data: bytes) -> NodeSnapshot:
        node = self.require_array(path)
        if not _in_grid(node, coords):
            raise InvalidInputError(
                f"no chunk {list(coords)} in the grid of array {path!r}; resize the array before writing there",
                ErrorKind.INVALID_CHUNK_INDEX,
            )
        if not data:
            raise InvalidInputError(
                f"chunk {list(coords)} of array {path!r} has no bytes; delete it instead", ErrorKind.ZERO_LENGTH_CHUNK
            )
        return node

    async def get_chunk(self, path: str, coords: tuple[int, ...], byte_range: ByteRange) -> bytes | None:
        """Bytes of a chunk, or a clamped range of them; None where it was never written, or there is no array.

        Raises `InvalidInputError` where the node is a group.
        """
        ref = await self.chunk_reference(path, coords)
        if ref is None:
            return None
        return await read_chunk(self._core, self._puts, ref, byte_range)

    async def chunk_reference(self, path: str, coords: tuple[int, ...]) -> ChunkRef | None:
        """The reference of a chunk; None and errors as in `get_chunk`."""
        with self._lock:
            # Node and reference from the same log: a commit on another thread replaces it.
            node = self._log.node(path)
            if node is None:
                return None
            _require_array(node)
            found = self._log.chunk(node, coords)
        if found is IN_BASE:
            return await self._core.assets.reference(node, coords)
        return None if found is ABSENT else found

    async def chunk_references(self, path: str) -> AsyncGenerator[ChunkRefs, None]:
        """All references of an array: batches in no particular order, none twice; none where it is no array."""
        with self._lock:
            node = self._log.node(path)
            if node is None or node.kind is not NodeKind.ARRAY:
                return
            written, deleted = self._log.overlay(node)
        if len(written):
            yield written
        async for refs in base_references(self._core, node, np.concatenate([written.coords, deleted])):
            yield refs

    # -- inspection ----------------------------------------------------------------------------------------------

    async def get_node_id_async(self, path: str) -> str:
        """The id of the node at an absolute path, which it keeps for life. Raises `NodeNotFoundError`."""
        node = self._log.node(_absolute(path))
        if node is None:
            raise NodeNotFoundError(f"node not found at {path!r}")
        return encode_id(node.id)

    def get_node_id(self, path: str) -> str:
        """Synchronous twin of `get_node_id_async`."""
        return run_sync(self.get_node_id_async(path))

    async def all_virtual_chunk_locations_async(self) -> list[str]:
        """The location of every virtual chunk in this session's view, one for each: those of one object repeat.

        Locations relative to a container are resolved. Raises `InvalidInputError` where that container is not
        configured (kind ``no-container-for-virtual-chunk``).
        """
        found: list[str] = []
        for node in list(self._log.nodes()):
            async with aclosing(self.chunk_references(node.path)) as batches:
                async for refs in batches:
                    # What of the table is not used need not resolve.
                    rows = refs.location[refs.kind == VIRTUAL]
                    urls = {row: self.virtual_prefixes.absolute(refs.locations[row]) for row in set(rows.tolist())}
                    found += [urls[row] for row in rows.tolist()]
        return found

    def all_virtual_chunk_locations(self) -> list[str]:
        """Synchronous twin of `all_virtual_chunk_locations_async`."""
        return run_sync(self.all_virtual_chunk_locations_async())

    async def chunk_coordinates(self, array_path: str, batch_size: int = 1000) -> AsyncIterator[tuple[int, ...]]:
        """Coordinates of every chunk of an array that exists, in no particular order."""
        path = self.require_array(_absolute(array_path)).path
        async with aclosing(self.chunk_references(path)) as batches:
            async for refs in batches:
                for row in refs.coords.tolist():
                    yield tuple(row)

    async def chunk_type_async(self, array_path: str, chunk_coordinates: Sequence[int]) -> ChunkType:
        """How a chunk is kept: inline, native, virtual, or not at all (``uninitialized``)."""
        path = self.require_array(_absolute(array_path)).path
        ref = await self.chunk_reference(path, tuple(chunk_coordinates))
        if ref is None:
            return ChunkType.uninitialized
        return {NATIVE: ChunkType.native, VIRTUAL: ChunkType.virtual}.get(ref.kind, ChunkType.inline)

    def chunk_type(self, array_path: str, chunk_coordinates: Sequence[int]) -> ChunkType:
        """Synchronous twin of `chunk_type_async`."""
        return run_sync(self.chunk_type_async(array_path, chunk_coordinates))

    # -- Python's protocols --------------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Session):
            return NotImplemented
        if self is other:
            return True
        both_read_only = self.read_only and other.read_only
        return both_read_only and self._log.base.id == other._log.base.id and self._core.storage == other._core.storage

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        if not self.read_only:
            raise ValueError(
                "a writable session cannot be pickled: two processes would write one history without knowing of "
                "each other. Use Session.fork() to hand work to other processes, and merge what comes back"
            )
        return {"core": self._core, "base": self._log.base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Session.__init__(self, state["core"], state["base"])

    def _summary(self) -> list[tuple[str, object]]:
        return [
            ("read_only", self.read_only),
            ("snapshot_id", self.snapshot_id),
            *([] if self._branch is None else [("branch", self._branch)]),
            ("has_uncommitted_changes", self.has_uncommitted_changes),
        ]

    def __repr__(self) -> str:
        return "\n".join(["<icechunk.Session>", *(f"{name}: {value}" for name, value in self._summary())])

    __str__ = __repr__

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
            for name, value in self._summary()
        )
        return f"<table><caption>icechunk.Session</caption>{rows}</table>"


def _require_array(node: NodeSnapshot) -> None:
    if node.kind is not NodeKind.ARRAY:
        raise InvalidInputError(f"the node at {node.path!r} is a group, not an array", ErrorKind.NOT_AN_ARRAY)


def _in_grid(node: NodeSnapshot, coords: tuple[int, ...]) -> bool:
    if len(coords) != len(node.shape):
        return False
    for coord, dimension in zip(coords, node.shape, strict=True):  # noqa: SIM110  # for every chunk: all() costs twice
        if coord >= dimension.num_chunks:
            return False
    return True


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise InvalidInputError(f"path {path!r} must start with '/'", ErrorKind.INVALID_PATH)
    return path.rstrip("/") or "/"
