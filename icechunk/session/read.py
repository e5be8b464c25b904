"""Reads of chunks: the reference of a chunk that is in force, and the bytes that it points to."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import numpy as np
import numpy.typing as npt

from icechunk.errors import ErrorKind, FormatError, InvalidInputError, ObjectNotFoundError, StorageError
from icechunk.format.ids import ObjectId, encode_id
from icechunk.format.keys import recent_chunk_key
from icechunk.format.values import INLINE, NATIVE, VIRTUAL, ChunkRef, ChunkRefs, NodeSnapshot
from icechunk.log.session.array_fold import inside
from icechunk.log.session.columns import RefTable
from icechunk.log.session.log import IN_BASE, InBase, SessionLog
from icechunk.session.core import Core
from icechunk.storage.port import ByteRange, Octets, clip
from icechunk.transfer.assets import UNKNOWN, Unknown, references_of
from icechunk.transfer.packs import Packs

__all__ = ["CommittedChunks", "all_references", "bytes_of", "read_chunk", "read_chunk_nowait", "reference_of"]


async def read_chunk(
    core: Core,
    puts: Packs,
    node: NodeSnapshot,
    coords: tuple[int, ...],
    found: ChunkRef | InBase,
    byte_range: ByteRange,
    *,
    exact: bool = False,
) -> Octets | None:
    """The bytes of a chunk, or a range of them, clamped as in `clip`; None where it was never written.

    Parameters
    ----------
    puts
        Has the bytes of chunks that are still on their way.
    node
        The array.
    found
        What the session's log says about the chunk.
    exact
        As of `BlockReader.read`.

    Raises
    ------
    StorageError
        The object is gone, or cannot be read: a chunk that was committed is never silently missing.
    FormatError
        The object is shorter than the reference says.
    IcechunkError
        As `VirtualAccess.read`, where it is virtual.
    """
    if found is not IN_BASE:
        return await bytes_of(core, puts, found, byte_range, exact=exact)
    ref = core.assets.reference_nowait(node, coords)
    if ref is UNKNOWN:
        ref = await core.assets.reference(node, coords, reading=True)
    elif ref is not None and ref.kind == NATIVE and byte_range is None and ref.chunk_id is not None:
        # When chunks are read in order, most of them have been read ahead.
        data = core.assets.chunk_nowait(ref.chunk_id, ref.offset, ref.offset + ref.length)
        if data is not None:
            return data
    return None if ref is None else await bytes_of(core, puts, ref, byte_range, exact=exact)


def read_chunk_nowait(
    core: Core,
    puts: Packs,
    node: NodeSnapshot,
    coords: tuple[int, ...],
    found: ChunkRef | InBase,
    byte_range: ByteRange,
) -> Octets | Unknown | None:
    """As `read_chunk`, from memory or by one read from local disk; `UNKNOWN` where more is needed, or it fails."""
    ref = core.assets.reference_nowait(node, coords, reading=False) if found is IN_BASE else found
    if ref is UNKNOWN or ref is None:
        return ref
    held = _in_memory(puts, ref, byte_range)
    if held is not None:
        return held
    if ref.kind != NATIVE or ref.chunk_id is None:
        return UNKNOWN
    start, end = clip(byte_range, ref.length)
    return _stored(core, ref.chunk_id, ref.offset + start, ref.offset + end)


def _stored(core: Core, chunk_id: ObjectId, start: int, end: int) -> Octets | Unknown:
    stored = core.storage.read_nowait(recent_chunk_key(chunk_id), start, end)
    return UNKNOWN if stored is None or len(stored) != end - start else stored


class CommittedChunks:
    """The chunks of an array in a read-only session, if they are in one manifest that is in memory.

    Nothing changes there, so that a look-up takes a third of the time of one through the session's log. A manifest
    stays in memory as long as this object does.

    Parameters
    ----------
    log
        The session's, without changes.
    node
        The array, with one manifest.
    table
        The references in it.
    """

    __slots__ = ("_bounds", "_core", "_index", "_table", "log", "path")

    def __init__(self, core: Core, log: SessionLog, node: NodeSnapshot, table: RefTable) -> None:
        self.path: str = node.path
        self.log: SessionLog = log
        self._core = core
        self._bounds = [
            (first, min(last, dimension.num_chunks))
            for (first, last), dimension in zip(node.manifests[0].extents, node.shape, strict=True)
        ]
        self._table = table
        self._index = table.index

    def read_nowait(self, coords: tuple[int, ...], byte_range: ByteRange) -> Octets | Unknown | None:
        """As `read_chunk_nowait`."""
        if len(coords) != len(self._bounds):
            return None
        for coord, (first, last) in zip(coords, self._bounds, strict=True):
            if not first <= coord < last:
                return None
        row = self._index.find(coords)
        if row < 0:
            return None
        table = self._table
        kind = table.kind(row)
        if kind == VIRTUAL:
            return UNKNOWN
        offset, length = table.span(row)
        start, end = (0, length) if byte_range is None else clip(byte_range, length)
        if kind == INLINE:
            return bytes(table.refs.inline_data[offset + start : offset + end])
        return _stored(self._core, table.chunk_id(row), offset + start, offset + end) if start < end else b""


async def reference_of(
    core: Core, node: NodeSnapshot, coords: tuple[int, ...], found: ChunkRef | InBase
) -> ChunkRef | None:
    """The reference of a chunk, given the session's own change of it; None if it was never written."""
    return await core.assets.reference(node, coords) if found is IN_BASE else found


async def all_references(
    core: Core, node: NodeSnapshot, written: ChunkRefs, deleted: npt.NDArray[np.uint32]
) -> AsyncGenerator[ChunkRefs, None]:
    """All references of an array, in batches in no particular order.

    Parameters
    ----------
    node
        With its present shape: chunks outside of its grid are left out.
    written
        The log's own references.
    deleted
        uint32[n, ndim]: coordinates that the log deletes.
    """
    if len(written):
        yield written
    grid = tuple(dimension.num_chunks for dimension in node.shape)
    hidden = _row_keys(np.concatenate([written.coords, deleted]))
    for manifest_ref in node.manifests:
        manifest = await core.assets.manifest(manifest_ref.object_id)
        refs = references_of(manifest, node)
        visible = inside(refs.coords, grid)
        if len(hidden):
            visible &= ~np.isin(_row_keys(refs.coords), hidden)
        if visible.all():
            yield refs
        elif visible.any():
            yield refs.take(np.flatnonzero(visible))


async def bytes_of(core: Core, puts: Packs, ref: ChunkRef, byte_range: ByteRange, *, exact: bool = False) -> Octets:
    """The bytes that a reference points to, or a range of them; errors as of `read_chunk`."""
    held = _in_memory(puts, ref, byte_range)
    if held is not None:
        return held
    start, end = clip(byte_range, ref.length)
    if ref.kind == NATIVE and ref.chunk_id is not None:
        try:
            found = await core.assets.chunk(ref.chunk_id, ref.offset + start, ref.offset + end, exact=exact)
        except ObjectNotFoundError as error:
            raise StorageError(
                f"chunk object {encode_id(ref.chunk_id)} is missing from {core.storage.describe()}, though a "
                "manifest refers to it; restore it, or reset the branch to an older snapshot",
                ErrorKind.OBJECT_NOT_FOUND,
            ) from error
        except InvalidInputError as error:
            # The range begins beyond the object's end.
            raise _too_short(ref.chunk_id, ref, "none") from error
        if len(found) != end - start:
            raise _too_short(ref.chunk_id, ref, f"only {len(found)} of {end - start}")
        return found
    return await core.virtual.read(ref, start, end)


def _in_memory(puts: Packs, ref: ChunkRef, byte_range: ByteRange) -> Octets | None:
    """The bytes of a chunk that is inline, still on its way to the storage, or of which none are asked for."""
    if ref.kind == INLINE:
        data = ref.data or b""
        return data if byte_range is None else data[slice(*clip(byte_range, len(data)))]
    if ref.kind != NATIVE or ref.chunk_id is None:
        return None
    start, end = clip(byte_range, ref.length)
    if start >= end:
        return b""
    waiting = puts.pending(ref.chunk_id, ref.offset, ref.length)
    return None if waiting is None else waiting[start:end]


def _too_short(chunk_id: ObjectId, ref: ChunkRef, found: str) -> FormatError:
    return FormatError(
        f"chunk object {encode_id(chunk_id)} is shorter than its reference says: of bytes {ref.offset} to "
        f"{ref.offset + ref.length} {found} were found; restore the object, or reset the branch to an older snapshot"
    )


def _row_keys(coords: npt.NDArray[np.uint32]) -> npt.NDArray[np.void]:
    rows = np.ascontiguousarray(coords)
    if rows.shape[1] == 0:
        return np.zeros(len(rows), np.dtype("V1"))
    return rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()
