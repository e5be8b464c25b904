"""Seeing that a store honours ``If-Match`` before anything depends on it; rule 1 for layouts that replace objects."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import ClassVar, Final

from icechunk.errors import ErrorKind, PreconditionFailedError, StorageError
from icechunk.refs.store_check import ConditionCheck
from icechunk.storage.base import Matches, Storage, Version

__all__ = ["MatchCheck"]

_NO_VERSION: Final = Version("00000000000000000000000000000000")


class MatchCheck(ConditionCheck):
    """That the store honours ``If-Match``: an immutable object cannot have the version that is asked for."""

    _checked: ClassVar[weakref.WeakSet[Storage]] = weakref.WeakSet()

    async def _try(self, candidates: Sequence[str], known: Mapping[str, bytes]) -> None:
        key, data = await self._first_of(candidates, known)
        try:
            await self._storage.put(key, data, Matches(_NO_VERSION))
        except PreconditionFailedError:
            return
        raise StorageError(
            f"{self._storage.describe()} ignores If-Match: {key!r} was replaced although it has another version. "
            "Concurrent changes of the repository would overwrite each other there; nothing was changed. Use a "
            "store with conditional writes, or the log layout, which does without this one",
            ErrorKind.STORAGE_CONFIG,
        )
