"""`PyStore`: a store in plain bytes and tuples, without zarr's buffers."""

from __future__ import annotations

import builtins
import pickle
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, default_buffer_prototype

from icechunk._icechunk_python.passing import Passed
from icechunk.errors import ErrorKind, NotFoundError
from icechunk.store import IcechunkStore
from icechunk.virtual import VirtualChunkSpec

if TYPE_CHECKING:
    from icechunk._icechunk_python.session import PySession

__all__ = ["PyStore"]


class PyStore:
    """An `IcechunkStore`, as ``store._store`` hands it out."""

    def __init__(self, store: IcechunkStore) -> None:
        self._wrapped = store

    clear = Passed(IcechunkStore, "_wrapped")
    delete = Passed(IcechunkStore, "_wrapped")
    delete_dir = Passed(IcechunkStore, "_wrapped")
    exists = Passed(IcechunkStore, "_wrapped")
    getsize = Passed(IcechunkStore, "_wrapped")
    getsize_prefix = Passed(IcechunkStore, "_wrapped")
    is_empty = Passed(IcechunkStore, "_wrapped")
    list = Passed(IcechunkStore, "_wrapped")
    list_dir = Passed(IcechunkStore, "_wrapped")
    list_prefix = Passed(IcechunkStore, "_wrapped")
    read_only = Passed(IcechunkStore, "_wrapped")
    supports_consolidated_metadata = Passed(IcechunkStore, "_wrapped")
    supports_deletes = Passed(IcechunkStore, "_wrapped")
    supports_listing = Passed(IcechunkStore, "_wrapped")
    supports_partial_writes = Passed(IcechunkStore, "_wrapped")
    supports_writes = Passed(IcechunkStore, "_wrapped")
    sync_clear = Passed(IcechunkStore, "_wrapped")
    array_chunk_iterator = Passed(IcechunkStore, "_wrapped")
    _repr_html_ = Passed(IcechunkStore, "_wrapped")

    @classmethod
    def from_bytes(cls, bytes: bytes) -> PyStore:
        """The store that `as_bytes` wrote. The bytes are a pickle: load only what you trust."""
        return cls(pickle.loads(bytes))

    def as_bytes(self) -> bytes:
        """The store, to go on with elsewhere; raises `ValueError` where its session is writable."""
        return pickle.dumps(self._wrapped)

    @property
    def session(self) -> PySession:
        """The session of the store."""
        from icechunk._icechunk_python.session import PySession

        return PySession(self._wrapped.session)

    async def get(self, key: str, byte_range: tuple[int | None, int | None] | None = None) -> bytes:
        """Bytes of a key, or a range of them.

        Parameters
        ----------
        byte_range
            Start and end; without an end from the start on, without a start that many of the last bytes.

        Raises
        ------
        NotFoundError
            There is nothing (kind ``key-not-found``).
        """
        found = await self._wrapped.get(key, default_buffer_prototype(), _request(byte_range))
        if found is None:
            raise NotFoundError(f"key {key!r} is not in this store", ErrorKind.KEY_NOT_FOUND)
        return found.to_bytes()

    async def get_partial_values(
        self, key_ranges: Iterable[tuple[str, tuple[int | None, int | None]]]
    ) -> builtins.list[bytes | None]:
        """Ranges of several keys at once; None where there is nothing."""
        wanted = [(key, _request(byte_range)) for key, byte_range in key_ranges]
        found = await self._wrapped.get_partial_values(default_buffer_prototype(), wanted)
        return [None if buffer is None else buffer.to_bytes() for buffer in found]

    async def set(self, key: str, value: bytes | bytearray | memoryview) -> None:
        """Write a key; errors as from `IcechunkStore.set`."""
        await self._wrapped.set(key, _buffer(value))

    async def set_if_not_exists(self, key: str, value: bytes | bytearray | memoryview) -> None:
        """Write a key unless it has a value."""
        await self._wrapped.set_if_not_exists(key, _buffer(value))

    async def set_partial_values(self, key_start_values: Iterable[tuple[str, int, bytes]]) -> None:
        """Refused, as by every store that does not support partial writes."""
        await self._wrapped.set_partial_values(key_start_values)

    async def set_virtual_ref_async(
        self,
        key: str,
        location: str,
        offset: int,
        length: int,
        checksum: str | datetime | None,
        validate_container: bool,
    ) -> None:
        """`IcechunkStore.set_virtual_ref_async` with its arguments by position."""
        await self._wrapped.set_virtual_ref_async(
            key, location, offset=offset, length=length, checksum=checksum, validate_container=validate_container
        )

    def set_virtual_ref(
        self,
        key: str,
        location: str,
        offset: int,
        length: int,
        checksum: str | datetime | None,
        validate_container: bool,
    ) -> None:
        """Synchronous twin of `set_virtual_ref_async`."""
        self._wrapped.set_virtual_ref(
            key, location, offset=offset, length=length, checksum=checksum, validate_container=validate_container
        )

    async def set_virtual_refs_async(
        self, array_path: str, chunks: builtins.list[VirtualChunkSpec], validate_containers: bool
    ) -> builtins.list[tuple[int, ...]] | None:
        """`IcechunkStore.set_virtual_refs_async` with its arguments by position."""
        return await self._wrapped.set_virtual_refs_async(array_path, chunks, validate_containers=validate_containers)

    def set_virtual_refs(
        self, array_path: str, chunks: builtins.list[VirtualChunkSpec], validate_containers: bool
    ) -> builtins.list[tuple[int, ...]] | None:
        """Synchronous twin of `set_virtual_refs_async`."""
        return self._wrapped.set_virtual_refs(array_path, chunks, validate_containers=validate_containers)

    async def set_virtual_refs_arr_async(
        self,
        array_path: str,
        chunk_grid_shape: Sequence[int],
        locations: builtins.list[str],
        offsets: np.ndarray[Any, np.dtype[np.uint64]],
        lengths: np.ndarray[Any, np.dtype[np.uint64]],
        *,
        validate_containers: bool = True,
        arr_offset: Sequence[int] | None = None,
        checksum: datetime | str | None = None,
    ) -> builtins.list[tuple[int, ...]] | None:
        """`IcechunkStore.set_virtual_refs_arr_async` with lists for tuples."""
        return await self._wrapped.set_virtual_refs_arr_async(
            array_path,
            tuple(chunk_grid_shape),
            locations,
            offsets,
            lengths,
            validate_containers=validate_containers,
            arr_offset=None if arr_offset is None else tuple(arr_offset),
            checksum=checksum,
        )

    def set_virtual_refs_arr(
        self,
        array_path: str,
        chunk_grid_shape: Sequence[int],
        locations: builtins.list[str],
        offsets: np.ndarray[Any, np.dtype[np.uint64]],
        lengths: np.ndarray[Any, np.dtype[np.uint64]],
        *,
        validate_containers: bool = True,
        arr_offset: Sequence[int] | None = None,
        checksum: datetime | str | None = None,
    ) -> builtins.list[tuple[int, ...]] | None:
        """Synchronous twin of `set_virtual_refs_arr_async`."""
        return self._wrapped.set_virtual_refs_arr(
            array_path,
            tuple(chunk_grid_shape),
            locations,
            offsets,
            lengths,
            validate_containers=validate_containers,
            arr_offset=None if arr_offset is None else tuple(arr_offset),
            checksum=checksum,
        )

    def __eq__(self, other: object, /) -> bool:
        return self._wrapped == other._wrapped if isinstance(other, PyStore) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._wrapped)


def _buffer(value: bytes | bytearray | memoryview) -> Buffer:
    return default_buffer_prototype().buffer.from_bytes(bytes(value))


def _request(byte_range: tuple[int | None, int | None] | None) -> ByteRequest | None:
    match byte_range:
        case None | (None, None):
            return None
        case (int(start), None):
            return OffsetByteRequest(start)
        case (None, int(count)):
            return SuffixByteRequest(count)
        case (int(start), int(end)):
            return RangeByteRequest(start, end)
    raise TypeError(f"a byte range is a pair of integers or None, not {byte_range!r}")
