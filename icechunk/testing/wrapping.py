"""A storage that forwards every request to another one; base of the observing and the faulty storages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping

from icechunk.storage.port import (
    ANY,
    ByteRange,
    DeleteResult,
    GetResult,
    ObjectInfo,
    ObjectKind,
    Precondition,
    PutResult,
    Sender,
    Storage,
)

__all__ = ["WrappingStorage"]


class WrappingStorage(Storage):
    """The verbs of ``inner``, unchanged."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner

    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        return await self.inner.get(key, byte_range)

    async def put(
        self,
        key: str,
        data: bytes | bytearray | memoryview,
        precondition: Precondition = ANY,
        *,
        kind: ObjectKind = "metadata",
        metadata: Mapping[str, str] | None = None,
    ) -> PutResult:
        return await self.inner.put(key, data, precondition, kind=kind, metadata=metadata)

    async def head(self, key: str) -> ObjectInfo:
        return await self.inner.head(key)

    async def list_pages(
        self, prefix: str = "", *, start_after: str | None = None, page_size: int = 1000
    ) -> AsyncIterator[list[ObjectInfo]]:
        async for page in self.inner.list_pages(prefix, start_after=start_after, page_size=page_size):
            yield page

    async def delete(self, keys: Iterable[str]) -> DeleteResult:
        return await self.inner.delete(keys)

    async def copy(self, source: str, target: str) -> PutResult:
        return await self.inner.copy(source, target)

    def for_sender(self, sender: Sender) -> Storage:
        inner = self.inner.for_sender(sender)
        if inner is self.inner:
            return self
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.inner = inner
        return other

    async def aclose(self) -> None:
        await self.inner.aclose()

    @property
    def supports_writes(self) -> bool:
        return self.inner.supports_writes

    @property
    def atomic_preconditions(self) -> frozenset[type[Precondition]]:
        return self.inner.atomic_preconditions

    @property
    def clock_resolution_us(self) -> int:
        return self.inner.clock_resolution_us

    @property
    def lists_any_prefix_fast(self) -> bool:
        return self.inner.lists_any_prefix_fast

    @property
    def lists_first_keys_fast(self) -> bool:
        return self.inner.lists_first_keys_fast

    @property
    def gains_from_split_reads(self) -> bool:
        return self.inner.gains_from_split_reads

    @property
    def endpoint_url(self) -> str | None:
        return self.inner.endpoint_url

    def describe(self) -> str:
        return self.inner.describe()

    def __repr__(self) -> str:
        return repr(self.inner)
