"""Expiring snapshots, in every layout.

In the log and repo-object layouts, which keep a graph, old snapshots leave it, in one event; computing the event is
pure. Format 1 has no graph: `icechunk.maintenance.expire_ref_files`.
"""

from __future__ import annotations

from collections.abc import Sequence

from icechunk.format.ids import ObjectId
from icechunk.log.repository.events import BranchDeleted, Event, ExpirationRan, TagDeleted
from icechunk.log.repository.port import RepositoryLog
from icechunk.log.repository.ref_files.layout import RefFilesLayout
from icechunk.log.repository.state import MAIN, RepoState, reparented
from icechunk.maintenance.leases import read_leases
from icechunk.runtime.clock import Sources
from icechunk.runtime.late_dataclass import replace
from icechunk.storage.port import Storage

__all__ = ["expiration", "expire"]


def expiration(
    state: RepoState, *, older_than_us: int, delete_expired_branches: bool, delete_expired_tags: bool
) -> ExpirationRan:
    """The event that expires every snapshot written before a time.

    The tips of branches and tags stay, unless the ref is deleted as well; so does the first snapshot. ``main``, and
    refs to the first snapshot, are never deleted. Survivors whose parent leaves become children of the first snapshot.

    Parameters
    ----------
    older_than_us
        µs since the epoch, exclusive.
    delete_expired_branches, delete_expired_tags
        Whether refs that point to an old snapshot are deleted.
    """
    # A dict is a set here that stays in order: a long history is not sorted again.
    old = dict.fromkeys(state.snapshots.older_than(older_than_us))
    for root in state.snapshots.roots():
        old.pop(root, None)
    branches = {name for name, tip in state.branches.items() if tip in old and name != MAIN}
    tags = {name for name, target in state.tags.items() if target in old}
    gone_branches = branches if delete_expired_branches else set[str]()
    gone_tags = tags if delete_expired_tags else set[str]()
    for name, tip in state.branches.items():
        if name not in gone_branches:
            old.pop(tip, None)
    for name, target in state.tags.items():
        if name not in gone_tags:
            old.pop(target, None)
    return ExpirationRan(
        released=tuple(old),
        reparented=reparented(state.snapshots, old.keys(), onto_first=True),
        deleted_branches=tuple(sorted(gone_branches)),
        deleted_tags=tuple(sorted(gone_tags)),
    )


async def expire(
    log: RepositoryLog,
    storage: Storage,
    sources: Sources,
    *,
    older_than_us: int,
    delete_expired_branches: bool,
    delete_expired_tags: bool,
    level: int,
) -> set[ObjectId]:
    """Take old snapshots out of the history, and return them; parameters as the two kinds of expiration have them."""
    if isinstance(log, RefFilesLayout):
        # Few repositories need it.
        from icechunk.maintenance.expire_ref_files import expire_ref_files

        return await expire_ref_files(
            log,
            storage,
            sources,
            older_than_us=older_than_us,
            delete_expired_branches=delete_expired_branches,
            delete_expired_tags=delete_expired_tags,
            level=level,
        )
    released: set[ObjectId] = set()
    leases = await read_leases(storage, log.state, now_us=log.store_time_us)

    def propose(state: RepoState) -> Sequence[Event]:
        tips = set(state.branches.values())
        behind = ((id, time_us) for id, time_us in state.snapshots.times() if id not in tips)
        event = expiration(
            state,
            older_than_us=leases.expire_before_us(older_than_us, behind),
            delete_expired_branches=delete_expired_branches,
            delete_expired_tags=delete_expired_tags,
        )
        # The last proposal is the one that lands.
        released.clear()
        released.update(event.released)
        # Events of their own, which the ops log and the feed then show.
        branches = [BranchDeleted(name=name) for name in event.deleted_branches]
        tags = [TagDeleted(name=name) for name in event.deleted_tags]
        return [*branches, *tags, replace(event, deleted_branches=(), deleted_tags=())]

    await log.append(propose)
    return released
