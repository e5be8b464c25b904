"""Expiring snapshots, in every layout.

In the log and repo-object layouts, which keep a graph, old snapshots leave it, in one event; computing the event is
pure.

Format 1 has no graph, so the youngest snapshot that loses its history is written again.
For each branch and tag, the oldest snapshot that is young enough (or the tip, if none is) gets the first snapshot
as its parent. Nothing else changes before a collection. Each step leaves a repository whose refs all lead to the first
snapshot, so an expiration that was interrupted is finished by the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

from icechunk.format.ids import ObjectId
from icechunk.log.repository.events import BranchDeleted, Event, ExpirationRan, TagDeleted
from icechunk.log.repository.port import RepositoryLog
from icechunk.log.repository.ref_files.layout import RefFilesLayout
from icechunk.log.repository.state import MAIN, RepoState, reparented
from icechunk.log.repository.store_check import require_writable
from icechunk.maintenance.leases import read_leases
from icechunk.maintenance.ref_history import Link, Links
from icechunk.runtime.clock import Sources
from icechunk.runtime.late_dataclass import dataclass, replace
from icechunk.runtime.tasks import run_each
from icechunk.storage.port import Storage

__all__ = ["Shortening", "expiration", "expire", "expire_ref_files", "shorten"]


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


_CONCURRENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortening:
    """The effect of expiration on the history of one ref."""

    edited: ObjectId | None
    """The snapshot that gets the first one as its parent; None: nothing changes."""
    root: ObjectId
    released: frozenset[ObjectId]
    tip_is_old: bool


def shorten(chain: list[Link], older_than_us: int) -> Shortening:
    """Decide about the history of a ref. Pure.

    Parameters
    ----------
    chain
        Its snapshots, newest first, the first snapshot of the repository last.
    older_than_us
        µs since the epoch, exclusive.
    """
    root = chain[-1].id
    young = 0
    while young < len(chain) and chain[young].flushed_at_us >= older_than_us:
        young += 1
    tip_is_old = young == 0
    edited = chain[max(young - 1, 0)]
    if edited.parent is None or edited.parent == root or young == len(chain):
        return Shortening(edited=None, root=root, released=frozenset(), tip_is_old=tip_is_old)
    released = frozenset(link.id for link in chain[young:-1])
    return Shortening(edited=edited.id, root=root, released=released, tip_is_old=tip_is_old)


async def expire_ref_files(
    log: RefFilesLayout,
    storage: Storage,
    sources: Sources,
    *,
    older_than_us: int,
    delete_expired_branches: bool,
    delete_expired_tags: bool,
    level: int,
) -> set[ObjectId]:
    """Expire; parameters as `icechunk.maintenance.expire.expiration`.

    Here the refs that are deleted include those to the first snapshot, as the official library has it in this format.

    Parameters
    ----------
    level
        Of zstd, for the snapshots that are written again.

    Returns
    -------
    set
        Snapshots that left the history of some ref, those among them that another ref still points to included.
    """
    require_writable(storage, "expire snapshots")
    state = await log.refresh()
    log.require_all_refs()
    leases = await read_leases(storage, state, now_us=log.store_time_us)
    links = Links(storage, sources)
    chains: dict[ObjectId, list[Link]] = {}

    async def read(tip: ObjectId) -> None:
        chains[tip] = await links.chain(tip)

    await run_each(read, state.tips(), limit=_CONCURRENT)
    behind = ((link.id, link.flushed_at_us) for chain in chains.values() for link in chain[1:])
    older_than_us = leases.expire_before_us(older_than_us, behind)
    fates = {tip: shorten(chain, older_than_us) for tip, chain in chains.items()}
    released: set[ObjectId] = set()
    edits: dict[ObjectId, ObjectId] = {}
    for fate in fates.values():
        released |= fate.released
        if fate.edited is not None:
            edits[fate.edited] = fate.root

    async def edit(id: ObjectId) -> None:
        await links.set_parent(id, edits[id], level)

    await run_each(edit, edits, limit=_CONCURRENT)
    log.forget(edits)
    if delete_expired_branches:
        for name, tip in state.branches.items():
            if fates[tip].tip_is_old and name != MAIN:
                await _delete_branch(log, name, tip)
    if delete_expired_tags:
        for name, tip in state.tags.items():
            if fates[tip].tip_is_old:
                await _delete_tag(log, name)
    return released


async def _delete_branch(log: RefFilesLayout, name: str, tip: ObjectId) -> None:
    # Another client may have committed to it meanwhile, or deleted it.
    await log.append(lambda state: [BranchDeleted(name=name)] if state.branches.get(name) == tip else [])


async def _delete_tag(log: RefFilesLayout, name: str) -> None:
    await log.append(lambda state: [TagDeleted(name=name)] if name in state.tags else [])


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
