"""Writing and listing virtual references: the part of the store that zarr does not know of."""

from __future__ import annotations

import itertools
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from datetime import datetime
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from icechunk.errors import ErrorKind, InvalidInputError, SessionStateError
from icechunk.format.ids import ObjectId, encode_id
from icechunk.format.values import ETAG, ID12, INLINE, LAST_MODIFIED, NATIVE, NO_CHECKSUM, VIRTUAL, ChunkRefs
from icechunk.log.session.columns import concat
from icechunk.runtime.checks import unsigned
from icechunk.runtime.clock import us_of
from icechunk.runtime.twins import synchronous
from icechunk.store.port import Content
from icechunk.store.zarr_keys import ChunkKey, parse_key, to_path
from icechunk.virtual import ChunkType, VirtualChunkSpec
from icechunk.virtual_access.locations import checked_location

__all__ = ["ChunkBatch", "VirtualRefs"]

_U64: Final = unsigned(64)
_U32: Final = unsigned(32)
_TYPES: Final = np.zeros(256, np.uint8)
_TYPES[[NATIVE, VIRTUAL, INLINE]] = [ChunkType.native.value, ChunkType.virtual.value, ChunkType.inline.value]

ChunkBatch: TypeAlias = tuple[
    npt.NDArray[np.uint32],
    npt.NDArray[np.uint8],
    list[str],
    npt.NDArray[np.uint64],
    npt.NDArray[np.uint64],
    dict[int, bytes],
]
"""Columns of n chunks: uint32[n, ndim] coordinates; uint8[n] values of `ChunkType`; locations (URL of virtual chunks,
id of native ones, empty for inline ones); uint64[n] offsets and lengths, in bytes; the bytes of inline chunks, by
row."""


class VirtualRefs(ABC):
    """Methods of `IcechunkStore` for virtual references.

    A reference is a range of bytes of an object outside the repository. Its location is a URL, kept as given, or
    ``vcc://name/path``, relative to the virtual chunk container called ``name``. Nothing is read when a reference is
    written; a reader of the chunk must have authorised its container.
    """

    _content: Content

    @abstractmethod
    def _require_writable(self) -> None:
        """Raise `ReadOnlyError` where the store takes no writes."""

    async def set_virtual_ref_async(
        self,
        key: str,
        location: str,
        *,
        offset: int,
        length: int,
        checksum: str | datetime | None = None,
        validate_container: bool = True,
    ) -> None:
        """Make one chunk a range of bytes of another object.

        Parameters
        ----------
        key
            Of the chunk, as in ``"array/c/0/1"``.
        location
            URL of the object.
        offset, length
            First byte, and number of bytes; not 0.
        checksum
            The object's ETag, or a time with a time zone after which it must not have been modified; the format keeps
            whole seconds, so a fraction is rounded up. Reading fails where that is no longer so.
        validate_container
            Refuse a location that no configured container holds.

        Raises
        ------
        InvalidInputError
            Kind ``invalid-key``, ``invalid-virtual-ref``, ``invalid-chunk-index``, ``not-an-array``,
            ``zero-length-chunk``, or ``no-container-for-virtual-chunk``. Nothing is written.
        NodeNotFoundError
            There is no such array.
        ReadOnlyError
            The store, or its session, is read-only.
        """
        self._require_writable()
        parsed = parse_key(key)
        if not isinstance(parsed, ChunkKey):
            raise SessionStateError(
                f"cannot make {key!r} a virtual reference: only chunks can be; write metadata with set",
                ErrorKind.NOT_ALLOWED,
            )
        node = self._content.require_array(parsed.path)
        stored = checked_location(location)
        if validate_container and not self._content.virtual_prefixes.holds(stored):
            raise InvalidInputError(
                f"invalid chunk location, no matching virtual chunk container: {location!r}; configure one, or pass "
                "validate_container=False",
                ErrorKind.NO_CONTAINER_FOR_VIRTUAL_CHUNK,
            )
        coords = np.array([parsed.coords], np.uint32).reshape(1, -1)
        columns = _columns(
            coords,
            (stored,),
            np.zeros(1, np.int32),
            np.array([_U64("offset", offset)], np.uint64),
            np.array([_U64("length", length)], np.uint64),
            *_one_checksum(checksum, 1),
        )
        self._content.set_references(node.path, _checked(columns, node.path))

    set_virtual_ref: Final = synchronous(set_virtual_ref_async)

    async def set_virtual_refs_async(
        self, array_path: str, chunks: list[VirtualChunkSpec], *, validate_containers: bool = True
    ) -> list[tuple[int, ...]] | None:
        """Make many chunks of an array ranges of other objects; all that are not refused, or none where this raises.

        Returns
        -------
        list of tuple, or None
            With ``validate_containers`` the coordinates of the references that no container holds, in the order
            given; None where all were written.

        Raises
        ------
        InvalidInputError, NodeNotFoundError, ReadOnlyError
            As `set_virtual_ref_async`, but for locations that no container holds.
        """
        self._require_writable()
        node = self._content.require_array(to_path(array_path))
        specs = list(chunks)
        for spec in specs:
            if not isinstance(spec, VirtualChunkSpec):
                raise TypeError(f"set_virtual_refs needs VirtualChunkSpec objects, not {type(spec).__name__}")
            if len(spec.index) != len(node.shape):
                raise InvalidInputError(
                    f"chunk {spec.index} has another rank than array {node.path!r}", ErrorKind.INVALID_CHUNK_INDEX
                )
        count = len(specs)
        table, rows, good = self._locations([spec.location for spec in specs], validate_containers)
        columns = _columns(
            np.array([spec.index for spec in specs], np.uint32).reshape(count, len(node.shape)),
            table,
            rows,
            np.fromiter((spec.offset for spec in specs), np.uint64, count),
            np.fromiter((spec.length for spec in specs), np.uint64, count),
            *_many_checksums(specs),
        )
        return self._write(node.path, columns, good)

    set_virtual_refs: Final = synchronous(set_virtual_refs_async)

    async def set_virtual_refs_arr_async(
        self,
        array_path: str,
        chunk_grid_shape: tuple[int, ...],
        locations: list[str],
        offsets: npt.NDArray[np.uint64],
        lengths: npt.NDArray[np.uint64],
        *,
        validate_containers: bool = True,
        arr_offset: tuple[int, ...] | None = None,
        checksum: datetime | str | None = None,
    ) -> list[tuple[int, ...]] | None:
        """Make a box of chunks of an array ranges of other objects.

        Parameters
        ----------
        chunk_grid_shape
            Chunks along each dimension of the box; their product is the number of references. For an array without
            dimensions ``()``, or ones as in ``(1,)``.
        locations
            URLs in C order; an empty one leaves its chunk as it is.
        offsets, lengths
            uint64[n], bytes.
        arr_offset
            Where in the array's chunk grid the box begins; None: at the origin.
        checksum
            One for all; see `set_virtual_ref_async`.

        Returns
        -------
        list of tuple, or None
            As in `set_virtual_refs_async`; coordinates are those of the array.

        Raises
        ------
        TypeError
            Offsets or lengths are no one-dimensional uint64 arrays.
        ValueError
            Numbers of things do not agree.
        InvalidInputError, NodeNotFoundError, ReadOnlyError
            As in `set_virtual_refs_async`.
        """
        self._require_writable()
        shape = tuple(_U32("chunk_grid_shape", n) for n in chunk_grid_shape)
        corner = (0,) * len(shape) if arr_offset is None else tuple(_U32("arr_offset", n) for n in arr_offset)
        for name, column in (("offsets", offsets), ("lengths", lengths)):
            if not isinstance(column, np.ndarray) or column.dtype != np.uint64 or column.ndim != 1:
                raise TypeError(f"{name} must be a one-dimensional numpy array of uint64")
        count = len(locations)
        if len(offsets) != count or len(lengths) != count:
            raise ValueError("locations, offsets, and lengths must have the same length")
        if len(corner) != len(shape):
            raise ValueError(f"arr_offset length ({len(corner)}) != chunk_grid_shape length ({len(shape)})")
        total = math.prod(shape)
        if total != count:
            raise ValueError(f"product of chunk_grid_shape ({total}) != array length ({count})")
        node = self._content.require_array(to_path(array_path))
        if not node.shape and all(n == 1 for n in shape) and not any(corner):
            # The one chunk of a scalar, which VirtualiZarr calls a box of one.
            shape, corner = (), ()
        if len(shape) != len(node.shape) or any(
            first + n > dimension.num_chunks for first, n, dimension in zip(corner, shape, node.shape, strict=True)
        ):
            if count:
                raise InvalidInputError(
                    f"a box of {shape} chunks at {corner} is not inside the chunk grid of array {node.path!r}",
                    ErrorKind.INVALID_CHUNK_INDEX,
                )
            return None
        table, rows, good = self._locations(locations, validate_containers, skip_empty=True)
        columns = _columns(
            _box(corner, shape), table, rows, offsets.copy(), lengths.copy(), *_one_checksum(checksum, count)
        )
        present = rows >= 0
        if not present.all():
            columns, good = columns.take(present), good[present]
        return self._write(node.path, columns, good)

    set_virtual_refs_arr: Final = synchronous(set_virtual_refs_arr_async)

    async def array_chunk_iterator(self, array_path: str, batch_size: int = 100000) -> AsyncGenerator[ChunkBatch, None]:
        """References of all chunks of an array, in batches of `ChunkBatch`; nothing where there is no such array.

        Locations are absolute: those relative to a container are resolved. No order is promised.

        Parameters
        ----------
        batch_size
            References in a batch; the last one may have fewer.

        Raises
        ------
        ValueError
            ``batch_size`` is not positive.
        InvalidInputError
            A location is relative to a container that is not configured.
        """
        if batch_size <= 0:
            raise ValueError(f"batch_size must be positive, not {batch_size}")
        prefixes = self._content.virtual_prefixes
        waiting: list[ChunkRefs] = []
        count = 0
        async with aclosing(self._content.chunk_references(to_path(array_path))) as found:
            async for refs in found:
                waiting.append(refs)
                count += len(refs)
                if count < batch_size:
                    continue
                joined = concat(waiting)
                whole = count - count % batch_size
                for start in range(0, whole, batch_size):
                    yield _batch(joined.take(np.arange(start, start + batch_size)), prefixes.absolute)
                waiting, count = [joined.take(np.arange(whole, count))], count - whole
        if count:
            yield _batch(concat(waiting), prefixes.absolute)

    def _locations(
        self, locations: Sequence[str], validate: bool, *, skip_empty: bool = False
    ) -> tuple[tuple[str, ...], npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Distinct stored locations, the row of each given one, and which of them some container holds."""
        prefixes = self._content.virtual_prefixes
        if prefixes.all_plain_and_ascending(locations):
            count = len(locations)
            return tuple(locations), np.arange(count, dtype=np.int32), np.ones(count, np.bool_)
        repeated = _ascending(locations)
        if repeated is not None and prefixes.all_plain(repeated[0]):
            return *repeated, np.ones(len(locations), np.bool_)
        distinct = dict.fromkeys(locations)
        if skip_empty:
            distinct.pop("", None)
        table: dict[str, int] = {}
        if prefixes.all_plain(list(distinct)) or all(map(prefixes.is_plain, distinct)):
            numbers = table = dict(zip(distinct, range(len(distinct)), strict=True))
            held = np.ones(len(table), np.bool_)
        else:
            numbers = {url: table.setdefault(checked_location(url), len(table)) for url in distinct}
            held = np.fromiter((not validate or prefixes.holds(url) for url in table), np.bool_, len(table))
        rows = np.fromiter((numbers.get(url, -1) for url in locations), np.int32, len(locations))
        good = np.ones(len(rows), np.bool_)
        if not held.all():
            good = held[np.maximum(rows, 0)]
        return tuple(table), rows, good

    def _write(self, path: str, columns: ChunkRefs, good: npt.NDArray[np.bool_]) -> list[tuple[int, ...]] | None:
        refused: list[tuple[int, ...]] | None = None
        if not good.all():
            refused = [tuple(row) for row in columns.coords[~good].tolist()]
            columns = columns.take(good)
        self._content.set_references(path, _checked(columns, path))
        return refused


def _ascending(locations: Sequence[str]) -> tuple[tuple[str, ...], npt.NDArray[np.int32]] | None:
    """Distinct locations and the row of each given one, found without hashing; None where they do not ascend."""
    if not len(locations):
        return None
    following = itertools.islice(locations, 1, None)
    if not all(map(operator.le, locations, following)):
        return None
    following = itertools.islice(locations, 1, None)
    new = np.fromiter(itertools.chain((True,), map(operator.ne, locations, following)), np.bool_, len(locations))
    return tuple(itertools.compress(locations, new)), np.cumsum(new, dtype=np.int32) - np.int32(1)


def _checked(refs: ChunkRefs, path: str) -> ChunkRefs:
    if not len(refs):
        return refs
    # Without columns for what is usually so: taking memory for them takes longer than looking.
    if not refs.length.all():
        empty = np.flatnonzero(refs.length == 0)
        raise InvalidInputError(
            f"chunk {refs.coords[empty[0]].tolist()} of array {path!r} would have no bytes; delete it instead",
            ErrorKind.ZERO_LENGTH_CHUNK,
        )
    if int(refs.offset.max()) + int(refs.length.max()) < 2**64:
        return refs
    beyond = np.flatnonzero(refs.offset + refs.length < refs.offset)
    if len(beyond):
        raise InvalidInputError(
            f"chunk {refs.coords[beyond[0]].tolist()} of array {path!r} would end beyond byte 2^64",
            ErrorKind.INVALID_VIRTUAL_REF,
        )
    return refs


def _columns(
    coords: npt.NDArray[np.uint32],
    table: tuple[str, ...],
    rows: npt.NDArray[np.int32],
    offset: npt.NDArray[np.uint64],
    length: npt.NDArray[np.uint64],
    checksum_kind: npt.NDArray[np.uint8] | None,
    checksum: npt.NDArray[np.int64] | None,
    etags: tuple[str, ...],
) -> ChunkRefs:
    count = len(coords)
    # Broadcast columns of one value take no memory.
    return ChunkRefs(
        coords=coords,
        kind=np.broadcast_to(np.uint8(VIRTUAL), count),
        offset=offset,
        length=length,
        chunk_id=np.broadcast_to(np.zeros((), ID12), count),
        location=rows,
        locations=table,
        checksum_kind=checksum_kind,
        checksum=checksum,
        etags=etags,
    )


_Checksums: TypeAlias = tuple[npt.NDArray[np.uint8] | None, npt.NDArray[np.int64] | None, tuple[str, ...]]


def _one_checksum(checksum: str | datetime | None, count: int) -> _Checksums:
    """Checksum columns for rows that share one."""
    if checksum is None:
        return None, None, ()
    if isinstance(checksum, str):
        return np.broadcast_to(np.uint8(ETAG), count), np.broadcast_to(np.int64(0), count), (_etag(checksum),)
    kind = np.broadcast_to(np.uint8(LAST_MODIFIED), count)
    return kind, np.broadcast_to(np.int64(_seconds(checksum)), count), ()


def _many_checksums(specs: Iterable[VirtualChunkSpec]) -> _Checksums:
    kinds: list[int] = []
    sums: list[int] = []
    etags: dict[str, int] = {}
    for spec in specs:
        if spec.etag_checksum is not None:
            kinds.append(ETAG)
            sums.append(etags.setdefault(_etag(spec.etag_checksum), len(etags)))
        elif spec.last_updated_at_checksum is not None:
            kinds.append(LAST_MODIFIED)
            sums.append(_seconds(spec.last_updated_at_checksum))
        else:
            kinds.append(NO_CHECKSUM)
            sums.append(0)
    if not any(kinds):
        return None, None, ()
    return np.array(kinds, np.uint8), np.array(sums, np.int64), tuple(etags)


def _etag(text: str) -> str:
    if not text or not text.isprintable():
        raise InvalidInputError(f"{text!r} is no ETag", ErrorKind.INVALID_VIRTUAL_REF)
    return text


def _seconds(moment: Any) -> int:
    """Seconds since 1970, whole as the format keeps them; fractions are rounded up."""
    if not isinstance(moment, datetime):
        raise TypeError(f"a checksum is an ETag (str) or a datetime, not {type(moment).__name__}")
    if moment.tzinfo is None:
        raise TypeError("a datetime as checksum needs a time zone, for example datetime.now(timezone.utc)")
    seconds = -(-us_of(moment) // 1_000_000)
    if not 0 < seconds < 2**32:
        raise InvalidInputError(
            f"the checksum {moment.isoformat()} is outside of the format's range, 1970 to 2106",
            ErrorKind.INVALID_VIRTUAL_REF,
        )
    return seconds


def _box(corner: Sequence[int], shape: Sequence[int]) -> npt.NDArray[np.uint32]:
    """uint32[n, ndim]: coordinates of a box, in C order."""
    coords = np.empty((*shape, len(shape)), np.uint32)
    for d, (first, n) in enumerate(zip(corner, shape, strict=True)):
        along = np.arange(first, first + n, dtype=np.uint32)
        coords[..., d] = along.reshape((1,) * d + (n,) + (1,) * (len(shape) - d - 1))
    return coords.reshape(math.prod(shape), len(shape))


def _batch(refs: ChunkRefs, absolute: Callable[[str], str]) -> ChunkBatch:
    kind = refs.kind
    offset = refs.offset
    rows = np.where(kind == VIRTUAL, refs.location, -1).tolist()
    # The table may hold locations that no row uses, and these need not resolve.
    urls = {row: "" if row < 0 else absolute(refs.locations[row]) for row in set(rows)}
    locations = [urls[row] for row in rows]
    for row in np.flatnonzero(kind == NATIVE).tolist():
        locations[row] = encode_id(ObjectId(refs.chunk_id[row].tobytes()))
    inline: dict[int, bytes] = {}
    inline_rows = np.flatnonzero(kind == INLINE)
    if len(inline_rows):
        for row in inline_rows.tolist():
            start = int(offset[row])
            inline[row] = bytes(refs.inline_data[start : start + int(refs.length[row])])
        offset = np.where(kind == INLINE, np.uint64(0), offset)
    return refs.coords, _TYPES[kind], locations, offset, refs.length, inline
