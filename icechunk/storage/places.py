"""The storages of named services, made from what users say of them.

The adapters are imported when one is made: their libraries take longer to load than all else.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from icechunk.config import S3Options
from icechunk.errors import ErrorKind, InvalidInputError, StorageError
from icechunk.sources import SYSTEM

if TYPE_CHECKING:
    from icechunk.storage.base import Storage

__all__ = [
    "TIGRIS_ENDPOINT",
    "azure_place",
    "gcs_place",
    "hf_options",
    "r2_bucket",
    "r2_endpoint",
    "r2_options",
    "s3_place",
    "tigris_headers",
    "tigris_options",
]

TIGRIS_ENDPOINT: Final = "https://t3.storage.dev"
_HUGGING_FACE: Final = "https://s3.hf.co"

Headers = Mapping[str, str] | None


def s3_place(
    options: S3Options,
    bucket: str,
    prefix: str | None,
    credentials: Any,
    legacy_rooted_keys: bool | None,
    read_headers: Headers,
    write_headers: Headers,
    headers: Headers,
    *,
    keeps_metadata: bool = True,
) -> Storage:
    """A storage of S3 or a service like it. Raises `StorageError` for ``legacy_rooted_keys`` with a prefix."""
    from icechunk.storage.s3 import S3Storage

    if legacy_rooted_keys and prefix and prefix.strip("/"):
        raise StorageError(
            "storage error: legacy_rooted_keys is only valid with an empty prefix", ErrorKind.STORAGE_CONFIG
        )
    return S3Storage(
        bucket,
        prefix,
        options=options,
        credentials=credentials,
        rooted_keys=bool(legacy_rooted_keys),
        keeps_metadata=keeps_metadata,
        read_headers={**(headers or {}), **(read_headers or {})},
        write_headers={**(headers or {}), **(write_headers or {})},
    )


def tigris_headers(region: str | None, use_weak_consistency: bool) -> dict[str, str]:
    """What makes Tigris consistent. Raises `StorageError` where nothing can."""
    if use_weak_consistency:
        return {}
    if region is None:
        raise StorageError(
            "a Tigris storage needs the bucket's region to be consistent: give region, or for reading possibly old "
            "states use_weak_consistency=True",
            ErrorKind.STORAGE_CONFIG,
        )
    return {"X-Tigris-Consistent": "true", "X-Tigris-Regions": region}


def tigris_options(options: S3Options) -> S3Options:
    """The options with Tigris' endpoint, unless they have one."""
    changed = copy.copy(options)
    changed.endpoint_url = options.endpoint_url or TIGRIS_ENDPOINT
    return changed


def r2_endpoint(account_id: str) -> str:
    """Where the buckets of an account of Cloudflare's R2 are."""
    return f"https://{account_id}.r2.cloudflarestorage.com"


def r2_options(options: S3Options, account_id: str | None) -> S3Options:
    """The options with R2's endpoint and ways. Raises `StorageError` with neither endpoint nor account."""
    if options.endpoint_url is None and account_id is None:
        raise StorageError("an R2 storage needs endpoint_url or account_id", ErrorKind.STORAGE_CONFIG)
    changed = copy.copy(options)
    changed.region = options.region or "auto"
    changed.endpoint_url = options.endpoint_url or r2_endpoint(account_id or "")
    changed.force_path_style = True
    return changed


def r2_bucket(bucket: str | None, prefix: str | None) -> tuple[str, str | None]:
    """Bucket and prefix, where the first segment of the prefix may be the bucket. Raises `StorageError` with none."""
    if bucket is not None:
        return bucket, prefix
    bucket, _, prefix = (prefix or "").strip("/").partition("/")
    if not bucket:
        raise StorageError(
            "an R2 storage needs a bucket: give bucket, or a prefix that begins with it", ErrorKind.STORAGE_CONFIG
        )
    return bucket, prefix


def hf_options(options: S3Options, namespace: str) -> S3Options:
    """The options with the S3 gateway of Hugging Face. Raises `InvalidInputError` for what is no namespace."""
    if not isinstance(namespace, str) or not namespace or "/" in namespace:
        raise InvalidInputError(
            f"bad namespace {namespace!r}: give the user or organization that owns the bucket", ErrorKind.STORAGE_CONFIG
        )
    changed = copy.copy(options)
    changed.region = options.region or "us-east-1"
    changed.endpoint_url = options.endpoint_url or f"{_HUGGING_FACE}/{namespace}"
    changed.force_path_style = True
    return changed


def gcs_place(
    bucket: str,
    prefix: str | None,
    credentials: Any,
    config: Mapping[str, str] | None,
    read_headers: Headers,
    write_headers: Headers,
    headers: Headers,
) -> Storage:
    """A storage in a bucket of Google Cloud Storage."""
    from icechunk.storage.obstore_places import GcsPlace, check_bucket, checked_config
    from icechunk.storage.obstore_storage import ObstoreStorage

    return ObstoreStorage(
        GcsPlace(
            check_bucket("bucket", bucket),
            _root(prefix),
            credentials=credentials,
            config=checked_config(config),
            read_headers={**(headers or {}), **(read_headers or {})},
            write_headers={**(headers or {}), **(write_headers or {})},
            sources=SYSTEM,
        )
    )


def azure_place(
    account: str, container: str, prefix: str | None, credentials: Any, config: Mapping[str, str] | None
) -> Storage:
    """A storage in a container of Azure."""
    from icechunk.storage.obstore_places import AzurePlace, check_bucket, checked_config
    from icechunk.storage.obstore_storage import ObstoreStorage

    return ObstoreStorage(
        AzurePlace(
            check_bucket("account", account),
            check_bucket("container", container),
            _root(prefix),
            credentials=credentials,
            config=checked_config(config),
            read_headers={},
            write_headers={},
            sources=SYSTEM,
        )
    )


def _root(prefix: str | None) -> str:
    folder = (prefix or "").strip("/")
    return folder + "/" if folder else ""
