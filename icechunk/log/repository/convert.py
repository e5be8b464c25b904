"""Moving a repository between the log and the repo object: a seal and one write, or one write (rule 8)."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from icechunk.errors import ErrorKind, InvalidInputError, ObjectNotFoundError, PreconditionFailedError, StorageError
from icechunk.format.keys import REPO_KEY, overwritten_repo_key, overwritten_repo_name
from icechunk.format.repo.updates import UpdateList
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.entry import copy_key, new_epoch
from icechunk.log.repository.marker import checkpoint_info, state_of
from icechunk.log.repository.objects import encode, read_repo
from icechunk.log.repository.open import open_repository
from icechunk.log.repository.port import Layout, RepositoryLog
from icechunk.log.repository.repo_object.layout import RepoObjectLayout
from icechunk.log.repository.store_check import require_atomic, require_writable
from icechunk.runtime.clock import Sources
from icechunk.storage.outcome import is_refusal
from icechunk.storage.port import Matches, Storage

__all__ = ["convert_log", "convert_to_log"]

ATTEMPTS: Final = 20


async def convert_log(log: RepositoryLog, storage: Storage, sources: Sources, layout: Layout) -> None:
    """Persist the log of a repository in another layout; commits that race with it land before, or are refused.

    Parameters
    ----------
    log
        A client of it; has to be opened anew afterwards. Where it only reads any more, since another client has
        converted the repository meanwhile, the repository is converted from the layout that it has now.
    layout
        Nothing happens where the repository has it already.

    Raises
    ------
    InvalidInputError
        One of the two is format 1 (kind ``invalid-repository-migration``).
    ReadOnlyError
        The storage can only be read.
    CommitOutcomeUnknown, StorageError
        No certain answer; opening the repository finishes what was begun, or call again.
    """
    await log.refresh()
    if log.ended_reason is None:
        await _convert(log, storage, sources, layout)
        return
    current = await open_repository(storage, sources)
    try:
        await _convert(current, storage, sources, layout)
    finally:
        await current.aclose()


async def _convert(log: RepositoryLog, storage: Storage, sources: Sources, layout: Layout) -> None:
    if log.layout is layout:
        return
    require_writable(storage, "convert the repository")
    match log, layout:
        case LogLayout(), Layout.REPO:
            await log.convert_to_repo_object()
        case RepoObjectLayout(), Layout.LOG:
            await log.prepare_writes()
            await convert_to_log(storage, sources)
        case _:
            raise InvalidInputError(
                f"cannot convert the repository in {storage.describe()} from layout {log.layout.value!r} to "
                f"{layout.value!r}: format 1 can only be upgraded (upgrade_icechunk_repository)",
                ErrorKind.INVALID_REPOSITORY_MIGRATION,
            )


async def convert_to_log(storage: Storage, sources: Sources) -> str:
    """Make a repository of the repo-object layout one of the log layout: one conditional write.

    Like every replacement of ``repo`` in that layout it makes a copy of what it replaces, and the newest updates name
    it: the mark of the change that made them is there.

    Returns
    -------
    str
        The epoch: a new one, or the present one where it is a log already.

    Raises
    ------
    ObjectNotFoundError
        There is no ``repo``.
    StorageError
        No certain answer: call again; or a storage without conditional writes (kind ``storage-config``).
    """
    require_atomic(storage)
    epoch = new_epoch(sources.random_bytes(12), sources.wall_us())
    for _ in range(ATTEMPTS):
        found = await read_repo(storage, sources)
        if found is None:
            raise ObjectNotFoundError(f"no object {REPO_KEY!r} in {storage.describe()}: nothing to convert")
        if found.known.marker is not None and found.known.read_only:
            return found.known.marker.epoch
        backup = overwritten_repo_name(max(sources.wall_us(), 0) // 1000, sources.random_bytes(12))
        info = replace(found.info, updates=UpdateList.of(found.info.updates).settled(backup))
        durable = 0 if storage.defers_syncs else None
        encoded = await encode(checkpoint_info(state_of(info, None), epoch=epoch, n=0, durable=durable))
        try:
            await storage.copy(REPO_KEY, overwritten_repo_key(backup))
            if storage.defers_syncs:
                await storage.put(copy_key(epoch, 0), encoded.data)
            await storage.put(REPO_KEY, encoded.data, Matches(found.known.version))
            return epoch
        except PreconditionFailedError:
            continue
        except StorageError as error:
            if is_refusal(error):
                raise
            await sources.sleep(0.05)
    raise StorageError(
        f"cannot convert {storage.describe()} to the log layout: no certain answer after {ATTEMPTS} tries; call again",
        ErrorKind.UPDATE_ATTEMPTS_EXHAUSTED,
    )
