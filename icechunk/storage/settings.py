"""Storage settings as an object store obeys them: with defaults, and without features that the service lacks.

The settings that storages use where the configuration gives none.
"""

from __future__ import annotations

import copy
from dataclasses import replace

from icechunk.config import StorageConcurrencySettings, StorageRetriesSettings, StorageSettings
from icechunk.config.storage import (
    DEFAULT_IDEAL_REQUEST_BYTES,
    DEFAULT_INITIAL_BACKOFF_MS,
    DEFAULT_MAX_BACKOFF_MS,
    DEFAULT_MAX_REQUESTS_PER_OBJECT,
    DEFAULT_MAX_TRIES,
    DEFAULT_MULTIPART_BYTES,
)
from icechunk.errors import ObjectNotFoundError
from icechunk.storage.outcome import precondition_failed
from icechunk.storage.port import ANY, Absent, Matches, ObjectKind, Precondition, Sender, Storage, Unchecked
from icechunk.storage.retry import Limits, limits_of

__all__ = ["Effective", "local_settings", "object_store_settings"]


class Effective:
    """The settings of one storage, kept against later changes by the caller.

    Parameters
    ----------
    given
        None: the defaults throughout.
    default_read_s
        Longest silence on a connection where the settings name none, seconds; None: as `limits_of` has it.
    keeps_metadata
        False: the service drops user metadata, also if the settings ask for it.

    Attributes
    ----------
    limits
        Tries and timeouts.
    uses_metadata
        Whether objects may carry user metadata.
    multipart_bytes
        Objects of this size and more go up in parts.
    part_bytes, parts_at_once
        Of such an upload: the size to aim at, and how many at a time.
    """

    def __init__(
        self, given: StorageSettings | None, *, default_read_s: int | None = None, keeps_metadata: bool = True
    ) -> None:
        self._settings = settings = StorageSettings() if given is None else copy.deepcopy(given)
        self.limits: Limits = limits_of(settings, default_read_s)
        self.uses_metadata: bool = settings.unsafe_use_metadata is not False and keeps_metadata
        self._creates = settings.unsafe_use_conditional_create is not False
        self._updates = settings.unsafe_use_conditional_update is not False
        size = settings.minimum_size_for_multipart_upload
        # An empty body has no parts.
        self.multipart_bytes: int = DEFAULT_MULTIPART_BYTES if size is None else max(1, size)
        concurrency = settings.concurrency or StorageConcurrencySettings()
        self.part_bytes: int = concurrency.ideal_concurrent_request_size or DEFAULT_IDEAL_REQUEST_BYTES
        self.parts_at_once: int = concurrency.max_concurrent_requests_for_object or DEFAULT_MAX_REQUESTS_PER_OBJECT

    def for_sender(self, sender: Sender) -> Effective:
        """The same, where nothing is tried again once the sender is told."""
        other = copy.copy(self)
        other.limits = replace(self.limits, sender=sender)
        return other

    @property
    def settings(self) -> StorageSettings:
        """A copy of the given settings."""
        return copy.deepcopy(self._settings)

    def storage_class(self, kind: ObjectKind) -> str | None:
        """The storage class of new objects of a kind; None: the bucket's own."""
        return self._settings.storage_class_of(kind)

    @property
    def atomic_preconditions(self) -> frozenset[type[Precondition]]:
        """As `Storage.atomic_preconditions`."""
        atomic: set[type[Precondition]] = {Unchecked}
        if self._creates:
            atomic.add(Absent)
        if self._updates:
            atomic.add(Matches)
        return frozenset(atomic)

    async def condition_of(self, storage: Storage, key: str, name: str, precondition: Precondition) -> Precondition:
        """The condition to send: one that the settings say the service lacks is replaced by a look beforehand.

        Parameters
        ----------
        name
            Of the object, for messages.

        Raises
        ------
        PreconditionFailedError
            That look found it broken.
        """
        if type(precondition) in self.atomic_preconditions:
            return precondition
        try:
            found = (await storage.head(key)).version
        except ObjectNotFoundError:
            found = None
        wanted = precondition.version if isinstance(precondition, Matches) else None
        if found != wanted:
            raise precondition_failed(name, precondition)
        return ANY


def object_store_settings() -> StorageSettings:
    """A new value with the official library's defaults for every object store."""
    return StorageSettings(
        concurrency=StorageConcurrencySettings(
            max_concurrent_requests_for_object=DEFAULT_MAX_REQUESTS_PER_OBJECT,
            ideal_concurrent_request_size=DEFAULT_IDEAL_REQUEST_BYTES,
        ),
        retries=StorageRetriesSettings(
            max_tries=DEFAULT_MAX_TRIES,
            initial_backoff_ms=DEFAULT_INITIAL_BACKOFF_MS,
            max_backoff_ms=DEFAULT_MAX_BACKOFF_MS,
        ),
        unsafe_use_conditional_create=True,
        unsafe_use_conditional_update=True,
        unsafe_use_metadata=True,
        minimum_size_for_multipart_upload=DEFAULT_MULTIPART_BYTES,
    )


def local_settings(*, ideal_request_bytes: int) -> StorageSettings:
    """A new value with the official library's defaults for memory and local file systems: one try, no pauses.

    Parameters
    ----------
    ideal_request_bytes
        Of one request, bytes.
    """
    return StorageSettings(
        concurrency=StorageConcurrencySettings(
            max_concurrent_requests_for_object=5, ideal_concurrent_request_size=ideal_request_bytes
        ),
        retries=StorageRetriesSettings(max_tries=1, initial_backoff_ms=0, max_backoff_ms=0),
    )
