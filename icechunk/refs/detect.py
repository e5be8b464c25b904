"""Which layout is this?"""

from __future__ import annotations

from icechunk.refs.base import Layout
from icechunk.refs.log_reader import read_repo, ref_files_there
from icechunk.sources import SYSTEM, Sources
from icechunk.storage.base import Storage

__all__ = ["detect", "exists"]


async def detect(storage: Storage, sources: Sources = SYSTEM) -> Layout | None:
    """How the repository in this place is kept; None where there is none.

    Raises
    ------
    FormatError
        There is a ``repo`` object that is not one.
    StorageError
        The place cannot be read.
    """
    found = await read_repo(storage, sources)
    if found is not None:
        return Layout.LOG if found.known.marker is not None and found.known.read_only else Layout.REPO
    return Layout.REFS if await ref_files_there(storage) else None


async def exists(storage: Storage, sources: Sources = SYSTEM) -> bool:
    """Whether there is a repository of any layout in this place. Errors as `detect`."""
    return await detect(storage, sources) is not None
