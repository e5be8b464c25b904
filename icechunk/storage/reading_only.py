"""What storages that can only be read share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from icechunk.errors import ErrorKind, ReadOnlyError
from icechunk.storage.base import ANY, DeleteResult, ObjectKind, Precondition, PutResult, Storage

__all__ = ["ReadOnlyStorage"]


class ReadOnlyStorage(Storage):
    """A storage whose verbs that write are refused before anything is sent."""

    async def put(
        self,
        key: str,
        data: bytes | bytearray | memoryview,
        precondition: Precondition = ANY,
        *,
        kind: ObjectKind = "metadata",
        metadata: Mapping[str, str] | None = None,
    ) -> PutResult:
        raise self._read_only(f"write {key!r}")

    async def delete(self, keys: Iterable[str]) -> DeleteResult:
        raise self._read_only("delete objects")

    async def copy(self, source: str, target: str) -> PutResult:
        raise self._read_only(f"copy {source!r} to {target!r}")

    @property
    def supports_writes(self) -> bool:
        return False

    def _read_only(self, attempt: str) -> ReadOnlyError:
        return ReadOnlyError(
            f"cannot {attempt}: {self.describe()} can only be read; open the repository where it is kept to change it",
            ErrorKind.READ_ONLY_STORAGE,
        )
