"""zstandard's names over `compression.zstd`, which Python has since 3.14, or over its backport, `backports.zstd`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING or sys.version_info < (3, 14):
    from backports import zstd
else:
    from compression import zstd

__all__ = [
    "MAX_COMPRESSION_LEVEL",
    "ZstdCompressionDict",
    "ZstdCompressor",
    "ZstdDecompressor",
    "ZstdError",
    "backend_features",
    "frame_content_size",
    "train_dictionary",
]

Octets: TypeAlias = bytes | bytearray | memoryview

MAX_COMPRESSION_LEVEL: Final[int] = zstd.CompressionParameter.compression_level.bounds()[1]
ZstdError = zstd.ZstdError
backend_features: Final[frozenset[str]] = frozenset()
"""zstandard's fast paths: none."""


class ZstdCompressionDict:
    """A dictionary that frames share."""

    def __init__(self, data: Octets) -> None:
        # As zstandard: bytes that are no trained dictionary are one too.
        self.shared: Any = zstd.ZstdDict(bytes(data), is_raw=bytes(data[:4]) != _MAGIC)

    def as_bytes(self) -> bytes:
        """Its bytes."""
        content: bytes = self.shared.dict_content
        return content


_MAGIC: Final = (0xEC30A437).to_bytes(4, "little")
"""First bytes of a trained dictionary (RFC 8878, section 5)."""


def train_dictionary(dict_size: int, samples: Sequence[bytes]) -> ZstdCompressionDict:
    """A dictionary of about so many bytes for texts like the samples; `ZstdError` where they do not suffice."""
    return ZstdCompressionDict(zstd.train_dict(samples, dict_size).dict_content)


def frame_content_size(data: Octets) -> int:
    """The size that a frame declares; -1: it declares none."""
    size = zstd.get_frame_info(data).decompressed_size
    return -1 if size is None else size


class ZstdCompressor:
    """Makes frames; not safe among threads."""

    def __init__(
        self,
        level: int = 3,
        *,
        write_checksum: bool = False,
        write_content_size: bool = True,
        dict_data: ZstdCompressionDict | None = None,
    ) -> None:
        parameter = zstd.CompressionParameter
        lowest, highest = parameter.compression_level.bounds()
        self._compressor = zstd.ZstdCompressor(
            options={
                parameter.compression_level: min(max(level, lowest), highest),
                parameter.checksum_flag: int(write_checksum),
                parameter.content_size_flag: int(write_content_size),
            },
            zstd_dict=None if dict_data is None else dict_data.shared.as_digested_dict,
        )

    def compress(self, data: Octets) -> bytes:
        """One frame with all of the data."""
        return self._compressor.compress(data, zstd.ZstdCompressor.FLUSH_FRAME)


class ZstdDecompressor:
    """Reads frames; safe among threads."""

    def __init__(self, *, dict_data: ZstdCompressionDict | None = None) -> None:
        self._shared = None if dict_data is None else dict_data.shared

    def decompress(self, data: Octets, max_output_size: int = 0, *, allow_extra_data: bool = True) -> bytes:
        """The contents of one frame.

        Parameters
        ----------
        max_output_size
            Largest size of a frame that declares none.

        Raises
        ------
        ZstdError
            A corrupt or truncated frame, or one without a size that holds more; with ``allow_extra_data=False`` also
            bytes behind it.
        """
        declared = frame_content_size(data)
        if declared < 0 and not max_output_size:
            raise ZstdError("the frame does not declare its size")
        limit = max(declared, max_output_size)
        stream = zstd.ZstdDecompressor(self._shared)
        octets = _decompressed(stream, data, limit, declared)
        # All of the contents may be there before the end of the frame, with its checksum, has been read.
        while not stream.eof and not stream.needs_input:
            if stream.decompress(b"", 1):
                raise ZstdError("the frame holds more than it may")
        if not stream.eof:
            raise ZstdError("the frame is truncated")
        if not allow_extra_data and stream.unused_data:
            raise ZstdError("bytes follow the frame")
        return octets

    def decompressobj(self) -> Any:
        """A reader of a frame that comes in pieces: it has ``decompress(data)`` and ``eof``."""
        return _Stream(self._shared)


class _Stream:
    def __init__(self, shared: Any) -> None:
        self._stream = zstd.ZstdDecompressor(shared)

    @property
    def eof(self) -> bool:
        return self._stream.eof

    def decompress(self, data: Octets) -> bytes:
        return _decompressed(self._stream, data, sys.maxsize, 0)


_PIECE: Final = 2**20


def _decompressed(stream: Any, data: Octets, limit: int, declared: int) -> bytes:
    """The contents that data yield, up to the limit.

    In pieces: what is large the library would keep in blocks, and twice in memory when it joins them.
    """
    first: bytes = stream.decompress(data, min(limit, _PIECE) or 1)
    if len(first) < _PIECE:
        return first
    whole = BytesIO()
    if declared > 0:
        # Its memory, once.
        whole.seek(declared - 1)
        whole.write(b"\0")
        whole.seek(0)
    whole.write(first)
    while not stream.eof and not stream.needs_input and whole.tell() < limit:
        whole.write(stream.decompress(b"", min(_PIECE, limit - whole.tell())))
    whole.truncate()
    return whole.getvalue()
