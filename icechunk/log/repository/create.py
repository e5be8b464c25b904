"""Creating a repository of any layout: check that the place is free, and put the first files (rule 11).

Of any number of creators exactly one wins.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeAlias

from icechunk.config import config_from_dict, config_to_yaml
from icechunk.errors import (
    AlreadyExistsError,
    ErrorKind,
    InvalidInputError,
    ObjectNotFoundError,
    PreconditionFailedError,
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
from icechunk.storage.outcome import is_refusal
from icechunk.storage.port import Absent, Storage

__all__ = [
    "ATTEMPTS",
    "Json",
    "already_there",
    "create_log",
    "create_ref_files",
    "create_repo_object",
    "first_snapshot",
    "first_state",
    "pause_before",
    "require_clean",
    "require_place",
    "unsure",
]

Json: TypeAlias = Any

_PREFIXES: Final = (CHUNKS_PREFIX, MANIFESTS_PREFIX, SNAPSHOTS_PREFIX, TRANSACTIONS_PREFIX)

ATTEMPTS: Final = 10
"""Of a creator at a certain answer."""


async def require_place(storage: Storage, *, check_clean_root: bool) -> None:
    """Refuse a place where no repository can be created; else make it ready. Errors as those of `create_log`."""
    require_writable(storage, "create a repository")
    require_atomic(storage)
    await require_clean(storage, everything=check_clean_root)
    await storage.prepare(prefix.rstrip("/") for prefix in _PREFIXES)


async def require_clean(storage: Storage, *, everything: bool) -> None:
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


def first_snapshot(sources: Sources) -> Snapshot:
    """The empty snapshot with which every history begins, written now."""
    return Snapshot(
        id=FIRST_SNAPSHOT,
        nodes={},
        flushed_at_us=max(sources.wall_us(), 1),
        message="Repository initialized",
        metadata={"__icechunk": {"is_root": True}},
    )


async def first_state(storage: Storage, sources: Sources, *, config: Json | None) -> RepoState:
    """The state of a new repository of format 2, whose first snapshot and transaction log exist.

    Their keys are constants, so a later creator uses those of the first one, which its ``repo`` describes.
    """
    root = first_snapshot(sources)
    snapshot_bytes = encode_snapshot(root)
    log_bytes = encode_transaction_log(TransactionLog(id=FIRST_SNAPSHOT))
    found = await run_jobs(
        [
            partial(_put_or_read, storage, sources, snapshot_key(FIRST_SNAPSHOT), snapshot_bytes),
            partial(_put_or_read, storage, sources, transaction_key(FIRST_SNAPSHOT), log_bytes),
        ]
    )
    if found[0] != snapshot_bytes:
        root = decode_snapshot(found[0], expected_id=FIRST_SNAPSHOT)
    now_us = max(sources.wall_us(), root.flushed_at_us + 1)
    return initial_state(SnapshotRecord.of(root), time_us=now_us, config=config)


async def pause_before(sources: Sources, attempt: int) -> None:
    """Wait before one of the `ATTEMPTS` at a certain answer, counted from 0."""
    if attempt:
        await sources.sleep(min(1.0, 0.02 * 2**attempt))


async def _put_or_read(storage: Storage, sources: Sources, key: str, data: bytes) -> bytes:
    """The bytes of the object at the key: the given ones, if there was none before."""
    why: StorageError | None = None
    for attempt in range(ATTEMPTS):
        await pause_before(sources, attempt)
        try:
            await storage.put(key, data, Absent())
            return data
        except StorageError as error:
            if is_refusal(error):
                raise
            why = error
        try:
            return (await storage.get(key)).data
        except ObjectNotFoundError:
            continue
        except StorageError as error:
            why = error
    raise StorageError(f"cannot create {key!r} in {storage.describe()}: no certain answer") from why


def already_there(storage: Storage) -> AlreadyExistsError:
    """Another creator was first."""
    return AlreadyExistsError(
        f"cannot create a repository in {storage.describe()}: there is one already; open it, or choose another prefix",
        ErrorKind.PARENT_DIRECTORY_NOT_CLEAN,
    )


def unsure(storage: Storage) -> StorageError:
    """The store gave no certain answer."""
    return StorageError(
        f"it is not known whether a repository was created in {storage.describe()}: no certain answer after "
        f"{ATTEMPTS} tries; try to open it"
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
    await require_place(storage, check_clean_root=check_clean_root)
    state = await first_state(storage, sources, config=config)
    epoch = new_epoch(sources.random_bytes(12), sources.wall_us())
    info = checkpoint_info(state, epoch=epoch, n=0, durable=0 if storage.defers_syncs else None)
    if storage.defers_syncs:
        await storage.put(copy_key(epoch, 0), encode_repo(info))
    try:
        found = await _create_repo(storage, sources, info, lambda found: _has_epoch(found, epoch))
    except AlreadyExistsError:
        if storage.defers_syncs:
            await storage.delete([copy_key(epoch, 0)])
        raise
    await require_clean(storage, everything=False)
    head = Head(epoch=epoch, n=0, state=state)
    opened = Opened(head=head, freshness=found.asked, known=found.known, tail=())
    return LogLayout(storage, sources, opened, updates_per_file=updates_per_file)


async def _has_epoch(found: RepoObject, epoch: str) -> bool:
    return found.known.marker is not None and found.known.marker.epoch == epoch


async def _create_repo(
    storage: Storage, sources: Sources, info: RepoInfo, is_ours: Callable[[RepoObject], Awaitable[bool]]
) -> RepoObject:
    """Create ``repo``, settled as a swap is: what is recognised is this creator's own success, whatever was answered.

    Raises
    ------
    AlreadyExistsError
        Another creator was first.
    StorageError
        Refused for certain, in the store's own words; or no certain answer.
    """
    data = encode_repo(info)
    may_be_there = False
    why: Exception | None = None
    for attempt in range(ATTEMPTS):
        await pause_before(sources, attempt)
        asked = instant(sources)
        try:
            put = await storage.put(REPO_KEY, data, Absent())
        except StorageError as error:
            if is_refusal(error) and not may_be_there:
                raise
            may_be_there = may_be_there or not error.unsent
            why = error
        else:
            known = known_of(info, put.version, len(data))
            return RepoObject(info=info, known=known, asked=replace(asked, date_us=put.date_us))
        try:
            found = await read_repo(storage, sources)
            if found is None:
                continue
            ours = await is_ours(found)
        except StorageError as error:
            why = error
            continue
        if not ours:
            raise already_there(storage)
        return found
    raise unsure(storage) from why


async def create_ref_files(
    storage: Storage, sources: Sources = SYSTEM, *, config: Json | None = None, check_clean_root: bool = True
) -> RefFilesLayout:
    """Create a repository of format 1 with one empty snapshot on ``main``; parameters and errors as `create_log`.

    The branch is created last, if it is absent: of several creators one wins.
    """
    await require_place(storage, check_clean_root=check_clean_root)
    if not check_clean_root:
        with suppress(ObjectNotFoundError):
            await storage.head(REPO_KEY)
            raise already_there(storage)
    with suppress(PreconditionFailedError):
        await storage.put(snapshot_key(FIRST_SNAPSHOT), encode_snapshot(first_snapshot(sources), 1), Absent())
    if config is not None:
        with suppress(PreconditionFailedError):
            await storage.put(CONFIG_KEY, config_to_yaml(config_from_dict(config)), Absent())
    names = RefNames.of(storage)
    try:
        await storage.put(names.branch_key(MAIN), encode_ref(FIRST_SNAPSHOT), Absent())
    except PreconditionFailedError:
        raise already_there(storage) from None
    return await RefFilesLayout.open(storage, sources)


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
    await require_place(storage, check_clean_root=check_clean_root)
    state = await first_state(storage, sources, config=config)
    mark = write_mark(sources.random_bytes(16))
    info = to_repo_info(state, extra=mark)
    found = await _create_repo(storage, sources, info, lambda found: _grew_from(storage, found, mark))
    await require_clean(storage, everything=False)
    return RepoObjectLayout(
        storage,
        sources,
        found,
        successors=SuccessorsOf(storage, sources, updates_per_file),
        updates_per_file=updates_per_file,
        retries=retries,
    )


async def _grew_from(storage: Storage, found: RepoObject, mark: bytes) -> bool:
    """Whether it is ours, or the oldest copy is, because another client has replaced ours already."""
    if found.info.extra == mark:
        return True
    oldest = found.info.updates[-1].backup_path if found.info.updates else None
    if oldest is None or found.info.repo_before_updates is not None:
        return False
    try:
        return decode_repo((await storage.get(overwritten_repo_key(oldest))).data).extra == mark
    except ObjectNotFoundError:
        return False
