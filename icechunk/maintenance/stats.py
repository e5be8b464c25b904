"""Bytes of the chunks that branches and tags reach, each counted once."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import anyio
import numpy as np
import numpy.typing as npt

from icechunk.format.ids import NodeId
from icechunk.format.values import INLINE, NATIVE, VIRTUAL, ChunkRefs, Manifest
from icechunk.log.repository.port import Layout, RepositoryLog
from icechunk.maintenance.reachability import Files, Limits, RowSet, Walked, living_rows, read_manifests, walk
from icechunk.ops import ChunkStorageStats
from icechunk.storage.port import Storage
from icechunk.transfer.assets import off_loop

__all__ = ["chunk_storage_stats"]

_ID_BYTES = 12
_SPAN_BYTES = 16
_BYTES_PER_REF = 64


async def chunk_storage_stats(log: RepositoryLog, storage: Storage, limits: Limits) -> ChunkStorageStats:
    """Count the bytes of all chunks of all snapshots that a branch or tag reaches.

    Native: bytes of chunk objects that some reference covers, once, however many chunks share an object. Virtual:
    each distinct range of a location once. Inline: the bytes in each manifest.

    Raises
    ------
    FormatError
        A snapshot or manifest is missing or cannot be read.
    """
    files, found, counter = Files(storage, log), Walked(), _Counter()
    state = await log.refresh()
    in_files = log.layout is Layout.REFS
    start = state.tips() if in_files else state.reachable()
    await walk(files, start, found, limits, follow_parents=in_files)

    one_at_a_time = anyio.Lock()

    async def visit(manifest: Manifest, nodes: Collection[NodeId]) -> None:
        async with one_at_a_time:
            await off_loop(manifest.num_chunk_refs * _BYTES_PER_REF, lambda: counter.add(manifest, nodes))

    await read_manifests(files, found.manifests, limits, visit)
    return counter.result()


class _Counter:
    def __init__(self) -> None:
        self._native = RowSet(_ID_BYTES + _SPAN_BYTES)
        self._virtual = RowSet(8 + _SPAN_BYTES)
        self._locations: dict[str, int] = {}
        self._inlined = 0

    def add(self, manifest: Manifest, nodes: Collection[NodeId]) -> None:
        for refs in living_rows(manifest, nodes):
            self._inlined += int(refs.length[refs.kind == INLINE].sum())
            native = refs.kind == NATIVE
            if native.any():
                ids = np.ascontiguousarray(refs.chunk_id[native]).view(np.uint8).reshape(-1, _ID_BYTES)
                self._native.add(_rows(ids, refs, native))
            virtual = refs.kind == VIRTUAL
            if virtual.any():
                self._virtual.add(_rows(self._numbers(refs, virtual), refs, virtual))

    def _numbers(self, refs: ChunkRefs, rows: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
        """A number for each location, 8 bytes a row."""
        used, inverse = np.unique(refs.location[rows], return_inverse=True)
        known = self._locations
        numbers = [known.setdefault(refs.locations[int(i)], len(known)) for i in used]
        return np.array(numbers, ">u8")[inverse].view(np.uint8).reshape(-1, 8)

    def result(self) -> ChunkStorageStats:
        return ChunkStorageStats(
            native_bytes=_covered(self._native.rows),
            virtual_bytes=int(_spans(self._virtual.rows)[1].sum(dtype=np.uint64)),
            inlined_bytes=self._inlined,
        )


def _rows(names: npt.NDArray[np.uint8], refs: ChunkRefs, rows: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """Name, offset and length of references as sortable bytes."""
    width = names.shape[1] + _SPAN_BYTES
    joined = np.empty((len(names), width), np.uint8)
    joined[:, :-_SPAN_BYTES] = names
    joined[:, -_SPAN_BYTES:-8] = refs.offset[rows].astype(">u8").view(np.uint8).reshape(-1, 8)
    joined[:, -8:] = refs.length[rows].astype(">u8").view(np.uint8).reshape(-1, 8)
    return joined.view(f"V{width}").reshape(-1)


def _spans(rows: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    columns = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), rows.dtype.itemsize)
    spans = np.ascontiguousarray(columns[:, -_SPAN_BYTES:]).view(">u8").astype(np.uint64)
    return spans[:, 0], spans[:, 1]


def _covered(rows: npt.NDArray[Any]) -> int:
    """Bytes that ranges cover, once where they overlap; rows as of `_rows`, ascending."""
    if not len(rows):
        return 0
    offset, length = _spans(rows)
    names = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)[:, :-_SPAN_BYTES]
    first = np.ones(len(rows), bool)
    first[1:] = (names[1:] != names[:-1]).any(axis=1)
    group = np.cumsum(first) - 1
    # How far the ranges before each one reach, within its object: ends as ranks, so that objects do not mix.
    ends, rank = np.unique(offset + length, return_inverse=True)
    reached = np.maximum.accumulate(group * len(ends) + rank)
    before = np.zeros(len(rows), np.uint64)
    before[1:] = ends[reached[:-1] % len(ends)]
    before[first] = 0
    start = np.maximum(offset, before)
    end = offset + length
    return int(np.where(end > start, end - start, 0).sum(dtype=np.uint64))
