"""`PySession`: a session without its ``store`` being zarr's."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator, Sequence
from typing import Any

from icechunk._icechunk_python.passing import Passed
from icechunk._icechunk_python.store import PyStore
from icechunk.conflicts import ConflictSolver
from icechunk.forking import ForkSession
from icechunk.session import Session
from icechunk.virtual import ChunkType

__all__ = ["PySession"]


class PySession:
    """A `Session` or `ForkSession`, as ``session._session`` hands it out."""

    def __init__(self, session: Session) -> None:
        self._wrapped = session

    all_virtual_chunk_locations = Passed(Session, "_wrapped")
    all_virtual_chunk_locations_async = Passed(Session, "_wrapped")
    branch = Passed(Session, "_wrapped")
    config = Passed(Session, "_wrapped")
    discard_changes = Passed(Session, "_wrapped")
    get_node_id = Passed(Session, "_wrapped")
    get_node_id_async = Passed(Session, "_wrapped")
    has_uncommitted_changes = Passed(Session, "_wrapped")
    mode = Passed(Session, "_wrapped")
    read_only = Passed(Session, "_wrapped")
    rebase = Passed(Session, "_wrapped")
    rebase_async = Passed(Session, "_wrapped")
    reindex_array = Passed(Session, "_wrapped")
    shift_array = Passed(Session, "_wrapped")
    snapshot_id = Passed(Session, "_wrapped")
    status = Passed(Session, "_wrapped")
    _repr_html_ = Passed(Session, "_wrapped")

    @classmethod
    def from_bytes(cls, bytes: bytes) -> PySession:
        """The session that `as_bytes` wrote. The bytes are a pickle: load only what you trust."""
        return cls(pickle.loads(bytes))

    def as_bytes(self) -> bytes:
        """The session, to go on with elsewhere; raises `ValueError` where it is writable and no fork."""
        return pickle.dumps(self._wrapped)

    @property
    def is_fork(self) -> bool:
        """Whether the session writes on behalf of another."""
        return isinstance(self._wrapped, ForkSession)

    @property
    def store(self) -> PyStore:
        """The store of the session."""
        return PyStore(self._wrapped.store)

    def fork(self) -> PySession:
        """`Session.fork`."""
        return PySession(self._wrapped.fork())

    def move_node(self, from_path: str, to_path: str) -> None:
        """`Session.move`."""
        self._wrapped.move(from_path, to_path)

    async def move_node_async(self, from_path: str, to_path: str) -> None:
        """`Session.move_async`."""
        await self._wrapped.move_async(from_path, to_path)

    async def chunk_coordinates(self, array_path: str, batch_size: int) -> AsyncIterator[list[list[int]]]:
        """`Session.chunk_coordinates` in lists of at most ``batch_size``."""
        batch: list[list[int]] = []
        async for coords in self._wrapped.chunk_coordinates(array_path, batch_size):
            batch.append(list(coords))
            if len(batch) >= batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def chunk_type(self, array_path: str, coords: Sequence[int]) -> ChunkType:
        """`Session.chunk_type`."""
        return self._wrapped.chunk_type(array_path, coords)

    async def chunk_type_async(self, array_path: str, coords: Sequence[int]) -> ChunkType:
        """`Session.chunk_type_async`."""
        return await self._wrapped.chunk_type_async(array_path, coords)

    def merge(self, other: PySession) -> None:
        """`Session.merge` of one fork."""
        self._wrapped.merge(other._wrapped)

    async def merge_async(self, other: PySession) -> None:
        """`Session.merge_async` of one fork."""
        await self._wrapped.merge_async(other._wrapped)

    def commit(
        self,
        message: str,
        metadata: dict[str, Any] | None = None,
        rebase_with: ConflictSolver | None = None,
        rebase_tries: int = 1000,
        allow_empty: bool = False,
    ) -> str:
        """`Session.commit` with its arguments by position."""
        return self._wrapped.commit(
            message, metadata, rebase_with=rebase_with, rebase_tries=rebase_tries, allow_empty=allow_empty
        )

    async def commit_async(
        self,
        message: str,
        metadata: dict[str, Any] | None = None,
        rebase_with: ConflictSolver | None = None,
        rebase_tries: int = 1000,
        allow_empty: bool = False,
    ) -> str:
        """`Session.commit_async` with its arguments by position."""
        return await self._wrapped.commit_async(
            message, metadata, rebase_with=rebase_with, rebase_tries=rebase_tries, allow_empty=allow_empty
        )

    def flush(self, message: str, metadata: dict[str, Any] | None = None) -> str:
        """`Session.flush` with its arguments by position."""
        return self._wrapped.flush(message, metadata=metadata)

    async def flush_async(self, message: str, metadata: dict[str, Any] | None) -> str:
        """`Session.flush_async` with its arguments by position."""
        return await self._wrapped.flush_async(message, metadata=metadata)

    def amend(self, message: str, metadata: dict[str, Any] | None = None, allow_empty: bool = False) -> str:
        """`Session.amend` with its arguments by position."""
        return self._wrapped.amend(message, metadata=metadata, allow_empty=allow_empty)

    async def amend_async(self, message: str, metadata: dict[str, Any] | None = None, allow_empty: bool = False) -> str:
        """`Session.amend_async` with its arguments by position."""
        return await self._wrapped.amend_async(message, metadata=metadata, allow_empty=allow_empty)

    def __eq__(self, other: object, /) -> bool:
        return self._wrapped == other._wrapped if isinstance(other, PySession) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._wrapped)
