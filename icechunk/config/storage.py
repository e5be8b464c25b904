"""Locations of object stores, and settings of requests to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, TypeAlias

from icechunk.runtime.checks import U32, U64, text, unsigned
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.representation import (
    IntLikeEnum,
    Represented,
    Setting,
    TupleVariant,
    VariantMeta,
    code,
    redacted_mapping,
    redacted_url,
    unset,
)

__all__ = [
    "DEFAULT_CONNECT_TIMEOUT_MS",
    "DEFAULT_IDEAL_REQUEST_BYTES",
    "DEFAULT_INITIAL_BACKOFF_MS",
    "DEFAULT_MAX_BACKOFF_MS",
    "DEFAULT_MAX_REQUESTS_PER_OBJECT",
    "DEFAULT_MAX_TRIES",
    "DEFAULT_MULTIPART_BYTES",
    "AnyObjectStoreConfig",
    "ChecksumAlgorithm",
    "ObjectStoreConfig",
    "S3Options",
    "StorageConcurrencySettings",
    "StorageRetriesSettings",
    "StorageSettings",
    "StorageTimeoutSettings",
]

DEFAULT_MAX_TRIES: Final = 10
DEFAULT_INITIAL_BACKOFF_MS: Final = 100
DEFAULT_MAX_BACKOFF_MS: Final = 180_000
DEFAULT_MAX_REQUESTS_PER_OBJECT: Final = 18
DEFAULT_IDEAL_REQUEST_BYTES: Final = 12 * 1024 * 1024
DEFAULT_MULTIPART_BYTES: Final = 100 * 1024 * 1024
DEFAULT_CONNECT_TIMEOUT_MS: Final = 10_000


_Some16: TypeAlias = Annotated[int, unsigned(16, minimum=1)]
_Some64: TypeAlias = Annotated[int, unsigned(64, minimum=1)]


class ChecksumAlgorithm(IntLikeEnum):
    """Checksum that S3 is asked to verify on upload."""

    Crc32 = 0
    Crc32c = 1
    Crc64Nvme = 2
    Sha1 = 3
    Sha256 = 4


@dataclass(slots=True, repr=False)
class S3Options(Setting):
    """Options of requests to S3 or an S3 compatible service."""

    _public_name: ClassVar[str] = "icechunk.storage.S3Options"

    region: str | None = None
    """Region of the bucket. None: found by the credential chain's usual means."""
    endpoint_url: str | None = None
    """URL of the service. None: AWS itself."""
    allow_http: bool = False
    """Plain ``http://`` endpoints are refused unless this is set."""
    anonymous: bool = False
    """Send unsigned requests."""
    force_path_style: bool = False
    """The bucket's name in the path instead of the host name."""
    network_stream_timeout_seconds: U32 | None = None
    """A body that delivers nothing for that long is retried; None: the library's default."""
    requester_pays: bool = False
    """Agree to be billed for requests to a bucket of another account."""
    checksum_algorithm: ChecksumAlgorithm | None = None
    """Checksum that uploads carry. None: the form that the service needs."""

    def _shown(self) -> list[tuple[str, Any, Any]]:
        rows = Represented._shown(self)
        return [(n, redacted_url(v) if n == "endpoint_url" and v is not None else v, d) for n, v, d in rows]


def _path(name: str, value: Any) -> Path:
    return Path(value)


def _options(name: str, value: Mapping[str, str] | None) -> dict[str, str]:
    # None and {} are stored alike, so they are kept alike.
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping of strings to strings, not {type(value).__name__}")
    for key, item in value.items():
        text(f"each key of {name}", key)
        text(f"each value of {name}", item)
    return dict(value)


_Options: TypeAlias = Annotated[Mapping[str, str] | None, _options]


class _StoreVariant(TupleVariant):
    """Base of the kinds of object store."""

    __slots__ = ()

    def _shown(self) -> list[tuple[str, Any, Any]]:
        fields = self._fields()
        if len(fields) == 1 and isinstance(fields[0], S3Options):
            return fields[0]._shown()
        return Represented._shown(self)

    def __repr__(self) -> str:
        # By position: the names shown by `str` are those of the options, which the constructor does not take.
        return f"{self._public_name}({', '.join(code(value) for value in self._masked())})"

    def _masked(self) -> tuple[Any, ...]:
        """The fields in the order of the constructor, without their secrets."""
        fields = self._fields()
        return (
            fields if len(fields) == 1 and isinstance(fields[0], S3Options) else tuple(row[1] for row in self._shown())
        )


class ObjectStoreConfig(metaclass=VariantMeta):
    """A kind of object store and its options, without the place in it. One of the nested classes."""

    @dataclass(frozen=True, slots=True, repr=False, match_args=False)
    class InMemory(_StoreVariant):
        """The memory of this process."""

        __match_args__ = ()

    @dataclass(frozen=True, slots=True, repr=False, match_args=False)
    class LocalFileSystem(_StoreVariant):
        """A folder of this machine."""

        __match_args__ = ("_0",)
        path: Annotated[Path, _path]

    @dataclass(frozen=True, slots=True, repr=False, match_args=False)
    class S3(_StoreVariant):
        """Amazon S3."""

        __match_args__ = ("_0",)
        options: S3Options

    @dataclass(frozen=True, slots=True, repr=False, match_args=False)
    class S3Compatible(_StoreVariant):
        """A service with S3's protocol."""

        __match_args__ = ("_0",)
        options: S3Options

    @dataclass(frozen=True, slots=True, repr=False, match_args=False)
    class Tigris(_StoreVariant):
        """Tigris."""

        __match_args__ = ("_0",)
        opts: S3Options

    @dataclass(frozen=True, slots=True, repr=False, match_args=False)
    class Gcs(_StoreVariant):
        """Google Cloud Storage, with obstore's option names."""

        __match_args__ = ("_0",)
        opts: _Options = None

        def _shown(self) -> list[tuple[str, Any, Any]]:
            return [("config", redacted_mapping(self.opts), None)]

    @dataclass(frozen=True, slots=True, repr=False, match_args=False)
    class Azure(_StoreVariant):
        """Azure Blob Storage, with obstore's option names."""

        __match_args__ = ("_0",)
        opts: _Options = None

        def _shown(self) -> list[tuple[str, Any, Any]]:
            return [("config", redacted_mapping(self.opts), None)]

    @dataclass(frozen=True, slots=True, repr=False, match_args=False)
    class Http(_StoreVariant):
        """Any web server, read only, with obstore's option names."""

        __match_args__ = ("_0", "_1")
        opts: _Options = None
        headers: _Options = None
        """Sent with every request; their values never appear in a representation."""

        def _shown(self) -> list[tuple[str, Any, Any]]:
            return [
                ("opts", redacted_mapping(self.opts), None),
                ("headers", redacted_mapping(self.headers, everything=True), None),
            ]


AnyObjectStoreConfig: TypeAlias = (
    ObjectStoreConfig.InMemory
    | ObjectStoreConfig.LocalFileSystem
    | ObjectStoreConfig.S3
    | ObjectStoreConfig.S3Compatible
    | ObjectStoreConfig.Gcs
    | ObjectStoreConfig.Azure
    | ObjectStoreConfig.Tigris
    | ObjectStoreConfig.Http
)


@dataclass(slots=True, repr=False)
class StorageRetriesSettings(Setting):
    """Number and pauses of the tries of a failed request."""

    _public_name: ClassVar[str] = "icechunk.storage.StorageRetriesSettings"

    max_tries: _Some16 | None = unset(DEFAULT_MAX_TRIES)
    """Tries of one request, the first included."""
    initial_backoff_ms: U32 | None = unset(DEFAULT_INITIAL_BACKOFF_MS)
    """Upper end of the first pause, ms; it doubles from try to try."""
    max_backoff_ms: U32 | None = unset(DEFAULT_MAX_BACKOFF_MS)
    """Upper end of any pause, ms."""


@dataclass(slots=True, repr=False)
class StorageTimeoutSettings(Setting):
    """Time limits of requests to the storage; None leaves a limit to the library."""

    _public_name: ClassVar[str] = "icechunk.storage.StorageTimeoutSettings"

    connect_timeout_ms: U32 | None = unset(DEFAULT_CONNECT_TIMEOUT_MS)
    """Time limit of a connection's establishment, ms."""
    read_timeout_ms: U32 | None = None
    """Time limit of the first byte of an answer, ms."""
    operation_timeout_ms: U32 | None = None
    """Time limit of a request with all its retries, ms."""
    operation_attempt_timeout_ms: U32 | None = None
    """Time limit of one try of a request, ms."""


@dataclass(slots=True, repr=False)
class StorageConcurrencySettings(Setting):
    """Splitting of one large object into concurrent requests."""

    _public_name: ClassVar[str] = "icechunk.storage.StorageConcurrencySettings"

    max_concurrent_requests_for_object: _Some16 | None = unset(DEFAULT_MAX_REQUESTS_PER_OBJECT)
    """Requests in flight for one object."""
    ideal_concurrent_request_size: _Some64 | None = unset(DEFAULT_IDEAL_REQUEST_BYTES)
    """Bytes of each request, about."""


@dataclass(slots=True, repr=False)
class StorageSettings(Setting):
    """Settings of requests to the repository's storage."""

    _public_name: ClassVar[str] = "icechunk.storage.StorageSettings"

    concurrency: StorageConcurrencySettings | None = unset(StorageConcurrencySettings)
    """Splitting of large objects."""
    retries: StorageRetriesSettings | None = unset(StorageRetriesSettings)
    """Repetition of failed requests."""
    unsafe_use_conditional_create: bool | None = unset(True)
    """False only for stores without ``If-None-Match``: concurrent writers may then lose data."""
    unsafe_use_conditional_update: bool | None = unset(True)
    """False only for stores without ``If-Match``: concurrent writers may then lose data."""
    unsafe_use_metadata: bool | None = unset(True)
    """False for stores without user metadata of objects."""
    storage_class: str | None = None
    """Storage class of all new objects, where neither of the next two says otherwise; None: the bucket's default."""
    metadata_storage_class: str | None = None
    """Storage class of new snapshots, manifests, transaction logs and objects of the log; None: ``storage_class``."""
    chunks_storage_class: str | None = None
    """Storage class of new chunk objects; None: ``storage_class``."""
    minimum_size_for_multipart_upload: U64 | None = unset(DEFAULT_MULTIPART_BYTES)
    """Larger objects are uploaded in parts, bytes."""
    timeouts: StorageTimeoutSettings | None = unset(StorageTimeoutSettings)
    """Time limits of requests."""

    def storage_class_of(self, kind: str) -> str | None:
        """The storage class of a new object of ``kind`` ``"metadata"`` or ``"chunk"``; None: the bucket's default."""
        own = self.metadata_storage_class if kind == "metadata" else self.chunks_storage_class
        return own if own is not None else self.storage_class
