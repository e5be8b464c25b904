"""A storage whose every request takes a little longer: what a far object store feels like, on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping

from icechunk.storage.base import (
    ANY,
    ByteRange,
    DeleteResult,
    GetResult,
    ObjectInfo,
    ObjectKind,
    Precondition,
    PutResult,
    Storage,
)
from icechunk.testing.wrapping import WrappingStorage

__all__ = ["LatencyStorage"]


class LatencyStorage(WrappingStorage):
    """Waits before every request to ``inner``; many may wait at once.

    Parameters
    ----------
    write_latency_ms
        Before a put, a copy or a deletion.
    read_latency_ms
        Before a get, a head or a page of a listing.

    Both can be set anew at any time.
    """

    write_latency_ms: int = 0
    read_latency_ms: int = 0

    def __init__(self, inner: Storage, *, write_latency_ms: int = 0, read_latency_ms: int = 0) -> None:
        super().__init__(inner)
        self.write_latency_ms = write_latency_ms
        self.read_latency_ms = read_latency_ms

    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        await asyncio.sleep(self.read_latency_ms / 1000)
        return await super().get(key, byte_range)

    async def head(self, key: str) -> ObjectInfo:
        await asyncio.sleep(self.read_latency_ms / 1000)
        return await super().head(key)

    async def list_pages(
        self, prefix: str = "", *, start_after: str | None = None, page_size: int = 1000
    ) -> AsyncIterator[list[ObjectInfo]]:
        await asyncio.sleep(self.read_latency_ms / 1000)
        async for page in super().list_pages(prefix, start_after=start_after, page_size=page_size):
            yield page
            await asyncio.sleep(self.read_latency_ms / 1000)

    async def put(
        self,
        key: str,
        data: bytes | bytearray | memoryview,
        precondition: Precondition = ANY,
        *,
        kind: ObjectKind = "metadata",
        metadata: Mapping[str, str] | None = None,
    ) -> PutResult:
        await asyncio.sleep(self.write_latency_ms / 1000)
        return await super().put(key, data, precondition, kind=kind, metadata=metadata)

    async def delete(self, keys: Iterable[str]) -> DeleteResult:
        await asyncio.sleep(self.write_latency_ms / 1000)
        return await super().delete(keys)

    async def copy(self, source: str, target: str) -> PutResult:
        await asyncio.sleep(self.write_latency_ms / 1000)
        return await super().copy(source, target)

    def __repr__(self) -> str:
        return f"LatencyStorage(write_latency_ms={self.write_latency_ms}, read_latency_ms={self.read_latency_ms})"
