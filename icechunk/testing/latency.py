"""A storage with added latency."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.storage.port import (
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
    """The verbs of ``inner``, each after a pause. The pauses may be changed at any time.

    Parameters
    ----------
    inner
        The storage that requests are sent to after the pause.
    write_latency_ms
        Before each PUT, copy and deletion.
    read_latency_ms
        Before each GET and HEAD, and before each page of a listing.

    Raises
    ------
    InvalidInputError
        A negative pause.
    """

    def __init__(self, inner: Storage, *, write_latency_ms: int = 0, read_latency_ms: int = 0) -> None:
        super().__init__(inner)
        self.write_latency_ms = write_latency_ms
        self.read_latency_ms = read_latency_ms

    @property
    def write_latency_ms(self) -> int:
        """Pause before a write, ms."""
        return self._write_ms

    @write_latency_ms.setter
    def write_latency_ms(self, ms: int) -> None:
        self._write_ms = _checked("write_latency_ms", ms)

    @property
    def read_latency_ms(self) -> int:
        """Pause before a read, ms."""
        return self._read_ms

    @read_latency_ms.setter
    def read_latency_ms(self, ms: int) -> None:
        self._read_ms = _checked("read_latency_ms", ms)

    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        await asyncio.sleep(self._read_ms / 1000)
        return await super().get(key, byte_range)

    async def head(self, key: str) -> ObjectInfo:
        await asyncio.sleep(self._read_ms / 1000)
        return await super().head(key)

    async def list_pages(
        self, prefix: str = "", *, start_after: str | None = None, page_size: int = 1000
    ) -> AsyncIterator[list[ObjectInfo]]:
        await asyncio.sleep(self._read_ms / 1000)
        async for page in super().list_pages(prefix, start_after=start_after, page_size=page_size):
            yield page
            await asyncio.sleep(self._read_ms / 1000)

    async def put(
        self,
        key: str,
        data: bytes | bytearray | memoryview,
        precondition: Precondition = ANY,
        *,
        kind: ObjectKind = "metadata",
        metadata: Mapping[str, str] | None = None,
    ) -> PutResult:
        content = bytes(data)
        await asyncio.sleep(self._write_ms / 1000)
        return await super().put(key, content, precondition, kind=kind, metadata=metadata)

    async def delete(self, keys: Iterable[str]) -> DeleteResult:
        await asyncio.sleep(self._write_ms / 1000)
        return await super().delete(keys)

    async def copy(self, source: str, target: str) -> PutResult:
        await asyncio.sleep(self._write_ms / 1000)
        return await super().copy(source, target)


def _checked(name: str, ms: int) -> int:
    if isinstance(ms, bool) or not isinstance(ms, int) or ms < 0:
        raise InvalidInputError(
            f"bad {name} {ms!r}: give a number of milliseconds, 0 or more", ErrorKind.INVALID_SETTING
        )
    return ms
