"""The session log as bytes: for workers, and for a session's own checkpoints.

Layout: magic, version u16, header length u32 (little-endian), header (JSON), then blobs, each padded
with zeros to 8 bytes. The header names the base snapshot and lists the events; an event has a
stable tag, and the lengths of its blobs, which follow each other in the order of events. Columns
are raw little-endian arrays.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from icechunk.errors import ErrorKind, FormatError, IcechunkError, SessionStateError
from icechunk.format.ids import NodeId, ObjectId, encode_id
from icechunk.format.values import ETAG, ID12, INLINE, LAST_MODIFIED, NO_CHECKSUM, VIRTUAL, ChunkRefs, Snapshot
from icechunk.log.session.columns import sort_last
from icechunk.log.session.events import (
    ArrayCreated,
    ChunksDeleted,
    ChunksWritten,
    Event,
    GroupCreated,
    HierarchyCleared,
    MetadataReplaced,
    NodeDeleted,
    NodeMoved,
)
from icechunk.log.session.log import SessionLog
from icechunk.runtime import json_codec

__all__ = ["decode_events", "decode_log", "encode_log", "folded", "size_of"]

_MAGIC: Final = b"ICESLOG\n"
_VERSION: Final = 1
_HEAD: Final = struct.Struct("<8sHI")

_GROUP_CREATED: Final = "group-created"
_ARRAY_CREATED: Final = "array-created"
_METADATA_REPLACED: Final = "metadata-replaced"
_NODE_DELETED: Final = "node-deleted"
_HIERARCHY_CLEARED: Final = "hierarchy-cleared"
_NODE_MOVED: Final = "node-moved"
_CHUNKS_WRITTEN: Final = "chunks-written"
_CHUNKS_DELETED: Final = "chunks-deleted"

Blob = bytes | memoryview | npt.NDArray[Any]


def encode_log(base: ObjectId, events: Sequence[Event]) -> bytes:
    """Encode the events of a log whose base is the snapshot ``base``."""
    blobs: list[bytes] = []
    listed = []
    for event in events:
        record, own = _encode_event(event)
        raw = [bytes(b) if isinstance(b, bytes | memoryview) else np.ascontiguousarray(b).tobytes() for b in own]
        if event.id:
            record["id"] = event.id.hex()
        record["blobs"] = [len(b) for b in raw]
        listed.append(record)
        for b in raw:
            blobs += (b, bytes(-len(b) % 8))
    header = json_codec.dumps({"base": base.hex(), "events": listed})
    header += b" " * (-(len(header) + _HEAD.size) % 8)
    return b"".join([_HEAD.pack(_MAGIC, _VERSION, len(header)), header, *blobs])


def size_of(event: Event) -> int:
    """Bytes that `encode_log` writes for an event, about."""
    match event:
        case ChunksWritten():
            refs = event.refs
            tables = sum(map(len, refs.locations)) + sum(map(len, refs.etags)) + len(refs.inline_data)
            return len(refs) * (4 * refs.ndim + 33) + tables
        case ChunksDeleted():
            return event.coords.size * 4
        case GroupCreated() | ArrayCreated() | MetadataReplaced():
            return len(event.user_data) + 100
        case _:
            return 100


def decode_log(data: bytes, base: Snapshot, new_node_id: Callable[[], NodeId], author: bytes = b"") -> SessionLog:
    """Read `encode_log` back and fold it over its base.

    Parameters
    ----------
    author
        Author of later events, as for `SessionLog`.

    Raises
    ------
    FormatError
        If the bytes are not those of a log, or its events do not fold.
    SessionStateError
        If the base of the log is another snapshot than ``base``.
    """
    own_base, events = decode_events(data)
    if own_base != base.id:
        raise SessionStateError(
            f"cannot read the session log: its base is snapshot {encode_id(own_base)}, not "
            f"{encode_id(base.id)}; read it over its own base, then rebase"
        )
    return folded(base, events, new_node_id, author)


def folded(
    base: Snapshot, events: Sequence[Event], new_node_id: Callable[[], NodeId], author: bytes = b""
) -> SessionLog:
    """A log of events that were read. Raises `FormatError` if they do not fold."""
    log = SessionLog(base, new_node_id, author)
    try:
        log.replay(events)
    except (*_MALFORMED, IcechunkError) as error:
        raise _unreadable(error) from error
    return log


def decode_events(data: bytes | memoryview) -> tuple[ObjectId, list[Event]]:
    """The base and the events of `encode_log`, not folded. Raises `FormatError` if the bytes are not those of a log."""
    try:
        magic, version, size = _HEAD.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError("it does not begin with the magic bytes of a session log")
        if version != _VERSION:
            raise ValueError(f"it has version {version}, this library reads {_VERSION}")
        header = json_codec.loads(data[_HEAD.size : _HEAD.size + size])
        base = ObjectId(bytes.fromhex(header["base"]))
        reader = _Blobs(data, _HEAD.size + size)
        events = [_decode_event(record, reader.next(record["blobs"])) for record in header["events"]]
        if reader.at != len(data):
            raise ValueError("it has bytes after its last event")
    except (*_MALFORMED, IcechunkError) as error:
        raise _unreadable(error) from error
    return base, events


_MALFORMED: Final = (ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error, OverflowError)


def _unreadable(error: Exception) -> FormatError:
    return FormatError(f"cannot read the session log: {error}", ErrorKind.DESERIALIZATION)


class _Blobs:
    """Returns the blobs of a log in order."""

    def __init__(self, data: bytes | memoryview, at: int) -> None:
        self._data = memoryview(data)
        self.at = at

    def next(self, sizes: Sequence[int]) -> list[memoryview]:
        """The next blobs, of these lengths."""
        out = []
        for size in sizes:
            if type(size) is not int or size < 0 or self.at + size > len(self._data):
                raise ValueError("it is truncated")
            out.append(self._data[self.at : self.at + size])
            self.at += size + -size % 8
        return out


def _encode_event(event: Event) -> tuple[dict[str, Any], list[Blob]]:
    match event:
        case GroupCreated() | ArrayCreated() | MetadataReplaced():
            tag = {GroupCreated: _GROUP_CREATED, ArrayCreated: _ARRAY_CREATED}.get(type(event), _METADATA_REPLACED)
            return {"tag": tag, "v": 1, "node": event.node_id.hex(), "path": event.path}, [event.user_data]
        case NodeDeleted():
            return {"tag": _NODE_DELETED, "v": 1, "node": event.node_id.hex(), "path": event.path}, []
        case HierarchyCleared():
            return {"tag": _HIERARCHY_CLEARED, "v": 1}, []
        case NodeMoved():
            where = {"source": event.source, "target": event.target}
            return {"tag": _NODE_MOVED, "v": 1, "node": event.node_id.hex(), **where}, []
        case ChunksDeleted():
            shape = list(event.coords.shape)
            coords = event.coords.astype("<u4", copy=False)
            return {"tag": _CHUNKS_DELETED, "v": 1, "node": event.node_id.hex(), "shape": shape}, [coords]
        case ChunksWritten():
            shape = list(event.refs.coords.shape)
            record = {"tag": _CHUNKS_WRITTEN, "v": 1, "node": event.node_id.hex(), "shape": shape}
            return record, _encode_refs(event.refs)


def _encode_refs(refs: ChunkRefs) -> list[Blob]:
    sums: list[Blob] = [b"", b""]
    if refs.checksum_kind is not None and refs.checksum is not None:
        sums = [refs.checksum_kind, refs.checksum.astype("<i8", copy=False)]
    return [
        refs.coords.astype("<u4", copy=False),
        refs.kind,
        refs.offset.astype("<u8", copy=False),
        refs.length.astype("<u8", copy=False),
        refs.chunk_id,
        refs.location.astype("<i4", copy=False),
        *sums,
        json_codec.dumps(refs.locations),
        json_codec.dumps(refs.etags),
        refs.inline_data,
    ]


def _decode_event(record: dict[str, Any], blobs: list[memoryview]) -> Event:
    tag, version = record["tag"], record["v"]
    if version != 1:
        raise ValueError(f"event {tag!r} has version {version!r}, this library reads 1")
    id = bytes.fromhex(record.get("id", ""))
    if tag == _HIERARCHY_CLEARED:
        return HierarchyCleared(id=id)
    node_id = NodeId(bytes.fromhex(record["node"]))
    if len(node_id) != 8:
        raise ValueError("a node id is not of 8 bytes")
    match tag:
        case "group-created":
            return GroupCreated(node_id=node_id, path=_text(record["path"]), user_data=bytes(blobs[0]), id=id)
        case "array-created":
            return ArrayCreated(node_id=node_id, path=_text(record["path"]), user_data=bytes(blobs[0]), id=id)
        case "metadata-replaced":
            return MetadataReplaced(node_id=node_id, path=_text(record["path"]), user_data=bytes(blobs[0]), id=id)
        case "node-deleted":
            return NodeDeleted(node_id=node_id, path=_text(record["path"]), id=id)
        case "node-moved":
            return NodeMoved(node_id=node_id, source=_text(record["source"]), target=_text(record["target"]), id=id)
        case "chunks-deleted":
            return ChunksDeleted(node_id=node_id, coords=_coords(blobs[0], *record["shape"]), id=id)
        case "chunks-written":
            return ChunksWritten(node_id=node_id, refs=_decode_refs(blobs, *record["shape"]), id=id)
        case _:
            raise ValueError(f"unknown event {tag!r}")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("a path is not text")
    return value


def _coords(blob: memoryview, n: int, ndim: int) -> npt.NDArray[np.uint32]:
    # A column that claims rows without bytes would take memory out of proportion to the file.
    if n < 0 or ndim < 0 or len(blob) != 4 * n * ndim or (ndim == 0 and n > 1):
        raise ValueError("coordinates have another shape than the header says")
    coords = np.frombuffer(blob, "<u4").astype(np.uint32, copy=False).reshape(n, ndim)
    if sort_last(coords) is not None:
        raise ValueError("coordinates are not ascending")
    return coords


def _column(blob: memoryview, dtype: str | np.dtype[Any], n: int) -> npt.NDArray[Any]:
    column = np.frombuffer(blob, dtype)
    if len(column) != n:
        raise ValueError("columns differ in length")
    return column.astype(column.dtype.newbyteorder("="), copy=False)


def _decode_refs(blobs: list[memoryview], n: int, ndim: int) -> ChunkRefs:
    coords = _coords(blobs[0], n, ndim)
    kind = _column(blobs[1], "u1", n)
    locations, etags = (tuple(map(_text, json_codec.loads(blobs[i]))) for i in (8, 9))
    refs = ChunkRefs(
        coords=coords,
        kind=kind,
        offset=_column(blobs[2], "<u8", n),
        length=_column(blobs[3], "<u8", n),
        chunk_id=_column(blobs[4], ID12, n),
        location=_column(blobs[5], "<i4", n),
        locations=locations,
        checksum_kind=_column(blobs[6], "u1", n) if blobs[6] else None,
        checksum=_column(blobs[7], "<i8", n) if blobs[6] else None,
        etags=etags,
        inline_data=bytes(blobs[10]),
    )
    if n and not ((kind >= INLINE) & (kind <= VIRTUAL)).all():
        raise ValueError("a reference has an unknown kind")
    inline = kind == INLINE
    room = np.uint64(len(refs.inline_data))
    offset, length = refs.offset[inline], refs.length[inline]
    if (offset > room).any() or (length > room - offset).any():
        raise ValueError("an inline chunk is outside the inline bytes")
    _check_rows(refs.location, len(locations), least=-1)
    _check_rows(refs.location[kind == VIRTUAL], len(locations))
    if refs.checksum_kind is not None and refs.checksum is not None:
        if not np.isin(refs.checksum_kind, (NO_CHECKSUM, ETAG, LAST_MODIFIED)).all():
            raise ValueError("a checksum has an unknown kind")
        _check_rows(refs.checksum[refs.checksum_kind == ETAG], len(etags))
    return refs


def _check_rows(rows: npt.NDArray[Any], size: int, *, least: int = 0) -> None:
    if len(rows) and (int(rows.min()) < least or int(rows.max()) >= size):
        raise ValueError("a reference points outside a table")
