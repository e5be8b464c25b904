"""Opening and creating repositories of any layout, and finding out which layout a repository has."""

from __future__ import annotations

import logging
from typing import Any, TypeAlias, assert_never

from icechunk.errors import AccessDeniedError, ObjectNotFoundError, RepositoryNotFoundError, StorageError
from icechunk.log.repository.create import create_log, create_ref_files, create_repo_object
from icechunk.log.repository.entries.checkpoint import finish_conversion
from icechunk.log.repository.entries.embedded import EmbeddedInTail
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.entries.reader import Opened, open_head
from icechunk.log.repository.entries.takeover import seal_abandoned
from icechunk.log.repository.objects import (
    MAIN_REF_KEY,
    RepoObject,
    read_repo,
    ref_files_there,
    updates_per_file_of,
)
from icechunk.log.repository.port import Layout, RepositoryLog
from icechunk.log.repository.queue import UpdateRetries
from icechunk.log.repository.ref_files.layout import RefFilesLayout
from icechunk.log.repository.repo_object.layout import RepoObjectLayout
from icechunk.log.repository.store_check import may_write
from icechunk.log.repository.successors import SuccessorsOf
from icechunk.runtime.clock import SYSTEM, Sources
from icechunk.storage.outcome import is_refusal
from icechunk.storage.port import Storage

__all__ = ["create_repository", "detect", "open_repository"]

Json: TypeAlias = Any
_LOG = logging.getLogger(__name__)


async def open_repository(
    storage: Storage,
    sources: Sources = SYSTEM,
    *,
    updates_per_file: int | None = None,
    retries: UpdateRetries | None = None,
) -> RepositoryLog:
    """Find out how the repository is kept, and read it to its head.

    One GET of ``repo``, with a listing of the log at the same time, decides. If another library set ``repo`` of a
    log online, the log is sealed, and the commits that are only in it are reported to the logger.

    Parameters
    ----------
    updates_per_file
        Most entries of the ops log in one ``repo`` object; None: as the persisted configuration says.
    retries
        What to do about lost races for ``repo``; None: as the persisted configuration says.

    Raises
    ------
    RepositoryNotFoundError
        There is none.
    FormatError
        An object that cannot be read.
    AccessDeniedError
        The right to read is missing; or the right to list, without which a missing repository is not recognised.
    """
    try:
        opened = await open_head(storage, sources)
    except RepositoryNotFoundError:
        if not await ref_files_there(storage):
            raise
        return await RefFilesLayout.open(storage, sources)
    except AccessDeniedError as denied:
        if not await _only_ref_files_there(storage, denied):
            raise
        return await RefFilesLayout.open(storage, sources)
    if isinstance(opened, Opened) and opened.head.state.sealed and may_write(storage):
        try:
            await finish_conversion(
                storage,
                sources,
                opened.head,
                embedded=EmbeddedInTail(storage, opened.tail),
                updates_per_file=updates_per_file_of(updates_per_file, opened.head.state.config),
            )
        except StorageError as error:
            # A client that may only read goes on; the next one that may write finishes the conversion.
            if not is_refusal(error):
                raise
            _LOG.warning("the repository is being converted to another layout, which is not finished: %s", error)
        else:
            opened = await open_head(storage, sources)
    if isinstance(opened, Opened):
        return LogLayout(storage, sources, opened, updates_per_file=updates_per_file)
    await _report_abandoned(storage, sources, opened)
    log = RepoObjectLayout(
        storage,
        sources,
        opened,
        successors=SuccessorsOf(storage, sources, updates_per_file),
        updates_per_file=updates_per_file,
        retries=retries,
    )
    await log.complete()
    return log


async def _report_abandoned(storage: Storage, sources: Sources, found: RepoObject) -> None:
    if not may_write(storage):
        return
    try:
        stranded = await seal_abandoned(storage, sources, found)
    except StorageError as error:
        # `repo` is authoritative in any case; the next client that may list and write looks for a log.
        if not (isinstance(error, AccessDeniedError) or is_refusal(error)):
            raise
        _LOG.debug("cannot look whether a log was left behind: %s", error)
        return
    if stranded is not None:
        _LOG.error("%s", stranded.describe(storage.describe()))


async def create_repository(
    storage: Storage,
    layout: Layout,
    sources: Sources = SYSTEM,
    *,
    config: Json | None = None,
    check_clean_root: bool = True,
) -> RepositoryLog:
    """Create a repository of that layout; parameters and errors as `create_log`."""
    match layout:
        case Layout.LOG:
            return await create_log(storage, sources, config=config, check_clean_root=check_clean_root)
        case Layout.REPO:
            return await create_repo_object(storage, sources, config=config, check_clean_root=check_clean_root)
        case Layout.REFS:
            return await create_ref_files(storage, sources, config=config, check_clean_root=check_clean_root)
        case _:
            assert_never(layout)


async def detect(storage: Storage, sources: Sources = SYSTEM) -> Layout | None:
    """The layout of the repository in this place; None if there is none.

    Raises
    ------
    FormatError
        There is a ``repo`` object that is not one.
    StorageError
        The place cannot be read.
    AccessDeniedError
        Neither ``repo`` nor branch ``main`` of format 1 may be read, so it is not known if there is a repository.
    """
    try:
        found = await read_repo(storage, sources)
    except AccessDeniedError as denied:
        if await _only_ref_files_there(storage, denied):
            return Layout.REFS
        raise
    if found is not None:
        return Layout.LOG if found.known.marker is not None and found.known.read_only else Layout.REPO
    return Layout.REFS if await ref_files_there(storage) else None


async def _only_ref_files_there(storage: Storage, denied: AccessDeniedError) -> bool:
    """Whether ``repo``, which could not be read, does not exist: branch ``main`` of format 1, beside it, can be."""
    if not denied.may_be_absent:
        return False
    try:
        await storage.get(MAIN_REF_KEY)
    except (AccessDeniedError, ObjectNotFoundError):
        return False
    return True
