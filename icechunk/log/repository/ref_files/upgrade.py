"""Upgrade from format 1 to format 2: refs become one ``repo`` object; all other objects are unchanged.

The official library writes ``repo`` and deletes the refs; a commit that reaches a ref in between is lost, though it
was acknowledged. Here the refs are closed first:

1. ``repo`` is created, if absent, and read-only: new sessions of format 1 are refused from now on, by either library,
   and everything can be read. It has our mark.
2. Each branch's ref is replaced, under If-Match on the version just read, by one that names the same snapshot under a
   field that no client of format 1 knows. A commit lands before and is read by the upgrade, or it fails.
3. ``repo`` is replaced, under If-Match, by the state of the closed refs, online. This is the upgrade.
4. The refs and ``config.yaml`` are deleted, closed branches last, ``main`` last of all.

A client that finds our mark, or a closed ref, goes on from there, so an upgrade that was interrupted is finished by
running it again, also by two at once. Until step 3 everything is in the refs, from then on in ``repo``. Creating and
deleting branches and tags has no condition in format 1: refs that an official 1.x client creates between the steps are
kept, and reported.

The new ``repo`` object is computed by `migrated_info`, which is pure. Format 1 has no ops log, so one is derived: each
commit at its time, under the branch that has it (``main`` before the others, these in the order of their names), a
branch or tag 1 ms after the snapshot that it points to, the deletion of a tag 2 ms after. The official library derives
the same one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeAlias

from icechunk.config import config_to_dict
from icechunk.errors import (
    ErrorKind,
    IcechunkError,
    InvalidInputError,
    ObjectNotFoundError,
    RepositoryNotFoundError,
    SessionStateError,
    SnapshotNotFoundError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId, encode_id, object_id_from_text
from icechunk.format.keys import CONFIG_KEY, REFS_PREFIX, REPO_KEY, SNAPSHOTS_PREFIX, snapshot_key
from icechunk.format.repo import repo_info as stored
from icechunk.format.repo.codec import EncodedRepo
from icechunk.format.repo.repo_info import RepoInfo, RepoMigrated, SnapshotRecord, Status
from icechunk.format.snapshot.codec import decode_snapshot
from icechunk.log.repository.conditional import RepoChange, create_object, replace_object, replace_repo
from icechunk.log.repository.marker import is_unfinished, upgrade_mark, write_mark
from icechunk.log.repository.objects import Known, RepoObject, encode, read_repo
from icechunk.log.repository.ops_log import updates_of
from icechunk.log.repository.ref_files.names import RefKey, RefNames, close_ref, is_closed, marks_in, read_ref
from icechunk.log.repository.state import MAIN, ONLINE, READ_ONLY, from_repo_info
from icechunk.log.repository.store_check import MatchCheck, require_atomic, require_writable
from icechunk.runtime.clock import Sources
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.tasks import run_jobs
from icechunk.storage.outcome import is_refusal
from icechunk.storage.port import NO_LISTING, PutResult, Storage, Version

__all__ = ["DEFAULT_PREFETCH", "RefValues", "as_refs_say", "lineage", "migrated_info", "upgrade"]

Json: TypeAlias = Any
_CREATED_AFTER_US: Final = 1_000
_DELETED_AFTER_US: Final = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RefValues:
    """All refs of a repository of format 1."""

    branches: Mapping[str, ObjectId]
    """Name → tip."""
    tags: Mapping[str, ObjectId]
    """Name → snapshot; without the deleted ones."""
    deleted_tags: Mapping[str, ObjectId | None]
    """Name → snapshot that it pointed to; None where that is not known any more."""


def lineage(records: Mapping[ObjectId, SnapshotRecord], tip: ObjectId) -> Iterator[SnapshotRecord]:
    """A snapshot and its ancestors, youngest first; all of them must be in ``records``."""
    current: ObjectId | None = tip
    while current is not None:
        record = records[current]
        yield record
        current = record.parent


def migrated_info(
    refs: RefValues,
    records: Mapping[ObjectId, SnapshotRecord],
    *,
    config: Json | None,
    now_us: int,
    read_only_reason: str | None = None,
    extra: bytes | None = None,
) -> RepoInfo:
    """The ``repo`` object after the upgrade.

    Parameters
    ----------
    records
        At least the snapshots that branches and tags reach; others are left out.
    now_us
        Time of the upgrade, µs; later than that where the history ends later.
    read_only_reason
        For the object of step 1: its status is read-only with this reason, and its ops log has no migration yet. None:
        the object of step 3.
    """
    reached: dict[ObjectId, SnapshotRecord] = {}
    branch_of: dict[ObjectId, str] = {}
    for name in sorted(refs.branches, key=lambda name: (name != MAIN, name)):
        for record in lineage(records, refs.branches[name]):
            if record.id in branch_of:
                break
            branch_of[record.id] = name
            reached[record.id] = record
    for target in refs.tags.values():
        for record in lineage(records, target):
            if record.id in reached:
                break
            reached[record.id] = record
    first_us = min(record.flushed_at_us for record in reached.values())
    told = _ordered(_story(refs, reached, branch_of, records, first_us))
    migrated_us = max(now_us, told[-1].updated_at_us + 1)
    migrated = stored.Update(
        change=stored.RepoMigrated(from_version=1, to_version=2), updated_at_us=migrated_us, backup_path=None
    )
    told.reverse()
    if read_only_reason is None:
        status = Status(availability=ONLINE, set_at_us=first_us, reason=None)
        told.insert(0, migrated)
    else:
        status = Status(availability=READ_ONLY, set_at_us=migrated_us, reason=read_only_reason)
    return RepoInfo(
        spec_version=2,
        tags=dict(refs.tags),
        branches=dict(refs.branches),
        deleted_tags=frozenset(refs.deleted_tags),
        snapshots=reached,
        status=status,
        metadata={},
        updates=tuple(told),
        repo_before_updates=None,
        config=config,
        enabled_feature_flags=None,
        disabled_feature_flags=None,
        extra=extra,
    )


def _story(
    refs: RefValues,
    reached: Mapping[ObjectId, SnapshotRecord],
    branch_of: Mapping[ObjectId, str],
    records: Mapping[ObjectId, SnapshotRecord],
    first_us: int,
) -> Iterator[tuple[int, stored.UpdateChange]]:
    """Changes with their times, those of one time in their order in the ops log."""
    yield first_us, stored.RepoInitialized()
    for id, name in branch_of.items():
        if reached[id].parent is not None:
            yield reached[id].flushed_at_us, stored.NewCommit(branch=name, snapshot=id)
    for name, tip in sorted(refs.branches.items()):
        if name != MAIN:
            yield reached[tip].flushed_at_us + _CREATED_AFTER_US, stored.BranchCreated(name=name)
    for name, target in sorted(refs.tags.items()):
        yield reached[target].flushed_at_us + _CREATED_AFTER_US, stored.TagCreated(name=name)
    for name, gone in sorted(refs.deleted_tags.items()):
        if gone is not None:
            at_us = records[gone].flushed_at_us if gone in records else first_us
            yield at_us + _CREATED_AFTER_US, stored.TagCreated(name=name)
            yield at_us + _DELETED_AFTER_US, stored.TagDeleted(name=name, previous_snapshot=gone)


def _ordered(story: Iterator[tuple[int, stored.UpdateChange]]) -> list[stored.Update]:
    """Oldest first, each later than the one before."""
    updates: list[stored.Update] = []
    last_us = 0
    for time_us, change in sorted(story, key=lambda one: one[0]):
        last_us = max(time_us, last_us + 1)
        updates.append(stored.Update(change=change, updated_at_us=last_us, backup_path=None))
    return updates


Records: TypeAlias = dict[ObjectId, SnapshotRecord]

DEFAULT_PREFETCH: Final = 64
"""Snapshot files that are read at a time."""
_LOG: Final = logging.getLogger(__name__)
_REASON: Final = (
    "This repository is being upgraded from format 1. If that was interrupted, run upgrade_icechunk_repository again; "
    "setting the status online instead may lose what older clients committed meanwhile."
)


async def upgrade(
    storage: Storage, sources: Sources, *, dry_run: bool, delete_ref_files: bool, prefetch: int = DEFAULT_PREFETCH
) -> None:
    """Upgrade a repository of format 1 to format 2, or finish doing so.

    Parameters
    ----------
    dry_run
        Read everything that the upgrade reads, log the steps that it would take, and write nothing.
    delete_ref_files
        Delete the files that only format 1 needs. If False, branches are not closed either, so no client may commit
        meanwhile.
    prefetch
        Snapshot files to read at a time, at least 1.

    Raises
    ------
    SessionStateError
        The repository has format 2 already (kind ``invalid-repository-migration``); or its status was set online in the
        middle of an upgrade, and branches hold commits that it does not have.
    RepositoryNotFoundError, SnapshotNotFoundError, FormatError
        There is none, or a file that belongs to it is missing or cannot be read. Nothing was written.
    ReadOnlyError
        The storage can only be read.
    StorageError
        No certain answer. Nothing is lost; run it again.
    """
    if prefetch < 1:
        raise InvalidInputError(f"prefetch_concurrency must be at least 1, not {prefetch}", ErrorKind.INVALID_SETTING)
    await _Upgrade(storage, sources, delete_ref_files=delete_ref_files, prefetch=prefetch).run(dry_run=dry_run)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ref:
    """A file below ``refs/``."""

    key: str
    what: RefKey
    snapshot: ObjectId | None
    """Snapshot that the ref points to; None for a tombstone."""
    version: Version
    closed: bool
    mark: bytes
    """Mark of its last write, by which its writer recognises it."""


class _Upgrade:
    def __init__(self, storage: Storage, sources: Sources, *, delete_ref_files: bool, prefetch: int) -> None:
        self._storage = storage
        self._sources = sources
        self._names = RefNames.of(storage)
        self._delete = delete_ref_files
        self._prefetch = prefetch
        self.records: Records = {}
        """Records of the snapshots that were read."""
        self._where = storage.describe()

    async def run(self, *, dry_run: bool) -> None:
        _LOG.info("%s: upgrading from format 1 to format 2%s", self._where, " (dry run)" if dry_run else "")
        found = await read_repo(self._storage, self._sources)
        refs = await self._read_refs()
        if found is not None and not is_unfinished(found.info):
            await self._finish(found, refs, dry_run=dry_run)
            return
        info = await self.info(refs)
        _LOG.info(
            "%s: found %d branches, %d tags, %d deleted tags and %d snapshots; the ops log has %d entries",
            self._where,
            len(info.branches),
            len(info.tags),
            len(info.deleted_tags),
            len(info.snapshots),
            len(info.updates) + 1,
        )
        if dry_run:
            _LOG.info("%s: dry run, nothing was written; run it with dry_run=False to upgrade", self._where)
            return
        await self._check_writable()
        if found is None:
            await self._announce(info)
        await replace_repo(_PutOnline(self, self._storage, self._sources))
        if self._delete:
            await self._clean_up(await self._read_refs())
        _LOG.info("%s: has format 2 now", self._where)

    # ------------------------------------------------------------------- reading

    async def _read_refs(self) -> tuple[_Ref, ...]:
        return await _read_refs(self._storage, self._names, await _list_refs(self._storage))

    async def info(self, refs: Iterable[_Ref], *, reason: str | None = _REASON, nonce: bytes = b"") -> RepoInfo:
        """The contents of ``repo``; with a reason it is read-only and has our mark."""
        values = _values(refs)
        if MAIN not in values.branches:
            raise RepositoryNotFoundError(
                f"the repository doesn't exist: no branch {MAIN!r} of format 1 in {self._where}"
            )
        await self._read_records(values)
        return migrated_info(
            values,
            self.records,
            config=await self._config(),
            now_us=max(self._sources.wall_us(), 0),
            read_only_reason=reason,
            extra=write_mark(nonce) if reason is None else upgrade_mark(nonce),
        )

    async def _config(self) -> Json | None:
        from icechunk.config.yaml_text import config_from_yaml

        try:
            answer = await self._storage.get(CONFIG_KEY)
        except ObjectNotFoundError:
            return None
        return config_to_dict(config_from_yaml(answer.data))

    async def _read_records(self, values: RefValues) -> None:
        """Records of everything that branches and tags reach, and of what deleted tags pointed to, where it is left."""
        if not self.records:
            keys = [item.key async for page in self._storage.list_pages(SNAPSHOTS_PREFIX) for item in page]
            # All at once: from child to parent each read would wait for the one before. Unreachable
            # snapshots may be damaged, or be deleted meanwhile.
            await run_jobs([partial(self._try_record, key) for key in keys], limit=self._prefetch)
        for tip in (*values.branches.values(), *values.tags.values()):
            current: ObjectId | None = tip
            while current is not None:
                current = (await self._record(current)).parent

    async def _try_record(self, key: str) -> None:
        with suppress(IcechunkError):
            await self._record(object_id_from_text(key.removeprefix(SNAPSHOTS_PREFIX)))

    async def _record(self, id: ObjectId) -> SnapshotRecord:
        known = self.records.get(id)
        if known is not None:
            return known
        try:
            answer = await self._storage.get(snapshot_key(id))
        except ObjectNotFoundError:
            raise SnapshotNotFoundError(
                f"cannot upgrade the repository in {self._where}: snapshot {encode_id(id)}, which a branch or tag "
                "needs, is missing; delete or reset that branch or tag"
            ) from None
        record = SnapshotRecord.of(decode_snapshot(answer.data, expected_id=id))
        self.records[id] = record
        return record

    # ------------------------------------------------------------------- writing

    async def _check_writable(self) -> None:
        require_writable(self._storage, "upgrade the repository")
        require_atomic(self._storage)
        await MatchCheck(self._storage).run([snapshot_key(id) for id in (FIRST_SNAPSHOT, *list(self.records)[:1])])

    async def _announce(self, info: RepoInfo) -> None:
        """Create ``repo``, read-only; another client that did so meanwhile wrote the same."""
        data = (await encode(info)).data
        await create_object(self._storage, self._sources, REPO_KEY, data, self.no_answer())

    async def closed_refs(self) -> tuple[_Ref, ...] | None:
        """The refs, after those of branches were closed where they are to be deleted.

        None: look again, a branch has moved, or another client has finished the upgrade.
        """
        refs = await self._read_refs()
        open_ = [ref for ref in refs if not ref.what.is_tag and not ref.closed] if self._delete else []
        if open_:
            if not all(await run_jobs([partial(self._close, ref) for ref in open_])):
                return None
            refs = await self._read_refs()
        return refs if any(ref.key == self._names.branch_key(MAIN) for ref in refs) else None

    async def _close(self, ref: _Ref) -> bool:
        """Replace the ref of a branch, so that no client commits to it any more; False: it has changed meanwhile."""
        assert ref.snapshot is not None
        closed = close_ref(ref.snapshot, ref.mark)
        replaced = replace_object(self._storage, self._sources, ref.key, closed, ref.version, self.no_answer())
        return await replaced is not None

    def no_answer(self) -> StorageError:
        """The error where the store gives no certain answer."""
        return StorageError(
            f"cannot finish the upgrade of {self._where}: no certain answer; nothing is lost, run it again",
            ErrorKind.UPDATE_ATTEMPTS_EXHAUSTED,
        )

    # ------------------------------------------------------------------ cleaning up

    async def _finish(self, found: RepoObject, refs: tuple[_Ref, ...], *, dry_run: bool) -> None:
        """Delete the files that an interrupted upgrade has left; the repository has format 2."""
        closed = [ref for ref in refs if ref.closed]
        if not closed:
            raise SessionStateError(
                f"the repository in {self._where} has format {found.info.spec_version} already: only a repository of "
                "format 1 can be upgraded",
                ErrorKind.INVALID_REPOSITORY_MIGRATION,
            )
        stranded = {
            ref.what.name: encode_id(ref.snapshot)
            for ref in closed
            if ref.snapshot is not None and ref.snapshot not in found.info.snapshots
        }
        if stranded and not await self._was_finished(found):
            raise SessionStateError(
                f"the upgrade of {self._where} was interrupted, and its status was set online by hand: these branches "
                f"have commits that it does not have: {_listed(stranded)}. Nothing was deleted; bring them over, then "
                "delete the objects below refs/",
                ErrorKind.INVALID_REPOSITORY_MIGRATION,
            )
        if not dry_run and self._delete:
            await self._check_writable()
            await self._clean_up(refs)

    async def _was_finished(self, found: RepoObject) -> bool:
        """Whether all commits were taken over, so that a tip may be gone for good reasons since."""
        async for update in updates_of(self._storage, from_repo_info(found.info)):
            if isinstance(update.change, RepoMigrated):
                return True
        return False

    async def _clean_up(self, refs: tuple[_Ref, ...]) -> None:
        """Delete the files that only format 1 needs; refs that were not taken over are kept."""
        found = await read_repo(self._storage, self._sources)
        if found is None or is_unfinished(found.info):
            raise self.no_answer()
        info = found.info
        kept = {ref.key for ref in refs if not _is_in_history(ref, info.tags, info.deleted_tags)}
        if kept:
            _LOG.warning(
                "%s: left where they are, since they came while the repository was upgraded: %s; create them again "
                "where they are wanted, and delete these objects",
                self._where,
                ", ".join(sorted(kept)),
            )
        main_key = self._names.branch_key(MAIN)
        gone = [ref.key for ref in refs if ref.key not in kept]
        branches = [ref.key for ref in refs if ref.closed and ref.key != main_key]
        # Closed branches last: as long as one is there, running the upgrade again finds the files that are left.
        first = [key for key in gone if key not in branches and key != main_key]
        for keys in ([*first, CONFIG_KEY], branches, [main_key] if main_key in gone else []):
            if not keys:
                continue
            failures = (await self._storage.delete(keys)).failures
            if failures:
                raise StorageError(
                    f"{self._where} has format 2 now, but {failures[0][0]!r} could not be deleted: {failures[0][1]}; "
                    "run the upgrade again to delete the rest"
                )


class _PutOnline(RepoChange[bool]):
    """Close the branches, and put ``repo`` online with their state."""

    def __init__(self, upgrade: _Upgrade, storage: Storage, sources: Sources) -> None:
        super().__init__(storage, sources)
        self._upgrade = upgrade
        self._nonce = sources.random_bytes(16)

    async def result(self, known: Known, info: RepoInfo | None) -> bool | None:
        assert info is not None
        # Else it is ours, whose answer was lost, or that of another client that upgraded at the same time.
        return None if is_unfinished(info) else True

    async def make(self, known: Known, info: RepoInfo | None) -> EncodedRepo | None:
        try:
            refs = await self._upgrade.closed_refs()
            if refs is None:
                return None
            return await encode(await self._upgrade.info(refs, reason=None, nonce=self._nonce))
        except (RepositoryNotFoundError, SnapshotNotFoundError):
            raise
        except StorageError as error:
            if is_refusal(error) or error.kind == ErrorKind.UPDATE_ATTEMPTS_EXHAUSTED:
                raise
            self.why = error
            return None

    async def landed(self, known: Known, encoded: EncodedRepo, put: PutResult) -> bool:
        return True

    def gone(self) -> bool:
        raise RepositoryNotFoundError(f"the object 'repo' in {self.storage.describe()} was deleted during its upgrade")

    def unsure(self) -> StorageError:
        return self._upgrade.no_answer()


async def as_refs_say(storage: Storage, sources: Sources, info: RepoInfo) -> RepoInfo:
    """The contents of ``repo`` of an unfinished upgrade if it were written now, with the commits made since.

    Where the refs cannot be listed, only those that it has are looked at.

    Raises
    ------
    RepositoryNotFoundError
        There is no ``main`` any more: the upgrade was finished meanwhile.
    SnapshotNotFoundError
        A branch or tag needs a snapshot that is missing.
    """
    names = RefNames.of(storage)
    try:
        keys = await _list_refs(storage)
    except NO_LISTING:
        keys = [*map(names.branch_key, info.branches), *map(names.tag_key, info.tags)]
        keys += map(names.tombstone_key, info.tags)
    refs = await _read_refs(storage, names, keys)
    values = _values(refs)
    if (dict(values.branches), dict(values.tags)) == (dict(info.branches), dict(info.tags)):
        return info
    upgrade = _Upgrade(storage, sources, delete_ref_files=False, prefetch=DEFAULT_PREFETCH)
    upgrade.records.update(info.snapshots)
    return await upgrade.info(refs)


async def _list_refs(storage: Storage) -> list[str]:
    return sorted([item.key async for page in storage.list_pages(REFS_PREFIX) for item in page])


async def _read_refs(storage: Storage, names: RefNames, keys: Iterable[str]) -> tuple[_Ref, ...]:
    found = await run_jobs([partial(_read_ref, storage, names, key) for key in keys])
    return tuple(ref for ref in found if ref is not None)


async def _read_ref(storage: Storage, names: RefNames, key: str) -> _Ref | None:
    what = names.parse(key)
    if what is None:
        return None
    try:
        answer = await storage.get(key)
    except ObjectNotFoundError:
        return None
    snapshot = None if what.tombstone else read_ref(answer.data, f"{key} in {storage.describe()}")
    return _Ref(
        key=key,
        what=what,
        snapshot=snapshot,
        version=answer.version,
        closed=is_closed(answer.data),
        mark=b"".join(marks_in(answer.data)),
    )


def _values(refs: Iterable[_Ref]) -> RefValues:
    deleted = {ref.what.name for ref in refs if ref.what.tombstone}
    named = [(ref.what, ref.snapshot) for ref in refs if ref.snapshot is not None]
    tags = {what.name: snapshot for what, snapshot in named if what.is_tag}
    return RefValues(
        branches={what.name: snapshot for what, snapshot in named if not what.is_tag},
        tags={name: snapshot for name, snapshot in tags.items() if name not in deleted},
        deleted_tags={name: tags.get(name) for name in deleted},
    )


def _is_in_history(ref: _Ref, tags: Mapping[str, ObjectId], deleted_tags: Iterable[str]) -> bool:
    """Whether ``repo`` has the ref of this file, or once had it."""
    if not ref.what.is_tag:
        return ref.closed
    return ref.what.name in tags or ref.what.name in deleted_tags


def _listed(stranded: Mapping[str, str]) -> str:
    return ", ".join(f"{name!r} at {snapshot}" for name, snapshot in sorted(stranded.items()))
