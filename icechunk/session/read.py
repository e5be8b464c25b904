"""Reading chunks: which reference holds, and the bytes behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import numpy.typing as npt

from icechunk.errors import ErrorKind, FormatError, InvalidInputError, ObjectNotFoundError, StorageError
from icechunk.format.ids import ObjectId, encode_id
from icechunk.format.values import INLINE, NATIVE, ChunkRef, ChunkRefs, NodeSnapshot
from icechunk.log.session.array_fold import inside
from icechunk.session.core import Core
from icechunk.storage.port import ByteRange, Octets, Range, Suffix
from icechunk.transfer.assets import references_of
from icechunk.transfer.packs import Packs

__all__ = ["base_references", "clip", "read_chunk"]


def clip(byte_range: ByteRange, length: int) -> tuple[int, int]:
    """Start and end of a range within ``length`` bytes, clamped as zarr does: what lies beyond is left out."""
    match byte_range:
        case None:
            return 0, length
        case Range(start, end):
            stop = length if end is None else min(end, length)
            return min(start, stop), stop
        case Suffix(count):
            return max(0, length - count), length


async def read_chunk(core: Core, puts: Packs | None, ref: ChunkRef, byte_range: ByteRange) -> Octets:
    """The bytes that a reference points to, or a range of them, clamped as in `clip`.

    Raises
    ------
    StorageError
        The object is gone, or cannot be read: a chunk that was committed is never silently missing.
    IcechunkError
        As `VirtualAccess.read`, where it is virtual.
    """
    if ref.kind == INLINE:
        data = ref.data or b""
        return data if byte_range is None else data[slice(*clip(byte_range, len(data)))]
    start, end = clip(byte_range, ref.length)
    if ref.kind == NATIVE and ref.chunk_id is not None:
        if start >= end:
            return b""
        if puts is not None and (waiting := puts.pending(ref.chunk_id, ref.offset, ref.length)) is not None:
            return waiting[start:end]
        try:
            found = await core.assets.chunk(ref.chunk_id, ref.offset + start, ref.offset + end)
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


async def base_references(core: Core, node: NodeSnapshot, hidden: npt.NDArray[np.uint32]) -> AsyncIterator[ChunkRefs]:
    """References in the manifests of a committed node, in batches.

    Parameters
    ----------
    node
        With its present shape: what is outside of its grid is left out.
    hidden
        uint32[n, ndim]: coordinates to leave out.
    """
    grid = tuple(dimension.num_chunks for dimension in node.shape)
    keys = _row_keys(hidden)
    for manifest_ref in node.manifests:
        manifest = await core.assets.manifest(manifest_ref.object_id)
        refs = references_of(manifest, node)
        visible = inside(refs.coords, grid)
        if len(keys):
            visible &= ~np.isin(_row_keys(refs.coords), keys)
        if visible.all():
            yield refs
        elif visible.any():
            yield refs.take(np.flatnonzero(visible))


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
