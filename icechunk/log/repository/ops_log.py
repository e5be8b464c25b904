"""Reading the ops log: everything that ever happened, newest first, through the chain of backups."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection

from icechunk.format.ids import ObjectId
from icechunk.format.keys import overwritten_repo_key
from icechunk.format.repo.codec import decode_repo
from icechunk.format.repo.values import CommitAmended, NewCommit, NewDetachedSnapshot, Update
from icechunk.log.repository.state import RepoState
from icechunk.storage.port import Storage

__all__ = ["any_in_history", "updates_of"]


async def updates_of(storage: Storage, state: RepoState) -> AsyncIterator[Update]:
    """The updates of a state and of the backups that it names, newest first, each once."""
    last_us: int | None = None
    for update in state.updates:
        last_us = update.updated_at_us
        yield update
    before, seen = state.repo_before_updates, set[str]()
    while before is not None and before not in seen:
        seen.add(before)
        info = decode_repo((await storage.get(overwritten_repo_key(before))).data)
        for update in info.updates:
            # A list may overlap that of its backup; each update is yielded once.
            if last_us is None or update.updated_at_us < last_us:
                last_us = update.updated_at_us
                yield update
        before = info.repo_before_updates


async def any_in_history(storage: Storage, state: RepoState, snapshots: Collection[ObjectId]) -> bool:
    """Whether one of the snapshots is in the state's graph, or once was."""
    if not snapshots:
        return False
    if any(snapshot in state.snapshots for snapshot in snapshots):
        return True
    async for update in updates_of(storage, state):
        match update.change:
            case NewCommit(snapshot=new) | CommitAmended(snapshot=new) | NewDetachedSnapshot(snapshot=new):
                if new in snapshots:
                    return True
    return False
