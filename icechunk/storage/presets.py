"""Services with S3's protocol and constructors of their own: the options that their names add to those of a bucket."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Final

from icechunk.config import S3Options
from icechunk.errors import ErrorKind, InvalidInputError, StorageError
from icechunk.storage.kinds import S3Kind

__all__ = ["hugging_face", "r2", "r2_bucket", "r2_options", "tigris", "tigris_options"]

_TIGRIS: Final = "https://t3.storage.dev"
_HUGGING_FACE: Final = "https://s3.hf.co"


def tigris(kind: S3Kind, use_weak_consistency: bool) -> S3Kind:
    """A bucket of Tigris, with the headers that make it consistent. Raises `StorageError` where nothing can."""
    both = {**_consistent_headers(kind.options.region, use_weak_consistency), **(kind.headers.both or {})}
    return replace(kind, options=tigris_options(kind.options), headers=replace(kind.headers, both=both))


def tigris_options(options: S3Options) -> S3Options:
    """The options with Tigris' endpoint, unless they have one."""
    changed = copy.copy(options)
    changed.endpoint_url = options.endpoint_url or _TIGRIS
    return changed


def _consistent_headers(region: str | None, use_weak_consistency: bool) -> dict[str, str]:
    if use_weak_consistency:
        return {}
    if region is None:
        raise StorageError(
            "a Tigris storage needs the bucket's region to be consistent: give region, or for reading possibly old "
            "states use_weak_consistency=True",
            ErrorKind.STORAGE_CONFIG,
        )
    return {"X-Tigris-Consistent": "true", "X-Tigris-Regions": region}


def r2(kind: S3Kind, account_id: str | None) -> S3Kind:
    """A bucket of R2. Raises `StorageError` with neither endpoint nor account."""
    return replace(kind, options=r2_options(kind.options, account_id))


def r2_options(options: S3Options, account_id: str | None) -> S3Options:
    """The options with R2's endpoint and path style. Raises `StorageError` with neither endpoint nor account."""
    if options.endpoint_url is None and account_id is None:
        raise StorageError("an R2 storage needs endpoint_url or account_id", ErrorKind.STORAGE_CONFIG)
    changed = copy.copy(options)
    changed.region = options.region or "auto"
    changed.endpoint_url = options.endpoint_url or f"https://{account_id}.r2.cloudflarestorage.com"
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


def hugging_face(kind: S3Kind, namespace: str) -> S3Kind:
    """A bucket of Hugging Face, whose S3 gateway drops metadata. Raises `InvalidInputError` for a bad namespace."""
    if not isinstance(namespace, str) or not namespace or "/" in namespace:
        raise InvalidInputError(
            f"bad namespace {namespace!r}: give the user or organization that owns the bucket", ErrorKind.STORAGE_CONFIG
        )
    changed = copy.copy(kind.options)
    changed.region = changed.region or "us-east-1"
    changed.endpoint_url = changed.endpoint_url or f"{_HUGGING_FACE}/{namespace}"
    changed.force_path_style = True
    return replace(kind, options=changed, keeps_metadata=False)
