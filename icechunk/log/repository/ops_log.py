"""Reading the ops log: everything that ever happened, newest first, through the chain of backups."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from typing import Final

from icechunk.errors import ObjectNotFoundError
from icechunk.format.ids import ObjectId
from icechunk.format.keys import overwritten_repo_key
from icechunk.format.repo.codec import decode_repo
from icechunk.format.repo.repo_info import CommitAmended, NewCommit, NewDetachedSnapshot, RepoInfo, Update
from icechunk.log.repository.marker import nonce_of
from icechunk.log.repository.state import RepoState
from icechunk.storage.port import Storage

__all__ = ["any_in_history", "happened", "updates_of"]

_SNAPSHOT_CHANGES: Final = (NewCommit, CommitAmended, NewDetachedSnapshot)


async def updates_of(storage: Storage, state: RepoState) -> AsyncIterator[Update]:
    """The updates of a state and of the backups that it names, newest first, each once."""
    last_us: int | None = None
    for update in state.updates:
        last_us = update.updated_at_us
        yield update
    async for info in _backups(storage, state.repo_before_updates):
        for update in info.updates:
            # A list may overlap that of its backup; each update is yielded once.
            if last_us is None or update.updated_at_us < last_us:
                last_us = update.updated_at_us
                yield update


async def _backups(storage: Storage, before: str | None) -> AsyncIterator[RepoInfo]:
    """The chain of backups that begins with this one."""
    seen = set[str]()
    while before is not None and before not in seen:
        seen.add(before)
        info = decode_repo((await storage.get(overwritten_repo_key(before))).data)
        yield info
        before = info.repo_before_updates


async def any_in_history(storage: Storage, state: RepoState, snapshots: Collection[ObjectId]) -> bool:
    """Whether one of the snapshots is in the state's graph, or once was."""
    if not snapshots:
        return False
    if any(snapshot in state.snapshots for snapshot in snapshots):
        return True
    async for update in updates_of(storage, state):
        if isinstance(update.change, _SNAPSHOT_CHANGES) and update.change.snapshot in snapshots:
            return True
    return False


async def happened(
    storage: Storage,
    newest: RepoInfo,
    snapshots: Collection[ObjectId],
    *,
    nonces: Collection[bytes],
    times_us: Collection[int],
) -> bool | None:
    """Whether a replacement of ``repo`` is part of history, given that it is not the newest one's predecessor any more.

    At most one of several replacements of the same version can be. A snapshot of it in the graph, or in the ops log,
    says so. A replacement that adds none is recognised by its mark, in the object or in the copy in which its newest
    update was the newest: each update names that copy, but for the last ones of an object, which are that object's own.

    Parameters
    ----------
    newest
        ``repo`` as it is now.
    snapshots
        That the replacement adds.
    nonces, times_us
        Of the mark of each replacement in question, and of its newest update.

    Returns
    -------
    bool or None
        None: a copy that is needed to decide is missing.
    """
    if nonce_of(newest.extra) in nonces or any(id in newest.snapshots for id in snapshots):
        return True
    if not times_us:
        return False
    try:
        return await _is_told(storage, newest, snapshots, nonces=nonces, times_us=times_us)
    except ObjectNotFoundError:
        return None


async def _is_told(
    storage: Storage,
    newest: RepoInfo,
    snapshots: Collection[ObjectId],
    *,
    nonces: Collection[bytes],
    times_us: Collection[int],
) -> bool:
    async for info in _chain(storage, newest):
        for update in info.updates:
            if update.updated_at_us < min(times_us):
                return False
            if snapshots:
                if isinstance(update.change, _SNAPSHOT_CHANGES) and update.change.snapshot in snapshots:
                    return True
            elif update.updated_at_us in times_us:
                extra = info.extra
                if update.backup_path is not None:
                    extra = decode_repo((await storage.get(overwritten_repo_key(update.backup_path))).data).extra
                if nonce_of(extra) in nonces:
                    return True
    return False


async def _chain(storage: Storage, newest: RepoInfo) -> AsyncIterator[RepoInfo]:
    yield newest
    async for info in _backups(storage, newest.repo_before_updates):
        yield info
