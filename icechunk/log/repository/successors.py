"""The layouts after a repo object: the log that it was converted to, or the refs of an unfinished upgrade."""

from __future__ import annotations

from icechunk.format.repo.repo_info import RepoInfo
from icechunk.log.repository.entries.client import LogView
from icechunk.log.repository.entries.reader import Opened, open_head
from icechunk.log.repository.ref_files.upgrade import as_refs_say
from icechunk.log.repository.repo_object.client import LogReader, Successors
from icechunk.runtime.clock import Sources
from icechunk.storage.port import Storage
from icechunk.transfer.cache import WeightedCache

__all__ = ["SuccessorsOf"]


class SuccessorsOf(Successors):
    """Successors of the repository in one storage. ``updates_per_file`` as of `LogView`."""

    def __init__(self, storage: Storage, sources: Sources, updates_per_file: int | None) -> None:
        self._storage = storage
        self._sources = sources
        self._updates_per_file = updates_per_file

    async def open_log(self, files: WeightedCache[str, bytes]) -> LogReader | None:
        opened = await open_head(self._storage, self._sources)
        if not isinstance(opened, Opened):
            return None
        return LogView(self._storage, self._sources, opened, updates_per_file=self._updates_per_file, files=files)

    async def as_refs_say(self, info: RepoInfo) -> RepoInfo:
        return await as_refs_say(self._storage, self._sources, info)
