"""Many writers of one session: forks go out, and come back merged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from icechunk.errors import (
    ErrorKind,
    SessionStateError,
)
from icechunk.inputs import require_type
from icechunk.log.merging import merge
from icechunk.log.session_log import Savepoint, SessionLog
from icechunk.rebasing import check_fork
from icechunk.session.base import SessionBase
from icechunk.sync import run_sync
from icechunk.tasks import run_all

if TYPE_CHECKING:
    from icechunk.forking import ForkSession
    from icechunk.session import Session

__all__ = ["Sharing"]


class Sharing(SessionBase):
    """Hands work to other sessions, and takes their changes over."""

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
        from icechunk.session import Session

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
