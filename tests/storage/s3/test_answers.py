"""Answers that do not fit the request end in an `IcechunkError`, in time, whatever a server sends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from icechunk.config import S3Options, StorageRetriesSettings, StorageSettings
from icechunk.credentials import S3Credentials
from icechunk.errors import IcechunkError, StorageError
from icechunk.storage.port import ByteRange, Range, Storage, Suffix
from icechunk.storage.s3.storage import S3Storage
from tests.storage.http.test_connections import serving
from tests.storage.s3.faulty_s3 import Say
from tests.storage.s3.faulty_s3 import serving as serving_s3

QUICK = StorageSettings(retries=StorageRetriesSettings(max_tries=2, initial_backoff_ms=1, max_backoff_ms=1))


def storage_on(endpoint: str, region: str | None = "us-east-1") -> S3Storage:
    return S3Storage(
        "b",
        options=S3Options(region=region, endpoint_url=endpoint, allow_http=True, force_path_style=True),
        credentials=S3Credentials.Anonymous(),
        settings=QUICK,
    )


@contextlib.asynccontextmanager
async def answered(answer: Callable[[bytes], bytes]) -> AsyncIterator[Storage]:
    """A storage whose service answers each request's head with ``answer`` of it, and closes the connection."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = next((row[15:] for row in head.lower().split(b"\r\n") if row.startswith(b"content-length:")), b"0")
        await reader.readexactly(int(size))
        writer.write(answer(head))
        await writer.drain()

    async with serving(talk) as origin:
        storage = storage_on(f"http://127.0.0.1:{origin.port}")
        yield storage
        await storage.aclose()


def message(status: int, body: bytes = b"", *headers: str) -> bytes:
    rows = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", "Connection: close", *headers, "", ""]
    return "\r\n".join(rows).encode() + body


@pytest.mark.parametrize(
    ("wanted", "answer"),
    [
        (Range(10, 14), message(206, b"0123", "Content-Range: bytes 0-3/100")),
        (Range(10, 14), message(206, b"01234", "Content-Range: bytes 10-14/100")),
        (Range(10, 14), message(206, b"012", "Content-Range: bytes 10-12/100")),
        (Range(10, 14), message(206, b"012", "Content-Range: bytes 10-13/100")),
        (Range(10, 14), message(206, b"0123")),
        (Range(10, 14), message(206, b"0123", "Content-Range: bytes 10-13/*")),
        (Range(10, 14), message(206, b"0123", f"Content-Range: bytes 10-13/{'9' * 5000}")),
        (Range(10), message(206, b"0123", "Content-Range: bytes 10-13/100")),
        (Suffix(4), message(206, b"0123", "Content-Range: bytes 0-3/100")),
        (None, message(206, b"0123", "Content-Range: bytes 0-3/4")),
        (None, message(204)),
        (Range(0, 4), message(206, bytes(3_000_000), "Content-Range: bytes 0-2999999/3000000")),
    ],
)
async def test_answers_with_other_ranges_than_requested_are_refused(wanted: ByteRange, answer: bytes) -> None:
    async with answered(lambda head: answer) as storage:
        with pytest.raises(StorageError) as caught:
            await storage.get("x", wanted)
    assert caught.value.kind == "object-store"


@pytest.mark.parametrize(
    ("wanted", "answer", "data"),
    [
        (Range(10, 14), message(206, b"0123", "Content-Range: bytes 10-13/100"), b"0123"),
        (Range(10, 14), message(206, b"01", "Content-Range: bytes 10-11/12"), b"01"),
        (Range(10), message(206, b"01", "Content-Range: bytes 10-11/12"), b"01"),
        (Suffix(4), message(206, b"01", "Content-Range: bytes 0-1/2"), b"01"),
        (Suffix(4), message(206, b"", "Content-Range: bytes 0--1/0"), b""),
        (Range(1, 3), message(200, b"0123"), b"12"),
    ],
)
async def test_ranges_that_are_right_are_taken(wanted: ByteRange, answer: bytes, data: bytes) -> None:
    async with answered(lambda head: answer) as storage:
        assert (await storage.get("x", wanted)).data == data


BAD_NUMBERS = ["-1", "+1", "x", "\u00b2", "9" * 5000, "1, 2", ""]


@pytest.mark.parametrize("length", BAD_NUMBERS)
async def test_invalid_sizes_are_storage_errors(length: str) -> None:
    async with answered(
        lambda head: f"HTTP/1.1 200 X\r\nContent-Length: {length}\r\n\r\n".encode("latin-1")
    ) as storage:
        with pytest.raises(StorageError):
            await storage.head("x")
    async with answered(lambda head: b"HTTP/1.1 200 X\r\nETag: x\r\n\r\n") as storage:
        with pytest.raises(StorageError):
            await storage.head("x")


@pytest.mark.parametrize(
    "date", ["x", "Mon, 99 Foo 99999 99:99:99 GMT", "0" * 5000, "Thu, 01 Jan 0000 00:00:00 +99999999"]
)
async def test_invalid_dates_are_left_out(date: str) -> None:
    answer = message(200, b"x", f"Date: {date}", f"Last-Modified: {date}", f"Retry-After: {date}")
    async with answered(lambda head: answer) as storage:
        assert (await storage.get("x")).data == b"x"
        assert (await storage.head("x")).key == "x"
    async with answered(lambda head: message(503, b"", f"Retry-After: {date}", f"Date: {date}")) as storage:
        with pytest.raises(StorageError):
            await storage.get("x")


def listing(keys: list[str], *, size: str = "1", cut: str = "true") -> bytes:
    rows = "".join(f"<Contents><Key>{key}</Key><Size>{size}</Size></Contents>" for key in keys)
    return f"<ListBucketResult><IsTruncated>{cut}</IsTruncated>{rows}</ListBucketResult>".encode()


@pytest.mark.parametrize("keys", [["a", "b"], ["a"], ["b", "a"]])
async def test_a_listing_that_repeats_a_page_ends(keys: list[str]) -> None:
    async with answered(lambda head: message(200, listing(keys))) as storage, asyncio.timeout(10):
        with pytest.raises(StorageError) as caught:
            [page async for page in storage.list_pages()]
    assert caught.value.kind == "object-store"


@pytest.mark.parametrize(
    "body", [listing(["a"], size="-1"), listing(["a"], size="9" * 5000), listing(["a"], size="x"), b"", b"<a>",
             b'<?xml version="1.0" encoding="nonsense"?><a/>', b'<?xml version="1.0" encoding="utf-32"?><a/>']
)  # fmt: skip
async def test_invalid_documents_are_storage_errors(body: bytes) -> None:
    async with answered(lambda head: message(200, body)) as storage:
        with pytest.raises(StorageError):
            [page async for page in storage.list_pages()]
    async with answered(lambda head: message(400, body)) as storage:
        with pytest.raises(StorageError):
            await storage.get("x")
    if not body.startswith(b"<List"):
        async with answered(lambda head: message(200, body)) as storage:
            with pytest.raises(StorageError):
                await storage.copy("x", "y")


@pytest.mark.parametrize("region", ["eu-west-1", "evil.example/", "x@evil.example:80/?", "a.b", "EU", "-", ""])
async def test_a_region_that_a_server_names_becomes_part_of_a_host_only_if_it_is_one(region: str) -> None:
    async with serving_s3() as server:
        server.objects["/b/x"] = (b"content", {})
        server.behaviours = [Say(301, "PermanentRedirect", {"x-amz-bucket-region": region})]
        storage = storage_on(server.endpoint, region=None)
        client = await storage._bucket.client()
        if region == "eu-west-1":
            assert (await storage.get("x")).data == b"content"
            assert client.endpoint.region == region
        else:
            with pytest.raises(StorageError):
                await storage.get("x")
            assert client.endpoint.region == "us-east-1"
        await storage.aclose()


@pytest.mark.parametrize("region", ["a b", "a\nb", "a/b"])
async def test_a_region_that_is_none_is_named(region: str) -> None:
    with pytest.raises(IcechunkError) as caught:
        await storage_on("http://127.0.0.1:9", region).get("x")
    assert caught.value.kind == "storage-config"
    assert repr(region) in caught.value.message
