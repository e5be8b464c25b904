"""Conditional writes of the repository log's objects, each sent until its outcome is certain (rules 1 to 3).

`icechunk.storage.outcome.follow` is the loop: send, look, send the same bytes again. Changes for which callers wait in
a queue are in `icechunk.log.repository.settle`. The others are single writes: an object that is created
(`create_object`), an object that is replaced (`replace_object`), and ``repo``, replaced by something that is made of it
(`replace_repo`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Final, Generic, TypeVar

from icechunk.errors import ObjectNotFoundError, PreconditionFailedError, StorageError
from icechunk.format.keys import REPO_KEY
from icechunk.format.repo.codec import EncodedRepo
from icechunk.format.repo.repo_info import RepoInfo
from icechunk.log.repository.objects import Known, RepoObject, read_repo
from icechunk.runtime.clock import Sources
from icechunk.storage.outcome import Fate, Sending, backoff_s, certain, follow, is_refusal
from icechunk.storage.port import Absent, GetResult, Matches, Precondition, PutResult, Storage, Version

__all__ = ["RepoChange", "create_object", "replace_object", "replace_repo"]

_VERSIONS: Final = 20
"""Most versions of ``repo`` that one change is tried on."""

T = TypeVar("T")


class _ObjectWrite(Sending):
    """A write of one object, recognised by its bytes."""

    def __init__(self, storage: Storage, sources: Sources, key: str, data: bytes, precondition: Precondition) -> None:
        super().__init__(sources)
        self._storage = storage
        self._key = key
        self._data = data
        self._precondition = precondition
        self.answer: PutResult | None = None
        """The answer of the store that it landed; None where there was none."""
        self.found: GetResult | None = None
        """The object as it was last looked at; None: there was none, or it was not looked at."""

    async def put(self) -> bool:
        try:
            self.answer = await self._storage.put(self._key, self._data, self._precondition)
        except PreconditionFailedError:
            return False
        except ObjectNotFoundError:
            if isinstance(self._precondition, Absent):
                raise
            return False
        return True

    async def fate(self, may_land: bool) -> Fate:
        try:
            self.found = await self._storage.get(self._key)
        except ObjectNotFoundError:
            self.found = None
            return Fate.OPEN if isinstance(self._precondition, Absent) else Fate.LOST
        if self.found.data == self._data:
            return Fate.LANDED
        if isinstance(self._precondition, Matches):
            if self.found.version == self._precondition.version:
                return Fate.OPEN
            return Fate.UNDECIDED if may_land else Fate.LOST
        return Fate.LOST


async def create_object(storage: Storage, sources: Sources, key: str, data: bytes, unsure: StorageError) -> bytes:
    """Create an object where there is none, and return the bytes that are there: the given ones, or another client's.

    Parameters
    ----------
    unsure
        To be raised where the store gives no certain answer.

    Raises
    ------
    StorageError
        Refused for certain, in the store's own words; or ``unsure``.
    """
    write = _ObjectWrite(storage, sources, key, data, Absent())
    if certain(await follow(write), unsure) or write.found is None:
        return data
    return write.found.data


async def replace_object(
    storage: Storage, sources: Sources, key: str, data: bytes, base: Version, unsure: StorageError
) -> Version | None:
    """Replace one version of an object.

    Returns
    -------
    Version or None
        The new version. None: the object is gone, or has another version, which was perhaps made of this one.

    Raises
    ------
    StorageError
        As `create_object`.
    """
    write = _ObjectWrite(storage, sources, key, data, Matches(base))
    if not certain(await follow(write), unsure):
        return None
    return write.answer.version if write.answer is not None else write.found.version if write.found else None


# --------------------------------------------------------------------- the object `repo`


class RepoChange(ABC, Generic[T]):
    """A change of ``repo``, made from its contents, and made anew where another version came first (rule 7).

    The new object contains everything that the old one says, and replaces exactly that version.
    """

    def __init__(self, storage: Storage, sources: Sources) -> None:
        self.storage = storage
        self.sources = sources
        self.why: Exception | None = None
        """The last error because of which `make` returned None."""

    @abstractmethod
    async def result(self, known: Known, info: RepoInfo | None) -> T | None:
        """The result where ``repo``, as it is now, needs no change; None: it does.

        Parameters
        ----------
        info
            Its contents; None where they were not read.
        """

    @abstractmethod
    async def make(self, known: Known, info: RepoInfo | None) -> EncodedRepo | None:
        """The new object, once everything exists that must exist before; None: look again, ``repo`` has changed."""

    async def put(self, encoded: EncodedRepo, base: Version) -> PutResult | None:
        """Make one request; None: ``repo`` does not have that version. Errors as `Storage.put`."""
        try:
            return await self.storage.put(REPO_KEY, encoded.data, Matches(base))
        except (PreconditionFailedError, ObjectNotFoundError):
            return None

    @abstractmethod
    async def landed(self, known: Known, encoded: EncodedRepo, put: PutResult) -> T:
        """The result where ``known`` was replaced by the new object."""

    @abstractmethod
    def gone(self) -> T:
        """The result where there is no ``repo``; or raises."""

    @abstractmethod
    def unsure(self) -> StorageError:
        """The error where the store gives no certain answer."""


class _Replacement(Sending, Generic[T]):
    """One replacement of one version of ``repo``."""

    def __init__(self, change: RepoChange[T], encoded: EncodedRepo, base: Version) -> None:
        super().__init__(change.sources)
        self._change = change
        self._encoded = encoded
        self._base = base
        self.answer: PutResult | None = None
        self.looked = False
        """Whether ``found`` is known."""
        self.found: RepoObject | None = None

    async def put(self) -> bool:
        self.answer = await self._change.put(self._encoded, self._base)
        return self.answer is not None

    async def fate(self, may_land: bool) -> Fate:
        self.found = await read_repo(self._change.storage, self._change.sources)
        self.looked = True
        if self.found is not None and self.found.known.version == self._base:
            return Fate.OPEN
        # Whether by this write or by another: `RepoChange.result` says if there is anything left to do.
        return Fate.LOST


async def replace_repo(change: RepoChange[T], known: Known | None = None) -> T:
    """Replace ``repo`` as a change says, unless there is nothing to do (any more).

    Parameters
    ----------
    known
        The object as it was last seen; it is read again where that is not its version any more. None: it is read first.

    Raises
    ------
    StorageError
        Refused for certain, in the store's own words; or `RepoChange.unsure`.
    """
    storage, sources = change.storage, change.sources
    info: RepoInfo | None = None
    why: Exception | None = None
    for attempt in range(_VERSIONS):
        if attempt > 1:
            await sources.sleep(backoff_s(sources, attempt - 1))
        if known is None:
            try:
                found = await read_repo(storage, sources)
            except StorageError as error:
                if is_refusal(error):
                    raise
                why = error
                continue
            if found is None:
                return change.gone()
            known, info = found.known, found.info
        result = await change.result(known, info)
        if result is not None:
            return result
        if known.copy is not None:
            # A power failure has torn the object: it is mended before it is replaced.
            version = await replace_object(storage, sources, REPO_KEY, known.copy, known.version, change.unsure())
            known = None if version is None else replace(known, version=version, copy=None)
        encoded = None if known is None else await change.make(known, info)
        if known is None or encoded is None:
            known, why = None, change.why
            continue
        write = _Replacement(change, encoded, known.version)
        if certain(await follow(write), change.unsure()):
            assert write.answer is not None
            return await change.landed(known, encoded, write.answer)
        if write.found is None:
            return change.gone()
        known, info = write.found.known, write.found.info
    raise change.unsure() from why
