"""Transaction logs of commits that change very many chunks, split into several objects.

Readers of the format accept a limited number of tables in one file (the official library 50 million), and no file holds
more than 2 GiB. A snapshot of format 2 can name further transaction logs that count as its own: those of ancestors that
have expired. Changes that do not fit into a commit's own log are written to such logs. Every reader that handles
history after an expiration reads them, so differences and conflicts are the same as with a single log.
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
"""Largest number of changed chunks in one log."""


def in_parts(
    log: TransactionLog, new_object_id: Callable[[], ObjectId], max_chunks: int = MAX_CHUNKS
) -> tuple[TransactionLog, list[TransactionLog]]:
    """Split a transaction log if it has too many changed chunks.

    Parameters
    ----------
    log
        The transaction log of a commit.
    new_object_id
        Source of the ids of further logs.
    max_chunks
        Largest number of changed chunks in each log.

    Returns
    -------
    own
        The log with the same id and everything except the chunks in ``others``.
    others
        Further logs, which the snapshot names before its own; empty if all chunks fit into one log.
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
