"""Checks of a storage before anything depends on it: it may be written to, and it honours conditions (rule 1).

`StoreCheck` tries ``If-None-Match`` on an object that exists, `MatchCheck` tries ``If-Match`` with a version that no
object has. Both write the object's own bytes, so a store that ignores the condition changes nothing.
"""

from __future__ import annotations

import asyncio
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import ClassVar, Final

from icechunk.errors import ErrorKind, PreconditionFailedError, ReadOnlyError, StorageError
from icechunk.log.repository.marker import NO_FILES
from icechunk.storage.port import Absent, Matches, Storage, Version

__all__ = ["ConditionCheck", "MatchCheck", "StoreCheck", "may_write", "require_atomic", "require_writable"]


def may_write(storage: Storage) -> bool:
    """Whether a storage takes writes, and conditional ones."""
    return storage.supports_writes and {Absent, Matches} <= storage.atomic_preconditions


def require_writable(storage: Storage, what: str) -> None:
    """Refuse to do something, such as to "create a repository", where the place can only be read.

    Raises
    ------
    ReadOnlyError
        Kind ``read-only-storage``.
    """
    if not storage.supports_writes:
        raise ReadOnlyError(f"cannot {what}: {storage.describe()} can only be read", ErrorKind.READ_ONLY_STORAGE)


def require_atomic(storage: Storage) -> None:
    """Refuse to write where the storage is set to do without conditional writes.

    Raises
    ------
    StorageError
        Kind ``storage-config``.
    """
    if {Absent, Matches} <= storage.atomic_preconditions:
        return
    raise StorageError(
        f"cannot write to the repository in {storage.describe()}: its settings turn conditional writes off "
        "(unsafe_use_conditional_create or unsafe_use_conditional_update is False), so two commits at the same time "
        "would overwrite each other. Leave these settings out; reading works with them",
        ErrorKind.STORAGE_CONFIG,
    )


class ConditionCheck(ABC):
    """One check of one storage, shared by all that wait for it. Belongs to one event loop."""

    _checked: ClassVar[weakref.WeakSet[Storage]]
    """Places that were seen to honour the condition, by this process."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._done = False
        self._lock = asyncio.Lock()

    async def run(self, candidates: Sequence[str], known: Mapping[str, bytes] = NO_FILES) -> None:
        """Write an existing object's own bytes to it, under a condition by which the store must refuse.

        Parameters
        ----------
        candidates
            Keys of immutable objects; the first one that exists is used.
        known
            Immutable objects whose bytes are known: one of them saves reading another.

        Raises
        ------
        StorageError
            The store took the write, or is set to do without conditions (kind ``storage-config``), or gives no answer.
        """
        require_atomic(self._storage)
        async with self._lock:
            if self.done:
                return
            await self._try(candidates, known)
            self._done = True
            with suppress(TypeError):
                self._checked.add(self._storage)

    @abstractmethod
    async def _try(self, candidates: Sequence[str], known: Mapping[str, bytes]) -> None:
        """Make the write; return if the store refused it, raise if it took it."""

    @property
    def done(self) -> bool:
        """Whether the storage was seen to honour the condition."""
        return self._done or self._known_good()

    def _known_good(self) -> bool:
        try:
            return self._storage in self._checked
        except TypeError:  # unhashable: then each instance looks for itself
            return False

    async def _first_of(self, candidates: Sequence[str], known: Mapping[str, bytes]) -> tuple[str, bytes]:
        if known:
            return next(iter(known.items()))
        for key in candidates[:-1]:
            try:
                return key, (await self._storage.get(key)).data
            except StorageError:
                continue
        return candidates[-1], (await self._storage.get(candidates[-1])).data


class StoreCheck(ConditionCheck):
    """The check that the store honours ``If-None-Match: *``."""

    _checked: ClassVar[weakref.WeakSet[Storage]] = weakref.WeakSet()

    async def _try(self, candidates: Sequence[str], known: Mapping[str, bytes]) -> None:
        for _ in range(3):
            key, data = await self._first_of(candidates, known)
            try:
                await self._storage.put(key, data, Absent())
            except PreconditionFailedError:
                return
            # Deleted between the two requests, perhaps: now it is there for certain, with the same bytes.
        raise StorageError(
            f"{self._storage.describe()} ignores If-None-Match: {key!r} exists, and was written again. Concurrent "
            "commits would overwrite each other there; nothing is committed. Use a store with conditional writes",
            ErrorKind.STORAGE_CONFIG,
        )


_NO_VERSION: Final = Version("00000000000000000000000000000000")


class MatchCheck(ConditionCheck):
    """The check that the store honours ``If-Match``: no immutable object has the version that is asked for."""

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
