"""What creators do in every layout: see that the place is free, put the first files, say who was first (rule 11)."""

from __future__ import annotations

from functools import partial
from typing import Any, Final, TypeAlias

from icechunk.errors import (
    AlreadyExistsError,
    ErrorKind,
    InvalidInputError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT
from icechunk.format.keys import REFS_PREFIX, snapshot_key, transaction_key
from icechunk.format.repo_values import SnapshotRecord
from icechunk.format.snapshot import decode_snapshot, encode_snapshot
from icechunk.format.tables import Snapshot, TransactionLog
from icechunk.format.transaction import encode_transaction_log
from icechunk.refs.state import RepoState, initial_state
from icechunk.refs.store_check import require_atomic, require_writable
from icechunk.sources import Sources
from icechunk.storage.base import Absent, Storage
from icechunk.tasks import run_jobs

__all__ = [
    "ATTEMPTS",
    "Json",
    "already_there",
    "first_snapshot",
    "first_state",
    "pause_before",
    "require_clean",
    "require_place",
    "unsure",
]

Json: TypeAlias = Any

ATTEMPTS: Final = 10
"""Of a creator at a certain answer."""


async def require_place(storage: Storage, *, check_clean_root: bool) -> None:
    """Refuse a place where no repository can be created. Errors as those of `create_log`."""
    require_writable(storage, "create a repository")
    require_atomic(storage)
    await require_clean(storage, everything=check_clean_root)


async def require_clean(storage: Storage, *, everything: bool) -> None:
    """Refuse a place where a repository of format 1 is, or, if asked, anything.

    Raises
    ------
    InvalidInputError
        Kind ``parent-directory-not-clean``.
    """
    prefix = "" if everything else REFS_PREFIX
    pages = storage.list_pages(prefix, page_size=1)
    try:
        async for page in pages:
            if page:
                raise InvalidInputError(
                    f"cannot create a repository in {storage.describe()}: {page[0].key!r} is there already; choose an "
                    "empty prefix, or open the repository that is there",
                    ErrorKind.PARENT_DIRECTORY_NOT_CLEAN,
                )
    finally:
        aclose = getattr(pages, "aclose", None)
        if aclose is not None:
            await aclose()


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
    """The state of a new repository of format 2, whose first snapshot and transaction log stand.

    Their keys are constants, so who is not first must not replace what the winner's ``repo`` describes, and uses his.
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
    """The bytes that stand at the key: these, if nothing stood there before."""
    why: StorageError | None = None
    for attempt in range(ATTEMPTS):
        await pause_before(sources, attempt)
        try:
            await storage.put(key, data, Absent())
            return data
        except (PreconditionFailedError, StorageError) as error:
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
    """The store has not said for certain who was first."""
    return StorageError(
        f"it is not known whether a repository was created in {storage.describe()}: no certain answer after "
        f"{ATTEMPTS} tries; try to open it"
    )
