"""Bytes of the chunks that branches and tags reach, each counted once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from icechunk.format.keys import CHUNKS_PREFIX
from icechunk.format.values import INLINE, NATIVE, VIRTUAL, ChunkRefs
from icechunk.log.repository.port import Layout, RepositoryLog
from icechunk.maintenance.byte_ranges import (
    CHUNK_ID_BYTES,
    SPAN_BYTES,
    covered_by_object,
    joined_native_rows,
    rows,
    spans_of,
)
from icechunk.maintenance.limits import Limits
from icechunk.maintenance.reachability import Files, ManyRefs, RowSet, Walked, read_all_manifests, walk
from icechunk.maintenance.sweep import with_ids
from icechunk.ops import ChunkStorageStats
from icechunk.runtime.tasks import run_all
from icechunk.storage.port import NO_LISTING, Storage

__all__ = ["chunk_storage_stats"]


async def chunk_storage_stats(
    log: RepositoryLog, storage: Storage, limits: Limits, *, list_objects: bool = True
) -> ChunkStorageStats:
    """Count the bytes of all chunks of all snapshots that a branch or tag reaches.

    Native: bytes of chunk objects that some reference covers, once, however many chunks share an object. Virtual:
    each distinct range of a location once. Inline: the bytes in each manifest.

    Parameters
    ----------
    list_objects
        Whether chunk objects are listed, to find the bytes that no reference covers. If the storage has no
        listings, they are unknown.

    Raises
    ------
    FormatError
        A snapshot or manifest is missing or cannot be read.
    """
    files, found, counter = Files(storage, log), Walked(), _Counter()
    state = await log.refresh()
    in_files = log.layout is Layout.REFS
    log.require_all_refs()
    start = state.tips() if in_files else state.reachable()

    async def read() -> None:
        await walk(files, start, found, limits, follow_parents=in_files, of_each_snapshot=False)
        await read_all_manifests(files, found.manifests, limits, lambda _, refs: counter.add(refs))

    sizes = _Sizes()

    async def list_chunks() -> None:
        if list_objects:
            await sizes.take(storage)

    await run_all(read, list_chunks)
    return counter.result(sizes)


class _Sizes:
    """Chunk objects that are stored, in columns."""

    def __init__(self) -> None:
        self._names: list[bytes] = []
        self._sizes: list[int] = []
        self.complete = False

    async def take(self, storage: Storage) -> None:
        """List them."""
        try:
            async for page in storage.list_pages(CHUNKS_PREFIX):
                for id, info in with_ids(CHUNKS_PREFIX, page):
                    self._names.append(id)
                    self._sizes.append(info.size)
        except NO_LISTING:
            return
        self.complete = True

    def uncovered(self, names: npt.NDArray[Any], living: npt.NDArray[np.uint64]) -> tuple[int | None, int | None]:
        """Bytes that no range covers: of objects with a range, and of others; None where that is not known.

        Parameters
        ----------
        names, living
            Of each object with a range, ascending, and the bytes that its ranges cover.
        """
        if not self.complete:
            return None, None
        sizes = np.array(self._sizes, np.uint64)
        if not len(names):
            return 0, int(sizes.sum())
        ids = np.array(self._names, names.dtype)
        at = np.minimum(np.searchsorted(names, ids), len(names) - 1)
        known = names[at] == ids
        # An object that is shorter than its references say has nothing dead.
        dead = np.maximum(sizes[known].astype(np.int64) - living[at][known].astype(np.int64), 0)
        return int(dead.sum()), int(sizes[~known].sum())


class _Counter:
    def __init__(self) -> None:
        self._native = RowSet(CHUNK_ID_BYTES + SPAN_BYTES)
        self._virtual = RowSet(8 + SPAN_BYTES)
        self._locations: dict[str, int] = {}
        self._inlined = 0

    def add(self, found: Sequence[ManyRefs]) -> None:
        for refs in [many.living for many in found]:
            self._inlined += int(refs.length[refs.kind == INLINE].sum())
            native = refs.kind == NATIVE
            if native.any():
                self._native.add(joined_native_rows(refs, native))
            virtual = refs.kind == VIRTUAL
            if virtual.any():
                self._virtual.add(rows(self._numbers(refs, virtual), refs.offset[virtual], refs.length[virtual]))

    def _numbers(self, refs: ChunkRefs, virtual: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
        """A number for each location, 8 bytes a row."""
        used, inverse = np.unique(refs.location[virtual], return_inverse=True)
        known = self._locations
        numbers = [known.setdefault(refs.locations[int(i)], len(known)) for i in used]
        return np.array(numbers, ">u8")[inverse].view(np.uint8).reshape(-1, 8)

    def result(self, sizes: _Sizes | None = None) -> ChunkStorageStats:
        names, living = covered_by_object(self._native.rows)
        dead, unreferenced = (None, None) if sizes is None else sizes.uncovered(names, living)
        return ChunkStorageStats(
            native_bytes=int(living.sum(dtype=np.uint64)),
            virtual_bytes=int(spans_of(self._virtual.rows)[1].sum(dtype=np.uint64)),
            inlined_bytes=self._inlined,
            dead_bytes=dead,
            unreferenced_bytes=unreferenced,
        )
