"""A storage that records requests, and counts the round trips that depend on each other.

A request depends on another one of the same operation if it began after the other had ended.
`RecordingStorage.dependent_rounds` is the longest chain of such requests: the cost of the operation in latencies,
independent of the number of requests at the same time. To make that exact without a clock, every request is answered
only after all other tasks had their turn, so that every request that does not depend on its answer has begun by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import TypeVar

from icechunk.runtime.late_dataclass import dataclass
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

__all__ = ["RecordedRequest", "RecordingStorage"]

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class RecordedRequest:
    """One request that a `RecordingStorage` saw."""

    verb: str
    """``get``, ``put``, ``head``, ``list`` (one for each page), ``delete``, ``copy``."""
    key: str
    """Key, prefix of a listing, first key of a deletion, or target of a copy."""
    precondition: Precondition | None = None
    """Precondition of a put."""
    size: int = 0
    """Bytes of a put's body, or of a get's answer."""
    started: int = 0
    """Position of its beginning in the order of all beginnings and ends."""
    ended: int | None = None
    """Position of its end in that order; None while it is in flight."""
    error: BaseException | None = None
    """The error that it raised."""


class RecordingStorage(WrappingStorage):
    """Records every request to ``inner``.

    Parameters
    ----------
    turns
        How often other tasks get a turn before a request is answered.
    """

    def __init__(self, inner: Storage, *, turns: int = 50) -> None:
        super().__init__(inner)
        self.requests: list[RecordedRequest] = []
        self._turns = turns
        self._moment = 0

    def _next_moment(self) -> int:
        self._moment += 1
        return self._moment

    def clear(self) -> None:
        """Drop the requests recorded so far."""
        self.requests.clear()

    def count(self, verb: str | None = None, prefix: str = "") -> int:
        """Requests with this verb (None: any) whose key begins with ``prefix``."""
        return sum(1 for r in self.requests if verb in (None, r.verb) and r.key.startswith(prefix))

    def dependent_rounds(self) -> int:
        """The longest chain of requests each of which began after the one before had ended."""
        depth = 0
        finished: list[tuple[int, int]] = []
        for request in sorted(self.requests, key=lambda r: r.started):
            before = max((d for ended, d in finished if ended < request.started), default=0)
            depth = max(depth, before + 1)
            if request.ended is not None:
                finished.append((request.ended, before + 1))
        return depth

    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        return await self._record(RecordedRequest(verb="get", key=key), lambda: self.inner.get(key, byte_range))

    async def put(
        self,
        key: str,
        data: bytes | bytearray | memoryview,
        precondition: Precondition = ANY,
        *,
        kind: ObjectKind = "metadata",
        metadata: Mapping[str, str] | None = None,
    ) -> PutResult:
        request = RecordedRequest(verb="put", key=key, precondition=precondition, size=len(data))
        return await self._record(
            request, lambda: self.inner.put(key, data, precondition, kind=kind, metadata=metadata)
        )

    async def head(self, key: str) -> ObjectInfo:
        return await self._record(RecordedRequest(verb="head", key=key), lambda: self.inner.head(key))

    async def list_pages(
        self, prefix: str = "", *, start_after: str | None = None, page_size: int = 1000
    ) -> AsyncIterator[list[ObjectInfo]]:
        pages = self.inner.list_pages(prefix, start_after=start_after, page_size=page_size)

        async def step() -> list[ObjectInfo]:
            return await anext(pages, [])

        while True:
            page = await self._record(RecordedRequest(verb="list", key=prefix), step)
            if page:
                yield page
            # A full page may be followed by another; a short page is the last, and the store says so in it.
            if len(page) < page_size:
                return

    async def delete(self, keys: Iterable[str]) -> DeleteResult:
        wanted = list(keys)
        request = RecordedRequest(verb="delete", key=wanted[0] if wanted else "")
        return await self._record(request, lambda: self.inner.delete(wanted))

    async def copy(self, source: str, target: str) -> PutResult:
        return await self._record(RecordedRequest(verb="copy", key=target), lambda: self.inner.copy(source, target))

    async def _record(self, request: RecordedRequest, send: Callable[[], Awaitable[T]]) -> T:
        self.requests.append(request)
        request.started = self._next_moment()
        try:
            for _ in range(self._turns):
                await asyncio.sleep(0)
            result = await send()
            if isinstance(result, GetResult):
                request.size = len(result.data)
            return result
        except BaseException as error:
            request.error = error
            raise
        finally:
            request.ended = self._next_moment()
