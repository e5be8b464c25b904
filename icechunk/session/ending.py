"""How a session ends, or begins anew: commits, amendments, flushes, rebases, savepoints."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from icechunk.committing import Commit, How, commit
from icechunk.conflicts import ConflictSolver, RebaseFailedError
from icechunk.errors import (
    CommitOutcomeUnknown,
    ConflictError,
    ErrorKind,
    InvalidInputError,
    SessionStateError,
)
from icechunk.format.ids import encode_id
from icechunk.format.tables import Snapshot
from icechunk.inputs import json_metadata, require_text, require_type
from icechunk.log.compaction import Plan, plan
from icechunk.log.reuse import Earlier
from icechunk.log.session_log import Savepoint, SessionLog
from icechunk.rebasing import rebase_onto_tip
from icechunk.refs.base import SwapToken
from icechunk.refs.swap import backoff_s
from icechunk.session.base import Phase, SessionBase
from icechunk.sync import run_sync

__all__ = ["Ending"]

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
