"""Encoding the nodes of a snapshot, formats 1 and 2, without a Python step per table.

A node is half a dozen small tables. The positions of most fields depend only on the node's sizes and are known
beforehand, so a node is one `struct.pack` (`_Head`), followed by its manifests and the names of its dimensions. Lengths
of paths are rounded up to words, so a hierarchy needs few such layouts. Every node starts 4 bytes before an 8-byte
boundary, which a table needs whose first field has 8 bytes.

Many nodes that share a layout are written at once (`block`). Five thousand arrays of one kind differ only in their
paths, their shapes, the manifests of their references, and their positions in the file: all other bytes are copied from
the first one.

The documents follow all nodes. In wide hierarchies many are equal, and they are most of a file; several nodes refer to
one of them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.format.flat.flatbuffers import MAX_BYTES, FlatWriter, utf8
from icechunk.format.flat.vectors import put
from icechunk.format.values import ManifestFile, ManifestRef, NodeKind, NodeSnapshot

__all__ = ["FEW", "CopiedNodes", "Layout", "alike", "block", "write_files", "write_nodes"]

FEW: Final = 16
"""Number of nodes of one layout below which they are written one by one."""

_ID_AT: Final = 16
_DATA_AT: Final = 8
"""Position of the offset to its document in a node's table."""
_SHARING: Final = 8
"""Most nodes that refer to one document. Readers refuse a payload if they have to read more than 16 times its bytes."""
_WIDEST: Final = 8
"""Alignment of the widest field, bytes."""
_PADDINGS: Final = (b"", bytes(3), bytes(2), bytes(1))
"""Bytes that follow a document, by its size modulo 4."""
_REF_SIZE: Final = 24
"""Bytes of the table of a manifest's id and extents, up to the extents."""
_MOST: Final = 2**32 - 1


class Layout(NamedTuple):
    """Positions of the parts that differ from node to node, counted in bytes from the node's first byte."""

    tables: tuple[int, ...]
    """Position of every table; a table begins with the distance to its vtable."""
    path_at: int
    path_bytes: int
    """Size of the path's field in bytes, with its padding."""
    dimensions_at: int
    """Position of the table (format 2) or the numbers (format 1) of the first dimension."""
    refs_at: int
    """Position of the table of the first manifest."""


def alike(nodes: Sequence[NodeSnapshot], paths: Sequence[bytes]) -> list[npt.NDArray[np.intp]]:
    """For every layout, the numbers of the nodes that have it; nodes with `NodeSnapshot.extra` are left out.

    Parameters
    ----------
    paths
        Encoded paths of the nodes.
    """
    n = len(nodes)
    traits: list[npt.NDArray[np.int64]] = [
        np.fromiter(map(len, paths), np.int64, n) // 4,
        np.fromiter([len(node.shape) if node.kind is NodeKind.ARRAY else -1 for node in nodes], np.int64, n),
        np.fromiter([len(node.manifests) for node in nodes], np.int64, n),
        np.fromiter([len(node.manifests[0].extents) if node.manifests else -1 for node in nodes], np.int64, n),
    ]
    numbers = {names: i for i, names in enumerate(dict.fromkeys(node.dimension_names for node in nodes))}
    if len(numbers) > 1:
        traits.append(np.fromiter([numbers[node.dimension_names] for node in nodes], np.int64, n))
    kinds = np.zeros(n, np.int64)
    for trait in traits:
        if trait.min() == trait.max():
            continue
        # Groups are renumbered each time, so that the product stays small.
        _, kinds = np.unique(kinds * (int(trait.max()) + 2) + trait + 1, return_inverse=True)
    order = np.argsort(kinds, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(kinds[order])) + 1)
    extra = np.array([node.extra is not None for node in nodes], np.bool_)
    return [group[~extra[group]] for group in groups] if extra.any() else groups


def block(
    template: bytes,
    layout: Layout,
    nodes: Sequence[NodeSnapshot],
    paths: Sequence[bytes],
    shapes_v1: Sequence[Sequence[tuple[int, int]]] | None,
) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]] | None:
    """The bytes of many nodes without their documents, uint8[n, size]; None where a number does not fit its field.

    Parameters
    ----------
    template
        The bytes of the first node.
    nodes, paths
        The nodes and their encoded paths; their bytes follow one another from the position of the first.
    shapes_v1
        For format 1: length and chunk length along each dimension, of each node.
    """
    n, size = len(nodes), len(template)
    out = np.empty((n, size), np.uint8)
    out[:] = np.frombuffer(template, np.uint8)

    def field(at: int, dtype: npt.DTypeLike, items: int = 1, step: int = 0) -> npt.NDArray[Any]:
        """A view of numbers in every node: ``items`` of them, ``step`` bytes apart."""
        return np.ndarray((n, items), dtype, out, at, (size, step))

    moved = size * np.arange(n, dtype=np.int64)
    for at in layout.tables:
        distance = field(at, "<i4")[:, 0]
        distance[:] = distance + moved
    field(_ID_AT, "V8")[:, 0] = np.frombuffer(b"".join([node.id for node in nodes]), "V8")
    field(layout.path_at, "<u4")[:, 0] = np.fromiter(map(len, paths), np.uint32, n)
    # A numpy bytes value drops trailing zeros, which the padding writes again.
    padded = np.array(paths, f"S{layout.path_bytes}").view(np.uint8).reshape(n, layout.path_bytes)
    out[:, layout.path_at + 4 : layout.path_at + 4 + layout.path_bytes] = padded
    shapes: Sequence[Sequence[tuple[int, int]]] = [node.shape for node in nodes] if shapes_v1 is None else shapes_v1
    ndim = len(shapes[0])
    if ndim and nodes[0].kind is NodeKind.ARRAY:
        numbers = _numbers(list(chain.from_iterable(chain.from_iterable(shapes))), 2**64 - 1)
        if numbers is None or (shapes_v1 is None and numbers[1::2].max() > _MOST):
            return None
        pairs = numbers.reshape(n, 2 * ndim)
        if shapes_v1 is None:
            field(layout.dimensions_at + 4, "<u8", ndim, 16)[:] = pairs[:, ::2]
            field(layout.dimensions_at + 12, "<u4", ndim, 16)[:] = pairs[:, 1::2]
        else:
            field(layout.dimensions_at, "<u8", 2 * ndim, 8)[:] = pairs
    count = len(nodes[0].manifests)
    if count:
        refs = [ref for node in nodes for ref in node.manifests]
        rank = len(refs[0].extents)
        extents = [ref.extents for ref in refs]
        step = _REF_SIZE + 8 * rank
        field(layout.refs_at + 8, "V12", count, step)[:] = np.frombuffer(
            b"".join([ref.object_id for ref in refs]), "V12"
        ).reshape(n, count)
        if set(map(len, extents)) != {rank}:
            return None
        if rank:
            ranges = _numbers(list(chain.from_iterable(chain.from_iterable(extents))), _MOST)
            if ranges is None:
                return None
            ranges = ranges.reshape(n, count, 2 * rank)
            for i in range(2 * rank):
                field(layout.refs_at + _REF_SIZE + 4 * i, "<u4", count, step)[:] = ranges[:, :, i]
    return out


def _numbers(values: Sequence[int], most: int) -> npt.NDArray[np.uint64] | None:
    """The values as a column; None if one of them is negative or larger than ``most``."""
    if min(values) < 0 or max(values) > most:
        return None
    return np.array(values, np.uint64)


_ARRAY, _GROUP = 1, 2
_U32: Final = struct.Struct("<I")
_FILE: Final = struct.Struct("<iQI12s4x")
_NAME: Final = struct.Struct("<iII")


class _Head:
    """Layout of the part of a node that depends only on its sizes.

    Parameters
    ----------
    newer
        True for format 2.
    ndim
        Dimensions of the array; −1: a group.
    path, extra
        Number of 4-byte words that each takes; −1: no ``extra``.
    names
        Whether the dimensions have names.
    """

    __slots__ = (
        "array_at",
        "array_links",
        "dimensions",
        "dimensions_at",
        "names_field",
        "node_links",
        "packer",
        "size",
    )

    def __init__(self, newer: bool, ndim: int, path: int, extra: int, names: bool) -> None:
        is_array, has_extra = ndim >= 0, extra >= 0
        self.array_at = array_at = 32 if has_extra else 28
        links = is_array * (2 + names + newer)
        # The vector of format 1 has items of 8 bytes after its length; tables of dimensions have fields of 8 bytes.
        old_at = array_at + 4 + 4 * links
        gap = -old_at % 8 if is_array else 0
        old_at += gap
        new_at = old_at + 4
        self.dimensions_at = old_at
        shape = ""
        path_at = old_at
        if is_array and newer:
            inner_gap = -(new_at + 4 + 4 * ndim) % 8
            self.dimensions_at = new_at + 4 + 4 * ndim + inner_gap
            shape = f"II{ndim}I{inner_gap}x" + "iQI" * ndim
            path_at = self.dimensions_at + 16 * ndim
        elif is_array:
            shape = f"I{2 * ndim}Q"
            path_at = old_at + 4 + 16 * ndim
        extra_at = path_at + 4 + 4 * path
        self.size = size = extra_at + (4 + 4 * extra if has_extra else 0)
        # The document's place is known later.
        self.node_links = (path_at - 4, 0, array_at - 12) + ((extra_at - 16,) if has_extra else ())
        self.names_field = array_at + 8 if names else 0
        refs_field = array_at + 8 + 4 * names
        self.array_links = (old_at - array_at - 4, size - refs_field, new_at - refs_field - 4)
        self.dimensions = tuple(self.dimensions_at - new_at - 4 + 12 * i for i in range(max(ndim, 0)))
        """Offsets to the tables of the dimensions."""
        text = f"I{4 * extra}s" if has_extra else ""
        self.packer = struct.Struct(f"<i{3 + has_extra}I8sB3xi{links}I{gap}x{shape}I{4 * path}s{text}")


_head = lru_cache(maxsize=4096)(_Head)


@lru_cache(maxsize=64)
def _offsets(count: int, size: int) -> bytes:
    """A vector's length and its offsets to ``count`` tables of ``size`` bytes that directly follow it."""
    return struct.pack(f"<{count + 1}I", count, *range(4 * count, 4 * count + (size - 4) * count, max(size - 4, 1)))


class _Nodes:
    """Encodes nodes one by one."""

    def __init__(self, writer: FlatWriter, newer: bool) -> None:
        self._newer = newer
        self._node = writer.vtable({0: 16, 1: 4, 2: _DATA_AT, 3: 24, 4: 12}, 28)
        self._with_extra = writer.vtable({0: 20, 1: 4, 2: _DATA_AT, 3: 28, 4: 12, 5: 16}, 32)
        self._group = writer.vtable({}, 4)
        self._array = writer.vtable({0: 4, 2: 8, 3: 12} if newer else {0: 4, 2: 8}, 16 if newer else 12)
        named = {0: 4, 1: 8, 2: 12, 3: 16} if newer else {0: 4, 1: 8, 2: 12}
        self._named = writer.vtable(named, 20 if newer else 16)
        self._dimension = writer.vtable({0: 4, 1: 12}, 16)
        self._ref = writer.vtable({0: 8, 1: 4}, 20)
        self._name = writer.vtable({0: 4}, 8)
        self._no_name = writer.vtable({}, 4)

    def pack(self, node: NodeSnapshot, shape_v1: Sequence[tuple[int, int]], at: int) -> list[bytes]:
        """The node's bytes for that position, without its document; their number is a multiple of 8."""
        path, extra, newer = utf8(node.path), node.extra if self._newer else None, self._newer
        names = node.dimension_names
        is_array = node.kind is NodeKind.ARRAY
        head = _head(
            newer,
            len(node.shape if newer else shape_v1) if is_array else -1,
            len(path) // 4 + 1,
            -1 if extra is None else -(-len(extra) // 4),
            is_array and names is not None,
        )
        refs: list[bytes] = []
        tail: list[bytes] = []
        array: tuple[int, ...] = ()
        if is_array:
            end = at + head.size
            refs = self._refs(node.manifests, end)
            old_link, refs_link, new_link = head.array_links
            array = (refs_link, new_link) if newer else (refs_link,)
            if names is not None:
                names_at = end + sum(map(len, refs))
                array = (names_at - at - head.names_field, *array)
                tail = self._names(names, names_at)
            if newer:
                soffset = at + head.dimensions_at - self._dimension
                array = (
                    old_link,
                    *array,
                    0,
                    len(node.shape),
                    *head.dimensions,
                    *chain.from_iterable([(soffset + 16 * i, *dim) for i, dim in enumerate(node.shape)]),
                )
            else:
                array = (old_link, *array, len(shape_v1), *chain.from_iterable(shape_v1))
        vtable = self._group if not is_array else self._array if names is None else self._named
        texts = (len(path), path) if extra is None else (len(path), path, len(extra), extra)
        try:
            packed = head.packer.pack(
                at - (self._node if extra is None else self._with_extra),
                *head.node_links,
                node.id,
                _ARRAY if is_array else _GROUP,
                at + head.array_at - vtable,
                *array,
                *texts,
            )
        except struct.error as error:
            raise InvalidInputError(
                f"cannot encode {node.path}: the format holds lengths of 8 bytes and numbers of chunks of 4",
                ErrorKind.SERIALIZATION,
            ) from error
        pieces = [packed, *refs, *tail]
        size = sum(map(len, pieces)) if is_array else len(packed)
        if size % 8:
            pieces.append(bytes(-size % 8))
        return pieces

    def layout(self, node: NodeSnapshot, path: bytes, ndim: int) -> Layout:
        """The layout of a node without ``extra``."""
        names = node.dimension_names if node.kind is NodeKind.ARRAY else None
        is_array = node.kind is NodeKind.ARRAY
        path_words = len(path) // 4 + 1
        head = _head(self._newer, ndim if is_array else -1, path_words, -1, names is not None)
        tables = [0, head.array_at]
        refs_at = head.size
        if is_array:
            if self._newer:
                tables += [head.dimensions_at + 16 * i for i in range(ndim)]
            count = len(node.manifests)
            size = _ref_packer(len(node.manifests[0].extents)).size if count else 0
            refs_at += 4 + 4 * count
            tables += [refs_at + size * i for i in range(count)]
            place = refs_at + size * count + 4 + 4 * len(names or ())
            for name in names or ():
                tables.append(place)
                place += len(self._name_table(name, 0))
        return Layout(
            tables=tuple(tables),
            path_at=head.node_links[0] + 4,
            path_bytes=4 * path_words,
            dimensions_at=head.dimensions_at + (0 if self._newer else 4),
            refs_at=refs_at,
        )

    def _refs(self, refs: Sequence[ManifestRef], at: int) -> list[bytes]:
        count = len(refs)
        if not count:
            return [_offsets(0, 4)]
        ndim = len(refs[0].extents)
        if any(len(ref.extents) != ndim for ref in refs):
            raise InvalidInputError(
                "cannot encode an array's manifests: their extents differ in rank", ErrorKind.SERIALIZATION
            )
        packer = _ref_packer(ndim)
        soffset, size = at + 4 + 4 * count - self._ref, packer.size
        return [
            _offsets(count, size),
            *[
                packer.pack(soffset + size * i, 16, ref.object_id, ndim, *chain.from_iterable(ref.extents))
                for i, ref in enumerate(refs)
            ],
        ]

    def _names(self, names: Sequence[str | None], at: int) -> list[bytes]:
        place = at + 4 + 4 * len(names)
        links = [len(names)]
        tables: list[bytes] = []
        for i, name in enumerate(names):
            links.append(place - (at + 4 + 4 * i))
            tables.append(self._name_table(name, place))
            place += len(tables[-1])
        return [struct.pack(f"<{len(links)}I", *links), *tables]

    def _name_table(self, name: str | None, at: int) -> bytes:
        if name is None:
            return (at - self._no_name).to_bytes(4, "little", signed=True)
        text = utf8(name)
        return _NAME.pack(at - self._name, 4, len(text)) + text + bytes(4 - len(text) % 4)


@lru_cache(maxsize=1024)
def _ref_packer(ndim: int) -> struct.Struct:
    return struct.Struct(f"<iI12sI{2 * ndim}I")


class CopiedNodes(NamedTuple):
    """Nodes that are copied from another file, in whose format the new one is written."""

    data: memoryview
    """The bytes of the nodes there, from a position that is a multiple of 8."""
    tables: npt.NDArray[np.int64]
    """int64[n]: position of each node's table within them, in the order of the nodes in the file."""
    others: Sequence[int]
    """Number of copied nodes that come before each node that is not copied."""


def write_nodes(
    writer: FlatWriter,
    nodes: Sequence[NodeSnapshot],
    shapes_v1: Sequence[Sequence[tuple[int, int]]] | None,
    copied: CopiedNodes | None = None,
) -> int:
    """Write the vector of nodes and all below it; returns its position.

    Parameters
    ----------
    nodes
        The nodes that are not copied, in the order of the file.
    shapes_v1
        For format 1: length and chunk length along each dimension, of each of these nodes.
    copied
        Nodes that are copied, in the order of the file.

    Raises
    ------
    InvalidInputError
        If a text is not Unicode, a number does not fit its field, or the snapshot exceeds 2 GiB.
    """
    if not nodes and copied is None:
        return writer.items(b"", 0, 4)
    start, _ = _start(writer, len(nodes) + (0 if copied is None else len(copied.tables)))
    writer.align(_WIDEST)
    copied_at = len(writer.out)
    if copied is not None:
        writer.out += copied.data
    # After the vector: the bytes from the first vtable to the last node are copied into the next file, which has
    # another vector.
    nodes_of = _Nodes(writer, shapes_v1 is None)
    writer.align(_WIDEST, 4)
    at = len(writer.out)
    paths = _encoded(nodes)
    pieces: list[bytes | memoryview] = []
    places = np.full(len(nodes), -1, np.int64)
    for group in alike(nodes, paths) if len(nodes) >= FEW else ():
        if len(group) < FEW or at > MAX_BYTES:
            continue
        many = _together(nodes_of, group.tolist(), nodes, paths, shapes_v1, at)
        if many is not None:
            places[group] = at + many.shape[1] * np.arange(len(group))
            pieces.append(many.data)
            at += many.size
    for i in np.flatnonzero(places < 0).tolist():
        node = nodes[i]
        places[i] = at
        try:
            own = nodes_of.pack(node, () if shapes_v1 is None else shapes_v1[i], at)
        except struct.error as error:
            if at > MAX_BYTES:
                break
            raise InvalidInputError(
                f"cannot encode {node.path}: a manifest's extents do not fit 4 bytes", ErrorKind.SERIALIZATION
            ) from error
        pieces += own
        at += sum(map(len, own))
    documents, size = _documents(nodes, at, pieces)
    at += size
    if at > MAX_BYTES:
        raise InvalidInputError(
            f"cannot encode {at} bytes: a metadata file holds at most {MAX_BYTES}", ErrorKind.SERIALIZATION
        )
    _link(writer, start, places if copied is None else np.insert(copied.tables + copied_at, copied.others, places))
    writer.out += b"".join(pieces)
    fields = places + _DATA_AT
    put(np.frombuffer(writer.out, np.uint8), fields, (documents - fields).astype("<u4"))
    return start


def _documents(
    nodes: Sequence[NodeSnapshot], at: int, pieces: list[bytes | memoryview]
) -> tuple[npt.NDArray[np.int64], int]:
    """Append the documents of nodes, as vectors of bytes that begin at that position, to ``pieces``.

    Returns
    -------
    places : int64[n]
        The position of each node's document.
    size
        Number of bytes that were appended, a multiple of 4.
    """
    documents, numbers = _shared([node.user_data for node in nodes])
    places: list[int] = []
    end = at
    for document in documents:
        places.append(end)
        size = len(document)
        padding = _PADDINGS[size % 4]
        pieces += (_U32.pack(size), document, padding)
        end += 4 + size + len(padding)
    return np.array(places, np.int64)[numbers], end - at


def _shared(documents: Sequence[bytes]) -> tuple[Sequence[bytes], npt.NDArray[np.intp]]:
    """The documents to write, of which some may be equal, and the number of the one that each node refers to."""
    n = len(documents)
    own = np.arange(n)
    if n < FEW:
        return documents, own
    numbers = {document: i for i, document in enumerate(dict.fromkeys(documents))}
    if len(numbers) == n:
        return documents, own
    kinds = np.fromiter(map(numbers.__getitem__, documents), np.int64, n)
    order = np.argsort(kinds, kind="stable")
    firsts = np.flatnonzero(np.diff(kinds[order], prepend=-1))
    # The number of equal documents before each one.
    before = own - np.repeat(firsts, np.diff(firsts, append=n))
    is_written = before % _SHARING == 0
    written = np.empty(n, np.intp)
    written[order] = np.cumsum(is_written) - 1
    return [documents[i] for i in order[is_written].tolist()], written


def _together(
    nodes_of: _Nodes,
    members: Sequence[int],
    nodes: Sequence[NodeSnapshot],
    paths: Sequence[bytes],
    shapes_v1: Sequence[Sequence[tuple[int, int]]] | None,
    at: int,
) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]] | None:
    """The bytes of nodes of one layout from that position on, uint8[n, size]; None if one of them has to be refused.
    The caller then writes them one by one, which raises the error."""
    own = [nodes[i] for i in members]
    shapes = None if shapes_v1 is None else [shapes_v1[i] for i in members]
    ndim = len(own[0].shape if shapes is None else shapes[0])
    try:
        template = b"".join(nodes_of.pack(own[0], () if shapes is None else shapes[0], at))
    except (struct.error, InvalidInputError):
        return None
    layout = nodes_of.layout(own[0], paths[members[0]], ndim)
    return block(template, layout, own, [paths[i] for i in members], shapes)


def write_files(writer: FlatWriter, files: Sequence[ManifestFile]) -> int:
    """Write the vector of the manifests' sizes, format 2; returns its position.

    Raises
    ------
    InvalidInputError
        If a number does not fit its field.
    """
    if not files:
        return writer.items(b"", 0, 4)
    vtable = writer.vtable({0: 16, 1: 4, 2: 12}, 28)
    start, at = _start(writer, len(files))
    try:
        packed = b"".join(
            [
                _FILE.pack(at + _FILE.size * i - vtable, file.size_bytes, file.num_chunk_refs, file.object_id)
                for i, file in enumerate(files)
            ]
        )
    except struct.error as error:
        raise InvalidInputError(
            "cannot encode the sizes of the manifests: a number does not fit its field", ErrorKind.SERIALIZATION
        ) from error
    _link(writer, start, at + _FILE.size * np.arange(len(files), dtype=np.int64))
    writer.out += packed
    return start


def _start(writer: FlatWriter, count: int) -> tuple[int, int]:
    """Begin a vector of tables; returns its position, and that of the first table."""
    writer.align(4)
    start = len(writer.out)
    writer.out += _U32.pack(count) + bytes(4 * count)
    writer.align(8, 4)
    return start, len(writer.out)


def _link(writer: FlatWriter, start: int, tables: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
    count = len(tables)
    fields = start + 4 + 4 * np.arange(count, dtype=np.int64)
    np.frombuffer(writer.out, "<u4", count, start + 4)[:] = tables - fields


def _encoded(nodes: Sequence[NodeSnapshot]) -> list[bytes]:
    """The paths of the nodes as UTF-8."""
    try:
        return [node.path.encode() for node in nodes]
    except UnicodeEncodeError:
        return [utf8(node.path) for node in nodes]
