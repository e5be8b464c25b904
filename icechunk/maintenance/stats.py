"""Bytes of the chunks that branches and tags reach, each counted once."""

from __future__ import annotations

from collections.abc import Collection

import anyio
import numpy as np
import numpy.typing as npt

from icechunk.format.ids import NodeId
from icechunk.format.values import INLINE, NATIVE, VIRTUAL, ChunkRefs, Manifest
from icechunk.log.repository.port import Layout, RepositoryLog
from icechunk.maintenance.reachability import Files, Limits, RowSet, Walked, living_rows, read_manifests, walk
from icechunk.maintenance.spans import CHUNK_ID_BYTES, SPAN_BYTES, covered, native_rows, rows, spans_of
from icechunk.ops import ChunkStorageStats
from icechunk.storage.port import Storage
from icechunk.transfer.assets import off_loop

__all__ = ["chunk_storage_stats"]

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
        self._native = RowSet(CHUNK_ID_BYTES + SPAN_BYTES)
        self._virtual = RowSet(8 + SPAN_BYTES)
        self._locations: dict[str, int] = {}
        self._inlined = 0

    def add(self, manifest: Manifest, nodes: Collection[NodeId]) -> None:
        for refs in living_rows(manifest, nodes):
            self._inlined += int(refs.length[refs.kind == INLINE].sum())
            native = refs.kind == NATIVE
            if native.any():
                self._native.add(native_rows(refs, native))
            virtual = refs.kind == VIRTUAL
            if virtual.any():
                self._virtual.add(rows(self._numbers(refs, virtual), refs.offset[virtual], refs.length[virtual]))

    def _numbers(self, refs: ChunkRefs, virtual: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
        """A number for each location, 8 bytes a row."""
        used, inverse = np.unique(refs.location[virtual], return_inverse=True)
        known = self._locations
        numbers = [known.setdefault(refs.locations[int(i)], len(known)) for i in used]
        return np.array(numbers, ">u8")[inverse].view(np.uint8).reshape(-1, 8)

    def result(self) -> ChunkStorageStats:
        return ChunkStorageStats(
            native_bytes=covered(self._native.rows),
            virtual_bytes=int(spans_of(self._virtual.rows)[1].sum(dtype=np.uint64)),
            inlined_bytes=self._inlined,
        )
