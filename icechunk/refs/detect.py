"""Which layout is this?"""

from __future__ import annotations

from icechunk.format.keys import REFS_PREFIX
from icechunk.refs.base import Layout
from icechunk.refs.log_reader import read_repo
from icechunk.sources import SYSTEM, Sources
from icechunk.storage.base import Storage

__all__ = ["detect", "exists", "has_ref_files"]


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
    return Layout.REFS if await has_ref_files(storage) else None


async def has_ref_files(storage: Storage) -> bool:
    """Whether there are branches or tags of format 1 in this place."""
    pages = storage.list_pages(REFS_PREFIX, page_size=1)
    try:
        async for page in pages:
            if page:
                return True
    finally:
        aclose = getattr(pages, "aclose", None)
        if aclose is not None:
            await aclose()
    return False


async def exists(storage: Storage, sources: Sources = SYSTEM) -> bool:
    """Whether there is a repository of any layout in this place. Errors as `detect`."""
    return await detect(storage, sources) is not None
