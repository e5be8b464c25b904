"""Sessions and transactions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from icechunk.conflicts import ConflictSolver
from icechunk.errors import ErrorKind, InvalidInputError, ReadOnlyError, SessionStateError, SnapshotNotFoundError
from icechunk.format.ids import ObjectId, encode_id, object_id_from_text
from icechunk.log.repository.port import SwapToken
from icechunk.log.repository.state import ONLINE, RepoState
from icechunk.log.repository.store_check import require_writable
from icechunk.ops import PersistedSession
from icechunk.repository.base import RepositoryBase, select
from icechunk.repository.views import require_feature
from icechunk.runtime.checks import WrongTypeError, require_type
from icechunk.runtime.clock import moment
from icechunk.runtime.tasks import run_jobs
from icechunk.runtime.twins import synchronous
from icechunk.session import ForkSession, Session
from icechunk.session.content import SessionContent
from icechunk.session.rebase import DEFAULT_REBASE_TRIES
from icechunk.session.resume import join, resume
from icechunk.session.session_checkpoint import lease_in_us
from icechunk.transfer.segments import list_sessions, read_head

if TYPE_CHECKING:
    from icechunk.store import IcechunkStore

__all__ = ["Sessions"]


class Sessions(RepositoryBase):
    """Reading one version, and writing the next."""

    async def readonly_session_async(
        self,
        branch: str | None = None,
        *,
        tag: str | None = None,
        snapshot_id: str | None = None,
        as_of: datetime | None = None,
    ) -> Session:
        """Read one committed version; later commits do not show in it.

        Parameters
        ----------
        branch, tag, snapshot_id
            Exactly one of them: which version.
        as_of
            With ``branch``: the newest version of it that was written at this time or before (with a time zone).

        Raises
        ------
        ValueError
            None or several of the three, or ``as_of`` without a branch.
        TypeError
            ``as_of`` has no time zone.
        RefNotFoundError, SnapshotNotFoundError
            There is no such thing, or nothing as old as that (kind ``no-snapshot-at-time``).
        """
        require_type("as_of", as_of, datetime, optional=True)
        if as_of is not None:
            if branch is None or tag is not None or snapshot_id is not None:
                raise ValueError("as_of needs a branch, and nothing else with it")
            if as_of.tzinfo is None:
                raise WrongTypeError(
                    "as_of needs a time zone, for example datetime.now(timezone.utc)", ErrorKind.INVALID_SETTING
                )
        state = await self._core.state(snapshot_id, branch=branch, tag=tag)
        base = select(state, branch=branch, tag=tag, snapshot_id=snapshot_id)
        if as_of is not None:
            base = _newest_at(await self._core.learn(base, ancestry=True), base, as_of, f"branch {branch!r}")
        snapshot = await self._core.assets.snapshot(base)
        await self._core.preload(snapshot)
        return Session(SessionContent.on(self._core, snapshot))

    readonly_session: Final = synchronous(readonly_session_async)

    async def writable_session_async(self, branch: str) -> Session:
        """Begin changes on top of a branch's newest version.

        Where several processes commit as fast as the store lets them, this waits until it is this one's turn, for five
        seconds at most.

        Raises
        ------
        RefNotFoundError
            There is no such branch.
        ReadOnlyError
            The repository's status, or its storage, is read-only.
        """
        require_writable(self._core.storage, "begin a writable session")
        return await self._session_on(branch, await self._core.state(branch=branch, to_write=True))

    async def _session_on(
        self, branch: str, state: RepoState, *, rearrange: bool = False, preload: bool = True
    ) -> Session:
        require_type("branch", branch, str)
        _require_online(state)
        log = await self._core.log()
        since_us = log.store_time_us
        log.prepare_writes_soon()
        base = await self._core.assets.snapshot(state.branch_tip(branch))
        if preload:
            await self._core.preload(base)
        content = SessionContent.on(self._core, base, branch=branch, since_us=since_us, rearrange=rearrange)
        return Session(content)

    writable_session: Final = synchronous(writable_session_async)

    async def rearrange_session_async(self, branch: str) -> Session:
        """Begin moving nodes on top of a branch's newest version, with `Session.move`; nothing else can be changed.

        Raises
        ------
        RefNotFoundError
            There is no such branch.
        ReadOnlyError
            The repository's status, or its storage, is read-only.
        SessionStateError
            The feature flag ``move_node`` is off.
        FormatError
            The repository is of format 1, which knows no moves (kind ``unsupported-spec-version``).
        """
        require_writable(self._core.storage, "begin a session that rearranges nodes")
        await self._require_format_2("rearrange nodes")
        state = await self._core.state(branch=branch)
        require_feature(state.disabled_feature_flags or (), "move_node")
        return await self._session_on(branch, state, rearrange=True)

    rearrange_session: Final = synchronous(rearrange_session_async)

    async def sessions_async(self) -> list[PersistedSession]:
        """The sessions that were persisted with `Session.checkpoint` and have not ended, oldest first.

        Costs a listing, and a small read for each session.
        """
        storage = self._core.storage
        listed = [one for one in (await list_sessions(storage)).values() if one.own]
        heads = await run_jobs([partial(read_head, storage, one.own[one.last].key) for one in listed])
        found = [
            PersistedSession(
                id=encode_id(one.session),
                branch=head.branch,
                snapshot_id=encode_id(head.base),
                created_at=moment(head.created_us),
                written_at=moment(one.written_us),
                leased_until=moment(one.written_us + head.lease_us),
            )
            for one, head in zip(listed, heads, strict=True)
            if not head.kind.is_end and head.branch is not None
        ]
        return sorted(found, key=lambda one: (one.created_at, one.id))

    sessions: Final = synchronous(sessions_async)

    async def resume_session_async(self, id: str, *, lease: timedelta | None = None) -> Session:
        """Go on with a session that was persisted with `Session.checkpoint`, here or in any other process.

        It has everything up to its last checkpoint. A process that still holds the session is fenced: its next
        checkpoint or commit ends with an error (kind ``session-fenced``), and writes nothing. If a commit of the
        session was under way, its outcome is found out first: a session is committed at most once.

        Parameters
        ----------
        id
            What `Session.checkpoint` returned.
        lease
            As of `Session.checkpoint_async`; None: as it was.

        Raises
        ------
        InvalidInputError
            The text is no id of a session (kind ``invalid-setting``).
        SessionNotFoundError
            There is no session of this id.
        SessionEndedError
            It was committed (kind ``session-committed``, with the snapshot's id), abandoned (``session-abandoned``), or
            a collection has taken its chunks after its lease (``session-expired``).
        ReadOnlyError
            The repository's status, or its storage, is read-only.
        FormatError
            A segment of it cannot be read.
        """
        session, lease_us = _session_id(id), lease_in_us(lease)
        require_writable(self._core.storage, "resume a session")
        _require_online(await self._core.state())
        (await self._core.log()).prepare_writes_soon()
        return Session(await resume(self._core, session, lease_us))

    resume_session: Final = synchronous(resume_session_async)

    async def join_session_async(self, id: str) -> ForkSession:
        """A fork that works for a persisted session, and hands over its changes through the repository.

        It begins with everything up to the session's last checkpoint. Its own `Session.checkpoint` writes its changes,
        which the session takes with `Session.collect_forks`; the fork itself need not be sent back.

        Parameters
        ----------
        id
            What `Session.checkpoint` returned.

        Raises
        ------
        InvalidInputError, SessionNotFoundError, SessionEndedError, FormatError
            As `resume_session_async`.
        ReadOnlyError
            The storage is read-only.
        """
        session = _session_id(id)
        require_writable(self._core.storage, "join a session")
        return ForkSession(await join(self._core, session))

    join_session: Final = synchronous(join_session_async)

    @asynccontextmanager
    async def transaction_async(
        self,
        branch: str,
        *,
        message: str,
        metadata: dict[str, Any] | None = None,
        rebase_with: ConflictSolver | None = None,
        rebase_tries: int = DEFAULT_REBASE_TRIES,
    ) -> AsyncIterator[IcechunkStore]:
        """A store whose changes are committed when the ``async with`` block ends without an error, else forgotten.

        Parameters and errors are those of `Session.commit_async`.
        """
        session = await self.writable_session_async(branch)
        yield session.store
        await session.commit_async(message, metadata, rebase_with=rebase_with, rebase_tries=rebase_tries)

    @contextmanager
    def transaction(
        self,
        branch: str,
        *,
        message: str,
        metadata: dict[str, Any] | None = None,
        rebase_with: ConflictSolver | None = None,
        rebase_tries: int = DEFAULT_REBASE_TRIES,
    ) -> Iterator[IcechunkStore]:
        """Synchronous twin of `transaction_async`, for a ``with`` block."""
        session = self.writable_session(branch)
        yield session.store
        session.commit(message, metadata, rebase_with=rebase_with, rebase_tries=rebase_tries)

    async def settle_async(self, token: SwapToken | None) -> bool:
        """Find out the outcome of a commit that ended with `CommitOutcomeUnknown`.

        Returns
        -------
        bool
            True: it is in the history. False: it is not, and never will be.

        Raises
        ------
        CommitOutcomeUnknown
            The outcome can no longer be found out; look whether the change is there. For a commit only while an upgrade
            is unfinished.
        WrongTypeError
            ``token`` is not the token of a `CommitOutcomeUnknown`.
        SessionStateError
            The repository was converted to another layout since it was opened: open it again. Or ``token`` is None, as
            `Session.unsettled_commit` is once the session knows the outcome.
        StorageError
            The storage gives no certain answer; call again.
        """
        if token is None:
            raise SessionStateError(
                "nothing is left to settle: the session knows the outcome of its commit. If the session is read-only, "
                "the commit landed; else commit again"
            )
        require_type("token", token, SwapToken)
        return await (await self._core.log()).settle(token)

    settle: Final = synchronous(settle_async)

    async def checkpoint_async(self) -> None:
        """Write the state of the log for other readers of the format now, instead of soon."""
        await (await self._core.log()).checkpoint()

    checkpoint: Final = synchronous(checkpoint_async)


def _require_online(state: RepoState) -> None:
    if state.status.availability != ONLINE:
        reason = f": {state.status.reason}" if state.status.reason else ""
        raise ReadOnlyError(
            f"cannot begin a writable session: repository status is read-only{reason}; "
            "Repository.set_status makes it writable again",
            ErrorKind.READ_ONLY_REPOSITORY,
        )


def _newest_at(state: RepoState, tip: ObjectId, as_of: datetime, what: str) -> ObjectId:
    limit_us = (as_of - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    for record in state.ancestry(tip):
        if record.flushed_at_us <= limit_us:
            return record.id
    raise SnapshotNotFoundError(
        f"{what} has no snapshot at or before {as_of.isoformat()}", ErrorKind.NO_SNAPSHOT_AT_TIME
    )


def _session_id(id: str) -> ObjectId:
    """The id of a session from its text."""
    try:
        return object_id_from_text(id)
    except InvalidInputError as error:
        raise InvalidInputError(
            f"{id!r:.60} is no id of a session: it is the text of 20 characters that Session.checkpoint returned, and "
            "Repository.sessions lists",
            ErrorKind.INVALID_SETTING,
        ) from error
