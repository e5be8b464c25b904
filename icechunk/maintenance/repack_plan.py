"""The plan of a repacking: the objects to write again, and the new places of living bytes. Pure.

A chunk object that several chunks share (a pack), and a manifest that several arrays share, stay as long as one of
these is needed. So they accumulate dead bytes. `choose` decides which of them are written again, `Moves` where
the living ranges of packs go, and `rewritten` makes the new manifest, with living references only, at their new places.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from itertools import compress
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from icechunk.errors import FormatError
from icechunk.format.by_node import Part, owners
from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.manifest.refs_by_node import grouped_refs, refs_by_node
from icechunk.format.values import ID12, NATIVE, ChunkRefs, Manifest
from icechunk.log.session.columns import trimmed
from icechunk.maintenance.byte_ranges import CHUNK_ID_BYTES, names_of, reached_before, spans_of, starts_of_objects
from icechunk.runtime.late_dataclass import dataclass

__all__ = ["MAX_STORED", "Candidate", "Moves", "Pack", "Piece", "choose", "rewritten"]

MAX_STORED: Final = 1.5
"""Greatest ratio of the bytes of packs and manifests to their living bytes after a repacking."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An object with dead bytes, that may be written again."""

    id: ObjectId
    size_bytes: int
    living_bytes: float


def choose(
    candidates: Iterable[Candidate], *, stored_bytes: float, living_bytes: float, below: float
) -> list[Candidate]:
    """The candidates that are written again, least living share first.

    All whose living share is below a threshold, and so many of the others that no more than `MAX_STORED` times the
    living bytes are stored afterwards.

    Parameters
    ----------
    stored_bytes, living_bytes
        Of all objects of the kind that stay, candidates and others.
    below
        From 0 to 1; 1: all.
    """
    chosen: list[Candidate] = []
    for one in sorted(candidates, key=lambda one: (one.living_bytes / one.size_bytes, one.id)):
        if one.living_bytes >= below * one.size_bytes and stored_bytes <= MAX_STORED * living_bytes:
            break
        chosen.append(one)
        stored_bytes -= one.size_bytes - one.living_bytes
    return chosen


class Piece(NamedTuple):
    """Bytes to be copied."""

    source: ObjectId
    """Id of the chunk object that has them."""
    start: int
    length: int


class Pack(NamedTuple):
    """A new chunk object: its pieces, one behind the other."""

    id: ObjectId
    pieces: list[Piece]

    @property
    def size_bytes(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.length for piece in self.pieces)


class Moves:
    """The new places of living ranges of chunk objects.

    Ranges that overlap move together. The rest of an object is left behind.

    Parameters
    ----------
    rows
        ``S28[n]``, ascending: the living ranges of the objects that are written again, of all living references.
    pack_size_bytes
        About the size of a new object.
    new_object_id
        Source of ids.
    """

    def __init__(self, rows: npt.NDArray[Any], *, pack_size_bytes: int, new_object_id: Callable[[], ObjectId]) -> None:
        offset, length = spans_of(rows)
        first = starts_of_objects(rows)
        opens = first | (offset >= reached_before(first, offset + length)) if len(rows) else first
        begins = np.flatnonzero(opens)
        self._keys = _keys(names_of(rows[begins]), offset[begins])
        self._start = offset[begins]
        end = np.maximum.reduceat(offset + length, begins) if len(rows) else offset
        size = (end - self._start).astype(np.int64)
        place = np.cumsum(size) - size
        number = place // pack_size_bytes
        self._numbers, opening = np.unique(number, return_index=True)
        self._sizes = size
        self._pack = np.searchsorted(self._numbers, number)
        self._place = (place - place[opening][self._pack]).astype(np.uint64)
        self._ids = np.array([new_object_id() for _ in self._numbers], f"S{CHUNK_ID_BYTES}").view(ID12)
        self._sources = names_of(rows[begins])
        self.objects: npt.NDArray[np.bytes_] = np.unique(self._sources)
        """``S12[m]``: the objects that are left behind, ascending."""

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def num_bytes(self) -> int:
        """Bytes that are copied."""
        return int(self._sizes.sum())

    def pack(self, i: int) -> Pack:
        """One of the new objects, by number."""
        first, last = np.searchsorted(self._pack, [i, i + 1]).tolist()
        pieces = zip(
            self._sources[first:last].view(ID12),
            self._start[first:last].tolist(),
            self._sizes[first:last].tolist(),
            strict=True,
        )
        return Pack(
            ObjectId(self._ids[i].tobytes()),
            [Piece(ObjectId(source.tobytes()), start, length) for source, start, length in pieces],
        )

    def moved(self, refs: ChunkRefs) -> npt.NDArray[np.bool_]:
        """bool[n]: whether each reference points into an object that is left behind."""
        moved: npt.NDArray[np.bool_] = np.asarray(refs.kind == NATIVE)
        if not len(self.objects) or not moved.any():
            return np.zeros(len(refs), np.bool_)
        names = np.ascontiguousarray(refs.chunk_id).view(f"S{CHUNK_ID_BYTES}")
        at = np.minimum(np.searchsorted(self.objects, names), len(self.objects) - 1)
        moved &= self.objects[at] == names
        return moved

    def applied(self, refs: ChunkRefs) -> ChunkRefs:
        """The same references, to where their bytes go.

        Raises `FormatError` where one of them points to bytes that do not move: none of the rows given covers them.
        """
        moved = self.moved(refs)
        if not moved.any():
            return refs
        names = np.ascontiguousarray(refs.chunk_id[moved]).view(f"S{CHUNK_ID_BYTES}")
        at = np.searchsorted(self._keys, _keys(names, refs.offset[moved]), side="right") - 1
        first, last = refs.offset[moved], refs.offset[moved] + refs.length[moved]
        if (
            (at < 0) | (self._sources[at] != names) | (last > self._start[at] + self._sizes[at].astype(np.uint64))
        ).any():
            raise FormatError(
                "cannot repack: a reference that is new since the collection began points to bytes that no snapshot "
                "referred to; collect again"
            )
        chunk_id, offset = refs.chunk_id.copy(), refs.offset.copy()
        chunk_id[moved] = self._ids[self._pack[at]]
        offset[moved] = self._place[at] + (first - self._start[at])
        return replace(refs, chunk_id=chunk_id, offset=offset)


def _keys(names: npt.NDArray[Any], offset: npt.NDArray[np.uint64]) -> npt.NDArray[Any]:
    """Object and offset as bytes that sort."""
    joined = np.empty((len(names), CHUNK_ID_BYTES + 8), np.uint8)
    joined[:, :CHUNK_ID_BYTES] = np.ascontiguousarray(names).view(np.uint8).reshape(-1, CHUNK_ID_BYTES)
    joined[:, CHUNK_ID_BYTES:] = offset.astype(">u8").view(np.uint8).reshape(-1, 8)
    return joined.view(f"S{CHUNK_ID_BYTES + 8}").reshape(-1)


def rewritten(manifest: Manifest, nodes: Collection[NodeId], moves: Moves, new_id: ObjectId) -> Manifest:
    """The manifest with the references of these arrays only, to where the chunks are that move."""
    parts: list[Part[ChunkRefs]] = []
    for part in grouped_refs(manifest.arrays).parts:
        living = [node in nodes for node in part.nodes]
        if not any(living):
            continue
        kept = part
        if not all(living):
            mask = np.array(living)
            counts = np.diff(part.edges)[mask]
            rows = part.rows.take(np.flatnonzero(mask[owners(part.edges)]))
            edges = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
            kept = Part(tuple(compress(part.nodes, living)), edges, rows)
        parts.append(Part(kept.nodes, kept.edges, trimmed(moves.applied(kept.rows))))
    return Manifest(id=new_id, arrays=refs_by_node(parts))
