"""Decoding manifests, formats 1 and 2, without a Python step per reference.

Nothing is assumed about the layout: `icechunk.format.flat.vectors` gathers each field of all references of all arrays
of the manifest at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from icechunk.errors import FormatError
from icechunk.format.by_node import Part, by_rank, is_twice, owners
from icechunk.format.envelope import FileType, unseal
from icechunk.format.flat.flatbuffers import Buffer, Table, required
from icechunk.format.flat.vectors import (
    JoinedBuffer,
    Positions,
    TableColumns,
    Vectors,
    copy_spans,
    first_rows,
    gather,
    is_ascending,
    joined,
    lexicographic_order,
    read_coords,
    regular_vectors,
    targets,
)
from icechunk.format.ids import NodeId, ObjectId, encode_id
from icechunk.format.manifest import tables as at_slot
from icechunk.format.manifest.refs_by_node import grouped_refs, refs_by_node
from icechunk.format.values import ETAG, ID12, INLINE, LAST_MODIFIED, NATIVE, NO_CHECKSUM, VIRTUAL, ChunkRefs, Manifest
from icechunk.runtime.zstd import zstd

__all__ = ["DecodedManifests", "RefsOfRank", "decode_coords", "decode_manifest", "decode_manifests"]

_ID_SIZE: Final = 12
_NODE_ID_SIZE: Final = 8
_MAX_LOCATION: Final = 2**16
"""Largest size in bytes that one compressed location may decompress to."""


def decode_manifest(data: bytes, *, expected_id: ObjectId | None = None) -> Manifest:
    """Read a manifest of format 1 or 2.

    Parameters
    ----------
    data
        The whole file.
    expected_id
        The id that the file must hold; None: any.

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
    id = ObjectId(required(root.inline(at_slot.ID, _ID_SIZE), root, "id"))
    if expected_id is not None and id != expected_id:
        raise buffer.fail(f"its id is {encode_id(id)}")
    start, count = required(root.vector(at_slot.ARRAYS, 4), root, "arrays")
    nodes, starts, counts = _arrays(buffer, start + 4 * np.arange(count, dtype=np.int64))
    if len(set(nodes)) != count:
        raise buffer.fail("an array is in it twice")
    parts = [
        Part(tuple(nodes) if len(part.arrays) == count else tuple([nodes[i] for i in part.arrays.tolist()]), *part[1:])
        for part in _decode_rows(buffer, starts, counts, _dictionary(root))
    ]
    return Manifest(id=id, arrays=refs_by_node(parts))


def decode_coords(
    data: bytes, node: NodeId, ndim: int, *, expected_id: ObjectId | None = None
) -> npt.NDArray[np.uint32] | None:
    """Read only which chunks of one array a manifest of format 1 or 2 has references of.

    Parameters
    ----------
    data
        The whole file.
    node
        Id of the array.
    ndim
        Its rank.
    expected_id
        The id that the file must hold; None: any.

    Returns
    -------
    uint32[n, ndim] or None
        Chunk coordinates, in any order. None: the array is not in the manifest once, with references of that rank.

    Raises
    ------
    FormatError
        If the file is not a manifest, is corrupt in what is read, or has another id.
    """
    name = "manifest" if expected_id is None else f"manifest {encode_id(expected_id)}"
    buffer = Buffer(unseal(data, FileType.MANIFEST, what=name)[1], name)
    root = buffer.root()
    id = ObjectId(required(root.inline(at_slot.ID, _ID_SIZE), root, "id"))
    if expected_id is not None and id != expected_id:
        raise buffer.fail(f"its id is {encode_id(id)}")
    start, count = required(root.vector(at_slot.ARRAYS, 4), root, "arrays")
    nodes, starts, counts = _arrays(buffer, start + 4 * np.arange(count, dtype=np.int64))
    if nodes.count(node) != 1:
        return None
    number = nodes.index(node)
    total = int(counts[number])
    buffer.charge_tables(total)
    if not total:
        return None
    regular = regular_vectors(buffer, int(starts[number]), total, at_slot.INDEX, ndim)
    if regular is not None:
        return regular
    fields = starts[number] + 4 * np.arange(total, dtype=np.int64)
    vectors = TableColumns(buffer, targets(buffer, fields)).vectors(at_slot.INDEX, 4)
    if vectors is None or vectors.rows is not None or (vectors.counts != ndim).any():
        return None
    return read_coords(buffer, vectors.starts, ndim)


class RefsOfRank(NamedTuple):
    """References of several arrays of one rank, array by array."""

    arrays: npt.NDArray[np.int64]
    """int64[k]: numbers of the arrays, ascending."""
    edges: npt.NDArray[np.int64]
    """int64[k + 1]: the first row of each array, and the end of the last array's rows."""
    rows: ChunkRefs


class DecodedManifests(NamedTuple):
    """References of several manifests in shared columns."""

    nodes: Sequence[NodeId]
    """Ids of the arrays; an array is listed once for each manifest that holds references of it."""
    manifests: npt.NDArray[np.int64]
    """int64[len(nodes)]: the number of the manifest that each of them is listed for, ascending."""
    parts: Sequence[RefsOfRank]
    """The references; arrays are numbered as in ``nodes``."""


def decode_manifests(files: Sequence[tuple[ObjectId, bytes]]) -> list[DecodedManifests]:
    """Read several manifests of formats 1 and 2 at once, which for many small ones takes a fraction of the time.

    Parameters
    ----------
    files
        The whole files, each with the id that it must hold.

    Returns
    -------
    list of DecodedManifests
        One or several, in which manifests are numbered as in ``files``, each in one of them.

    Raises
    ------
    FormatError
        As `decode_manifest` for the first file that it refuses.
    """
    try:
        return _decode_together(files)
    except FormatError:
        # It raises an error that names the file and the reason.
        return [_alone(number, decode_manifest(data, expected_id=id)) for number, (id, data) in enumerate(files)]


def _decode_together(files: Sequence[tuple[ObjectId, bytes]]) -> list[DecodedManifests]:
    payloads = [unseal(data, FileType.MANIFEST)[1] for _, data in files]
    found: list[DecodedManifests] = []
    for which, buffer in joined(payloads, "manifests"):
        for some in _decode_joined(buffer, files[which]):
            found.append(some._replace(manifests=some.manifests + which.start))
    return found


def _decode_joined(buffer: JoinedBuffer, files: Sequence[tuple[ObjectId, bytes]]) -> list[DecodedManifests]:
    tables = TableColumns(buffer, buffer.roots)
    tables.require_ids(at_slot.ID, [id for id, _ in files])
    if (tables.numbers(at_slot.COMPRESSION, "u1") > at_slot.WITH_DICTIONARY).any():
        raise buffer.fail("locations are compressed by an unknown algorithm")
    dictionaries, together = tables.vectors(at_slot.DICTIONARY, 1), np.ones(len(files), np.bool_)
    if dictionaries is not None:
        together[slice(None) if dictionaries.rows is None else dictionaries.rows] = dictionaries.counts == 0
    alone = [
        _alone(i, decode_manifest(files[i][1], expected_id=files[i][0])) for i in np.flatnonzero(~together).tolist()
    ]
    arrays_of = tables.vectors(at_slot.ARRAYS, 4)
    if arrays_of is None or arrays_of.rows is not None:
        raise buffer.fail("one of them lacks the required field 'arrays'")
    numbers = np.flatnonzero(together)
    counts = arrays_of.counts[numbers]
    owner = np.repeat(np.arange(len(numbers)), counts)
    firsts = arrays_of.starts[numbers] - 4 * (np.cumsum(counts) - counts)
    nodes, starts, sizes = _arrays(buffer, firsts[owner] + 4 * np.arange(len(owner), dtype=np.int64))
    manifests = numbers[owner]
    if is_twice(np.frombuffer(b"".join(nodes), ">u8"), manifests):
        raise buffer.fail("an array is in one of them twice")
    return [*alone, DecodedManifests(nodes, manifests, _decode_rows(buffer, starts, sizes, None))]


def _alone(number: int, manifest: Manifest) -> DecodedManifests:
    nodes = [node for part in grouped_refs(manifest.arrays).parts for node in part.nodes]
    parts, first = [], 0
    for part in grouped_refs(manifest.arrays).parts:
        parts.append(RefsOfRank(np.arange(first, first + len(part.nodes)), part.edges, part.rows))
        first += len(part.nodes)
    return DecodedManifests(nodes, np.full(len(nodes), number, np.int64), parts)


def _arrays(buffer: Buffer, fields: Positions) -> tuple[list[NodeId], Positions, Positions]:
    """Ids of the arrays that these offset fields point to, and for each the position of the first item of its vector of
    references and the number of items."""
    count = len(fields)
    buffer.charge_tables(count)
    tables = TableColumns(buffer, targets(buffer, fields))
    if not count:
        return [], fields, fields
    ids, vectors = tables.column(at_slot.NODE, _NODE_ID_SIZE), tables.vectors(at_slot.REFS, 4)
    if ids is None or ids.rows is not None:
        raise buffer.fail("an array in it lacks the required field 'node_id'")
    if vectors is None or vectors.rows is not None:
        raise buffer.fail("an array in it lacks the required field 'refs'")
    raw = gather(buffer, ids.positions, f"V{_NODE_ID_SIZE}").tobytes()
    nodes = [NodeId(raw[i : i + _NODE_ID_SIZE]) for i in range(0, len(raw), _NODE_ID_SIZE)]
    return nodes, vectors.starts, vectors.counts


def _dictionary(root: Table) -> zstd.ZstdDecompressor | None:
    algorithm = root.u8(at_slot.COMPRESSION, at_slot.WITH_DICTIONARY)
    dictionary = root.blob(at_slot.DICTIONARY)
    if algorithm not in (at_slot.PLAIN, at_slot.WITH_DICTIONARY):
        raise root.buffer.fail(f"its locations are compressed by algorithm {algorithm}, which is unknown")
    if algorithm == at_slot.PLAIN or not dictionary:
        return None
    try:
        return zstd.ZstdDecompressor(dict_data=zstd.ZstdCompressionDict(dictionary))
    except (zstd.ZstdError, ValueError) as error:
        raise root.buffer.fail(f"its dictionary of locations is corrupt ({error})") from error


def _decode_rows(
    buffer: Buffer,
    starts: Positions,
    counts: Positions,
    dictionary: zstd.ZstdDecompressor | None,
) -> list[RefsOfRank]:
    """Columns of the arrays, given the position and the number of the references of each."""
    total = int(counts.sum())
    buffer.charge_tables(total)
    edges = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    if not total:
        return [RefsOfRank(np.arange(len(counts)), edges, ChunkRefs.empty(0))] if len(counts) else []
    owner = owners(edges)
    fields = (starts - 4 * edges[:-1])[owner] + 4 * np.arange(total, dtype=np.int64)
    tables = TableColumns(buffer, targets(buffer, fields))
    del fields
    inline = tables.vectors(at_slot.INLINE, 1)
    chunk_id = tables.column(at_slot.CHUNK_ID, _ID_SIZE)
    location = tables.vectors(at_slot.LOCATION, 1)
    compressed = tables.vectors(at_slot.COMPRESSED, 1)
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
    offset = tables.numbers(at_slot.OFFSET, "<u8")
    length = tables.numbers(at_slot.LENGTH, "<u8")
    inline_data = b""
    if inline is not None:
        rows = slice(None) if inline.rows is None else inline.rows
        inline_data, offset[rows] = _inline_bytes(buffer, inline)
        length[rows] = inline.counts
    checksum_kind, checksum, etags = _checksums(buffer, tables, kind)
    chunk_ids = tables.numbers(at_slot.CHUNK_ID, ID12)
    vectors = tables.vectors(at_slot.INDEX, 4)
    if vectors is None or vectors.rows is not None:
        raise buffer.fail("a reference lacks the required field 'index'")
    locations = texts.all()
    parts = []
    for ndim, present, own_edges, own in by_rank(owner, vectors.counts, counts):
        part = RefsOfRank(
            present,
            own_edges,
            ChunkRefs(
                coords=read_coords(buffer, vectors.starts[own], ndim),
                kind=kind[own],
                offset=offset[own],
                length=length[own],
                chunk_id=chunk_ids[own],
                location=location_rows[own],
                locations=locations,
                checksum_kind=None if checksum_kind is None else checksum_kind[own],
                checksum=None if checksum is None else checksum[own],
                etags=etags,
                inline_data=inline_data,
            ),
        )
        parts.append(_in_order(buffer, part))
    return parts


def _in_order(buffer: Buffer, part: RefsOfRank) -> RefsOfRank:
    """The same part with the rows of each array in ascending order."""
    first = first_rows(part.edges)
    if is_ascending(part.rows.coords, first):
        return part
    refs = part.rows.take(lexicographic_order(part.rows.coords, owners(part.edges)))
    if not is_ascending(refs.coords, first):
        raise buffer.fail("an array has two references for one chunk")
    return part._replace(rows=refs)


def _inline_bytes(buffer: Buffer, inline: Vectors) -> tuple[bytes, Positions]:
    """All inline chunks concatenated, and the position of each."""
    ends = np.cumsum(inline.counts)
    buffer.charge(int(ends[-1]))
    starts = ends - inline.counts
    octets = np.empty(int(ends[-1]), np.uint8)
    copy_spans(octets, starts, buffer.data, inline.starts, inline.counts)
    return octets.tobytes(), starts


def _checksums(
    buffer: Buffer, tables: TableColumns, kind: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.uint8] | None, npt.NDArray[np.int64] | None, tuple[str, ...]]:
    etag = tables.vectors(at_slot.ETAG, 1)
    modified = tables.numbers(at_slot.LAST_MODIFIED, "<u4").astype(np.int64)
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
        # Writers may share a string among rows: read each position once. Equal strings at several positions become one.
        sizes = dict(zip(starts, strings.counts.tolist(), strict=True))
        self._buffer.charge(sum(sizes.values()))
        for start, size in sizes.items():
            known[start] = numbers.setdefault(data[start : start + size], len(numbers))
        return np.fromiter(map(known.__getitem__, starts), np.int32, len(starts))

    def compressed(self, blobs: Vectors, dictionary: zstd.ZstdDecompressor | None) -> npt.NDArray[np.int32]:
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
                if zstd.frame_content_size(frame) > _MAX_LOCATION:
                    raise buffer.fail("a compressed location is too long")
                raw = dictionary.decompress(frame, max_output_size=_MAX_LOCATION)
                # A few bytes may decompress to many: the decompressed size counts against the budget.
                buffer.charge(len(raw) // 8)
                known[start] = numbers.setdefault(raw, len(numbers))
        except zstd.ZstdError as error:
            raise buffer.fail(f"a compressed location is corrupt ({error})") from error
        return np.fromiter(map(known.__getitem__, starts), np.int32, len(starts))
