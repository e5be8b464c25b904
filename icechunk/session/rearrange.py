"""Changes of the whole picture: moving nodes, and shifting or reindexing the chunks of an array."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable
from contextlib import aclosing

import numpy as np
import numpy.typing as npt

from icechunk.errors import (
    ErrorKind,
    InvalidInputError,
    SessionStateError,
)
from icechunk.format.values import ChunkRefs, NodeSnapshot
from icechunk.log.session.columns import concat, normalized
from icechunk.log.session.reindexing import Reindex, reindexed, shifted
from icechunk.runtime.loops import run_sync
from icechunk.session.content import Content, absolute

__all__ = ["Arranging"]


class Arranging(Content):
    """Rearranges what is there, without copying any chunk."""

    async def move_async(self, from_path: str, to_path: str) -> None:
        """Move a node, with everything below it, to another path; no data moves.

        Parameters
        ----------
        from_path, to_path
            Absolute. There is nothing at the second yet, and it is not below the first; its parent is a group.

        Raises
        ------
        SessionStateError
            The session was not made by `Repository.rearrange_session` (kind ``non-rearrange-session``); or the
            second path is below the first (``move-into-self-or-descendant``), or has no parent that is a group
            (``move-destination-parent-missing``, ``move-destination-parent-not-group``).
        NodeNotFoundError
            There is nothing at the first path.
        AlreadyExistsError
            There is something at the second (kind ``move-wont-overwrite``).
        ReadOnlyError
            The session is read-only.
        """
        self.move(from_path, to_path)

    def move(self, from_path: str, to_path: str) -> None:
        """Synchronous twin of `move_async`."""
        with self._lock:
            self._require_changeable()
            if not self._rearrange:
                raise SessionStateError(
                    f"cannot move {from_path}: nodes are moved in sessions of their own; open one with "
                    "Repository.rearrange_session",
                    ErrorKind.NON_REARRANGE_SESSION,
                )
            self._log.move_node(absolute(from_path), absolute(to_path))

    async def shift_array_async(self, array_path: str, chunk_offset: Iterable[int]) -> None:
        """Move every chunk of an array by an offset; chunks that leave the grid are gone, and no data moves.

        Parameters
        ----------
        array_path
            Absolute.
        chunk_offset
            In chunks, for each dimension one number of either sign.

        Raises
        ------
        InvalidInputError
            Another number of dimensions (kind ``invalid-chunk-index``), or not an array (``not-an-array``).
        NodeNotFoundError
            There is nothing at this path.
        ReadOnlyError
            The session is read-only.
        """
        offset = tuple(operator.index(n) for n in chunk_offset)
        node, refs = await self._all_references(array_path)
        grid = [dimension.num_chunks for dimension in node.shape]
        if len(offset) != len(grid):
            raise InvalidInputError(
                f"cannot shift array {node.path!r} by {list(offset)}: it has {len(grid)} dimensions",
                ErrorKind.INVALID_CHUNK_INDEX,
            )
        if any(offset):
            self._replace_chunks(node, *shifted(refs, grid, offset))

    def shift_array(self, array_path: str, chunk_offset: Iterable[int]) -> None:
        """Synchronous twin of `shift_array_async`."""
        run_sync(self.shift_array_async(array_path, chunk_offset))

    async def reindex_array_async(self, array_path: str, forward: Reindex, backward: Reindex | None = None) -> None:
        """Move the chunks of an array to the places that a function says; no data moves.

        Parameters
        ----------
        array_path
            Absolute.
        forward
            Given the coordinates of a chunk, those that it moves to; None: nowhere.
        backward
            Given the coordinates of a chunk, those from which its place is filled: where there is nothing to fill it
            with, and nothing moves there, the chunk is deleted. Without it, it stays there too.

        Raises
        ------
        InvalidInputError
            ``forward`` gave coordinates outside the grid (kind ``invalid-chunk-index``), or not an array
            (``not-an-array``). Nothing has moved then, nor if one of the functions raises.
        NodeNotFoundError
            There is nothing at this path.
        ReadOnlyError
            The session is read-only.
        """
        node, refs = await self._all_references(array_path)
        grid = [dimension.num_chunks for dimension in node.shape]
        self._replace_chunks(node, *reindexed(refs, grid, forward, backward))

    def reindex_array(self, array_path: str, forward: Reindex, backward: Reindex | None = None) -> None:
        """Synchronous twin of `reindex_array_async`."""
        run_sync(self.reindex_array_async(array_path, forward, backward))

    async def _all_references(self, array_path: str) -> tuple[NodeSnapshot, ChunkRefs]:
        with self._lock:
            self._require_writable()
        node = self.require_array(absolute(array_path))
        grid = json.loads(node.user_data)["chunk_grid"]["name"]
        if grid != "regular":
            # Chunks of other sizes would land in places that their bytes do not fit.
            raise InvalidInputError(
                f"cannot rearrange the chunks of array {node.path!r}: that needs a regular chunk grid, and this is "
                f"{grid}",
                ErrorKind.INVALID_ARRAY_METADATA,
            )
        parts = [ChunkRefs.empty(len(node.shape))]
        async with aclosing(self.chunk_references(node.path)) as batches:
            async for refs in batches:
                parts.append(refs)
        return node, normalized(concat(parts))

    def _replace_chunks(self, node: NodeSnapshot, refs: ChunkRefs, vacated: npt.NDArray[np.uint32]) -> None:
        with self._lock:
            self._require_writable()
            before = self._log.savepoint()
            try:
                self._log.set_refs(node, refs)
                self._log.delete_chunks(node, vacated)
            except BaseException:
                self._log.rollback(before)
                raise
