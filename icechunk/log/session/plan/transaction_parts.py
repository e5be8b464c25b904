"""Transaction logs of commits that change very many chunks, in several objects.

Readers of the format take a limited number of tables in one file (the official library 50 million), and no file holds
more than 2 GiB. A snapshot of format 2 can name further transaction logs that count as its own: those of ancestors that
were expired. What does not fit into a commit's own log stands in such logs. Every reader that looks at history after an
expiration reads them: differences and conflicts are what they would be were all in one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from icechunk.format.by_node import Coords, num_rows
from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.values import TransactionLog

__all__ = ["MAX_CHUNKS", "in_parts"]

MAX_CHUNKS: Final = 2**23
"""Changed chunks in one log, at the most."""


def in_parts(
    log: TransactionLog, new_object_id: Callable[[], ObjectId], max_chunks: int = MAX_CHUNKS
) -> tuple[TransactionLog, list[TransactionLog]]:
    """A transaction log as it is, or in several.

    Parameters
    ----------
    log
        Of a commit.
    new_object_id
        Source of the ids of further logs.
    max_chunks
        In each of them.

    Returns
    -------
    own
        With the same id, and everything but chunks that others have.
    others
        To be named before it; none where all chunks fit into one.
    """
    if num_rows(log.updated_chunks) <= max_chunks:
        return log, []
    groups: list[dict[NodeId, Coords]] = [{}]
    room = max_chunks
    for node_id, coords in log.updated_chunks.items():
        first = 0
        while first < len(coords):
            if not room:
                groups.append({})
                room = max_chunks
            some = coords[first : first + room]
            groups[-1][node_id] = some
            first += len(some)
            room -= len(some)
    own = replace(log, updated_chunks=groups.pop())
    return own, [_chunks_only(new_object_id(), chunks) for chunks in groups]


def _chunks_only(id: ObjectId, chunks: Mapping[NodeId, Coords]) -> TransactionLog:
    return TransactionLog(id=id, updated_chunks=chunks)
