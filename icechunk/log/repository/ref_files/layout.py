"""The ref-files layout: format 1. One small object per branch and tag, and no log at all.

A branch is replaced under If-Match and created under If-None-Match, a tag only ever created; a deleted tag gets a
tombstone beside it. Ancestry is in the snapshot files, which name their parents; it is read on demand
and kept in memory, since snapshots never change.

Operations that the format lacks are refused, as by the official library: status, metadata, feature flags, ops log,
amending, several changes at once. Limits of its promises: a ref that the official library moved away and back has
the same contents, and on object stores the same ETag, so a PUT that was delayed meanwhile lands; deletion of a branch
has no condition.

The parts common to all layouts are in `icechunk.log.repository.settle`. An attempt is one change of one object. A
client recognises its own write by a mark in white space at the end of the body, so no two writes have the same bytes; a
commit also by the snapshot id, at the tip or below it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Container, Iterable, Sequence
from typing import Any, Final, TypeAlias

from icechunk.config import config_from_dict
from icechunk.errors import (
    CommitOutcomeUnknown,
    ErrorKind,
    FormatError,
    InvalidInputError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId
from icechunk.format.keys import CONFIG_KEY, overwritten_config_key, snapshot_key
from icechunk.format.repo.repo_info import Update
from icechunk.log.repository import events as e
from icechunk.log.repository.conditional import replace_object
from icechunk.log.repository.port import Layout, SwapToken
from icechunk.log.repository.queue import Attempt, Group, Member, Waiting, new_snapshots
from icechunk.log.repository.ref_files.client import RefFilesView
from icechunk.log.repository.ref_files.names import (
    MARK_BYTES,
    MARK_CHARACTERS,
    encode_ref,
    mark_in,
    mark_of,
    marks_after,
    marks_in,
    read_ref,
    remarked,
)
from icechunk.log.repository.settle import SwappedLog
from icechunk.log.repository.state import MAIN, RepoState, apply
from icechunk.log.repository.store_check import MatchCheck
from icechunk.log.repository.tokens import REFS_TOKEN
from icechunk.runtime.clock import SYSTEM, Sources
from icechunk.runtime.late_dataclass import dataclass
from icechunk.storage.outcome import Fate, is_refusal, refused
from icechunk.storage.port import Absent, GetResult, Matches, Precondition, Put, Storage, Version

__all__ = ["RefFilesLayout", "needs_format_2"]

Json: TypeAlias = Any
_SETTLE_TRIES: Final = 100
_NO_MARK: Final = bytes(MARK_BYTES)
_BEHIND_VERSION: Final = b"\0"
"""Ends the version in a nonce of a token; behind it is the mark of the body that the write replaces."""


def needs_format_2(what: str) -> FormatError:
    """The error for an operation that format 1 lacks."""
    return FormatError(
        f"cannot {what}: the repository is of format 1, which has no such operation; this needs format 2, upgrade it "
        "first (upgrade_icechunk_repository)",
        ErrorKind.UNSUPPORTED_SPEC_VERSION,
    )


@dataclass(slots=True, kw_only=True)
class _Change(Group):
    """The one event that is to happen next, as a change of an object."""

    key: str = ""
    data: bytes | None = None
    """New bytes of the object; None: it is deleted."""
    nonce: bytes = _NO_MARK
    """Nonce of the mark of the object; for a deletion `_NO_MARK`."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Write(Attempt):
    """One change of one object."""

    key: str
    data: bytes | None
    """New bytes of the object; None: it is deleted."""
    base: Version | None
    """The version that it replaces; None: there is none."""
    replaced: bytes
    """The mark of a branch's body that it replaces; empty: there is none, or no branch."""
    may_be_there: bool = False
    """Whether some request got no certain answer. A 412 to the first one is about another client's object."""

    @property
    def place(self) -> tuple[str, object]:
        return self.key, self.base

    @property
    def precondition(self) -> Precondition:
        """The condition that the object is as it was."""
        return Absent() if self.base is None else Matches(self.base)


class RefFilesLayout(SwappedLog[_Write]):
    """A repository of format 1. Made by `icechunk.log.repository.open` and `.create`."""

    layout = Layout.REFS

    def __init__(self, storage: Storage, sources: Sources) -> None:
        super().__init__(storage, sources)
        self._view = RefFilesView(storage, sources)
        self._check = MatchCheck(storage)

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
        """Branches and tags as last read; of the graph, the snapshots requested so far (`learn`)."""
        return self._view.state

    @property
    def store_time_us(self) -> int:
        return self._view.store_time_us

    async def refresh(self) -> RepoState:
        await self._view.refresh()
        await self.tell_told()
        return self.state

    async def learn(
        self, snapshots: Iterable[ObjectId], *, ancestry: bool = False, until: Container[ObjectId] = ()
    ) -> RepoState:
        return await self._view.learn(snapshots, ancestry=ancestry, until=until)

    async def name_refs(self, *, branches: Iterable[str] = (), tags: Iterable[str] = ()) -> RepoState:
        return await self._view.name(branches, tags)

    def require_all_refs(self) -> None:
        self._view.require_all()

    def forget(self, snapshots: Iterable[ObjectId]) -> None:
        """Read these snapshots' parents again when they are asked for: their files were replaced."""
        self._view.forget(snapshots)

    async def retarget(self, tag: str, expected: ObjectId, new: ObjectId) -> None:
        """Point a tag to another snapshot of the same content, if it still is where it is expected."""
        key = self._view.names.tag_key(tag)
        answer = await self._view.get(key)
        if answer is not None and read_ref(answer.data, key) == expected:
            where = self._storage.describe()
            unsure = StorageError(f"it is not known whether tag {tag!r} in {where} was moved: no certain answer")
            moved = encode_ref(new, mark_in(answer.data))
            await replace_object(self._storage, self._sources, key, moved, answer.version, unsure)

    @property
    def writes_prepared(self) -> bool:
        return self._check.done

    async def prepare_writes(self) -> None:
        await self._check.run((snapshot_key(FIRST_SNAPSHOT), snapshot_key(self.state.branches[MAIN])))

    # ------------------------------------------------- encoding, condition, recognition

    def _begin_look(self) -> int:
        return self._view.next_ticket()

    @property
    def _looked(self) -> int:
        return self._view.looked

    async def _look_anew(self) -> None:
        await self._view.refresh()

    async def _ready(self) -> None:
        await self.prepare_writes()
        await self._view.refuse_upgraded()
        await self._view.refresh()

    def turn(self, branch: str) -> None:
        """None: each attempt holds one change."""

    async def _build(self, waiting: Sequence[Waiting]) -> Group:
        """The first call's proposal as a group: the format changes nothing together."""
        group = _Change(state=self.state, time_us=max(self._sources.wall_us(), 0))
        if not waiting:
            return group
        one = waiting[0]
        try:
            events = tuple(one.proposal.events(self.state))
            if len(events) > 1:
                raise needs_format_2("make several changes at once")
            if not events or isinstance(events[0], e.DetachedSnapshotAdded):
                # It exists as a file, and nothing refers to it: all there is to it in this format.
                group.nothing.append(one)
                return group
            await self._name_of(events[0])
            nonce = self._sources.random_bytes(MARK_BYTES)
            group.key, group.data = await self._change(events[0], mark_of(nonce))
            group.nonce = _NO_MARK if group.data is None else nonce
            group.state = apply(self.state, events[0], time_us=group.time_us, since_us=one.since_us)
            group.members.append(Member(waiting=one, snapshots=tuple(new_snapshots(events))))
            group.files.update(one.files)
        except Exception as error:
            group.refused.append((one, error))
        return group

    async def _make(self, group: Group) -> _Write:
        assert isinstance(group, _Change)
        base, marks = self._view.version(group.key), self._view.marks(group.key)
        replaced = marks[:MARK_CHARACTERS]
        return _Write(
            epoch=f"{REFS_TOKEN}{group.key}",
            n=0,
            nonce=group.nonce + (base or "").encode() + _BEHIND_VERSION + replaced,
            key=group.key,
            data=None if group.data is None else group.data + marks,
            base=base,
            replaced=replaced,
            state=group.state,
        )

    async def _name_of(self, event: e.Event) -> None:
        """See to it that the state shows the ref that an event is about."""
        match event:
            case (
                e.CommitAdded(branch=name)
                | e.BranchCreated(name=name)
                | e.BranchReset(name=name)
                | e.BranchDeleted(name=name)
            ):
                await self.name_refs(branches=[name])
            case e.TagCreated(name=name) | e.TagDeleted(name=name):
                await self.name_refs(tags=[name])

    async def _change(self, event: e.Event, mark: bytes) -> tuple[str, bytes | None]:
        names = self._view.names
        match event:
            case e.CommitAdded(branch=branch, snapshot=snapshot):
                if snapshot.parent is not None and self.state.branches.get(branch) == snapshot.parent:
                    await self.learn([snapshot.parent])
                return names.branch_key(branch), encode_ref(snapshot.id, mark)
            case e.BranchCreated(name=name, snapshot=target) | e.BranchReset(name=name, snapshot=target):
                await self.learn([target])
                return names.branch_key(names.checked(name, "branch")), encode_ref(target, mark)
            case e.BranchDeleted(name=name):
                return names.branch_key(name), None
            case e.TagCreated(name=name, snapshot=target):
                await self.learn([target])
                return names.tag_key(names.checked(name, "tag")), encode_ref(target, mark)
            case e.TagDeleted(name=name):
                return names.tombstone_key(name), mark
            case e.ConfigReplaced(config=config):
                return await self._config_change(config)
            case _:
                raise needs_format_2(f"record {type(event).__name__}")

    async def _config_change(self, config: Json | None) -> tuple[str, bytes]:
        from icechunk.config.yaml_text import config_to_yaml

        if await self._view.read_config():
            now_ms = max(self._sources.wall_us(), 0) // 1000
            await self._storage.copy(CONFIG_KEY, overwritten_config_key(now_ms, self._sources.random_bytes(12)))
        return CONFIG_KEY, config_to_yaml(config_from_dict(config or {}))

    async def _send(self, attempt: _Write, storage: Storage) -> bool:
        if attempt.data is None:
            result = await storage.delete([attempt.key])
            if result.failures:
                error = StorageError(f"cannot delete {attempt.key!r}: {result.failures[0][1]}")
                raise refused(error) if result.refused else error
        else:
            try:
                await storage.put_after(attempt.unsynced, Put(attempt.key, attempt.data, attempt.precondition))
            except (PreconditionFailedError, ObjectNotFoundError):
                return False
            except BaseException as error:
                if not is_refusal(error) and not getattr(error, "unsent", False):
                    attempt.may_be_there = True
                raise
        self._fold_own(attempt)
        return True

    def _fold_own(self, attempt: _Write) -> None:
        self._view.landed(attempt.key, base=attempt.base, snapshots=attempt.snapshots, state=attempt.state)

    def _passed(self, attempt: _Write) -> bool:
        return self._view.version(attempt.key) != attempt.base

    async def _look(self, attempt: _Write) -> Fate:
        fate = await self._fate_by(attempt, await self._view.get(attempt.key))
        if fate is Fate.LANDED:
            self._fold_own(attempt)
        return fate

    async def _fate_by(self, attempt: _Write, answer: GetResult | None) -> Fate:
        """The fate by the object that was found; None: there is none."""
        if attempt.data is None:
            return Fate.LANDED if answer is None else Fate.OPEN
        if (None if answer is None else answer.version) == attempt.base:
            return Fate.OPEN
        if answer is not None and self._is_own(attempt, answer.data):
            return Fate.LANDED
        if attempt.snapshots:
            if answer is None:
                landed = await self._view.was_taken_over(attempt.snapshots)
            else:
                landed = await self._view.is_below(read_ref(answer.data, attempt.key), attempt.snapshots)
            if landed:
                return Fate.LANDED
        if not attempt.may_be_there or self._is_other(attempt.key, attempt.replaced, answer):
            return Fate.LOST
        # It may have been there, and been replaced since: a branch was reset, or deleted.
        return Fate.UNDECIDED

    def _is_other(self, key: str, replaced: bytes, answer: GetResult | None) -> bool:
        """Whether an object that is not as it was, and without the mark of a write, shows that it was never there.

        Parameters
        ----------
        replaced
            Mark of the body that the write would replace: a body that has it has those of all that came between.
        """
        if answer is None:
            return False
        return not self._is_replaceable(key) or (replaced != b"" and replaced in marks_in(answer.data))

    def _is_own(self, attempt: _Write, data: bytes) -> bool:
        assert attempt.data is not None
        if attempt.key == CONFIG_KEY:
            # It has no mark: another client may have written the same.
            return attempt.may_be_there and data == attempt.data
        return mark_in(attempt.data) in marks_in(data)

    def _is_replaceable(self, key: str) -> bool:
        """Whether another write may follow one of this object; tags and tombstones are there for good."""
        ref = self._view.names.parse(key)
        return ref is None or not ref.is_tag

    # ---------------------------------------------------------------- settle

    async def settle(self, token: SwapToken) -> bool:
        if not token.epoch.startswith(REFS_TOKEN):
            raise InvalidInputError(
                f"the token belongs to another repository than that in {self._storage.describe()}, "
                "or to an earlier state of that one",
                ErrorKind.INVALID_SETTING,
            )
        key = token.epoch.removeprefix(REFS_TOKEN)
        version, _, replaced = token.nonces[0][MARK_BYTES:].partition(_BEHIND_VERSION)
        base = version.decode(errors="replace")
        marks = {mark_of(nonce[:MARK_BYTES]) for nonce in token.nonces}
        async with self.swapping:
            for _ in range(_SETTLE_TRIES):
                answer = await self._view.get(key)
                if answer is None:
                    if token.snapshots and await self._view.was_taken_over(token.snapshots):
                        return True
                    break
                if not marks.isdisjoint(marks_in(answer.data)):
                    return True
                if token.snapshots and await self._view.is_below(read_ref(answer.data, key), token.snapshots):
                    return True
                if mark_of(_NO_MARK) in marks:
                    # A deletion has no condition.
                    break
                if answer.version == base:
                    # Still the version that the write would replace: once it has other bytes, the write never lands.
                    unsure = StorageError(f"cannot settle yet, call again: no certain answer about {key!r}")
                    touched = answer.data + b"\n"
                    if replaced:
                        mark = mark_of(self._sources.random_bytes(MARK_BYTES))
                        touched = remarked(answer.data, mark + marks_after(answer.data))
                    if await replace_object(self._storage, self._sources, key, touched, answer.version, unsure):
                        return False
                    continue
                if self._is_other(key, replaced, answer):
                    return False
                break
        raise CommitOutcomeUnknown(
            f"the change of {key!r} in {self._storage.describe()} cannot be recognised in format 1; look "
            "whether it is there",
            token,
        )

    # ------------------------------------------------------------- the rest

    async def checkpoint(self) -> None:
        """Nothing: the refs are the state itself."""

    async def updates(self) -> AsyncIterator[Update]:
        """Raises `FormatError`: format 1 has no ops log."""
        raise needs_format_2("read the ops log")
        yield
