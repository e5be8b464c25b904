"""The log layout: one new object per entry, created where there is none. Creating slot n+1 *is* the commit.

Theory: the rules cited beside each check. Who owns what: one instance belongs to one event loop and owns its head
(the newest folded state), the proof of how old its knowledge of the end is, and at most one unsettled attempt. The
head moves only in `_advance`, `_fold_own` and `_adopt`, which never await and never go back, so `refresh` and the
task that swaps may both learn of the same slot.

Swaps and checkpoints run in plain asyncio tasks of the instance, not of a caller: a PUT must outlive the caller
who gave up on it (rule 3), and an anyio task group needs a scope that nobody here is in. Each is spawned when there
is something to do, held strongly, ends when there is nothing left, and is awaited or cancelled in `aclose`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from icechunk.errors import (
    CommitOutcomeUnknown,
    ErrorKind,
    IcechunkError,
    InvalidInputError,
    PreconditionFailedError,
    ReadOnlyError,
    SessionStateError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId
from icechunk.format.keys import overwritten_repo_key, snapshot_key
from icechunk.format.repo import decode_repo
from icechunk.format.repo_values import CommitAmended, NewCommit, NewDetachedSnapshot, Update
from icechunk.refs import events as e
from icechunk.refs.base import Layout, Propose, RepositoryLog, SwapToken
from icechunk.refs.commit_queue import Attempt, Group, Waiting, attempt_of, build
from icechunk.refs.concurrent import run_pair
from icechunk.refs.entry import Entry, decode_entry, encode_events, slot_key
from icechunk.refs.log_checkpoint import (
    DEFAULT_UPDATES_PER_FILE,
    LostRepo,
    checkpoint_is_due,
    finish_conversion,
    write_checkpoint,
)
from icechunk.refs.log_reader import (
    Head,
    Opened,
    RepoObject,
    fold_entry,
    instant,
    list_head,
    open_head,
    read_slot,
    read_tail,
)
from icechunk.refs.marker import state_of, with_kept_updates
from icechunk.refs.proof import MAX_SKEW_US, Instant, clock_error_us, still_proves
from icechunk.refs.state import MAIN, RepoState
from icechunk.refs.store_check import StoreCheck
from icechunk.refs.swap import Landed, Lost, backoff_s, settle_attempt, unknown
from icechunk.refs.takeover import Stranded, find_stranded, seal_abandoned, seal_log
from icechunk.sources import SYSTEM, Sources
from icechunk.storage.base import Absent, Storage

__all__ = ["LogLayout"]

_LOG = logging.getLogger(__name__)
_CLOSE_GRACE_S: Final = 10.0


class LogLayout(RepositoryLog):
    """A repository log with one object per entry. Made by `LogLayout.open` or `icechunk.refs.create.create_log`.

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
        self._sources = sources
        self._head = opened.head
        self._proof = opened.proof
        self._known = opened.known
        self._seen = Instant(date_us=None, elapsed_us=0, wall_us=0)
        self._updates_per_file = updates_per_file
        # Why nothing can be appended any more, once the log has ended.
        self._left: str | None = None
        self._stranded: Stranded | None = None
        self._carried: dict[int, dict[str, bytes]] = {}
        self._waiting: list[Waiting] = []
        self._unsettled: Attempt | None = None
        self._losses = 0
        self._wrote = False
        self._closed = False
        self._store_check = StoreCheck(storage)
        self._swapping = asyncio.Lock()
        self._checkpointing = asyncio.Lock()
        self._runner: asyncio.Task[None] | None = None
        self._checkpointer: asyncio.Task[None] | None = None
        self._sealer: asyncio.Task[None] | None = None
        self._saw(opened.proof)
        for entry in opened.tail:
            self._remember_objects(entry)

    # ------------------------------------------------------------------ open

    @classmethod
    async def open(
        cls, storage: Storage, sources: Sources = SYSTEM, *, updates_per_file: int | None = None
    ) -> LogLayout:
        """Read the log up to its head: ``repo`` and a listing at the same time, then the tail at once.

        Where the log is found sealed, its conversion is finished first; where somebody took over ``repo``, the
        abandoned log is sealed, and what is only in it is reported with the error.

        Raises
        ------
        RepositoryNotFoundError
            No repository there.
        SessionStateError
            The repository has another layout (kind ``unsupported-operation-for-version``).
        FormatError
            An object that cannot be read.
        """
        opened = await open_head(storage, sources)
        if isinstance(opened, Opened) and opened.head.state.sealed and storage.supports_writes:
            await finish_conversion(
                storage, sources, opened.head, updates_per_file=updates_per_file or DEFAULT_UPDATES_PER_FILE
            )
            opened = await open_head(storage, sources)
        if isinstance(opened, RepoObject):
            stranded = await seal_abandoned(storage, sources, opened) if storage.supports_writes else None
            report = f"; {stranded.describe(storage.describe())}" if stranded is not None else ""
            raise SessionStateError(
                f"the repository in {storage.describe()} is kept in its repo object, not in a log: open it with that "
                f"layout, or convert it{report}",
                ErrorKind.UNSUPPORTED_OPERATION_FOR_VERSION,
            )
        return cls(storage, sources, opened, updates_per_file=updates_per_file)

    # ----------------------------------------------------------------- state

    @property
    def state(self) -> RepoState:
        """The newest folded state that this instance knows."""
        return self._head.state

    @property
    def epoch(self) -> str:
        """The present life of the log."""
        return self._head.epoch

    @property
    def n(self) -> int:
        """The last slot folded into `state`."""
        return self._head.n

    @property
    def store_time_us(self) -> int:
        """The store's clock now, or a little less, µs: files written from now on are not older (rule 10)."""
        seen, now = self._seen, instant(self._sources)
        if seen.date_us is None:
            return max(0, now.wall_us - MAX_SKEW_US)
        # Last-Modified comes in whole seconds, and may be that of the request's beginning.
        estimate = seen.date_us + max(0, now.elapsed_us - seen.elapsed_us)
        return max(0, estimate // 1_000_000 * 1_000_000 - 1_000_000)

    @property
    def checkpoint_n(self) -> int:
        """The last slot known to be folded into ``repo``."""
        return 0 if self._known.marker is None else self._known.marker.n

    @property
    def stranded(self) -> Stranded | None:
        """What somebody who lifted the read-only status left behind; None where nobody did."""
        return self._stranded

    @property
    def updates_per_file(self) -> int:
        """Most entries of the ops log that one ``repo`` object holds."""
        if self._updates_per_file is not None:
            return max(1, self._updates_per_file)
        config = self.state.config
        persisted = config.get("num_updates_per_repo_info_file") if isinstance(config, dict) else None
        return persisted if isinstance(persisted, int) and persisted > 0 else DEFAULT_UPDATES_PER_FILE

    @updates_per_file.setter
    def updates_per_file(self, value: int | None) -> None:
        self._updates_per_file = value

    def carried_object(self, key: str) -> bytes | None:
        """A file that rides in an entry after the checkpoint and may not stand on its own yet (rule 15)."""
        return next((objects[key] for objects in self._carried.values() if key in objects), None)

    def _advance(self, entry: Entry) -> None:
        """Fold the next entry; one that is folded already changes nothing."""
        if entry.n == self._head.n + 1:
            self._head = fold_entry(self._head, entry)
            self._remember_objects(entry)

    def _fold_own(self, attempt: Attempt, proof: Instant | None) -> None:
        self._wrote = True
        if self._head.epoch != attempt.epoch or self._head.n != attempt.n - 1:
            return
        if self._head.state is attempt.before:
            # Validated on exactly this state, by the same fold, on the events as decoded: no need to fold them again.
            self._head = Head(epoch=attempt.epoch, n=attempt.n, state=attempt.state)
        else:
            self._head = fold_entry(self._head, decode_entry(attempt.data, n=attempt.n))
        if proof is not None:
            self._proof = proof

    def _adopt(self, opened: Opened) -> None:
        """Take over what opening the log anew has shown; never behind what is known."""
        if opened.head.epoch == self._head.epoch and opened.head.n < self._head.n:
            return
        self._head, self._proof, self._known = opened.head, opened.proof, opened.known
        self._carried.clear()
        for entry in opened.tail:
            self._remember_objects(entry)

    def _remember_objects(self, entry: Entry) -> None:
        if entry.objects:
            self._carried[entry.n] = dict(entry.objects)

    def _saw(self, answered: Instant) -> None:
        if answered.date_us is not None:
            self._seen = answered

    # --------------------------------------------------------------- refresh

    async def refresh(self) -> RepoState:
        """Learn everything up to the end of the log as it is now.

        Steady state: one GET of the slot after the head, which is empty. An empty slot is as consistent as a listing
        and an order of magnitude cheaper; only where it is taken, a listing says how far there is to go, while the
        slot after it is read: being one entry behind costs two round trips, being far behind three.
        """
        while self._left is None:
            proof, n, asked = self._proof, self._head.n, instant(self._sources)
            found = await read_slot(self._storage, self._head.epoch, n + 1)
            answered = instant(self._sources, None if found is None else found[1].date_us)
            self._saw(answered)
            if not still_proves(proof, answered):
                # Rule 5: the slot may have been pruned, and "empty" would be no news.
                await self._reopen()
                continue
            if found is not None:
                self._advance(found[0])
                await self._catch_up(asked)
            elif self._head.n == n:
                self._proof = asked
            # Otherwise another task of this loop folded past it meanwhile, which includes all that was asked for.
            if not self.state.sealed:
                return self.state
            # What was acknowledged after the seal is wherever the conversion led to.
            if self._left is None:
                await self._try_leave_sealed()
            return await self._refresh_left()
        return await self._refresh_left()

    async def _catch_up(self, asked: Instant) -> None:
        """Fold the rest of a tail that is known to have grown."""
        epoch, n, proof = self._head.epoch, self._head.n, self._proof
        listed, following = await run_pair(
            partial(list_head, self._storage, epoch), partial(read_slot, self._storage, epoch, n + 1)
        )
        if following is not None:
            self._advance(following[0])
        for entry in await read_tail(self._storage, epoch, self._head.n, listed):
            self._advance(entry)
        if self._head.epoch != epoch or not still_proves(proof, instant(self._sources)) or self._head.n < listed:
            await self._reopen()
        elif self._head.n == listed:
            self._proof = asked

    async def _reopen(self) -> Opened | RepoObject:
        """Find the end of the log anew, from ``repo``."""
        opened = await open_head(self._storage, self._sources)
        if isinstance(opened, RepoObject):
            await self._lost_repo(opened)
        elif opened.head.epoch == self._head.epoch:
            self._adopt(opened)
        else:
            await self._change_epoch(opened)
        return opened

    async def _change_epoch(self, opened: Opened) -> None:
        """The log was converted there and back: the new one goes on from what ``repo`` held in between."""
        await self._fold_to_end()
        if all(tip in opened.head.state.snapshots for tip in self.state.branches.values()):
            self._adopt(opened)
        else:
            # Its history is not ours: somebody took over in between. A reader never goes back.
            await self._lost_repo(None)

    async def _fold_to_end(self) -> None:
        while not self.state.sealed:
            found = await read_slot(self._storage, self._head.epoch, self._head.n + 1)
            if found is None:
                return
            self._advance(found[0])

    async def _refresh_left(self) -> RepoState:
        """After the log's end ``repo`` is the truth."""
        found = await open_head(self._storage, self._sources)
        if isinstance(found, Opened):
            if found.head.epoch != self._head.epoch and self._stranded is None:
                self._left = None
                self._adopt(found)
            return self.state
        state = state_of(found.info, None)
        if self._stranded is None and state.last_time_us >= self.state.last_time_us:
            self._head = replace(self._head, state=replace(state, sealed=True))
        return self.state

    async def _leave_sealed(self) -> None:
        """A seal has been folded: finish the conversion for whoever began it (rule 8)."""
        await finish_conversion(self._storage, self._sources, self._head, updates_per_file=self.updates_per_file)
        if self._left is None:
            self._left = f"the repository in {self._storage.describe()} has another layout now; open it again"

    async def _try_leave_sealed(self) -> None:
        # Helping is nobody's duty who only reads; whoever opens the repository next tries again.
        if not self._storage.supports_writes:
            return
        try:
            await self._leave_sealed()
        except (IcechunkError, OSError) as error:
            _LOG.warning("%s", error)

    # ---------------------------------------------------------------- append

    async def append(
        self, propose: Propose, *, since_us: int | None = None, deadline_s: float | None = None
    ) -> RepoState:
        if self._closed:
            raise SessionStateError("the repository is closed; open it again")
        if self._left is not None:
            raise SessionStateError(self._left)
        if not self._storage.supports_writes:
            raise ReadOnlyError(
                f"cannot change the repository: {self._storage.describe()} can only be read",
                ErrorKind.READ_ONLY_STORAGE,
            )
        waiting = Waiting(propose=propose, since_us=since_us, outcome=asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.get_running_loop().create_task(self._run(), name="icechunk log swaps")
        try:
            # Not `wait_for`: the future is the runner's, a caller who leaves must not cancel it.
            await asyncio.wait({waiting.outcome}, timeout=deadline_s)
        finally:
            if not waiting.outcome.done():
                self._abandon(waiting)
        if waiting.outcome.done():
            return waiting.outcome.result()
        if waiting.token is None:
            raise StorageError(
                f"cannot append to the log in {self._storage.describe()}: the deadline of {deadline_s} s passed before "
                "the entry was sent; nothing landed",
                ErrorKind.UPDATE_ATTEMPTS_EXHAUSTED,
            )
        raise CommitOutcomeUnknown(
            f"the deadline of {deadline_s} s passed with the entry sent to slot {waiting.token.n} of the log in "
            f"{self._storage.describe()} and not settled. Repository.settle_async(error.token) finds out, or makes "
            "failure certain",
            waiting.token,
        )

    def _abandon(self, waiting: Waiting) -> None:
        waiting.abandoned = True
        if waiting in self._waiting:
            self._waiting.remove(waiting)

    async def _run(self) -> None:
        """Swap until nobody waits."""
        try:
            while self._waiting:
                async with self._swapping:
                    await self._swap_next()
        except asyncio.CancelledError:
            self._fail_all(None)
            raise
        except Exception as error:
            self._fail_all(error)

    async def _swap_next(self) -> None:
        await self._check_store()
        await self._settle_unsettled()
        if not still_proves(self._proof, instant(self._sources)):
            await self._reopen()
        if self.state.sealed and self._left is None:
            await self._leave_sealed()
        if self._left is not None:
            raise SessionStateError(self._left)
        self._check_clock()
        group = self._take_group()
        if group.members:
            await self._swap(group)

    def _take_group(self) -> Group:
        """Validate those who wait, and make the attempt for those who stand."""
        time_us = max(self._sources.wall_us(), 0)
        group = build(self.state, self._waiting, time_us=time_us)
        del self._waiting[: group.taken]
        for waiting, error in group.refused:
            _resolve(waiting, error)
        for waiting in group.nothing:
            _resolve(waiting, self.state)
        if group.members:
            self._unsettled = self._attempt(group, time_us)
        return group

    def _attempt(self, group: Group, time_us: int) -> Attempt:
        return attempt_of(
            group,
            epoch=self._head.epoch,
            n=self._head.n + 1,
            nonce=self._sources.random_bytes(16),
            time_us=time_us,
            before=self.state,
            proof=self._proof,
        )

    async def _swap(self, group: Group) -> None:
        attempt = self._unsettled
        assert attempt is not None
        if await self._settle_attempt(attempt, first_look=False):
            self._losses = 0
            for member in group.members:
                _resolve(member.waiting, self.state)
            self._spawn_checkpointer()
            return
        # Lost for certain. Who has left was told a token of the lost slot, so it is not sent again.
        for member in group.members:
            member.waiting.token = None
        self._waiting[:0] = [member.waiting for member in group.members if not member.waiting.abandoned]
        self._losses += 1
        if self._losses > 1 and self._left is None:
            # Far behind, or in a crowd: learn the rest at once, and step aside for a moment.
            await self._sources.sleep(backoff_s(self._sources, self._losses))
            await self.refresh()

    async def _settle_unsettled(self) -> None:
        """No other bytes and no other slot before the last attempt is settled (rule 2)."""
        if self._unsettled is not None:
            await self._settle_attempt(self._unsettled, first_look=True)

    async def _settle_attempt(self, attempt: Attempt, *, first_look: bool) -> bool:
        """Whether the attempt landed; the slot is folded either way. `CommitOutcomeUnknown` leaves it unsettled."""
        verdict = await settle_attempt(
            self._storage,
            self._sources,
            attempt,
            reopen=self._reopen,
            in_history=self._in_history,
            saw=self._saw,
            first_look=first_look,
        )
        if self._unsettled is attempt:
            self._unsettled = None
        match verdict:
            case Landed(proof=proof):
                self._fold_own(attempt, proof)
                return True
            case Lost(taken_by=taken_by):
                if taken_by is not None and self._head.epoch == attempt.epoch:
                    self._advance(taken_by)
                return False

    async def _in_history(self, attempt: Attempt) -> bool:
        return await self._any_in_history(attempt.snapshots)

    async def _any_in_history(self, snapshots: Sequence[ObjectId]) -> bool:
        """Whether a snapshot is in the graph, or once was."""
        if not snapshots:
            return False
        if any(snapshot in self.state.snapshots for snapshot in snapshots):
            return True
        wanted = frozenset(snapshots)
        async for update in self.updates():
            match update.change:
                case NewCommit(snapshot=new) | CommitAmended(snapshot=new) | NewDetachedSnapshot(snapshot=new):
                    if new in wanted:
                        return True
        return False

    def _fail_all(self, error: Exception | None) -> None:
        """The runner stops: everybody learns what is certain for them."""
        attempt, waiting = self._unsettled, self._waiting[:]
        self._waiting.clear()
        if attempt is not None:
            reason = str(error) if error is not None else "the repository was closed first"
            for member in attempt.members:
                _resolve(member.waiting, unknown(attempt, self._storage, reason, member.waiting.token))
        for one in waiting:
            if error is None or isinstance(error, CommitOutcomeUnknown):
                why = f": {error}" if error is not None else ""
                _resolve(one, SessionStateError(f"the entry was not sent, nothing landed; try again{why}"))
            else:
                _resolve(one, error)

    # ---------------------------------------------------------------- checks

    async def prepare_writes(self) -> None:
        """See that the store honours ``If-None-Match`` (rule 1): two round trips, once per process and storage.

        Raises
        ------
        StorageError
            It does not (kind ``storage-config``), or gives no answer.
        """
        await self._check_store()

    async def _check_store(self) -> None:
        candidates = [snapshot_key(FIRST_SNAPSHOT)]
        if self._head.n:
            candidates.append(slot_key(self._head.epoch, self._head.n))
        await self._store_check.run((*candidates, snapshot_key(self.state.branches[MAIN])))

    def _check_clock(self) -> None:
        error_us = clock_error_us(self._seen, instant(self._sources))
        if abs(error_us) > MAX_SKEW_US:
            raise SessionStateError(
                f"this machine's clock is {abs(error_us) // 1_000_000} s {'ahead of' if error_us > 0 else 'behind'} "
                f"the clock of {self._storage.describe()}; at most {MAX_SKEW_US // 1_000_000} s are accepted for "
                "writing. Set the clock",
                ErrorKind.SNAPSHOT_TIMESTAMP,
            )

    # ---------------------------------------------------------------- settle

    async def settle(self, token: SwapToken) -> bool:
        async with self._swapping:
            try:
                await self._settle_unsettled()
            except CommitOutcomeUnknown as error:
                raise StorageError(f"cannot settle yet, call again: {error}") from error
            await self.refresh()
            while True:
                if await self._any_in_history(token.snapshots):
                    return True
                if token.epoch != self._head.epoch or self._left is not None or token.n <= self._head.n:
                    return await self._settle_by_slot(token)
                if token.n > self._head.n + 1:
                    raise InvalidInputError(
                        f"the token names slot {token.n}, but the log in {self._storage.describe()} ends at slot "
                        f"{self._head.n}: it belongs to another repository"
                    )
                # The slot is next, and empty: fill it, and whatever is on its way finds it taken.
                await self._fill_slot(token)

    async def _settle_by_slot(self, token: SwapToken) -> bool:
        """The slot is behind the head, or in a log that has ended: nothing new lands there."""
        found = await read_slot(self._storage, token.epoch, token.n)
        pruned_perhaps = token.epoch != self._head.epoch or token.n <= self.checkpoint_n
        if token.snapshots and pruned_perhaps:
            # Made again after it was pruned, it would prove nothing; the history has been asked.
            return False
        if found is not None:
            return found[0].nonce == token.nonce
        if token.snapshots:
            return False
        raise CommitOutcomeUnknown(
            f"slot {token.n} of the log in {self._storage.describe()} has been pruned; look whether the change is "
            "there",
            token,
        )

    async def _fill_slot(self, token: SwapToken) -> None:
        """Put a void entry into the next slot, or see it taken; for holders of ``_swapping``."""
        await self._check_store()
        group = Group(state=self.state, events=encode_events((e.Void(nonce=token.nonce),)))
        self._unsettled = self._attempt(group, max(self._sources.wall_us(), 0))
        try:
            await self._settle_attempt(self._unsettled, first_look=False)
        except CommitOutcomeUnknown as error:
            raise StorageError(f"cannot settle yet, call again: {error}") from error

    # ------------------------------------------------------------ checkpoint

    async def checkpoint(self) -> None:
        """Write the folded state to ``repo``, where it is behind; `StorageError` where the store does not answer."""
        async with self._checkpointing:
            if self._left is not None:
                return
            head = self._head
            if head.state.sealed:
                await self._leave_sealed()
                return
            await self._put_carried_objects(head)
            written = await write_checkpoint(
                self._storage, self._sources, head, self._known, updates_per_file=self.updates_per_file
            )
            if isinstance(written, LostRepo):
                await self._lost_repo(written.found)
                if self._sealer is not None:
                    await asyncio.wait({self._sealer})
                return
            if self._head.epoch != head.epoch:
                return
            self._known = written.known
            for n in [n for n in self._carried if n <= self.checkpoint_n]:
                del self._carried[n]
            if written.kept is not None and written.kept.before != self.state.repo_before_updates:
                self._head = replace(self._head, state=with_kept_updates(self._head.state, written.kept))

    async def _put_carried_objects(self, head: Head) -> None:
        for n, objects in sorted(self._carried.items()):
            if self.checkpoint_n < n <= head.n:
                for key, data in objects.items():
                    try:
                        await self._storage.put(key, data, Absent())
                    except PreconditionFailedError:
                        continue

    def _spawn_checkpointer(self) -> None:
        if self._closed or (self._checkpointer is not None and not self._checkpointer.done()):
            return
        if checkpoint_is_due(self._head, self._known):
            self._checkpointer = asyncio.get_running_loop().create_task(
                self._checkpoint_while_due(), name="icechunk log checkpoint"
            )

    async def _checkpoint_while_due(self) -> None:
        while not self._closed and self._left is None and checkpoint_is_due(self._head, self._known):
            try:
                await self.checkpoint()
            except (IcechunkError, OSError) as error:
                _LOG.warning(
                    "checkpoint of %s failed, the next commit tries again: %s", self._storage.describe(), error
                )
                return

    async def _lost_repo(self, found: RepoObject | None) -> None:
        """``repo`` is not our checkpoint: converted, which a seal in the log says, or taken over (rule 8)."""
        if self._left is not None:
            return
        await self._fold_to_end()
        if self.state.sealed:
            await self._leave_sealed()
            return
        self._left = f"the repository in {self._storage.describe()} was taken over by another client; open it again"
        # As a client of its own: it may be the swap in flight, or a checkpoint, that has found out.
        self._sealer = asyncio.get_running_loop().create_task(self._seal(found), name="icechunk log seal")

    async def _seal(self, found: RepoObject | None) -> None:
        """Take the slot that every writer of the abandoned log needs next, and report what is only in the log."""
        try:
            last = await seal_log(self._storage, self._sources, self.epoch, self._head.n)
            stranded = await find_stranded(
                self._storage, epoch=self.epoch, last=last, found=found, fallback_n=self.checkpoint_n
            )
        except (IcechunkError, OSError) as error:
            _LOG.error("%s; sealing its log failed, opening it again tries again: %s", self._left, error)
            return
        self._stranded = stranded
        self._left = stranded.describe(self._storage.describe())
        _LOG.error("%s", self._left)

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
        if self._left is None:
            await self._leave_sealed()

    # --------------------------------------------------------------- ops log

    async def updates(self) -> AsyncIterator[Update]:
        """Everything that ever happened, newest first, through the chain of backups."""
        state = self.state
        last_us: int | None = None
        for update in state.updates:
            last_us = update.updated_at_us
            yield update
        before, seen = state.repo_before_updates, set[str]()
        while before is not None and before not in seen:
            seen.add(before)
            info = decode_repo((await self._storage.get(overwritten_repo_key(before))).data)
            for update in info.updates:
                # A list may reach into its backup's; each update is told once.
                if last_us is None or update.updated_at_us < last_us:
                    last_us = update.updated_at_us
                    yield update
            before = info.repo_before_updates

    # ----------------------------------------------------------------- close

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        for one in self._waiting:
            _resolve(one, SessionStateError("the repository was closed before the entry was sent; nothing landed"))
        self._waiting.clear()
        await _finish(self._runner, _CLOSE_GRACE_S)
        await _finish(self._checkpointer, _CLOSE_GRACE_S)
        # A reader leaves `repo` alone, which it may not even be allowed to write.
        if self._left is None and self._wrote and self._head.n > self.checkpoint_n:
            try:
                async with asyncio.timeout(_CLOSE_GRACE_S):
                    await self.checkpoint()
            except (IcechunkError, OSError, TimeoutError) as error:
                _LOG.warning("last checkpoint of %s failed: %s", self._storage.describe(), error)
        await _finish(self._sealer, _CLOSE_GRACE_S)


def _resolve(waiting: Waiting, outcome: RepoState | Exception) -> None:
    if waiting.outcome.done():
        return
    if not isinstance(outcome, Exception):
        waiting.outcome.set_result(outcome)
    elif not waiting.abandoned:
        waiting.outcome.set_exception(outcome)
        waiting.outcome.exception()  # a caller who is cancelled at this very moment never looks: no complaint then


async def _finish(task: asyncio.Task[None] | None, grace_s: float) -> None:
    """Wait for a task of ours, and cancel it where it takes too long."""
    if task is None or task.done() or task is asyncio.current_task():
        return
    await asyncio.wait({task}, timeout=grace_s)
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
