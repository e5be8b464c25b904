"""Forks: sessions that write on behalf of another one, in this process or in others.

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

from icechunk.core import Core
from icechunk.errors import ErrorKind, SessionStateError
from icechunk.format.ids import ObjectId
from icechunk.format.snapshot import decode_snapshot, encode_snapshot
from icechunk.format.tables import Snapshot
from icechunk.log.session_log import SessionLog
from icechunk.session import Session
from icechunk.snapshots import Diff
from icechunk.sync import run_sync

__all__ = ["ForkSession"]

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
                "log": self._log.to_bytes(),
                "position": self._origin.position,
                "since_us": self._since_us,
                "rearrange": self._rearrange,
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        core = _shared_core(state["core"])
        base = _arrived(core, state["base"], state["snapshot"])
        log = SessionLog.from_bytes(state["log"], base, core.sources.new_node_id)
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
