"""The public classes of sessions and forks.

Forks are sessions that write on behalf of another one, in this process or in others. A fork begins with the base and
all changes of its parent so far, and takes writes of its own. It commits nothing: the parent merges it, then
commits. The pickle of a fork holds its log, the id of its base (with the snapshot itself, if that is small) and the
location of the repository; never the repository's state. Its chunks are durable before it is pickled.

Worked example::

    session = repo.writable_session("main")
    forks = list(pool.map(write_part, [session.fork() for _ in parts], parts))
    session.merge(*forks)
    session.commit("written by many")
"""

from __future__ import annotations

import operator
import pickle
import threading
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self, get_args
from weakref import WeakKeyDictionary, WeakValueDictionary

from icechunk.config import RepositoryConfig
from icechunk.conflicts import ConflictSolver
from icechunk.errors import ErrorKind, InvalidInputError, NodeNotFoundError, SessionStateError
from icechunk.format.ids import ObjectId, encode_id
from icechunk.format.snapshot.codec import decode_snapshot, encode_snapshot
from icechunk.format.values import NATIVE, VIRTUAL, Snapshot
from icechunk.log.repository.port import SwapToken
from icechunk.log.session.events import Event
from icechunk.log.session.log import Savepoint, SessionLog
from icechunk.log.session.merge.merging import MergePolicy
from icechunk.log.session.reindexing import Reindex
from icechunk.log.session.wire import decode_log, encode_log, size_of
from icechunk.ops import SessionMode
from icechunk.runtime.checks import require_type
from icechunk.runtime.pickles import instance_of_state
from icechunk.runtime.representation import fields_html
from icechunk.runtime.twins import run_sync, synchronous
from icechunk.session import rearrange
from icechunk.session.commit import How, write_snapshot, write_unlisted
from icechunk.session.content import Lineage, Phase, SessionContent, absolute
from icechunk.session.core import Core
from icechunk.session.merge import changes_of, merge_forks
from icechunk.session.rebase import DEFAULT_REBASE_TRIES, rebase_session
from icechunk.session.resume import collect_forks, join, joined_fork
from icechunk.session.session_checkpoint import abandon, checkpoint, lease_in_us
from icechunk.snapshots import Diff
from icechunk.virtual import ChunkType

if TYPE_CHECKING:
    from icechunk.store.store import IcechunkStore

__all__ = ["ForkSession", "Session"]


class Session:
    """One consistent view of a repository; writable ones collect changes until `commit`.

    Made by `Repository.readonly_session` and `Repository.writable_session`. Safe to use from several event loops and
    threads. A read-only session pickles; a writable one refuses.
    """

    _content: SessionContent

    def __init__(self, content: SessionContent) -> None:
        self._content = content

    # -- properties ------------------------------------------------------------------------------------------------

    @property
    def read_only(self) -> bool:
        """Whether it refuses writes; true for a writable session after its commit."""
        return self._content.read_only

    @property
    def mode(self) -> SessionMode:
        """Whether the session is for reading, for writing, or for moving nodes only."""
        if self.read_only:
            return SessionMode.readonly
        return SessionMode.rearrange if self._content.rearrange else SessionMode.writable

    @property
    def snapshot_id(self) -> str:
        """Id of the snapshot that the session is based on; after a commit the new one."""
        return encode_id(self._content.log.base.id)

    @property
    def branch(self) -> str | None:
        """The branch that a commit goes to; None where the session is read-only."""
        return self._content.branch

    @property
    def store(self) -> IcechunkStore[Self]:
        """The Zarr store of this session: hand it to zarr or xarray."""
        # Here, so that opening a repository does not load zarr.
        from icechunk.store.store import IcechunkStore

        return IcechunkStore._opened(self)

    @property
    def config(self) -> RepositoryConfig:
        """The repository's configuration."""
        return self._content.core.config

    @property
    def unsettled_commit(self) -> SwapToken | None:
        """Token, for `Repository.settle`, of a commit whose outcome is not known; else None.

        A commit that was cancelled, or interrupted, while its swap was under way leaves one. If it turns out that the
        commit did not land, the session is writable again.
        """
        return self._content.sent if self._content.phase is Phase.UNSETTLED else None

    @property
    def has_uncommitted_changes(self) -> bool:
        """Whether a commit would change anything; of a fork, whether merging it would."""
        return self._content.has_changes

    def status(self) -> Diff:
        """The changes that a commit would make; of a fork, its changes since it was forked."""
        log = self._content.own_log()
        with self._content.lock:
            return Diff.of(log.changes())

    # -- changes as a whole ----------------------------------------------------------------------------------------

    def discard_changes(self) -> None:
        """Drop all changes since the session began; those of a fork since it was forked.

        Raises
        ------
        ReadOnlyError
            The session is read-only.
        """
        self._content.discard()

    def savepoint(self) -> Savepoint:
        """Remember the changes as they are now, to return to with `rollback`.

        Raises
        ------
        ReadOnlyError
            The session is read-only.
        """
        with self._content.lock:
            self._content.require_changeable()
            return self._content.log.savepoint()

    def rollback(self, savepoint: Savepoint) -> None:
        """Undo every change since a savepoint, which stays valid; later savepoints do not.

        Raises
        ------
        SessionStateError
            The savepoint is not of this session, or was rolled back itself.
        ReadOnlyError
            The session is read-only.
        """
        with self._content.lock:
            self._content.require_changeable()
            self._content.log.rollback(savepoint)

    async def commit_async(
        self,
        message: str,
        metadata: Mapping[str, Any] | None = None,
        *,
        rebase_with: ConflictSolver | None = None,
        rebase_tries: int = DEFAULT_REBASE_TRIES,
        allow_empty: bool = False,
    ) -> str:
        """Make the changes a new snapshot of the branch, atomically.

        Waits for every chunk that is still on its way. Afterwards the session is read-only and based on the new
        snapshot. After a failure (but `CommitOutcomeUnknown`) nothing is visible and the session is as before; after
        a cancellation that is so unless `unsettled_commit` is set, or the session is read-only: then it has landed.

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
            An object could not be written; the commit may be repeated.
        CommitOutcomeUnknown
            No certain answer came before a cancellation or close; `Repository.settle` finds out the outcome.
        """
        require_type("rebase_with", rebase_with, ConflictSolver, optional=True)
        if rebase_tries < 0:
            raise InvalidInputError(
                f"rebase_tries is a number of tries, it cannot be {rebase_tries}", ErrorKind.INVALID_SETTING
            )
        return await write_snapshot(
            self._content,
            How.COMMIT,
            message,
            metadata,
            allow_empty=allow_empty,
            solver=rebase_with,
            tries=rebase_tries,
        )

    commit: Final = synchronous(commit_async)

    async def amend_async(
        self, message: str, *, metadata: Mapping[str, Any] | None = None, allow_empty: bool = False
    ) -> str:
        """Replace the branch's tip, the session's base, by a snapshot that has the session's changes as well.

        Its parent is the tip's. Changes of the tip count as changes of the new snapshot. The old one stays readable
        by its id until a collection. Parameters, errors and the state after them are those of `commit_async`.

        Raises
        ------
        SessionStateError
            Kind ``no-amend-for-initial-commit``: the branch is at the repository's first snapshot.
        FormatError
            Kind ``unsupported-spec-version``: the repository is of format 1, which has no amendments.
        ConflictError
            The branch moved since the session began.
        """
        return await write_snapshot(self._content, How.AMEND, message, metadata, allow_empty=allow_empty)

    amend: Final = synchronous(amend_async)

    async def flush_async(self, message: str, *, metadata: Mapping[str, Any] | None = None) -> str:
        """Make the changes, if there are any, a snapshot that no branch points to.

        It can be read by its id, tagged, and branched from, until a collection removes it. The session is read-only
        then and based on it. Parameters and errors are those of `commit_async`, except that the branch may have moved.
        """
        return await write_snapshot(self._content, How.FLUSH, message, metadata, allow_empty=True)

    flush: Final = synchronous(flush_async)

    async def rebase_async(self, solver: ConflictSolver) -> None:
        """Put the session's changes on top of the commits to its branch since.

        Nothing is uploaded. The commits in between are gone through oldest first; where one conflicts in a way that
        the solver does not settle, the session is based on the commit before it, and can be changed and rebased again.
        Savepoints made before are not valid after it.

        Parameters
        ----------
        solver
            `ConflictDetector` settles no conflict, `BasicConflictSolver` those that its choices cover.

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
        await rebase_session(self._content, solver)

    rebase: Final = synchronous(rebase_async)

    # -- surviving the process -------------------------------------------------------------------------------------

    @property
    def id(self) -> str | None:
        """The id under which the session is persisted, for `Repository.resume_session` and `Repository.join_session`;
        None before its first `checkpoint`."""
        persisted = self._content.persisted
        return None if persisted is None else encode_id(persisted.session)

    async def checkpoint_async(self, *, lease: timedelta | None = None) -> str:
        """Persist the changes so far, so that another process can go on with them by the session's id.

        Waits for the chunks that are on their way, then writes the changes since the last checkpoint as one object
        below ``sessions/``. Nothing becomes visible to readers. Calls may run while others write: chunks that are
        written meanwhile are part of the next one. A commit of a persisted session removes these objects.

        A fork that has joined a session (`Repository.join_session`) hands over its changes this way; the session takes
        them with `collect_forks`.

        Parameters
        ----------
        lease
            For so long from now, by the store's clock, collections keep the session and its chunks. Every checkpoint
            renews it, also one of a fork that has joined. None: as it was, at first seven days.

        Returns
        -------
        str
            The session's id, the same for every checkpoint.

        Raises
        ------
        SessionEndedError
            Another process has resumed the session (kind ``session-fenced``), or ended it (``session-committed``,
            ``session-abandoned``), or a collection has taken its chunks (``session-expired``). Nothing was written.
        SessionStateError
            A commit or rebase is running, or it is a fork that has joined no session (kind ``not-allowed``).
        ReadOnlyError
            The session is read-only.
        StorageError
            A chunk or the segment could not be written; the next checkpoint tries again.
        """
        return encode_id(await checkpoint(self._content, lease_in_us(lease)))

    checkpoint: Final = synchronous(checkpoint_async)

    async def abandon_async(self) -> None:
        """End the session without a commit: its changes are forgotten, and objects that `checkpoint` wrote are deleted.

        Afterwards it is read-only, and shows its base. Chunks that were uploaded go with the next collection.

        Raises
        ------
        SessionEndedError
            Another process has resumed it, or it has ended already.
        SessionStateError
            A commit or rebase is running.
        StorageError
            The end could not be written; the session is as before.
        """
        await abandon(self._content)

    abandon: Final = synchronous(abandon_async)

    async def collect_forks_async(self, *, on_conflict: MergePolicy = "error") -> int:
        """Merge the changes that forks, which joined this session by its id, have handed over with their `checkpoint`.

        Merges as `merge_async` does. What was merged before is passed over, so it may be called again and again, while
        forks still work, and by a process that has resumed the session.

        Parameters
        ----------
        on_conflict
            As of `merge_async`; the forks are in the order of their last checkpoints.

        Returns
        -------
        int
            Number of forks that had anything new.

        Raises
        ------
        MergeFailedError
            There are conflicts; nothing was merged.
        SessionStateError
            The session is not persisted (kind ``not-allowed``), or a commit or rebase is running.
        """
        _require_policy(on_conflict)
        return await collect_forks(self._content, on_conflict)

    collect_forks: Final = synchronous(collect_forks_async)

    # -- many writers ----------------------------------------------------------------------------------------------

    def fork(self) -> ForkSession:
        """A session that writes on this one's behalf, and can be sent to other processes.

        It begins where this one is, uncommitted changes included. Waits for the chunks that are on their way.

        Raises
        ------
        SessionStateError
            The session is read-only (kind ``cannot-fork-read-only-session``: send it as it is), or being committed.
        StorageError
            A chunk could not be written.
        """
        content = self._content
        with content.lock:
            if content.read_only:
                raise SessionStateError(
                    "cannot fork a read-only session: it pickles as it is", ErrorKind.CANNOT_FORK_READ_ONLY_SESSION
                )
            content.require_changeable()
        _land_chunks(content)
        with content.lock:
            log = content.log.rebased(content.log.base, author=content.core.sources.new_node_id())
        return _fork_of(content, log, len(log.events))

    async def _joined_fork(self) -> ForkSession:
        """Persist the session, and return a fork that has joined it."""
        await self.checkpoint_async()
        persisted = self._content.persisted
        assert persisted is not None
        return ForkSession(await join(self._content.core, persisted.session))

    async def merge_async(self, *others: Session, on_conflict: MergePolicy = "error") -> None:
        """Take over the changes of forks.

        Forks that changed different chunks and different nodes go together, also where one array grew in one fork and
        the others wrote to it. It is a conflict if two of them, or a fork and this session since it was forked, changed
        the same chunk to another effect, the shape or the attributes of one array, even alike (two forks that each
        append one day would give one day), or in other ways what only one can change. Chunks whose bytes are equal do
        not conflict: forks may each write the coordinates of a dataset.

        The forks stay as they are; merging one again, or another copy of it, does no harm. After an error nothing is
        merged, of none of them.

        Parameters
        ----------
        others
            Forks of this session, or of one of its forks.
        on_conflict
            What to do where the same chunks, or the metadata of one array, were changed twice: ``"error"`` refuses;
            ``"ours"`` keeps the change of this session, or of the fork that is given first; ``"theirs"`` keeps that of
            the fork that is given last. Other conflicts are always errors.

        Raises
        ------
        MergeFailedError
            There are conflicts (kind ``merge-failed``); its ``conflicts`` name array, chunks and forks.
        SessionStateError
            Kind ``merge-failed``: a fork is based on a snapshot that is not in this session's history.
        RebaseFailedError
            This session was rebased since, and a fork conflicts with commits that it was rebased onto.
        ReadOnlyError
            The session is read-only.
        StorageError
            A fork's chunk could not be written; or chunks that must be compared could not be read.
        """
        for other in others:
            require_type("others", other, Session)
        _require_policy(on_conflict)
        forks = [(n, other._content) for n, other in enumerate(others) if other is not self]
        with self._content.lock:
            self._content.require_changeable()
        await merge_forks(self._content, await changes_of(forks), on_conflict)

    merge: Final = synchronous(merge_async)

    # -- nodes and chunks ------------------------------------------------------------------------------------------

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
        rearrange.move(self._content, from_path, to_path)

    move: Final = synchronous(move_async)

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
        await rearrange.shift_array(self._content, array_path, [operator.index(n) for n in chunk_offset])

    shift_array: Final = synchronous(shift_array_async)

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
        await rearrange.reindex_array(self._content, array_path, forward, backward)

    reindex_array: Final = synchronous(reindex_array_async)

    async def get_node_id_async(self, path: str) -> str:
        """The id of the node at an absolute path, which it keeps for life. Raises `NodeNotFoundError`."""
        node = self._content.node(absolute(path))
        if node is None:
            raise NodeNotFoundError(f"node not found at {path!r}")
        return encode_id(node.id)

    get_node_id: Final = synchronous(get_node_id_async)

    async def all_virtual_chunk_locations_async(self) -> list[str]:
        """The location of every virtual chunk in this session's view, one for each: those of one object repeat.

        Locations relative to a container are resolved. Raises `InvalidInputError` where that container is not
        configured (kind ``no-container-for-virtual-chunk``).
        """
        found: list[str] = []
        absolute_url = self._content.virtual_prefixes.absolute
        for node in self._content.nodes("/"):
            async with aclosing(self._content.chunk_references(node.path)) as batches:
                async for refs in batches:
                    # Rows of the table that no reference uses need not resolve.
                    rows = refs.location[refs.kind == VIRTUAL].tolist()
                    urls = {row: absolute_url(refs.locations[row]) for row in set(rows)}
                    found += [urls[row] for row in rows]
        return found

    all_virtual_chunk_locations: Final = synchronous(all_virtual_chunk_locations_async)

    async def chunk_coordinates(self, array_path: str, batch_size: int = 1000) -> AsyncIterator[tuple[int, ...]]:
        """Coordinates of every chunk of an array that exists, in no particular order."""
        path = self._content.require_array(absolute(array_path)).path
        async with aclosing(self._content.chunk_references(path)) as batches:
            async for refs in batches:
                for row in refs.coords.tolist():
                    yield tuple(row)

    async def chunk_type_async(self, array_path: str, chunk_coordinates: Sequence[int]) -> ChunkType:
        """The kind of a chunk's reference: inline, native, virtual, or none (``uninitialized``)."""
        path = self._content.require_array(absolute(array_path)).path
        ref = await self._content.chunk_reference(path, tuple(chunk_coordinates))
        if ref is None:
            return ChunkType.uninitialized
        return {NATIVE: ChunkType.native, VIRTUAL: ChunkType.virtual}.get(ref.kind, ChunkType.inline)

    chunk_type: Final = synchronous(chunk_type_async)

    # -- Python's protocols ----------------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Session):
            return NotImplemented
        if self is other:
            return True
        ours, theirs = self._content, other._content
        both_read_only = ours.read_only and theirs.read_only
        return both_read_only and ours.log.base.id == theirs.log.base.id and ours.core.storage == theirs.core.storage

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return instance_of_state(self, self.__getstate__())

    def __getstate__(self) -> dict[str, Any]:
        if not self.read_only:
            raise ValueError(
                "a writable session cannot be pickled: two processes would write the same history "
                "independently. Use Session.fork() to hand work to other processes, and merge the forks"
            )
        base = self._content.log.base
        return {"core": self._content.core, "base": base.id, "snapshot": _embedded(base)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        core, base = state["core"], state["base"]
        # Older versions pickled the snapshot itself.
        snapshot = base if isinstance(base, Snapshot) else _arrived(core, base, state["snapshot"])
        self._content = SessionContent.on(core, snapshot)

    def _summary(self) -> list[tuple[str, object]]:
        summary: list[tuple[str, object]] = [("read_only", self.read_only), ("snapshot_id", self.snapshot_id)]
        if not self.read_only:
            summary += [("branch", self.branch), ("has_uncommitted_changes", self.has_uncommitted_changes)]
        return summary

    def __repr__(self) -> str:
        return "\n".join(["<icechunk.session.Session>", *(f"{name}: {value}" for name, value in self._summary())])

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return fields_html("icechunk.session.Session", self._summary())


def _require_policy(on_conflict: MergePolicy) -> None:
    if on_conflict not in get_args(MergePolicy):
        raise InvalidInputError(
            f"on_conflict is one of {get_args(MergePolicy)}, it cannot be {on_conflict!r}", ErrorKind.INVALID_SETTING
        )


def _land_chunks(content: SessionContent) -> None:
    if not content.puts.is_idle:
        run_sync(content.puts.flush())


_EMBEDDED_BYTES = 256 * 1024
"""A base up to this size is pickled with the session; another process reads a larger one itself."""
_EMBEDDED_NODES = 10_000
"""Bases with more nodes are not even encoded to find out."""

_lock = threading.Lock()
_cores: WeakValueDictionary[bytes, Core] = WeakValueDictionary()
"""Cores of forks that arrived in this process, by the bytes of the arrived core: they share connections and caches."""


class ForkSession(Session):
    """A session that writes on behalf of another; made by `Session.fork`, and the only writable one that pickles.

    Its status has its own changes only, and `Session.discard_changes` drops only these.
    """

    def __getstate__(self) -> dict[str, Any]:
        content = self._content
        _land_chunks(content)
        with content.lock:
            assert content.origin is not None
            base, events, position = content.log.base, content.log.events, content.origin.position
            lineage, persisted = content.lineage, content.persisted
        if sum(map(size_of, events[:position])) > _EMBEDDED_BYTES:
            base, lineage = run_sync(_inherited(content, base, events[:position]))
            events, position = events[position:], 0
        return {
            "core": pickle.dumps(content.core),
            "base": base.id,
            "snapshot": _embedded(base),
            "log": encode_log(base.id, events),
            "position": position,
            "since_us": content.since_us,
            "rearrange": content.rearrange,
            "lineage": None if lineage is None else tuple(lineage),
            "joined": None if persisted is None else (persisted.session, persisted.joined_at),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        core = _shared_core(state["core"])
        base = _arrived(core, state["base"], state["snapshot"])
        log = decode_log(state["log"], base, core.sources.new_node_id, core.sources.new_node_id())
        lineage, joined = state.get("lineage"), state.get("joined")
        self._content = SessionContent(
            core,
            log,
            origin=log.savepoint_at(state["position"]),
            since_us=state["since_us"],
            rearrange=state["rearrange"],
            lineage=None if lineage is None else Lineage(*lineage),
            # Each copy hands over its changes for itself.
            persisted=None if joined is None else joined_fork(core, *joined),
        )


def _fork_of(parent: SessionContent, log: SessionLog, position: int) -> ForkSession:
    return ForkSession(
        SessionContent(
            parent.core,
            log,
            origin=log.savepoint_at(position),
            since_us=parent.since_us,
            rearrange=parent.rearrange,
            lineage=parent.lineage,
        )
    )


_written: WeakKeyDictionary[Core, dict[tuple[ObjectId, bytes], Snapshot]] = WeakKeyDictionary()
"""Snapshots of inherited changes, by base and last event: the forks of one session in a process share one."""


async def _inherited(content: SessionContent, base: Snapshot, events: Sequence[Event]) -> tuple[Snapshot, Lineage]:
    """A snapshot with a fork's inherited changes, which no branch and no log names: a collection removes it."""
    key = base.id, events[-1].id
    known = _written.setdefault(content.core, {}).get(key)
    if known is None:
        known = await write_unlisted(content, content.log.rebased(base, events))
        _written[content.core][key] = known
    before = content.lineage or Lineage(base.id, ())
    return known, Lineage(before.base, (*before.last_events, events[-1].id))


def _shared_core(data: bytes) -> Core:
    with _lock:
        core = _cores.get(data)
        if core is None:
            core = _cores[data] = pickle.loads(data)
        return core


def _arrived(core: Core, id: ObjectId, embedded: bytes | None) -> Snapshot:
    known = core.assets.known_snapshot(id)
    if known is not None:
        return known
    if embedded is None:
        return run_sync(core.assets.snapshot(id))
    base = decode_snapshot(embedded, expected_id=id)
    core.assets.keep_snapshot(base)
    return base


def _embedded(base: Snapshot) -> bytes | None:
    # The parent that a snapshot of format 1 has would be lost.
    if len(base.nodes) > _EMBEDDED_NODES or base.parent_id is not None:
        return None
    data = encode_snapshot(base)
    return data if len(data) <= _EMBEDDED_BYTES else None
