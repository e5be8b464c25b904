"""One client's knowledge of ``repo`` in the repo-object layout.

Reads may overtake each other, so each takes a ticket, and the later one counts. A client's own change that landed
takes one too: an answer to a read that began before may be older.

The ops log of this layout is a list in ``repo``, and a chain of copies with older updates. An update that is not the
newest names the copy of ``repo`` in which it was. ``repo_before_updates`` is that of
the newest update that no longer fits: read from there, every update is found in order.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from icechunk.errors import ErrorKind, ObjectNotFoundError, RepositoryNotFoundError, SessionStateError
from icechunk.format.keys import REPO_KEY
from icechunk.format.repo.codec import decode_repo
from icechunk.format.repo.repo_info import RepoInfo, Update
from icechunk.format.repo.updates import UpdateList
from icechunk.log.repository.freshness import MAX_SKEW_US, clock_error_us, instant, store_time_us
from icechunk.log.repository.marker import cutoff_of, is_unfinished
from icechunk.log.repository.objects import RepoObject, known_of
from icechunk.log.repository.state import RepoState, from_repo_info
from icechunk.runtime.clock import Sources
from icechunk.runtime.late_dataclass import dataclass
from icechunk.storage.port import PutResult, Storage, Version
from icechunk.transfer.cache import WeightedCache

__all__ = ["LogReader", "RepoView", "Successors", "Window", "next_window"]


class LogReader(Protocol):
    """A client that reads the log that the repository was converted to, and whatever that is converted to."""

    ended_reason: str | None
    """The reason why nothing can be appended to it any more; None: it has not ended."""
    taken_over: bool
    """Whether its state cannot be brought up to date any more."""
    sealer: asyncio.Task[None] | None
    """Seals the log after a takeover; None: there was none."""
    files: WeightedCache[str, bytes]
    """Small files of the repository, to be read from memory."""

    @property
    def state(self) -> RepoState:
        """The newest folded state."""

    async def refresh(self) -> RepoState:
        """As `RepositoryLog.refresh`; where the log was taken over, the last state is returned."""

    async def find_file(self, key: str) -> bytes | None:
        """As `RepositoryLog.find_file`."""


class Successors(Protocol):
    """The layouts that a client continues in if the repository has, or still has, another one.

    Supplied from above, since layouts do not know one another.
    """

    async def open_log(self, files: WeightedCache[str, bytes]) -> LogReader | None:
        """Read the log that the repository was converted to; None where it is kept in no log now.

        ``files`` is where small files are kept in memory.
        """

    async def as_refs_say(self, info: RepoInfo) -> RepoInfo:
        """The contents of ``repo`` of an unfinished upgrade if it were written now, with the commits made since.

        Raises
        ------
        RepositoryNotFoundError
            There is no ``main`` of format 1 any more: the upgrade was finished meanwhile.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """A version of ``repo``, folded."""

    version: Version
    state: RepoState
    ticket: int
    unfinished: RepoInfo | None = None
    """Its contents, if it is that of an upgrade from format 1 that is not finished."""


class RepoView:
    """The newest version of ``repo`` that a client has seen.

    Parameters
    ----------
    found
        ``repo`` as read.
    successors
        To read the refs of an upgrade that is not finished.
    """

    def __init__(self, storage: Storage, sources: Sources, found: RepoObject, successors: Successors) -> None:
        self._storage = storage
        self._sources = sources
        self._successors = successors
        self._tickets = itertools.count(1)
        self._seen = _Seen(
            version=found.known.version,
            state=from_repo_info(found.info, gc_cutoff_us=cutoff_of(found.info.extra)),
            ticket=0,
            unfinished=found.info if is_unfinished(found.info) else None,
        )
        # Ticket of the newest change of ours that landed.
        self._landing = 0
        self._clock = instant(sources, found.asked.date_us)
        self.looked: int = 0
        """Ticket of the newest look at ``repo``: a refusal counts only by a look after the call (rule 3)."""
        self.ended_reason: str | None = None
        """The reason why this client does not change the repository any more: it was kept in a log; None: it still
        may."""

    @property
    def state(self) -> RepoState:
        """The newest state."""
        return self._seen.state

    @property
    def version(self) -> Version:
        """The version that it is the state of."""
        return self._seen.version

    @property
    def store_time_us(self) -> int:
        """As `RepositoryLog.store_time_us`."""
        now = instant(self._sources)
        return store_time_us(self._clock, now, resolution_us=self._storage.clock_resolution_us)

    def next_ticket(self) -> int:
        """A number that is higher than those of all looks and changes so far."""
        return next(self._tickets)

    async def read(self) -> bytes | None:
        """GET ``repo`` and adopt it; its bytes, or None where the repository has another layout by now.

        Raises
        ------
        RepositoryNotFoundError
            It is gone.
        FormatError
            It cannot be read.
        """
        ticket = -1
        while ticket < self._landing:
            # Again where a change of this client's landed meanwhile: the answer may be older than that, or newer.
            ticket = self.next_ticket()
            try:
                answer = await self._storage.get(REPO_KEY)
            except ObjectNotFoundError:
                raise RepositoryNotFoundError(
                    f"the repository in {self._storage.describe()} is gone: its object 'repo' was deleted"
                ) from None
            self._saw(answer.date_us)
            self.looked = max(self.looked, ticket)
        if ticket < self._seen.ticket:
            return answer.data
        if answer.version == self._seen.version:
            self._seen = replace(self._seen, ticket=ticket)
            return answer.data
        info = decode_repo(answer.data)
        known = known_of(info, answer.version, len(answer.data))
        if known.marker is not None and known.read_only:
            self.ended_reason = f"the repository in {self._storage.describe()} was converted to a log; open it again"
            return None
        # The official library drops `extra`, and the cutoff in it, which this client still knows.
        cutoff_us = max(cutoff_of(info.extra), self._seen.state.gc_cutoff_us)
        self._seen = _Seen(
            version=answer.version,
            state=from_repo_info(info, gc_cutoff_us=cutoff_us),
            ticket=ticket,
            unfinished=info if is_unfinished(info) else None,
        )
        return answer.data

    async def complete(self) -> None:
        """If an upgrade from format 1 is not finished, add the commits made in that format since (its refs count).

        Raises
        ------
        IcechunkError
            A ref, or a snapshot that it needs, cannot be read.
        """
        while (seen := self._seen).unfinished is not None:
            try:
                info = await self._successors.as_refs_say(seen.unfinished)
            except RepositoryNotFoundError:
                # It was finished while they were read.
                await self.read()
                if self._seen.version == seen.version:
                    raise
                continue
            if self._seen.version == seen.version:
                self._seen = replace(self._seen, state=from_repo_info(info))
                return

    def landed(self, put: PutResult, look: int, *, base: Version, state: RepoState) -> None:
        """A replacement of ``base`` by this state was acknowledged.

        Parameters
        ----------
        look
            The ticket of before the request.
        """
        self._saw(put.date_us)
        self.looked = max(self.looked, look)
        if self._seen.version == base:
            # A version that is being read now may be from before it landed.
            self._landing = self.next_ticket()
            self._seen = _Seen(version=put.version, state=state, ticket=self._landing)
        # Otherwise a look since has seen `repo` replaced: by this, and perhaps by others after it.

    def _saw(self, date_us: int | None) -> None:
        # With the clocks of now: the request may have begun long before, which would put the store's clock ahead.
        if date_us is not None:
            self._clock = instant(self._sources, date_us)

    def check_clock(self) -> None:
        """Refuse to write with a clock that is far off (rule 13). Raises `SessionStateError`."""
        error_us = clock_error_us(self._clock, instant(self._sources))
        if abs(error_us) > MAX_SKEW_US:
            raise SessionStateError(
                f"this machine's clock is {abs(error_us) // 1_000_000} s {'ahead of' if error_us > 0 else 'behind'} "
                f"the clock of {self._storage.describe()}; at most {MAX_SKEW_US // 1_000_000} s are accepted for "
                "writing. Set the clock",
                ErrorKind.SNAPSHOT_TIMESTAMP,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The part of the ops log that one ``repo`` holds."""

    updates: UpdateList
    """Newest first; those of the last swap have no copy yet."""
    before: str | None
    """Bare name of the copy with the updates before them; None: there are none."""


def next_window(
    fresh: Sequence[Update], stored: Sequence[Update], *, before: str | None, backup: str, limit: int
) -> Window:
    """The part that the next ``repo`` holds.

    Parameters
    ----------
    fresh
        Updates of this swap, newest first.
    stored, before
        Of the object that is replaced.
    backup
        Bare name of its copy.
    limit
        Most updates to hold; those of one swap stay together, even if they are more.
    """
    # Several updates of one swap share the copy that they are in; only the first of them was ever "the newest".
    lines = UpdateList.of(stored).with_backup(backup)
    room = max(0, limit - len(fresh))
    if len(lines) <= room:
        return Window(updates=lines.after(fresh), before=before)
    # The omitted updates begin where a copy begins, so none is listed twice.
    while room and lines[room].backup_path == lines[room - 1].backup_path:
        room -= 1
    return Window(updates=lines[:room].after(fresh), before=lines[room].backup_path)
