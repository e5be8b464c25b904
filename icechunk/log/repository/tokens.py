"""Tokens by layout, and settling a change of a layout, or of a life of the log, that has ended (rule 3).

A request that is still on its way cannot land there any more, since the object that it would replace is gone. So the
change landed if history has it. History has its snapshots, or, in the repo-object layout, its mark in a copy of
``repo``. In the log layout a change without snapshots is recognised in its slot, for as long as that counts; in format
1 by nothing.
"""

from __future__ import annotations

from typing import Final

from icechunk.errors import CommitOutcomeUnknown, RepositoryNotFoundError, SessionStateError
from icechunk.format.repo.repo_info import RepoMigrated
from icechunk.log.repository.objects import RepoObject, nonce_in_slot, read_repo
from icechunk.log.repository.ops_log import any_in_history, happened, updates_of
from icechunk.log.repository.port import SwapToken
from icechunk.log.repository.state import from_repo_info
from icechunk.runtime.clock import Sources
from icechunk.storage.port import Storage

__all__ = ["REFS_TOKEN", "REPO_TOKEN", "settle_ended"]

REPO_TOKEN: Final = "repo:"
"""Begins the epoch of a token of the repo-object layout; the version of ``repo`` that would be replaced follows."""
REFS_TOKEN: Final = "refs:"
"""Begins the epoch of a token of format 1; the key of the ref follows. The log layout's are alphanumeric."""


async def settle_ended(storage: Storage, sources: Sources, token: SwapToken) -> bool:
    """Whether a change is part of history, after its layout or its epoch was seen to have ended.

    Raises
    ------
    CommitOutcomeUnknown
        It cannot be found out any more.
    SessionStateError
        It has not ended: the client's layout is older than that of the token.
    RepositoryNotFoundError
        There is no ``repo``.
    """
    found = await read_repo(storage, sources)
    if found is None:
        raise RepositoryNotFoundError(
            f"there is no object 'repo' in {storage.describe()}, so it cannot be found out what landed"
        )
    if _is_open(token, found):
        raise SessionStateError(f"the repository in {storage.describe()} has another layout now; open it again")
    state = from_repo_info(found.info)
    if await any_in_history(storage, state, token.snapshots):
        return True
    if token.epoch.startswith(REFS_TOKEN):
        if token.snapshots and await _was_upgraded(storage, found):
            return False
    elif token.snapshots:
        return False
    elif token.epoch.startswith(REPO_TOKEN):
        landed = await happened(storage, found.info, (), nonces=token.nonces, times_us=token.times_us)
        if landed is not None:
            return landed
    else:
        return await nonce_in_slot(storage, sources, token, repo=None) in token.nonces
    raise CommitOutcomeUnknown(
        f"it cannot be found out in {storage.describe()} whether the change landed: the repository has another layout "
        "now; look whether the change is there",
        token,
    )


def _is_open(token: SwapToken, found: RepoObject) -> bool:
    marker = found.known.marker if found.known.read_only else None
    if marker is not None:
        return token.epoch == marker.epoch
    return token.epoch == f"{REPO_TOKEN}{found.known.version}"


async def _was_upgraded(storage: Storage, found: RepoObject) -> bool:
    """Whether an upgrade from format 1 is complete: until then the refs count."""
    async for update in updates_of(storage, from_repo_info(found.info)):
        if isinstance(update.change, RepoMigrated):
            return True
    return False
