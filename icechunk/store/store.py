"""The Zarr store of a session."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Generic, Literal, Self

import numpy as np
from typing_extensions import TypeVar
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.common import BytesLike
from zarr.core.sync import SyncMixin

from icechunk.errors import ErrorKind, InvalidInputError, ReadOnlyError, SessionStateError
from icechunk.format.values import ChunkRefs, NodeKind, NodeSnapshot
from icechunk.runtime.pickles import instance_of_state
from icechunk.runtime.representation import fields_html
from icechunk.runtime.tasks import run_each
from icechunk.runtime.twins import run_sync
from icechunk.storage.port import ByteRange, Octets, Range, Suffix, clip
from icechunk.store.port import StoreSession
from icechunk.store.ranges import Joined, join_ranges
from icechunk.store.virtual_refs import VirtualRefs
from icechunk.store.zarr_keys import ChunkKey, MetadataKey, chunk_key_text, metadata_key_text, parse_key, to_path
from icechunk.transfer.assets import UNKNOWN, Unknown

S = TypeVar("S", bound=StoreSession, default=Any)
__all__ = ["IcechunkStore"]


_COPIED_LATE_BYTES = 8 * 1024
_MANY_RANGES = 4
"""So many ranges far apart in one call are what a selection needs; fewer are perhaps the next of a random reader's."""


class IcechunkStore(VirtualRefs, Store, SyncMixin, Generic[S]):
    """A session's hierarchy as a Zarr store.

    Made by `Session.store`. Keys are those of one Zarr 3 hierarchy: ``{path}/zarr.json`` and ``{path}/c/0/1``;
    anything else is refused with `InvalidInputError`. Deleting a node's ``zarr.json`` deletes the node and all
    below it. Safe to use from several event loops and threads.

    Parameters
    ----------
    session
        Where reads and writes go.
    read_only
        Refuse writes here even if the session takes them; None: as the session.
    """

    def __init__(self, session: S, read_only: bool | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(read_only=session.read_only if read_only is None else read_only)
        self._session = session
        self._content = session._content

    @classmethod
    def _opened(cls, session: S, read_only: bool | None = None) -> Self:
        """A store that is open: there is nothing to wait for."""
        store = cls(session, read_only)
        store._is_open = True
        return store

    @property
    def session(self) -> S:
        """The session that this store reads and writes."""
        return self._session

    @property
    def read_only(self) -> bool:
        """Whether writes are refused; true from the session's commit on."""
        return self._read_only or self._session.read_only

    def with_read_only(self, read_only: bool = False) -> IcechunkStore[S]:
        """A store on the same session that does, or does not, take writes.

        Raises
        ------
        ReadOnlyError
            Writes are asked for, but the session is read-only.
        """
        if not read_only and self._session.read_only:
            raise ReadOnlyError(
                "the session of this store is read-only; open a writable session on a branch to write",
                ErrorKind.READ_ONLY_SESSION,
            )
        return type(self)(self._session, read_only)

    # -- reading -------------------------------------------------------------------------------------------------

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Bytes of a key, or a range of them clamped to its size; None where there is nothing."""
        return await self._get(key, prototype, byte_range)

    async def _get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None, *, exact: bool = False
    ) -> Buffer | None:
        parsed = parse_key(key)
        data: Octets | None = None
        if type(parsed) is ChunkKey:
            data = await self._content.get_chunk(parsed.path, parsed.coords, _range(byte_range), exact=exact)
        elif type(parsed) is MetadataKey:
            data = self._document(parsed.path, _range(byte_range))
        return None if data is None else prototype.buffer.from_bytes(data)

    def _document(self, path: str, byte_range: ByteRange) -> Octets | None:
        node = self._content.node(path)
        if node is None or byte_range is None:
            return None if node is None else node.user_data
        return node.user_data[slice(*clip(byte_range, len(node.user_data)))]

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """As `get`, in the thread that calls: at once from memory or local disk, else by the background loop."""
        prototype = prototype or default_buffer_prototype()
        found = self._get_nowait(key, prototype, byte_range)
        return run_sync(self.get(key, prototype, byte_range)) if found is UNKNOWN else found

    def _get_nowait(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None
    ) -> Buffer | Unknown | None:
        parsed = parse_key(key)
        data: Octets | Unknown | None = None
        if type(parsed) is ChunkKey:
            asked = None if byte_range is None else _range(byte_range)
            data = self._content.get_chunk_nowait(parsed.path, parsed.coords, asked)
        elif type(parsed) is MetadataKey:
            data = self._document(parsed.path, _range(byte_range))
        return data if data is UNKNOWN or data is None else prototype.buffer.from_bytes(data)

    def set_sync(self, key: str, value: Buffer) -> None:
        """As `set`, in the thread that calls."""
        parsed = parse_key(key)
        if type(parsed) is ChunkKey and isinstance(value, Buffer):
            self._require_writable()
            if self._content.set_chunk_nowait(parsed.path, parsed.coords, _taken(value)):
                return
        run_sync(self.set(key, value))

    def delete_sync(self, key: str) -> None:
        """As `delete`, in the thread that calls."""
        self._delete(key)

    @property
    def _supports_sync_io(self) -> bool:
        # zarr's fused codec pipeline (zarr 3.3 and later) calls it, and is several times faster with it.
        return self._content.answers_nowait

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> builtins.list[Buffer | None]:
        """Several keys or ranges at once, in the order asked for."""
        wanted = list(key_ranges)
        found: builtins.list[Buffer | None] = [None] * len(wanted)

        async def fetch(i: int) -> None:
            key, byte_range = wanted[i]
            found[i] = await self.get(key, prototype, byte_range)

        await run_each(fetch, range(len(wanted)), limit=self._content.values_at_once)
        return found

    async def get_ranges(
        self,
        key: str,
        byte_ranges: Sequence[ByteRequest | None],
        *,
        prototype: BufferPrototype,
        max_concurrency: int | None = None,
        max_gap_bytes: int = 1 << 20,
        max_coalesced_bytes: int = 16 << 20,
    ) -> AsyncGenerator[Sequence[tuple[int, Buffer | None]], None]:
        """Many ranges of one key, as zarr reads the inner chunks of a shard.

        Parameters
        ----------
        key
            A chunk's, or a node's document.
        byte_ranges
            None: the whole value.
        max_concurrency
            Number of requests at the same time; None: as of `get_partial_values`, by default 256.
        max_gap_bytes, max_coalesced_bytes
            Ranges with at most so many bytes between them are read by one request, of at most so many bytes.

        Yields
        ------
        sequence of (int, Buffer)
            For each request, when it is answered: the place in ``byte_ranges`` and the bytes, clamped to the value.

        Raises
        ------
        BaseExceptionGroup
            With `FileNotFoundError` if the key has no value, else with what `get` raises; what is still being read is
            cancelled.
        """
        for each in byte_ranges:
            _range(each)
        at_once = asyncio.Semaphore(max_concurrency or self._content.values_at_once)

        async def fetch(joined: Joined) -> Sequence[tuple[int, Buffer | None]]:
            async with at_once:
                value = await self._get(key, prototype, joined.request, exact=exact)
            if value is None:
                raise FileNotFoundError(key)
            return [(i, value[part]) for i, part in joined.parts]

        planned = join_ranges(byte_ranges, max_gap_bytes=max_gap_bytes, max_joined_bytes=max_coalesced_bytes)
        exact = len(planned) >= _MANY_RANGES
        fetches = [asyncio.ensure_future(fetch(joined)) for joined in planned]
        try:
            for answered in asyncio.as_completed(fetches):
                yield await answered
        except Exception as error:
            raise BaseExceptionGroup(f"cannot read {len(byte_ranges)} ranges of {key!r}", [error]) from None
        finally:
            for task in fetches:
                task.cancel()
            await asyncio.gather(*fetches, return_exceptions=True)

    def get_ranges_sync(
        self,
        key: str,
        byte_ranges: Sequence[ByteRequest | None],
        *,
        prototype: BufferPrototype,
        max_gap_bytes: int = 1 << 20,
        max_coalesced_bytes: int = 16 << 20,
    ) -> Sequence[tuple[int, Buffer | None]]:
        """As `get_ranges`, in the thread that calls: at once from memory or local disk, else by the background loop."""
        sizes = {"max_gap_bytes": max_gap_bytes, "max_coalesced_bytes": max_coalesced_bytes}

        async def collect() -> Sequence[tuple[int, Buffer | None]]:
            return [
                pair async for some in self.get_ranges(key, byte_ranges, prototype=prototype, **sizes) for pair in some
            ]

        found: builtins.list[tuple[int, Buffer | None]] = []
        for joined in join_ranges(byte_ranges, max_gap_bytes=max_gap_bytes, max_joined_bytes=max_coalesced_bytes):
            value = self._get_nowait(key, prototype, joined.request)
            if value is UNKNOWN or value is None:
                # All of them together where one has to be waited for; an absent value is an error there too.
                return run_sync(collect())
            found += [(i, value[part]) for i, part in joined.parts]
        return found

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        wanted = list(requests)
        found: builtins.list[Buffer | None] = [None] * len(wanted)

        async def fetch(i: int) -> None:
            found[i] = await self.get(*wanted[i])

        await run_each(fetch, range(len(wanted)), limit=self._content.values_at_once)
        for (key, _, _), buffer in zip(wanted, found, strict=True):
            yield key, buffer

    async def exists(self, key: str) -> bool:
        """Whether a key has a value; nothing is fetched but, maybe, a manifest."""
        parsed = parse_key(key)
        if isinstance(parsed, ChunkKey):
            return await self._content.chunk_reference(parsed.path, parsed.coords) is not None
        return isinstance(parsed, MetadataKey) and self._content.node(parsed.path) is not None

    async def getsize(self, key: str) -> int:
        """Bytes of a key's value, from its reference: nothing is fetched. Raises `FileNotFoundError`."""
        parsed = parse_key(key)
        size: int | None = None
        if isinstance(parsed, ChunkKey):
            ref = await self._content.chunk_reference(parsed.path, parsed.coords)
            size = None if ref is None else ref.length
        elif isinstance(parsed, MetadataKey):
            node = self._content.node(parsed.path)
            size = None if node is None else len(node.user_data)
        if size is None:
            raise FileNotFoundError(f"no key {key!r} in this store")
        return size

    async def getsize_prefix(self, prefix: str) -> int:
        """Bytes of all values below a directory: metadata and chunks, from references only."""
        total = 0
        path = to_path(prefix)
        if (place := self._chunk_place(path)) is not None:
            async for refs in self._chunk_refs(*place):
                total += int(refs.length.sum())
            return total
        for node in self._content.nodes(path):
            total += len(node.user_data)
            if node.kind is NodeKind.ARRAY:
                async for refs in self._content.chunk_references(node.path):
                    total += int(refs.length.sum())
        return total

    # -- writing -------------------------------------------------------------------------------------------------

    @property
    def supports_writes(self) -> bool:
        """Stores of this kind take writes; see `read_only` for this one."""
        return True

    @property
    def supports_deletes(self) -> bool:
        """Keys can be deleted."""
        return True

    @property
    def supports_listing(self) -> bool:
        """Keys can be listed."""
        return True

    @property
    def supports_consolidated_metadata(self) -> bool:
        """Consolidated metadata would only repeat the contents of a snapshot."""
        return False

    async def set(self, key: str, value: Buffer) -> None:
        """Write a key. Returns when the bytes are taken; they are durable after the commit.

        Raises
        ------
        InvalidInputError
            The key does not belong to a Zarr 3 hierarchy, the metadata is not Zarr 3 metadata, or the chunk is
            not in the array's grid. Nothing is written.
        NodeNotFoundError
            A chunk of an array that does not exist.
        ReadOnlyError
            The store, or its session, is read-only.
        """
        await self._set(key, value, only_new=False)

    async def _set(self, key: str, value: Buffer, *, only_new: bool) -> None:
        self._require_writable()
        if not isinstance(value, Buffer):
            # In the words of zarr's own stores.
            raise TypeError(
                f"IcechunkStore.set(): `value` must be a Buffer instance. Got an instance of {type(value)} instead."
            )
        parsed = parse_key(key)
        if type(parsed) is ChunkKey:
            await self._content.set_chunk(parsed.path, parsed.coords, _taken(value), only_new=only_new)
        elif type(parsed) is MetadataKey:
            self._content.set_metadata(parsed.path, value.to_bytes(), only_new=only_new)
        else:
            raise SessionStateError(
                f"cannot write {key!r}: only the Zarr 3 format is supported, pass zarr_format=3",
                ErrorKind.UNIMPLEMENTED,
            )

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write a key unless it has a value; of several such calls at the same time one writes. Raises as `set`."""
        await self._set(key, value, only_new=True)

    @property
    def supports_partial_writes(self) -> Literal[False]:
        """Values are written as a whole."""
        return False

    async def set_partial_values(self, key_start_values: Iterable[tuple[str, int, BytesLike]]) -> None:
        """Not something that this store does. Raises `SessionStateError` (kind ``unimplemented``)."""
        raise SessionStateError(
            "cannot write a part of a value: set the whole value, or write through zarr", ErrorKind.UNIMPLEMENTED
        )

    async def delete(self, key: str) -> None:
        """Delete a key; one that has no value is fine. A node's metadata takes all below it along."""
        self._delete(key)

    def _delete(self, key: str) -> None:
        self._require_writable()
        parsed = parse_key(key)
        if isinstance(parsed, MetadataKey):
            self._content.delete_node(parsed.path)
        elif isinstance(parsed, ChunkKey):
            self._content.delete_chunk(parsed.path, parsed.coords)

    async def delete_dir(self, prefix: str) -> None:
        """Delete everything under a group or array, itself included; below ``{array}/c``, those chunks."""
        self._require_writable()
        path = to_path(prefix)
        if self._content.node(path) is not None:
            self._content.delete_node(path)
        elif (place := self._chunk_place(path)) is not None:
            node, coords = place
            async for found in self._chunk_coords(node, coords):
                self._content.delete_chunk(node.path, found)
        else:
            for node in self._content.nodes(path):
                self._content.delete_node(node.path)

    async def clear(self) -> None:
        """Delete everything."""
        self._require_writable()
        self._content.clear()

    def sync_clear(self) -> None:
        """Synchronous twin of `clear`."""
        run_sync(self.clear())

    # -- listing -------------------------------------------------------------------------------------------------

    async def is_empty(self, prefix: str) -> bool:
        """Whether no key starts with this directory."""
        # Closed here: asyncio closes an unfinished generator in a task of its own, at an unknown time.
        async with aclosing(self.list_dir(prefix)) as names:
            async for _ in names:
                return False
        return True

    def list(self) -> AsyncIterator[str]:
        """All keys: of each node its metadata, then its chunks."""
        return self._keys_under("/")

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """All keys that start with a prefix."""
        if prefix == "" or prefix.endswith("/"):
            async for key in self._keys_under(to_path(prefix)):
                yield key
            return
        parent = to_path(prefix.rpartition("/")[0])
        async for key in self._keys_under(parent):
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        """Names directly below a directory: of keys and of directories alike, each once."""
        path = to_path(prefix)
        node = self._content.node(path)
        if node is not None:
            yield "zarr.json"
        names = set(self._content.children(path))
        if node is not None and node.kind is NodeKind.ARRAY:
            # Listed with or without chunks, as other implementations do: to find out, manifests would have to be read.
            names.add("c")
        elif (place := self._chunk_place(path)) is not None:
            array, leading = place
            async for refs in self._chunk_refs(array, leading):
                names.update(map(str, np.unique(refs.coords[:, len(leading)]).tolist()))
        for name in sorted(names):
            yield name

    async def _keys_under(self, path: str) -> AsyncIterator[str]:
        if (place := self._chunk_place(path)) is not None:
            node, coords = place
            async for found in self._chunk_coords(node, coords):
                yield chunk_key_text(node.path, found)
            return
        for node in self._content.nodes(path):
            yield metadata_key_text(node.path)
            if node.kind is NodeKind.ARRAY:
                async for found in self._chunk_coords(node, ()):
                    yield chunk_key_text(node.path, found)

    def _chunk_place(self, path: str) -> tuple[NodeSnapshot, tuple[int, ...]] | None:
        """The array and leading coordinates that a directory such as ``/array/c/0`` means; None for any other."""
        if self._content.node(path) is not None:
            return None
        head, slash, tail = f"{path}/".rpartition("/c/")
        digits = [part for part in tail.split("/") if part]
        if not slash or not all(part.isascii() and part.isdigit() for part in digits):
            return None
        node = self._content.node(head or "/")
        leading = tuple(map(int, digits))
        if node is None or len(leading) >= len(node.shape) or max(leading, default=0) >> 32:
            return None
        return node, leading

    async def _chunk_refs(self, node: NodeSnapshot, leading: tuple[int, ...]) -> AsyncIterator[ChunkRefs]:
        async for refs in self._content.chunk_references(node.path):
            if leading:
                below = (refs.coords[:, : len(leading)] == np.array(leading, np.uint32)).all(axis=1)
                yield refs.take(np.flatnonzero(below))
            else:
                yield refs

    async def _chunk_coords(self, node: NodeSnapshot, leading: tuple[int, ...]) -> AsyncIterator[tuple[int, ...]]:
        async for refs in self._chunk_refs(node, leading):
            for row in refs.coords.tolist():
                yield tuple(row)

    # -- Python's protocols --------------------------------------------------------------------------------------

    def _require_writable(self) -> None:
        # The words before the colon are those of zarr's own stores: its tests, and others' handlers, know them.
        if self._read_only:
            raise ReadOnlyError(
                "store was opened in read-only mode and does not support writing: take one from a writable session",
                ErrorKind.READ_ONLY_STORE,
            )
        if self._session.read_only:
            raise ReadOnlyError(
                "store was opened in read-only mode and does not support writing: its session was committed; open "
                "another writable session on the branch",
                ErrorKind.READ_ONLY_STORE,
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, IcechunkStore):
            return NotImplemented
        return self._session is other._session or (
            self._session.read_only and other._session.read_only and self._session == other._session
        )

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return instance_of_state(self, self.__getstate__())

    def __getstate__(self) -> dict[str, Any]:
        # The session's own refusal names the remedy for a writable one.
        return {"session": self._session, "read_only": self._read_only}

    def __setstate__(self, state: dict[str, Any]) -> None:
        IcechunkStore.__init__(self, state["session"], state["read_only"])
        self._is_open = True

    def _summary(self) -> Sequence[tuple[str, object]]:
        session = self._session
        return (
            ("read_only", self.read_only),
            ("snapshot_id", session.snapshot_id),
            ("branch", session.branch),
        )

    def __repr__(self) -> str:
        return "\n".join(["<icechunk.IcechunkStore>", *(f"{name}: {value}" for name, value in self._summary())])

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return fields_html("icechunk.IcechunkStore", self._summary())


def _taken(value: Buffer) -> Octets:
    """The bytes of a value to be written: large ones are copied once there is room for the copy, not before."""
    return _bytes_of(value) if len(value) >= _COPIED_LATE_BYTES else value.to_bytes()


def _bytes_of(value: Buffer) -> bytes | memoryview:
    """The contents of a buffer: the ``bytes`` object itself if the buffer is made of one, as codecs' results are, which
    is immutable; else a view of memory that may be the user's array.
    """
    array = value.as_numpy_array()
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if type(base) is bytes and len(base) == array.nbytes and array.flags.c_contiguous:
        return base
    return array.data.cast("B")


def _range(request: ByteRequest | None) -> ByteRange:
    match request:
        case None:
            return None
        case RangeByteRequest(start, end) if start >= 0:
            return Range(start, max(start, end))
        case OffsetByteRequest(offset) if offset >= 0:
            return Range(offset)
        case SuffixByteRequest(suffix) if suffix >= 0:
            return Suffix(suffix)
    raise InvalidInputError(
        f"Unexpected byte_range, got {request!r}: one of zarr.abc.store's three requests, with no negative numbers, "
        "is needed",
        ErrorKind.INVALID_BYTE_RANGE,
    )
