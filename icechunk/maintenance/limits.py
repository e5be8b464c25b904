"""How much a collection may do at a time, and the budget that sees to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields

import anyio

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.inputs import require_type

__all__ = ["Budget", "Limits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of memory and of requests in flight. Raises `InvalidInputError` for what is no number above zero."""

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
    """After so many failed requests in a row nothing more is deleted."""
    max_concurrent_listings: int | None = None
    """Listings under way at a time; None: 16."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            optional = field.name == "max_concurrent_listings"
            require_type(field.name, value, int, optional=optional)
            if isinstance(value, bool) or (value is not None and value < 1):
                raise InvalidInputError(f"{field.name} must be at least 1, not {value!r}", ErrorKind.INVALID_SETTING)


class Budget:
    """An amount that is lent out and given back; who wants more than all of it gets all of it, alone.

    Belongs to one event loop.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._free = total
        self._changed = anyio.Condition()

    @asynccontextmanager
    async def take(self, amount: int) -> AsyncIterator[None]:
        """Hold ``amount`` for as long as the block runs; waits until there is enough."""
        held = min(max(amount, 0), self._total)
        async with self._changed:
            while self._free < held:
                await self._changed.wait()
            self._free -= held
        try:
            yield
        finally:
            with anyio.CancelScope(shield=True):
                async with self._changed:
                    self._free += held
                    self._changed.notify_all()
