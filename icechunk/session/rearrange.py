"""Rearranging without copying a chunk: moving nodes, and shifting or reindexing the chunks of an array."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import aclosing

import numpy as np
import numpy.typing as npt

from icechunk.errors import ErrorKind, InvalidInputError, SessionStateError
from icechunk.format.values import ChunkRefs, NodeSnapshot
from icechunk.log.session.columns import concat, normalized
from icechunk.log.session.reindexing import Reindex, reindexed, shifted
from icechunk.session.content import SessionContent, absolute

__all__ = ["move", "reindex_array", "shift_array"]


def move(content: SessionContent, source: str, target: str) -> None:
    """Move a node with everything below it, as `Session.move_async` says."""
    with content.lock:
        content.require_changeable()
        if not content.rearrange:
            raise SessionStateError(
                f"cannot move {source}: nodes are moved in sessions of their own; open one with "
                "Repository.rearrange_session",
                ErrorKind.NON_REARRANGE_SESSION,
            )
        content.log.move_node(absolute(source), absolute(target))


async def shift_array(content: SessionContent, path: str, offset: Sequence[int]) -> None:
    """Move every chunk of an array by an offset, as `Session.shift_array_async` says."""
    node, refs = await _all_references(content, path)
    grid = [dimension.num_chunks for dimension in node.shape]
    if len(offset) != len(grid):
        raise InvalidInputError(
            f"cannot shift array {node.path!r} by {list(offset)}: it has {len(grid)} dimensions",
            ErrorKind.INVALID_CHUNK_INDEX,
        )
    if any(offset):
        _replace_chunks(content, node, *shifted(refs, grid, tuple(offset)))


async def reindex_array(content: SessionContent, path: str, forward: Reindex, backward: Reindex | None) -> None:
    """Move the chunks of an array where a function says, as `Session.reindex_array_async` says."""
    node, refs = await _all_references(content, path)
    grid = [dimension.num_chunks for dimension in node.shape]
    _replace_chunks(content, node, *reindexed(refs, grid, forward, backward))


async def _all_references(content: SessionContent, path: str) -> tuple[NodeSnapshot, ChunkRefs]:
    with content.lock:
        content.require_writable()
    node = content.require_array(absolute(path))
    grid = json.loads(node.user_data)["chunk_grid"]["name"]
    if grid != "regular":
        # Chunks of other sizes would land in places that their bytes do not fit.
        raise InvalidInputError(
            f"cannot rearrange the chunks of array {node.path!r}: that needs a regular chunk grid, and this is {grid}",
            ErrorKind.INVALID_ARRAY_METADATA,
        )
    parts = [ChunkRefs.empty(len(node.shape))]
    async with aclosing(content.chunk_references(node.path)) as batches:
        async for refs in batches:
            parts.append(refs)
    return node, normalized(concat(parts))


def _replace_chunks(
    content: SessionContent, node: NodeSnapshot, refs: ChunkRefs, vacated: npt.NDArray[np.uint32]
) -> None:
    with content.lock:
        content.require_writable()
        before = content.log.savepoint()
        try:
            content.log.set_refs(node, refs)
            content.log.delete_chunks(node, vacated)
        except BaseException:
            content.log.rollback(before)
            raise
