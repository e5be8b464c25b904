"""Sessions: a committed snapshot, and in writable ones a log of changes on top of it.

A writable session goes through these states::

    writable ─ commit begins ─▶ committing ─ files written ─▶ swapping ─ landed ─▶ read-only, on the new snapshot
       ▲                            │                            │ │
       └──── refused or failed ─────┴────────────────────────────┘ └─ outcome unknown ─▶ unsettled

A rebase is a state of its own, between writable and writable; one that a commit does is part of the commit.

Who owns what: the session owns its log and its put pool. State changes are short critical sections under one
lock and never await, so loops and threads may share a session; what is written while a commit runs is refused,
never silently left out.

Nodes and chunks: what the store of a session is made of.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from enum import Enum
from typing import Any

import numpy as np

from icechunk.config import RepositoryConfig
from icechunk.errors import (
    ErrorKind,
    InvalidInputError,
    NodeNotFoundError,
    ReadOnlyError,
    SessionStateError,
)
from icechunk.format.ids import encode_id
from icechunk.format.values import NATIVE, VIRTUAL, ChunkRef, ChunkRefs, NodeKind, NodeSnapshot, Snapshot
from icechunk.log.repository.port import SwapToken
from icechunk.log.session.log import ABSENT, IN_BASE, Absent, InBase, SessionLog
from icechunk.ops import SessionMode
from icechunk.runtime.loops import run_sync
from icechunk.runtime.representation import fields_html
from icechunk.session.core import Core
from icechunk.session.read import base_references, read_chunk
from icechunk.snapshots import Diff
from icechunk.storage.port import ByteRange, Octets
from icechunk.transfer.assets import UNKNOWN
from icechunk.virtual import ChunkType
from icechunk.virtual_access.locations import Prefixes

__all__ = ["Content", "Phase", "SessionBase", "absolute"]


class Phase(Enum):
    """Where a session stands in its life."""

    READ_ONLY = "read-only"
    WRITABLE = "writable"
    COMMITTING = "committing"
    SWAPPING = "swapping"
    UNSETTLED = "unsettled"
    REBASING = "rebasing"


class SessionBase:
    """State and phases of a session, and what it says of itself."""

    def __init__(
        self,
        core: Core,
        base: Snapshot,
        *,
        branch: str | None = None,
        since_us: int = 0,
        rearrange: bool = False,
    ) -> None:
        self._core = core
        self._rearrange = rearrange
        self._log = SessionLog(base, core.sources.new_node_id)
        self._branch = branch
        self._phase = Phase.READ_ONLY if branch is None else Phase.WRITABLE
        self._since_us = since_us
        self._sent: SwapToken | None = None
        self._puts = core.packs()
        self._discards = 0
        self._lock = threading.Lock()

    @property
    def read_only(self) -> bool:
        """Whether it refuses writes; true for a writable session after its commit."""
        return self._phase is Phase.READ_ONLY

    @property
    def mode(self) -> SessionMode:
        """Whether the session is for reading, for writing, or for moving nodes only."""
        if self.read_only:
            return SessionMode.readonly
        return SessionMode.rearrange if self._rearrange else SessionMode.writable

    @property
    def snapshot_id(self) -> str:
        """The snapshot that the session stands on; after a commit the new one."""
        return encode_id(self._log.base.id)

    @property
    def branch(self) -> str | None:
        """The branch that a commit goes to; None where the session is read-only."""
        return self._branch

    @property
    def unsettled_commit(self) -> SwapToken | None:
        """Token, for `Repository.settle`, of a commit whose outcome is not known; else None.

        A commit that was cancelled, or interrupted, while its swap was under way leaves one. If it turns out that the
        commit did not land, the session is writable again.
        """
        return self._sent if self._phase is Phase.UNSETTLED else None

    @property
    def has_uncommitted_changes(self) -> bool:
        """Whether a commit would have something to say."""
        with self._lock:
            return not self._log.is_empty

    @property
    def config(self) -> RepositoryConfig:
        """The repository's configuration."""
        return self._core.config

    def status(self) -> Diff:
        """What a commit would change."""
        with self._lock:
            return Diff.of(self._log.changes())

    @property
    def _kind(self) -> str:
        return "a read-only session"

    def _require_writable(self) -> None:
        self._require_changeable()
        if self._rearrange:
            raise SessionStateError(
                "this session was opened to rearrange the hierarchy, and takes no other changes; commit it or leave "
                "it, and open an ordinary writable session",
                ErrorKind.REARRANGE_SESSION_ONLY,
            )

    def _require_changeable(self) -> None:
        match self._phase:
            case Phase.READ_ONLY:
                raise ReadOnlyError("this session is read-only; open a writable session on a branch to change anything")
            case Phase.COMMITTING | Phase.SWAPPING:
                raise SessionStateError("a commit of this session is running; wait for it before writing")
            case Phase.REBASING:
                raise SessionStateError("a rebase of this session is running; wait for it before writing")
            case Phase.UNSETTLED:
                raise SessionStateError(
                    "the outcome of this session's commit is not known: Repository.settle(session.unsettled_commit) "
                    "finds out; then open a new session"
                )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SessionBase):
            return NotImplemented
        if self is other:
            return True
        both_read_only = self.read_only and other.read_only
        return both_read_only and self._log.base.id == other._log.base.id and self._core.storage == other._core.storage

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        if not self.read_only:
            raise ValueError(
                "a writable session cannot be pickled: two processes would write one history without knowing of "
                "each other. Use Session.fork() to hand work to other processes, and merge what comes back"
            )
        return {"core": self._core, "base": self._log.base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        SessionBase.__init__(self, state["core"], state["base"])

    def _summary(self) -> list[tuple[str, object]]:
        return [
            ("read_only", self.read_only),
            ("snapshot_id", self.snapshot_id),
            *(
                []
                if self.read_only
                else [("branch", self._branch), ("has_uncommitted_changes", self.has_uncommitted_changes)]
            ),
        ]

    def __repr__(self) -> str:
        return "\n".join(["<icechunk.session.Session>", *(f"{name}: {value}" for name, value in self._summary())])

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return fields_html("icechunk.session.Session", self._summary())


def absolute(path: str) -> str:
    if not path.startswith("/"):
        raise InvalidInputError(f"path {path!r} must start with '/'", ErrorKind.INVALID_PATH)
    return path.rstrip("/") or "/"


class Content(SessionBase):
    """Reading and writing one node or chunk at a time."""

    def require_array(self, path: str) -> NodeSnapshot:
        """The array at a path, as this session sees it. Raises `NodeNotFoundError` or `InvalidInputError`."""
        node = self._log.node(path)
        if node is None:
            raise NodeNotFoundError(f"node not found at {path!r}; create the array before its chunks")
        require_array_node(node)
        return node

    @property
    def hierarchy(self) -> SessionLog:
        """The fold of this session's changes over its snapshot; change nothing through it, and nobody may meanwhile."""
        return self._log

    def node(self, path: str) -> NodeSnapshot | None:
        """The group or array at a path; None where there is none."""
        return self._log.node(path)

    def nodes(self, under: str) -> list[NodeSnapshot]:
        """The node at a path and everything below it, ascending; as of one moment, whoever else is writing."""
        with self._lock:
            return list(self._log.nodes(under))

    def children(self, path: str) -> list[str]:
        """Names directly below a path, ascending: of nodes, and of what only has nodes below it; as of one moment."""
        with self._lock:
            return self._log.children(path, implied=True)

    def set_metadata(self, path: str, document: bytes) -> None:
        """Create a node, or replace its zarr.json."""
        with self._lock:
            self._require_writable()
            self._log.set_metadata(path, document)

    def delete_node(self, path: str) -> None:
        """Delete a node with all below it; a node that does not exist is fine."""
        with self._lock:
            self._require_writable()
            if self._log.node(path) is not None:
                self._log.delete_node(path)

    def delete_chunk(self, path: str, coords: tuple[int, ...]) -> None:
        """Delete a chunk; one that does not exist, or lies outside the grid, is fine."""
        with self._lock:
            self._require_writable()
            node = self._log.node(path)
            if node is not None and node.kind is NodeKind.ARRAY and in_grid(node, coords):
                self._log.delete_chunk(node, coords)

    def clear(self) -> None:
        """Delete every node."""
        with self._lock:
            self._require_writable()
            self._log.clear()

    async def set_chunk(self, path: str, coords: tuple[int, ...], data: bytes | memoryview) -> None:
        """Write a chunk: small ones stand in the log, others are on their way when this returns.

        Raises
        ------
        InvalidInputError
            No such place in the array's grid (``invalid-chunk-index``), not an array (``not-an-array``), or no
            bytes (``zero-length-chunk``).
        NodeNotFoundError
            No array at this path.
        StorageError
            An earlier chunk could not be written; see `PutPool.put`.
        """
        if len(data) <= self._core.settings.inline_threshold_bytes:
            with self._lock:
                self._require_writable()
                node = self._check_chunk(path, coords, data)
                self._log.set_inline(node, coords, bytes(data))
            return
        while True:
            with self._lock:
                self._require_writable()
                node = self._check_chunk(path, coords, data)
                place = self._puts.put_nowait(data)
                if place is not None:
                    self._log.set_native(node, coords, *place, len(data))
                    return
                discards = self._discards
            chunk_id, offset = await self._puts.put(data)
            with self._lock:
                # While the pool was full the session may have been committed, or the array deleted.
                self._require_writable()
                node = self._check_chunk(path, coords, data)
                if self._discards == discards:
                    self._log.set_native(node, coords, chunk_id, offset, len(data))
                    return

    def set_references(self, path: str, refs: ChunkRefs) -> None:
        """Write many references of an array at once; the columns belong to the session now.

        Raises `InvalidInputError` where one is outside the grid, or `NodeNotFoundError`: nothing is written then.
        """
        with self._lock:
            self._require_writable()
            self._log.set_refs(self.require_array(path), refs)

    @property
    def values_at_once(self) -> int:
        """Values that a call for several of them fetches at the same time."""
        return self._core.settings.partial_values_at_once

    @property
    def virtual_prefixes(self) -> Prefixes:
        """The virtual chunk containers, by what their locations begin with."""
        return self._core.virtual.prefixes

    def _check_chunk(self, path: str, coords: tuple[int, ...], data: bytes | memoryview) -> NodeSnapshot:
        node = self.require_array(path)
        if not in_grid(node, coords):
            raise InvalidInputError(
                f"no chunk {list(coords)} in the grid of array {path!r}; resize the array before writing there",
                ErrorKind.INVALID_CHUNK_INDEX,
            )
        if not data:
            raise InvalidInputError(
                f"chunk {list(coords)} of array {path!r} has no bytes; delete it instead", ErrorKind.ZERO_LENGTH_CHUNK
            )
        return node

    async def get_chunk(self, path: str, coords: tuple[int, ...], byte_range: ByteRange) -> Octets | None:
        """Bytes of a chunk, or a clamped range of them; None where it was never written, or there is no array.

        Raises `InvalidInputError` where the node is a group.
        """
        node, found = self._look_up(path, coords)
        if found is IN_BASE:
            assert node is not None
            assets = self._core.assets
            ref = assets.reference_nowait(node, coords)
            if ref is UNKNOWN:
                ref = await assets.reference(node, coords, reading=True)
            elif ref is not None and ref.kind == NATIVE and byte_range is None:
                # Most chunks of who reads in order are here already.
                assert ref.chunk_id is not None
                data = assets.chunk_nowait(ref.chunk_id, ref.offset, ref.offset + ref.length)
                if data is not None:
                    return data
        else:
            ref = None if found is ABSENT else found
        return None if ref is None else await read_chunk(self._core, self._puts, ref, byte_range)

    async def chunk_reference(self, path: str, coords: tuple[int, ...]) -> ChunkRef | None:
        """The reference of a chunk; None and errors as in `get_chunk`."""
        node, found = self._look_up(path, coords)
        if found is IN_BASE:
            assert node is not None
            return await self._core.assets.reference(node, coords)
        return None if found is ABSENT else found

    def _look_up(self, path: str, coords: tuple[int, ...]) -> tuple[NodeSnapshot | None, ChunkRef | Absent | InBase]:
        with self._lock:
            # Node and reference from the same log: a commit on another thread replaces it.
            node = self._log.node(path)
            if node is None:
                return None, ABSENT
            require_array_node(node)
            return node, self._log.chunk(node, coords)

    async def chunk_references(self, path: str) -> AsyncGenerator[ChunkRefs, None]:
        """All references of an array: batches in no particular order, none twice; none where it is no array."""
        with self._lock:
            node = self._log.node(path)
            if node is None or node.kind is not NodeKind.ARRAY:
                return
            written, deleted = self._log.overlay(node)
        if len(written):
            yield written
        async for refs in base_references(self._core, node, np.concatenate([written.coords, deleted])):
            yield refs

    async def get_node_id_async(self, path: str) -> str:
        """The id of the node at an absolute path, which it keeps for life. Raises `NodeNotFoundError`."""
        node = self._log.node(absolute(path))
        if node is None:
            raise NodeNotFoundError(f"node not found at {path!r}")
        return encode_id(node.id)

    def get_node_id(self, path: str) -> str:
        """Synchronous twin of `get_node_id_async`."""
        return run_sync(self.get_node_id_async(path))

    async def all_virtual_chunk_locations_async(self) -> list[str]:
        """The location of every virtual chunk in this session's view, one for each: those of one object repeat.

        Locations relative to a container are resolved. Raises `InvalidInputError` where that container is not
        configured (kind ``no-container-for-virtual-chunk``).
        """
        found: list[str] = []
        for node in list(self._log.nodes()):
            async with aclosing(self.chunk_references(node.path)) as batches:
                async for refs in batches:
                    # What of the table is not used need not resolve.
                    rows = refs.location[refs.kind == VIRTUAL]
                    urls = {row: self.virtual_prefixes.absolute(refs.locations[row]) for row in set(rows.tolist())}
                    found += [urls[row] for row in rows.tolist()]
        return found

    def all_virtual_chunk_locations(self) -> list[str]:
        """Synchronous twin of `all_virtual_chunk_locations_async`."""
        return run_sync(self.all_virtual_chunk_locations_async())

    async def chunk_coordinates(self, array_path: str, batch_size: int = 1000) -> AsyncIterator[tuple[int, ...]]:
        """Coordinates of every chunk of an array that exists, in no particular order."""
        path = self.require_array(absolute(array_path)).path
        async with aclosing(self.chunk_references(path)) as batches:
            async for refs in batches:
                for row in refs.coords.tolist():
                    yield tuple(row)

    async def chunk_type_async(self, array_path: str, chunk_coordinates: Sequence[int]) -> ChunkType:
        """How a chunk is kept: inline, native, virtual, or not at all (``uninitialized``)."""
        path = self.require_array(absolute(array_path)).path
        ref = await self.chunk_reference(path, tuple(chunk_coordinates))
        if ref is None:
            return ChunkType.uninitialized
        return {NATIVE: ChunkType.native, VIRTUAL: ChunkType.virtual}.get(ref.kind, ChunkType.inline)

    def chunk_type(self, array_path: str, chunk_coordinates: Sequence[int]) -> ChunkType:
        """Synchronous twin of `chunk_type_async`."""
        return run_sync(self.chunk_type_async(array_path, chunk_coordinates))


def require_array_node(node: NodeSnapshot) -> None:
    if node.kind is not NodeKind.ARRAY:
        raise InvalidInputError(f"the node at {node.path!r} is a group, not an array", ErrorKind.NOT_AN_ARRAY)


def in_grid(node: NodeSnapshot, coords: tuple[int, ...]) -> bool:
    if len(coords) != len(node.shape):
        return False
    for coord, dimension in zip(coords, node.shape, strict=True):  # noqa: SIM110  # for every chunk: all() costs twice
        if coord >= dimension.num_chunks:
            return False
    return True
