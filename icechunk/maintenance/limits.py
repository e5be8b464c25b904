"""The bounds of memory and requests that collections and statistics keep to."""

from __future__ import annotations

from dataclasses import fields

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.runtime.checks import require_type
from icechunk.runtime.late_dataclass import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of memory and of requests in flight. Raises `InvalidInputError` unless they are above zero."""

    max_snapshots_in_memory: int = 50
    """Snapshot files read at a time."""
    max_compressed_manifest_mem_bytes: int = 512 * 1024 * 1024
    """Bytes of manifest files in memory at a time."""
    max_decoded_manifest_mem_bytes: int = 4 * 1024 * 1024 * 1024
    """Bytes of decoded manifests in memory at a time, as estimated from their references."""
    max_concurrent_manifest_fetches: int = 500
    max_concurrent_deletes: int = 10
    """Requests that delete, each up to a thousand objects."""
    max_consecutive_delete_failures: int = 50
    """Number of failed requests in a row after which nothing more is deleted."""
    max_concurrent_listings: int | None = None
    """Listings under way at a time; None: 16."""

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            optional = limit.name == "max_concurrent_listings"
            require_type(limit.name, value, int, optional=optional)
            if isinstance(value, bool) or (value is not None and value < 1):
                raise InvalidInputError(f"{limit.name} must be at least 1, not {value!r}", ErrorKind.INVALID_SETTING)
