"""The upgrade of a repository from format 1 to format 2."""

from __future__ import annotations

from typing import Final, NoReturn, TypeVar, cast

from icechunk.log.repository.ref_files.upgrade import DEFAULT_PREFETCH, upgrade
from icechunk.repository.repository import Repository
from icechunk.runtime.checks import require_type
from icechunk.runtime.twins import synchronous
from icechunk.session.core import Core

__all__ = ["upgrade_icechunk_repository", "upgrade_icechunk_repository_async"]

R = TypeVar("R", bound=Repository)


class _InvalidatedRepository:
    """Replaces the parts of a `Repository` object that was upgraded; any use raises ``RuntimeError``."""

    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError(
            "this Repository object was invalidated by upgrade_icechunk_repository(); use the one that the call "
            "returned, or open the repository again"
        )


async def upgrade_icechunk_repository_async(
    repo: R, *, dry_run: bool, delete_unused_v1_files: bool = True, prefetch_concurrency: int | None = None
) -> R:
    """Bring a repository of format 1 to format 2: its refs become one ``repo`` object, all else is unchanged.

    Snapshots, manifests and chunks keep their ids and bytes; history, branches, tags, names of deleted tags and the
    persisted configuration are the same afterwards. Interrupted at any step nothing is lost, and the same call
    finishes it; until then the repository can be read and not written. A commit made meanwhile, with
    either library, is taken over or refused, on a storage with conditional writes; branches and tags that an official
    1.x client creates or deletes in the same moment may be left behind (a warning is logged).

    Parameters
    ----------
    repo
        Open on the repository. Cannot be used afterwards, unless it was a dry run or an error was raised.
    dry_run
        Read all that is needed, log the steps that would follow (logger
        ``icechunk.log.repository.ref_files.upgrade``), and change nothing.
    delete_unused_v1_files
        Delete the refs and ``config.yaml`` in the end. Without that, commits that are made meanwhile may be lost: see
        to it that there are none.
    prefetch_concurrency
        Snapshot files to read at a time, at least 1; None: 64.

    Returns
    -------
    Repository
        A new object on the repository, with the same configuration and credentials.

    Raises
    ------
    SessionStateError
        It has format 2 already, in any layout (kind ``invalid-repository-migration``).
    SnapshotNotFoundError, FormatError
        A file that belongs to it is missing or cannot be read. Nothing was changed.
    ReadOnlyError
        The storage can only be read.
    StorageError
        No certain answer from the storage; nothing is lost, call again.
    """
    upgraded = await _upgraded(repo, dry_run, delete_unused_v1_files, prefetch_concurrency)
    if not dry_run:
        repo._core = cast("Core", _InvalidatedRepository())
    return upgraded


async def _upgraded(repo: R, dry_run: bool, delete_unused_v1_files: bool, prefetch_concurrency: int | None) -> R:
    require_type("repo", repo, Repository)
    require_type("dry_run", dry_run, bool)
    require_type("delete_unused_v1_files", delete_unused_v1_files, bool)
    require_type("prefetch_concurrency", prefetch_concurrency, int, optional=True)
    core = repo._core
    await upgrade(
        core.storage,
        core.sources,
        dry_run=dry_run,
        delete_ref_files=delete_unused_v1_files,
        prefetch=DEFAULT_PREFETCH if prefetch_concurrency is None else prefetch_concurrency,
    )
    return await repo.reopen_async()


upgrade_icechunk_repository: Final = synchronous(upgrade_icechunk_repository_async)
