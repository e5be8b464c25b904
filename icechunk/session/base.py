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

import threading
from enum import Enum
from typing import Any

from icechunk.config import RepositoryConfig
from icechunk.core import Core
from icechunk.errors import (
    ErrorKind,
    InvalidInputError,
    ReadOnlyError,
    SessionStateError,
)
from icechunk.format.ids import encode_id
from icechunk.format.tables import Snapshot
from icechunk.log.session_log import SessionLog
from icechunk.refs.base import SwapToken
from icechunk.snapshots import Diff
from icechunk.status import SessionMode
from icechunk.values import fields_html

__all__ = ["Phase", "SessionBase", "absolute"]


class Phase(Enum):
    """Where a session stands in its life."""

    READ_ONLY = "read-only"
    WRITABLE = "writable"
    COMMITTING = "committing"
    SWAPPING = "swapping"
    UNSETTLED = "unsettled"
    REBASING = "rebasing"


class SessionBase:
    """State and phases of a session, and what it says of itself."""

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
        self._phase = Phase.READ_ONLY if branch is None else Phase.WRITABLE
        self._since_us = since_us
        self._sent: SwapToken | None = None
        self._puts = core.packs()
        self._discards = 0
        self._lock = threading.Lock()

    @property
    def read_only(self) -> bool:
        """Whether it refuses writes; true for a writable session after its commit."""
        return self._phase is Phase.READ_ONLY

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
        return self._sent if self._phase is Phase.UNSETTLED else None

    @property
    def has_uncommitted_changes(self) -> bool:
        """Whether a commit would have something to say."""
        with self._lock:
            return not self._log.is_empty

    @property
    def config(self) -> RepositoryConfig:
        """The repository's configuration."""
        return self._core.config

    def status(self) -> Diff:
        """What a commit would change."""
        with self._lock:
            return Diff.of(self._log.changes())

    @property
    def _kind(self) -> str:
        return "a read-only session"

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

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SessionBase):
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
        SessionBase.__init__(self, state["core"], state["base"])

    def _summary(self) -> list[tuple[str, object]]:
        return [
            ("read_only", self.read_only),
            ("snapshot_id", self.snapshot_id),
            *(
                []
                if self.read_only
                else [("branch", self._branch), ("has_uncommitted_changes", self.has_uncommitted_changes)]
            ),
        ]

    def __repr__(self) -> str:
        return "\n".join(["<icechunk.session.Session>", *(f"{name}: {value}" for name, value in self._summary())])

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return fields_html("icechunk.session.Session", self._summary())


def absolute(path: str) -> str:
    if not path.startswith("/"):
        raise InvalidInputError(f"path {path!r} must start with '/'", ErrorKind.INVALID_PATH)
    return path.rstrip("/") or "/"
