"""The port to object storage: few verbs, and preconditions that are values.

A `Storage` is a picklable description of a place (a bucket and prefix, a folder, a dictionary), and the
verbs on it. Whatever belongs to an event loop (clients, locks) is made lazily for each loop, closed with
it, and never touched after a fork. Keys are relative to the root prefix, ``/``-separated, and never leave it.

What the engine demands of every adapter: a GET after an acknowledged PUT sees it; `Absent` and `Matches`
are atomic per key; an object is whole or absent, also after a crash; ``modified_us`` and ``date_us`` come from
one clock, within minutes.

Which keys and byte ranges are well formed is decided here, the same for every adapter. The port imports no adapter:
the storages of ``Storage.new_*`` are made by `icechunk.storage.constructors`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Literal, NamedTuple, NewType, Protocol, TypeAlias

from icechunk.config import StorageSettings
from icechunk.errors import (
    AccessDeniedError,
    ErrorKind,
    InvalidInputError,
    ObjectNotFoundError,
    PreconditionFailedError,
    ReadOnlyError,
    StorageError,
)
from icechunk.runtime.clock import moment
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.representation import Described, fields_html
from icechunk.runtime.tasks import run_each
from icechunk.runtime.twins import run_sync
from icechunk.storage.class_methods import Constructors

__all__ = [
    "ANY",
    "MAX_KEY_BYTES",
    "NO_LISTING",
    "Absent",
    "ByteRange",
    "DeleteResult",
    "Following",
    "GetResult",
    "ListingUnsupportedError",
    "Matches",
    "ObjectInfo",
    "Octets",
    "Precondition",
    "Put",
    "PutResult",
    "Range",
    "ReadOnlyStorage",
    "Sender",
    "Storage",
    "StorageObjectInfo",
    "Suffix",
    "Unchecked",
    "Version",
    "check_key",
    "check_range",
    "clip",
    "resolve_range",
]

_GETS_AT_ONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True, order=True, repr=False)
class StorageObjectInfo(Described):
    """An object that `Storage.list_objects_metadata` found."""

    key: str
    """Key relative to the listed prefix."""
    size_bytes: int
    """Size of the object."""
    created_at: datetime
    """Last-Modified by the store's clock, UTC."""


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
    """The PUT succeeds with any object, or none, at the key."""


Precondition: TypeAlias = Absent | Matches | Unchecked
ANY = Unchecked()


class Sender(Protocol):
    """The sender of a request, which may have to stop sending it."""

    @property
    def is_told(self) -> bool:
        """Whether a caller has been notified about the outcome, so that the request must not be sent again."""


class Put(NamedTuple):
    """One object for `Storage.put_unsynced`."""

    key: str
    data: bytes | memoryview
    precondition: Precondition = ANY
    bulk: bool = False
    """Whether it is one of many large objects, of which most are not read soon: caches may leave it out."""


class Following(Protocol):
    """Objects to be written behind another one (`Storage.put_before`)."""

    @property
    def puts(self) -> Sequence[Put]:
        """The objects; none before `make` has returned, and none where they are not to be written."""

    def make(self) -> None:
        """Make the objects: called by the event loop, at most once, while the medium is waited for. Raises nothing."""


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes ``start`` (inclusive) to ``end`` (exclusive); an end beyond the object is clamped to its size."""

    start: int
    end: int | None = None
    """First byte after the range; None: the range goes to the end of the object."""


@dataclass(frozen=True, slots=True)
class Suffix:
    """The last ``length`` bytes; the whole object where it is shorter."""

    length: int


ByteRange: TypeAlias = Range | Suffix | None
Octets: TypeAlias = bytes | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """An object as a listing or a HEAD describes it."""

    key: str
    """Key relative to the root prefix."""
    size: int
    """Bytes of the object."""
    version: Version
    modified_us: int
    """Last-Modified by the store's clock, µs since the epoch (whole seconds on most stores)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GetResult:
    """The requested bytes, with the version and times that the store sent."""

    body: Octets
    """Exactly the bytes of the (clamped) range. Large ones may be a view of memory that does not change any more."""
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
    """Store time, µs, as in `GetResult`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteResult:
    """Answer to a deletion of many objects."""

    deleted: int
    """Objects that do not exist any more (one that did not exist before counts)."""
    failures: tuple[tuple[str, str], ...] = ()
    """Key and reason of each that may still exist."""
    refused: bool = False
    """Whether all of these still exist for certain, since the storage refused to delete them."""


class ListingUnsupportedError(StorageError):
    """The place cannot be listed, as web servers cannot; objects whose keys are known can still be read."""


NO_LISTING = (ListingUnsupportedError, AccessDeniedError)
"""Errors of a listing after which the same thing may be found out by reading keys that are known."""

ObjectKind: TypeAlias = Literal["metadata", "chunk"]


class Storage(Constructors["Storage"], ABC):
    """A place that holds a repository, and the verbs on it. Picklable; safe to use from several loops and threads.

    All verbs raise `StorageError` (with the key and the remedy) once bounded retries are used up.
    Cancellation of any verb leaves no task and no half-read connection behind.
    """

    @abstractmethod
    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        """Read an object, or a range of it.

        Raises
        ------
        ObjectNotFoundError
            Nothing at this key.
        AccessDeniedError
            Not allowed; or, if its ``may_be_absent`` says so, perhaps nothing at this key.
        InvalidInputError
            A range that starts at or beyond the end of the object (kind ``invalid-byte-range``).
        """

    async def get_all(self, keys: Sequence[str]) -> list[GetResult | None]:
        """Several whole objects, read at the same time; None for those that do not exist. Other errors as `get`."""
        found: dict[str, GetResult] = {}

        async def read(key: str) -> None:
            with suppress(ObjectNotFoundError):
                found[key] = await self.get(key)

        await run_each(read, keys, limit=_GETS_AT_ONCE)
        return [found.get(key) for key in keys]

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
            No certain answer: with a precondition the write **may have landed, or may land later**; read back before
            believing either. Unless the error is ``refused`` or ``unsent``, which says for certain that it did not.
        """

    async def put_unsynced(self, puts: Sequence[Put]) -> list[PutResult | None]:
        """Write whole objects, one after another, that need not be durable before `sync` has returned.

        Where `defers_syncs`, such an object may be absent, torn, or as it was before, after a power failure. If it
        demands `Absent`, and its name is taken by an object with other bytes, as a power failure may leave one, that is
        replaced: names of objects that are written so determine their bytes.

        Returns
        -------
        list[PutResult or None]
            For each object; None where its condition did not hold.

        Raises
        ------
        StorageError
            As from `put`; objects after the one that it names were not written.
        """
        answers: list[PutResult | None] = []
        for put in puts:
            try:
                answers.append(await self.put(put.key, put.data, put.precondition))
            except PreconditionFailedError:
                answers.append(None)
        return answers

    async def put_after(self, keys: Collection[str], put: Put) -> PutResult:
        """Write an object, as `put`, that appears once others are durable, which `put_unsynced` has written.

        Where `defers_syncs`, this waits for the medium less often than `sync` and `put` do if the others are few.

        Raises
        ------
        StorageError
            As from `put` and `sync`. If it is about the others, nothing appeared, and it is marked ``refused`` and
            ``lost``.
        """
        try:
            await self.barrier(keys)
        except StorageError as error:
            error.refused = error.lost = True
            raise
        return await self.put(put.key, put.data, put.precondition)

    async def put_before(
        self, put: Put, following: Following, after: Collection[str] = ()
    ) -> tuple[PutResult, list[PutResult | None]]:
        """Write an object, as `put`; once it is there and durable, write others behind it, as `put_unsynced`.

        Where `defers_syncs`, the others are made while the medium is waited for.

        Parameters
        ----------
        after
            Keys of objects, written by `put_unsynced`, that are durable before this one appears, as from `put_after`.

        Returns
        -------
        PutResult, list[PutResult or None]
            The second as from `put_unsynced`; empty if it is not known that the others were written.

        Raises
        ------
        StorageError
            As from `put_after`; then none of the others was written. Errors of the others are not raised.
        """
        return await self.put_after(after, put), []

    async def barrier(self, keys: Iterable[str]) -> None:
        """Return once these objects, written by `put_unsynced`, are durable before any that `put` writes afterwards.

        Where `defers_syncs`, this may not wait for the medium, since the `put` does for all. Else as `sync`.

        Raises
        ------
        StorageError
            As from `sync`.
        """
        await self.sync(keys)

    async def sync(self, keys: Iterable[str]) -> None:
        """Return once these objects, written by `put_unsynced`, are durable.

        Raises
        ------
        StorageError
            Some may not be; their bytes may be lost, and another call does not bring them back.
        """

    @abstractmethod
    async def head(self, key: str) -> ObjectInfo:
        """Size, version and time of the object at a key, without its bytes. Raises `ObjectNotFoundError`."""

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
        AccessDeniedError
            Not allowed.
        """

    @abstractmethod
    async def delete(self, keys: Iterable[str]) -> DeleteResult:
        """Delete objects; keys that do not exist are fine. One key's failure does not stop the others."""

    @abstractmethod
    async def copy(self, source: str, target: str) -> PutResult:
        """Copy an object within the storage, replacing the one at ``target``. Raises `ObjectNotFoundError`."""

    async def prepare(self, folders: Iterable[str]) -> None:
        """Make the place ready for a repository that is about to be created here.

        Whatever this storage knew of the place does not count any more, so one whose folder was removed can be used
        again. Stores without folders need nothing.

        Parameters
        ----------
        folders
            Beginnings of keys, without the final ``/``, that the repository will use.

        Raises
        ------
        StorageError
            The place cannot be made.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Close the storage's connections in the running loop. It opens again when used again."""

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
    def defers_syncs(self) -> bool:
        """Whether `put_unsynced` returns before its objects are durable, in much less time than `put`."""
        return False

    @property
    def batches_reads(self) -> bool:
        """Whether `get_all` takes much less time than a `get` of each object, all at once."""
        return False

    @property
    def clock_resolution_us(self) -> int:
        """Resolution of ``modified_us``, which is rounded down, µs."""
        return 1_000_000

    @property
    def lists_any_prefix_fast(self) -> bool:
        """Whether a listing of part of a folder, by the beginning of names, costs in proportion to its results."""
        return True

    @property
    def lists_first_keys_fast(self) -> bool:
        """Whether the first page of a listing costs the same however many keys come after it."""
        return True

    @property
    def gains_from_split_reads(self) -> bool:
        """Whether parts of one object that are read at the same time can come sooner than the whole."""
        return True

    def get_at_once(self, key: str, *, unsynced: bool = False) -> GetResult | None:
        """As `get` of a whole small object, if its bytes can be had without any wait, also for a medium.

        None if they cannot: `get` reads it, or raises the reason. With ``unsynced``, also an object that a power
        failure may replace by the one before it: for callers that show nothing of it that is not durable elsewhere.
        """
        return None

    @property
    def reads_nowait(self) -> bool:
        """Whether `read_nowait` answers: bytes come sooner than another thread could fetch them."""
        return False

    def read_nowait(self, key: str, start: int, end: int) -> Octets | None:
        """Bytes ``start`` to ``end`` of an object, read in the thread that calls; fewer where it ends before.

        None if it cannot be read so: `get` raises the reason, or reads it.
        """
        return None

    @property
    def endpoint_url(self) -> str | None:
        """URL of the service that the caller named; None where the kind of storage says which it is."""
        return None

    @abstractmethod
    def describe(self) -> str:
        """The location, for error messages (``s3://bucket/prefix``); no secrets."""

    # -- the public class --------------------------------------------------------------------------------------------

    def default_settings(self) -> StorageSettings:
        """Settings that this kind of storage uses where the configuration gives none."""
        return StorageSettings()

    def with_settings(self, settings: StorageSettings | None) -> Storage:
        """The same place under other settings; shares the clients and caches of this one.

        Storages without settings of their own (memory, local file systems) return themselves.
        """
        return self

    def with_user_agent(self, user_agent: str) -> Storage:
        """The same place, whose requests name themselves so; storages that send no such header return themselves."""
        return self

    def for_sender(self, sender: Sender) -> Storage:
        """The same place, where no request is tried again once its sender is told; else as `with_settings`.

        Storages that make one try anyway return themselves.
        """
        return self

    async def list_objects_metadata_async(
        self,
        settings: StorageSettings | None = None,
        prefix: str | None = None,
    ) -> list[StorageObjectInfo]:
        """Every object below the folder ``prefix``, with keys relative to that folder, ascending.

        Parameters
        ----------
        settings
            Used for this listing instead of the storage's own.
        prefix
            A folder, with or without its final ``/``; None for all objects of the storage.
        """
        folder = prefix.rstrip("/") + "/" if prefix and prefix.rstrip("/") else ""
        storage = self if settings is None else self.with_settings(settings)
        return [
            StorageObjectInfo(
                key=info.key[len(folder) :],
                size_bytes=info.size,
                created_at=moment(info.modified_us),
            )
            async for page in storage.list_pages(folder)
            for info in page
        ]

    def list_objects_metadata(
        self,
        settings: StorageSettings | None = None,
        prefix: str | None = None,
    ) -> list[StorageObjectInfo]:
        """Synchronous twin of `list_objects_metadata_async`."""
        return run_sync(self.list_objects_metadata_async(settings, prefix))

    async def list_objects_async(
        self,
        settings: StorageSettings | None = None,
        prefix: str | None = None,
    ) -> list[tuple[str, int]]:
        """Key (relative to the folder ``prefix``) and size in bytes of every object below it, ascending."""
        return [(info.key, info.size_bytes) for info in await self.list_objects_metadata_async(settings, prefix)]

    def list_objects(
        self,
        settings: StorageSettings | None = None,
        prefix: str | None = None,
    ) -> list[tuple[str, int]]:
        """Synchronous twin of `list_objects_async`."""
        return run_sync(self.list_objects_async(settings, prefix))

    def _repr_html_(self) -> str:
        title, *lines = repr(self).splitlines()
        rows = [line.partition(": ") for line in lines]
        return fields_html(title.strip("<>"), [(name, value) for name, _, value in rows])


MAX_KEY_BYTES = 1024
"""Longest key in UTF-8, as in S3; the root prefix counts too where the store is S3."""

# Nearly every key of the engine; others are checked below, which takes longer.
_ORDINARY = re.compile(r"[A-Za-z0-9_=+-][A-Za-z0-9_.=+-]*(?:/[A-Za-z0-9_=+-][A-Za-z0-9_.=+-]*)*")


def check_key(key: str) -> None:
    """Refuse a key that could leave the root prefix, or that some back end could not hold.

    Raises
    ------
    InvalidInputError
        Empty, absolute, with empty, ``.`` or ``..`` segments, NUL, not encodable as UTF-8, or longer than
        `MAX_KEY_BYTES`.
    """
    if len(key) <= 255 and _ORDINARY.fullmatch(key):
        return
    reason = _why_bad(key)
    if reason is not None:
        raise InvalidInputError(f"bad storage key {key!r}: {reason}", ErrorKind.INVALID_KEY)


def _why_bad(key: str) -> str | None:
    if not key:
        return "it is empty"
    if "\0" in key:
        return "it contains a NUL character"
    try:
        encoded = key.encode("utf-8")
    except UnicodeEncodeError:
        return "it cannot be encoded as UTF-8"
    if len(encoded) > MAX_KEY_BYTES:
        return f"it has {len(encoded)} bytes, and {MAX_KEY_BYTES} is the most a store takes"
    if key.startswith("/"):
        return "keys are relative to the root prefix and do not start with '/'"
    for segment in key.split("/"):
        if segment in ("", ".", ".."):
            return f"the segment {segment!r} is not allowed"
    return None


def check_range(byte_range: ByteRange) -> None:
    """Refuse a range that is empty or negative for every size of the object. Raises `InvalidInputError`."""
    match byte_range:
        case Range(start, end):
            bad = start < 0 or (end is not None and end <= start)
        case Suffix(length):
            bad = length <= 0
        case None:
            bad = False
    if bad:
        raise InvalidInputError(
            f"bad byte range {byte_range}: it must name at least one byte, counted from 0", ErrorKind.INVALID_BYTE_RANGE
        )


def clip(byte_range: ByteRange, length: int) -> tuple[int, int]:
    """Start and end of a range within ``length`` bytes, clamped as zarr does: bytes beyond the end are left out."""
    match byte_range:
        case None:
            return 0, length
        case Range(start, end):
            stop = length if end is None else min(end, length)
            return min(start, stop), stop
        case Suffix(count):
            return max(0, length - count), length


def resolve_range(byte_range: ByteRange, size: int, key: str) -> tuple[int, int]:
    """Clamp a range to an object's size.

    Returns
    -------
    tuple
        First byte (inclusive) and last (exclusive).

    Raises
    ------
    InvalidInputError
        The range is malformed, or starts at or beyond the end of the object (kind ``invalid-byte-range``).
    """
    if byte_range is None:
        return 0, size
    check_range(byte_range)
    if isinstance(byte_range, Suffix):
        return max(0, size - byte_range.length), size
    if byte_range.start >= size:
        raise InvalidInputError(
            f"cannot read bytes from {byte_range.start} of {key!r}: the object has {size} bytes",
            ErrorKind.INVALID_BYTE_RANGE,
        )
    return byte_range.start, size if byte_range.end is None else min(byte_range.end, size)


class ReadOnlyStorage(Storage):
    """A storage whose verbs that write are refused before anything is sent."""

    async def put(
        self,
        key: str,
        data: bytes | bytearray | memoryview,
        precondition: Precondition = ANY,
        *,
        kind: ObjectKind = "metadata",
        metadata: Mapping[str, str] | None = None,
    ) -> PutResult:
        raise self._read_only(f"write {key!r}")

    async def delete(self, keys: Iterable[str]) -> DeleteResult:
        raise self._read_only("delete objects")

    async def copy(self, source: str, target: str) -> PutResult:
        raise self._read_only(f"copy {source!r} to {target!r}")

    @property
    def supports_writes(self) -> bool:
        return False

    def _read_only(self, attempt: str) -> ReadOnlyError:
        return ReadOnlyError(
            f"cannot {attempt}: {self.describe()} can only be read; open the repository where it is kept to change it",
            ErrorKind.READ_ONLY_STORAGE,
        )
