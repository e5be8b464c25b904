"""Seeing that a store honours ``If-Match`` before anything depends on it; rule 1 for layouts that replace objects."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from icechunk.errors import ErrorKind, PreconditionFailedError, StorageError
from icechunk.refs.store_check import require_atomic
from icechunk.storage.base import Matches, Storage, Version

__all__ = ["MatchCheck"]

_NO_VERSION: Final = Version("00000000000000000000000000000000")

# Places that were seen to honour it, by this process.
_checked: weakref.WeakSet[Storage] = weakref.WeakSet()


class MatchCheck:
    """One check of one storage, shared by whoever waits for it. Belongs to one event loop."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._done = False
        self._lock = asyncio.Lock()

    async def run(self, candidates: Sequence[str]) -> None:
        """Replace an immutable object by its own bytes, if it has a version that it cannot have.

        Parameters
        ----------
        candidates
            Keys of immutable objects; the first one that exists is used.

        Raises
        ------
        StorageError
            The store took the write, or is set to do without conditions (kind ``storage-config``), or gives no answer.
        """
        require_atomic(self._storage)
        async with self._lock:
            if self._done or self._known_good():
                return
            key, data = await self._first_of(candidates)
            try:
                await self._storage.put(key, data, Matches(_NO_VERSION))
            except PreconditionFailedError:
                self._done = True
                with suppress(TypeError):
                    _checked.add(self._storage)
                return
            raise StorageError(
                f"{self._storage.describe()} ignores If-Match: {key!r} was replaced although it has another version. "
                "Concurrent changes of the repository would overwrite each other there; nothing was changed. Use a "
                "store with conditional writes, or the log layout, which does without this one",
                ErrorKind.STORAGE_CONFIG,
            )

    def _known_good(self) -> bool:
        try:
            return self._storage in _checked
        except TypeError:  # unhashable: then each instance looks for itself
            return False

    async def _first_of(self, candidates: Sequence[str]) -> tuple[str, bytes]:
        for key in candidates[:-1]:
            try:
                return key, (await self._storage.get(key)).data
            except StorageError:
                continue
        return candidates[-1], (await self._storage.get(candidates[-1])).data
