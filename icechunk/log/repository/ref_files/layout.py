"""The ref-files layout: format 1. One small object per branch and tag, and no log at all.

A branch is replaced under If-Match and created under If-None-Match, a tag only ever created; a deleted tag gets a
tombstone beside it. Ancestry stands in the snapshot files, which name their parents; it is read when it is asked for,
and remembered, since snapshots never change.

What the format cannot do is refused, as the official library refuses it: status, metadata, feature flags, ops log,
amending, several changes at once. What it cannot promise: a ref that was moved away and back has the same contents,
and on object stores the same ETag, so a PUT that was delayed meanwhile lands; deletion of a branch has no condition.

Lost answers are settled as elsewhere: the same bytes again while the object is unchanged, and one's own commit is
recognised by its snapshot id, at the tip or below it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from icechunk.config import config_from_dict, config_to_yaml
from icechunk.errors import (
    CommitOutcomeUnknown,
    ErrorKind,
    FormatError,
    IcechunkError,
    InvalidInputError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId
from icechunk.format.keys import CONFIG_KEY, overwritten_config_key, snapshot_key
from icechunk.format.repo.values import Update
from icechunk.log.repository import events as e
from icechunk.log.repository.port import Layout, OnSent, Propose, RepositoryLog, SwapToken
from icechunk.log.repository.queue import AppendQueue, Member, UpdateRetries, Waiting, new_snapshots, resolve, tell_sent
from icechunk.log.repository.ref_files.client import RefFilesView
from icechunk.log.repository.ref_files.names import encode_ref, read_ref
from icechunk.log.repository.state import MAIN, RepoState, apply
from icechunk.log.repository.store_check import MatchCheck
from icechunk.runtime.clock import SYSTEM, Sources
from icechunk.storage.port import Absent, Matches, Precondition, Storage, Version

__all__ = ["RefFilesLayout", "needs_format_2"]

Json: TypeAlias = Any
_ROUNDS: Final = 8
_TOKEN: Final = "refs:"
_RETRIES: Final = UpdateRetries()


def needs_format_2(what: str) -> FormatError:
    """The refusal of what format 1 does not have."""
    return FormatError(
        f"cannot {what}: the repository is of format 1, which has no such thing; this needs format 2, upgrade it first "
        "(upgrade_icechunk_repository)",
        ErrorKind.UNSUPPORTED_SPEC_VERSION,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Write:
    """One change of one object; unsettled until the object is seen to have another version."""

    key: str
    data: bytes | None
    """None: delete it."""
    base: Version | None
    """The version that it replaces; None: there is none."""
    snapshots: tuple[ObjectId, ...]
    member: Member
    state: RepoState
    """Afterwards."""

    @property
    def precondition(self) -> Precondition:
        return Absent() if self.base is None else Matches(self.base)


class RefFilesLayout(RepositoryLog):
    """A repository of format 1. Made by `RefFilesLayout.open` or `icechunk.log.repository.create`."""

    layout = Layout.REFS

    def __init__(self, storage: Storage, sources: Sources) -> None:
        self._storage = storage
        self._sources = sources
        self._view = RefFilesView(storage, sources)
        self._unsettled: _Write | None = None
        self._check = MatchCheck(storage)
        self._queue = AppendQueue(self._swap_next, storage, self._view.next_ticket)

    @classmethod
    async def open(cls, storage: Storage, sources: Sources = SYSTEM) -> RefFilesLayout:
        """Read the refs and the configuration.

        Raises
        ------
        RepositoryNotFoundError
            There is no branch ``main`` of format 1.
        FormatError
            A ref or the configuration cannot be read.
        """
        log = cls(storage, sources)
        await log._view.read_config()
        await log.refresh()
        return log

    # ----------------------------------------------------------------- state

    @property
    def state(self) -> RepoState:
        """Branches and tags as last read; of the graph, what was asked for so far (`learn`)."""
        return self._view.state

    @property
    def store_time_us(self) -> int:
        return self._view.store_time_us

    async def refresh(self) -> RepoState:
        return await self._view.refresh()

    async def learn(self, snapshots: Iterable[ObjectId], *, ancestry: bool = False) -> RepoState:
        return await self._view.learn(snapshots, ancestry=ancestry)

    def forget(self, snapshots: Iterable[ObjectId]) -> None:
        """Read these snapshots' parents again when they are asked for: their files were replaced."""
        self._view.forget(snapshots)

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
        """As `RepositoryLog.append`, for one event at a time: the format changes nothing together.

        Raises
        ------
        FormatError
            Several events, or one that the format does not have (kind ``unsupported-spec-version``).
        """
        return await self._queue.append(
            propose, since_us=since_us, deadline_s=deadline_s, on_sent=on_sent, files=files, on_queued=on_queued
        )

    async def prepare_writes(self) -> None:
        await self._check.run((snapshot_key(FIRST_SNAPSHOT), snapshot_key(self.state.branches[MAIN])))

    async def _swap_next(self) -> None:
        await self.prepare_writes()
        if self._unsettled is not None:
            await self._settle_write(self._unsettled, sent_before=True)
        await self._view.refuse_upgraded()
        if not self._queue.waiting:
            return
        one = self._queue.waiting[0]
        try:
            write = await self._take(one)
        except Exception as error:
            self._drop(one)
            resolve(one, error)
            return
        if write is None:
            self._drop(one)
            resolve(one, self.state)
            return
        if one.abandoned:
            return
        self._drop(one)
        tell_sent(one, _token(write))
        self._queue.sent, self._unsettled = (write.member,), write
        if await self._settle_write(write, sent_before=False):
            self._queue.sent = ()
            resolve(one, self.state)

    def _drop(self, one: Waiting) -> None:
        with suppress(ValueError):
            self._queue.waiting.remove(one)

    async def _take(self, one: Waiting) -> _Write | None:
        """Validate a proposal on the newest refs, and say which object it changes; None: nothing is to happen."""
        await self.refresh()
        events = tuple(one.propose(self.state))
        if not events:
            return None
        if len(events) > 1:
            raise needs_format_2("make several changes at once")
        event = events[0]
        if isinstance(event, e.DetachedSnapshotAdded):
            # It exists as a file, and nothing refers to it: all there is to it in this format.
            return None
        key, data = await self._change(event)
        state = apply(self.state, event, time_us=max(self._sources.wall_us(), 0), since_us=one.since_us)
        ids = tuple(new_snapshots(events))
        return _Write(
            key=key,
            data=data,
            base=self._view.version(key),
            snapshots=ids,
            member=Member(waiting=one, snapshots=ids),
            state=state,
        )

    async def _change(self, event: e.Event) -> tuple[str, bytes | None]:
        names = self._view.names
        match event:
            case e.CommitAdded(branch=branch, snapshot=snapshot):
                if snapshot.parent is not None and self.state.branches.get(branch) == snapshot.parent:
                    await self.learn([snapshot.parent])
                return names.branch_key(branch), encode_ref(snapshot.id)
            case e.BranchCreated(name=name, snapshot=target) | e.BranchReset(name=name, snapshot=target):
                await self.learn([target])
                return names.branch_key(_plain(name, "branch")), encode_ref(target)
            case e.BranchDeleted(name=name):
                return names.branch_key(name), None
            case e.TagCreated(name=name, snapshot=target):
                await self.learn([target])
                return names.tag_key(_plain(name, "tag")), encode_ref(target)
            case e.TagDeleted(name=name):
                return names.tombstone_key(name), b""
            case e.ConfigReplaced(config=config):
                return await self._config_change(config)
            case _:
                raise needs_format_2(f"record {type(event).__name__}")

    async def _config_change(self, config: Json | None) -> tuple[str, bytes]:
        if await self._view.read_config():
            now_ms = max(self._sources.wall_us(), 0) // 1000
            await self._storage.copy(CONFIG_KEY, overwritten_config_key(now_ms, self._sources.random_bytes(12)))
        return CONFIG_KEY, config_to_yaml(config_from_dict(config or {}))

    # ---------------------------------------------------------------- settle

    async def _settle_write(self, write: _Write, *, sent_before: bool) -> bool:
        """Send, and read back, until it is certain whether the write landed.

        Raises `CommitOutcomeUnknown` after a bounded number of tries; the write stays unsettled then.
        """
        why: Exception | None = None
        for round_ in range(_ROUNDS):
            if round_:
                await self._sources.sleep(_RETRIES.pause_s(self._sources, round_))
            try:
                if (round_ or not sent_before) and await self._send(write):
                    return self._landed(write)
                landed = await self._look(write)
            except FormatError:
                raise
            except (IcechunkError, OSError) as error:
                why = error
                continue
            if landed is None:
                continue
            if landed:
                return self._landed(write)
            self._unsettled = None
            self._queue.lost((write.member,))
            return False
        raise CommitOutcomeUnknown(
            f"no certain answer from {self._storage.describe()} after {_ROUNDS} tries ({why})", None
        ) from why

    async def _send(self, write: _Write) -> bool:
        if write.data is None:
            failures = (await self._storage.delete([write.key])).failures
            if failures:
                raise StorageError(f"cannot delete {write.key!r}: {failures[0][1]}")
            return True
        try:
            await self._storage.put(write.key, write.data, write.precondition)
        except (PreconditionFailedError, ObjectNotFoundError):
            return False
        return True

    async def _look(self, write: _Write) -> bool | None:
        """Whether the write landed; None while its object is as it was, and it may still land."""
        answer = await self._view.get(write.key)
        if write.data is None:
            return True if answer is None else None
        version = None if answer is None else answer.version
        if version == write.base:
            return None
        if answer is not None and answer.data == write.data:
            return True
        if not write.snapshots:
            return False
        if answer is None:
            return await self._view.was_taken_over(write.snapshots)
        return await self._view.is_below(read_ref(answer.data, write.key), write.snapshots)

    def _landed(self, write: _Write) -> bool:
        self._unsettled = None
        self._view.landed(write.key, base=write.base, snapshots=write.snapshots, state=write.state)
        return True

    async def settle(self, token: SwapToken) -> bool:
        if not token.epoch.startswith(_TOKEN):
            raise InvalidInputError(
                f"the token belongs to another repository than that in {self._storage.describe()}, or to its later life"
            )
        key, base = token.epoch.removeprefix(_TOKEN), token.nonce.decode(errors="replace")
        async with self._queue.swapping:
            for _ in range(_RETRIES.tries):
                answer = await self._view.get(key)
                if answer is not None and token.snapshots:
                    if await self._view.is_below(read_ref(answer.data, key), token.snapshots):
                        return True
                    if answer.version == base:
                        # Still what the write would replace: other bytes that say the same, and it never lands.
                        with suppress(PreconditionFailedError):
                            await self._storage.put(key, answer.data + b"\n", Matches(answer.version))
                        continue
                    return False
                if token.snapshots:
                    return await self._view.was_taken_over(token.snapshots)
                break
        raise CommitOutcomeUnknown(
            f"the change of {key!r} in {self._storage.describe()} has nothing to recognise it by in format 1; look "
            "whether it is there",
            token,
        )

    # ------------------------------------------------------------- the rest

    async def checkpoint(self) -> None:
        """Nothing: the refs are the truth themselves."""

    async def updates(self) -> AsyncIterator[Update]:
        """Raises `FormatError`: format 1 has no ops log."""
        raise needs_format_2("read the ops log")
        yield

    async def aclose(self) -> None:
        await self._queue.aclose()


def _token(write: _Write) -> SwapToken:
    return SwapToken(epoch=f"{_TOKEN}{write.key}", n=0, nonce=(write.base or "").encode(), snapshots=write.snapshots)


def _plain(name: str, what: str) -> str:
    if "/" in name or not name:
        raise InvalidInputError(
            f"invalid {what} name {name!r}: a repository of format 1 takes no '/' in names, and no empty ones; choose "
            "another name, or upgrade the repository",
            ErrorKind.INVALID_REF_NAME,
        )
    return name
