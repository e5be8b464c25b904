"""The port to object storage: few verbs, and preconditions that are values.

A `Storage` is a picklable description of a place (a bucket and prefix, a folder, a dictionary), and the
verbs on it. Whatever belongs to an event loop (clients, locks) is made lazily for each loop, closed with
it, and never touched after a fork. Keys are relative to the root prefix, ``/``-separated, and never leave it.

What the engine demands of every adapter: a GET after an acknowledged PUT sees it; `Absent` and `Matches`
are atomic per key; an object is whole or absent, also after a crash; ``modified_us`` and ``date_us`` come from
one clock, within minutes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NewType, TypeAlias

from icechunk.errors import StorageError
from icechunk.storage.facade import StorageFacade

__all__ = [
    "ANY",
    "Absent",
    "ByteRange",
    "DeleteResult",
    "GetResult",
    "ListingUnsupportedError",
    "Matches",
    "ObjectInfo",
    "Octets",
    "Precondition",
    "PutResult",
    "Range",
    "Storage",
    "Suffix",
    "Unchecked",
    "Version",
]

Version = NewType("Version", str)
"""Opaque version of an object (an ETag, without quotes where the store quotes it); equal versions have equal bytes."""


@dataclass(frozen=True, slots=True)
class Absent:
    """The PUT succeeds only where no object exists at the key (``If-None-Match: *``)."""


@dataclass(frozen=True, slots=True)
class Matches:
    """The PUT succeeds only where the object's version is still this one (``If-Match``)."""

    version: Version


@dataclass(frozen=True, slots=True)
class Unchecked:
    """The PUT succeeds whatever is at the key."""


Precondition: TypeAlias = Absent | Matches | Unchecked
ANY = Unchecked()


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes ``start`` (inclusive) to ``end`` (exclusive); an end beyond the object is clamped to its size."""

    start: int
    end: int | None = None
    """None: to the end of the object."""


@dataclass(frozen=True, slots=True)
class Suffix:
    """The last ``length`` bytes; the whole object where it is shorter."""

    length: int


ByteRange: TypeAlias = Range | Suffix | None
Octets: TypeAlias = bytes | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """What a listing or HEAD says of an object."""

    key: str
    """Relative to the root prefix."""
    size: int
    """Bytes."""
    version: Version
    modified_us: int
    """Last-Modified by the store's clock, µs since the epoch (whole seconds on most stores)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GetResult:
    """The bytes asked for, and what the store said with them."""

    body: Octets
    """Exactly the bytes of the (clamped) range. Large ones may be a view of memory that nobody changes any more."""
    size: int
    """Bytes of the whole object."""
    version: Version
    modified_us: int
    date_us: int | None
    """The store's clock when it answered (its ``Date`` header), µs; None where the store does not say."""

    @property
    def data(self) -> bytes:
        """The same as `body`, as bytes: a copy where that is a view."""
        return bytes(self.body)


@dataclass(frozen=True, slots=True, kw_only=True)
class PutResult:
    """Answer to a PUT that landed."""

    version: Version
    date_us: int | None
    """As in `GetResult`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteResult:
    """Answer to a deletion of many objects."""

    deleted: int
    """Objects that do not exist any more (one that did not exist before counts)."""
    failures: tuple[tuple[str, str], ...] = ()
    """Key and reason of each that may still exist."""


class ListingUnsupportedError(StorageError):
    """The place cannot be listed, as web servers cannot; objects whose keys are known can still be read."""


ObjectKind: TypeAlias = Literal["metadata", "chunk"]


class Storage(StorageFacade, ABC):
    """A place that holds a repository, and the verbs on it. Picklable; safe to use from several loops and threads.

    All verbs raise `StorageError` (with the key, and what to do) once bounded retries are used up.
    Cancellation of any verb leaves no task and no half-read connection behind.
    """

    @abstractmethod
    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        """Read an object, or a range of it.

        Raises
        ------
        ObjectNotFoundError
            Nothing at this key.
        InvalidInputError
            A range that starts at or beyond the end of the object (kind ``invalid-byte-range``).
        """

    @abstractmethod
    async def put(
        self,
        key: str,
        data: bytes | bytearray | memoryview,
        precondition: Precondition = ANY,
        *,
        kind: ObjectKind = "metadata",
        metadata: Mapping[str, str] | None = None,
    ) -> PutResult:
        """Write a whole object atomically and durably.

        Parameters
        ----------
        kind
            Chooses the storage class, where the settings distinguish them.
        metadata
            User metadata to keep with the object, where the store has such a thing.

        Raises
        ------
        PreconditionFailedError
            Refused for certain: not by this call nor by a hidden retry of it did the bytes land.
        StorageError
            No certain answer (or a refusal that retrying cannot mend). With a precondition the write
            **may have landed, or may land later**: read back before believing either.
        """

    @abstractmethod
    async def head(self, key: str) -> ObjectInfo:
        """Say what is at a key, without its bytes. Raises `ObjectNotFoundError` where nothing is."""

    @abstractmethod
    def list_pages(
        self, prefix: str = "", *, start_after: str | None = None, page_size: int = 1000
    ) -> AsyncIterator[list[ObjectInfo]]:
        """List objects whose key starts with ``prefix`` (a plain string prefix), ascending by key bytes, page by page.

        A caller that stops early pays only for the pages it took. ``start_after`` is exclusive.

        Raises
        ------
        ListingUnsupportedError
            The place has no listings; the only verb that some places lack beside those that write.
        """

    @abstractmethod
    async def delete(self, keys: Iterable[str]) -> DeleteResult:
        """Delete objects; keys that do not exist are fine. One key's failure does not stop the others."""

    @abstractmethod
    async def copy(self, source: str, target: str) -> PutResult:
        """Copy an object within the storage, replacing what is at ``target``. Raises `ObjectNotFoundError`."""

    @abstractmethod
    async def aclose(self) -> None:
        """Close what this storage has open in the running loop. It opens again when used again."""

    @property
    @abstractmethod
    def supports_writes(self) -> bool:
        """False where the place can only be read."""

    @property
    def atomic_preconditions(self) -> frozenset[type[Precondition]]:
        """Preconditions that hold at the very moment of the write, not only shortly before; all, unless said otherwise.

        A storage may be set to replace one by a look before the write, for a service that does not know it.
        """
        return frozenset((Absent, Matches, Unchecked))

    @property
    def clock_resolution_us(self) -> int:
        """Steps in which ``modified_us`` tells the time, µs, rounded down."""
        return 1_000_000

    @property
    def lists_any_prefix_fast(self) -> bool:
        """Whether a listing of part of a folder, by the beginning of names, costs no more than what it returns."""
        return True

    @property
    def lists_first_keys_fast(self) -> bool:
        """Whether the first page of a listing costs the same however many keys come after it."""
        return True

    @property
    def gains_from_split_reads(self) -> bool:
        """Whether parts of one object that are read at the same time can come sooner than the whole."""
        return True

    @abstractmethod
    def describe(self) -> str:
        """Where this is, for error messages (``s3://bucket/prefix``); no secrets."""
