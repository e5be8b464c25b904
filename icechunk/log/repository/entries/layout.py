"""The log layout: one new object per entry, created where there is none. Creating slot n+1 *is* the commit.

Theory: the rules of ``spec/repository-log.md``, cited beside each check. Who owns what, each for one client, that is
one instance on one event loop:

- `icechunk.log.repository.entries.client.LogView`: the head (the newest folded state), the proof of how old its
  knowledge of the end is, ``repo`` as last seen, and whether the log has ended;
- `icechunk.log.repository.queue.AppendQueue`: who waits, and the task that swaps, as in the other layouts;
- `icechunk.log.repository.entries.layout.Swapping`: the entry in flight, at most one of which is unsettled;
- `icechunk.log.repository.entries.checkpoint_schedule.Checkpointing`: the task that writes checkpoints.

This module puts them together and says when they begin and end.

The one entry in flight: rules 1 to 4 for one client.

Theory: callers wait in an `AppendQueue`. Its task makes an entry of as many of them as it can, sends it, and settles
it before it touches the next one.

Owns the queue, and at most one unsettled attempt. Whoever sends an entry holds ``queue.swapping``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from types import MappingProxyType
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
from icechunk.format.repo.values import Update
from icechunk.log.repository import events as e
from icechunk.log.repository.entries.checkpoint_schedule import Checkpointing
from icechunk.log.repository.entries.client import LogView
from icechunk.log.repository.entries.entry import encode_events, slot_key
from icechunk.log.repository.entries.reader import (
    MAX_SKEW_US,
    Opened,
    RepoObject,
    clock_error_us,
    instant,
    read_slot,
    still_proves,
)
from icechunk.log.repository.entries.takeover import Stranded
from icechunk.log.repository.marker import state_of
from icechunk.log.repository.ops_log import any_in_history, updates_of
from icechunk.log.repository.port import FILES_BYTES, MAX_FILES, Layout, OnSent, Propose, RepositoryLog, SwapToken
from icechunk.log.repository.queue import (
    MAX_CARRIED_BYTES,
    AppendQueue,
    Attempt,
    Group,
    Waiting,
    attempt_of,
    build,
    resolve,
    tell_sent,
)
from icechunk.log.repository.settle import Landed, Lost, backoff_s, settle_attempt
from icechunk.log.repository.state import MAIN, RepoState, apply
from icechunk.log.repository.store_check import StoreCheck, may_write
from icechunk.runtime.clock import Sources
from icechunk.runtime.tasks import finish_task
from icechunk.storage.port import Storage
from icechunk.transfer.cache import WeightedCache

__all__ = ["LogLayout", "Swapping"]

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


_CLOSE_GRACE_S: Final = 10.0


class LogLayout(RepositoryLog):
    """A repository log with one object per entry. Made by `icechunk.log.repository.open` and `.create`.

    Parameters
    ----------
    updates_per_file
        Most entries of the ops log that one ``repo`` object holds; None: as the persisted configuration says, else
        1000.
    """

    layout = Layout.LOG

    def __init__(
        self, storage: Storage, sources: Sources, opened: Opened, *, updates_per_file: int | None = None
    ) -> None:
        self._storage = storage
        files: WeightedCache[str, bytes] = WeightedCache(FILES_BYTES, MAX_FILES)
        self._view = LogView(storage, sources, opened, updates_per_file=updates_per_file, files=files)
        self._checkpointing = Checkpointing(self._view)
        self._swapping = Swapping(self._view, self._checkpointing)
        self._turns: dict[str, asyncio.Lock] = {}

    # ----------------------------------------------------------------- state

    @property
    def state(self) -> RepoState:
        """The newest folded state that this instance knows."""
        return self._view.state

    @property
    def epoch(self) -> str:
        """The present life of the log."""
        return self._view.head.epoch

    @property
    def n(self) -> int:
        """The last slot folded into `state`."""
        return self._view.head.n

    @property
    def store_time_us(self) -> int:
        """The store's clock now, or a little less, µs: files written from now on are not older (rule 10)."""
        return self._view.store_time_us

    @property
    def checkpoint_n(self) -> int:
        """The last slot known to be folded into ``repo``."""
        return self._view.checkpoint_n

    @property
    def ended(self) -> str | None:
        """Why nothing can be appended any more; None while the log goes on."""
        return self._view.left

    @property
    def stranded(self) -> Stranded | None:
        """What somebody who lifted the read-only status left behind; None where nobody did."""
        return self._view.stranded

    @property
    def updates_per_file(self) -> int:
        """Most entries of the ops log that one ``repo`` object holds."""
        return self._view.updates_per_file

    @updates_per_file.setter
    def updates_per_file(self, value: int | None) -> None:
        self._view.updates_per_file = value

    @property
    def tasks(self) -> tuple[asyncio.Task[None], ...]:
        """The newest task of each kind, done or not; for tests that stop a client dead."""
        tasks = (
            self._swapping.queue.runner,
            self._swapping.preparation,
            self._view.carried.task,
            self._checkpointing.task,
            self._view.sealer,
        )
        return tuple(task for task in tasks if task is not None)

    @property
    def carry_limit_bytes(self) -> int:
        return MAX_CARRIED_BYTES

    @property
    def files(self) -> WeightedCache[str, bytes]:
        return self._view.files

    def share_files(self, files: WeightedCache[str, bytes]) -> None:
        for key, data in self._view.files.items():
            files.put(key, data, len(data))
        self._view.files = files

    def carried_object(self, key: str) -> bytes | None:
        """A file that rides in an entry after the checkpoint and may not stand on its own yet (rule 15)."""
        return self._view.carried.find(key)

    def carried_files(self) -> dict[str, bytes]:
        """All of those, by key."""
        return self._view.carried.all()

    async def find_file(self, key: str) -> bytes | None:
        return await self._view.find_file(key)

    # ----------------------------------------------------------------- verbs

    async def refresh(self) -> RepoState:
        return await self._view.refresh()

    async def append(
        self,
        propose: Propose,
        *,
        since_us: int | None = None,
        deadline_s: float | None = None,
        on_sent: OnSent | None = None,
        files: Mapping[str, bytes] = MappingProxyType({}),
        on_queued: Callable[[], None] | None = None,
    ) -> RepoState:
        if self._view.left is not None:
            raise SessionStateError(self._view.left)
        return await self._swapping.queue.append(
            propose, since_us=since_us, deadline_s=deadline_s, on_sent=on_sent, files=files, on_queued=on_queued
        )

    def turn(self, branch: str) -> asyncio.Lock:
        return self._turns.setdefault(branch, asyncio.Lock())

    def expected(self) -> RepoState:
        return self._swapping.expected()

    def prepare_writes_soon(self) -> None:
        self._swapping.prepare_soon()

    async def prepare_writes(self) -> None:
        """See that the store honours ``If-None-Match`` (rule 1): two round trips, once per process and storage.

        Raises
        ------
        StorageError
            It does not (kind ``storage-config``), or gives no answer.
        """
        await self._swapping.check_store()

    async def settle(self, token: SwapToken) -> bool:
        return await self._swapping.settle(token)

    async def checkpoint(self) -> None:
        """Write the folded state to ``repo``, where it is behind; `StorageError` where the store does not answer."""
        await self._checkpointing.write()

    async def convert_to_repo_object(self) -> None:
        """End the log: seal it, and make ``repo`` the truth for every writer of the format (rule 8).

        Raises
        ------
        SessionStateError
            It has ended already.
        CommitOutcomeUnknown
            As in `append`; opening the repository finishes what was begun.
        """
        await self.append(lambda state: (e.Sealed(reason="convert"),))
        if self._view.left is None:
            await self._view.leave_sealed()

    def updates(self) -> AsyncIterator[Update]:
        """Everything that ever happened, newest first, through the chain of backups."""
        return updates_of(self._storage, self.state)

    async def aclose(self) -> None:
        if self._swapping.queue.closed:
            return
        await self._swapping.finish(_CLOSE_GRACE_S)
        await self._view.carried.finish(_CLOSE_GRACE_S)
        await self._checkpointing.finish(_CLOSE_GRACE_S)
        # A reader leaves `repo` alone, which it may not even be allowed to write.
        if self._view.left is None and self._swapping.wrote and self.n > self.checkpoint_n:
            try:
                async with asyncio.timeout(_CLOSE_GRACE_S):
                    await self._checkpointing.try_write()
            except TimeoutError as error:
                _LOG.warning("last checkpoint of %s failed: %s", self._storage.describe(), error)
        await finish_task(self._view.sealer, _CLOSE_GRACE_S)
