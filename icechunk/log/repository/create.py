"""Creating a repository of any layout: check that the place is free, and put the first files (rule 11).

Of any number of creators exactly one wins.
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeAlias

from icechunk.config import config_from_dict
from icechunk.errors import (
    AlreadyExistsError,
    ErrorKind,
    InvalidInputError,
    ObjectNotFoundError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT
from icechunk.format.keys import (
    CHUNKS_PREFIX,
    CONFIG_KEY,
    MANIFESTS_PREFIX,
    REPO_KEY,
    SNAPSHOTS_PREFIX,
    TRANSACTIONS_PREFIX,
    overwritten_repo_key,
    snapshot_key,
    transaction_key,
)
from icechunk.format.repo.codec import decode_repo, encode_repo
from icechunk.format.repo.repo_info import RepoInfo, SnapshotRecord
from icechunk.format.snapshot.codec import decode_snapshot, encode_snapshot
from icechunk.format.transaction import encode_transaction_log
from icechunk.format.values import Snapshot, TransactionLog
from icechunk.log.repository.conditional import create_object
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.entries.reader import Head, Opened
from icechunk.log.repository.entry import copy_key, new_epoch
from icechunk.log.repository.freshness import instant
from icechunk.log.repository.marker import checkpoint_info, write_mark
from icechunk.log.repository.objects import RepoObject, known_of, read_repo, ref_files_there
from icechunk.log.repository.queue import UpdateRetries
from icechunk.log.repository.ref_files.layout import RefFilesLayout
from icechunk.log.repository.ref_files.names import RefNames, encode_ref
from icechunk.log.repository.repo_object.layout import RepoObjectLayout
from icechunk.log.repository.state import MAIN, RepoState, initial_state, to_repo_info
from icechunk.log.repository.store_check import require_atomic, require_writable
from icechunk.log.repository.successors import SuccessorsOf
from icechunk.runtime.clock import SYSTEM, Sources
from icechunk.runtime.tasks import run_jobs
from icechunk.storage.outcome import Creation, Fate, certain, follow, is_refusal
from icechunk.storage.port import Storage

__all__ = ["create_log", "create_ref_files", "create_repo_object"]

Json: TypeAlias = Any

_PREFIXES: Final = (CHUNKS_PREFIX, MANIFESTS_PREFIX, SNAPSHOTS_PREFIX, TRANSACTIONS_PREFIX)


async def _require_place(storage: Storage, *, check_clean_root: bool) -> None:
    """Refuse a place where no repository can be created; else make it ready. Errors as those of `create_log`."""
    require_writable(storage, "create a repository")
    require_atomic(storage)
    await _require_clean(storage, everything=check_clean_root)
    await storage.prepare(prefix.rstrip("/") for prefix in _PREFIXES)


async def _require_clean(storage: Storage, *, everything: bool) -> None:
    """Refuse a place where a repository of format 1 is, or, if asked, anything.

    Raises
    ------
    InvalidInputError
        Kind ``parent-directory-not-clean``.
    AccessDeniedError
        The right to list, which is needed to find out, is missing.
    """
    if not everything:
        if await ref_files_there(storage):
            raise _not_clean(storage, "a repository of format 1")
        return
    pages = storage.list_pages(page_size=1)
    try:
        async for page in pages:
            if page:
                raise _not_clean(storage, repr(page[0].key))
    finally:
        aclose = getattr(pages, "aclose", None)
        if aclose is not None:
            await aclose()


def _not_clean(storage: Storage, found: str) -> InvalidInputError:
    return InvalidInputError(
        f"cannot create a repository in {storage.describe()}: {found} is there already; choose an empty prefix, or "
        "open the repository that is there",
        ErrorKind.PARENT_DIRECTORY_NOT_CLEAN,
    )


def _first_snapshot(sources: Sources) -> Snapshot:
    """The empty snapshot with which every history begins, written now."""
    return Snapshot(
        id=FIRST_SNAPSHOT,
        nodes={},
        flushed_at_us=max(sources.wall_us(), 1),
        message="Repository initialized",
        metadata={"__icechunk": {"is_root": True}},
    )


async def _first_state(storage: Storage, sources: Sources, *, config: Json | None) -> RepoState:
    """The state of a new repository of format 2, whose first snapshot and transaction log exist.

    Their keys are constants, so a later creator uses those of the first one, which its ``repo`` describes.
    """
    root = _first_snapshot(sources)
    snapshot_bytes = encode_snapshot(root)
    log_bytes = encode_transaction_log(TransactionLog(id=FIRST_SNAPSHOT))
    found = await run_jobs(
        [
            partial(_create, storage, sources, snapshot_key(FIRST_SNAPSHOT), snapshot_bytes),
            partial(_create, storage, sources, transaction_key(FIRST_SNAPSHOT), log_bytes),
        ]
    )
    if found[0] != snapshot_bytes:
        root = decode_snapshot(found[0], expected_id=FIRST_SNAPSHOT)
    now_us = max(sources.wall_us(), root.flushed_at_us + 1)
    return initial_state(SnapshotRecord.of(root), time_us=now_us, config=config)


async def _create(storage: Storage, sources: Sources, key: str, data: bytes) -> bytes:
    unsure = StorageError(f"cannot create {key!r} in {storage.describe()}: no certain answer; call again")
    return await create_object(storage, sources, key, data, unsure)


def _already_there(storage: Storage) -> AlreadyExistsError:
    return AlreadyExistsError(
        f"cannot create a repository in {storage.describe()}: there is one already; open it, or choose another prefix",
        ErrorKind.PARENT_DIRECTORY_NOT_CLEAN,
    )


def _unsure(storage: Storage) -> StorageError:
    return StorageError(
        f"it is not known whether a repository was created in {storage.describe()}: no certain answer; try to open it"
    )


async def create_log(
    storage: Storage,
    sources: Sources = SYSTEM,
    *,
    config: Json | None = None,
    check_clean_root: bool = True,
    updates_per_file: int | None = None,
) -> LogLayout:
    """Create a repository with one empty snapshot on ``main``.

    Parameters
    ----------
    config
        The configuration to persist, as the format keeps it (snake_case keys); None: none.
    check_clean_root
        Refuse where anything at all is below the prefix.

    Raises
    ------
    InvalidInputError
        Something is there already (kind ``parent-directory-not-clean``).
    AlreadyExistsError
        Another creator was first, or the root was not checked and there is a repository.
    ReadOnlyError
        The storage cannot be written to.
    StorageError
        No certain answer: the repository may exist now; try to open it. Or the storage does without conditional
        writes (kind ``storage-config``): nothing was written.
    """
    await _require_place(storage, check_clean_root=check_clean_root)
    state = await _first_state(storage, sources, config=config)
    epoch = new_epoch(sources.random_bytes(12), sources.wall_us())
    info = checkpoint_info(state, epoch=epoch, n=0, durable=0 if storage.defers_syncs else None)
    if storage.defers_syncs:
        await storage.put(copy_key(epoch, 0), encode_repo(info))
    try:
        found = await _create_repo(_LogCreation(storage, sources, info, epoch))
    except AlreadyExistsError:
        if storage.defers_syncs:
            await storage.delete([copy_key(epoch, 0)])
        raise
    await _require_clean(storage, everything=False)
    head = Head(epoch=epoch, n=0, state=state)
    opened = Opened(head=head, freshness=found.asked, known=found.known, tail=())
    return LogLayout(storage, sources, opened, updates_per_file=updates_per_file)


class _RepoCreation(Creation):
    """The creation of ``repo``. The creator recognises its own object, whatever the store answered."""

    def __init__(self, storage: Storage, sources: Sources, info: RepoInfo) -> None:
        self._info = info
        super().__init__(storage, sources, REPO_KEY, encode_repo(info))
        self._asked = instant(sources)
        self.created: RepoObject | None = None
        """``repo`` as it was created, or as it is now if that goes on from there."""

    @abstractmethod
    async def is_ours(self, found: RepoObject) -> bool:
        """Whether a ``repo`` is what this creator wrote, or goes on from there."""

    async def put(self) -> bool:
        self._asked = instant(self._sources)
        if not await super().put():
            return False
        assert self.answer is not None
        known = known_of(self._info, self.answer.version, len(self._data))
        self.created = RepoObject(info=self._info, known=known, asked=self._asked._replace(date_us=self.answer.date_us))
        return True

    async def fate(self, may_land: bool) -> Fate:
        found = await read_repo(self.storage, self._sources)
        if found is None:
            return Fate.OPEN
        if not await self.is_ours(found):
            return Fate.LOST
        self.created = found
        return Fate.LANDED


class _LogCreation(_RepoCreation):
    """Recognised by its epoch."""

    def __init__(self, storage: Storage, sources: Sources, info: RepoInfo, epoch: str) -> None:
        super().__init__(storage, sources, info)
        self._epoch = epoch

    async def is_ours(self, found: RepoObject) -> bool:
        return found.known.marker is not None and found.known.marker.epoch == self._epoch


class _RepoObjectCreation(_RepoCreation):
    """Recognised by its mark, in ``repo`` or, if another client has replaced it already, in the oldest copy."""

    def __init__(self, storage: Storage, sources: Sources, info: RepoInfo, mark: bytes) -> None:
        super().__init__(storage, sources, info)
        self._mark = mark

    async def is_ours(self, found: RepoObject) -> bool:
        if found.info.extra == self._mark:
            return True
        oldest = found.info.updates[-1].backup_path if found.info.updates else None
        if oldest is None or found.info.repo_before_updates is not None:
            return False
        try:
            return decode_repo((await self.storage.get(overwritten_repo_key(oldest))).data).extra == self._mark
        except ObjectNotFoundError:
            return False


async def _create_repo(creation: _RepoCreation) -> RepoObject:
    """Create ``repo``.

    Raises
    ------
    AlreadyExistsError
        Another creator was first.
    StorageError
        Refused for certain, in the store's own words; or no certain answer.
    """
    storage = creation.storage
    if not certain(await follow(creation), _unsure(storage)):
        raise _already_there(storage)
    assert creation.created is not None
    return creation.created


async def create_ref_files(
    storage: Storage, sources: Sources = SYSTEM, *, config: Json | None = None, check_clean_root: bool = True
) -> RefFilesLayout:
    """Create a repository of format 1 with one empty snapshot on ``main``; parameters and errors as `create_log`.

    The branch is created last, if it is absent: of several creators one wins.
    """
    await _require_place(storage, check_clean_root=check_clean_root)
    if not check_clean_root:
        with suppress(ObjectNotFoundError):
            await storage.head(REPO_KEY)
            raise _already_there(storage)
    root = encode_snapshot(_first_snapshot(sources), 1)
    await _create(storage, sources, snapshot_key(FIRST_SNAPSHOT), root)
    if config is not None:
        from icechunk.config.yaml_text import config_to_yaml

        await _create(storage, sources, CONFIG_KEY, config_to_yaml(config_from_dict(config)))
    outcome = await follow(_MainCreation(storage, sources))
    if outcome.fate is Fate.UNDECIDED:
        raise _unsure(storage) from outcome.why
    if not certain(outcome, _unsure(storage)):
        raise _already_there(storage)
    return await RefFilesLayout.open(storage, sources)


class _MainCreation(Creation):
    """The creation of branch ``main`` of format 1, whose bytes are the same for all creators.

    So after a request without answer it is not known whose branch is there.
    """

    _unanswered = False

    def __init__(self, storage: Storage, sources: Sources) -> None:
        super().__init__(storage, sources, RefNames.of(storage).branch_key(MAIN), encode_ref(FIRST_SNAPSHOT))

    async def put(self) -> bool:
        try:
            return await super().put()
        except StorageError as error:
            self._unanswered = self._unanswered or not (is_refusal(error) or error.unsent)
            raise

    async def fate(self, may_land: bool) -> Fate:
        try:
            found = await self.storage.get(self._key)
        except ObjectNotFoundError:
            return Fate.OPEN
        return Fate.UNDECIDED if self._unanswered and found.data == self._data else Fate.LOST


async def create_repo_object(
    storage: Storage,
    sources: Sources = SYSTEM,
    *,
    config: Json | None = None,
    check_clean_root: bool = True,
    updates_per_file: int | None = None,
    retries: UpdateRetries | None = None,
) -> RepoObjectLayout:
    """Create a repository with one empty snapshot on ``main``; parameters and errors as `create_log`."""
    await _require_place(storage, check_clean_root=check_clean_root)
    state = await _first_state(storage, sources, config=config)
    mark = write_mark(sources.random_bytes(16))
    info = to_repo_info(state, extra=mark)
    found = await _create_repo(_RepoObjectCreation(storage, sources, info, mark))
    await _require_clean(storage, everything=False)
    return RepoObjectLayout(
        storage,
        sources,
        found,
        successors=SuccessorsOf(storage, sources, updates_per_file),
        updates_per_file=updates_per_file,
        retries=retries,
    )
