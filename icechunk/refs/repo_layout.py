"""The repo-object layout: format 2.1 as published. Every change replaces ``repo``.

A swap: fold the events into what is known of ``repo``, copy the object to ``overwritten/``, PUT the new one with
If-Match on exactly the version that was folded. Whoever is second gets 412, reads, and folds again. Versions never
come back, since no two states are equal, so a ``repo`` that has another version than the one compared freezes the
outcome of every attempt on the old one; as long as it has that version, a late PUT may still land.

The rules of the log layout carry over to one key: the same bytes are sent again while the object is unchanged
(rule 2), nothing is called failed before that is certain (rule 3), the events of an attempt are one unit (rule 4).
One's own write is recognised by its bytes, in ``repo`` or, where somebody replaced it since, in the copy that he
made; a nonce in ``extra`` makes the bytes unique.

Who owns what: one instance belongs to one event loop and owns the newest version it has seen; the queue's task is
the only one that writes. Reads may overtake each other, so each takes a ticket, and the later one is believed.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
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
    ReadOnlyError,
    RepositoryNotFoundError,
    SessionStateError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId
from icechunk.format.keys import REPO_KEY, overwritten_repo_key, overwritten_repo_name, snapshot_key
from icechunk.format.repo import decode_repo
from icechunk.format.repo_values import CommitAmended, NewCommit, NewDetachedSnapshot, Update
from icechunk.refs.append_queue import AppendQueue, resolve, tell_sent
from icechunk.refs.base import Layout, OnSent, Propose, RepositoryLog, SwapToken
from icechunk.refs.carried import put_once
from icechunk.refs.commit_queue import Group, Member, build, new_snapshots
from icechunk.refs.entry import decode_events
from icechunk.refs.log_checkpoint import DEFAULT_UPDATES_PER_FILE, encode
from icechunk.refs.log_reader import RepoObject, instant, known_of, read_repo, read_slot
from icechunk.refs.match_check import MatchCheck
from icechunk.refs.ops_log import any_in_history, updates_of
from icechunk.refs.proof import MAX_SKEW_US, Instant, clock_error_us, store_time_us
from icechunk.refs.repo_history import next_window
from icechunk.refs.state import MAIN, RepoState, from_repo_info, resting_on, to_repo_info
from icechunk.refs.update_retries import UpdateRetries, retries_of
from icechunk.refs.updates import UpdateLog
from icechunk.refs.write_mark import cutoff_of, nonce_of, write_mark
from icechunk.sources import SYSTEM, Sources
from icechunk.storage.base import Matches, Storage, Version

__all__ = ["RepoObjectLayout", "is_repo_object"]

_SNAPSHOT_CHANGES: Final = (NewCommit, CommitAmended, NewDetachedSnapshot)
_ROUNDS: Final = 8
_TOKEN: Final = "repo:"


def is_repo_object(found: RepoObject) -> bool:
    """Whether a ``repo`` object is the truth itself, and not the checkpoint of a log."""
    return found.known.marker is None or not found.known.read_only


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """A version of ``repo``, folded."""

    version: Version
    state: RepoState
    ticket: int
    size_bytes: int


class RepoObjectLayout(RepositoryLog):
    """A repository whose log is one object. Made by `RepoObjectLayout.open` or `icechunk.refs.create_repo`.

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
        self._tickets = itertools.count(1)
        self._seen = _Seen(
            version=found.known.version,
            state=from_repo_info(found.info, gc_cutoff_us=cutoff_of(found.info.extra)),
            ticket=0,
            size_bytes=found.known.size_bytes,
        )
        # Number of the newest look at ``repo``: a refusal counts only by a look after the call (rule 3).
        self._looked = 0
        # Ticket of the newest change of ours that landed.
        self._landing = 0
        self._clock = found.asked
        self._left: str | None = None
        self._unsettled: _Attempt | None = None
        # A copy of that version, made in advance.
        self._copied: tuple[Version, str] | None = None
        self._preparing = False
        self._check = MatchCheck(storage)
        self._losses = 0
        self._queue = AppendQueue(self._swap_next, storage.describe)

    @classmethod
    async def open(
        cls,
        storage: Storage,
        sources: Sources = SYSTEM,
        *,
        updates_per_file: int | None = None,
        retries: UpdateRetries | None = None,
    ) -> RepoObjectLayout:
        """Read ``repo``.

        Raises
        ------
        RepositoryNotFoundError
            There is none.
        SessionStateError
            It is the checkpoint of a log (kind ``unsupported-operation-for-version``).
        FormatError
            It cannot be read.
        """
        found = await read_repo(storage, sources)
        if found is None:
            raise RepositoryNotFoundError(
                f"the repository doesn't exist: none of format 2 in {storage.describe()}; check bucket and prefix"
            )
        if not is_repo_object(found):
            raise SessionStateError(
                f"the repository in {storage.describe()} is kept in a log, not in its repo object: open it with that "
                "layout, or convert it",
                ErrorKind.UNSUPPORTED_OPERATION_FOR_VERSION,
            )
        return cls(storage, sources, found, updates_per_file=updates_per_file, retries=retries)

    # ----------------------------------------------------------------- state

    @property
    def state(self) -> RepoState:
        return self._seen.state

    @property
    def version(self) -> Version:
        """The newest version of ``repo`` that this instance knows."""
        return self._seen.version

    @property
    def store_time_us(self) -> int:
        now = instant(self._sources)
        return store_time_us(self._clock, now, resolution_us=self._storage.clock_resolution_us)

    @property
    def updates_per_file(self) -> int:
        """Most entries of the ops log that ``repo`` holds."""
        if self._updates_per_file is not None:
            return max(1, self._updates_per_file)
        config = self.state.config
        persisted = config.get("num_updates_per_repo_info_file") if isinstance(config, dict) else None
        return persisted if isinstance(persisted, int) and persisted > 0 else DEFAULT_UPDATES_PER_FILE

    def _saw(self, asked: Instant, date_us: int | None) -> None:
        if date_us is not None:
            self._clock = Instant(date_us=date_us, elapsed_us=asked.elapsed_us, wall_us=asked.wall_us)

    # --------------------------------------------------------------- refresh

    async def refresh(self) -> RepoState:
        await self._read()
        return self.state

    async def _read(self) -> bytes | None:
        """GET ``repo`` and adopt it; its bytes, or None where the repository has another layout by now."""
        ticket = -1
        while ticket < self._landing:
            # Again where a change of this client's landed meanwhile: the answer may be older than that, or newer.
            ticket, asked = next(self._tickets), instant(self._sources)
            try:
                answer = await self._storage.get(REPO_KEY)
            except ObjectNotFoundError:
                raise RepositoryNotFoundError(
                    f"the repository in {self._storage.describe()} is gone: its object 'repo' was deleted"
                ) from None
            self._saw(asked, answer.date_us)
            self._looked = max(self._looked, ticket)
        if ticket < self._seen.ticket:
            return answer.data
        if answer.version == self._seen.version:
            self._seen = replace(self._seen, ticket=ticket)
            return answer.data
        info = decode_repo(answer.data)
        known = known_of(info, answer.version, len(answer.data))
        if known.marker is not None and known.read_only:
            self._left = f"the repository in {self._storage.describe()} is kept in a log now; open it again"
            return None
        self._left = None
        # The official library drops what it does not know: then this client still knows the fence, others do not.
        cutoff_us = max(cutoff_of(info.extra), self._seen.state.gc_cutoff_us)
        self._seen = _Seen(
            version=answer.version,
            state=from_repo_info(info, gc_cutoff_us=cutoff_us),
            ticket=ticket,
            size_bytes=len(answer.data),
        )
        return answer.data

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
        if not self._storage.supports_writes:
            raise ReadOnlyError(
                f"cannot change the repository: {self._storage.describe()} can only be read",
                ErrorKind.READ_ONLY_STORAGE,
            )
        for key, data in files.items():
            await put_once(self._storage, key, data)
        if on_queued is not None:
            on_queued()
        return await self._queue.append(
            propose, since_us=since_us, deadline_s=deadline_s, on_sent=on_sent, asked=next(self._tickets)
        )

    async def prepare_writes(self) -> None:
        """See that the store honours If-Match, and make the copy that the next swap needs, while uploads travel."""
        await self._require_matches()
        if self._preparing or self._queue.swapping.locked() or self._left is not None:
            return
        self._preparing = True
        try:
            await self._read()
            version = self._seen.version
            if self._left is None and (self._copied is None or self._copied[0] != version):
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
            version = self._seen.version
            if self._copied is None or self._copied[0] != version:
                self._copied = (version, await self._copy())
                continue
            # Those who were looked for stand in front: who comes later has a higher number.
            waiting = (
                [one for one in self._queue.waiting if one.asked < self._looked] if looked else self._queue.waiting
            )
            group = build(self.state, waiting, time_us=max(self._sources.wall_us(), 0))
            if self._left is None and all(one.asked < self._looked for one, _ in group.refused):
                break
            if looked and self._left is not None:
                break
            await self._read()
            looked = True
        if self._left is not None:
            raise SessionStateError(self._left)
        self._check_clock()
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
        before, token = self._seen, group.members[0].waiting.token
        assert token is not None
        stored = before.state.updates.newest()
        window = next_window(
            group.state.updates.newer_than(stored[0].updated_at_us if stored else 0),
            stored,
            before=before.state.repo_before_updates,
            backup=backup,
            limit=self.updates_per_file,
        )
        state = replace(group.state, updates=UpdateLog.of(window.updates), repo_before_updates=window.before)
        mark = write_mark(token.nonce, gc_cutoff_us=state.gc_cutoff_us)
        encoded = await encode(to_repo_info(state, extra=mark))
        return _Attempt(
            base=before.version,
            data=encoded.data,
            nonce=token.nonce,
            time_us=token.n,
            snapshots=tuple(new_snapshots(decode_events(group.events))),
            members=tuple(group.members),
            state=resting_on(state, encoded.info, state),
        )

    def _check_clock(self) -> None:
        error_us = clock_error_us(self._clock, instant(self._sources))
        if abs(error_us) > MAX_SKEW_US:
            raise SessionStateError(
                f"this machine's clock is {abs(error_us) // 1_000_000} s {'ahead of' if error_us > 0 else 'behind'} "
                f"the clock of {self._storage.describe()}; at most {MAX_SKEW_US // 1_000_000} s are accepted for "
                "writing. Set the clock",
                ErrorKind.SNAPSHOT_TIMESTAMP,
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
                asked, look = instant(self._sources), next(self._tickets)
                try:
                    put = await self._storage.put(REPO_KEY, attempt.data, Matches(attempt.base))
                except (ObjectNotFoundError, PreconditionFailedError):
                    pass
                except (IcechunkError, OSError) as error:
                    why = error
                else:
                    self._saw(asked, put.date_us)
                    self._looked = max(self._looked, look)
                    if self._seen.version == attempt.base:
                        # Whatever is being read now may be from before it landed.
                        self._landing = next(self._tickets)
                        self._seen = _Seen(
                            version=put.version,
                            state=attempt.state,
                            ticket=self._landing,
                            size_bytes=len(attempt.data),
                        )
                    # Otherwise a look since has seen `repo` replaced: by this, and perhaps by others after it.
                    self._unsettled = None
                    return True
            try:
                data = await self._read()
                if data == attempt.data:
                    landed = True
                elif self._seen.version == attempt.base and self._left is None:
                    # Unchanged: the PUT may still arrive. The same bytes again, and nothing else.
                    continue
                else:
                    landed = await self._happened(attempt.snapshots, attempt.time_us, attempt.nonce)
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

    async def _happened(self, snapshots: Sequence[ObjectId], time_us: int, nonce: bytes) -> bool:
        """Whether a replacement is part of history, given that ``repo`` has another version than the one it replaced.

        A snapshot of it in the graph, or in the ops log, says so. Where it has none its newest update is looked for,
        and the copy that its successor made of it: that has our nonce exactly if it was ours.
        """
        current = await read_repo(self._storage, self._sources)
        if current is None:
            return False
        if nonce_of(current.info.extra) == nonce or any(id in current.info.snapshots for id in snapshots):
            return True
        async for update in updates_of(self._storage, from_repo_info(current.info)):
            if update.updated_at_us < time_us:
                return False
            if snapshots:
                if isinstance(update.change, _SNAPSHOT_CHANGES) and update.change.snapshot in snapshots:
                    return True
            elif update.updated_at_us == time_us:
                if update.backup_path is None:
                    # Whoever writes makes a copy of what he replaces, but for a conversion to the log layout.
                    return not is_repo_object(current)
                return await self._is_copy_of(update.backup_path, nonce)
        return False

    async def _is_copy_of(self, name: str, nonce: bytes) -> bool:
        try:
            copy = await self._storage.get(overwritten_repo_key(name))
        except ObjectNotFoundError:
            return False
        return nonce_of(decode_repo(copy.data).extra) == nonce

    async def settle(self, token: SwapToken) -> bool:
        if not token.epoch.startswith(_TOKEN):
            return await self._settle_in_log(token)
        async with self._queue.swapping:
            try:
                await self._settle_unsettled()
                for _ in range(self._retries.tries):
                    await self._read()
                    if any(snapshot in self.state.snapshots for snapshot in token.snapshots):
                        return True
                    if f"{_TOKEN}{self._seen.version}" != token.epoch or self._left is not None:
                        return await self._happened(token.snapshots, token.n, token.nonce)
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
        if found is None or found.known.version != self._seen.version:
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
