"""The engine of every layout: one queue, one attempt at a time, followed until its outcome is certain (rules 1 to 3).

`icechunk.storage.outcome.follow` is the loop that sends and looks; this module has the queue before it and the outcomes
after it. Writes without waiting callers are in `icechunk.log.repository.conditional`.

Callers wait in a queue. A task makes an attempt of as many of them as it can, sends it on the condition that its place
is unchanged, and looks at the place until the outcome is certain or the tries are used up. The task belongs to the log,
not to a caller, since a request must outlive a caller that gives up; an anyio task group would need a scope of the
caller's. It is started when a caller waits, held strongly, ends when no caller waits, and is awaited or cancelled in
`SwappedLog.aclose`.

Once a caller of an attempt has been told anything the attempt is *told*, and no byte of it is sent again. The next
attempt goes to the same place with its own bytes: at most one attempt for a place ever takes it, and a client that
finds the place taken recognises which one did. Example: the PUT times out, so the client looks. Its nonce is there:
landed. Another nonce: lost, for certain. Nothing is there: the PUT may still arrive, so the same bytes are sent again,
unless a caller has left.

A layout supplies the encoding (`_build`, `_make`), the condition (`_send`) and the recognition (`_look`, `_passed`).
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from types import MappingProxyType
from typing import Final, Generic, TypeVar

from icechunk.errors import (
    CommitOutcomeUnknown,
    ErrorKind,
    FormatError,
    IcechunkError,
    SessionStateError,
    StorageError,
)
from icechunk.format.ids import encode_id
from icechunk.log.repository.objects import put_once
from icechunk.log.repository.port import Proposal, Propose, RepositoryLog, TurnLock
from icechunk.log.repository.queue import MAX_EMBEDDED_BYTES, Attempt, Group, Waiting, proposal_of, resolve, tell_sent
from icechunk.log.repository.state import RepoState, apply
from icechunk.log.repository.store_check import require_writable
from icechunk.runtime.clock import Sources
from icechunk.runtime.tasks import finish_task
from icechunk.storage.outcome import ROUNDS, Fate, Outcome, Sending, follow
from icechunk.storage.port import Absent, Put, Storage

__all__ = ["CLOSE_GRACE_S", "SwappedLog"]

A = TypeVar("A", bound=Attempt)

_LONGEST_PAUSE_S: Final = 5.0
_SWAPS_AFTER_ONE_LOSS: Final = 4
_SWAPS_BY_LOSSES: Final = 32
_LEAST_SWAPS: Final = 2
"""Longest pauses of losers, in swaps: after one loss; after more, divided by their number; never less."""
CLOSE_GRACE_S: Final = 10.0
_MANY_TOLD: Final = 16
_OBSERVED: Final = 5
"""Swaps whose durations decide about pauses."""


_CLOSED_FIRST: Final = "the repository was closed first"


class SwappedLog(RepositoryLog, Generic[A]):
    """A repository log whose changes are conditional writes. Belongs to one event loop.

    Parameters
    ----------
    storage
        Where the log is.
    sources
        Clock, pauses and chance.
    embeds
        Whether the files of a call are embedded in its entry. Else they are put before it waits; if syncs are deferred,
        the attempt makes them durable.
    """

    def __init__(self, storage: Storage, sources: Sources, *, embeds: bool = False) -> None:
        self._storage = storage
        self._sources = sources
        self._embeds = embeds
        self.waiting: list[Waiting] = []
        """Callers that are in no attempt under way, first come, first served."""
        self._in_flight: A | None = None
        self._told: list[A] = []
        """Attempts that may still land, and are not sent again. They are kept only to notify their callers."""
        self.swapping: asyncio.Lock = asyncio.Lock()
        """Held while an attempt is made and settled."""
        self._losses = 0
        self._swaps_s: deque[float] = deque(maxlen=_OBSERVED)
        """Durations of the latest swaps, s."""
        self.closed: bool = False
        self.runner: asyncio.Task[None] | None = None
        """Swaps until no caller waits."""
        self._turns: dict[str, TurnLock] = {}
        self._expected: tuple[RepoState, list[Waiting], RepoState] | None = None

    # --------------------------------------------------------- what a layout supplies

    @abstractmethod
    def _begin_look(self) -> int:
        """Number a look that begins now, or a call that only later looks can answer."""

    @property
    @abstractmethod
    def _looked(self) -> int:
        """Number of the newest look that has shown the newest state."""

    @abstractmethod
    async def _look_anew(self) -> None:
        """Learn the newest state: a refusal counts only by a look after the call (rule 3)."""

    @abstractmethod
    async def _ready(self) -> None:
        """Check that this log can be written to and has the state for an attempt. Its errors end all appends."""

    @abstractmethod
    async def _build(self, waiting: Sequence[Waiting]) -> Group:
        """Validate waiting calls on the newest known state; a layout may take fewer than there are."""

    @abstractmethod
    async def _make(self, group: Group) -> A:
        """The attempt for a group that has members, on the state that they were validated on."""

    @abstractmethod
    async def _send(self, attempt: A, storage: Storage) -> bool:
        """Send it once, on its condition: True: it landed, and is folded; False: look.

        Parameters
        ----------
        storage
            Where requests are not tried again once the attempt is told.

        Raises
        ------
        IcechunkError, OSError
            No answer, or a refusal (`icechunk.storage.outcome.is_refusal`).
        """

    @abstractmethod
    async def _look(self, attempt: A) -> Fate:
        """Look at its place, fold what took it, and recognise the attempt. Never `Fate.REFUSED`.

        Raises
        ------
        IcechunkError, OSError
            The place cannot be read; `FormatError`: its contents cannot be understood.
        """

    @abstractmethod
    def _passed(self, attempt: A) -> bool:
        """Whether the newest known state says that its place was taken, so that looking at it decides."""

    def _landed(self, attempt: A) -> None:
        """An attempt of this client landed, and its callers have been told."""

    async def _lost(self) -> None:
        """Pause after ``_losses`` lost races in a row, if anything is to be sent again."""
        if self._losses > 1 and (await self._build(self.waiting)).members:
            await self._sources.sleep(self._pause_s())

    async def _refused_after_a_loss(self) -> None:
        """Pause before a caller learns that it lost a race, and that its events do not apply any more.

        The caller looks anew, and then writes: a pause between that look and the write would lose the next race.
        """
        await self._sources.sleep(self._pause_s())

    def _note_swap(self, took_s: float) -> None:
        """An attempt has landed, or is lost, after so long."""
        self._swaps_s.append(took_s)

    @property
    def _swap_s(self) -> float:
        """The usual duration of a swap, s: the median, since one may have been held up for hours; 0: unknown."""
        # Importing `statistics` would lengthen each start of a program by some milliseconds.
        return sorted(self._swaps_s)[(len(self._swaps_s) - 1) // 2] if self._swaps_s else 0.0

    def _pause_s(self) -> float:
        """A pause with full jitter, in proportion to the time of a swap.

        Once a second race is lost it may be long, so that few of a crowd write at the same time; the more races are
        lost, the shorter it is, so that none starves. The winner writes again two round trips later. A loser that
        begins at any time between has a chance to be first, but without a pause it is always a little late.
        """
        return min(_LONGEST_PAUSE_S, self._most_swaps() * self._swap_s) * self._sources.fraction()

    def _most_swaps(self) -> float:
        """The longest pause, in swaps."""
        return _SWAPS_AFTER_ONE_LOSS if self._losses < 2 else max(_LEAST_SWAPS, _SWAPS_BY_LOSSES / self._losses)

    @property
    def embed_limit_bytes(self) -> int:
        return MAX_EMBEDDED_BYTES if self._embeds or self._storage.defers_syncs else 0

    # ------------------------------------------------------------------------- callers

    async def append(
        self,
        proposal: Proposal | Propose,
        *,
        since_us: int | None = None,
        deadline_s: float | None = None,
        files: Mapping[str, bytes] = MappingProxyType({}),
    ) -> RepoState:
        """As `RepositoryLog.append`."""
        require_writable(self._storage, "change the repository")
        if not self._embeds and self._storage.defers_syncs:
            await self._storage.put_unsynced([Put(key, data, Absent()) for key, data in files.items()])
        elif not self._embeds:
            for key, data in files.items():
                await put_once(self._storage, key, data)
        if self.closed:
            raise SessionStateError("the repository is closed; open it again")
        one = Waiting(
            proposal=proposal_of(proposal),
            since_us=since_us,
            outcome=asyncio.get_running_loop().create_future(),
            files=files if self._embeds or self._storage.defers_syncs else {},
            asked=self._begin_look(),
        )
        self.waiting.append(one)
        try:
            one.proposal.queued()
            if self.runner is None or self.runner.done():
                self.runner = asyncio.get_running_loop().create_task(self._run(), name="icechunk swaps")
            # Not `wait_for`: the future is the runner's, a caller that leaves must not cancel it.
            await asyncio.wait({one.outcome}, timeout=deadline_s)
        finally:
            if not one.outcome.done():
                one.abandoned = True
                if one in self.waiting:
                    self.waiting.remove(one)
        if one.outcome.done():
            if one.lost and one.outcome.exception() is not None and deadline_s is None:
                await self._refused_after_a_loss()
            state = one.outcome.result()
            if not self._embeds and not one.landed:
                # It proposed nothing, so no attempt has made its files durable.
                await self._storage.sync(one.files)
            return state
        if not one.attempts:
            raise StorageError(
                f"cannot change the repository in {self._storage.describe()}: the deadline of {deadline_s} s passed "
                "before anything was sent; nothing landed",
                ErrorKind.UPDATE_ATTEMPTS_EXHAUSTED,
            )
        raise self._unknown(one, f"the deadline of {deadline_s} s passed first")

    def _unknown(self, one: Waiting, why: object) -> CommitOutcomeUnknown:
        token = one.token
        snapshots = () if token is None else token.snapshots
        what = ", ".join(encode_id(snapshot) for snapshot in snapshots) or "a change"
        return CommitOutcomeUnknown(
            f"it is not known whether {what} landed in the repository in {self._storage.describe()}: {why}. "
            "Repository.settle_async(error.token) finds out, or makes failure certain",
            token,
        )

    def turn(self, branch: str) -> TurnLock | None:
        return self._turns.setdefault(branch, TurnLock())

    async def next_outcome(self) -> None:
        # The task that swaps may not have begun.
        await asyncio.sleep(0)
        async with self.swapping:
            pass

    def expected(self) -> RepoState:
        attempt = self._in_flight
        base = self.state if attempt is None or attempt.is_told else attempt.state
        known_base, done, state = self._expected or (base, [], base)
        if known_base is not base or self.waiting[: len(done)] != done:
            done, state = [], base
        for one in self.waiting[len(done) :]:
            with suppress(Exception):  # refused: its caller gets the error when its turn comes
                after = state
                for event in one.proposal.events(state):
                    after = apply(after, event, time_us=0, since_us=one.since_us)
                state = after
        self._expected = base, self.waiting[:], state
        return state

    async def aclose(self) -> None:
        """Stop. Calls that were not sent end with that error, calls that stay uncertain with `CommitOutcomeUnknown`."""
        if self.closed:
            return
        self.closed = True
        waiting, self.waiting = self.waiting, []
        for one in waiting:
            self._give_up(one, _closed(), _CLOSED_FIRST)
        await finish_task(self.runner, CLOSE_GRACE_S)

    # --------------------------------------------------------------------------- swaps

    async def _run(self) -> None:
        """Swap until no caller waits."""
        try:
            while self.waiting:
                async with self.swapping:
                    await self._swap_next()
        except asyncio.CancelledError:
            self._fail_all(_closed(), _CLOSED_FIRST)
            raise
        except Exception as error:
            self._fail_all(error)

    async def _swap_next(self) -> None:
        await self._ready()
        attempt = await self._next_attempt()
        if attempt is None:
            return
        self._in_flight = attempt
        began_us = self._sources.elapsed_us()
        settled = await self._follow(attempt)
        took_s = max(0, self._sources.elapsed_us() - began_us) / 1e6
        self._in_flight = None
        match settled.fate:
            case Fate.LANDED | Fate.LOST:
                self._note_swap(took_s)
                await self._decided(attempt, settled.fate)
            case Fate.REFUSED:
                assert settled.why is not None
                self._close(attempt, Fate.REFUSED)
                self._refused(attempt, settled.why)
            case Fate.OPEN:
                if attempt.is_told and not settled.used_up:
                    # The others' events go to the same place in an attempt of their own.
                    self._wait_again(attempt)
                else:
                    for member in attempt.members:
                        resolve(member.waiting, self._unknown(member.waiting, settled.why))
                self._remember_told(attempt)
            case Fate.UNDECIDED:
                for member in attempt.members:
                    resolve(member.waiting, self._unknown(member.waiting, settled.why))
        if settled.used_up:
            # The store would not answer waiting calls either; failing now shows them that nothing of theirs was sent.
            self._fail_all(SessionStateError(f"nothing was sent, nothing landed; try again: {settled.why}"))

    async def _next_attempt(self) -> A | None:
        """Validate waiting calls, and make the attempt of those whose events apply; None where none do.

        There is no await between the last look at the queue and the tokens: a caller that leaves later has its token.
        """
        looked = False
        while True:
            await self._recall()
            waiting = [one for one in self.waiting if one.asked < self._looked] if looked else self.waiting
            group = await self._build(waiting)
            if any(one.asked > self._looked for one, _ in group.refused):
                # The caller may build upon an entry, or want to delete a ref, that this client has not read yet.
                await self._look_anew()
                looked = True
                continue
            attempt = None
            if group.members:
                try:
                    attempt = await self._make(group)
                except Exception as error:
                    # Something that cannot be encoded: nothing was sent, and later calls are not affected.
                    group.refused += [(member.waiting, error) for member in group.members]
                    group.members = []
            left = any(member.waiting.abandoned for member in group.members)
            if not left and not any(map(self._passed, self._told)):
                break
        decided = {id(member.waiting) for member in group.members}
        decided |= {id(one) for one, _ in group.refused} | {id(one) for one in group.nothing}
        self.waiting = [one for one in self.waiting if id(one) not in decided]
        for one, reason in group.refused:
            self._give_up(one, reason)
        for one in group.nothing:
            resolve(one, self.state)
        if attempt is not None:
            attempt.members = tuple(group.members)
            files = () if self._embeds else group.files
            attempt.unsynced = (*files, *(key for one in group.members for key in one.waiting.proposal.unsynced))
            for member in group.members:
                member.waiting.attempts.append(attempt)
                tell_sent(member.waiting)
        return attempt

    async def _follow(self, attempt: A) -> Outcome:
        """Send an attempt, and look, until its outcome is certain, a caller has left, or the tries are used up.

        ``used_up`` says that the store would not answer other calls either.
        """
        write = _AttemptWrite(self, attempt)
        outcome = await follow(write)
        if outcome.fate is not Fate.OPEN or not outcome.used_up or isinstance(outcome.why, FormatError):
            return outcome
        if write.ended_by_caller:
            return replace(outcome, used_up=False)
        if not outcome.may_land:
            return replace(outcome, fate=Fate.REFUSED)
        silence = StorageError(
            f"no certain answer from {self._storage.describe()} after {ROUNDS} tries ({outcome.why})",
            ErrorKind.OBJECT_STORE,
        )
        silence.__cause__ = outcome.why
        return replace(outcome, why=silence)

    # ------------------------------------------------------- notifying callers of outcomes

    async def _decided(self, attempt: A, fate: Fate) -> None:
        self._close(attempt, fate)
        if fate is Fate.LANDED:
            self._losses = 0
            # At most one attempt for a place lands.
            for other in [told for told in self._told if told.place == attempt.place]:
                self._told.remove(other)
                self._close(other, Fate.LOST)
            self._landed(attempt)
            return
        self._wait_again(attempt)
        await self._recall()
        self._losses += 1
        await self._lost()

    def _remember_told(self, attempt: A) -> None:
        self._told.append(attempt)
        # An attempt whose callers have all left need not be remembered: their token is enough to settle it.
        left = [told for told in self._told if not any(member.waiting in self.waiting for member in told.members)]
        for told in left[:-_MANY_TOLD]:
            self._told.remove(told)

    async def _recall(self) -> None:
        """Find out the outcome of told attempts whose places have been taken."""
        for attempt in [told for told in self._told if self._passed(told)]:
            try:
                fate = await self._look(attempt)
            except (IcechunkError, OSError):
                fate = Fate.UNDECIDED
            self._told.remove(attempt)
            self._close(attempt, fate)

    def _close(self, attempt: A, fate: Fate) -> None:
        """An attempt is not under way any more: notify the callers whose outcome that decides."""
        for member in attempt.members:
            one = member.waiting
            match fate:
                case Fate.LANDED:
                    one.landed = True
                    resolve(one, self.state)
                case Fate.LOST | Fate.REFUSED:
                    if attempt in one.attempts:
                        one.attempts.remove(attempt)
                        one.lost = fate is Fate.LOST
                        if not one.attempts and not one.landed:
                            tell_sent(one)
                case _:
                    # Its events may be part of history, so they are not proposed again.
                    resolve(one, self._unknown(one, "its place was taken, and it cannot be found out any more by what"))
        self.waiting = [one for one in self.waiting if not one.outcome.done()]

    def _wait_again(self, attempt: A) -> None:
        """Put the calls that still wait back in front; the events of a caller that left are not sent again."""
        self.waiting[:0] = [
            member.waiting
            for member in attempt.members
            if not member.waiting.abandoned and not member.waiting.outcome.done()
        ]

    def _refused(self, attempt: A, error: Exception) -> None:
        """End the calls of a refused attempt. Where objects were lost, those end that may have referred to some; the
        others wait for the next attempt."""
        # Where files are not embedded, an attempt has others that all of its calls need.
        lost = isinstance(error, StorageError) and error.lost and self._embeds
        spared = [m.waiting for m in attempt.members if lost and not m.waiting.proposal.unsynced]
        for member in attempt.members:
            if member.waiting not in spared:
                self._give_up(member.waiting, error)
        self.waiting[:0] = [one for one in spared if not one.abandoned and not one.outcome.done()]

    def _give_up(self, one: Waiting, error: Exception, why: str | None = None) -> None:
        """End a caller's append with an error, or as unknown where an attempt with its events may still land.

        ``why``: the reason of the latter; None: the error.
        """
        resolve(one, self._unknown(one, why or error) if one.attempts else error)

    def _fail_all(self, error: Exception, why: str | None = None) -> None:
        attempt, self._in_flight = self._in_flight, None
        if attempt is not None:
            self._remember_told(attempt)
            for member in attempt.members:
                resolve(member.waiting, self._unknown(member.waiting, why or error))
        waiting, self.waiting = self.waiting, []
        for one in waiting:
            self._give_up(one, error, why)

    async def tell_told(self) -> None:
        """Tell the callers of told attempts whose places the last look has shown to be taken."""
        if self._told and not self.swapping.locked():
            async with self.swapping:
                await self._recall()


def _closed() -> SessionStateError:
    return SessionStateError("the repository was closed before anything was sent; nothing landed")


class _AttemptWrite(Sending, Generic[A]):
    """An attempt as the engine sends it: not again once one of its callers has been told anything."""

    def __init__(self, log: SwappedLog[A], attempt: A) -> None:
        super().__init__(log._sources)
        self._log = log
        self._attempt = attempt
        self._storage = log._storage.for_sender(attempt)
        self.ended_by_caller = False
        """Whether it was not sent again because of a caller."""

    async def put(self) -> bool:
        try:
            return await self._log._send(self._attempt, self._storage)
        except StorageError as error:
            if error.lost:
                for member in self._attempt.members:
                    if member.waiting.proposal.unsynced:
                        member.waiting.proposal.lost()
            raise

    async def fate(self, may_land: bool) -> Fate:
        return await self._log._look(self._attempt)

    async def again(self, reached: bool) -> bool:
        if not await super().again(reached):
            return False
        self.ended_by_caller = self._attempt.is_told
        return not self.ended_by_caller
