"""A session as users hold it.

Many writers of one session: forks go out, and come back merged.

Forks: sessions that write on behalf of another one, in this process or in others.

A fork stands where its parent stands, with all that the parent has changed so far, and takes writes of its own. It
commits nothing: the parent merges it, then commits. What travels to another process is the fork's log, the id of its
base (with the snapshot itself, where that is small) and where the repository is; never the repository's state. Its
chunks are durable before it travels.

Worked example::

    session = repo.writable_session("main")
    forks = list(pool.map(write_part, [session.fork() for _ in parts], parts))
    session.merge(*forks)
    session.commit("written by many")
"""

from __future__ import annotations

import pickle
import threading
from typing import Any
from weakref import WeakValueDictionary

from icechunk.errors import (
    ErrorKind,
    SessionStateError,
)
from icechunk.format.ids import ObjectId
from icechunk.format.snapshot.codec import decode_snapshot, encode_snapshot
from icechunk.format.values import Snapshot
from icechunk.log.session.log import Savepoint, SessionLog
from icechunk.log.session.merge.merging import merge
from icechunk.log.session.wire import decode_log, encode_log
from icechunk.runtime.checks import require_type
from icechunk.runtime.loops import run_sync
from icechunk.runtime.tasks import run_all
from icechunk.session.commit import Ending
from icechunk.session.content import SessionBase
from icechunk.session.core import Core
from icechunk.session.rearrange import Arranging
from icechunk.session.rebase import check_fork
from icechunk.snapshots import Diff
from icechunk.store.store import IcechunkStore

__all__ = ["ForkSession", "Session", "Sharing"]


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


class Session(Arranging, Ending, Sharing):
    """One consistent view of a repository; writable ones collect changes until `commit`.

    Made by `Repository.readonly_session` and `Repository.writable_session`. Safe to use from several loops and
    threads. A read-only session pickles; a writable one refuses.
    """

    @property
    def store(self) -> IcechunkStore:
        """The Zarr store of this session: hand it to zarr or xarray."""
        from icechunk.store.store import IcechunkStore

        return IcechunkStore(self)


_CARRIED_BYTES = 256 * 1024
"""A base up to this size travels with the fork; another process reads a larger one for itself."""
_CARRIED_NODES = 10_000
"""Bases with more nodes are not even encoded to find out."""

_lock = threading.Lock()
_cores: WeakValueDictionary[bytes, Core] = WeakValueDictionary()
"""What forks that arrived in this process use, by the bytes it arrived as: connections and caches are shared."""


class ForkSession(Session):
    """A session that writes on behalf of another; made by `Session.fork`, and the only writable one that pickles.

    Its status, and what `Session.discard_changes` forgets, are its own changes only.
    """

    def __init__(self, core: Core, log: SessionLog, position: int, *, since_us: int, rearrange: bool) -> None:
        super().__init__(core, log.base, since_us=since_us, rearrange=rearrange)
        self._adopt(log, position)

    def _adopt(self, log: SessionLog, position: int) -> None:
        self._log = log
        self._origin = log.savepoint_at(position)
        self._begin_writing()

    @property
    def has_uncommitted_changes(self) -> bool:
        """Whether merging it would change anything."""
        with self._lock:
            return not self._log.since(self._origin).is_empty

    def status(self) -> Diff:
        """What the fork changed since it was forked."""
        with self._lock:
            return Diff.of(self._log.since(self._origin).changes())

    def discard_changes(self) -> None:
        """Forget all changes since it was forked."""
        with self._lock:
            self._require_changeable()
            self._log.rollback(self._origin)
            self._puts.discard()

    def _own_position(self) -> int:
        return self._origin.position

    @property
    def _kind(self) -> str:
        return "a fork"

    def __getstate__(self) -> dict[str, Any]:
        self._land_chunks()
        with self._lock:
            base = self._log.base
            return {
                "core": pickle.dumps(self._core),
                "base": base.id,
                "snapshot": _carried(base),
                "log": encode_log(base.id, self._log.events),
                "position": self._origin.position,
                "since_us": self._since_us,
                "rearrange": self._rearrange,
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        core = _shared_core(state["core"])
        base = _arrived(core, state["base"], state["snapshot"])
        log = decode_log(state["log"], base, core.sources.new_node_id)
        ForkSession.__init__(
            self, core, log, state["position"], since_us=state["since_us"], rearrange=state["rearrange"]
        )

    def _refuse_commit(self) -> None:
        raise SessionStateError(
            "commits are not allowed in a fork: merge it into the session that it was forked from, and commit that",
            ErrorKind.COMMIT_NOT_ALLOWED,
        )


def _shared_core(data: bytes) -> Core:
    with _lock:
        core = _cores.get(data)
        if core is None:
            core = _cores[data] = pickle.loads(data)
        return core


def _arrived(core: Core, id: ObjectId, carried: bytes | None) -> Snapshot:
    known = core.assets.known_snapshot(id)
    if known is not None:
        return known
    if carried is None:
        return run_sync(core.assets.snapshot(id))
    base = decode_snapshot(carried, expected_id=id)
    core.assets.keep_snapshot(base)
    return base


def _carried(base: Snapshot) -> bytes | None:
    if len(base.nodes) > _CARRIED_NODES:
        return None
    data = encode_snapshot(base)
    return data if len(data) <= _CARRIED_BYTES else None
