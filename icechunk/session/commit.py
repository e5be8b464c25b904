"""How a session ends, or begins anew: commits, amendments, flushes, rebases, savepoints.

Writing a commit: the fold becomes files, and the files become history by one swap.

The files of a commit, one after another: no more of them are held than are on their way.

Manifests come first, since the snapshot names them and their sizes. Each is made, encoded, and forgotten once it is
put, so that a commit of many references needs little more memory than the session's log of them.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

from icechunk.conflicts import ConflictSolver, RebaseFailedError
from icechunk.errors import (
    CommitOutcomeUnknown,
    ConflictError,
    ErrorKind,
    InvalidInputError,
    SessionStateError,
)
from icechunk.format.by_node import num_rows
from icechunk.format.ids import ObjectId, encode_id
from icechunk.format.keys import manifest_key, snapshot_key, transaction_key
from icechunk.format.manifest import encode_manifest, max_refs
from icechunk.format.repo.values import SnapshotRecord
from icechunk.format.snapshot.codec import encode_snapshot
from icechunk.format.transaction import encode_transaction_log, require_room
from icechunk.format.values import Manifest, Snapshot, TransactionLog
from icechunk.log.repository.events import CommitAdded, CommitAmended, DetachedSnapshotAdded, Event
from icechunk.log.repository.port import OnSent, RepositoryLog, SwapToken
from icechunk.log.repository.settle import backoff_s
from icechunk.log.repository.state import RepoState, require_snapshot
from icechunk.log.session.log import Savepoint, SessionLog
from icechunk.log.session.merge.diff import combined
from icechunk.log.session.plan.compaction import Placed, Plan, new_manifests, new_snapshot, placed, plan
from icechunk.log.session.plan.manifest_rows import require_fit
from icechunk.log.session.plan.reuse import Earlier, Remembered
from icechunk.log.session.plan.transaction_parts import in_parts
from icechunk.runtime.checks import json_metadata, require_text, require_type
from icechunk.runtime.loops import run_sync
from icechunk.runtime.tasks import run_all, run_each, run_stream
from icechunk.session.content import Phase, SessionBase
from icechunk.session.core import Core
from icechunk.session.rebase import rebase_onto_tip
from icechunk.transfer.assets import off_loop
from icechunk.transfer.packs import Packs

__all__ = ["Commit", "CommitFiles", "Ending", "File", "How", "commit"]

_BYTES_PER_REF = 64
"""About what a reference costs to encode; decides whether that happens in a thread."""
_BYTES_PER_CHANGE = 16
"""The same for a changed chunk in a transaction log."""
_BYTES_PER_NODE = 256
"""The same for a node of the snapshot."""


class File(NamedTuple):
    """A metadata file."""

    key: str
    data: bytes


@dataclass(slots=True, kw_only=True, eq=False)
class CommitFiles:
    """Makes the files of one try of a commit."""

    core: Core
    plan: Plan
    spec_version: int
    message: str
    metadata: Mapping[str, Any]
    amended: TransactionLog | None
    """Of the snapshot that this one takes the place of."""
    earlier: Earlier | None
    """What earlier tries have put; None where no other try can follow."""
    snapshot: Snapshot | None = None
    """Known once its file was made."""
    further_transactions: tuple[ObjectId, ...] = ()
    """Of transaction logs that the snapshot is to name, oldest first: they tell the rest of what it changed."""
    new: list[Remembered] = field(default_factory=list)
    """Manifests whose files were made, for the next try, if there can be one."""

    async def make(self) -> AsyncGenerator[File, None]:
        """All files; the caches get to know what is in them.

        Raises as `new_manifests` and the encoders do; what is larger than a file can be is found before the first one.
        """
        core, plan = self.core, self.plan
        snapshot_id = core.sources.new_object_id()
        transactions = self._transactions(snapshot_id)
        for array in plan.arrays:
            require_fit(array, max_refs(len(array.node.shape)))
        found: dict[ObjectId, Manifest] = {}

        async def read(id: ObjectId) -> None:
            found[id] = await core.assets.manifest(id)

        await run_each(read, plan.manifests_to_read, limit=max(1, core.settings.commit_fetches))
        touched = plan.num_rows + sum(manifest.num_chunk_refs for manifest in found.values())
        manifests = new_manifests(plan, found, core.sources.new_object_id)
        keep = core.assets.has_room_for(touched)
        places: list[Placed] = []
        while True:
            step = await off_loop(touched * _BYTES_PER_REF, partial(self._encode_next, manifests))
            if step is None:
                break
            manifest, place, data = step
            places.append(place)
            if data is None:
                continue
            if keep:
                # Before the commit has landed: whoever comes next in the queue builds upon it. If it does not land,
                # nobody asks for it.
                core.assets.keep_manifest(manifest)
            del manifest, step
            yield File(manifest_key(place.file.object_id), data)
            del data
        make = partial(
            self._encode_snapshot,
            places,
            snapshot_id=snapshot_id,
            flushed_at_us=max(core.sources.wall_us(), plan.base.flushed_at_us + 1),
        )
        self.snapshot, encoded = await off_loop(len(plan.nodes) * _BYTES_PER_NODE, make)
        yield File(snapshot_key(snapshot_id), encoded)
        level = core.settings.compression_level
        for transaction in transactions:
            rows = num_rows(transaction.updated_chunks)
            encode = partial(encode_transaction_log, transaction, self.spec_version, level)
            yield File(transaction_key(transaction.id), await off_loop(rows * _BYTES_PER_CHANGE, encode))

    def _transactions(self, snapshot_id: ObjectId) -> list[TransactionLog]:
        log = self.plan.changes.transaction(snapshot_id)
        if self.amended is not None:
            log = combined(self.amended, log)
        others: list[TransactionLog] = []
        # Snapshots of format 1 can name no further logs.
        if self.spec_version != 1:
            log, others = in_parts(log, self.core.sources.new_object_id)
        require_room(log)
        self.further_transactions = tuple(other.id for other in others)
        return [*others, log]

    def _encode_snapshot(
        self, places: Sequence[Placed], *, snapshot_id: ObjectId, flushed_at_us: int
    ) -> tuple[Snapshot, bytes]:
        snapshot = new_snapshot(
            self.plan,
            places,
            snapshot_id=snapshot_id,
            # Format 1 keeps ancestry in the snapshots.
            parent_id=self.plan.base.id if self.spec_version == 1 else None,
            flushed_at_us=flushed_at_us,
            message=self.message,
            metadata=self.metadata,
        )
        return snapshot, encode_snapshot(snapshot, self.spec_version, self.core.settings.compression_level)

    def _encode_next(self, manifests: Iterator[Manifest]) -> tuple[Manifest, Placed, bytes | None] | None:
        """The next manifest, where it is, and its file, if there is none yet that holds the same."""
        settings = self.core.settings
        manifest = next(manifests, None)
        if manifest is None:
            return None
        known = None if self.earlier is None else self.earlier.find(manifest)
        if known is not None:
            return manifest, known, None
        data = encode_manifest(manifest, self.spec_version, settings.compression_level, settings.locations)
        place = placed(manifest, len(data))
        if self.earlier is not None:
            self.new.append(self.earlier.remembered(manifest, place))
        return manifest, place, data


_LOG = logging.getLogger(__name__)


class How(Enum):
    """What becomes of the new snapshot."""

    COMMIT = "commit"
    """The branch's next tip."""
    AMEND = "amend"
    """The branch's tip, in place of the one that the session stands on."""
    FLUSH = "flush"
    """A child of the session's base that no branch points to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What a caller wants committed."""

    how: How = How.COMMIT
    branch: str
    message: str
    metadata: Mapping[str, Any]
    since_us: int
    """Store time, µs, not later than the first upload for this commit."""
    on_sent: OnSent
    """Told when the swap is sent, and when it is certainly lost: in between a cancellation leaves the outcome open."""
    earlier: Earlier | None = None
    """Manifests that earlier tries of this commit have put; each try adds its own. None: there is but one try."""


async def commit(
    core: Core,
    base: Snapshot,
    make_plan: Callable[[], Plan],
    puts: Packs,
    wanted: Commit,
    *,
    on_queued: Callable[[], None] | None = None,
) -> Snapshot:
    """Write the session's files, all at once, and append the commit to the repository log.

    Where no manifest must be read, and no chunk is on its way, a small commit costs one round trip, since its files
    ride in the entry; others cost two: the files, the swap.

    Parameters
    ----------
    base
        What the session stands on.
    make_plan
        Plans the session's changes; called once nothing more is written to the session.
    on_queued
        Given by who holds the branch's turn: the base is the branch's tip once all that waits has landed. Called as
        soon as this commit waits too.

    Raises
    ------
    SessionStateError
        To amend: the base is the first snapshot (kind ``no-amend-for-initial-commit``).
    ConflictError
        The branch is not at the session's base any more; nothing of this commit is visible.
    CommitOutcomeUnknown
        The swap was sent and its outcome is not certain.
    StorageError
        Something could not be written; nothing of this commit is visible.
    """
    repository_log = await core.log()
    if (
        on_queued is None
        and wanted.how is not How.FLUSH
        and repository_log.state.branches.get(wanted.branch) != base.id
    ):
        # Perhaps this loop's client has only not looked for a while; if the branch did move, nothing need be uploaded.
        _require_tip(await repository_log.refresh(), wanted.branch, base.id)
    parent, pruned = base.id, tuple[ObjectId, ...]()
    if wanted.how is How.AMEND:
        before = require_snapshot(repository_log.state, base.id)
        if before.parent is None:
            raise SessionStateError(
                "cannot amend: the branch is at the repository's first snapshot, which stays; commit instead",
                ErrorKind.NO_AMEND_FOR_INITIAL_COMMIT,
            )
        parent, pruned = before.parent, before.pruned_ancestor_tx_logs
    files = CommitFiles(
        core=core,
        plan=make_plan(),
        spec_version=repository_log.spec_version,
        message=wanted.message,
        metadata=wanted.metadata,
        amended=await core.assets.transaction_log(base.id) if wanted.how is How.AMEND else None,
        earlier=wanted.earlier,
    )
    snapshot, riding = await _write(core, repository_log, puts, files)
    record = SnapshotRecord(
        id=snapshot.id,
        parent=parent,
        flushed_at_us=snapshot.flushed_at_us,
        message=wanted.message,
        metadata=dict(wanted.metadata),
        pruned_ancestor_tx_logs=(*pruned, *files.further_transactions),
    )

    def propose(state: RepoState) -> Sequence[Event]:
        if wanted.how is How.FLUSH:
            return [DetachedSnapshotAdded(snapshot=record)]
        _require_tip(state, wanted.branch, base.id)
        if wanted.how is How.AMEND:
            return [CommitAmended(branch=wanted.branch, previous=base.id, snapshot=record)]
        return [CommitAdded(branch=wanted.branch, snapshot=record)]

    # Before it has landed: whoever comes next in the queue builds upon it. If it does not land, nobody asks for it.
    core.assets.keep_snapshot(snapshot)
    for key, data in riding.items():
        core.files.put(key, data, len(data))
    await repository_log.append(
        propose, since_us=wanted.since_us, on_sent=wanted.on_sent, files=riding, on_queued=on_queued
    )
    if _LOG.isEnabledFor(logging.INFO):
        where = core.storage.describe()
        _LOG.info("%s: %s of snapshot %s, branch %r", where, wanted.how.value, encode_id(snapshot.id), wanted.branch)
    return snapshot


def _require_tip(state: RepoState, branch: str, base: ObjectId) -> None:
    tip = state.branches.get(branch)
    if tip != base:
        raise ConflictError(encode_id(base), None if tip is None else encode_id(tip))


async def _write(
    core: Core, log: RepositoryLog, puts: Packs, files: CommitFiles
) -> tuple[Snapshot, Mapping[str, bytes]]:
    """Write the files; those that are returned instead are for the entry to carry."""
    small = min(core.settings.small_commit_bytes, log.carry_limit_bytes)
    made: list[File] = []
    held_bytes = 0
    async with aclosing(files.make()) as coming:
        async for file in coming:
            made.append(file)
            held_bytes += len(file.data)
            if held_bytes > small:
                break
        if held_bytes <= small:
            # Chunks are not carried: what the entry refers to must be there before it.
            await run_all(log.prepare_writes, puts.flush)
            assert files.snapshot is not None
            return files.snapshot, dict(made)

        async def all_files() -> AsyncGenerator[File, None]:
            while made:
                yield made.pop(0)
            async for file in coming:
                yield file

        async def put(file: File) -> None:
            await core.put(file.key, file.data)

        settings = core.settings
        stream = partial(
            run_stream, put, all_files(), _size, limit=settings.max_requests, max_weight=settings.put_memory_bytes
        )
        await run_all(log.prepare_writes, puts.flush, stream)
    if files.earlier is not None:
        files.earlier.add(files.new)
    assert files.snapshot is not None
    return files.snapshot, {}


def _size(file: File) -> int:
    return len(file.data)


_REBASED = "__icechunk"
_LONGEST_BACKOFF_ROUND = 4
"""Pauses between tries of a commit grow up to this one: a longer one would only let more others pass."""


class Ending(SessionBase):
    """Makes changes a snapshot, carries them over to another base, or forgets them."""

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

    async def commit_rewritten(self, message: str, metadata: Mapping[str, Any] | None, *, amend: bool) -> str:
        """Commit, or amend, with the manifests of all arrays written again as the configuration wants them now.

        What the session changed is part of it. Parameters, errors and what holds after them are those of
        `commit_async`.
        """
        how = How.AMEND if amend else How.COMMIT
        return await self._write_snapshot(how, message, metadata, allow_empty=True, rewrite=True)

    async def _write_snapshot(
        self,
        how: How,
        message: str,
        metadata: Mapping[str, Any] | None,
        allow_empty: bool,
        solver: ConflictSolver | None = None,
        tries: int = 0,
        *,
        rewrite: bool = False,
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
            earlier=Earlier() if solver is not None and tries else None,
        )
        try:
            snapshot = await self._commit(wanted, partial(self._plan, everything=rewrite), solver, tries)
        except Exception as error:
            self._phase = Phase.UNSETTLED if isinstance(error, CommitOutcomeUnknown) else Phase.WRITABLE
            raise
        except BaseException:
            # Cancelled: an entry that was sent goes on without us, and may land.
            self._phase = Phase.UNSETTLED if self._phase is Phase.SWAPPING else Phase.WRITABLE
            raise
        with self._lock:
            self._log = SessionLog(snapshot, self._core.sources.new_node_id)
            self._branch = None
            self._phase = Phase.READ_ONLY
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
            branch, self._phase = self._branch, Phase.REBASING
        try:
            await self._rebase(branch, solver)
        finally:
            self._phase = Phase.WRITABLE

    def rebase(self, solver: ConflictSolver) -> None:
        """Synchronous twin of `rebase_async`."""
        run_sync(self.rebase_async(solver))

    async def _commit(
        self, wanted: Commit, make_plan: Callable[[SessionLog], Plan], solver: ConflictSolver | None, tries: int
    ) -> Snapshot:
        for tried in itertools.count():
            try:
                if solver is not None and tries:
                    return await self._commit_in_turn(wanted, make_plan, solver)
                return await commit(self._core, self._log.base, lambda: make_plan(self._log), self._puts, wanted)
            except ConflictError:
                if solver is None or tried == tries:
                    raise
            self._phase = Phase.COMMITTING
            if tried:
                # Two that lose to each other in turn would otherwise go on in step.
                await self._core.sources.sleep(backoff_s(self._core.sources, min(tried, _LONGEST_BACKOFF_ROUND)))
            await self._rebase(wanted.branch, solver)
            wanted = _once_more_rebased(wanted)
        raise AssertionError

    async def _commit_in_turn(
        self, wanted: Commit, make_plan: Callable[[SessionLog], Plan], solver: ConflictSolver
    ) -> Snapshot:
        """Commit behind those of this process that wait to commit to the same branch, on top of what they commit.

        So they all go into one entry of the repository log, and none of them loses to another. The session itself is
        not rebased: what it would stand on may not land.
        """
        log = await self._core.log()
        turn = log.turn(wanted.branch)
        if turn is None:
            return await commit(self._core, self._log.base, lambda: make_plan(self._log), self._puts, wanted)
        # Chunks do not depend on the base: nobody has to wait for them in the queue.
        await self._puts.flush()
        ahead = [self._log]
        held = True

        def release() -> None:
            nonlocal held
            if held:
                held = False
                turn.release()

        await turn.acquire()
        try:
            expected = log.expected()
            if wanted.branch in expected.branches:
                await rebase_onto_tip(
                    self._core,
                    self._log,
                    wanted.branch,
                    solver,
                    guard=self._lock,
                    keep=ahead.append,
                    state=expected,
                )
            if len(ahead) > 1:
                wanted = _once_more_rebased(wanted)
            return await commit(
                self._core, ahead[-1].base, lambda: make_plan(ahead[-1]), self._puts, wanted, on_queued=release
            )
        except RebaseFailedError as error:
            # With what may never land, perhaps: the caller looks at what did.
            raise ConflictError(encode_id(self._log.base.id), None) from error
        finally:
            release()

    async def _rebase(self, branch: str, solver: ConflictSolver) -> None:
        def keep(log: SessionLog) -> None:
            with self._lock:
                self._log = log

        await rebase_onto_tip(self._core, self._log, branch, solver, guard=self._lock, keep=keep)

    def _begin_writing(self) -> None:
        self._phase = Phase.WRITABLE

    def _refuse_commit(self) -> None:
        """Raise where this is not a session that commits."""

    def _begin_commit(self, allow_empty: bool) -> str:
        self._refuse_commit()
        with self._lock:
            if self._phase is not Phase.WRITABLE or self._branch is None:
                raise SessionStateError(
                    f"cannot commit a session that is {self._phase.value}; open a writable session on the branch",
                    ErrorKind.COMMIT_NOT_ALLOWED,
                )
            if self._log.is_empty and not allow_empty:
                raise SessionStateError(
                    "cannot commit: no changes made to the session (allow_empty=True commits anyway)",
                    ErrorKind.NO_CHANGES_TO_COMMIT,
                )
            self._phase = Phase.COMMITTING
            return self._branch

    def _plan(self, log: SessionLog, *, everything: bool) -> Plan:
        # Planning merges the log's rows, which other threads must not see halfway.
        with self._lock:
            return plan(log, self._core.settings.policy, everything=everything)

    def _note_sent(self, token: SwapToken | None) -> None:
        # None: the entry is lost for certain. The log tells also those who are gone, who then may go on writing.
        with self._lock:
            self._sent = token
            if token is not None:
                self._phase = Phase.SWAPPING
            elif self._phase is Phase.SWAPPING:
                self._phase = Phase.COMMITTING
            elif self._phase is Phase.UNSETTLED:
                self._phase = Phase.WRITABLE


def _once_more_rebased(wanted: Commit) -> Commit:
    """The same commit, whose metadata says how often it was rebased, under the official library's name for it."""
    noted = wanted.metadata.get(_REBASED)
    noted = noted if isinstance(noted, dict) else {}
    noted = {**noted, "rebase_attempts": noted.get("rebase_attempts", 0) + 1}
    return replace(wanted, metadata={**wanted.metadata, _REBASED: noted})
