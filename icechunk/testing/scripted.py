"""A storage whose requests a test can observe, hold, or make fail, and a clock that only tests move."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping

from icechunk.errors import StorageError
from icechunk.runtime.clock import Sources
from icechunk.runtime.late_dataclass import dataclass
from icechunk.storage.memory import MemoryStorage
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

__all__ = ["ManualClock", "Request", "ScriptedStorage"]


class ManualClock:
    """A clock that changes only when it is moved; sleeping on it moves it and takes no real time."""

    def __init__(self, now_us: int = 1_790_000_000_000_000, seed: int = 0) -> None:
        self.now_us: int = now_us
        self._seed = seed

    def move(self, seconds: float) -> None:
        """Let time pass."""
        self.now_us += int(seconds * 1e6)

    def sources(self, *, skew_s: float = 0) -> Sources:
        """One machine's view of the clock, with a wall clock that is off by ``skew_s``, and randomness of its own."""
        self._seed += 1
        rng = random.Random(self._seed)

        async def sleep(seconds: float) -> None:
            self.move(seconds)
            await asyncio.sleep(0)

        return Sources(
            wall_us=lambda: self.now_us + int(skew_s * 1e6),
            elapsed_us=lambda: self.now_us,
            random_bytes=rng.randbytes,
            sleep=sleep,
        )


@dataclass(frozen=True, slots=True)
class Request:
    """One request, as it was made."""

    verb: str
    """``get``, ``put``, ``head``, ``list``, ``delete`` or ``copy``."""
    key: str
    data: bytes = b""
    precondition: Precondition = ANY


Send = Callable[[], Awaitable[object]]
Script = Callable[[Request, Send], Awaitable[object]]
"""Called with a request and the function that sends it on: sends it, or not, or more than once, and returns or raises
the answer."""


class ScriptedStorage(Storage):
    """A storage in memory, or any other, with a script between it and the client.

    Parameters
    ----------
    inner
        The storage that requests are sent to. Several scripted storages that share it are clients of one store.
    """

    def __init__(self, inner: Storage | None = None) -> None:
        self.inner: Storage = inner if inner is not None else MemoryStorage()
        self.requests: list[Request] = []
        self.script: Script | None = None
        """The script; None: every request is sent unchanged."""

    async def _do(self, request: Request, send: Send) -> object:
        self.requests.append(request)
        return await send() if self.script is None else await self.script(request, send)

    def of(self, verb: str, prefix: str = "") -> list[Request]:
        """The requests so far with that verb, on keys with that prefix."""
        return [request for request in self.requests if request.verb == verb and request.key.startswith(prefix)]

    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        answer = await self._do(Request("get", key), lambda: self.inner.get(key, byte_range))
        assert isinstance(answer, GetResult)
        return answer

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
        request = Request("put", key, content, precondition)
        answer = await self._do(request, lambda: self.inner.put(key, content, precondition))
        assert isinstance(answer, PutResult)
        return answer

    async def head(self, key: str) -> ObjectInfo:
        answer = await self._do(Request("head", key), lambda: self.inner.head(key))
        assert isinstance(answer, ObjectInfo)
        return answer

    async def list_pages(
        self, prefix: str = "", *, start_after: str | None = None, page_size: int = 1000
    ) -> AsyncIterator[list[ObjectInfo]]:
        async def collect() -> list[list[ObjectInfo]]:
            pages = self.inner.list_pages(prefix, start_after=start_after, page_size=page_size)
            return [page async for page in pages]

        pages = await self._do(Request("list", prefix), collect)
        assert isinstance(pages, list)
        for page in pages:
            yield page

    async def delete(self, keys: Iterable[str]) -> DeleteResult:
        names = list(keys)
        answer = await self._do(Request("delete", ",".join(names)), lambda: self.inner.delete(names))
        assert isinstance(answer, DeleteResult)
        return answer

    async def copy(self, source: str, target: str) -> PutResult:
        answer = await self._do(Request("copy", source), lambda: self.inner.copy(source, target))
        assert isinstance(answer, PutResult)
        return answer

    async def aclose(self) -> None:
        await self.inner.aclose()

    @property
    def supports_writes(self) -> bool:
        return True

    @property
    def atomic_preconditions(self) -> frozenset[type[Precondition]]:
        return self.inner.atomic_preconditions

    @property
    def lists_first_keys_fast(self) -> bool:
        return self.inner.lists_first_keys_fast

    def describe(self) -> str:
        return "scripted"


def lost_answer() -> StorageError:
    """The error that a client gets when a request times out."""
    return StorageError("timed out")
