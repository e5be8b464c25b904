"""Creating a repository of the repo-object layout: exactly one creator wins (rule 11)."""

from __future__ import annotations

from contextlib import suppress

from icechunk.errors import PreconditionFailedError, StorageError
from icechunk.format.keys import REPO_KEY, overwritten_repo_key
from icechunk.format.repo import decode_repo, encode_repo
from icechunk.refs.create import (
    ATTEMPTS,
    Json,
    already_there,
    first_state,
    pause_before,
    require_clean,
    require_place,
    unsure,
)
from icechunk.refs.log_reader import RepoObject, read_repo
from icechunk.refs.repo_layout import RepoObjectLayout
from icechunk.refs.state import to_repo_info
from icechunk.refs.update_retries import UpdateRetries
from icechunk.refs.write_mark import write_mark
from icechunk.sources import SYSTEM, Sources
from icechunk.storage.base import Absent, Storage

__all__ = ["create_repo_object"]


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
    data = encode_repo(to_repo_info(state, extra=mark))
    acknowledged = False
    for attempt in range(ATTEMPTS):
        await pause_before(sources, attempt)
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
            raise already_there(storage)
        await require_clean(storage, everything=False)
        return RepoObjectLayout(storage, sources, found, updates_per_file=updates_per_file, retries=retries)
    raise unsure(storage)


async def _grew_from(storage: Storage, found: RepoObject, mark: bytes) -> bool:
    """Whether somebody has replaced ours already: then the oldest copy is ours."""
    oldest = found.info.updates[-1].backup_path if found.info.updates else None
    if oldest is None or found.info.repo_before_updates is not None:
        return False
    try:
        return decode_repo((await storage.get(overwritten_repo_key(oldest))).data).extra == mark
    except StorageError:
        return False
