"""One client's knowledge of a log: the newest folded state, the end of the log, and the age of that knowledge.

Theory: rules 5, 6 and 8. The view owns the head, since when it is known to be the end of the log
(`LogView.freshness`), the last known ``repo``, and whether the log has ended. The head moves only in
`LogView.advance`, `LogView.fold_own` and `LogView.adopt`, which never await and never go back, so a refresh and the
task that swaps may both learn of the same slot.

Looks are numbered in the order in which they begin. `LogView.looked` is the newest one that has shown where the log
ends, so the state of that look can answer a call made before it began, also with a refusal (rule 3).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

from icechunk.errors import AccessDeniedError, FormatError, IcechunkError, ObjectNotFoundError, StorageError
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId
from icechunk.format.keys import REPO_KEY, snapshot_key
from icechunk.log.repository.entries.checkpoint import LostRepo, Written, finish_conversion
from icechunk.log.repository.entries.crowd import Crowd, new_tag
from icechunk.log.repository.entries.embedded import EmbeddedFiles
from icechunk.log.repository.entries.reader import (
    Head,
    Opened,
    fold_entry,
    open_head,
    read_some,
    read_tail,
    read_until_absent,
    try_list_head,
)
from icechunk.log.repository.entries.takeover import Stranded, find_seal, find_stranded, seal_log
from icechunk.log.repository.entry import Entry, decode_entry, epoch_prefix
from icechunk.log.repository.events import CONVERT, Sealed
from icechunk.log.repository.freshness import Instant, instant, is_fresh, store_time_us
from icechunk.log.repository.marker import NO_FILES, files_to_open_with, state_of
from icechunk.log.repository.objects import Known, RepoObject, read_repo, read_slot, updates_per_file_of
from icechunk.log.repository.state import MAIN, RepoState, resting_on
from icechunk.log.repository.store_check import may_write
from icechunk.runtime.clock import Sources
from icechunk.runtime.late_dataclass import replace
from icechunk.runtime.tasks import run_pair
from icechunk.storage.port import NO_LISTING, Storage
from icechunk.transfer.cache import WeightedCache

__all__ = ["LogView"]

_LOG: Final = logging.getLogger(__name__)
_MANY_FILES: Final = 8
_MANY_NONCES: Final = 1024


class LogView:
    """One client's knowledge of a log. Belongs to one event loop.

    Parameters
    ----------
    updates_per_file
        As of `LogView.updates_per_file`; None: as the persisted configuration says, else 1000.
    files
        Where small files of the repository are kept in memory.
    """

    def __init__(
        self,
        storage: Storage,
        sources: Sources,
        opened: Opened,
        *,
        updates_per_file: int | None,
        files: WeightedCache[str, bytes],
    ) -> None:
        self.storage = storage
        self.sources = sources
        self.head: Head = opened.head
        self.freshness: Instant = opened.freshness
        """Age of the knowledge that nothing follows the head."""
        self.known: Known = opened.known
        """``repo`` as it was last seen."""
        self.known_objects: Mapping[str, bytes] = NO_FILES
        """Files that ``repo`` had copies of when it was read, so they exist as objects."""
        self.seen: Instant = Instant(date_us=None, elapsed_us=0, wall_us=0)
        """The last answer that came with a store time."""
        self.ended_reason: str | None = None
        """The reason why nothing can be appended any more, once the log has ended; else None."""
        self.taken_over: bool = False
        """Whether another library took the log over, so that ``repo`` goes on from an older state than this one."""
        self.stranded: Stranded | None = None
        """The entries that a takeover left in the log only; None: there was no takeover."""
        self.embedded: EmbeddedFiles = EmbeddedFiles(storage, sources)
        """Files embedded in the entries after the checkpoint, as far as no object of them is known (rule 15)."""
        self.files = files
        """Small files of the repository, to be read from memory."""
        self.sealer: asyncio.Task[None] | None = None
        """Seals the log after a takeover."""
        self.crowd: Crowd = Crowd(new_tag(sources.random_bytes))
        """Turns of the clients that write to this log."""
        self.looked: int = 0
        """Number of the newest look that has shown where the log ends."""
        self._looks = 0
        self._looking: asyncio.Future[None] | None = None
        self._updates_per_file = updates_per_file
        self._to_open_with: tuple[ObjectId, Mapping[str, bytes]] | None = None
        # With the clocks of now: the request may have begun long before, which would put the store's clock ahead.
        self.saw(instant(sources, opened.freshness.date_us))
        self._keep_copies(opened.known)
        self._nonces: dict[int, bytes] = {}
        for entry in opened.tail:
            self._remember(entry.n, entry.nonce, entry.objects)

    @property
    def state(self) -> RepoState:
        """The newest folded state."""
        return self.head.state

    @property
    def checkpoint_n(self) -> int:
        """The last slot known to be folded into ``repo``."""
        return 0 if self.known.marker is None else self.known.marker.n

    @property
    def durable_n(self) -> int:
        """The last slot whose embedded files are known to exist as durable objects."""
        return 0 if self.known.marker is None else self.known.marker.durable_n

    @property
    def store_time_us(self) -> int:
        """The store's clock now, or a little less, µs (rule 10)."""
        now = instant(self.sources)
        return store_time_us(self.seen, now, resolution_us=self.storage.clock_resolution_us)

    @property
    def updates_per_file(self) -> int:
        """Most entries of the ops log that one ``repo`` object holds."""
        return updates_per_file_of(self._updates_per_file, self.state.config)

    @updates_per_file.setter
    def updates_per_file(self, value: int | None) -> None:
        self._updates_per_file = value

    # --------------------------------------------------- moving on; none of these waits

    def begin_look(self) -> int:
        """A number for a look that begins now, or for a question that only later looks can answer."""
        self._looks += 1
        return self._looks

    def end_look(self, number: int) -> None:
        """Note that the look of this number has shown where the log ends."""
        self.looked = max(self.looked, number)

    def saw(self, answered: Instant) -> None:
        """An answer came."""
        if answered.date_us is not None:
            self.seen = answered

    def advance(self, entry: Entry) -> None:
        """Fold the next entry; one that is folded already changes nothing."""
        if entry.n == self.head.n + 1:
            self.head = fold_entry(self.head, entry)
            self._remember(entry.n, entry.nonce, entry.objects)
            self.crowd.note(entry.n, entry.nonce, self.sources.elapsed_us())

    def fold_own(
        self,
        *,
        epoch: str,
        n: int,
        nonce: bytes,
        data: bytes,
        files: Mapping[str, bytes],
        before: RepoState,
        after: RepoState,
        freshness: Instant | None,
    ) -> None:
        """Fold an entry of our own that has landed.

        Parameters
        ----------
        files
            That are embedded in it.
        before, after
            States before and after it, as it was validated.
        freshness
            The moment from which on this answer shows the end of the log; None: it does not.
        """
        if self.head.epoch != epoch or self.head.n != n - 1:
            return
        if self.head.state is before:
            # Validated on exactly this state, by the same fold, on the events as decoded: no need to fold them again.
            self.head = replace(self.head, n=n, state=after)
        else:
            self.head = fold_entry(self.head, decode_entry(data, n=n))
        self._remember(n, nonce, files)
        self.crowd.note(n, nonce, self.sources.elapsed_us())
        if freshness is not None:
            self.freshness = freshness

    def adopt(self, opened: Opened) -> None:
        """Adopt the log as it was opened anew, unless that is older than the known state."""
        if opened.head.epoch == self.head.epoch and opened.head.n < self.head.n:
            return
        if opened.head.epoch != self.head.epoch:
            self._nonces.clear()
        self.head, self.freshness, self.known = opened.head, opened.freshness, opened.known
        self.embedded.clear()
        self._keep_copies(opened.known)
        for entry in opened.tail:
            self._remember(entry.n, entry.nonce, entry.objects)

    def checkpointed(self, head: Head, written: Written) -> None:
        """``repo`` holds at least ``head``."""
        if self.head.epoch != head.epoch:
            return
        self.repo_is(written.known)
        if written.info is not None and self.checkpoint_n <= self.head.n:
            self.head = replace(
                self.head, state=resting_on(self.state, written.info, head.state if written.by_us else None)
            )

    def repo_is(self, known: Known) -> None:
        """``repo`` has been seen, a checkpoint of this log."""
        self.known = known
        self.embedded.forget_through(self.checkpoint_n)

    def nonce_of(self, epoch: str, n: int) -> bytes | None:
        """Nonce of the entry in a slot, where this client has read it not long ago."""
        return self._nonces.get(n) if epoch == self.head.epoch else None

    def _remember(self, n: int, nonce: bytes, files: Mapping[str, bytes]) -> None:
        self._nonces[n] = nonce
        while len(self._nonces) > _MANY_NONCES:
            del self._nonces[next(iter(self._nonces))]
        if n in self.head.voided:
            return
        self.embedded.remember(n, files)
        for key, data in files.items():
            self.files.put(key, data, len(data))

    def _keep_copies(self, known: Known) -> None:
        self.known_objects = NO_FILES if known.marker is None else known.marker.files
        for key, data in self.known_objects.items():
            self.files.put(key, data, len(data))

    # ------------------------------------------------------------------ embedded files

    def files_to_open_with(self, state: RepoState) -> Mapping[str, bytes]:
        """As `icechunk.log.repository.marker.files_to_open_with`; looked for once for each tip."""
        tip = state.branches[MAIN]
        if self._to_open_with is None or self._to_open_with[0] != tip:
            try:
                found = files_to_open_with(state, self.files.get)
            except FormatError:  # it is embedded in an entry that this client has not read
                found = {}
            self._to_open_with = tip, found
        return self._to_open_with[1]

    @property
    def embeds_much(self) -> bool:
        """Whether putting the embedded files before a checkpoint costs more than reading ``repo`` first."""
        return len(self.embedded) > _MANY_FILES or self.embedded.dropped > self.checkpoint_n

    async def look_at_repo(self) -> LostRepo | None:
        """Learn which entries ``repo`` holds, if many files are embedded: another client's checkpoint may have
        put most of them. `LostRepo`: it is no checkpoint of this log any more."""
        if not self.embeds_much:
            return None
        epoch = self.head.epoch
        found = await read_repo(self.storage, self.sources)
        if found is None or found.known.marker is None or found.known.marker.epoch != epoch:
            return LostRepo(found=found)
        # An answer may be older than a checkpoint that this client has written meanwhile.
        if self.head.epoch == epoch and found.known.marker.n >= self.checkpoint_n:
            self.repo_is(found.known)
        return None

    async def embedded_files(self, after: int, end: int) -> Mapping[str, bytes]:
        """As `icechunk.log.repository.entries.embedded.Embedded.embedded_files`."""
        return await self.embedded.get(self.head.epoch, after, end)

    async def materialize(self, after: int, end: int) -> None:
        """As `icechunk.log.repository.entries.embedded.Embedded.materialize`."""
        await self.embedded.materialize_dropped(self.head.epoch, after, end)
        await self.embedded.materialize(after, end)

    async def find_file(self, key: str) -> bytes | None:
        """A file embedded in an entry, up to the end of the log as it is now; None: none of that name is."""
        for look in (False, True):
            if look:
                await self.refresh()
            found = self.embedded.find(key)
            if found is not None:
                return found
        found = await self.embedded.find_dropped(self.head.epoch, self.checkpoint_n, key)
        if found is None and self.known.marker is not None:
            # Their objects may be missing, or torn, after a power failure.
            found = await self.embedded.find_in_log(self.head.epoch, self.durable_n, self.checkpoint_n, key)
        return found

    # ------------------------------------------------------------------ looking

    async def refresh(self) -> RepoState:
        """Learn everything up to the end of the log as it is now; see `RepositoryLog.refresh`.

        Steady state: one GET of the slot after the head, which is empty. An empty slot is as consistent as a listing
        and an order of magnitude cheaper; only where it is taken, a listing says how far there is to go, while the
        slot after it is read: being one entry behind costs two round trips, being far behind three.

        Calls made while a look is under way share the next one, which begins after they were made.
        """
        asked = self.begin_look()
        while (looking := self._looking) is not None:
            await asyncio.shield(looking)
            if self.looked > asked:
                return self.state
        looking = self._looking = asyncio.get_running_loop().create_future()
        try:
            number = self.begin_look()
            state = await self._refresh()
            self.end_look(number)
            return state
        finally:
            self._looking = None
            looking.set_result(None)

    async def _refresh(self) -> RepoState:
        while True:
            if self.state.sealed and self.ended_reason is None:
                await self._try_leave_sealed()
            if self.state.sealed or self.ended_reason is not None:
                # Changes acknowledged after the end are in the layout that the conversion led to.
                if await self._follow_repo():
                    continue
                return self.state
            looked = await self._read_expected() or await self._read_on()
            # Or another task of this loop folded past it meanwhile, which includes all that was asked for.
            if looked and not self.state.sealed and self.ended_reason is None:
                return self.state

    async def _read_on(self) -> bool:
        """Read the slot after the head, and if it is taken the rest of the log; False: look again."""
        freshness, n, asked = self.freshness, self.head.n, instant(self.sources)
        try:
            found = await read_slot(self.storage, self.head.epoch, n + 1)
        except AccessDeniedError:
            # Neither it nor the slot before it can be read: `repo` shows where the log continues (rule 6).
            opened = await self.reopen()
            if isinstance(opened, Opened) and opened.head.n < self.head.n:
                raise
            return True
        answered = instant(self.sources, None if found is None else found[1].date_us)
        self.saw(answered)
        self.crowd.note_trip(answered.elapsed_us - asked.elapsed_us)
        if not is_fresh(freshness, answered):
            # Rule 5: the slot may have been pruned, and "empty" would say nothing.
            await self.reopen()
            return False
        if found is not None:
            self.advance(found[0])
            await self._catch_up(asked)
        elif self.head.n == n:
            self.freshness = asked
        return True

    async def _read_expected(self) -> bool:
        """Where other clients write too, read as many slots at once as have probably been taken, and one more; False:
        nothing is decided.

        One round trip to the end of the log, and no listing, which would be late by the time that it takes, and is the
        request that costs a store most.
        """
        expected = self.crowd.expected(self.sources.elapsed_us())
        while expected:
            epoch, n, freshness, asked = self.head.epoch, self.head.n, self.freshness, instant(self.sources)
            try:
                entries, more = await read_some(self.storage, epoch, n, expected + 1)
                self.crowd.note_trip(self.sources.elapsed_us() - asked.elapsed_us)
            except AccessDeniedError:
                return False
            if not self._advance_all(entries, epoch, freshness) or (more and not entries):
                return False
            if not more:
                if self.head.n == n + len(entries):
                    self.freshness = asked
                return True
        return False

    async def read_next(self) -> None:
        """Fold the slot after the head if it is taken. More may follow: this does not look for the end of the log."""
        epoch, freshness = self.head.epoch, self.freshness
        found = await read_slot(self.storage, epoch, self.head.n + 1)
        if found is not None:
            self._advance_all([found[0]], epoch, freshness)

    async def _catch_up(self, asked: Instant) -> None:
        """Fold the rest of a tail that is known to have grown."""
        epoch, n, freshness = self.head.epoch, self.head.n, self.freshness
        listed, following = await run_pair(
            partial(try_list_head, self.storage, epoch), partial(read_slot, self.storage, epoch, n + 1)
        )
        folded = self._advance_all([] if following is None else [following[0]], epoch, freshness)
        if folded and listed is None:
            entries, listed = await read_until_absent(self.storage, epoch, self.head.n)
            folded = self._advance_all(entries, epoch, freshness)
        if folded and listed is not None and self.head.n < listed:
            # The slot after the listed ones too: in a crowd it is taken by now, and a commit on the one before would be
            # as late as the listing.
            entries = await read_tail(self.storage, epoch, self.head.n, listed + 1)
            folded = self._advance_all(entries, epoch, freshness)
        if not folded or listed is None or self.head.n < listed:
            await self.reopen()
        elif self.head.n == listed:
            self.freshness = asked

    def _advance_all(self, entries: Sequence[Entry], epoch: str, freshness: Instant) -> bool:
        """Fold entries that were read just now; False: they are not fresh (rule 5), or belong to an ended log."""
        if self.head.epoch != epoch or not is_fresh(freshness, instant(self.sources)):
            return False
        for entry in entries:
            self.advance(entry)
        return True

    async def reopen(self) -> Opened | RepoObject:
        """Find the end of the log anew, from ``repo``; the returned state is not adopted in every case."""
        while True:
            epoch = self.head.epoch
            opened = await open_head(self.storage, self.sources)
            if self.head.epoch == epoch:
                break
            # Another task has moved on to a later log meanwhile; this answer may be from before it.
        if isinstance(opened, RepoObject):
            await self.lost_repo(opened, epoch)
        elif opened.head.epoch == epoch:
            self.adopt(opened)
        else:
            await self._change_epoch(opened, epoch)
        return opened

    async def _change_epoch(self, opened: Opened, epoch: str) -> None:
        """There is another log: the client's was converted, and what came of that was converted again."""
        seal = await self._find_seal(epoch)
        if (
            seal is not None
            and seal.reason == CONVERT
            and self.head.epoch == epoch
            and self._goes_on(opened.head.state)
        ):
            self.adopt(opened)
        else:
            # Its history is another one: there was a takeover in between. A reader never goes back.
            await self.lost_repo(None, epoch)

    def _goes_on(self, state: RepoState) -> bool:
        """Whether a state read from ``repo`` after a conversion is at least as new as the known one."""
        return state.last_time_us >= self.state.last_time_us

    async def _find_seal(self, epoch: str) -> Sealed | None:
        """The seal of the client's log, after ``repo`` was seen to be no checkpoint of it any more; None: it has none.

        Folds up to it as long as answers count. From then on an empty slot does not show the end of the log, since a
        log that was converted is pruned up to its seal (rule 8).
        """
        while self.state.seal is None and self.head.epoch == epoch:
            freshness, n = self.freshness, self.head.n
            try:
                found = await read_slot(self.storage, epoch, n + 1)
            except AccessDeniedError:
                # Neither it nor the slot before it can be read, perhaps since both were pruned.
                return await find_seal(self.storage, epoch)
            if not is_fresh(freshness, instant(self.sources, None if found is None else found[1].date_us)):
                return await find_seal(self.storage, epoch)
            if self.head.n == n and found is None:
                return None
            if found is not None and self.head.epoch == epoch:
                self.advance(found[0])
        return self.state.seal

    # ------------------------------------------------------------------ leaving

    async def _follow_repo(self) -> bool:
        """Adopt what ``repo`` says now, after the log was converted; True: that is another log that has ended too."""
        if self.taken_over:
            return False
        found = await open_head(self.storage, self.sources)
        if isinstance(found, Opened):
            if found.head.epoch == self.head.epoch or not self._goes_on(found.head.state):
                # The conversion is not finished yet, and this client cannot help; or another task knows more.
                return False
            self.ended_reason = None
            self.adopt(found)
            return self.state.sealed
        state = state_of(found.info, None)
        if self._goes_on(state):
            self.head = replace(self.head, state=replace(state, seal=Sealed(reason=CONVERT)))
        return False

    async def leave_sealed(self) -> None:
        """A seal has been folded: finish the conversion that it began (rule 8)."""
        head = self.head
        await finish_conversion(self.storage, self.sources, head, embedded=self, updates_per_file=self.updates_per_file)
        if self.ended_reason is None and self.head.epoch == head.epoch and head.state.seal is not None:
            self._end(head.state.seal)

    def _end(self, seal: Sealed | None, unlisted: StorageError | None = None) -> None:
        where = self.storage.describe()
        if seal is not None and seal.reason == CONVERT:
            self.ended_reason = f"the repository in {where} has another layout now; open it again"
        else:
            self.taken_over = True
            self.ended_reason = f"the repository in {where} was taken over by another client; open it again"
            if unlisted is not None:
                self.ended_reason = (
                    f"the repository in {where} has another layout now, or was taken over by another client, which "
                    f"only a client with the right to list can find out ({unlisted}); open it again"
                )

    async def _try_leave_sealed(self) -> None:
        # A reader need not help; the next client that opens the repository tries again.
        if not may_write(self.storage):
            return
        try:
            await self.leave_sealed()
        except (IcechunkError, OSError) as error:
            _LOG.warning("%s", error)

    async def lost_repo(self, found: RepoObject | None, epoch: str) -> None:
        """``repo`` is no checkpoint of the log: it was converted, as its seal says, or taken over (rule 8).

        Parameters
        ----------
        found
            The object that is there instead; None: there is none, or it belongs to another log.
        epoch
            That the client knew when it asked.
        """
        if self.ended_reason is not None or self.head.epoch != epoch:
            return
        unlisted: StorageError | None = None
        try:
            seal = await self._find_seal(epoch)
        except NO_LISTING as error:
            seal, unlisted = None, error
        if self.ended_reason is not None or self.head.epoch != epoch:
            return
        if seal is None and await self._was_removed():
            self.ended_reason = f"the repository in {self.storage.describe()} was removed; open it where it is now"
            return
        self._end(seal, unlisted)
        # A client whose knowledge of the end is too old does not seal: the slot after its head may have been pruned.
        # It is told to open the repository again, which finds the end of the log.
        if seal is None and may_write(self.storage) and is_fresh(self.freshness, instant(self.sources)):
            # In a task of its own: the swap in flight, or a checkpoint, may be waiting for this function.
            sealing = self._seal(self.head, self.checkpoint_n, found)
            self.sealer = asyncio.get_running_loop().create_task(sealing, name="icechunk log seal")

    async def _was_removed(self) -> bool:
        """Whether the repository of this log was removed, and perhaps another one created in its place."""
        if await self.is_gone():
            return True
        # On local disk, unlike elsewhere, no client writes to the folder of a log that was removed: no seal is needed.
        marker = self.known.marker
        if not self.storage.defers_syncs or (not self.head.n and (marker is None or marker.durable is None)):
            return False
        return not [page async for page in self.storage.list_pages(epoch_prefix(self.head.epoch)) if page]

    async def is_gone(self) -> bool:
        """Whether the repository was removed, or is being removed."""
        try:
            await self.storage.head(REPO_KEY)
            await self.storage.head(snapshot_key(FIRST_SNAPSHOT))
        except ObjectNotFoundError:
            return True
        except (IcechunkError, OSError):
            # Also the error of a callback for credentials, which the next request raises again.
            return False
        return False

    async def _seal(self, head: Head, checkpoint_n: int, found: RepoObject | None) -> None:
        """Seal the abandoned log in the slot that its writers need next, and report the entries that are only in it."""
        try:
            last, seal = await seal_log(self.storage, self.sources, head.epoch, head.n)
            if seal.reason == CONVERT:
                # The listing did not show it.
                self.taken_over = False
                self._end(seal)
                return
            stranded = await find_stranded(
                self.storage, epoch=head.epoch, last=last, found=found, fallback_n=checkpoint_n
            )
        except (IcechunkError, OSError) as error:
            _LOG.error("%s; sealing its log failed, opening it again tries again: %s", self.ended_reason, error)
            return
        report = stranded.describe(self.storage.describe())
        _LOG.error("%s", report)
        if self.head.epoch == head.epoch:
            self.stranded, self.ended_reason = stranded, report
