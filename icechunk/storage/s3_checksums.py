"""Checksums that a service verifies on upload."""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Callable
from typing import Any

from icechunk.config import ChecksumAlgorithm
from icechunk.errors import ErrorKind, InvalidInputError

__all__ = ["checksum_of", "content_md5", "header_name", "service_name"]


def service_name(algorithm: ChecksumAlgorithm) -> str:
    """The algorithm's name in S3's protocol, in capitals."""
    return algorithm.name.upper()


def header_name(algorithm: ChecksumAlgorithm) -> str:
    """The header that carries the checksum of a body."""
    return f"x-amz-checksum-{algorithm.name.lower()}"


def checksum_of(algorithm: ChecksumAlgorithm, data: bytes | memoryview) -> str:
    """The header's value: base64 of the big-endian checksum.

    Raises
    ------
    InvalidInputError
        CRC32C and CRC64NVME without the ``awscrt`` package.
    """
    match algorithm.name:
        case "Crc32":
            digest = zlib.crc32(data).to_bytes(4, "big")
        case "Sha1":
            digest = hashlib.sha1(data, usedforsecurity=False).digest()
        case "Sha256":
            digest = hashlib.sha256(data).digest()
        case "Crc32c":
            digest = _from_awscrt("crc32c")(bytes(data)).to_bytes(4, "big")
        case _:
            digest = _from_awscrt("crc64nvme")(bytes(data)).to_bytes(8, "big")
    return base64.b64encode(digest).decode()


def content_md5(data: bytes) -> str:
    """``Content-MD5``, which deleting many objects needs."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _from_awscrt(name: str) -> Callable[[bytes], int]:
    try:
        from awscrt import checksums
    except ImportError:
        raise InvalidInputError(
            f"the checksum {name} needs the package awscrt: install it, or choose Crc32, Sha1 or Sha256",
            ErrorKind.STORAGE_CONFIG,
        ) from None
    found: Any = getattr(checksums, name)
    return found  # type: ignore[no-any-return]
