"""The repo-object layout: format 2.1 as published. Every change replaces ``repo``.

An attempt: fold the events into the newest known state, copy the object to ``overwritten/``, PUT the new one
with If-Match on exactly the version that was folded. The second writer gets 412, reads, and folds again. Versions
never come back, since no two states are equal, so a ``repo`` that has another version than the one compared freezes
the outcome of every attempt on the old one; as long as it has that version, a late PUT may still land.

The parts common to all layouts are in `icechunk.log.repository.settle`. A client recognises its own write by the bytes,
in ``repo`` or, if another client has replaced it since, in the copy that this one made; a nonce in ``extra`` makes the
bytes unique.

Where the repository was converted to a log, nothing is written any more, and readers follow into the log.

Owners of mutable state, each for one instance on one event loop:
`icechunk.log.repository.repo_object.client.RepoView` holds the newest version seen, a `LogReader` the state of the
log, this module the copy made in advance; only the engine's task writes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from icechunk.errors import (
    ConflictError,
    ErrorKind,
    IcechunkError,
    ObjectNotFoundError,
    PreconditionFailedError,
    SessionStateError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT
from icechunk.format.keys import REPO_KEY, overwritten_repo_key, overwritten_repo_name, snapshot_key
from icechunk.format.repo.repo_info import Update
from icechunk.log.repository.conditional import replace_object
from icechunk.log.repository.marker import cutoff_of, nonce_of, write_mark
from icechunk.log.repository.objects import RepoObject, encode, read_repo, updates_per_file_of
from icechunk.log.repository.ops_log import happened, updates_of
from icechunk.log.repository.port import FILES_BYTES, MAX_FILES, Layout, SwapToken
from icechunk.log.repository.queue import Attempt, Group, UpdateRetries, Waiting, build, retries_of
from icechunk.log.repository.repo_object.client import LogReader, RepoView, Successors, next_window
from icechunk.log.repository.settle import CLOSE_GRACE_S, SwappedLog
from icechunk.log.repository.state import MAIN, RepoState, UpdateLog, resting_on, to_repo_info
from icechunk.log.repository.store_check import MatchCheck
from icechunk.log.repository.tokens import REPO_TOKEN, settle_ended
from icechunk.runtime.clock import Sources
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.tasks import finish_task
from icechunk.storage.outcome import Fate
from icechunk.storage.port import Matches, Put, Storage, Version
from icechunk.transfer.cache import WeightedCache

__all__ = ["RepoObjectLayout"]


@dataclass(slots=True, kw_only=True, eq=False)
class _Replacement(Attempt):
    """One replacement of one version of ``repo``."""

    base: Version
    """The version that it replaces."""
    copy: str
    """Key of the copy of that version."""
    data: bytes


class RepoObjectLayout(SwappedLog[_Replacement]):
    """A repository whose log is one object. Made by `icechunk.log.repository.open` and `.create`.

    Parameters
    ----------
    found
        ``repo`` as read.
    updates_per_file
        Most entries of the ops log that ``repo`` holds; None: as the persisted configuration says, else 1000.
    successors
        What this client goes on with once the repository has another layout.
    retries
        What to do about lost races; None: as the persisted configuration says.
    """

    layout = Layout.REPO

    def __init__(
        self,
        storage: Storage,
        sources: Sources,
        found: RepoObject,
        *,
        successors: Successors,
        updates_per_file: int | None = None,
        retries: UpdateRetries | None = None,
    ) -> None:
        super().__init__(storage, sources)
        self._updates_per_file = updates_per_file
        self._retries = retries if retries is not None else retries_of(found.info.config)
        self._successors = successors
        self._view = RepoView(storage, sources, found, successors)
        # A copy of that version, made in advance.
        self._copied: tuple[Version, str] | None = None
        self._preparing = False
        self._check = MatchCheck(storage)
        # Reads the log that the repository was converted to, and whatever that is converted to.
        self._log: LogReader | None = None
        self._files: WeightedCache[str, bytes] = WeightedCache(FILES_BYTES, MAX_FILES)

    # ----------------------------------------------------------------- state

    @property
    def state(self) -> RepoState:
        return self._view.state if self._log is None else self._log.state

    @property
    def ended_reason(self) -> str | None:
        return self._view.ended_reason

    @property
    def version(self) -> Version:
        """The newest version of ``repo`` that this instance knows."""
        return self._view.version

    @property
    def store_time_us(self) -> int:
        return self._view.store_time_us

    @property
    def updates_per_file(self) -> int:
        """Most entries of the ops log that ``repo`` holds."""
        return updates_per_file_of(self._updates_per_file, self.state.config)

    def share_files(self, files: WeightedCache[str, bytes]) -> None:
        self._files = files
        if self._log is not None:
            self._log.files = files

    async def find_file(self, key: str) -> bytes | None:
        return None if self._log is None else await self._log.find_file(key)

    async def refresh(self) -> RepoState:
        while self._log is None and await self._view.read() is None:
            await self._follow_into_log()
        if self._log is not None:
            await self._log.refresh()
        await self.complete()
        await self.tell_told()
        if self._log is not None and self._log.taken_over:
            raise SessionStateError(self._log.ended_reason or "")
        return self.state

    async def complete(self) -> None:
        """As `RepoView.complete`; part of opening."""
        await self._view.complete()

    async def _follow_into_log(self) -> None:
        """Go on as a reader of the log that the repository was converted to; nothing where it was converted back."""
        log = await self._successors.open_log(self._files)
        if log is not None and self._log is None and log.state.last_time_us >= self.state.last_time_us:
            self._log = log

    # ----------------------------------------------------------- preparation

    async def prepare_writes(self) -> None:
        """Check that the store honours If-Match, and copy ``repo`` for the next swap, while uploads are under way."""
        await self._require_matches()
        if self._preparing or self.swapping.locked() or self._view.ended_reason is not None:
            return
        self._preparing = True
        try:
            await self._view.read()
            version = self._view.version
            if self._view.ended_reason is None and (self._copied is None or self._copied[0] != version):
                self._copied = (version, await self._copy())
        except (IcechunkError, OSError):
            # Done in advance only: the swap makes its own copy if this one failed.
            return
        finally:
            self._preparing = False

    async def _require_matches(self) -> None:
        await self._check.run((snapshot_key(FIRST_SNAPSHOT), snapshot_key(self.state.branches[MAIN])))

    async def _copy(self) -> str:
        name = overwritten_repo_name(max(self._sources.wall_us(), 0) // 1000, self._sources.random_bytes(12))
        # A copy of any version: if that is not the one replaced in the end, the PUT fails and nothing names this copy.
        if self._storage.defers_syncs:
            # The replacement makes it durable.
            data = (await self._storage.get(REPO_KEY)).data
            await self._storage.put_unsynced([Put(overwritten_repo_key(name), data)])
        else:
            await self._storage.copy(REPO_KEY, overwritten_repo_key(name))
        return name

    # ------------------------------------------------- encoding, condition, recognition

    def _begin_look(self) -> int:
        return self._view.next_ticket()

    @property
    def _looked(self) -> int:
        return self._view.looked

    async def _look_anew(self) -> None:
        await self._view.read()
        self._require_open()

    async def _ready(self) -> None:
        await self._require_matches()
        if self._view.ended_reason is not None:
            await self._look_anew()
        self._view.check_clock()

    def _require_open(self) -> None:
        if self._view.ended_reason is not None:
            raise SessionStateError(self._view.ended_reason)

    async def _build(self, waiting: Sequence[Waiting]) -> Group:
        while self._copied is None or self._copied[0] != self._view.version:
            version = self._view.version
            self._copied = (version, await self._copy())
        self._require_open()
        return build(self.state, waiting, time_us=max(self._sources.wall_us(), 0))

    async def _make(self, group: Group) -> _Replacement:
        base, before, nonce = self._view.version, self._view.state, self._sources.random_bytes(16)
        assert self._copied is not None
        stored = before.updates.newest()
        window = next_window(
            group.state.updates.newer_than(stored[0].updated_at_us if stored else 0),
            stored,
            before=before.repo_before_updates,
            backup=self._copied[1],
            limit=self.updates_per_file,
        )
        state = replace(group.state, updates=UpdateLog.of(window.updates), repo_before_updates=window.before)
        encoded = await encode(to_repo_info(state, extra=write_mark(nonce, gc_cutoff_us=state.gc_cutoff_us)))
        return _Replacement(
            epoch=f"{REPO_TOKEN}{base}",
            n=0,
            nonce=nonce,
            time_us=group.state.last_time_us,
            base=base,
            copy=overwritten_repo_key(self._copied[1]),
            data=encoded.data,
            state=resting_on(state, encoded.info, state),
        )

    async def _send(self, attempt: _Replacement, storage: Storage) -> bool:
        look = self._view.next_ticket()
        # A copy that one attempt names is no other's.
        self._copied = None
        try:
            put = await storage.put_after(
                (*attempt.unsynced, attempt.copy), Put(REPO_KEY, attempt.data, Matches(attempt.base))
            )
        except (ObjectNotFoundError, PreconditionFailedError):
            return False
        self._view.landed(put, look, base=attempt.base, state=attempt.state)
        return True

    async def _lost(self) -> None:
        if self._losses >= self._retries.tries:
            losses, self._losses = self._losses, 0
            raise ConflictError(
                None,
                None,
                f"cannot change the repository in {self._storage.describe()}: others were first {losses} times "
                "in a row; nothing landed. Try again, or allow more tries (repo_update_retries)",
                ErrorKind.UPDATE_ATTEMPTS_EXHAUSTED,
            )
        await self._sources.sleep(self._retries.pause_s(self._sources, self._losses))

    async def _refused_after_a_loss(self) -> None:
        """The pause of ``repo_update_retries`` was made before the look that refused."""

    def _passed(self, attempt: _Replacement) -> bool:
        return self._view.version != attempt.base or self._view.ended_reason is not None

    async def _look(self, attempt: _Replacement) -> Fate:
        data = await self._view.read()
        if data == attempt.data:
            return Fate.LANDED
        if not self._passed(attempt):
            return Fate.OPEN
        # The same snapshots may be in another attempt for this version; then only the mark distinguishes the two.
        alone = all(told is attempt or told.place != attempt.place for told in self._told)
        found = await read_repo(self._storage, self._sources)
        landed: bool | None = False
        if found is not None:
            landed = await happened(
                self._storage,
                found.info,
                attempt.snapshots if alone else (),
                nonces=(attempt.nonce,),
                times_us=(attempt.time_us,),
            )
        return Fate.UNDECIDED if landed is None else Fate.LANDED if landed else Fate.LOST

    # ---------------------------------------------------------------- settle

    async def settle(self, token: SwapToken) -> bool:
        if not token.epoch.startswith(REPO_TOKEN):
            return await settle_ended(self._storage, self._sources, token)
        async with self.swapping:
            for _ in range(self._retries.tries):
                is_log = await self._view.read() is None
                if is_log or f"{REPO_TOKEN}{self._view.version}" != token.epoch:
                    await self._recall()
                    return await settle_ended(self._storage, self._sources, token)
                # Still the version that the write would replace: give it another one, and it never lands.
                await self._touch()
        raise self._cannot_settle()

    async def _touch(self) -> None:
        """Replace ``repo`` by the same state with another mark; for holders of `swapping`."""
        await self._require_matches()
        found = await read_repo(self._storage, self._sources)
        if found is None or found.known.version != self._view.version:
            return
        mark = write_mark(
            nonce_of(found.info.extra) or b"",
            self._sources.random_bytes(16),
            gc_cutoff_us=max(cutoff_of(found.info.extra), self.state.gc_cutoff_us),
        )
        encoded = await encode(replace(found.info, extra=mark))
        await replace_object(
            self._storage, self._sources, REPO_KEY, encoded.data, found.known.version, self._cannot_settle()
        )

    def _cannot_settle(self) -> StorageError:
        return StorageError(f"cannot settle yet, call again: {self._storage.describe()} gives no certain answer")

    # ------------------------------------------------------------- the rest

    async def checkpoint(self) -> None:
        """Nothing: ``repo`` is the state itself."""

    def updates(self) -> AsyncIterator[Update]:
        return updates_of(self._storage, self.state)

    async def aclose(self) -> None:
        await super().aclose()
        if self._log is not None:
            await finish_task(self._log.sealer, CLOSE_GRACE_S)
