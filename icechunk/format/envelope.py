"""The 39 bytes in front of every metadata file, and the zstd frame behind them."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import sys
from enum import IntEnum
from typing import Final, NamedTuple

from icechunk.errors import ErrorKind, FormatError, InvalidInputError
from icechunk.format.flat.flatbuffers import Payload
from icechunk.runtime.about import CLIENT_NAME
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.zstd import zstd

__all__ = [
    "COMPRESSION_ZSTD",
    "DEFAULT_LEVEL",
    "HEADER_SIZE",
    "FileHeader",
    "FileType",
    "allow_metadata_bytes",
    "read_header",
    "seal",
    "unseal",
]

MAGIC: Final = "ICE🧊CHUNK".encode()
HEADER_SIZE: Final = 39
NEWEST_SPEC_VERSION: Final = 2
COMPRESSION_ZSTD: Final = 1
DEFAULT_LEVEL: Final = 3
"""Level of zstd where the configuration names none."""
FILE_IDENTIFIER: Final = b"Ichk"

_CLIENT_FIELD: Final = CLIENT_NAME.encode().ljust(24)
_MAX_OUTPUT: Final = 2**31 - 1  # the largest that FlatBuffers can address
_JOINED_BYTES: Final = 32 * 2**20
# One kilobyte of zstd yields at most 32 MiB (a block of 128 KiB takes 4 bytes). A frame of unstated size is fed in
# slices of one kilobyte, so it overshoots the limit by no more than that.
_SLICE: Final = 1024
_SMALL_BYTES: Final = 64 * 1024
_CAN_TAKE_LARGE_PAGES: Final = hasattr(mmap, "MADV_HUGEPAGE") and hasattr(zstd.ZstdDecompressor, "stream_reader")
_LARGE_PAGES_FROM: Final = 32 * 2**20 if _CAN_TAKE_LARGE_PAGES else sys.maxsize
"""Smaller payloads are decompressed faster to memory that is used again."""
_BLOCK_HEADER: Final = 3
_REPEATED: Final = 1
_CHECKSUM: Final = 4
_compressors: Final[dict[int, list[zstd.ZstdCompressor]]] = {}
"""Compressors that are not in use, by level."""
_decompressors: Final[list[zstd.ZstdDecompressor]] = []
"""Decompressors that are not in use."""


class FileType(IntEnum):
    """Kinds of metadata files."""

    SNAPSHOT = 1
    MANIFEST = 2
    TRANSACTION_LOG = 4
    REPO_INFO = 6


_NAMES: Final = {file_type: file_type.name.lower().replace("_", " ") for file_type in FileType}


class _Bound(NamedTuple):
    """Largest decompressed size of a file of one kind: ``any_ratio_bytes``, or ``ratio`` times its size if larger."""

    any_ratio_bytes: int
    """Text of users may repeat in every record, so that up to this size every ratio is possible."""
    ratio: int
    """Every record has bytes that do not compress: ids, or coordinates that differ from those before."""


_BOUNDS: Final = {
    # 100 000 arrays with the same attributes of 2.6 kB; the other bytes of a node compress 2 to 60 times.
    FileType.SNAPSHOT: _Bound(256 * 2**20, 128),
    # References compress 2 to 30 times, those with equal inline chunks of 512 bytes (the default threshold) 115 times.
    # Larger equal inline chunks have no such limit.
    FileType.MANIFEST: _Bound(256 * 2**20, 192),
    # Ids, coordinates and a few paths, no text of users: 3 to 10 times.
    FileType.TRANSACTION_LOG: _Bound(32 * 2**20, 64),
    # 5000 commits with the same metadata of 25 kB; the other bytes of a commit compress 6 times.
    FileType.REPO_INFO: _Bound(128 * 2**20, 128),
}


_REMEDY: Final = "; if its writer is trusted, allow that with icechunk.allow_metadata_bytes"
_allowed_bytes = 0


def allow_metadata_bytes(size: int) -> None:
    """Accept metadata files that decompress to so many bytes, in this process, however small they are compressed.

    By default a snapshot or manifest may decompress to 256 MiB at any ratio, a ``repo`` file to 128 MiB and a
    transaction log to 32 MiB; larger ones only if they compress as such files do. Otherwise a small file could fill
    the memory. A trusted repository may have larger ones, such as a manifest of very many equal inline chunks.

    Parameters
    ----------
    size
        Bytes; 0: the defaults. Never more than 2 GiB are accepted.

    Raises
    ------
    InvalidInputError
        A negative number (kind ``invalid-setting``).
    """
    global _allowed_bytes
    if size < 0:
        raise InvalidInputError(f"a file cannot decompress to {size} bytes; 0 or more", ErrorKind.INVALID_SETTING)
    _allowed_bytes = size


def seal(
    file_type: FileType, spec_version: int, payload: bytes | bytearray | memoryview, level: int = DEFAULT_LEVEL
) -> bytes:
    """Compress ``payload`` with zstd at ``level`` and put the header before it.

    The frame ends with a checksum, which every zstd reader compares with the contents. A large payload that compresses
    better than readers accept gets bytes at its end that do not compress and that no FlatBuffers reader looks at.
    """
    header = MAGIC + _CLIENT_FIELD + bytes((spec_version, file_type, COMPRESSION_ZSTD))
    frame = _compress(payload, level)
    if len(payload) > _limit(file_type, len(frame)):
        missing = len(payload) // _BOUNDS[file_type].ratio - len(frame) + _SLICE
        padding = hashlib.shake_128(frame).digest(missing + missing // 64)
        frame = _compress(b"".join((payload, padding)), level)
    return header + frame


def _compress(payload: bytes | bytearray | memoryview, level: int) -> bytes:
    # A compressor takes longer to make than a small payload to compress. Those that have only had small ones take
    # little memory and are kept; while one is in use, no other thread finds it.
    if len(payload) > _SMALL_BYTES:
        return zstd.ZstdCompressor(level=level, write_checksum=True).compress(payload)
    kept = _compressors.setdefault(level, [])
    try:
        compressor = kept.pop()
    except IndexError:
        compressor = zstd.ZstdCompressor(level=level, write_checksum=True)
    frame = compressor.compress(payload)
    kept.append(compressor)
    return frame


def unseal(data: bytes, file_type: FileType, *, what: str = "") -> tuple[int, Payload]:
    """Check the header and decompress.

    Parameters
    ----------
    data
        The whole file.
    file_type
        The type that the file must have.
    what
        Name of the object in errors; if empty, the file type is named.

    Returns
    -------
    spec_version, payload
        1 or 2, and the FlatBuffers bytes, whose file identifier has been checked.

    Raises
    ------
    FormatError
        If the file is foreign, truncated, corrupt, of another type, of a newer spec version (kind
        ``unsupported-spec-version``), or would decompress to more than a file of its type can hold (`_BOUNDS`; never
        more than 2 GiB).
    """
    name = what or _NAMES[file_type]
    spec_version = _checked_version(data, file_type, name)
    payload = _decompress(memoryview(data)[HEADER_SIZE:], file_type, name)
    if len(payload) < 8 or payload[4:8] != FILE_IDENTIFIER:
        raise FormatError(f"cannot read {name}: the payload's file identifier is not {FILE_IDENTIFIER.decode()!r}")
    return spec_version, payload


@dataclass(frozen=True, slots=True, kw_only=True)
class FileHeader:
    """The header in front of a metadata file's contents."""

    written_by: str
    """Name and version of the program that wrote it."""
    spec_version: int
    """1 or 2."""
    file_type: FileType


def read_header(data: bytes, file_type: FileType, *, what: str = "") -> FileHeader:
    """Check the header and read it; parameters and errors as `unseal`, which also checks the rest of the file."""
    spec_version = _checked_version(data, file_type, what or _NAMES[file_type])
    written_by = data[12:36].decode(errors="replace").rstrip(" \0")
    return FileHeader(written_by=written_by, spec_version=spec_version, file_type=file_type)


def _checked_version(data: bytes, file_type: FileType, name: str) -> int:
    """The spec version of a file whose header is as it must be."""
    if len(data) < HEADER_SIZE or data[:12] != MAGIC:
        raise FormatError(f"cannot read {name}: not an Icechunk file ({len(data)} bytes, no magic number)")
    spec_version, found, compression = data[36], data[37], data[38]
    if found != file_type:
        raise FormatError(f"cannot read {name}: its file type is {found}, {int(file_type)} expected")
    if not 1 <= spec_version <= NEWEST_SPEC_VERSION:
        raise FormatError(
            f"cannot read {name}: its spec version is {spec_version}, this library reads up to {NEWEST_SPEC_VERSION}; "
            "use a newer version of the library",
            ErrorKind.UNSUPPORTED_SPEC_VERSION,
        )
    if compression != COMPRESSION_ZSTD:
        raise FormatError(f"cannot read {name}: unknown compression {compression}")
    return spec_version


def _limit(file_type: FileType, size: int) -> int:
    """Bytes that a frame of that size may decompress to, in a file of that type."""
    any_ratio_bytes, ratio = _BOUNDS[file_type]
    return min(max(any_ratio_bytes, size * ratio, _allowed_bytes), _MAX_OUTPUT)


def _decompress(frame: memoryview, file_type: FileType, name: str) -> Payload:
    limit = _limit(file_type, len(frame))
    try:
        declared = zstd.frame_content_size(frame)
        if declared > limit:
            raise FormatError(f"cannot read {name}: {len(frame)} bytes claim to decompress to {declared}{_REMEDY}")
        if declared > 0:
            # As with compressors; what one of them keeps does not depend on the size of a frame.
            try:
                decompressor = _decompressors.pop()
            except IndexError:
                decompressor = zstd.ZstdDecompressor()
            try:
                if declared > _LARGE_PAGES_FROM:
                    return _decompress_to_large_pages(decompressor, frame, declared, name)
                return decompressor.decompress(frame, allow_extra_data=False)
            finally:
                _decompressors.append(decompressor)
        stream = zstd.ZstdDecompressor().decompressobj()
        parts: list[bytes] = []
        total = 0
        for start in range(0, len(frame), _SLICE):
            part = stream.decompress(frame[start : start + _SLICE])
            total += len(part)
            if total > limit:
                raise FormatError(f"cannot read {name}: {len(frame)} bytes decompress to more than {limit}{_REMEDY}")
            if total <= _JOINED_BYTES:
                parts.append(part)
            else:
                # To join so much would take twice the memory; it is decompressed once more, to its place.
                parts.clear()
            if stream.eof:
                break
        if not stream.eof:
            raise FormatError(f"cannot read {name}: its zstd frame is truncated")
        if total <= _JOINED_BYTES:
            return b"".join(parts)
        return zstd.ZstdDecompressor().decompress(frame, max_output_size=total)
    except (zstd.ZstdError, MemoryError, OSError) as error:
        raise FormatError(f"cannot read {name}: its zstd frame is corrupt ({error})") from error


def _decompress_to_large_pages(
    decompressor: zstd.ZstdDecompressor, frame: memoryview, size: int, name: str
) -> mmap.mmap:
    """Decompress one frame that declares that size to memory that the system gives in large pages, where it can.

    In pages of 4 KiB, getting so much memory takes longer than decompressing.
    """
    if _frame_size(frame) != len(frame):
        raise FormatError(f"cannot read {name}: {len(frame)} bytes are not one whole zstd frame")
    payload = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system may have none
        payload.madvise(mmap.MADV_HUGEPAGE)
    done = 0
    with memoryview(payload) as room, decompressor.stream_reader(frame) as reader:
        while done < size and (count := reader.readinto(room[done:])):
            done += count
        # The checksum at the frame's end is compared when there is nothing else left to read.
        if done < size or reader.read(1):
            raise FormatError(f"cannot read {name}: its zstd frame does not hold the {size} bytes that it declares")
    return payload


def _frame_size(frame: memoryview) -> int:
    """Bytes of the first zstd frame; more than there are if it is truncated.

    Raises
    ------
    zstd.ZstdError
        Its header is corrupt.
    """
    end = zstd.frame_header_size(frame)
    is_last = False
    while not is_last and end <= len(frame) - _BLOCK_HEADER:
        header = int.from_bytes(frame[end : end + _BLOCK_HEADER], "little")
        is_last = bool(header & 1)
        # A block that repeats one byte has only that byte.
        end += _BLOCK_HEADER + (1 if header >> 1 & 3 == _REPEATED else header >> 3)
    if not is_last:
        return len(frame) + 1
    return end + (_CHECKSUM if zstd.get_frame_parameters(frame).has_checksum else 0)
