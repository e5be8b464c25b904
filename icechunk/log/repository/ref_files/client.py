"""The refs of format 1 as one client knows them, and the snapshots that were requested so far.

Reads may overtake each other, so each takes a ticket, and the later one counts. A client's own change that landed
takes one too: an answer to a read that began before may be older.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

from icechunk.config import config_to_dict
from icechunk.errors import (
    AccessDeniedError,
    ErrorKind,
    FormatError,
    ObjectNotFoundError,
    RepositoryNotFoundError,
    SnapshotNotFoundError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId, encode_id
from icechunk.format.keys import CONFIG_KEY, REFS_PREFIX, REPO_KEY, snapshot_key
from icechunk.format.repo.repo_info import SnapshotRecord
from icechunk.format.repo.snapshot_graph import SnapshotGraph
from icechunk.format.snapshot.codec import decode_snapshot
from icechunk.log.repository.freshness import Instant, instant, store_time_us
from icechunk.log.repository.objects import MAIN_REF_KEY, read_repo
from icechunk.log.repository.ref_files.names import RefKey, RefNames, decode_ref, marks_after
from icechunk.log.repository.state import MAIN, RepoState, initial_state
from icechunk.runtime.clock import Sources
from icechunk.runtime.persistent_map import Map
from icechunk.runtime.tasks import run_jobs
from icechunk.storage.port import NO_LISTING, GetResult, ListingUnsupportedError, Storage, Version

__all__ = ["RefFilesView"]

Json: TypeAlias = Any


class RefFilesView:
    """Branches and tags as last read, with the configuration; nothing is known before the first `refresh`."""

    def __init__(self, storage: Storage, sources: Sources) -> None:
        self._storage = storage
        self._sources = sources
        self.names: RefNames = RefNames.of(storage)
        """The form of names in keys of this storage."""
        self._config: Json | None = None
        self._records = SnapshotGraph.of({})
        self._versions: dict[str, Version] = {}
        self._bodies: dict[str, bytes] = {}
        """Bodies of branches, as last read."""
        self._tickets = itertools.count(1)
        self._ticket = 0
        self.looked: int = 0
        """Ticket of the newest look at all refs: a refusal counts only by a look after the call (rule 3)."""
        # Ticket of the newest change of ours that landed.
        self._landing = 0
        self._state: RepoState | None = None
        self._named: set[str] = set()
        """Keys of refs that were asked for by name."""
        self.unlisted: StorageError | None = None
        """The error because of which the newest look could not list the refs; None: it listed them."""
        self._clock = Instant(date_us=None, elapsed_us=0, wall_us=0)

    @property
    def state(self) -> RepoState:
        """As `RefFilesLayout.state`."""
        assert self._state is not None
        return self._state

    def version(self, key: str) -> Version | None:
        """The version of an object as last read; None: there was none."""
        return self._versions.get(key)

    def marks(self, key: str) -> bytes:
        """The marks of a branch's body as last read, and of those before it; see `marks_after`."""
        body = self._bodies.get(key)
        return b"" if body is None else marks_after(body)

    def next_ticket(self) -> int:
        """A number that is higher than those of all looks and changes so far."""
        return next(self._tickets)

    @property
    def store_time_us(self) -> int:
        """As `RepositoryLog.store_time_us`."""
        now = instant(self._sources)
        return store_time_us(self._clock, now, resolution_us=self._storage.clock_resolution_us)

    async def get(self, key: str) -> GetResult | None:
        """GET an object, and note the store's time; None where there is none."""
        try:
            answer = await self._storage.get(key)
        except ObjectNotFoundError:
            return None
        except AccessDeniedError as denied:
            # Without the right to list, a missing object is refused like a forbidden one; `main` exists.
            if not denied.may_be_absent or key == MAIN_REF_KEY:
                raise
            try:
                await self._storage.head(MAIN_REF_KEY)
            except (AccessDeniedError, ObjectNotFoundError):
                raise denied from None
            return None
        if answer.date_us is not None:
            # With the clocks of now: the request may have begun long before, which would put the store's clock ahead.
            self._clock = instant(self._sources, answer.date_us)
        return answer

    async def _list_refs(self) -> list[str]:
        """Keys of all refs; where nothing can be listed, of ``main`` and those that were named."""
        try:
            keys = [item.key async for page in self._storage.list_pages(REFS_PREFIX) for item in page]
        except NO_LISTING as error:
            self.unlisted = error
            return [MAIN_REF_KEY, *sorted(self._named)]
        self.unlisted = None
        return keys

    async def name(self, branches: Iterable[str], tags: Iterable[str]) -> RepoState:
        """As `RepositoryLog.name_refs`."""
        keys = {self.names.branch_key(name) for name in branches if name != MAIN}
        keys |= {key for name in tags for key in (self.names.tag_key(name), self.names.tombstone_key(name))}
        if keys <= self._named:
            return self.state
        # Also where refs are listed: the right to do so may be taken away.
        self._named |= keys
        return self.state if self.unlisted is None else await self.refresh()

    def require_all(self) -> None:
        """As `RepositoryLog.require_all_refs`."""
        error = self.unlisted
        if error is None:
            return
        message = f"cannot list all branches and tags of a repository of format 1: {error}"
        if isinstance(error, AccessDeniedError):
            raise error.with_message(message) from error
        raise ListingUnsupportedError(message, error.kind) from error

    async def refresh(self) -> RepoState:
        """List the refs and read them, again where a change of this client's landed meanwhile.

        A ref that was read meanwhile may be older than that change, or newer by the changes of others.
        """
        while not await self._read_refs():
            pass
        return self.state

    async def _read_refs(self) -> bool:
        """Read the refs; returns whether they are the newest state."""
        ticket = self.next_ticket()
        branches, deleted = dict[str, ObjectId](), set[str]()
        wanted: list[tuple[str, RefKey]] = []
        keys = await self._list_refs()
        listed = self.unlisted is None
        for key in keys:
            ref = self.names.parse(key)
            if ref is None:
                continue
            if ref.tombstone and listed:
                deleted.add(ref.name)
            else:
                wanted.append((key, ref))
        answers = await run_jobs([partial(self.get, key) for key, _ in wanted]) if wanted else []
        versions: dict[str, Version] = {}
        bodies: dict[str, bytes] = {}
        targets: dict[str, ObjectId] = {}
        for (key, ref), answer in zip(wanted, answers, strict=True):
            if answer is None:
                continue
            if ref.tombstone:
                deleted.add(ref.name)
                continue
            versions[key] = answer.version
            if not ref.is_tag:
                bodies[key] = answer.data
            found = targets if ref.is_tag else branches
            found[ref.name] = decode_ref(answer.data, f"{key} in {self._storage.describe()}")
        tags = {name: target for name, target in targets.items() if name not in deleted}
        if MAIN not in branches:
            await self.refuse_upgraded()
            raise RepositoryNotFoundError(
                f"the repository doesn't exist: no branch {MAIN!r} of format 1 in {self._storage.describe()}"
            )
        if ticket < self._landing:
            return False
        self.looked = max(self.looked, ticket)
        if ticket < self._ticket:
            return True
        self._ticket, self._versions, self._bodies = ticket, versions, bodies
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

    async def learn(
        self, snapshots: Iterable[ObjectId], *, ancestry: bool = False, until: Container[ObjectId] = ()
    ) -> RepoState:
        """As `RepositoryLog.learn`."""
        for id in snapshots:
            child: SnapshotRecord | None = None
            current: ObjectId | None = id
            while current is not None:
                try:
                    record = await self.record(current)
                except SnapshotNotFoundError:
                    if child is None or (current := await self._new_parent(child)) is None:
                        raise
                    continue
                child, current = record, record.parent if ancestry and current not in until else None
        self._state = replace(self.state, snapshots=self._records)
        return self.state

    async def _new_parent(self, child: SnapshotRecord) -> ObjectId | None:
        """The parent that a snapshot has by now, where the one that was known is gone; None where it has no other.

        Expiration in this format writes a snapshot again with an older parent.
        """
        self.forget([child.id])
        parent = (await self.record(child.id)).parent
        return None if parent == child.parent else parent

    def forget(self, snapshots: Iterable[ObjectId]) -> None:
        """As `RefFilesLayout.forget`."""
        for id in snapshots:
            if id in self._records:
                self._records = self._records.delete(id)
        self._state = replace(self.state, snapshots=self._records)

    async def record(self, id: ObjectId) -> SnapshotRecord:
        """A snapshot's record, from its file. Raises `SnapshotNotFoundError`."""
        known = self._records.get(id)
        if known is not None:
            return known
        answer = await self.get(snapshot_key(id))
        if answer is None:
            raise SnapshotNotFoundError(
                f"snapshot id not found: {encode_id(id)} is not in this repository; it never existed, was expired, or "
                "was collected"
            )
        record = SnapshotRecord.of(decode_snapshot(answer.data, expected_id=id))
        self._records = self._records.set(id, record)
        return record

    async def refuse_upgraded(self) -> None:
        """Raise `FormatError` where the repository is of format 2 by now."""
        if await self.get(REPO_KEY) is not None:
            raise FormatError(
                f"the repository in {self._storage.describe()} was upgraded to format 2; open it again",
                ErrorKind.UNSUPPORTED_SPEC_VERSION,
            )

    async def read_config(self) -> bool:
        """Read the configuration, which may have changed; whether there is one."""
        from icechunk.config.yaml_text import config_from_yaml

        answer = await self.get(CONFIG_KEY)
        self._config = None if answer is None else config_to_dict(config_from_yaml(answer.data))
        if answer is not None:
            self._versions[CONFIG_KEY] = answer.version
        if self._state is not None:
            self._state = replace(self._state, config=self._config)
        return answer is not None

    async def was_taken_over(self, snapshots: tuple[ObjectId, ...]) -> bool:
        """Whether the ref is gone because of an upgrade, to whose history one of the snapshots belongs."""
        upgraded = await read_repo(self._storage, self._sources)
        return upgraded is not None and any(id in upgraded.info.snapshots for id in snapshots)

    async def is_below(self, tip: ObjectId, snapshots: tuple[ObjectId, ...]) -> bool:
        """Whether one of the snapshots is the tip or an ancestor of it."""
        current: ObjectId | None = tip
        while current is not None:
            if current in snapshots:
                return True
            current = (await self.record(current)).parent
        return False

    def landed(self, key: str, *, base: Version | None, snapshots: Iterable[ObjectId], state: RepoState) -> None:
        """A change of an object that had the version ``base`` landed, and made this state of the one before it."""
        for snapshot in snapshots:
            self._records = self._records.set(snapshot, state.snapshots[snapshot])
        if self._versions.get(key) == base:
            self._config = state.config
            # Files that are being read now may be from before.
            self._ticket = self._landing = self.next_ticket()
            # The ops log is no part of this format; versions are read again before the next change.
            empty = self._fold({}, {}, set())
            self._state = replace(state, updates=empty.updates, last_time_us=0)
        # Otherwise a look since has seen the ref replaced: by this write, and perhaps by others after it.
        self._state = replace(self.state, config=self._config, snapshots=self._records)
