"""A storage that injects faults: lost answers, late and doubled writes, requests that are never sent.

A plan, which is a function from the request to a `Fault`, decides about each request. `scripted` plans name the n-th
request of a kind; `seeded` plans draw from a seeded generator, so that the seed reproduces a failure. A write that is
`LATE` lands when `FaultyStorage.deliver` is called.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from enum import StrEnum
from typing import TypeAlias

from icechunk.errors import ErrorKind, ObjectNotFoundError, PreconditionFailedError, StorageError
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

__all__ = ["Fault", "FaultPlan", "FaultyStorage", "PlannedRequest", "scripted", "seeded"]


class Fault(StrEnum):
    """Outcome of a request."""

    NONE = "none"
    """No fault."""
    FAIL_BEFORE = "fail-before"
    """It never reaches the store; the caller gets `StorageError`."""
    LOSE_ANSWER = "lose-answer"
    """It is executed; the caller gets `StorageError`."""
    LATE = "late"
    """A write is executed after the caller has got `StorageError`. Other requests: as `FAIL_BEFORE`."""
    DUPLICATE = "duplicate"
    """A write is executed, its answer returned, and executed a second time later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """A request as a plan sees it."""

    n: int
    """Counts all requests of the storage from 0."""
    verb: str
    """``get``, ``put``, ``head``, ``list``, ``delete``, ``copy``."""
    key: str
    """As in `RecordedRequest`."""
    precondition: Precondition | None = None
    """Precondition of a put."""


FaultPlan: TypeAlias = Callable[[PlannedRequest], Fault]


def scripted(steps: Mapping[tuple[str, int], Fault], prefix: str = "") -> FaultPlan:
    """A plan by verb and count.

    Parameters
    ----------
    steps
        ``{("put", 0): Fault.LOSE_ANSWER}``: the first put below ``prefix`` loses its answer.
    """
    counts: dict[str, int] = {}

    def plan(request: PlannedRequest) -> Fault:
        if not request.key.startswith(prefix):
            return Fault.NONE
        n = counts.get(request.verb, 0)
        counts[request.verb] = n + 1
        return steps.get((request.verb, n), Fault.NONE)

    return plan


def seeded(seed: int, probability: float = 0.2, faults: Iterable[Fault] = tuple(Fault)[1:]) -> FaultPlan:
    """A plan that injects a fault with ``probability``; the same seed and order of requests give the same faults."""
    generator = random.Random(seed)
    choices = list(faults)

    def plan(request: PlannedRequest) -> Fault:
        return generator.choice(choices) if generator.random() < probability else Fault.NONE

    return plan


@dataclass(frozen=True, slots=True)
class _Write:
    key: str
    data: bytes
    precondition: Precondition
    kind: ObjectKind
    metadata: Mapping[str, str] | None


class FaultyStorage(WrappingStorage):
    """``inner`` with a plan of faults.

    Parameters
    ----------
    plan
        Called once for each request, in their order.
    """

    def __init__(self, inner: Storage, plan: FaultPlan = lambda request: Fault.NONE) -> None:
        super().__init__(inner)
        self.plan = plan
        self.pending: list[_Write] = []
        self._count = 0

    async def deliver(self, count: int | None = None) -> list[bool]:
        """Carry out writes that are late, oldest first; returns whether each landed."""
        batch, self.pending = self.pending[:count], self.pending[len(self.pending[:count]) :]
        landed = []
        for write in batch:
            try:
                await self._send(write)
            except (PreconditionFailedError, ObjectNotFoundError):
                landed.append(False)
            else:
                landed.append(True)
        return landed

    async def put(
        self,
        key: str,
        data: bytes | bytearray | memoryview,
        precondition: Precondition = ANY,
        *,
        kind: ObjectKind = "metadata",
        metadata: Mapping[str, str] | None = None,
    ) -> PutResult:
        write = _Write(key, bytes(data), precondition, kind, metadata)
        match self._decide("put", key, precondition):
            case Fault.NONE:
                return await self._send(write)
            case Fault.FAIL_BEFORE:
                raise self._no_answer("put", key)
            case Fault.LATE:
                self.pending.append(write)
                raise self._no_answer("put", key)
            case Fault.DUPLICATE:
                result = await self._send(write)
                self.pending.append(write)
                return result
            case Fault.LOSE_ANSWER:
                try:
                    await self._send(write)
                except PreconditionFailedError as error:
                    raise self._no_answer("put", key) from error
                raise self._no_answer("put", key)

    async def _send(self, write: _Write) -> PutResult:
        return await self.inner.put(write.key, write.data, write.precondition, kind=write.kind, metadata=write.metadata)

    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        self._refuse("get", key)
        return await self.inner.get(key, byte_range)

    async def head(self, key: str) -> ObjectInfo:
        self._refuse("head", key)
        return await self.inner.head(key)

    async def list_pages(
        self, prefix: str = "", *, start_after: str | None = None, page_size: int = 1000
    ) -> AsyncIterator[list[ObjectInfo]]:
        self._refuse("list", prefix)
        async for page in self.inner.list_pages(prefix, start_after=start_after, page_size=page_size):
            yield page

    async def delete(self, keys: Iterable[str]) -> DeleteResult:
        wanted = list(keys)
        fault = self._decide("delete", wanted[0] if wanted else "")
        if fault in (Fault.FAIL_BEFORE, Fault.LATE):
            raise self._no_answer("delete", ", ".join(wanted[:3]))
        result = await self.inner.delete(wanted)
        if fault is Fault.LOSE_ANSWER:
            raise self._no_answer("delete", ", ".join(wanted[:3]))
        return result

    async def copy(self, source: str, target: str) -> PutResult:
        fault = self._decide("copy", target)
        if fault in (Fault.FAIL_BEFORE, Fault.LATE):
            raise self._no_answer("copy", target)
        result = await self.inner.copy(source, target)
        if fault is Fault.LOSE_ANSWER:
            raise self._no_answer("copy", target)
        return result

    def _decide(self, verb: str, key: str, precondition: Precondition | None = None) -> Fault:
        request = PlannedRequest(n=self._count, verb=verb, key=key, precondition=precondition)
        self._count += 1
        return self.plan(request)

    def _refuse(self, verb: str, key: str) -> None:
        if self._decide(verb, key) not in (Fault.NONE, Fault.DUPLICATE):
            raise self._no_answer(verb, key)

    def _no_answer(self, verb: str, key: str) -> StorageError:
        return StorageError(
            f"cannot {verb} {key!r} in {self.describe()}: no answer (an injected fault); the outcome is uncertain",
            ErrorKind.OBJECT_STORE,
        )
