"""Chunks that are written before the session that refers to them is opened, so that its commit need not wait.

They are objects that nothing refers to yet, as the chunks of any session that has not committed: if no commit ever
does, a collection removes them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeAlias

import numpy as np

from icechunk.format.ids import ObjectId
from icechunk.format.keys import chunk_key
from icechunk.format.values import ID12, INLINE, NATIVE, ChunkRefs
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.tasks import in_thread
from icechunk.session.core import Core
from icechunk.storage.buffers import Buffers
from icechunk.storage.port import Put
from icechunk.transfer.limiter import WRITE

__all__ = ["Ahead", "EncodedChunks", "Place", "WrittenChunk", "gains_from_writing_ahead", "refs_of", "write_ahead"]

_MEMORY: Final = Buffers()
"""Memory of packs until they are written."""

Coords: TypeAlias = tuple[int, ...]
EncodedChunks: TypeAlias = "Iterable[tuple[str, Coords, bytes | memoryview | None]]"
"""Names of arrays, and coordinates and bytes of their chunks; None for one of fill values, which is not stored."""
Place: TypeAlias = tuple[ObjectId, int, int]
"""Object, offset and length of a chunk."""
WrittenChunk: TypeAlias = "tuple[Coords, Place | bytes | None]"
"""Coordinates of a chunk, and its place; or its bytes, where they are so few that manifests have them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """Chunks that are durable before anything that is put from now on."""

    chunks: dict[str, list[WrittenChunk]]
    """By name of their array."""
    since_us: int
    """Store time, µs, not later than their upload."""


def gains_from_writing_ahead(core: Core) -> bool:
    """Whether a commit would wait for the medium instead, which is idle until then."""
    return core.storage.defers_syncs


async def write_ahead(
    core: Core, encode: Callable[[], EncodedChunks], encoders: asyncio.Semaphore, *, bulk: bool = False
) -> Ahead:
    """Encode chunks in a thread, and write them; small ones share an object.

    Parameters
    ----------
    bulk
        Whether they are of many, most of which are not read soon: their objects may be left out of caches.

    Raises
    ------
    StorageError
        They cannot be written.
    """
    since_us = (await core.log()).store_time_us
    objects: list[tuple[ObjectId, bytes | memoryview]] = []
    chunks = await in_thread(lambda: _place(core, encode(), objects), limiter=encoders)
    puts = [Put(chunk_key(id), data, bulk=bulk) for id, data in objects]
    if puts:
        gate, size = core.gates.here(), sum(len(put.data) for put in puts)
        await gate.enter(size, WRITE)
        try:
            await core.storage.put_unsynced(puts)
        finally:
            gate.leave(size)
        await core.storage.barrier([put.key for put in puts])
    return Ahead(chunks=chunks, since_us=since_us)


def _place(
    core: Core, encoded: EncodedChunks, objects: list[tuple[ObjectId, bytes | memoryview]]
) -> dict[str, list[WrittenChunk]]:
    """Places of chunks in the objects that are added to ``objects``."""
    settings, new_id = core.settings, core.sources.new_object_id
    pack, memory, size = new_id(), memoryview(b""), 0
    found: dict[str, list[WrittenChunk]] = {}
    for name, coords, data in encoded:
        written: Place | bytes | None = None
        if data is None:
            pass
        elif len(data) <= settings.inline_threshold_bytes:
            written = bytes(data)
        elif len(data) >= settings.pack_threshold_bytes:
            objects.append((new_id(), data))
            written = (objects[-1][0], 0, len(data))
        else:
            if size + len(data) > len(memory):
                if size:
                    objects.append((pack, memory[:size]))
                pack, memory, size = new_id(), _MEMORY.take(max(settings.pack_size_bytes, len(data))), 0
            memory[size : size + len(data)] = data
            written = (pack, size, len(data))
            size += len(data)
        found.setdefault(name, []).append((coords, written))
    if size:
        objects.append((pack, memory[:size]))
    return found


def refs_of(chunks: Sequence[WrittenChunk]) -> ChunkRefs | None:
    """Chunks of one array as columns; None where there are none, or where neither all of them are in objects, nor all
    in manifests."""
    count, inline = len(chunks), [data for _, data in chunks if isinstance(data, bytes)]
    places = [place for _, place in chunks if isinstance(place, tuple)]
    if not count or count not in (len(places), len(inline)):
        return None
    if places:
        ids, offsets, lengths = zip(*places, strict=True)
        offset, length = np.array(offsets, np.uint64), np.array(lengths, np.uint64)
        chunk_id = np.frombuffer(b"".join(ids), ID12)
    else:
        length = np.array(list(map(len, inline)), np.uint64)
        offset = np.cumsum(length) - length
        chunk_id = np.zeros(count, ID12)
    return ChunkRefs(
        coords=np.array([coords for coords, _ in chunks], np.uint32),
        kind=np.full(count, NATIVE if places else INLINE, np.uint8),
        offset=offset,
        length=length,
        chunk_id=chunk_id,
        location=np.full(count, -1, np.int32),
        inline_data=b"".join(inline),
    )
