"""Large objects in parts: concurrent, invisible until completed, removed upon failure.

Checksums that a service verifies on upload.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from icechunk.config import ChecksumAlgorithm
from icechunk.errors import ErrorKind, InvalidInputError, StorageError
from icechunk.runtime.tasks import run_each, shielded
from icechunk.storage.retry import Limits
from icechunk.storage.s3.answers import parse_xml, text_of
from icechunk.storage.s3.requests import Request, S3Client

__all__ = [
    "abort_upload",
    "checksum_of",
    "completion_of",
    "content_md5",
    "header_name",
    "part_bytes",
    "service_name",
    "start_upload",
    "upload_parts",
]


def service_name(algorithm: ChecksumAlgorithm) -> str:
    """The algorithm's name in S3's protocol, in capitals."""
    return algorithm.name.upper()


def header_name(algorithm: ChecksumAlgorithm) -> str:
    """The header with the checksum of a body."""
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


_LEAST_PART: Final = 5 * 1024 * 1024
_MOST_PARTS: Final = 10_000
_ABORT_PATIENCE_S: Final = 30.0


def part_bytes(size: int, ideal: int) -> int:
    """Size of each part but the last, within S3's limits, bytes."""
    return max(_LEAST_PART, ideal, -(-size // _MOST_PARTS))


async def start_upload(
    client: S3Client,
    path: str,
    what: str,
    headers: Mapping[str, str],
    checksum: ChecksumAlgorithm | None,
    limits: Limits,
) -> str:
    """Begin an upload; returns its id. ``headers`` are those of the object to be."""
    extra = {} if checksum is None else {"x-amz-checksum-algorithm": service_name(checksum)}
    request = Request(
        what=f"begin to {what}", method="POST", path=path, query=(("uploads", ""),), headers={**headers, **extra}
    )
    answer = await client.call(request, limits)
    upload = ""
    if answer.status < 300:
        try:
            upload = text_of(parse_xml(answer.body), "UploadId")
        except ElementTree.ParseError:
            upload = ""
    if not upload:
        raise client.failure(request, answer, 1)
    return upload


async def upload_parts(
    client: S3Client,
    path: str,
    what: str,
    upload: str,
    data: bytes,
    *,
    size: int,
    concurrency: int,
    headers: Mapping[str, str],
    checksum: ChecksumAlgorithm | None,
    limits: Limits,
) -> list[tuple[str, str | None]]:
    """Send all parts, at most ``concurrency`` at once; returns ETag and checksum of each, in order."""
    view = memoryview(data)
    starts = range(0, len(data), size)
    results: list[tuple[str, str | None]] = [("", None)] * len(starts)

    async def send(n: int) -> None:
        body = view[starts[n] : starts[n] + size]
        value = None if checksum is None else checksum_of(checksum, body)
        extra = {} if checksum is None or value is None else {header_name(checksum): value}
        request = Request(
            what=f"{what}, part {n + 1}",
            method="PUT",
            path=path,
            query=(("partNumber", str(n + 1)), ("uploadId", upload)),
            headers={**headers, **extra},
            body=body,
        )
        answer = await client.call(request, limits)
        if answer.status >= 300:
            raise client.failure(request, answer, 1)
        results[n] = (answer.headers.get("ETag", ""), value)

    await run_each(send, range(len(starts)), limit=concurrency)
    return results


def completion_of(parts: list[tuple[str, str | None]], checksum: ChecksumAlgorithm | None) -> bytes:
    """The document that completes an upload."""
    rows = []
    for number, (etag, value) in enumerate(parts, start=1):
        name = "" if checksum is None else f"Checksum{service_name(checksum)}"
        sum_ = "" if value is None else f"<{name}>{value}</{name}>"
        rows.append(f"<Part><PartNumber>{number}</PartNumber><ETag>{escape(etag)}</ETag>{sum_}</Part>")
    body = "".join(rows)
    return (
        f'<CompleteMultipartUpload xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{body}</CompleteMultipartUpload>'
    ).encode()


async def abort_upload(client: S3Client, path: str, what: str, upload: str, limits: Limits) -> None:
    """Remove the parts of an upload that will not be completed; best effort, also for a cancelled caller."""
    request = Request(what=f"abort to {what}", method="DELETE", path=path, query=(("uploadId", upload),))
    with shielded(), suppress(StorageError, TimeoutError):
        # Otherwise a bucket rule removes the parts that stay.
        await asyncio.wait_for(client.call(request, limits), _ABORT_PATIENCE_S)
