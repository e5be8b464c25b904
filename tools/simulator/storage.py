"""The store of a simulation, and each client's faulty connection to it."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Final, NoReturn, Protocol, TypeVar

from icechunk.errors import ObjectNotFoundError, PreconditionFailedError
from icechunk.storage.port import (
    ANY,
    Absent,
    ByteRange,
    DeleteResult,
    GetResult,
    Matches,
    ObjectInfo,
    ObjectKind,
    Precondition,
    PutResult,
    Storage,
    Version,
    resolve_range,
)
from tools.simulator.faults import CALM, Fault, Mix, no_answer, refusal, unsent
from tools.simulator.loop import DAY_S, VirtualLoop
from tools.simulator.trace import Request, Trace

__all__ = ["SimulatedStorage", "SimulatedStore", "Stored"]

T = TypeVar("T")

_REFUSALS: Final = (400, 401, 403, 404, 405, 411, 501)
_WRITES: Final = ("put", "delete", "copy")
_STALE_S: Final = 10.0
"""Greatest age of a stale listing of immutable files, from before it was asked for, seconds."""
_TRUTH: Final = ("log/", "refs/")
"""Folders whose listings the layouts rely on: a listing must show every write acknowledged before its request."""
_LOOKED_AT: Final = ("log/", "refs/", "repo")
"""Prefixes of objects that clients read after a 412 before they rely on it."""


class Stored:
    """One object."""

    __slots__ = ("created_s", "data", "info")
    created_s: float
    """Since when there is an object of this key, by the loop's time."""

    def __init__(self, key: str, data: bytes, now_us: int, now_s: float) -> None:
        self.data = data
        version = Version(hashlib.blake2b(data, digest_size=8).hexdigest())
        self.info = ObjectInfo(key=key, size=len(data), version=version, modified_us=now_us // 1_000_000 * 1_000_000)
        self.created_s = now_s


class RequestRecorder(Protocol):
    """Is told of all requests."""

    def sent(self, request: Request) -> None:
        """A client calls its storage."""

    def executed(self, request: Request, result: object) -> None:
        """The store has executed it: None where its condition did not hold."""

    def answered(self, request: Request) -> None:
        """The call has ended, perhaps without an answer."""


class SimulatedStore:
    """The stored objects, and the requests that are still under way.

    Parameters
    ----------
    objects
        The objects in the beginning.
    """

    def __init__(
        self, loop: VirtualLoop, mix: Mix, rng: random.Random, objects: Mapping[str, Stored] | None = None
    ) -> None:
        self.loop = loop
        self.mix = mix
        self.rng = rng
        self.objects: dict[str, Stored] = dict(objects or {})
        self.trace = Trace()
        self.injected: Counter[Fault] = Counter()
        self.pause_s = DAY_S
        """The unit of pauses of a client, s."""
        self.force_at: int | None = None
        """Number of the request that gets a fault for certain, unless an earlier request got one."""
        self.travelling: set[asyncio.Task[None]] = set()
        self.on_write: Callable[[str, bytes], None] | None = None
        """Called with every write that was executed."""
        self.on_put: Callable[[SimulatedStorage, str, bytes], None] | None = None
        """Called with every PUT that a client begins to send."""
        self.on_answer: Callable[[str, bytes, str], None] | None = None
        """Called with the answer to every PUT: ``ok``, ``412``, ``refused`` or ``none``."""
        self.recorder: RequestRecorder | None = None
        self._deleted: dict[str, tuple[float, Stored]] = {}

    def write(self, key: str, data: bytes, precondition: Precondition) -> PutResult:
        """Execute a PUT, now."""
        found = self.objects.get(key)
        if isinstance(precondition, Absent):
            if found is not None:
                raise PreconditionFailedError(f"{key!r} exists")
        elif isinstance(precondition, Matches) and (found is None or found.info.version != precondition.version):
            raise PreconditionFailedError(f"{key!r} has changed")
        now_us = self.loop.now_us()
        stored = self.objects[key] = Stored(key, data, now_us, self.loop.now_s)
        if found is not None:
            # No listing, however old, misses a key because its object was replaced.
            stored.created_s = found.created_s
        if self.on_write is not None:
            self.on_write(key, data)
        return PutResult(version=stored.info.version, date_us=now_us // 1_000_000 * 1_000_000)

    def remove(self, key: str) -> None:
        """Execute a DELETE, now."""
        found = self.objects.pop(key, None)
        if found is not None:
            self._deleted[key] = self.loop.now_s, found

    def contents(self) -> dict[str, bytes]:
        """The objects, by key."""
        return {key: stored.data for key, stored in self.objects.items()}

    def listed(self, prefix: str, after: str, at_s: float | None) -> list[ObjectInfo]:
        """The objects below a prefix; with ``at_s``, as the store was then."""
        found = {key: stored for key, stored in self.objects.items() if key.startswith(prefix) and key > after}
        if at_s is not None:
            found = {key: stored for key, stored in found.items() if stored.created_s <= at_s}
            for key, (gone_s, stored) in self._deleted.items():
                if key.startswith(prefix) and key > after and stored.created_s <= at_s < gone_s:
                    found.setdefault(key, stored)
        return [found[key].info for key in sorted(found)]

    def later(self, delay_s: float, request: Request, execute: Callable[[], object]) -> None:
        """Execute a request after a delay; no client gets the answer."""

        async def arrive() -> None:
            await asyncio.sleep(delay_s)
            self.execute(request, execute)

        task = self.loop.create_task(arrive())
        self.travelling.add(task)
        task.add_done_callback(self.travelling.discard)

    def execute(self, request: Request, execute: Callable[[], T]) -> T | None:
        """Execute a request and note the effect; None if its condition does not hold."""
        request.executed_s.append(self.loop.now_s)
        result: T | None = None
        try:
            result = execute()
        except PreconditionFailedError:
            request.effects.append("condition does not hold")
        else:
            request.effects.append("done")
        if self.recorder is not None:
            self.recorder.executed(request, result)
        return result

    def drawn(self, verb: str, faulty: bool) -> Fault | None:
        """The fault of a request that a client is about to send."""
        if not faulty:
            return None
        if self.force_at is not None and len(self.trace.requests) >= self.force_at and not self.injected:
            return self.mix.any_for(verb, self.rng)
        return self.mix.draw(verb, self.rng)


class SimulatedStorage(Storage):
    """One client's way to the store.

    Parameters
    ----------
    name
        Of the client, in traces.
    faulty
        Whether it gets faults.
    dated
        Whether the store's answers have a date.
    """

    def __init__(self, store: SimulatedStore, name: str, *, faulty: bool = True, dated: bool = True) -> None:
        self.store = store
        self.name = name
        self.faulty = faulty and store.mix is not CALM
        self.dated = dated
        self.dead = False
        self.on_crash: Callable[[], None] = lambda: None
        self.on_clock_jump: Callable[[], None] = lambda: None
        self._loop = store.loop
        self._rng = store.rng
        self.way_s: tuple[float, float] = (0.001, 0.05)
        """The shortest and the longest time of a request to the store, and of its answer back, s."""
        self._outage_until_s = 0.0
        self._denied_until_s = 0.0

    def recover(self) -> None:
        """From now on there are no faults."""
        self.faulty = False
        self._outage_until_s = self._denied_until_s = 0.0

    # ------------------------------------------------------------------ the way

    async def _way(self) -> None:
        await self._loop.after(self._rng.uniform(*self.way_s))
        if self.dead:
            raise asyncio.CancelledError

    def _begin(self, verb: str, key: str, detail: str = "", data: bytes = b"") -> tuple[Request, Fault | None]:
        if self.dead:
            raise asyncio.CancelledError
        fault = self.store.drawn(verb, self.faulty)
        if fault is not None and fault is Fault.PARTIAL and "," not in key:
            fault = Fault.LOST
        request = Request(self._loop.now_s, self.name, verb, key, detail, "" if fault is None else fault.value, data)
        self.store.trace.requests.append(request)
        if fault is not None:
            self.store.injected[fault] += 1
            self._strike(fault)
        if self.store.recorder is not None:
            self.store.recorder.sent(request)
        return request, fault

    def _strike(self, fault: Fault) -> None:
        """The effect of a fault on the client, not just on the request."""
        if fault is Fault.CLOCK:
            self.on_clock_jump()
        elif fault is Fault.OUTAGE:
            self._outage_until_s = self._loop.now_s + self._rng.choice((3.0, 60.0, DAY_S)) * self._rng.random()
        elif fault is Fault.DENIED:
            self._denied_until_s = self._loop.now_s + self._rng.choice((3.0, 60.0)) * self._rng.random()

    def _die(self) -> None:
        self.dead = True
        self.on_crash()
        raise asyncio.CancelledError

    def _go(self, request: Request, fault: Fault | None, execute: Callable[[], T]) -> Awaitable[T]:
        """Take a request to the store and its answer back; T is what the store answers."""
        way = self._there_and_back(request, fault, execute)
        return way if self.store.recorder is None else self._recorded(self.store.recorder, request, way)

    async def _recorded(self, recorder: RequestRecorder, request: Request, way: Awaitable[T]) -> T:
        try:
            return await way
        finally:
            recorder.answered(request)

    async def _there_and_back(self, request: Request, fault: Fault | None, execute: Callable[[], T]) -> T:
        # Most requests have no fault, and to ask for each kind would take as long as all else: in Python 3.11 a member
        # of an enumeration is looked up by a function.
        store, loop, rng = self.store, self._loop, self._rng
        writes = request.verb in _WRITES
        try:
            if fault is not None:
                await self._hold_up(fault)
            await loop.after(rng.uniform(*self.way_s))
        except asyncio.CancelledError:
            if writes and self.faulty and rng.random() < 0.5:
                # It had left already.
                if not self.dead:
                    store.injected[Fault.CUT] += 1
                request.fault = request.fault or Fault.CUT.value
                store.later(rng.choice((0.1, 5.0)) * rng.random(), request, execute)
            raise
        if self.dead or (fault is not None and fault is Fault.CRASHED):
            if writes and rng.random() < 0.5:
                store.execute(request, execute)
            self._die()
        if self._outage_until_s > loop.now_s:
            await loop.after(rng.uniform(0.2, 3))
            if self.dead:
                raise asyncio.CancelledError
            request.answered_s, request.answer = loop.now_s, "no connection"
            raise unsent(request.verb, request.key)
        if writes and self._denied_until_s > loop.now_s:
            await self._refuse(request, rng.choice(_REFUSALS) if fault is Fault.REFUSED else 403)
        if fault is not None:
            await self._fail(request, fault, execute)
        answer = store.execute(request, execute)
        if fault is not None:
            if fault is Fault.DOUBLED:
                store.later(rng.choice((0.5, 20, 3600)) * rng.random(), request, execute)
            elif fault is Fault.PAUSED:
                await loop.after(rng.choice((0.1, 4.0, 9.0)) * store.pause_s * rng.random())
        await loop.after(rng.uniform(*self.way_s))
        if self.dead:
            raise asyncio.CancelledError
        if fault is not None:
            if fault is Fault.LOST:
                await self._unanswered(request, "the answer was lost", 0.5)
            elif fault is Fault.TRUNCATED:
                await self._unanswered(request, "the answer breaks off", 0.001)
        request.answered_s = loop.now_s
        if answer is None:
            request.answer = "412"
            raise PreconditionFailedError(f"condition of {request.key!r} does not hold")
        request.answer = "ok"
        return answer

    async def _hold_up(self, fault: Fault) -> None:
        """The time until a request leaves."""
        rng = self._rng
        if fault is Fault.REORDERED:
            await self._loop.after(rng.choice((0.3, 5.0, 60.0)) * rng.random())
        elif fault is Fault.PAUSED and rng.random() < 0.5:
            await self._loop.after(rng.choice((0.1, 4.0, 9.0)) * self.store.pause_s * rng.random())

    async def _fail(self, request: Request, fault: Fault, execute: Callable[[], object]) -> None:
        """Raise what a client gets for a request that is not executed, or later; nothing for one that is."""
        rng = self._rng
        match fault:
            case Fault.REFUSED:
                await self._refuse(request, rng.choice(_REFUSALS))
            case Fault.DROPPED | Fault.LATE:
                patience_s = rng.uniform(0.5, 3)
                if fault is Fault.LATE:
                    # Often just when the client, out of patience, looks and sends again.
                    delay_s = patience_s + rng.choice((-0.5, 0.2, 0.2, 0.4, 20, 3600)) * rng.random()
                    self.store.later(max(0.0, delay_s), request, execute)
                await self._unanswered(request, "timed out", patience_s)
            case Fault.THROTTLED | Fault.CONFLICT:
                await self._way()
                request.answered_s, request.answer = self._loop.now_s, fault.value
                raise no_answer(request.verb, request.key, f"the store answers {fault.value}")
            case Fault.SPURIOUS:
                await self._way()
                request.answered_s, request.answer = self._loop.now_s, fault.value
                raise PreconditionFailedError(f"condition of {request.key!r} does not hold, says the store")

    async def _refuse(self, request: Request, status: int) -> NoReturn:
        await self._way()
        request.answered_s, request.answer = self._loop.now_s, f"refused with {status}"
        raise refusal(request.verb, request.key, status)

    async def _unanswered(self, request: Request, why: str, after_s: float) -> NoReturn:
        await self._loop.after(after_s)
        if self.dead:
            raise asyncio.CancelledError
        request.answered_s, request.answer = self._loop.now_s, why
        raise no_answer(request.verb, request.key, why)

    # ------------------------------------------------------------------ the verbs

    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        request, fault = self._begin("get", key)
        found, date_us = await self._go(request, fault, lambda: (self.store.objects.get(key), self._loop.now_us()))
        if found is None:
            request.answer = "404"
            raise ObjectNotFoundError(f"no object {key!r}")
        data = found.data
        if byte_range is not None:
            start, stop = resolve_range(byte_range, len(data), key)
            data = data[start:stop]
        return GetResult(
            body=data,
            size=found.info.size,
            version=found.info.version,
            modified_us=found.info.modified_us,
            date_us=date_us // 1_000_000 * 1_000_000 if self.dated else None,
        )

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
        store = self.store
        request, fault = self._begin("put", key, _condition(precondition), content)
        if (
            fault is not None
            and fault is Fault.SPURIOUS
            and not (isinstance(precondition, Matches) or key.startswith(_LOOKED_AT))
        ):
            fault = Fault.THROTTLED
        if store.on_put is not None:
            store.on_put(self, key, content)
        try:
            answer = await self._go(request, fault, lambda: store.write(key, content, precondition))
        except PreconditionFailedError:
            self._told(key, content, "412")
            raise
        except Exception:
            self._told(key, content, "refused" if request.answer.startswith("refused") else "none")
            raise
        self._told(key, content, "ok")
        return answer if self.dated else PutResult(version=answer.version, date_us=None)

    def _told(self, key: str, content: bytes, answer: str) -> None:
        if self.store.on_answer is not None:
            self.store.on_answer(key, content, answer)

    async def head(self, key: str) -> ObjectInfo:
        request, fault = self._begin("get", key, "head")
        (found,) = await self._go(request, fault, lambda: (self.store.objects.get(key),))
        if found is None:
            request.answer = "404"
            raise ObjectNotFoundError(f"no object {key!r}")
        return found.info

    async def list_pages(
        self, prefix: str = "", *, start_after: str | None = None, page_size: int = 1000
    ) -> AsyncIterator[list[ObjectInfo]]:
        after, store = start_after or "", self.store
        while True:
            request, fault = self._begin("list", prefix)
            at_s = None
            if fault is not None and fault is Fault.STALE:
                at_s = self._loop.now_s - (0 if prefix.startswith(_TRUTH) or not prefix else _STALE_S)
            found = await self._go(request, fault, partial(store.listed, prefix, after, at_s))
            page = found[:page_size]
            if page:
                yield page
            if len(page) < page_size:
                return
            after = page[-1].key

    async def delete(self, keys: Iterable[str]) -> DeleteResult:
        wanted = list(keys)
        if not wanted:
            return DeleteResult(deleted=0)
        request, fault = self._begin("delete", ",".join(wanted))
        kept = [key for key in wanted if self._rng.random() < 0.5] if fault is Fault.PARTIAL else []

        def execute() -> DeleteResult:
            for key in wanted:
                if key not in kept:
                    self.store.remove(key)
            return DeleteResult(deleted=len(wanted) - len(kept), failures=tuple((key, "SlowDown") for key in kept))

        return await self._go(request, fault, execute)

    async def copy(self, source: str, target: str) -> PutResult:
        request, fault = self._begin("copy", source, f"to {target}")

        def execute() -> PutResult | ObjectNotFoundError:
            found = self.store.objects.get(source)
            if found is None:
                return ObjectNotFoundError(f"no object {source!r}")
            return self.store.write(target, found.data, ANY)

        answer = await self._go(request, fault, execute)
        if isinstance(answer, ObjectNotFoundError):
            request.answer = "404"
            raise answer
        return answer

    async def aclose(self) -> None:
        return None

    @property
    def supports_writes(self) -> bool:
        return True

    def describe(self) -> str:
        return "simulation"


def _condition(precondition: Precondition) -> str:
    if isinstance(precondition, Absent):
        return "if absent"
    if isinstance(precondition, Matches):
        return f"if {precondition.version}"
    return ""
