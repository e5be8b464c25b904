"""The part of a session that its store uses."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from icechunk.format.values import ChunkRef, ChunkRefs, NodeSnapshot
from icechunk.storage.port import ByteRange, Octets
from icechunk.transfer.assets import Unknown
from icechunk.virtual_access.locations import Prefixes

__all__ = ["Content", "StoreSession"]


class Content(Protocol):
    """Nodes and chunks of one session: its base snapshot with its changes on top.

    Paths begin with ``/``. Whatever writes raises `ReadOnlyError` or `SessionStateError` where the session takes no
    writes now, and has changed nothing then. Safe for several threads and event loops.
    """

    @property
    def values_at_once(self) -> int:
        """Number of values that one call for several of them fetches at the same time."""
        ...

    @property
    def virtual_prefixes(self) -> Prefixes:
        """The virtual chunk containers, by the prefix of their locations."""
        ...

    def node(self, path: str) -> NodeSnapshot | None:
        """The group or array at a path; None where there is none."""
        ...

    def require_array(self, path: str) -> NodeSnapshot:
        """The array at a path. Raises `NodeNotFoundError`, or `InvalidInputError` (kind ``not-an-array``)."""
        ...

    def nodes(self, under: str) -> list[NodeSnapshot]:
        """The node at a path and everything below it, in ascending order of path, as of one moment."""
        ...

    def children(self, path: str) -> list[str]:
        """Names directly below a path, ascending: of nodes, and of paths that only have nodes below them."""
        ...

    def set_metadata(self, path: str, document: bytes, *, only_new: bool = False) -> bool:
        """Create a node, or replace its zarr.json; False where ``only_new`` is given and there is a node already."""
        ...

    def delete_node(self, path: str) -> None:
        """Delete a node with everything below it; a node that does not exist is fine."""
        ...

    def clear(self) -> None:
        """Delete every node."""
        ...

    async def get_chunk(
        self, path: str, coords: tuple[int, ...], byte_range: ByteRange, *, exact: bool = False
    ) -> Octets | None:
        """Bytes of a chunk, or a clamped range of them; None where it was never written, or there is no array.

        ``exact``: this is one of many ranges that are all known to the caller, so nothing near it is read ahead.
        Raises `InvalidInputError` where the node is a group.
        """
        ...

    @property
    def answers_nowait(self) -> bool:
        """Whether most chunks are found sooner by `get_chunk_nowait` than by another thread."""
        ...

    def get_chunk_nowait(self, path: str, coords: tuple[int, ...], byte_range: ByteRange) -> Octets | Unknown | None:
        """As `get_chunk`, without waiting, or for no more than a read from local disk; `UNKNOWN` where it must wait."""
        ...

    def set_chunk_nowait(self, path: str, coords: tuple[int, ...], data: bytes | memoryview) -> bool:
        """As `set_chunk`, where the chunk is taken without waiting; False: nothing is written, `set_chunk` must be."""
        ...

    async def chunk_reference(self, path: str, coords: tuple[int, ...]) -> ChunkRef | None:
        """The reference of a chunk; None and errors as in `get_chunk`."""
        ...

    def chunk_references(self, path: str) -> AsyncGenerator[ChunkRefs, None]:
        """All references of an array: batches in no particular order, none twice; none where it is no array."""
        ...

    async def set_chunk(
        self, path: str, coords: tuple[int, ...], data: bytes | memoryview, *, only_new: bool = False
    ) -> bool:
        """Write a chunk, whose bytes are durable after the commit.

        Parameters
        ----------
        only_new
            Leave a chunk alone that exists. Of several such calls at the same time exactly one writes.

        Returns
        -------
        bool
            Whether the chunk was written.

        Raises
        ------
        InvalidInputError
            No such place in the array's grid (``invalid-chunk-index``), not an array (``not-an-array``), or no
            bytes (``zero-length-chunk``).
        NodeNotFoundError
            No array at this path.
        StorageError
            An earlier chunk could not be written.
        """
        ...

    def set_references(self, path: str, refs: ChunkRefs) -> None:
        """Write many references of an array at once; the columns belong to the session now.

        Raises `InvalidInputError` where one is outside the grid, or `NodeNotFoundError`: nothing is written then.
        """
        ...

    def delete_chunk(self, path: str, coords: tuple[int, ...]) -> None:
        """Delete a chunk; one that does not exist, or lies outside the grid, is fine."""
        ...


class StoreSession(Protocol):
    """The session of a store."""

    @property
    def read_only(self) -> bool:
        """Whether the session refuses writes."""
        ...

    @property
    def snapshot_id(self) -> str:
        """Id of the snapshot that the session is based on."""
        ...

    @property
    def branch(self) -> str | None:
        """The branch that a commit goes to; None where the session is read-only."""
        ...

    @property
    def _content(self) -> Content:
        # Not public; only the store uses it besides the session itself.
        ...
