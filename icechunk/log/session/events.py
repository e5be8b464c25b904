"""The events of a session's log.

An event names nodes by id, which survives moves and changes of metadata; the path beside it is
where the node was when the event happened.

An event has an id of its own too, which all copies of it keep: forks, and their copies in other processes, begin with
the events of the session that they come from, and a merge must know these from events that merely look the same. It is
the id of the author (8 bytes, one for each log that takes events of its own) and a number; empty in a log without an
author.
"""

from __future__ import annotations

from dataclasses import field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from icechunk.format.ids import NodeId
from icechunk.format.values import ChunkRefs
from icechunk.runtime.late_dataclass import dataclass

__all__ = [
    "ArrayCreated",
    "ChunksDeleted",
    "ChunksWritten",
    "Event",
    "GroupCreated",
    "HierarchyCleared",
    "MetadataReplaced",
    "NodeDeleted",
    "NodeMoved",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCreated:
    """A group was created at a free path."""

    node_id: NodeId
    """Id of the group, fresh, for its whole life."""
    path: str
    """Absolute path."""
    user_data: bytes
    """The zarr.json document, verbatim."""
    id: bytes = field(default=b"", compare=False)
    """Id of the event, the same in all copies of it; empty in a log without an author."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayCreated:
    """An array without chunks was created at a free path."""

    node_id: NodeId
    """Id of the array, fresh, for its whole life."""
    path: str
    """Absolute path."""
    user_data: bytes
    """The zarr.json document, verbatim."""
    id: bytes = field(default=b"", compare=False)
    """Id of the event, the same in all copies of it; empty in a log without an author."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataReplaced:
    """The zarr.json of a node was replaced by one of the same kind."""

    node_id: NodeId
    """Id of the node."""
    path: str
    """Path of the node at that time."""
    user_data: bytes
    """The new zarr.json. Chunks outside its grid are invisible, and dropped by the commit; a change of rank drops
    all chunks at once."""
    id: bytes = field(default=b"", compare=False)
    """Id of the event, the same in all copies of it; empty in a log without an author."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDeleted:
    """A node, and everything below it, was deleted."""

    node_id: NodeId
    """Id of the topmost node."""
    path: str
    """Path of the node at that time."""
    id: bytes = field(default=b"", compare=False)
    """Id of the event, the same in all copies of it; empty in a log without an author."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HierarchyCleared:
    """Every node was deleted, the root too."""

    id: bytes = field(default=b"", compare=False)
    """Id of the event, the same in all copies of it; empty in a log without an author."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeMoved:
    """A node, with everything below it, was moved to another path."""

    node_id: NodeId
    """Id of the topmost node."""
    source: str
    """Path before the move."""
    target: str
    """Path after the move; it was free."""
    id: bytes = field(default=b"", compare=False)
    """Id of the event, the same in all copies of it; empty in a log without an author."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChunksWritten:
    """Chunks of one array were added or replaced."""

    node_id: NodeId
    """Id of the array."""
    refs: ChunkRefs
    """References, ascending and unique by coordinates."""
    id: bytes = field(default=b"", compare=False)
    """Id of the event, the same in all copies of it; empty in a log without an author."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChunksDeleted:
    """Chunks of one array were deleted, whether they existed or not."""

    node_id: NodeId
    """Id of the array."""
    coords: npt.NDArray[np.uint32]
    """uint32[n, ndim], ascending and unique."""
    id: bytes = field(default=b"", compare=False)
    """Id of the event, the same in all copies of it; empty in a log without an author."""


Event: TypeAlias = (
    GroupCreated
    | ArrayCreated
    | MetadataReplaced
    | NodeDeleted
    | HierarchyCleared
    | NodeMoved
    | ChunksWritten
    | ChunksDeleted
)
