"""Encoding manifests, formats 1 and 2, without a Python step per reference.

References of one kind, rank and set of fields have one fixed layout, so a vector of a million
tables is one structured array (`_Layout`); references of other kinds are other arrays beside it.
Data of variable length (locations, etags and inline chunks) follow the tables that point to them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import compress, islice
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.format.by_node import Part, owners
from icechunk.format.envelope import DEFAULT_LEVEL, FileType, seal
from icechunk.format.flat.flatbuffers import (
    MAX_BYTES,
    MAX_TABLES,
    FlatTable,
    FlatWriter,
    Value,
    Written,
    all_utf8,
    id_struct,
    joined_utf8,
    u8,
)
from icechunk.format.flat.vectors import Positions, copy_spans, first_rows, is_ascending, lexicographic_order
from icechunk.format.ids import encode_id
from icechunk.format.manifest import tables as at_slot
from icechunk.format.manifest.location_compression import LocationCompression, LocationDictionary, trained
from icechunk.format.manifest.refs_by_node import grouped_refs, unmixed
from icechunk.format.node_tables import write_node_tables
from icechunk.format.values import ETAG, INLINE, LAST_MODIFIED, NATIVE, NO_CHECKSUM, VIRTUAL, ChunkRefs, Manifest

__all__ = ["encode_manifest", "fill_inline", "frames", "inline_places", "max_refs", "strings"]

_U32: Final = struct.Struct("<I")


def strings(texts: Sequence[str], used: npt.NDArray[Any], start: int) -> tuple[bytes | bytearray, Positions]:
    """The bytes of the strings that are used, to be written at ``start`` and padded to 4 bytes, and the position of
    each text."""
    rows, chosen = _used(texts, used)
    data, sizes = joined_utf8(chosen)
    # A string ends with a NUL, which its length does not count.
    return _vectors(len(texts), rows, start, data, sizes, end_bytes=1)


def frames(
    texts: Sequence[str], used: npt.NDArray[Any], start: int, dictionary: LocationDictionary
) -> tuple[bytes | bytearray, Positions]:
    """As `strings`, with each text as a vector of bytes that is a zstd frame."""
    rows, chosen = _used(texts, used)
    data, sizes = dictionary.frames(all_utf8(chosen))
    return _vectors(len(texts), rows, start, data, sizes)


def _used(texts: Sequence[str], used: npt.NDArray[Any]) -> tuple[npt.NDArray[np.intp], Sequence[str]]:
    """Numbers of the texts that are used, ascending, and these texts."""
    mask = np.zeros(len(texts), np.bool_)
    mask[used] = True
    rows = np.flatnonzero(mask)
    return rows, texts if len(rows) == len(texts) else [texts[i] for i in rows.tolist()]


def _vectors(
    count: int,
    rows: npt.NDArray[np.intp],
    start: int,
    data: bytes,
    sizes: npt.NDArray[np.int64],
    *,
    end_bytes: int = 0,
) -> tuple[bytes | bytearray, Positions]:
    """Vectors of bytes, whose contents are consecutive in ``data``, to be written at ``start``, with at least
    ``end_bytes`` zeros after each; and the positions of ``count`` items, of which those in ``rows`` have a vector."""
    at = np.zeros(count, np.int64)
    if not len(rows):
        return b"", at
    filled = 4 + sizes + end_bytes
    filled += -filled % 4
    ends = np.cumsum(filled)
    places = ends - filled
    at[rows] = start + places
    out = bytearray(int(ends[-1]))
    _fill_vectors(out, places, data, np.cumsum(sizes) - sizes, sizes)
    return out, at


def inline_places(refs: ChunkRefs, start: int) -> tuple[Positions, int]:
    """Position of the vector of each inline row, and the end of the last one."""
    sizes = refs.length[refs.kind == INLINE].astype(np.int64)
    ends = start + np.cumsum(4 + sizes + -sizes % 4)
    at = ends - (4 + sizes + -sizes % 4)
    return at, int(ends[-1]) if len(ends) else start


def fill_inline(out: bytearray, refs: ChunkRefs, at: Positions) -> None:
    if not len(at):
        return
    inline = refs.kind == INLINE
    sizes = refs.length[inline].astype(np.int64)
    _fill_vectors(out, at, refs.inline_data, refs.offset[inline].astype(np.int64), sizes)


def _fill_vectors(
    out: bytearray, at: Positions, data: bytes, starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
) -> None:
    """Write vectors of bytes, which are spans of ``data``, at these positions."""
    octets = np.frombuffer(out, np.uint8)
    heads: npt.NDArray[Any] = np.ndarray((len(octets) - 3,), "<u4", octets, strides=(1,))
    heads[at] = sizes
    copy_spans(octets, at + 4, data, starts, sizes)


def encode_manifest(
    manifest: Manifest, spec_version: int = 2, level: int = DEFAULT_LEVEL, locations: LocationCompression | None = None
) -> bytes:
    """The whole file of a manifest.

    Parameters
    ----------
    manifest
        The manifest to write; rows of an array that are not in ascending order of coordinates are sorted.
    spec_version
        1 or 2.
    level
        Compression level of zstd.
    locations
        How locations of virtual references are compressed. None: not compressed. Format 1 never compresses them.

    Raises
    ------
    InvalidInputError
        If an array has two references for one chunk, a row is of unknown kind, or the manifest exceeds 2 GiB
        before compression or 50 million references.
    """
    if spec_version not in (1, 2):
        raise InvalidInputError(f"cannot encode a manifest in spec version {spec_version}", ErrorKind.SERIALIZATION)
    columns = unmixed(grouped_refs(manifest.arrays))
    dictionary = None
    if locations is not None and spec_version == 2:
        dictionary = trained([part.rows for part in columns.parts], locations)

    def write_arrays(writer: FlatWriter) -> int:
        return write_node_tables(
            writer, columns, lambda part: _write_refs(writer, _in_order(part), np.diff(part.edges), dictionary)
        )

    root: dict[int, Value] = {
        at_slot.ID: id_struct(manifest.id),
        at_slot.ARRAYS: Written(write_arrays),
        at_slot.COMPRESSION: u8(at_slot.PLAIN if dictionary is None else at_slot.WITH_DICTIONARY),
    }
    if dictionary is not None:
        root[at_slot.DICTIONARY] = dictionary.content
    return seal(FileType.MANIFEST, spec_version, FlatWriter().finish(FlatTable(root)), level)


def max_refs(ndim: int) -> int:
    """Upper bound of the number of references of an array of that rank in one manifest; large references reach the
    limit of bytes earlier."""
    smallest = _layout((at_slot.LOCATION, at_slot.LENGTH), ndim).block.itemsize + 4
    return min(MAX_TABLES, MAX_BYTES // smallest)


def _in_order(part: Part[ChunkRefs]) -> ChunkRefs:
    """The rows of the part, sorted in ascending order within each array."""
    refs = part.rows
    first = first_rows(part.edges)
    if is_ascending(refs.coords, first):
        return refs
    owner = owners(part.edges)
    refs = refs.take(lexicographic_order(refs.coords, owner))
    if not is_ascending(refs.coords, first):
        same = (refs.coords[1:] == refs.coords[:-1]).all(axis=1) & ~first[1:]
        node = part.nodes[int(owner[int(same.argmax())])]
        raise InvalidInputError(
            f"cannot encode the manifest: array {encode_id(node)} has two references for one chunk",
            ErrorKind.INVALID_CHUNK_INDEX,
        )
    return refs


class _Layout(NamedTuple):
    """Layout in the file of the references of one kind, rank and set of fields, with their vector of coordinates."""

    block: np.dtype[Any]
    """Fields named by slot number, and ``vtable``, ``ndim``, ``coords``."""
    vector: int
    """Position in the block of the vector of coordinates, bytes."""
    vtable: Mapping[int, int]
    """Field offsets by slot."""


_FIELD_TYPES: Final = {
    at_slot.INLINE: "<u4",
    at_slot.OFFSET: "<u8",
    at_slot.LENGTH: "<u8",
    at_slot.CHUNK_ID: "V12",
    at_slot.LOCATION: "<u4",
    at_slot.ETAG: "<u4",
    at_slot.LAST_MODIFIED: "<u4",
    at_slot.COMPRESSED: "<u4",
}
_CHECKSUM_FIELDS: Final = {NO_CHECKSUM: (), ETAG: (at_slot.ETAG,), LAST_MODIFIED: (at_slot.LAST_MODIFIED,)}


@lru_cache(maxsize=256)
def _layout(slots: tuple[int, ...], ndim: int) -> _Layout:
    # The table starts 8-aligned with its offset to the vtable and, as its first field, the offset to the coordinates.
    # Numbers of 8 bytes follow, so no padding is needed.
    wide = [slot for slot in slots if _FIELD_TYPES[slot] == "<u8"]
    order = [at_slot.INDEX, *wide, *[slot for slot in slots if slot not in wide]]
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


def _groups(refs: ChunkRefs, location_slot: int) -> list[_Group]:
    """Rows grouped by kind, checksum, and whether offset and length differ from their default, 0."""
    kind_fields = {INLINE: (at_slot.INLINE,), NATIVE: (at_slot.CHUNK_ID,), VIRTUAL: (location_slot,)}
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
        if kind not in kind_fields or checksum not in _CHECKSUM_FIELDS:
            raise InvalidInputError(
                f"cannot encode a reference of kind {kind} with checksum kind {checksum}", ErrorKind.SERIALIZATION
            )
        slots = kind_fields[kind] + _CHECKSUM_FIELDS[checksum]
        slots += (at_slot.OFFSET,) * (value >> 3 & 1) + (at_slot.LENGTH,) * (value >> 2 & 1)
        count = int(counts[value])
        rows = slice(None) if count == len(refs) else np.flatnonzero(code == value)
        groups.append(_Group(rows, count, slots))
    return groups


def _write_refs(
    writer: FlatWriter, refs: ChunkRefs, sizes: npt.NDArray[np.int64], dictionary: LocationDictionary | None
) -> Positions:
    """Write a vector of references for each array, given the rows of all arrays and the number of rows of each; returns
    the positions of the vectors."""
    if len(refs) <= _FEW and _WITHOUT_LOCATION.issuperset(refs.kind.tolist()):
        return _write_few(writer, refs, sizes.tolist())
    groups = _groups(refs, at_slot.LOCATION if dictionary is None else at_slot.COMPRESSED)
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
    used = refs.location[refs.kind == VIRTUAL]
    if dictionary is None:
        locations, location_at = strings(refs.locations, used, end)
    else:
        locations, location_at = frames(refs.locations, used, end, dictionary)
    etags, etag_at = strings(refs.etags, _etag_rows(refs), end + len(locations))
    inline_start = end + len(locations) + len(etags)
    inline_at, inline_end = inline_places(refs, inline_start)
    _require_room(len(refs), inline_end)
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
        blocks[str(at_slot.INDEX)] = layout.vector - layout.vtable[at_slot.INDEX]
        blocks["ndim"] = refs.ndim
        blocks["coords"] = refs.coords[rows]
        for slot in group.slots:
            field = tables + layout.vtable[slot]
            blocks[str(slot)] = _field_values(refs, rows, slot, field, location_at, etag_at, inline_at)
    out[end : end + len(locations)] = locations
    out[end + len(locations) : inline_start] = etags
    fill_inline(out, refs, inline_at)
    return vectors


def _require_room(count: int, end: int) -> None:
    """Refuse references that no reader accepts: too many, or up to a position that is too large."""
    if end > MAX_BYTES or count > MAX_TABLES:
        raise InvalidInputError(
            f"cannot encode a manifest of {count} references in {end} bytes: no reader accepts more than "
            f"{MAX_TABLES}, or {MAX_BYTES} bytes; split the array's manifests (ManifestConfig.splitting)",
            ErrorKind.SERIALIZATION,
        )


_WITHOUT_LOCATION: Final = frozenset((INLINE, NATIVE))
_FEW: Final = 64
"""Number of native and inline references up to which they are written one by one."""


def _write_few(writer: FlatWriter, refs: ChunkRefs, sizes: Sequence[int]) -> Positions:
    """As `_write_refs`, row by row, references without locations: for few of them the calls of numpy take the most
    time."""
    out, ndim = writer.out, refs.ndim
    rows = list(
        zip(
            refs.kind.tolist(),
            refs.offset.tolist(),
            refs.length.tolist(),
            refs.chunk_id.tolist(),
            refs.coords.tolist(),
            strict=True,
        )
    )
    groups: dict[tuple[int, bool, bool], list[int]] = {}
    for i, (kind, offset, length, _, _) in enumerate(rows):
        is_native = kind == NATIVE
        groups.setdefault((kind, is_native and offset != 0, is_native and length != 0), []).append(i)
    layouts = []
    for group in sorted(groups):
        kind, *fields = group
        slots = (at_slot.CHUNK_ID, *compress((at_slot.OFFSET, at_slot.LENGTH), fields))
        layout = _layout((at_slot.INLINE,) if kind == INLINE else slots, ndim)
        layouts.append((kind, fields, groups[group], layout, writer.vtable(layout.vtable, layout.vector)))
    writer.align(4)
    start = len(out)
    end = start + 4 * (len(rows) + len(sizes))
    for *_, members, layout, _ in layouts:
        end += -end % 8 + layout.block.itemsize * len(members)
    # The bytes of inline chunks follow all tables, in the order of the rows.
    vectors_of_bytes = dict[int, int]()
    inline: list[bytes] = []
    for i, (kind, offset, length, _, _) in enumerate(rows):
        if kind == INLINE:
            vectors_of_bytes[i] = end
            inline += (_U32.pack(length), refs.inline_data[offset : offset + length], bytes(-length % 4))
            end += 4 + length + -length % 4
    _require_room(len(rows), end)
    tables = [0] * len(rows)
    blocks: list[bytes] = []
    at = start + 4 * (len(rows) + len(sizes))
    for kind, fields, members, layout, vtable in layouts:
        blocks.append(bytes(-at % 8))
        at += -at % 8
        packer = _inline_packer(ndim) if kind == INLINE else _native_packer(sum(fields), ndim)
        index = layout.vector - layout.vtable[at_slot.INDEX]
        for i in members:
            tables[i] = at
            _, *numbers, chunk_id, coords = rows[i]
            if kind == INLINE:
                field = at + layout.vtable[at_slot.INLINE]
                blocks.append(packer.pack(at - vtable, index, vectors_of_bytes[i] - field, ndim, *coords))
            else:
                blocks.append(packer.pack(at - vtable, index, *compress(numbers, fields), chunk_id, ndim, *coords))
            at += packer.size
    words: list[int] = []
    vectors: list[int] = []
    placed = iter(tables)
    at = start
    for size in sizes:
        vectors.append(at)
        words.append(size)
        words += [table - (at + 4 * n) for n, table in enumerate(islice(placed, size), 1)]
        at += 4 + 4 * size
    out += struct.pack(f"<{len(words)}I", *words)
    out += b"".join(blocks)
    out += b"".join(inline)
    return np.array(vectors, np.int64)


@lru_cache(maxsize=256)
def _native_packer(wide: int, ndim: int) -> struct.Struct:
    """The block of a native reference with so many fields of 8 bytes, as `_layout` arranges it."""
    size = 8 + 8 * wide + 12 + 4 + 4 * ndim
    return struct.Struct(f"<iI{wide}Q12sI{ndim}I{-size % 8}x")


@lru_cache(maxsize=64)
def _inline_packer(ndim: int) -> struct.Struct:
    """The block of an inline reference, as `_layout` arranges it."""
    return struct.Struct(f"<iIII{ndim}I{4 * ndim % 8}x")


def _field_values(
    refs: ChunkRefs,
    rows: npt.NDArray[np.intp] | slice,
    slot: int,
    field: Positions,
    location_at: Positions,
    etag_at: Positions,
    inline_at: Positions,
) -> npt.NDArray[Any]:
    if slot == at_slot.CHUNK_ID:
        return refs.chunk_id[rows]
    if slot == at_slot.OFFSET:
        return refs.offset[rows]
    if slot == at_slot.LENGTH:
        return refs.length[rows]
    if slot in (at_slot.LOCATION, at_slot.COMPRESSED):
        places: Positions = location_at[refs.location[rows]]
        return places - field
    if slot == at_slot.INLINE:
        numbers: npt.NDArray[np.intp] = np.cumsum(refs.kind == INLINE)[rows] - 1
        vectors: Positions = inline_at[numbers]
        return vectors - field
    assert refs.checksum is not None
    checksums = refs.checksum[rows]
    return etag_at[checksums] - field if slot == at_slot.ETAG else checksums


def _etag_rows(refs: ChunkRefs) -> npt.NDArray[np.int64]:
    if refs.checksum is None or refs.checksum_kind is None:
        return np.empty(0, np.int64)
    numbers: npt.NDArray[np.int64] = refs.checksum[refs.checksum_kind == ETAG]
    return numbers
