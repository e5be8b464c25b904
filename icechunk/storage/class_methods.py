"""``Storage.new_*``: the constructors that the official class has, under its names and with its signatures.

They describe the arguments of a storage. `icechunk.storage.constructors` attaches the builders, since it knows every
adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

from icechunk.config import S3Options
from icechunk.storage.kinds import (
    AzureKind,
    GcsKind,
    Headers,
    HttpKind,
    LocalKind,
    MemoryKind,
    RedirectKind,
    S3Kind,
    StorageKind,
)
from icechunk.storage.presets import hugging_face, r2, r2_bucket, tigris

__all__ = ["Constructors"]

S = TypeVar("S")


class Constructors(Generic[S]):
    """Base of the class `Storage`, which is ``S``."""

    _build: ClassVar[Callable[[StorageKind], Any]]
    """Attached by `icechunk.storage.constructors`."""

    @classmethod
    def _new(cls, kind: StorageKind) -> S:
        made: S = cls._build(kind)
        return made

    @classmethod
    def new_in_memory(cls) -> S:
        """See `icechunk.in_memory_storage`."""
        return cls._new(MemoryKind())

    @classmethod
    def new_local_filesystem(cls, path: str) -> S:
        """See `icechunk.local_filesystem_storage`."""
        return cls._new(LocalKind(path))

    @classmethod
    def new_s3(
        cls,
        config: S3Options,
        bucket: str,
        prefix: str | None,
        credentials: Any = None,
        legacy_rooted_keys: bool | None = None,
        *,
        read_headers: dict[str, str] | None = None,
        write_headers: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> S:
        """See `icechunk.s3_storage`; ``credentials`` is one of `icechunk.S3Credentials`."""
        sent = Headers(read_headers, write_headers, headers)
        return cls._new(S3Kind(config, bucket, prefix, credentials, legacy_rooted_keys, sent))

    @classmethod
    def new_s3_object_store(
        cls,
        config: S3Options,
        bucket: str,
        prefix: str | None,
        credentials: Any = None,
        *,
        read_headers: dict[str, str] | None = None,
        write_headers: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> S:
        """The same storage as `new_s3`: there is one way to S3 here, where the official library has two."""
        sent = Headers(read_headers, write_headers, headers)
        return cls._new(S3Kind(config, bucket, prefix, credentials, None, sent))

    @classmethod
    def new_tigris(
        cls,
        config: S3Options,
        bucket: str,
        prefix: str | None,
        use_weak_consistency: bool,
        credentials: Any = None,
        legacy_rooted_keys: bool | None = None,
        *,
        read_headers: dict[str, str] | None = None,
        write_headers: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> S:
        """See `icechunk.tigris_storage`."""
        sent = Headers(read_headers, write_headers, headers)
        kind = S3Kind(config, bucket, prefix, credentials, legacy_rooted_keys, sent)
        return cls._new(tigris(kind, use_weak_consistency))

    @classmethod
    def new_r2(
        cls,
        config: S3Options,
        bucket: str | None = None,
        prefix: str | None = None,
        account_id: str | None = None,
        credentials: Any = None,
        legacy_rooted_keys: bool | None = None,
        *,
        read_headers: dict[str, str] | None = None,
        write_headers: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> S:
        """See `icechunk.r2_storage`."""
        sent = Headers(read_headers, write_headers, headers)
        kind = S3Kind(config, *r2_bucket(bucket, prefix), credentials, legacy_rooted_keys, sent)
        return cls._new(r2(kind, account_id))

    @classmethod
    def new_hf(
        cls,
        config: S3Options,
        bucket: str,
        prefix: str | None,
        namespace: str,
        credentials: Any = None,
        legacy_rooted_keys: bool | None = None,
        *,
        read_headers: dict[str, str] | None = None,
        write_headers: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> S:
        """See `icechunk.hf_storage`."""
        sent = Headers(read_headers, write_headers, headers)
        kind = S3Kind(config, bucket, prefix, credentials, legacy_rooted_keys, sent)
        return cls._new(hugging_face(kind, namespace))

    @classmethod
    def new_gcs(
        cls,
        bucket: str,
        prefix: str | None,
        credentials: Any = None,
        *,
        config: dict[str, str] | None = None,
        read_headers: dict[str, str] | None = None,
        write_headers: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> S:
        """See `icechunk.gcs_storage`; ``credentials`` is one of `icechunk.GcsCredentials`."""
        sent = Headers(read_headers, write_headers, headers)
        return cls._new(GcsKind(bucket, prefix, credentials, config, sent))

    @classmethod
    def new_azure_blob(
        cls,
        account: str,
        container: str,
        prefix: str,
        credentials: Any = None,
        *,
        config: dict[str, str] | None = None,
    ) -> S:
        """See `icechunk.azure_storage`; ``credentials`` is one of `icechunk.AzureCredentials`."""
        return cls._new(AzureKind(account, container, prefix, credentials, config))

    @classmethod
    def new_http(cls, base_url: str, config: dict[str, str] | None = None, headers: dict[str, str] | None = None) -> S:
        """See `icechunk.http_storage`."""
        return cls._new(HttpKind(base_url, config, headers))

    @classmethod
    def new_redirect(cls, base_url: str) -> S:
        """See `icechunk.redirect_storage`."""
        return cls._new(RedirectKind(base_url))
