"""The log layout: one new object per entry, created where there is none. Creating slot n+1 *is* the commit.

Theory: the rules of ``spec/repository-log.md``, cited beside each check. The parts common to all layouts are in
`icechunk.log.repository.settle`: the queue, the attempt in flight, and the outcomes that callers get. In this one an
attempt is an entry for the slot after the head, its condition is that the slot is empty, and it is recognised by its
nonce. Owners of mutable state, each for one client, that is one instance on one event loop:

- `icechunk.log.repository.entries.client.LogView`: the head (the newest folded state), since when it is known
  to be the end, ``repo`` as last seen, and whether the log has ended;
- `icechunk.log.repository.entries.checkpoint_schedule.Checkpointing`: the task that writes checkpoints.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Final

from icechunk.errors import (
    ErrorKind,
    IcechunkError,
    InvalidInputError,
    PreconditionFailedError,
    SessionStateError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT
from icechunk.format.keys import snapshot_key
from icechunk.format.repo.repo_info import Update
from icechunk.log.repository import events as e
from icechunk.log.repository.entries.checkpoint_schedule import Checkpointing
from icechunk.log.repository.entries.client import LogView
from icechunk.log.repository.entries.crowd import TAG_BYTES
from icechunk.log.repository.entries.reader import Opened
from icechunk.log.repository.entry import encode_entry, slot_key
from icechunk.log.repository.event_json import encode_events
from icechunk.log.repository.freshness import MAX_SKEW_US, Instant, clock_error_us, instant, is_fresh
from icechunk.log.repository.marker import state_of
from icechunk.log.repository.objects import RepoObject, nonce_in_slot, read_repo, read_slot
from icechunk.log.repository.ops_log import any_in_history, updates_of
from icechunk.log.repository.port import FILES_BYTES, MAX_FILES, Layout, Proposal, Propose, SwapToken
from icechunk.log.repository.queue import Attempt, Group, Waiting, build
from icechunk.log.repository.settle import CLOSE_GRACE_S, SwappedLog
from icechunk.log.repository.state import MAIN, RepoState
from icechunk.log.repository.store_check import StoreCheck, may_write
from icechunk.log.repository.tokens import settle_ended
from icechunk.runtime.clock import Sources
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.loops import closing_garbage
from icechunk.runtime.tasks import finish_task
from icechunk.storage.outcome import Fate
from icechunk.storage.port import Absent, Put, PutResult, Storage
from icechunk.transfer.cache import WeightedCache

__all__ = ["LogLayout", "SlotAttempt"]

_LOG: Final = logging.getLogger(__name__)
_NEAR: Final = 2.5
"""Clients before this one, at which it no longer pauses, but asks for the next slot until that is taken."""
_NEXT_ASK_TRIPS: Final = 0.25
_ASK_TRIPS: Final = 0.75
"""Round trips between two such requests: of the client whose turn is the next one, and of others."""
_SHARE_OF_WAY: Final = 0.6
_SWAPS_OUT_OF_TURN: Final = 2
"""Longest pause, in swaps, of a client that lost a race near its turn, or without having one."""
_LONGEST_WAIT_US: Final = 5_000_000
_BACKGROUND_WAITS_S: Final = 1.0
"""Longest time for which embedded files and checkpoints are not put while callers wait."""
_CROWD_LOOK_S: Final = 0.25
"""Time between two looks whether other clients still write."""
_CHARGED_SLOTS: Final = 16
"""While clients write at the same time, the writer of every such slot writes the checkpoint."""


@dataclass(slots=True, kw_only=True, eq=False)
class SlotAttempt(Attempt):
    """An entry on its way to a slot."""

    data: bytes
    files: dict[str, bytes]
    """Files that are embedded in the entry, by key."""
    before: RepoState
    """The state that the events were validated against."""
    freshness: Instant
    """Age of the knowledge that the slot was the next."""


class LogLayout(SwappedLog[SlotAttempt]):
    """A repository log with one object per entry. Made by `icechunk.log.repository.open` and `.create`.

    Parameters
    ----------
    opened
        The log as read.
    updates_per_file
        Most entries of the ops log that one ``repo`` object holds; None: as the persisted configuration says, else
        1000.
    """

    layout = Layout.LOG

    def __init__(
        self, storage: Storage, sources: Sources, opened: Opened, *, updates_per_file: int | None = None
    ) -> None:
        super().__init__(storage, sources, embeds=True)
        files: WeightedCache[str, bytes] = WeightedCache(FILES_BYTES, MAX_FILES)
        self.view: LogView = LogView(storage, sources, opened, updates_per_file=updates_per_file, files=files)
        """This client's knowledge of the log."""
        self._checkpointing = Checkpointing(self.view, self._charge)
        self._charged = asyncio.Event()
        """Set while the newest entry of this client is in a slot whose writer writes a checkpoint."""
        self._store_check = StoreCheck(storage)
        self._preparation: asyncio.Task[None] | None = None
        """Checks the store before the first swap."""
        self._asks: set[asyncio.Task[None]] = set()
        """Requests for the slot after the head, of callers that wait for this client's turn."""
        self._moved = asyncio.Event()
        """Set when one of them has found an entry."""
        self._wrote = False
        """Whether an entry of this client has landed."""

    # ----------------------------------------------------------------- state

    @property
    def state(self) -> RepoState:
        return self.view.state

    @property
    def ended_reason(self) -> str | None:
        return self.view.ended_reason

    @property
    def epoch(self) -> str:
        """The present life of the log."""
        return self.view.head.epoch

    @property
    def n(self) -> int:
        """The last slot folded into `state`."""
        return self.view.head.n

    @property
    def store_time_us(self) -> int:
        return self.view.store_time_us

    @property
    def tasks(self) -> tuple[asyncio.Task[None], ...]:
        """The newest task of each kind, done or not; for tests that stop a client dead."""
        tasks = (self.runner, self._preparation, self.view.embedded.task, self._checkpointing.task, self.view.sealer)
        return (*(task for task in tasks if task is not None), *self._asks)

    def share_files(self, files: WeightedCache[str, bytes]) -> None:
        for key, data in self.view.files.items():
            files.put(key, data, len(data))
        self.view.files = files

    def embedded_file(self, key: str) -> bytes | None:
        return self.view.embedded.find(key)

    async def find_file(self, key: str) -> bytes | None:
        return await self.view.find_file(key)

    async def refresh(self) -> RepoState:
        await self.view.refresh()
        await self.tell_told()
        if self.view.taken_over:
            raise SessionStateError(self.view.ended_reason or "")
        return self.state

    async def refresh_in_turn(self) -> RepoState:
        crowd, sources = self.view.crowd, self._sources
        end_us = sources.elapsed_us() + _LONGEST_WAIT_US
        while (ahead := self._ahead()) > _NEAR and sources.elapsed_us() < end_us:
            # The pace may change, and clients may leave: the rest of the way is looked at again.
            await sources.sleep((ahead - _NEAR) * crowd.interval_us * _SHARE_OF_WAY / 1e6)
            await self.view.refresh()
        await self.refresh()
        moved = False
        while (ahead := self._ahead()) and sources.elapsed_us() < end_us:
            # An answer is not waited for before the next request, so that a taken slot is seen soon.
            if not moved:
                ask = asyncio.get_running_loop().create_task(self._ask(), name="icechunk log turn")
                self._asks.add(ask)
                ask.add_done_callback(self._asks.discard)
            trips = _NEXT_ASK_TRIPS if ahead == 1 else _ASK_TRIPS
            moved = await self._moves_within(trips * crowd.trip_us / 1e6)
        return self.state

    async def _moves_within(self, seconds: float) -> bool:
        """Wait until a request of `_ask` has found an entry, or the time has passed."""
        self._moved.clear()
        waiting = asyncio.ensure_future(self._moved.wait())
        try:
            await asyncio.wait({waiting}, timeout=seconds)
        finally:
            waiting.cancel()
        return self._moved.is_set()

    async def _ask(self) -> None:
        n = self.n
        # Turns are advice: what is wrong shows in what follows.
        with suppress(IcechunkError, OSError):
            await self.view.read_next()
        if self.n != n:
            self._moved.set()

    def _ahead(self) -> int:
        """Number of clients whose turn comes before this client's; 0 where one of its own swaps is under way."""
        if self.waiting or self._in_flight is not None or self.view.ended_reason is not None:
            return 0
        return self.view.crowd.ahead(self._sources.elapsed_us())

    def updates(self) -> AsyncIterator[Update]:
        return updates_of(self._storage, self.state)

    # ------------------------------------------------------------ the queue

    async def append(
        self,
        proposal: Proposal | Propose,
        *,
        since_us: int | None = None,
        deadline_s: float | None = None,
        files: Mapping[str, bytes] = MappingProxyType({}),
    ) -> RepoState:
        if self.view.ended_reason is not None:
            raise SessionStateError(self.view.ended_reason)
        state = await super().append(proposal, since_us=since_us, deadline_s=deadline_s, files=files)
        if self._storage.defers_syncs:
            # It has landed, whatever becomes of this: the next checkpoint includes it.
            await self._checkpointing.try_write(through=True)
        return state

    def prepare_writes_soon(self) -> None:
        if self._storage.defers_syncs:
            # There is no round trip to save on a local disk, where nothing runs behind a call that has returned.
            return
        if self._preparation is None and not self._store_check.done and may_write(self._storage):
            self._preparation = asyncio.get_running_loop().create_task(self._prepare(), name="icechunk store check")

    async def _prepare(self) -> None:
        # Done in advance only: the first swap raises the error.
        with suppress(IcechunkError, OSError):
            await self.prepare_writes()

    @property
    def writes_prepared(self) -> bool:
        return self._store_check.done

    async def prepare_writes(self) -> None:
        """See that the store honours ``If-None-Match`` (rule 1): two round trips, once per process and storage.

        Raises
        ------
        StorageError
            It does not (kind ``storage-config``), or gives no answer.
        """
        if self._store_check.done:
            return
        head = self.view.head
        candidates = [snapshot_key(FIRST_SNAPSHOT)]
        if head.n:
            candidates.append(slot_key(head.epoch, head.n))
        await self._store_check.run((*candidates, snapshot_key(head.state.branches[MAIN])), self.view.known_objects)

    # ------------------------------------------------- encoding, condition, recognition

    def _begin_look(self) -> int:
        return self.view.begin_look()

    @property
    def _looked(self) -> int:
        return self.view.looked

    async def _look_anew(self) -> None:
        await self.view.refresh()
        await self._require_open()

    async def _ready(self) -> None:
        await self.prepare_writes()
        if not is_fresh(self.view.freshness, instant(self._sources)):
            await self.view.reopen()
        await self._require_open()
        self._check_clock()

    async def _require_open(self) -> None:
        if self.state.sealed and self.view.ended_reason is None:
            await self.view.leave_sealed()
        if self.view.ended_reason is not None:
            raise SessionStateError(self.view.ended_reason)

    def _check_clock(self) -> None:
        error_us = clock_error_us(self.view.seen, instant(self._sources))
        if abs(error_us) > MAX_SKEW_US:
            raise SessionStateError(
                f"this machine's clock is {abs(error_us) // 1_000_000} s {'ahead of' if error_us > 0 else 'behind'} "
                f"the clock of {self._storage.describe()}; at most {MAX_SKEW_US // 1_000_000} s are accepted for "
                "writing. Set the clock",
                ErrorKind.SNAPSHOT_TIMESTAMP,
            )

    async def _build(self, waiting: Sequence[Waiting]) -> Group:
        return build(self.state, waiting, time_us=max(self._sources.wall_us(), 0))

    async def _make(self, group: Group) -> SlotAttempt:
        # So the others can tell the entries of this client from those of others.
        head, nonce = self.view.head, self.view.crowd.tag + self._sources.random_bytes(16 - TAG_BYTES)
        data = encode_entry(
            n=head.n + 1,
            nonce=nonce,
            time_us=group.time_us,
            since_us=group.since_us,
            events=group.events,
            objects=group.files,
        )
        return SlotAttempt(
            epoch=head.epoch,
            n=head.n + 1,
            nonce=nonce,
            known_us=self.view.freshness.date_us,
            data=data,
            files=group.files,
            before=head.state,
            state=group.state,
            freshness=self.view.freshness,
        )

    async def _send(self, attempt: SlotAttempt, storage: Storage) -> bool:
        asked, look = instant(self._sources), self.view.begin_look()
        entry = Put(slot_key(attempt.epoch, attempt.n), attempt.data, Absent())
        following = None
        answers: list[PutResult | None] = []
        try:
            if storage.defers_syncs:
                following = self._checkpointing.following(attempt.n, attempt.state, attempt.files)
                put, answers = await storage.put_before(entry, following, attempt.unsynced)
            else:
                put = await storage.put(entry.key, entry.data, entry.precondition)
        except PreconditionFailedError:
            return False
        answered = instant(self._sources, put.date_us)
        self.view.saw(answered)
        if not is_fresh(attempt.freshness, answered):
            # Rule 5: the slot may have been pruned meanwhile, and made again by this request.
            return False
        self._fold_own(attempt, asked._replace(date_us=answered.date_us))
        self.view.end_look(look)
        if following is not None:
            following.written(answers)
        return True

    def _fold_own(self, attempt: SlotAttempt, freshness: Instant | None) -> None:
        self._wrote = True
        self.view.fold_own(
            epoch=attempt.epoch,
            n=attempt.n,
            nonce=attempt.nonce,
            data=attempt.data,
            files=attempt.files,
            before=attempt.before,
            after=attempt.state,
            freshness=freshness,
        )
        if not self._storage.defers_syncs:
            self.view.embedded.put_soon(attempt.n, self._quiet)

    def _landed(self, attempt: SlotAttempt) -> None:
        if attempt.n % _CHARGED_SLOTS:
            self._charged.clear()
        else:
            self._charged.set()
        self._checkpointing.spawn_if_due()

    async def _idle(self) -> None:
        """Wait until no caller waits for a swap, or for a second: the time of what runs in the background."""
        if self.runner is not None and not self.runner.done():
            await asyncio.wait({self.runner}, timeout=_BACKGROUND_WAITS_S)

    def _is_crowded(self) -> bool:
        return self.view.crowd.is_busy(self._sources.elapsed_us())

    async def _charge(self) -> None:
        """The time of a checkpoint: while other clients write too, that of one of them at a time.

        It first puts the embedded files of all entries. If every client did so, each file would be put several times.
        """
        await self._idle()
        while self._is_crowded() and not self._charged.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._charged.wait(), _CROWD_LOOK_S)
        self._charged.clear()

    async def _quiet(self) -> None:
        """The time of the files of this client's own entries: while other clients write too, checkpoints put them."""
        await self._idle()
        if not self._is_crowded():
            return
        while self._is_crowded():
            await self._sources.sleep(_CROWD_LOOK_S)
        with suppress(IcechunkError, OSError):
            # A `repo` that is lost is found by the next swap or checkpoint too.
            await self.view.look_at_repo()

    def _note_swap(self, took_s: float) -> None:
        super()._note_swap(took_s)
        self.view.crowd.note_trip(took_s * 1e6)

    def _most_swaps(self) -> float:
        crowd = self.view.crowd
        if not crowd.interval_us:
            return super()._most_swaps()
        # A client whose turn is far away waits for it with its next look.
        return 0 if self._ahead() > _NEAR else _SWAPS_OUT_OF_TURN

    async def _lost(self) -> None:
        await super()._lost()
        if self._losses > 1 and self.view.ended_reason is None:
            # Far behind, or in a crowd: learn the rest at once.
            await self.view.refresh()

    def _passed(self, attempt: SlotAttempt) -> bool:
        head = self.view.head
        return (head.epoch, head.n + 1) != attempt.place or self.view.ended_reason is not None

    async def _look(self, attempt: SlotAttempt) -> Fate:
        if (fate := self._fate_in_tail(attempt)) is not None:
            return fate
        view, asked = self.view, instant(self._sources)
        found = await read_slot(self._storage, attempt.epoch, attempt.n)
        answered = instant(self._sources, None if found is None else found[1].date_us)
        view.saw(answered)
        if not is_fresh(attempt.freshness, answered):
            return await self._fate_by_opening(attempt)
        if found is None:
            attempt.freshness = asked
            return Fate.OPEN
        if found[0].nonce == attempt.nonce:
            self._fold_own(attempt, None)
        elif view.head.epoch == attempt.epoch:
            view.advance(found[0])
        return self._fate_by(attempt, found[0].nonce)

    def _fate_in_tail(self, attempt: SlotAttempt) -> Fate | None:
        """The fate by the entry in the attempt's slot, where this client has read it; None where it has not."""
        nonce = self.view.nonce_of(attempt.epoch, attempt.n)
        if nonce is None:
            return None
        if nonce == attempt.nonce:
            self._fold_own(attempt, None)
        return self._fate_by(attempt, nonce)

    def _fate_by(self, attempt: SlotAttempt, nonce: bytes) -> Fate:
        if nonce != attempt.nonce:
            _LOG.debug("slot %d of %s went to another writer", attempt.n, self._storage.describe())
            return Fate.LOST
        head = self.view.head
        void = head.epoch == attempt.epoch and attempt.n in head.voided
        return Fate.LOST if void else Fate.LANDED

    async def _fate_by_opening(self, attempt: SlotAttempt) -> Fate:
        """The fate of an attempt whose answer was not fresh, by opening the log again (rule 5)."""
        opened = await self.view.reopen()
        if (fate := self._fate_in_tail(attempt)) is not None:
            return fate
        # The opened state is not adopted if the log has ended.
        found = state_of(opened.info, None) if isinstance(opened, RepoObject) else opened.head.state
        for state in (self.state, found):
            if await any_in_history(self._storage, state, attempt.snapshots):
                return Fate.LANDED
        if isinstance(opened, Opened) and attempt.place == (opened.head.epoch, opened.head.n + 1):
            attempt.freshness = opened.freshness
            return Fate.OPEN
        # Behind the checkpoint the slot may have been pruned and made again, so it proves nothing.
        return Fate.LOST if attempt.snapshots else Fate.UNDECIDED

    # ------------------------------------------------------------------ settle

    async def settle(self, token: SwapToken) -> bool:
        async with self.swapping:
            await self.view.refresh()
            while True:
                head = self.view.head
                if token.epoch != head.epoch or self.view.ended_reason is not None:
                    await self._recall()
                    return await settle_ended(self._storage, self._sources, token)
                if await any_in_history(self._storage, self.state, token.snapshots):
                    return True
                if token.n <= head.n:
                    break
                if token.n > head.n + 1:
                    raise InvalidInputError(
                        f"the token names slot {token.n}, but the log in {self._storage.describe()} ends at slot "
                        f"{head.n}: it belongs to another repository"
                    )
                # The slot is next, and empty: fill it, and whatever is on its way finds it taken.
                await self._fill_slot(token)
            await self._recall()
        if token.snapshots:
            # History has been asked, and knows none of them: another entry is there, or ours was void as a whole.
            return False
        nonce = self.view.nonce_of(token.epoch, token.n)
        if nonce is None:
            repo = await read_repo(self._storage, self._sources)
            nonce = await nonce_in_slot(self._storage, self._sources, token, repo=repo)
        void = token.epoch == self.view.head.epoch and token.n in self.view.head.voided
        return nonce in token.nonces and not void

    async def _fill_slot(self, token: SwapToken) -> None:
        """Put a void entry into the next slot, or see it taken; for holders of `swapping`."""
        await self.prepare_writes()
        group = Group(state=self.state, time_us=max(self._sources.wall_us(), 0))
        group.events = encode_events((e.Void(nonce=token.nonces[0]),))
        settled = await self._follow(await self._make(group))
        if settled.fate is Fate.REFUSED and settled.why is not None:
            raise settled.why
        if settled.fate in (Fate.OPEN, Fate.UNDECIDED):
            raise StorageError(f"cannot settle yet, call again: {settled.why}") from settled.why

    # ------------------------------------------------------------- the rest

    async def checkpoint(self) -> None:
        """Write the folded state to ``repo``, where it is behind; `StorageError` where the store does not answer."""
        await self._checkpointing.write()

    async def convert_to_repo_object(self) -> None:
        """End the log: seal it, and make ``repo`` authoritative for every writer of the format (rule 8).

        Raises
        ------
        SessionStateError
            It has ended already.
        CommitOutcomeUnknown
            As in `append`; opening the repository finishes what was begun.
        """
        await self.append(lambda state: (e.Sealed(reason=e.CONVERT),))
        if self.view.ended_reason is None:
            await self.view.leave_sealed()

    async def aclose(self) -> None:
        if self.closed:
            return
        await super().aclose()
        await finish_task(self._preparation, CLOSE_GRACE_S)
        for ask in tuple(self._asks):
            ask.cancel()
            await finish_task(ask, CLOSE_GRACE_S)
        await self.view.embedded.finish(CLOSE_GRACE_S)
        await self._checkpointing.finish(CLOSE_GRACE_S)
        # A reader leaves `repo` alone, which it may not even be allowed to write. A client on local disk that is closed
        # because its repository object was collected as garbage does so too: the folder may be about to be removed.
        written_n = self.view.durable_n if self._storage.defers_syncs else self.view.checkpoint_n
        if self._storage.defers_syncs and closing_garbage.get():
            written_n = self.n
        if self.view.ended_reason is None and self._wrote and self.n > written_n:
            last = asyncio.ensure_future(self._checkpointing.try_write())
            try:
                await finish_task(last, CLOSE_GRACE_S)
            finally:
                last.cancel()
            if last.done() and not last.cancelled():
                last.result()
            else:
                _LOG.warning("last checkpoint of %s took longer than %g s", self._storage.describe(), CLOSE_GRACE_S)
        await finish_task(self.view.sealer, CLOSE_GRACE_S)
