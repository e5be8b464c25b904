"""Manifests: encode and decode, formats 1 and 2, without a Python step per reference.

References of one kind, rank and set of fields have one fixed layout, so a vector of a million
tables is one structured array (`_Layout`); references of other kinds are other arrays beside it.
What has variable length, strings and inline chunks, follows behind. Reading makes no assumption
about the layout: `flat_columns` gathers each field of all references of all arrays of the manifest
at once.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import zstandard

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.format.envelope import FileType, seal, unseal
from icechunk.format.flat_columns import (
    Positions,
    TableColumns,
    Vectors,
    copy_spans,
    gather,
    is_ascending,
    lexicographic_order,
    read_coords,
)
from icechunk.format.flat_reader import Buffer, Table, required
from icechunk.format.flat_writer import MAX_BYTES, FlatTable, FlatWriter, Value, Written, id_struct, u8
from icechunk.format.ids import NodeId, ObjectId, encode_id
from icechunk.format.tables import (
    ETAG,
    ID12,
    INLINE,
    LAST_MODIFIED,
    NATIVE,
    NO_CHECKSUM,
    VIRTUAL,
    ChunkRefs,
    Manifest,
)

__all__ = ["decode_manifest", "encode_manifest"]

# Slots of the tables Manifest, ArrayManifest and ChunkRef.
_ID, _ARRAYS, _DICTIONARY, _COMPRESSION = range(4)
_NODE, _REFS = range(2)
(_INDEX, _INLINE, _OFFSET, _LENGTH, _CHUNK_ID, _LOCATION, _ETAG, _LAST_MODIFIED, _COMPRESSED) = range(9)

_ID_SIZE: Final = 12
_NODE_ID_SIZE: Final = 8
_PLAIN, _WITH_DICTIONARY = 0, 1
_MAX_LOCATION: Final = 2**16
"""Bytes that one compressed location may decompress to."""
_U32: Final = struct.Struct("<I")


def encode_manifest(manifest: Manifest, spec_version: int = 2, level: int = 3) -> bytes:
    """The whole file of a manifest.

    Parameters
    ----------
    manifest
        What to write; rows of an array that are not in ascending order of coordinates are sorted.
    spec_version
        1 or 2.
    level
        Of zstd.

    Raises
    ------
    InvalidInputError
        If an array has two references for one chunk, a row is of no known kind, or the manifest exceeds 2 GiB
        before compression.
    """
    if spec_version not in (1, 2):
        raise InvalidInputError(f"cannot encode a manifest in spec version {spec_version}")
    arrays = Written(lambda writer: _write_arrays(writer, dict(sorted(manifest.arrays.items()))))
    root: dict[int, Value] = {_ID: id_struct(manifest.id), _ARRAYS: arrays, _COMPRESSION: u8(_PLAIN)}
    return seal(FileType.MANIFEST, spec_version, FlatWriter().finish(FlatTable(root)), level)


_ARRAY_TABLE: Final = np.dtype([("vtable", "<i4"), ("refs", "<u4"), ("node", "V8")])


def _write_arrays(writer: FlatWriter, arrays: Mapping[NodeId, ChunkRefs]) -> int:
    """Write the vector of arrays and all below it; returns its position.

    Arrays of one rank are written as if they were one, so that a thousand small ones cost as much as a large one.
    """
    vtable = writer.vtable({_NODE: 8, _REFS: 4}, _ARRAY_TABLE.itemsize)
    writer.align(4)
    out = writer.out
    start = len(out)
    count = len(arrays)
    fields = start + 4 + 4 * np.arange(count, dtype=np.int64)
    tables = start + 4 + 4 * count + _ARRAY_TABLE.itemsize * np.arange(count, dtype=np.int64)
    out += _U32.pack(count) + bytes((4 + _ARRAY_TABLE.itemsize) * count)
    vectors = np.zeros(count, np.int64)
    by_rank: dict[int, list[int]] = {}
    everything = list(arrays.values())
    for i, refs in enumerate(everything):
        by_rank.setdefault(refs.ndim, []).append(i)
    for members in by_rank.values():
        batch = [everything[i] for i in members]
        sizes = np.array([len(refs) for refs in batch], np.int64)
        refs = _joined(batch)
        if not is_ascending(refs.coords, _first_rows(sizes)):
            refs = _joined([_in_order(list(arrays)[i], everything[i]) for i in members])
        vectors[members] = _write_refs(writer, refs, sizes)
    if count:
        np.frombuffer(out, "<u4", count, start + 4)[:] = tables - fields
        blocks = np.frombuffer(out, _ARRAY_TABLE, count, int(tables[0]))
        blocks["vtable"] = tables - vtable
        blocks["refs"] = vectors - (tables + 4)
        blocks["node"] = np.frombuffer(b"".join(arrays), "V8")
    return start


def _first_rows(sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_] | None:
    """For each row of arrays of those sizes, one after another, whether it is the first of its array."""
    if len(sizes) == 1:
        return None
    mask = np.zeros(int(sizes.sum()) + 1, np.bool_)
    mask[np.cumsum(sizes) - sizes] = True
    return mask[:-1]


def _joined(batch: Sequence[ChunkRefs]) -> ChunkRefs:
    """The rows of several arrays of one rank, one after another."""
    if len(batch) == 1:
        return batch[0]
    locations, location_base = _pooled([refs.locations for refs in batch])
    etags, etag_base = _pooled([refs.etags for refs in batch])
    inline, inline_base = _pooled([refs.inline_data for refs in batch])
    checked = any(refs.checksum_kind is not None for refs in batch)
    return ChunkRefs(
        coords=np.concatenate([refs.coords for refs in batch]),
        kind=np.concatenate([refs.kind for refs in batch]),
        offset=np.concatenate(
            [
                refs.offset + np.where(refs.kind == INLINE, base, 0).astype(np.uint64) if base else refs.offset
                for refs, base in zip(batch, inline_base, strict=True)
            ]
        ),
        length=np.concatenate([refs.length for refs in batch]),
        chunk_id=np.concatenate([refs.chunk_id for refs in batch]),
        location=np.concatenate([refs.location + base for refs, base in zip(batch, location_base, strict=True)]),
        locations=tuple(text for part in locations for text in part),
        checksum_kind=np.concatenate([_or_zeros(refs.checksum_kind, refs, np.uint8) for refs in batch])
        if checked
        else None,
        checksum=np.concatenate(
            [
                _or_zeros(refs.checksum, refs, np.int64)
                + np.where(_or_zeros(refs.checksum_kind, refs, np.uint8) == ETAG, base, 0)
                for refs, base in zip(batch, etag_base, strict=True)
            ]
        )
        if checked
        else None,
        etags=tuple(text for part in etags for text in part),
        inline_data=b"".join(inline),
    )


_P = TypeVar("_P", tuple[str, ...], bytes)


def _pooled(parts: Sequence[_P]) -> tuple[list[_P], list[int]]:
    """The parts that differ in identity, and for each where its items begin among those of all."""
    kept: list[_P] = []
    begins: dict[int, int] = {}
    total = 0
    for part in parts:
        if id(part) not in begins:
            begins[id(part)] = total
            kept.append(part)
            total += len(part)
    return kept, [begins[id(part)] for part in parts]


def _or_zeros(column: npt.NDArray[Any] | None, refs: ChunkRefs, dtype: type) -> npt.NDArray[Any]:
    return np.zeros(len(refs), dtype) if column is None else column


def _in_order(node: NodeId, refs: ChunkRefs) -> ChunkRefs:
    if is_ascending(refs.coords):
        return refs
    ordered = _take(refs, lexicographic_order(refs.coords))
    if not is_ascending(ordered.coords):
        raise InvalidInputError(
            f"cannot encode the manifest: array {encode_id(node)} has two references for one chunk",
            ErrorKind.INVALID_CHUNK_INDEX,
        )
    return ordered


def _take(refs: ChunkRefs, rows: npt.NDArray[np.intp]) -> ChunkRefs:
    return ChunkRefs(
        coords=refs.coords[rows],
        kind=refs.kind[rows],
        offset=refs.offset[rows],
        length=refs.length[rows],
        chunk_id=refs.chunk_id[rows],
        location=refs.location[rows],
        locations=refs.locations,
        checksum_kind=None if refs.checksum_kind is None else refs.checksum_kind[rows],
        checksum=None if refs.checksum is None else refs.checksum[rows],
        etags=refs.etags,
        inline_data=refs.inline_data,
    )


class _Layout(NamedTuple):
    """How the references of one kind, rank and set of fields stand in the file, vector of coordinates included."""

    block: np.dtype[Any]
    """Fields named by slot number, and ``vtable``, ``ndim``, ``coords``."""
    vector: int
    """Where in the block the vector of coordinates begins."""
    vtable: Mapping[int, int]
    """Field offsets by slot."""


_FIELD_TYPES: Final = {
    _INLINE: "<u4",
    _OFFSET: "<u8",
    _LENGTH: "<u8",
    _CHUNK_ID: "V12",
    _LOCATION: "<u4",
    _ETAG: "<u4",
    _LAST_MODIFIED: "<u4",
}
_KIND_FIELDS: Final = {INLINE: (_INLINE,), NATIVE: (_CHUNK_ID,), VIRTUAL: (_LOCATION,)}
_CHECKSUM_FIELDS: Final = {NO_CHECKSUM: (), ETAG: (_ETAG,), LAST_MODIFIED: (_LAST_MODIFIED,)}


@lru_cache(maxsize=256)
def _layout(slots: tuple[int, ...], ndim: int) -> _Layout:
    # The table starts 8-aligned with its offset to the vtable and, as its first field, the offset to the coordinates;
    # numbers of 8 bytes follow, so that nothing needs padding.
    wide = [slot for slot in slots if _FIELD_TYPES[slot] == "<u8"]
    order = [_INDEX, *wide, *[slot for slot in slots if slot not in wide]]
    names, formats, offsets = ["vtable"], ["<i4"], [0]
    end = 4
    for slot in order:
        names.append(str(slot))
        formats.append(_FIELD_TYPES.get(slot, "<u4"))
        offsets.append(end)
        end += np.dtype(formats[-1]).itemsize
    size = end + 4 + 4 * ndim
    block: np.dtype[Any] = np.dtype(
        {
            "names": [*names, "ndim", "coords"],
            "formats": [*formats, "<u4", ("<u4", (ndim,))],
            "offsets": [*offsets, end, end + 4],
            "itemsize": size + -size % 8,
        }
    )
    return _Layout(block, end, dict(zip(order, offsets[1:], strict=True)))


class _Group(NamedTuple):
    """References that share a layout."""

    rows: npt.NDArray[np.intp] | slice
    size: int
    slots: tuple[int, ...]


def _groups(refs: ChunkRefs) -> list[_Group]:
    """Rows by kind, checksum, and whether offset and length differ from their default, 0."""
    code = refs.kind.astype(np.uint8) << 4
    has_span = refs.kind != INLINE
    code |= ((refs.offset != 0) & has_span).astype(np.uint8) << 3
    code |= ((refs.length != 0) & has_span).astype(np.uint8) << 2
    if refs.checksum_kind is not None:
        code |= np.where(refs.kind == VIRTUAL, refs.checksum_kind, NO_CHECKSUM).astype(np.uint8)
    counts = np.bincount(code, minlength=256)
    groups = []
    for value in np.flatnonzero(counts).tolist():
        kind, checksum = value >> 4, value & 3
        if kind not in _KIND_FIELDS or checksum not in _CHECKSUM_FIELDS:
            raise InvalidInputError(f"cannot encode a reference of kind {kind} with checksum kind {checksum}")
        slots = _KIND_FIELDS[kind] + _CHECKSUM_FIELDS[checksum]
        slots += (_OFFSET,) * (value >> 3 & 1) + (_LENGTH,) * (value >> 2 & 1)
        count = int(counts[value])
        rows = slice(None) if count == len(refs) else np.flatnonzero(code == value)
        groups.append(_Group(rows, count, slots))
    return groups


def _write_refs(writer: FlatWriter, refs: ChunkRefs, sizes: npt.NDArray[np.int64]) -> Positions:
    """Write a vector of references for each array, given the rows of all and their numbers; returns the positions."""
    groups = _groups(refs)
    layouts = [_layout(group.slots, refs.ndim) for group in groups]
    vtables = [writer.vtable(layout.vtable, layout.vector) for layout in layouts]
    out = writer.out
    writer.align(4)
    start = len(out)
    # A vector is its length and an offset for each row.
    vectors = start + 4 * (np.cumsum(sizes) - sizes + np.arange(len(sizes)))
    fields = start + 4 * (np.arange(len(refs), dtype=np.int64) + np.repeat(np.arange(1, len(sizes) + 1), sizes))
    words = len(refs) + len(sizes)
    end = start + 4 * words
    places: list[int] = []
    for layout, group in zip(layouts, groups, strict=True):
        places.append(end := end + -end % 8)
        end += layout.block.itemsize * group.size
    locations, location_at = _strings(refs.locations, refs.location[refs.kind == VIRTUAL], end)
    etags, etag_at = _strings(refs.etags, _etag_rows(refs), end + len(locations))
    inline_start = end + len(locations) + len(etags)
    inline_at, inline_end = _inline_places(refs, inline_start)
    if inline_end > MAX_BYTES:
        raise InvalidInputError(
            f"cannot encode a manifest of {inline_end} bytes: it holds at most {MAX_BYTES}; split it"
        )
    out += bytes(inline_end - start)
    index = np.frombuffer(out, "<u4", words, start)
    index[(vectors - start) >> 2] = sizes
    at = (fields - start) >> 2
    for layout, group, vtable, place in zip(layouts, groups, vtables, places, strict=True):
        tables = place + layout.block.itemsize * np.arange(group.size, dtype=np.int64)
        rows = group.rows
        index[at[rows]] = tables - fields[rows]
        blocks = np.frombuffer(out, layout.block, group.size, place)
        blocks["vtable"] = tables - vtable
        blocks[str(_INDEX)] = layout.vector - layout.vtable[_INDEX]
        blocks["ndim"] = refs.ndim
        blocks["coords"] = refs.coords[rows]
        for slot in group.slots:
            field = tables + layout.vtable[slot]
            blocks[str(slot)] = _field_values(refs, rows, slot, field, location_at, etag_at, inline_at)
    out[end : end + len(locations)] = locations
    out[end + len(locations) : inline_start] = etags
    _fill_inline(out, refs, inline_at)
    return vectors


def _field_values(
    refs: ChunkRefs,
    rows: npt.NDArray[np.intp] | slice,
    slot: int,
    field: Positions,
    location_at: Positions,
    etag_at: Positions,
    inline_at: Positions,
) -> npt.NDArray[Any]:
    if slot == _CHUNK_ID:
        return refs.chunk_id[rows]
    if slot == _OFFSET:
        return refs.offset[rows]
    if slot == _LENGTH:
        return refs.length[rows]
    if slot == _LOCATION:
        places: Positions = location_at[refs.location[rows]]
        return places - field
    if slot == _INLINE:
        numbers: npt.NDArray[np.intp] = np.cumsum(refs.kind == INLINE)[rows] - 1
        vectors: Positions = inline_at[numbers]
        return vectors - field
    assert refs.checksum is not None
    checksums = refs.checksum[rows]
    return etag_at[checksums] - field if slot == _ETAG else checksums


def _etag_rows(refs: ChunkRefs) -> npt.NDArray[np.int64]:
    if refs.checksum is None or refs.checksum_kind is None:
        return np.empty(0, np.int64)
    numbers: npt.NDArray[np.int64] = refs.checksum[refs.checksum_kind == ETAG]
    return numbers


def _strings(texts: Sequence[str], used: npt.NDArray[Any], start: int) -> tuple[bytes, Positions]:
    """The strings that are used, to stand at ``start``, and the position of each of all; padded to 4 bytes."""
    at = np.zeros(len(texts), np.int64)
    mask = np.zeros(len(texts), np.bool_)
    mask[used] = True
    parts: list[bytes] = []
    position = start
    for i in np.flatnonzero(mask).tolist():
        try:
            data = texts[i].encode()
        except UnicodeEncodeError as error:
            raise InvalidInputError(f"cannot encode {texts[i]!r}: not valid Unicode") from error
        padding = 4 - len(data) % 4  # at least the NUL
        at[i] = position
        parts += (_U32.pack(len(data)), data, b"\0\0\0\0"[:padding])
        position += 4 + len(data) + padding
    return b"".join(parts), at


def _inline_places(refs: ChunkRefs, start: int) -> tuple[Positions, int]:
    """Position of the vector of each inline row, and where the last one ends."""
    sizes = refs.length[refs.kind == INLINE].astype(np.int64)
    ends = start + np.cumsum(4 + sizes + -sizes % 4)
    at = ends - (4 + sizes + -sizes % 4)
    return at, int(ends[-1]) if len(ends) else start


def _fill_inline(out: bytearray, refs: ChunkRefs, at: Positions) -> None:
    if not len(at):
        return
    inline = refs.kind == INLINE
    sizes = refs.length[inline].astype(np.int64)
    octets = np.frombuffer(out, np.uint8)
    heads: npt.NDArray[Any] = np.ndarray((len(octets) - 3,), "<u4", octets, strides=(1,))
    heads[at] = sizes
    copy_spans(octets, at + 4, refs.inline_data, refs.offset[inline].astype(np.int64), sizes)


def decode_manifest(data: bytes, *, expected_id: ObjectId | None = None) -> Manifest:
    """Read a manifest of format 1 or 2.

    Parameters
    ----------
    data
        The whole file.
    expected_id
        What the id within must be.

    Returns
    -------
    Manifest
        Its arrays share one table of locations, one of etags, and the bytes of inline chunks.

    Raises
    ------
    FormatError
        If the file is not a manifest, is corrupt, or has another id.
    """
    name = "manifest" if expected_id is None else f"manifest {encode_id(expected_id)}"
    _, payload = unseal(data, FileType.MANIFEST, what=name)
    buffer = Buffer(payload, name)
    root = buffer.root()
    id = ObjectId(required(root.inline(_ID, _ID_SIZE), root, "id"))
    if expected_id is not None and id != expected_id:
        raise buffer.fail(f"its id is {encode_id(id)}")
    nodes: list[NodeId] = []
    spans: list[tuple[int, int]] = []
    for table in required(root.tables(_ARRAYS), root, "arrays"):
        nodes.append(NodeId(required(table.inline(_NODE, _NODE_ID_SIZE), table, "node_id")))
        spans.append(required(table.vector(_REFS, 4), table, "refs"))
    if len(set(nodes)) != len(nodes):
        raise buffer.fail("an array stands in it twice")
    columns = _decode_rows(buffer, spans, _dictionary(root))
    return Manifest(id=id, arrays=dict(sorted(zip(nodes, columns, strict=True), key=lambda item: item[0])))


def _dictionary(root: Table) -> zstandard.ZstdDecompressor | None:
    algorithm = root.u8(_COMPRESSION, _WITH_DICTIONARY)
    dictionary = root.blob(_DICTIONARY)
    if algorithm not in (_PLAIN, _WITH_DICTIONARY):
        raise root.buffer.fail(f"its locations are compressed by algorithm {algorithm}, which is unknown")
    if algorithm == _PLAIN or not dictionary:
        return None
    try:
        return zstandard.ZstdDecompressor(dict_data=zstandard.ZstdCompressionDict(dictionary))
    except (zstandard.ZstdError, ValueError) as error:
        raise root.buffer.fail(f"its dictionary of locations is corrupt ({error})") from error


def _decode_rows(
    buffer: Buffer, spans: Sequence[tuple[int, int]], dictionary: zstandard.ZstdDecompressor | None
) -> list[ChunkRefs]:
    """Columns of each vector of references, given where its items begin and how many they are."""
    counts = [count for _, count in spans]
    total = sum(counts)
    buffer.charge_tables(total)
    if not total:
        return [ChunkRefs.empty(0) for _ in spans]
    fields = np.concatenate([start + 4 * np.arange(count, dtype=np.int64) for start, count in spans])
    tables = TableColumns(buffer, fields + gather(buffer, fields, "<u4"))
    del fields
    inline = tables.vectors(_INLINE, 1)
    chunk_id = tables.column(_CHUNK_ID, _ID_SIZE)
    location = tables.vectors(_LOCATION, 1)
    compressed = tables.vectors(_COMPRESSED, 1)
    kind = np.zeros(total, np.uint8)
    members = np.zeros(total, np.uint8)
    for number, found in ((INLINE, inline), (NATIVE, chunk_id), (VIRTUAL, location), (VIRTUAL, compressed)):
        if found is not None:
            rows = slice(None) if found.rows is None else found.rows
            kind[rows] = number
            members[rows] += 1
    if (members != 1).any():
        raise buffer.fail("a reference is not exactly one of inline, native and virtual")
    texts = _Texts(buffer)
    location_rows = np.full(total, -1, np.int32)
    if location is not None:
        location_rows[slice(None) if location.rows is None else location.rows] = texts.plain(location)
    if compressed is not None:
        rows = slice(None) if compressed.rows is None else compressed.rows
        location_rows[rows] = texts.compressed(compressed, dictionary)
    offset = tables.numbers(_OFFSET, "<u8")
    length = tables.numbers(_LENGTH, "<u8")
    inline_data = b""
    if inline is not None:
        rows = slice(None) if inline.rows is None else inline.rows
        inline_data, offset[rows] = _inline_bytes(buffer, inline)
        length[rows] = inline.counts
    checksum_kind, checksum, etags = _checksums(buffer, tables, kind)
    chunk_ids = tables.numbers(_CHUNK_ID, ID12)
    coords = _coords(buffer, tables, counts)
    locations = texts.all()
    result = []
    first = 0
    for count, array_coords in zip(counts, coords, strict=True):
        rows = slice(first, first + count)
        first += count
        refs = ChunkRefs(
            coords=array_coords,
            kind=kind[rows],
            offset=offset[rows],
            length=length[rows],
            chunk_id=chunk_ids[rows],
            location=location_rows[rows],
            locations=locations,
            checksum_kind=None if checksum_kind is None else checksum_kind[rows],
            checksum=None if checksum is None else checksum[rows],
            etags=etags,
            inline_data=inline_data,
        )
        if not is_ascending(array_coords):
            refs = _take(refs, lexicographic_order(array_coords))
            if not is_ascending(refs.coords):
                raise buffer.fail("an array has two references for one chunk")
        result.append(refs)
    return result


def _coords(buffer: Buffer, tables: TableColumns, counts: Sequence[int]) -> list[npt.NDArray[np.uint32]]:
    """Coordinates of each array's references."""
    vectors = tables.vectors(_INDEX, 4)
    if vectors is None or vectors.rows is not None:
        raise buffer.fail("a reference lacks the required field 'index'")
    if vectors.counts.min() == vectors.counts.max():
        everything = read_coords(buffer, vectors.starts, int(vectors.counts[0]))
        return np.split(everything, np.cumsum(counts)[:-1]) if len(counts) > 1 else [everything]
    result = []
    first = 0
    for count in counts:
        ranks = vectors.counts[first : first + count]
        ndim = int(ranks[0]) if count else 0
        if (ranks != ndim).any():
            raise buffer.fail("the references of one array differ in their number of dimensions")
        result.append(read_coords(buffer, vectors.starts[first : first + count], ndim))
        first += count
    return result


def _inline_bytes(buffer: Buffer, inline: Vectors) -> tuple[bytes, Positions]:
    """All inline chunks in one piece, and where each begins in it."""
    ends = np.cumsum(inline.counts)
    buffer.charge(int(ends[-1]))
    starts = ends - inline.counts
    octets = np.empty(int(ends[-1]), np.uint8)
    copy_spans(octets, starts, buffer.data, inline.starts, inline.counts)
    return octets.tobytes(), starts


def _checksums(
    buffer: Buffer, tables: TableColumns, kind: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.uint8] | None, npt.NDArray[np.int64] | None, tuple[str, ...]]:
    etag = tables.vectors(_ETAG, 1)
    modified = tables.numbers(_LAST_MODIFIED, "<u4").astype(np.int64)
    if etag is None and not modified.any():
        return None, None, ()
    checksum_kind = np.where(modified != 0, LAST_MODIFIED, NO_CHECKSUM).astype(np.uint8)
    checksum: npt.NDArray[np.int64] = modified
    texts = _Texts(buffer)
    if etag is not None:
        rows = slice(None) if etag.rows is None else etag.rows
        checksum_kind[rows] = ETAG
        checksum[rows] = texts.plain(etag)
    checksum_kind[kind != VIRTUAL] = NO_CHECKSUM
    checksum[kind != VIRTUAL] = 0
    return checksum_kind, checksum, texts.all()


class _Texts:
    """The distinct strings of a column."""

    __slots__ = ("_buffer", "_numbers")

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer
        self._numbers: dict[bytes, int] = {}

    def all(self) -> tuple[str, ...]:
        """Every string, by number."""
        try:
            return tuple([raw.decode() for raw in self._numbers])
        except UnicodeDecodeError as error:
            raise self._buffer.fail("a location or etag is not UTF-8") from error

    def plain(self, strings: Vectors) -> npt.NDArray[np.int32]:
        """The number of each string."""
        data, numbers = self._buffer.data, self._numbers
        starts = strings.starts.tolist()
        known: dict[int, int] = {}
        # Writers may share a string among rows: read each place once. Equal strings at several places become one.
        sizes = dict(zip(starts, strings.counts.tolist(), strict=True))
        self._buffer.charge(sum(sizes.values()))
        for start, size in sizes.items():
            known[start] = numbers.setdefault(data[start : start + size], len(numbers))
        return np.fromiter(map(known.__getitem__, starts), np.int32, len(starts))

    def compressed(self, blobs: Vectors, dictionary: zstandard.ZstdDecompressor | None) -> npt.NDArray[np.int32]:
        """The number of each string that is a zstd frame."""
        buffer, numbers = self._buffer, self._numbers
        if dictionary is None:
            raise buffer.fail("its locations are compressed but it has no dictionary")
        starts = blobs.starts.tolist()
        sizes = dict(zip(starts, blobs.counts.tolist(), strict=True))
        known: dict[int, int] = {}
        try:
            for start, size in sizes.items():
                frame = buffer.data[start : start + size]
                if zstandard.frame_content_size(frame) > _MAX_LOCATION:
                    raise buffer.fail("a compressed location is too long")
                raw = dictionary.decompress(frame, max_output_size=_MAX_LOCATION)
                # A few bytes may stand for many: counted here, not by what the frames take.
                buffer.charge(len(raw) // 8)
                known[start] = numbers.setdefault(raw, len(numbers))
        except zstandard.ZstdError as error:
            raise buffer.fail(f"a compressed location is corrupt ({error})") from error
        return np.fromiter(map(known.__getitem__, starts), np.int32, len(starts))
