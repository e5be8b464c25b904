"""Objects in a dictionary of this process.

Writes are serialised by one lock that is never held across an await, so `Absent` and `Matches` are
atomic among threads and event loops; reads take no lock, since a stored object is one immutable value.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Final, NoReturn

from icechunk.config import StorageSettings
from icechunk.errors import ErrorKind, InvalidInputError, ObjectNotFoundError, PreconditionFailedError
from icechunk.runtime.clock import SYSTEM, Sources
from icechunk.storage.port import (
    ANY,
    Absent,
    ByteRange,
    DeleteResult,
    GetResult,
    Matches,
    ObjectInfo,
    ObjectKind,
    Octets,
    Precondition,
    PutResult,
    Storage,
    Unchecked,
    Version,
    check_key,
    resolve_range,
)
from icechunk.storage.settings import local_settings

__all__ = ["MemoryStorage"]

_COPIED_BELOW: Final = 4096
"""Bytes."""


class MemoryStorage(Storage):
    """A storage in the memory of this process, kept as long as this object.

    Parameters
    ----------
    sources
        Its wall clock is the store's clock.
    name
        In messages.
    """

    def __init__(self, sources: Sources = SYSTEM, *, name: str = "") -> None:
        self._name = name
        self._wall_us = sources.wall_us
        self._objects: dict[str, tuple[ObjectInfo, bytes]] = {}
        self._writes = 0
        self._lock = threading.Lock()
        # Keys in ascending order, brought up to date by the next listing; None once a key was removed.
        self._sorted: list[str] | None = []
        self._added: list[str] = []

    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        found = self._objects.get(key)
        if found is None:
            raise self._not_found(key)
        info, data = found
        if byte_range is not None:
            start, stop = resolve_range(byte_range, info.size, key)
            data = data[start:stop]
        return GetResult(
            body=data, size=info.size, version=info.version, modified_us=info.modified_us, date_us=self._wall_us()
        )

    async def get_all(self, keys: Sequence[str]) -> list[GetResult | None]:
        found: list[GetResult | None] = []
        for key in keys:
            try:
                found.append(await self.get(key))
            except ObjectNotFoundError:
                found.append(None)
        return found

    async def put(
        self,
        key: str,
        data: bytes | bytearray | memoryview,
        precondition: Precondition = ANY,
        *,
        kind: ObjectKind = "metadata",
        metadata: Mapping[str, str] | None = None,
    ) -> PutResult:
        check_key(key)
        return self._write(key, bytes(data), precondition)

    def _write(self, key: str, content: bytes, precondition: Precondition) -> PutResult:
        now_us = self._wall_us()
        with self._lock:
            current = self._objects.get(key)
            match precondition:
                case Unchecked():
                    pass
                case Absent():
                    if current is not None:
                        raise PreconditionFailedError(f"cannot create {key!r} in memory: the object exists already")
                case Matches(version):
                    if current is None or current[0].version != version:
                        found = "it does not exist" if current is None else f"it is at version {current[0].version}"
                        raise PreconditionFailedError(f"cannot replace version {version} of {key!r} in memory: {found}")
            # Counted, never derived from the content, so that no sequence of writes brings a version back.
            self._writes += 1
            version = Version(str(self._writes))
            info = ObjectInfo(key=key, size=len(content), version=version, modified_us=now_us)
            self._objects[key] = (info, content)
            if current is None:
                self._added.append(key)
        return PutResult(version=version, date_us=now_us)

    async def head(self, key: str) -> ObjectInfo:
        found = self._objects.get(key)
        if found is None:
            raise self._not_found(key)
        return found[0]

    async def list_pages(
        self, prefix: str = "", *, start_after: str | None = None, page_size: int = 1000
    ) -> AsyncIterator[list[ObjectInfo]]:
        after = start_after
        while True:
            with self._lock:
                keys = self._sorted_keys()
                first = bisect_left(keys, prefix)
                if after is not None:
                    first = max(first, bisect_right(keys, after))
                page = [self._objects[key][0] for key in keys[first : first + page_size] if key.startswith(prefix)]
            if not page:
                return
            yield page
            if len(page) < page_size:
                return
            after = page[-1].key

    def _sorted_keys(self) -> list[str]:
        if self._sorted is None:
            self._sorted = sorted(self._objects)
        elif self._added:
            # Two runs in order, which sorting merges.
            self._sorted += sorted(self._added)
            self._sorted.sort()
        self._added.clear()
        return self._sorted

    async def delete(self, keys: Iterable[str]) -> DeleteResult:
        count = 0
        for key in keys:
            count += 1
            with self._lock:
                if self._objects.pop(key, None) is not None:
                    self._sorted = None
        return DeleteResult(deleted=count)

    async def copy(self, source: str, target: str) -> PutResult:
        found = await self.get(source)
        check_key(target)
        return self._write(target, found.data, ANY)

    async def aclose(self) -> None:
        return None

    @property
    def supports_writes(self) -> bool:
        return True

    @property
    def batches_reads(self) -> bool:
        return True

    @property
    def reads_nowait(self) -> bool:
        return True

    def read_nowait(self, key: str, start: int, end: int) -> Octets | None:
        found = self._objects.get(key)
        if found is None:
            return None
        # Objects never change, so that there is no need to copy them; a few bytes are copied in less time.
        return found[1][start:end] if end - start < _COPIED_BELOW else memoryview(found[1])[start:end]

    @property
    def gains_from_split_reads(self) -> bool:
        return False

    @property
    def clock_resolution_us(self) -> int:
        return 1

    def default_settings(self) -> StorageSettings:
        return local_settings(ideal_request_bytes=1)

    def describe(self) -> str:
        return f"memory://{self._name}" if self._name else "memory"

    def __repr__(self) -> str:
        return "<icechunk.Storage>\ntype: in-memory\n"

    def __reduce__(self) -> NoReturn:
        raise InvalidInputError(
            "cannot pickle an in-memory storage: its objects exist in this process only; use "
            "local_filesystem_storage or an object store to share a repository between processes",
            ErrorKind.PICKLE,
        )

    def _not_found(self, key: str) -> ObjectNotFoundError:
        return ObjectNotFoundError(f"no object {key!r} in memory")
