"""Expiring snapshots, in whatever layout."""

from __future__ import annotations

from collections.abc import Sequence

from icechunk.format.ids import ObjectId
from icechunk.maintenance.expire_ref_files import expire_ref_files
from icechunk.maintenance.expiry import expiration
from icechunk.refs.base import RepositoryLog
from icechunk.refs.events import Event
from icechunk.refs.ref_files_layout import RefFilesLayout
from icechunk.refs.state import RepoState
from icechunk.storage.base import Storage

__all__ = ["expire"]


async def expire(
    log: RepositoryLog,
    storage: Storage,
    *,
    older_than_us: int,
    delete_expired_branches: bool,
    delete_expired_tags: bool,
    level: int,
) -> set[ObjectId]:
    """Take old snapshots out of the history, and return them; parameters as the two kinds of expiration have them."""
    if isinstance(log, RefFilesLayout):
        return await expire_ref_files(
            log,
            storage,
            older_than_us=older_than_us,
            delete_expired_branches=delete_expired_branches,
            delete_expired_tags=delete_expired_tags,
            level=level,
        )
    released: set[ObjectId] = set()

    def propose(state: RepoState) -> Sequence[Event]:
        event = expiration(
            state,
            older_than_us=older_than_us,
            delete_expired_branches=delete_expired_branches,
            delete_expired_tags=delete_expired_tags,
        )
        # The last proposal is the one that lands.
        released.clear()
        released.update(event.released)
        return [event]

    await log.append(propose)
    return released
