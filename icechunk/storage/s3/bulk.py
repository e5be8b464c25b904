"""Requests to a bucket for many objects at once: listing and deleting."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime
from typing import Final
from urllib.parse import unquote_plus
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from icechunk.errors import ErrorKind, StorageError
from icechunk.storage.outcome import refused
from icechunk.storage.port import DeleteResult, ObjectInfo, Version, check_key
from icechunk.storage.retry import Limits
from icechunk.storage.rights import Right, Service, access_denied
from icechunk.storage.s3.answers import parse_refusal, parse_xml, require_document, text_of
from icechunk.storage.s3.bucket import Bucket
from icechunk.storage.s3.requests import Request
from icechunk.storage.s3.uploads import content_md5

__all__ = ["delete", "list_pages"]

_NOT_XML: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\r\n\t]")
_DELETE_BATCH: Final = 1000


async def list_pages(
    bucket: Bucket, limits: Limits, prefix: str, start_after: str | None, page_size: int
) -> AsyncIterator[list[ObjectInfo]]:
    """Objects whose keys begin with ``prefix`` and come after ``start_after``, in pages of at most 1000."""
    root = bucket.root
    after = start_after
    while True:
        query = [
            ("list-type", "2"),
            ("max-keys", str(min(page_size, 1000))),
            ("prefix", root + prefix),
            ("encoding-type", "url"),
        ]
        if after is not None:
            query.append(("start-after", root + after))
        request = Request(
            what=f"list {bucket.url(prefix)}",
            method="GET",
            key=prefix,
            query=tuple(query),
            headers=bucket.plain_headers,
        )
        client = await bucket.client()
        answer = await client.call(request, limits)
        if answer.status >= 300:
            raise client.failure(request, answer, 1)
        listing = require_document(request.what, answer)
        url_encoded = text_of(listing, "EncodingType") == "url"
        page = [_object_info(element, len(root), url_encoded, request.what) for element in listing.iter("Contents")]
        if page and after is not None and page[-1].key.encode() <= after.encode():
            raise StorageError(
                f"cannot {request.what}: the page after {after!r} ends at {page[-1].key!r}; the service repeats itself",
                ErrorKind.OBJECT_STORE,
            )
        if page:
            yield page
        if text_of(listing, "IsTruncated") != "true" or not page:
            return
        after = page[-1].key


async def delete(bucket: Bucket, limits: Limits, keys: Iterable[str]) -> DeleteResult:
    """Delete objects, a thousand at a time; those that XML cannot name one by one."""
    wanted = list(keys)
    for key in wanted:
        check_key(key)
    single = wanted if len(wanted) == 1 else [key for key in wanted if _NOT_XML.search(bucket.root + key)]
    many = [] if len(wanted) == 1 else [key for key in wanted if not _NOT_XML.search(bucket.root + key)]
    deleted = 0
    failures: list[tuple[str, str]] = []
    for key in single:
        deleted += await _delete_one(bucket, limits, key, failures)
    for start in range(0, len(many), _DELETE_BATCH):
        deleted += await _delete_batch(bucket, limits, many[start : start + _DELETE_BATCH], failures)
    return DeleteResult(deleted=deleted, failures=tuple(failures))


async def _delete_one(bucket: Bucket, limits: Limits, key: str, failures: list[tuple[str, str]]) -> int:
    client = await bucket.client()
    request = bucket.request("delete", "DELETE", key, bucket.plain_headers)
    answer = await client.call(request, limits)
    if answer.status < 300:
        return 1
    refusal = parse_refusal(answer)
    if answer.status == 404 and refusal.code != "NoSuchBucket":
        return 1
    if refusal.code == "NoSuchBucket":
        # Refused for certain: another try would be refused as well.
        raise refused(client.failure(request, answer, 1))
    failures.append((key, f"{refusal.code}: {refusal.message}"))
    return 0


async def _delete_batch(bucket: Bucket, limits: Limits, keys: list[str], failures: list[tuple[str, str]]) -> int:
    root = bucket.root
    rows = "".join(f"<Object><Key>{escape(root + key)}</Key></Object>" for key in keys)
    body = (f'<Delete xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Quiet>true</Quiet>{rows}</Delete>').encode()
    request = Request(
        what=f"delete {len(keys)} objects, {bucket.url(keys[0])} the first",
        method="POST",
        key=keys[0],
        query=(("delete", ""),),
        headers={
            **bucket.plain_headers,
            "content-md5": content_md5(body),
            "content-type": "application/xml",
        },
        body=body,
    )
    client = await bucket.client()
    answer = await client.call(request, limits)
    if answer.status >= 300:
        raise client.failure(request, answer, 1)
    try:
        errors = list(parse_xml(answer.body).iter("Error")) if answer.body.strip() else []
    except ElementTree.ParseError as error:
        raise StorageError(
            f"cannot find out which objects were deleted: the answer to {request.what} is no XML",
            ErrorKind.OBJECT_STORE,
        ) from error
    errors = [e for e in errors if text_of(e, "Code") != "NoSuchKey"]
    failed = [(text_of(e, "Key")[len(root) :], f"{text_of(e, 'Code')}: {text_of(e, 'Message')}") for e in errors]
    if len(failed) == len(keys) and all(text_of(e, "Code") == "AccessDenied" for e in errors):
        what, where = f"delete {bucket.url(failed[0][0])}", "credentials and the bucket's policy"
        raise refused(access_denied(Service.S3, Right.DELETE, failed[0][0], what, failed[0][1], where))
    failures += failed
    return len(keys) - len(failed)


def _object_info(element: ElementTree.Element, root_length: int, url_encoded: bool, what: str) -> ObjectInfo:
    key = text_of(element, "Key")
    size = text_of(element, "Size") or "0"
    if not (size.isascii() and size.isdigit() and len(size) < 19):
        raise StorageError(f"cannot {what}: {key!r} has the size {size[:40]!r}", ErrorKind.OBJECT_STORE)
    return ObjectInfo(
        key=(unquote_plus(key) if url_encoded else key)[root_length:],
        size=int(size),
        version=Version(text_of(element, "ETag").strip('"')),
        modified_us=_iso_us(text_of(element, "LastModified")),
    )


def _iso_us(text: str) -> int:
    try:
        return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1e6)
    except (ValueError, OverflowError):
        return 0
