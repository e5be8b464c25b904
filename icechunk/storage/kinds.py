"""The kinds of storages: all that a storage of each is made from, as one value.

`icechunk.storage.constructors` has the one builder of each kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, TypeAlias

from icechunk.config import S3Options
from icechunk.errors import ErrorKind, StorageError
from icechunk.runtime.late_dataclass import dataclass

__all__ = [
    "AzureKind",
    "GcsKind",
    "Headers",
    "HttpKind",
    "LocalKind",
    "MemoryKind",
    "RedirectKind",
    "S3Kind",
    "StorageKind",
]

Options: TypeAlias = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Headers:
    """Headers of requests, as callers give them."""

    reading: Options | None = None
    """Sent with requests that read; they win over ``both``."""
    writing: Options | None = None
    """Sent with requests that write; they win over ``both``."""
    both: Options | None = None
    """Headers of all requests."""

    def of_reads(self) -> dict[str, str]:
        """All that requests send that read."""
        return {**(self.both or {}), **(self.reading or {})}

    def of_writes(self) -> dict[str, str]:
        """All that requests send that write."""
        return {**(self.both or {}), **(self.writing or {})}


@dataclass(frozen=True, slots=True)
class MemoryKind:
    """The memory of this process."""


@dataclass(frozen=True, slots=True)
class LocalKind:
    """A folder of this machine."""

    path: str


@dataclass(frozen=True, slots=True)
class S3Kind:
    """A bucket of S3, or of a service with its protocol, and a prefix in it.

    Raises
    ------
    StorageError
        ``legacy_rooted_keys`` with a prefix.
    """

    options: S3Options
    """Region, endpoint and the like."""
    bucket: str
    prefix: str | None
    credentials: Any = None
    """One of `icechunk.S3Credentials`; None: the environment's."""
    legacy_rooted_keys: bool | None = None
    """Keys in the bucket begin with ``/``."""
    headers: Headers = field(default_factory=Headers)
    keeps_metadata: bool = True
    """False: the service drops user metadata."""

    def __post_init__(self) -> None:
        if self.legacy_rooted_keys and self.prefix and self.prefix.strip("/"):
            raise StorageError(
                "storage error: legacy_rooted_keys is only valid with an empty prefix", ErrorKind.STORAGE_CONFIG
            )


@dataclass(frozen=True, slots=True)
class GcsKind:
    """A bucket of Google Cloud Storage, and a prefix in it."""

    bucket: str
    prefix: str | None
    credentials: Any = None
    """One of `icechunk.GcsCredentials`; None: the environment's."""
    config: Options | None = None
    """Options as obstore names them."""
    headers: Headers = field(default_factory=Headers)


@dataclass(frozen=True, slots=True)
class AzureKind:
    """A container of Azure Blob Storage, and a prefix in it."""

    account: str
    container: str
    prefix: str
    credentials: Any = None
    """One of `icechunk.AzureCredentials`; None: the environment's."""
    config: Options | None = None
    """Options as obstore names them."""


@dataclass(frozen=True, slots=True)
class HttpKind:
    """A web server, below a URL."""

    base_url: str
    config: Options | None = None
    """Options of the HTTP client."""
    headers: Options | None = None
    """Sent with every request."""


@dataclass(frozen=True, slots=True)
class RedirectKind:
    """The kind of place that a web server redirects to."""

    base_url: str


StorageKind: TypeAlias = MemoryKind | LocalKind | S3Kind | GcsKind | AzureKind | HttpKind | RedirectKind
