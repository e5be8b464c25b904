"""The repo-object layout: format 2.1 as published. Every change replaces ``repo``.

A swap: fold the events into what is known of ``repo``, copy the object to ``overwritten/``, PUT the new one with
If-Match on exactly the version that was folded. Whoever is second gets 412, reads, and folds again. Versions never
come back, since no two states are equal, so a ``repo`` that has another version than the one compared freezes the
outcome of every attempt on the old one; as long as it has that version, a late PUT may still land.

The rules of the log layout carry over to one key: the same bytes are sent again while the object is unchanged
(rule 2), nothing is called failed before that is certain (rule 3), the events of an attempt are one unit (rule 4).
One's own write is recognised by its bytes, in ``repo`` or, where somebody replaced it since, in the copy that he
made; a nonce in ``extra`` makes the bytes unique.

Owners of mutable state, each for one instance on one event loop: `icechunk.log.repository.repo_object.client.RepoView`
holds the newest version seen, this module the attempt that is not settled; only the queue's task writes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from icechunk.errors import (
    CommitOutcomeUnknown,
    ConflictError,
    ErrorKind,
    FormatError,
    IcechunkError,
    ObjectNotFoundError,
    PreconditionFailedError,
    SessionStateError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId
from icechunk.format.keys import REPO_KEY, overwritten_repo_key, overwritten_repo_name, snapshot_key
from icechunk.format.repo.values import Update
from icechunk.log.repository.entries.checkpoint import DEFAULT_UPDATES_PER_FILE, encode
from icechunk.log.repository.entries.entry import decode_events
from icechunk.log.repository.entries.reader import RepoObject, instant, read_repo, read_slot
from icechunk.log.repository.marker import cutoff_of, nonce_of, write_mark
from icechunk.log.repository.ops_log import any_in_history, updates_of
from icechunk.log.repository.port import Layout, OnSent, Propose, RepositoryLog, SwapToken
from icechunk.log.repository.queue import (
    AppendQueue,
    Group,
    Member,
    UpdateRetries,
    build,
    new_snapshots,
    resolve,
    retries_of,
    tell_sent,
)
from icechunk.log.repository.repo_object.client import RepoView, happened, next_window
from icechunk.log.repository.state import MAIN, RepoState, UpdateLog, resting_on, to_repo_info
from icechunk.log.repository.store_check import MatchCheck
from icechunk.runtime.clock import Sources
from icechunk.storage.port import Matches, Storage, Version

__all__ = ["RepoObjectLayout"]

_ROUNDS: Final = 8
_TOKEN: Final = "repo:"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Attempt:
    """One replacement of ``repo``; unsettled until the object is seen to have another version."""

    base: Version
    """The version that it replaces."""
    data: bytes
    nonce: bytes
    time_us: int
    """Of its newest update."""
    snapshots: tuple[ObjectId, ...]
    members: tuple[Member, ...]
    state: RepoState
    """Afterwards."""


class RepoObjectLayout(RepositoryLog):
    """A repository whose log is one object. Made by `icechunk.log.repository.open` and `.create`.

    Parameters
    ----------
    found
        ``repo`` as read.
    updates_per_file
        Most entries of the ops log that ``repo`` holds; None: as the persisted configuration says, else 1000.
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
        updates_per_file: int | None = None,
        retries: UpdateRetries | None = None,
    ) -> None:
        self._storage = storage
        self._sources = sources
        self._updates_per_file = updates_per_file
        self._retries = retries if retries is not None else retries_of(found.info.config)
        self._view = RepoView(storage, sources, found)
        self._unsettled: _Attempt | None = None
        # A copy of that version, made in advance.
        self._copied: tuple[Version, str] | None = None
        self._preparing = False
        self._check = MatchCheck(storage)
        self._losses = 0
        self._queue = AppendQueue(self._swap_next, storage, self._view.next_ticket)

    # ----------------------------------------------------------------- state

    @property
    def state(self) -> RepoState:
        return self._view.state

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
        if self._updates_per_file is not None:
            return max(1, self._updates_per_file)
        config = self.state.config
        persisted = config.get("num_updates_per_repo_info_file") if isinstance(config, dict) else None
        return persisted if isinstance(persisted, int) and persisted > 0 else DEFAULT_UPDATES_PER_FILE

    # --------------------------------------------------------------- refresh

    async def refresh(self) -> RepoState:
        await self._view.read()
        return self.state

    # ---------------------------------------------------------------- append

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
        return await self._queue.append(
            propose, since_us=since_us, deadline_s=deadline_s, on_sent=on_sent, files=files, on_queued=on_queued
        )

    async def prepare_writes(self) -> None:
        """See that the store honours If-Match, and make the copy that the next swap needs, while uploads travel."""
        await self._require_matches()
        if self._preparing or self._queue.swapping.locked() or self._view.left is not None:
            return
        self._preparing = True
        try:
            await self._view.read()
            version = self._view.version
            if self._view.left is None and (self._copied is None or self._copied[0] != version):
                self._copied = (version, await self._copy())
        except (IcechunkError, OSError):
            # Only ever a head start: the swap makes its own copy where this one did not come about.
            return
        finally:
            self._preparing = False

    async def _require_matches(self) -> None:
        await self._check.run((snapshot_key(FIRST_SNAPSHOT), snapshot_key(self.state.branches[MAIN])))

    async def _copy(self) -> str:
        name = overwritten_repo_name(max(self._sources.wall_us(), 0) // 1000, self._sources.random_bytes(12))
        # Of whatever version: if that is not the one replaced in the end, the PUT fails and nobody names this copy.
        await self._storage.copy(REPO_KEY, overwritten_repo_key(name))
        return name

    async def _swap_next(self) -> None:
        await self._require_matches()
        await self._settle_unsettled()
        group, backup = await self._take_group()
        if not group.members:
            return
        try:
            attempt = await self._attempt(group, backup)
        except Exception as error:
            # Something that cannot be encoded: nothing was sent, and those who come after must not suffer.
            for member in group.members:
                tell_sent(member.waiting, None)
                resolve(member.waiting, error)
            return
        self._queue.sent, self._unsettled = attempt.members, attempt
        if await self._settle_attempt(attempt, sent_before=False):
            self._losses = 0
            for member in attempt.members:
                resolve(member.waiting, self.state)
            self._queue.sent = ()
            return
        self._losses += 1
        if self._losses >= self._retries.tries:
            raise ConflictError(
                None,
                None,
                f"cannot change the repository in {self._storage.describe()}: others were first {self._losses} times "
                "in a row; nothing landed. Try again, or allow more tries (repo_update_retries)",
                ErrorKind.UPDATE_ATTEMPTS_EXHAUSTED,
            )
        await self._sources.sleep(self._retries.pause_s(self._sources, self._losses))

    async def _take_group(self) -> tuple[Group, str]:
        """Validate those who wait, and name the copy of the version that they are validated on.

        Who is refused by what may be old news is asked again on new ones. Nothing waits between the last look at the
        queue and the tokens: who leaves later is told that something was sent.
        """
        looked = False
        while True:
            version = self._view.version
            if self._copied is None or self._copied[0] != version:
                self._copied = (version, await self._copy())
                continue
            # Those who were looked for stand in front: who comes later has a higher number.
            waiting = (
                [one for one in self._queue.waiting if one.asked < self._view.looked] if looked else self._queue.waiting
            )
            group = build(self.state, waiting, time_us=max(self._sources.wall_us(), 0))
            if self._view.left is None and all(one.asked < self._view.looked for one, _ in group.refused):
                break
            if looked and self._view.left is not None:
                break
            await self._view.read()
            looked = True
        if self._view.left is not None:
            raise SessionStateError(self._view.left)
        self._view.check_clock()
        (_, backup), self._copied = self._copied, None
        del self._queue.waiting[: group.taken]
        for one, error in group.refused:
            resolve(one, error)
        for one in group.nothing:
            resolve(one, self.state)
        nonce = self._sources.random_bytes(16)
        for member in group.members:
            token = SwapToken(
                epoch=f"{_TOKEN}{version}", n=group.state.last_time_us, nonce=nonce, snapshots=member.snapshots
            )
            tell_sent(member.waiting, token)
        return group, backup

    async def _attempt(self, group: Group, backup: str) -> _Attempt:
        base, before, token = self._view.version, self._view.state, group.members[0].waiting.token
        assert token is not None
        stored = before.updates.newest()
        window = next_window(
            group.state.updates.newer_than(stored[0].updated_at_us if stored else 0),
            stored,
            before=before.repo_before_updates,
            backup=backup,
            limit=self.updates_per_file,
        )
        state = replace(group.state, updates=UpdateLog.of(window.updates), repo_before_updates=window.before)
        mark = write_mark(token.nonce, gc_cutoff_us=state.gc_cutoff_us)
        encoded = await encode(to_repo_info(state, extra=mark))
        return _Attempt(
            base=base,
            data=encoded.data,
            nonce=token.nonce,
            time_us=token.n,
            snapshots=tuple(new_snapshots(decode_events(group.events))),
            members=tuple(group.members),
            state=resting_on(state, encoded.info, state),
        )

    # ---------------------------------------------------------------- settle

    async def _settle_unsettled(self) -> None:
        if self._unsettled is not None:
            await self._settle_attempt(self._unsettled, sent_before=True)

    async def _settle_attempt(self, attempt: _Attempt, *, sent_before: bool) -> bool:
        """Send, and read back, until it is certain whether the attempt landed.

        Raises `CommitOutcomeUnknown` after a bounded number of tries; the attempt stays unsettled then.
        """
        why: Exception | None = None
        for round_ in range(_ROUNDS):
            if round_:
                await self._sources.sleep(self._retries.pause_s(self._sources, round_))
            if round_ or not sent_before:
                asked, look = instant(self._sources), self._view.next_ticket()
                try:
                    put = await self._storage.put(REPO_KEY, attempt.data, Matches(attempt.base))
                except (ObjectNotFoundError, PreconditionFailedError):
                    pass
                except (IcechunkError, OSError) as error:
                    why = error
                else:
                    self._view.landed(put, asked, look, base=attempt.base, state=attempt.state)
                    self._unsettled = None
                    return True
            try:
                data = await self._view.read()
                if data == attempt.data:
                    landed = True
                elif self._view.version == attempt.base and self._view.left is None:
                    # Unchanged: the PUT may still arrive. The same bytes again, and nothing else.
                    continue
                else:
                    landed = await happened(
                        self._storage, self._sources, attempt.snapshots, time_us=attempt.time_us, nonce=attempt.nonce
                    )
            except FormatError:
                raise
            except (IcechunkError, OSError) as error:
                why = error
                continue
            self._unsettled = None
            if not landed:
                self._queue.lost(attempt.members)
            return landed
        raise CommitOutcomeUnknown(
            f"no certain answer from {self._storage.describe()} after {_ROUNDS} tries ({why})", None
        ) from why

    async def settle(self, token: SwapToken) -> bool:
        if not token.epoch.startswith(_TOKEN):
            return await self._settle_in_log(token)
        async with self._queue.swapping:
            try:
                await self._settle_unsettled()
                for _ in range(self._retries.tries):
                    await self._view.read()
                    if any(snapshot in self.state.snapshots for snapshot in token.snapshots):
                        return True
                    if f"{_TOKEN}{self._view.version}" != token.epoch or self._view.left is not None:
                        return await happened(
                            self._storage, self._sources, token.snapshots, time_us=token.n, nonce=token.nonce
                        )
                    # Still the version that the write would replace: give it another one, and it never lands.
                    await self._touch()
            except CommitOutcomeUnknown as error:
                raise StorageError(f"cannot settle yet, call again: {error}") from error
        raise StorageError(f"cannot settle yet, call again: {self._storage.describe()} gives no certain answer")

    async def _settle_in_log(self, token: SwapToken) -> bool:
        """The swap of a log that the repository was kept in before: it was sealed, nothing new lands there."""
        if await any_in_history(self._storage, await self.refresh(), token.snapshots):
            return True
        if token.snapshots:
            return False
        found = await read_slot(self._storage, token.epoch, token.n)
        if found is None:
            raise CommitOutcomeUnknown(
                f"slot {token.n} of the log that {self._storage.describe()} was kept in is empty; look whether the "
                "change is there",
                token,
            )
        return found[0].nonce == token.nonce

    async def _touch(self) -> None:
        """Replace ``repo`` by the same state with another mark; for holders of ``swapping``."""
        await self._require_matches()
        found = await read_repo(self._storage, self._sources)
        if found is None or found.known.version != self._view.version:
            return
        mark = write_mark(
            nonce_of(found.info.extra) or b"",
            self._sources.random_bytes(16),
            gc_cutoff_us=max(cutoff_of(found.info.extra), self.state.gc_cutoff_us),
        )
        with suppress(PreconditionFailedError):
            encoded = await encode(replace(found.info, extra=mark))
            await self._storage.put(REPO_KEY, encoded.data, Matches(found.known.version))

    # ------------------------------------------------------------- the rest

    async def checkpoint(self) -> None:
        """Nothing: ``repo`` is the truth itself."""

    def updates(self) -> AsyncIterator[Update]:
        return updates_of(self._storage, self.state)

    async def aclose(self) -> None:
        await self._queue.aclose()
