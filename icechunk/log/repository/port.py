"""The port of the repository log, the same for every layout: the newest folded state, and one way to add to it.

One instance belongs to one repository and one event loop, and owns the newest state that this loop knows.
Others read `RepositoryLog.state`; only `refresh` and `append` replace it, and it never goes back.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Collection, Container, Iterable, Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import TypeAlias

from icechunk.format.ids import ObjectId
from icechunk.format.repo.repo_info import Update
from icechunk.log.repository.events import Event
from icechunk.log.repository.state import RepoState
from icechunk.runtime.late_dataclass import dataclass
from icechunk.transfer.cache import WeightedCache

__all__ = ["FILES_BYTES", "MAX_FILES", "Layout", "Proposal", "Propose", "RepositoryLog", "SwapToken", "TurnLock"]

FILES_BYTES = 16 * 1024 * 1024
MAX_FILES = 8192
"""Number of small files that are kept in memory for a repository, at most."""


class Layout(StrEnum):
    """The form in which the repository log is persisted."""

    LOG = "log"
    """One new object per entry; ``repo`` is a checkpoint that the official library opens read-only."""
    REPO = "repo"
    """Format 2.1 as published: every change replaces ``repo``."""
    REFS = "refs"
    """Format 1: one ``ref.json`` per branch and tag."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapToken:
    """Names a change whose outcome is not known; picklable, and valid in any process."""

    epoch: str
    """Name, with ``n``, of the place that its attempts were made for: a life of the log, a version of ``repo``, a ref's
    key."""
    n: int = 0
    """Slot of the log; 0 in other layouts."""
    nonces: tuple[bytes, ...]
    """Nonces of the attempts that held the caller's events; at most one of them landed."""
    times_us: tuple[int, ...] = ()
    """Times, µs, of the newest event of each of these attempts, where the layout recognises them by it."""
    snapshots: tuple[ObjectId, ...] = ()
    """New snapshots of the caller's events: in the graph exactly if they landed."""
    known_us: int | None = None
    """Store time at which the place was known to be free; None if answers have no date."""


Propose: TypeAlias = Callable[[RepoState], Sequence[Event]]
"""As `Proposal.events`, for callers that need not learn the outcome before `RepositoryLog.append` returns."""


class Proposal(ABC):
    """Events that are to happen, with a caller that learns when they are sent. All methods must be quick."""

    @abstractmethod
    def events(self, state: RepoState) -> Sequence[Event]:
        """The proposed events, from the newest state. Pure; an error ends the append, with nothing landed."""

    @property
    def unsynced(self) -> Collection[str]:
        """Keys of a few objects that the events refer to, and that `Storage.put_unsynced` has written: the log makes
        them durable before the events."""
        return ()

    def lost(self) -> None:  # noqa: B027
        """Some of ``unsynced`` may be lost, so the events must not be sent again. Also called after `append` was
        cancelled."""

    def queued(self) -> None:  # noqa: B027
        """The events are in the queue, so that `RepositoryLog.expected` shows them."""

    def sent(self, token: SwapToken | None) -> None:  # noqa: B027
        """An entry with the events, which ``token`` names, is about to be sent; None: it is certainly lost.

        Also called after `append` was cancelled or has raised. So a cancelled caller knows whether the outcome is open:
        after None, or without any call, nothing landed, nor will (an abandoned call is not sent again). Errors are
        logged.
        """


class TurnLock(asyncio.Lock):
    """Held by the commit to a branch that is being made."""

    in_a_row: int = 0
    """Commits that were made since the event loop last had its turn."""


class RepositoryLog(ABC):
    """The log of one repository, for one event loop."""

    layout: Layout

    @property
    @abstractmethod
    def state(self) -> RepoState:
        """The newest folded state that this instance knows."""

    @property
    @abstractmethod
    def store_time_us(self) -> int:
        """The store's clock now, or a little less, µs: files written from now on are not older (rule 10)."""

    @property
    def spec_version(self) -> int:
        """Version of the format that snapshots and manifests of this repository are written in: 1 or 2."""
        return 1 if self.layout is Layout.REFS else 2

    @property
    def embed_limit_bytes(self) -> int:
        """So many bytes of files may go with one `append` at no cost; 0: they are better written before."""
        return 0

    @property
    def ended_reason(self) -> str | None:
        """The reason why this instance only reads: the repository was converted, or another client took it over.

        None: as far as is known by the last look, it still may append.
        """
        return None

    def share_files(self, files: WeightedCache[str, bytes]) -> None:  # noqa: B027
        """Keep small files that come with the log there, by key, for all loops and threads of the repository."""

    def embedded_file(self, key: str) -> bytes | None:
        """A file embedded in the log that has no object yet, as far as this instance knows; None: it knows of none."""
        return None

    async def find_file(self, key: str) -> bytes | None:
        """A file that has no object of its own yet; None where there is none of that name either."""
        return None

    @abstractmethod
    async def refresh(self) -> RepoState:
        """Learn everything up to the end of the log as it is now, and return the state there.

        Includes everything that was acknowledged to any client before the call, also after a conversion to the other
        layout of format 2. One round trip where little happened.

        Raises
        ------
        SessionStateError
            Another library took the log over, so that the repository goes on from an older state than the one that this
            instance has returned: open it again.
        """

    async def refresh_in_turn(self) -> RepoState:
        """As `refresh`, for a caller that is going to write: where many clients write, not before its turn."""
        return await self.refresh()

    async def name_refs(self, *, branches: Iterable[str] = (), tags: Iterable[str] = ()) -> RepoState:
        """See to it that the state shows the refs of these names that exist, also where refs cannot be listed.

        Nothing happens where all refs are known anyway.
        """
        return self.state

    def require_all_refs(self) -> None:  # noqa: B027
        """Refuse to go on where the state shows only the refs that were named.

        Raises
        ------
        StorageError
            Why the others are not known: they cannot be listed.
        """

    async def learn(
        self, snapshots: Iterable[ObjectId], *, ancestry: bool = False, until: Container[ObjectId] = ()
    ) -> RepoState:
        """See to it that the state's graph has these snapshots, and with ``ancestry`` all that they descend from, each
        line of them up to the first one in ``until``.

        In layouts whose graph is always whole nothing happens, and nothing is looked for. In format 1 the
        files are read.

        Raises
        ------
        SnapshotNotFoundError
            There is no such file.
        """
        return self.state

    @abstractmethod
    async def append(
        self,
        proposal: Proposal | Propose,
        *,
        since_us: int | None = None,
        deadline_s: float | None = None,
        files: Mapping[str, bytes] = MappingProxyType({}),
    ) -> RepoState:
        """Make events happen, all or none.

        The events are asked for on the newest known state, and again whenever another writer was first; they
        must apply one after the other (`icechunk.log.repository.state.apply`). An empty sequence lands nothing.
        Calls that wait at the same time share one entry; each is validated after the ones before. One that is refused
        does not touch the others, and one that does not apply after the others waits until they have landed or not.

        Parameters
        ----------
        proposal
            The events, as an object that learns when they are sent, or as a function. Asked any number of times.
        since_us
            Store time, µs, not later than the Last-Modified of anything that the events add; None where they
            add no files.
        deadline_s
            Seconds until the call ends with an unknown outcome; None: it waits until the outcome is certain.
        files
            Immutable files that the events add and that are not written yet, by key. The log makes them as durable
            as the events; up to `embed_limit_bytes` of them that costs no round trip.

        Returns
        -------
        RepoState
            The state in which these events, and everything before them, have been folded.

        Raises
        ------
        IcechunkError
            The error that the proposal raised, or the precondition that did not hold (`ConflictError`,
            `AlreadyExistsError`, `RefNotFoundError`, `SnapshotNotFoundError`, `ReadOnlyError` …): nothing landed,
            nor will.
        CommitOutcomeUnknown
            The deadline passed, or the log was closed, with the entry sent and not settled; see `settle`.

        A refusal holds for the log as it was at some time after the call: where this instance has not looked since,
        it looks before it refuses. A cancelled call leaves the queue if its entry has not been sent; afterwards the
        entry goes on without it, and the proposal has received its token (`Proposal.sent`).
        """

    def turn(self, branch: str) -> TurnLock | None:
        """A lock to hold while a commit is built upon `expected`, until it is queued; None: this log has no such
        queue."""
        return None

    def expected(self) -> RepoState:
        """The state in which everything that waits in the queue has landed.

        For building upon, so that commits of one process follow one another in one entry. It may never come about;
        changes that were built upon it are refused then.
        """
        return self.state

    async def next_outcome(self) -> None:  # noqa: B027
        """Wait until the swap that is under way, or begins now, has landed or not; nothing where none is."""

    def prepare_writes_soon(self) -> None:  # noqa: B027
        """Begin with `prepare_writes` in the background, when a write is likely."""

    @property
    def writes_prepared(self) -> bool:
        """Whether `prepare_writes` surely has nothing left to do."""
        return False

    async def prepare_writes(self) -> None:  # noqa: B027
        """Make the requests that the first `append` would wait for; call it while uploads are under way.

        Raises
        ------
        StorageError
            The store cannot be written to safely (kind ``storage-config``), or gives no answer.
        """

    @abstractmethod
    async def settle(self, token: SwapToken) -> bool:
        """Find out whether the swap landed (True), or make it certain that it never will (False).

        Raises
        ------
        CommitOutcomeUnknown
            Nothing tells any more: the change adds no snapshot, and its place was reused, or cannot be recognised.
        SessionStateError
            The token is of a layout that the repository was converted to since it was opened: open it again.
        InvalidInputError
            The token is of another repository.
        StorageError
            The store gives no certain answer; call again.
        """

    @abstractmethod
    async def checkpoint(self) -> None:
        """Write the folded state for other readers of the format, where they have an older one.

        Never needed for correctness. In layouts that have none, nothing happens.
        """

    @abstractmethod
    def updates(self) -> AsyncIterator[Update]:
        """Everything that ever happened to the repository, newest first (the ops log)."""

    @abstractmethod
    async def aclose(self) -> None:
        """Try a last checkpoint and stop. Appends that are not certain end with `CommitOutcomeUnknown`.

        No task is left. The instance refuses to append afterwards; its state stays readable.
        """
