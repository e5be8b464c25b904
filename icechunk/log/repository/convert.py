"""Moving a repository between the log and the repo object: a seal and one write, or one write (rule 8)."""

from __future__ import annotations

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.log.repository.entries.checkpoint import convert_to_log
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.port import Layout, RepositoryLog
from icechunk.log.repository.repo_object.layout import RepoObjectLayout
from icechunk.log.repository.store_check import require_writable
from icechunk.runtime.clock import Sources
from icechunk.storage.port import Storage

__all__ = ["convert_log"]


async def convert_log(log: RepositoryLog, storage: Storage, sources: Sources, layout: Layout) -> None:
    """Persist the log of a repository in another layout; commits that race with it land before, or are refused.

    Parameters
    ----------
    log
        A client of it; has to be opened anew afterwards. Nothing happens where it has the layout already.

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
