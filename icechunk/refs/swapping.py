"""The one entry in flight: rules 1 to 4 for one client.

Theory: callers wait in an `AppendQueue`. Its task makes an entry of as many of them as it can, sends it, and settles
it before it touches the next one.

Owns the queue, and at most one unsettled attempt. Whoever sends an entry holds ``queue.swapping``.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Final

from icechunk.errors import (
    CommitOutcomeUnknown,
    ErrorKind,
    IcechunkError,
    InvalidInputError,
    SessionStateError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT
from icechunk.format.keys import snapshot_key
from icechunk.refs import events as e
from icechunk.refs.append_queue import AppendQueue, resolve, tell_sent
from icechunk.refs.base import SwapToken
from icechunk.refs.checkpointing import Checkpointing
from icechunk.refs.commit_queue import Attempt, Group, Waiting, attempt_of, build
from icechunk.refs.entry import encode_events, slot_key
from icechunk.refs.log_reader import Opened, RepoObject, instant, read_slot
from icechunk.refs.log_view import LogView
from icechunk.refs.marker import state_of
from icechunk.refs.ops_log import any_in_history
from icechunk.refs.proof import MAX_SKEW_US, clock_error_us, still_proves
from icechunk.refs.state import MAIN, RepoState, apply
from icechunk.refs.store_check import StoreCheck, may_write
from icechunk.refs.swap import Landed, Lost, backoff_s, settle_attempt
from icechunk.tasks import finish_task

__all__ = ["Swapping"]

_LOG: Final = logging.getLogger(__name__)


class Swapping:
    """The swaps of one client. Belongs to one event loop."""

    def __init__(self, view: LogView, checkpointing: Checkpointing) -> None:
        self._view = view
        self._checkpointing = checkpointing
        self._store_check = StoreCheck(view.storage)
        self.queue = AppendQueue(self._swap_next, view.storage, view.begin_look, files_ride=True)
        self._unsettled: Attempt | None = None
        self._losses = 0
        self._expected: tuple[RepoState, list[Waiting], RepoState] = (view.state, [], view.state)
        self.preparation: asyncio.Task[None] | None = None
        """Checks the store before anybody swaps."""
        self.wrote = False
        """Whether an entry of this client has landed."""

    def prepare_soon(self) -> None:
        """Check the store in the background, where that was not done yet and may be."""
        if self.preparation is None and not self._store_check.done and may_write(self._view.storage):
            self.preparation = asyncio.get_running_loop().create_task(self._prepare(), name="icechunk store check")

    async def _prepare(self) -> None:
        # A head start only: the first swap tells what is wrong.
        with suppress(IcechunkError, OSError):
            await self.check_store()

    def expected(self) -> RepoState:
        """The state in which everything that waits, or is under way, has landed; for building upon only."""
        base = self._view.state if self._unsettled is None else self._unsettled.state
        waiting = self.queue.waiting
        known_base, done, state = self._expected
        if known_base is not base or waiting[: len(done)] != done:
            done, state = [], base
        for one in waiting[len(done) :]:
            with suppress(Exception):  # refused: whoever proposed it is told when its turn comes
                after = state
                for event in one.propose(state):
                    after = apply(after, event, time_us=0, since_us=one.since_us)
                state = after
        self._expected = base, waiting[:], state
        return state

    async def finish(self, grace_s: float) -> None:
        """Send none any more; wait for the one under way."""
        await self.queue.aclose()
        await finish_task(self.preparation, grace_s)

    # ------------------------------------------------------------------ swaps

    async def _swap_next(self) -> None:
        await self.check_store()
        await self._settle_unsettled()
        if not still_proves(self._view.proof, instant(self._view.sources)):
            await self._view.reopen()
        await self._require_open()
        self._check_clock()
        group = await self._take_group()
        if group.members:
            await self._swap(group)

    async def _require_open(self) -> None:
        if self._view.state.sealed and self._view.left is None:
            await self._view.leave_sealed()
        if self._view.left is not None:
            raise SessionStateError(self._view.left)

    async def _take_group(self) -> Group:
        """Validate those who wait, and make the attempt for those who stand."""
        view = self._view
        time_us = max(view.sources.wall_us(), 0)
        group = build(view.state, self.queue.waiting, time_us=time_us)
        if any(one.asked > view.looked for one, _ in group.refused):
            # Rule 3: what this client has not heard of yet may be what the caller builds upon, or wants gone.
            await view.refresh()
            await self._require_open()
            time_us = max(view.sources.wall_us(), 0)
            group = build(view.state, [one for one in self.queue.waiting if one.asked < view.looked], time_us=time_us)
        if group.members:
            self._unsettled = self._attempt(group, time_us)
        # Those who were looked at stand in front: who comes later has a higher number.
        del self.queue.waiting[: group.taken]
        for waiting, error in group.refused:
            resolve(waiting, error)
        for waiting in group.nothing:
            resolve(waiting, view.state)
        return group

    def _attempt(self, group: Group, time_us: int) -> Attempt:
        return attempt_of(
            group,
            epoch=self._view.head.epoch,
            n=self._view.head.n + 1,
            nonce=self._view.sources.random_bytes(16),
            time_us=time_us,
            before=self._view.state,
            proof=self._view.proof,
        )

    async def _swap(self, group: Group) -> None:
        attempt = self._unsettled
        assert attempt is not None
        self.queue.sent = tuple(group.members)
        for member in group.members:
            tell_sent(member.waiting, member.waiting.token)
        if await self._settle_attempt(attempt, first_look=False):
            self._losses = 0
            for member in group.members:
                resolve(member.waiting, self._view.state)
            self.queue.sent = ()
            self._checkpointing.spawn_if_due()
            return
        self._losses += 1
        if self._losses > 1 and self._view.left is None:
            # Far behind, or in a crowd: learn the rest at once, and step aside for a moment.
            await self._view.sources.sleep(backoff_s(self._view.sources, self._losses))
            await self._view.refresh()

    async def _settle_unsettled(self) -> None:
        """No other bytes and no other slot before the last attempt is settled (rule 2)."""
        if self._unsettled is not None:
            await self._settle_attempt(self._unsettled, first_look=True)

    async def _settle_attempt(self, attempt: Attempt, *, first_look: bool) -> bool:
        """Whether the attempt landed; the slot is folded either way. `CommitOutcomeUnknown` leaves it unsettled."""
        view = self._view
        look = view.begin_look()
        verdict = await settle_attempt(
            view.storage,
            view.sources,
            attempt,
            reopen=view.reopen,
            in_history=self._in_history,
            saw=view.saw,
            first_look=first_look,
        )
        match verdict:
            case Landed(proof=proof):
                self.wrote = True
                view.fold_own(
                    epoch=attempt.epoch,
                    n=attempt.n,
                    data=attempt.data,
                    files=attempt.files,
                    before=attempt.before,
                    after=attempt.state,
                    proof=proof,
                )
                view.carried.put_soon(attempt.n)
                if proof is not None:
                    view.end_look(look)
            case Lost(taken_by=taken_by):
                _LOG.debug("slot %d of %s went to another writer", attempt.n, view.storage.describe())
                if taken_by is not None and view.head.epoch == attempt.epoch:
                    view.advance(taken_by)
                self.queue.lost(attempt.members)
        if self._unsettled is attempt:
            self._unsettled = None
        return isinstance(verdict, Landed)

    async def _in_history(self, attempt: Attempt, opened: Opened | RepoObject) -> bool:
        """Also in what was opened, which is not adopted where the log has ended."""
        found = state_of(opened.info, None) if isinstance(opened, RepoObject) else opened.head.state
        for state in (self._view.state, found):
            if await any_in_history(self._view.storage, state, attempt.snapshots):
                return True
        return False

    # ------------------------------------------------------------------ checks

    async def check_store(self) -> None:
        """See that the store honours ``If-None-Match`` (rule 1); errors as `RepositoryLog.prepare_writes`."""
        head = self._view.head
        candidates = [snapshot_key(FIRST_SNAPSHOT)]
        if head.n:
            candidates.append(slot_key(head.epoch, head.n))
        await self._store_check.run((*candidates, snapshot_key(head.state.branches[MAIN])), self._view.standing)

    def _check_clock(self) -> None:
        error_us = clock_error_us(self._view.seen, instant(self._view.sources))
        if abs(error_us) > MAX_SKEW_US:
            raise SessionStateError(
                f"this machine's clock is {abs(error_us) // 1_000_000} s {'ahead of' if error_us > 0 else 'behind'} "
                f"the clock of {self._view.storage.describe()}; at most {MAX_SKEW_US // 1_000_000} s are accepted for "
                "writing. Set the clock",
                ErrorKind.SNAPSHOT_TIMESTAMP,
            )

    # ------------------------------------------------------------------ settle

    async def settle(self, token: SwapToken) -> bool:
        """As `RepositoryLog.settle`."""
        view = self._view
        async with self.queue.swapping:
            try:
                await self._settle_unsettled()
            except CommitOutcomeUnknown as error:
                raise StorageError(f"cannot settle yet, call again: {error}") from error
            await view.refresh()
            while True:
                if await any_in_history(view.storage, view.state, token.snapshots):
                    return True
                if token.epoch != view.head.epoch or view.left is not None or token.n <= view.head.n:
                    return await self._settle_by_slot(token)
                if token.n > view.head.n + 1:
                    raise InvalidInputError(
                        f"the token names slot {token.n}, but the log in {view.storage.describe()} ends at slot "
                        f"{view.head.n}: it belongs to another repository"
                    )
                # The slot is next, and empty: fill it, and whatever is on its way finds it taken.
                await self._fill_slot(token)

    async def _settle_by_slot(self, token: SwapToken) -> bool:
        """The slot is behind the head, or in a log that has ended: nothing new lands there."""
        if token.snapshots:
            # History has been asked, and knows none of them: another entry stands there, ours was void as a whole, or
            # it is in a log that was taken over.
            return False
        found = await read_slot(self._view.storage, token.epoch, token.n)
        if found is not None:
            ours = found[0].nonce == token.nonce
            return ours and not (token.epoch == self._view.head.epoch and token.n in self._view.head.voided)
        raise CommitOutcomeUnknown(
            f"slot {token.n} of the log in {self._view.storage.describe()} has been pruned; look whether the change "
            "is there",
            token,
        )

    async def _fill_slot(self, token: SwapToken) -> None:
        """Put a void entry into the next slot, or see it taken; for holders of ``_one_at_a_time``."""
        await self.check_store()
        group = Group(state=self._view.state, events=encode_events((e.Void(nonce=token.nonce),)))
        self._unsettled = self._attempt(group, max(self._view.sources.wall_us(), 0))
        try:
            await self._settle_attempt(self._unsettled, first_look=False)
        except CommitOutcomeUnknown as error:
            raise StorageError(f"cannot settle yet, call again: {error}") from error
