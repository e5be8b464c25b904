"""Expiring snapshots in format 1, which has no graph: the youngest snapshot that loses its history is written again.

For each branch and tag, the oldest snapshot that is young enough (or the tip, if none is) gets the first snapshot
as its parent. Nothing else changes before a collection. Each step leaves a repository whose refs all lead to the first
snapshot, so an expiration that was interrupted is finished by the next one.
"""

from __future__ import annotations

from icechunk.format.ids import ObjectId
from icechunk.log.repository.events import BranchDeleted, TagDeleted
from icechunk.log.repository.ref_files.layout import RefFilesLayout
from icechunk.log.repository.state import MAIN
from icechunk.log.repository.store_check import require_writable
from icechunk.maintenance.leases import read_leases
from icechunk.maintenance.ref_history import Link, Links
from icechunk.runtime.clock import Sources
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.tasks import run_each
from icechunk.storage.port import Storage

__all__ = ["Shortening", "expire_ref_files", "shorten"]

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
