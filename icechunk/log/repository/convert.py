"""Moving a repository between the log and the repo object: a seal and one write, or one write (rule 8)."""

from __future__ import annotations

from dataclasses import replace

from icechunk.errors import ErrorKind, InvalidInputError, ObjectNotFoundError, StorageError
from icechunk.format.keys import REPO_KEY, overwritten_repo_key, overwritten_repo_name
from icechunk.format.repo.codec import EncodedRepo
from icechunk.format.repo.repo_info import RepoInfo
from icechunk.format.repo.updates import UpdateList
from icechunk.log.repository.conditional import RepoChange, replace_repo
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.entry import copy_key, new_epoch
from icechunk.log.repository.marker import checkpoint_info, state_of
from icechunk.log.repository.objects import Known, encode
from icechunk.log.repository.open import open_repository
from icechunk.log.repository.port import Layout, RepositoryLog
from icechunk.log.repository.repo_object.layout import RepoObjectLayout
from icechunk.log.repository.store_check import require_atomic, require_writable
from icechunk.runtime.clock import Sources
from icechunk.storage.outcome import is_refusal
from icechunk.storage.port import PutResult, Storage

__all__ = ["convert_log", "convert_to_log"]


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
        No certain answer: open the repository, which finishes a conversion that was begun, or call again.
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


class _ConversionToLog(RepoChange[str]):
    """The first checkpoint of a new log, in place of an authoritative ``repo``."""

    def __init__(self, storage: Storage, sources: Sources) -> None:
        super().__init__(storage, sources)
        self._epoch = new_epoch(sources.random_bytes(12), sources.wall_us())

    async def result(self, known: Known, info: RepoInfo | None) -> str | None:
        return known.marker.epoch if known.marker is not None and known.read_only else None

    async def make(self, known: Known, info: RepoInfo | None) -> EncodedRepo | None:
        storage, sources = self.storage, self.sources
        assert info is not None
        backup = overwritten_repo_name(max(sources.wall_us(), 0) // 1000, sources.random_bytes(12))
        info = replace(info, updates=UpdateList.of(info.updates).with_backup(backup))
        durable = 0 if storage.defers_syncs else None
        encoded = await encode(checkpoint_info(state_of(info, None), epoch=self._epoch, n=0, durable=durable))
        try:
            await storage.copy(REPO_KEY, overwritten_repo_key(backup))
            if storage.defers_syncs:
                await storage.put(copy_key(self._epoch, 0), encoded.data)
        except StorageError as error:
            if is_refusal(error):
                raise
            self.why = error
            return None
        return encoded

    async def landed(self, known: Known, encoded: EncodedRepo, put: PutResult) -> str:
        return self._epoch

    def gone(self) -> str:
        raise ObjectNotFoundError(f"no object {REPO_KEY!r} in {self.storage.describe()}: nothing to convert")

    def unsure(self) -> StorageError:
        return StorageError(
            f"cannot convert {self.storage.describe()} to the log layout: no certain answer; call again",
            ErrorKind.UPDATE_ATTEMPTS_EXHAUSTED,
        )


async def convert_to_log(storage: Storage, sources: Sources) -> str:
    """Make a repository of the repo-object layout one of the log layout: one conditional write.

    As every replacement of ``repo`` in that layout, it makes a copy of the object that it replaces. The newest updates
    name the copy, which has the mark of the change that made them.

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
    return await replace_repo(_ConversionToLog(storage, sources))
