"""Creating a repository of the repo-object layout: exactly one creator wins (rule 11)."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, TypeAlias

from icechunk.errors import (
    AlreadyExistsError,
    ErrorKind,
    PreconditionFailedError,
    ReadOnlyError,
    StorageError,
)
from icechunk.format.keys import REPO_KEY, overwritten_repo_key
from icechunk.format.repo import decode_repo, encode_repo
from icechunk.format.repo_values import SnapshotRecord
from icechunk.refs.create import put_first_files, require_clean
from icechunk.refs.log_reader import RepoObject, read_repo
from icechunk.refs.repo_layout import RepoObjectLayout
from icechunk.refs.state import initial_state, to_repo_info
from icechunk.refs.store_check import require_atomic
from icechunk.refs.update_retries import UpdateRetries
from icechunk.refs.write_mark import write_mark
from icechunk.sources import SYSTEM, Sources
from icechunk.storage.base import Absent, Storage

__all__ = ["create_repo_object"]

Json: TypeAlias = Any
_ATTEMPTS = 10


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
    if not storage.supports_writes:
        raise ReadOnlyError(
            f"cannot create a repository: {storage.describe()} can only be read", ErrorKind.READ_ONLY_STORAGE
        )
    require_atomic(storage)
    await require_clean(storage, everything=check_clean_root)
    root = await put_first_files(storage, sources)
    record = SnapshotRecord(
        id=root.id, parent=None, flushed_at_us=root.flushed_at_us, message=root.message, metadata=root.metadata
    )
    now_us = max(sources.wall_us(), root.flushed_at_us + 1)
    state = initial_state(record, time_us=now_us, config=config)
    mark = write_mark(sources.random_bytes(16))
    data = encode_repo(to_repo_info(state, extra=mark))
    acknowledged = False
    for attempt in range(_ATTEMPTS):
        if attempt:
            await sources.sleep(min(1.0, 0.02 * 2**attempt))
        with suppress(PreconditionFailedError, StorageError):
            await storage.put(REPO_KEY, data, Absent())
            acknowledged = True
        try:
            found = await read_repo(storage, sources)
        except StorageError:
            continue
        if found is None:
            continue
        # Settled as a swap is: the mark is our own success, whatever the answer was.
        if not acknowledged and found.info.extra != mark and not await _grew_from(storage, found, mark):
            raise AlreadyExistsError(
                f"cannot create a repository in {storage.describe()}: there is one already; open it, or choose "
                "another prefix",
                ErrorKind.PARENT_DIRECTORY_NOT_CLEAN,
            )
        await require_clean(storage, everything=False)
        return RepoObjectLayout(storage, sources, found, updates_per_file=updates_per_file, retries=retries)
    raise StorageError(
        f"it is not known whether a repository was created in {storage.describe()}: no certain answer after "
        f"{_ATTEMPTS} tries; try to open it"
    )


async def _grew_from(storage: Storage, found: RepoObject, mark: bytes) -> bool:
    """Whether somebody has replaced ours already: then the oldest copy is ours."""
    oldest = found.info.updates[-1].backup_path if found.info.updates else None
    if oldest is None or found.info.repo_before_updates is not None:
        return False
    try:
        return decode_repo((await storage.get(overwritten_repo_key(oldest))).data).extra == mark
    except StorageError:
        return False
