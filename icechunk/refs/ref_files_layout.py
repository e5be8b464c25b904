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

import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from immutables import Map

from icechunk.config import config_from_dict, config_from_yaml, config_to_dict, config_to_yaml
from icechunk.errors import (
    CommitOutcomeUnknown,
    ErrorKind,
    FormatError,
    IcechunkError,
    InvalidInputError,
    ObjectNotFoundError,
    PreconditionFailedError,
    ReadOnlyError,
    RepositoryNotFoundError,
    SnapshotNotFoundError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId, encode_id
from icechunk.format.keys import CONFIG_KEY, REFS_PREFIX, REPO_KEY, overwritten_config_key, snapshot_key
from icechunk.format.repo_values import SnapshotRecord, Update
from icechunk.format.snapshot import decode_snapshot
from icechunk.format.snapshot_graph import SnapshotGraph
from icechunk.refs import events as e
from icechunk.refs.append_queue import AppendQueue, resolve, tell_sent
from icechunk.refs.base import Layout, OnSent, Propose, RepositoryLog, SwapToken
from icechunk.refs.carried import put_once
from icechunk.refs.commit_queue import Member, Waiting, new_snapshots
from icechunk.refs.log_reader import MAIN_REF_KEY, instant, read_repo
from icechunk.refs.match_check import MatchCheck
from icechunk.refs.proof import Instant, store_time_us
from icechunk.refs.ref_names import RefNames, decode_ref, encode_ref, read_ref
from icechunk.refs.state import MAIN, RepoState, apply, initial_state
from icechunk.refs.update_retries import UpdateRetries
from icechunk.sources import SYSTEM, Sources
from icechunk.storage.base import Absent, GetResult, ListingUnsupportedError, Matches, Precondition, Storage, Version
from icechunk.tasks import run_jobs

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
    """A repository of format 1. Made by `RefFilesLayout.open` or `icechunk.refs.create_refs`."""

    layout = Layout.REFS

    def __init__(self, storage: Storage, sources: Sources, config: Json | None) -> None:
        self._storage = storage
        self._sources = sources
        self._names = RefNames.of(storage)
        self._config = config
        self._records = SnapshotGraph.of({})
        self._versions: dict[str, Version] = {}
        self._tickets = itertools.count(1)
        self._ticket = 0
        # Ticket of the newest change of ours that landed.
        self._landing = 0
        self._state: RepoState | None = None
        self._clock = Instant(date_us=None, elapsed_us=0, wall_us=0)
        self._unsettled: _Write | None = None
        self._check = MatchCheck(storage)
        self._queue = AppendQueue(self._swap_next, storage.describe)

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
        log = cls(storage, sources, None)
        config = await log._read_config()
        log._config = None if config is None else config[0]
        await log.refresh()
        return log

    # ----------------------------------------------------------------- state

    @property
    def state(self) -> RepoState:
        """Branches and tags as last read; of the graph, what was asked for so far (`learn`)."""
        assert self._state is not None
        return self._state

    @property
    def store_time_us(self) -> int:
        now = instant(self._sources)
        return store_time_us(self._clock, now, resolution_us=self._storage.clock_resolution_us)

    async def _get(self, key: str) -> GetResult | None:
        asked = instant(self._sources)
        try:
            answer = await self._storage.get(key)
        except ObjectNotFoundError:
            return None
        if answer.date_us is not None:
            self._clock = Instant(date_us=answer.date_us, elapsed_us=asked.elapsed_us, wall_us=asked.wall_us)
        return answer

    async def _list_refs(self) -> list[str]:
        """Keys of all refs; where there are no listings, of ``main`` alone."""
        try:
            return [item.key async for page in self._storage.list_pages(REFS_PREFIX) for item in page]
        except ListingUnsupportedError:
            return [MAIN_REF_KEY]

    async def refresh(self) -> RepoState:
        """List the refs and read them, again where a change of this client's landed meanwhile.

        What was read may be from before that change, or from after what others made of it since.
        """
        while not await self._read_refs():
            pass
        return self.state

    async def _read_refs(self) -> bool:
        """Read the refs; whether that tells the newest state."""
        ticket = next(self._tickets)
        branches, tags, deleted = dict[str, ObjectId](), dict[str, ObjectId](), set[str]()
        wanted: list[tuple[str, bool, str]] = []
        for key in await self._list_refs():
            ref = self._names.parse(key)
            if ref is None:
                continue
            if ref.tombstone:
                deleted.add(ref.name)
            else:
                wanted.append((key, ref.is_tag, ref.name))
        answers = await run_jobs([partial(self._get, key) for key, _, _ in wanted]) if wanted else []
        versions: dict[str, Version] = {}
        for (key, is_tag, name), answer in zip(wanted, answers, strict=True):
            if answer is None:
                continue
            snapshot = decode_ref(answer.data, f"{key} in {self._storage.describe()}")
            versions[key] = answer.version
            if not is_tag:
                branches[name] = snapshot
            elif name not in deleted:
                tags[name] = snapshot
        if MAIN not in branches:
            await self._refuse_upgraded()
            raise RepositoryNotFoundError(
                f"the repository doesn't exist: no branch {MAIN!r} of format 1 in {self._storage.describe()}"
            )
        if ticket < self._landing:
            return False
        if ticket < self._ticket:
            return True
        self._ticket, self._versions = ticket, versions
        self._state = self._fold(branches, tags, deleted)
        return True

    def _fold(self, branches: dict[str, ObjectId], tags: dict[str, ObjectId], deleted: set[str]) -> RepoState:
        root = SnapshotRecord(
            id=FIRST_SNAPSHOT, parent=None, flushed_at_us=0, message="", metadata={}, pruned_ancestor_tx_logs=()
        )
        empty = initial_state(root, time_us=0, config=self._config, spec_version=1)
        return replace(
            empty,
            branches=Map(branches),
            tags=Map(tags),
            deleted_tags=Map(dict.fromkeys(deleted)),
            snapshots=self._records,
        )

    async def learn(self, snapshots: Iterable[ObjectId], *, ancestry: bool = False) -> RepoState:
        for id in snapshots:
            child: SnapshotRecord | None = None
            current: ObjectId | None = id
            while current is not None:
                try:
                    record = await self._record(current)
                except SnapshotNotFoundError:
                    if child is None or (current := await self._new_parent(child)) is None:
                        raise
                    continue
                child, current = record, record.parent if ancestry else None
        self._state = replace(self.state, snapshots=self._records)
        return self.state

    async def _new_parent(self, child: SnapshotRecord) -> ObjectId | None:
        """The parent that a snapshot has by now, where the one that was known is gone; None where it has no other.

        Expiration in this format writes a snapshot again with an older parent.
        """
        self.forget([child.id])
        parent = (await self._record(child.id)).parent
        return None if parent == child.parent else parent

    def forget(self, snapshots: Iterable[ObjectId]) -> None:
        """Read these snapshots' parents again when they are asked for: their files were replaced."""
        for id in snapshots:
            if id in self._records:
                self._records = self._records.delete(id)
        self._state = replace(self.state, snapshots=self._records)

    async def _record(self, id: ObjectId) -> SnapshotRecord:
        known = self._records.get(id)
        if known is not None:
            return known
        answer = await self._get(snapshot_key(id))
        if answer is None:
            raise SnapshotNotFoundError(
                f"snapshot id not found: {encode_id(id)} is not in this repository; it never existed, was expired, or "
                "was collected"
            )
        snapshot = decode_snapshot(answer.data, expected_id=id)
        record = SnapshotRecord(
            id=id,
            parent=snapshot.parent_id,
            flushed_at_us=snapshot.flushed_at_us,
            message=snapshot.message,
            metadata=snapshot.metadata,
            pruned_ancestor_tx_logs=(),
        )
        self._records = self._records.set(id, record)
        return record

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
        await self._check.run((snapshot_key(FIRST_SNAPSHOT), snapshot_key(self.state.branches[MAIN])))

    async def _swap_next(self) -> None:
        await self.prepare_writes()
        if self._unsettled is not None:
            await self._settle_write(self._unsettled, sent_before=True)
        await self._refuse_upgraded()
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

    async def _refuse_upgraded(self) -> None:
        if await self._get(REPO_KEY) is not None:
            raise FormatError(
                f"the repository in {self._storage.describe()} was upgraded to format 2; open it again",
                ErrorKind.UNSUPPORTED_SPEC_VERSION,
            )

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
            base=self._versions.get(key),
            snapshots=ids,
            member=Member(waiting=one, snapshots=ids),
            state=state,
        )

    async def _change(self, event: e.Event) -> tuple[str, bytes | None]:
        names = self._names
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

    async def _read_config(self) -> tuple[Json, Version] | None:
        answer = await self._get(CONFIG_KEY)
        return None if answer is None else (config_to_dict(config_from_yaml(answer.data)), answer.version)

    async def _config_change(self, config: Json | None) -> tuple[str, bytes]:
        found = await self._read_config()
        self._config = None if found is None else found[0]
        self._state = replace(self.state, config=self._config)
        if found is not None:
            self._versions[CONFIG_KEY] = found[1]
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
        answer = await self._get(write.key)
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
            return await self._was_taken_over(write.snapshots)
        return await self._is_below(read_ref(answer.data, write.key), write.snapshots)

    async def _was_taken_over(self, snapshots: tuple[ObjectId, ...]) -> bool:
        """Whether the ref is gone because of an upgrade, to whose history one of the snapshots belongs."""
        upgraded = await read_repo(self._storage, self._sources)
        return upgraded is not None and any(id in upgraded.info.snapshots for id in snapshots)

    async def _is_below(self, tip: ObjectId, snapshots: tuple[ObjectId, ...]) -> bool:
        """Whether one of the snapshots is the tip or an ancestor of it."""
        current: ObjectId | None = tip
        while current is not None:
            if current in snapshots:
                return True
            current = (await self._record(current)).parent
        return False

    def _landed(self, write: _Write) -> bool:
        self._unsettled = None
        for snapshot in write.snapshots:
            self._records = self._records.set(snapshot, write.state.snapshots[snapshot])
        self._config = write.state.config
        if self._versions.get(write.key) == write.base:
            # Whatever is being read now may be from before.
            self._ticket = self._landing = next(self._tickets)
            # The ops log is no part of this format; versions are read again before the next change.
            empty = self._fold({}, {}, set())
            self._state = replace(write.state, updates=empty.updates, last_time_us=0)
        # Otherwise a look since has seen the ref replaced: by this write, and perhaps by others after it.
        self._state = replace(self.state, config=self._config, snapshots=self._records)
        return True

    async def settle(self, token: SwapToken) -> bool:
        if not token.epoch.startswith(_TOKEN):
            raise InvalidInputError(
                f"the token belongs to another repository than that in {self._storage.describe()}, or to its later life"
            )
        key, base = token.epoch.removeprefix(_TOKEN), token.nonce.decode(errors="replace")
        async with self._queue.swapping:
            for _ in range(_RETRIES.tries):
                answer = await self._get(key)
                if answer is not None and token.snapshots:
                    if await self._is_below(read_ref(answer.data, key), token.snapshots):
                        return True
                    if answer.version == base:
                        # Still what the write would replace: other bytes that say the same, and it never lands.
                        with suppress(PreconditionFailedError):
                            await self._storage.put(key, answer.data + b"\n", Matches(answer.version))
                        continue
                    return False
                if token.snapshots:
                    return await self._was_taken_over(token.snapshots)
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
