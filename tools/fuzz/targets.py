"""Targets of fuzzing: functions that read what others wrote, examples of it, and the errors that they may raise."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

import zarr

from icechunk import (
    Repository,
    RepositoryConfig,
    VirtualChunkContainer,
    http_store,
    local_filesystem_store,
    s3_store,
)
from icechunk.errors import FormatError, IcechunkError, InvalidInputError, StorageError
from icechunk.kerchunk import from_kerchunk_async
from icechunk.log.repository.entry import decode_entry
from icechunk.log.repository.marker import decode_marker
from icechunk.log.repository.ref_files.names import read_ref
from icechunk.log.session.segment import decode_head, decode_segment
from icechunk.storage.buffers import Buffers
from icechunk.storage.http.headers import content_length, date_us, served_size
from icechunk.storage.http.messages import BadAnswerError, Reading
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import Range, Suffix
from icechunk.storage.s3.answers import (
    Answer,
    is_throttled,
    is_transient,
    parse_refusal,
    require_document,
    retry_after_s,
)
from icechunk.virtual_access.locations import Prefixes, key_of, require_no_way_out, stored_location
from tools.fuzz import decoders
from tools.fuzz.decoders import mutate

__all__ = ["Target", "all_targets"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A reader of foreign bytes."""

    name: str
    group: str
    """``decoders``, ``log``, ``http``, ``kerchunk`` or ``locations``."""
    read: Callable[[bytes], object]
    examples: Sequence[bytes]
    mutate: Callable[[random.Random, bytes], bytes] = mutate
    refusals: tuple[type[BaseException], ...] = (FormatError,)
    """Errors that say that the bytes are bad."""
    share: float = 1.0
    """Share of the inputs; less where one takes long."""


# ------------------------------------------------------------------------------------------------------------- JSON

_ODD: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 2**64, 1e308, -0.5, "", "0", "a/../b", "\0", "\ud83d\ude00",
    "x" * 300, [], {}, [[]], [None], {"": 0}, ["a", 0, 10], "base64:AAAA", "base64:%", "1CECHNKREP0F1RSTCMT0", "main",
)  # fmt: skip


def mutate_json(chance: random.Random, data: bytes) -> bytes:
    """Mostly another value somewhere in the document; sometimes other bytes."""
    if chance.random() < 0.3:
        return mutate(chance, data)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return mutate(chance, data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        document = _changed(chance, document)
    return json.dumps(document).encode()


def _changed(chance: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(list(value))
        match chance.randrange(12):
            case 0:
                value.pop(key)
            case 1:
                value[_text(chance, key)] = value.pop(key)
            case 2:
                value[_text(chance, key)] = value[key]
            case _:
                value[key] = _changed(chance, value[key])
        return value
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        match chance.randrange(8):
            case 0:
                value.pop(at)
            case 1:
                value.insert(at, chance.choice(value))
            case _:
                value[at] = _changed(chance, value[at])
        return value
    if isinstance(value, str) and chance.random() < 0.6:
        return _text(chance, value)
    if isinstance(value, int) and chance.random() < 0.5:
        return value + chance.choice((-1, 1, 7, -(2**20), 2**40))
    return copy.deepcopy(chance.choice(_ODD))


def _text(chance: random.Random, text: str) -> str:
    if not text:
        return chance.choice(("/", ".", "a", "é"))
    at = chance.randrange(len(text))
    piece = chance.choice(("", "/", ".", "..", "//", "%2e", "\\", "?", "#", ":", "\n", "é", "\0", text[at:], "0", "Z"))
    return text[:at] + piece + text[at + chance.randrange(3) :]


def mutate_text(chance: random.Random, data: bytes) -> bytes:
    """Another text; as bytes, which may be no text at all."""
    if chance.random() < 0.2:
        return mutate(chance, data)
    text = data.decode("utf-8", "surrogateescape")
    for _ in range(chance.choice((1, 1, 2, 3))):
        text = _text(chance, text)
    return text.encode("utf-8", "surrogateescape")


# -------------------------------------------------------------------------------------------------------------- log


async def _repository() -> dict[str, bytes]:
    """The objects of a repository in which most things have happened once."""
    storage = MemoryStorage()
    repo = await Repository.create_async(storage, RepositoryConfig(inline_chunk_threshold_bytes=0))
    session = await repo.writable_session_async("main")
    array = await zarr.api.asynchronous.create_array(
        session.store, name="a", shape=(4,), chunks=(1,), dtype="i4", fill_value=0
    )
    await array.setitem(slice(0, 4), 7)
    first = await session.commit_async("first", {"who": "fuzz"})
    await repo.create_branch_async("dev", first)
    await repo.create_tag_async("v1", first)
    await repo.delete_tag_async("v1")
    other = await repo.writable_session_async("dev")
    await (await zarr.api.asynchronous.open_array(store=other.store, path="a")).setitem(slice(0, 1), 9)
    await other.checkpoint_async()
    await other.commit_async("second")
    await repo.reset_branch_async("dev", first)
    kept = await repo.writable_session_async("dev")
    await zarr.api.asynchronous.create_group(store=kept.store, path="g")
    await kept.checkpoint_async()
    objects = {}
    async for page in storage.list_pages(""):
        for info in page:
            objects[info.key] = (await storage.get(info.key)).data
    await repo.aclose()
    return objects


def _read_segment(data: bytes) -> None:
    decode_head(data)
    decode_segment(data)


# ------------------------------------------------------------------------------------------------------------- HTTP

_ANSWERS: Final = (
    b'HTTP/1.1 200 OK\r\nContent-Length: 5\r\nETag: "abc"\r\nDate: Tue, 15 Nov 1994 08:12:31 GMT\r\n\r\nhello',
    b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 2-6/10\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n3;x=y\r\nabc\r\n0\r\nTrailer: 1\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n",
    b"HTTP/1.0 200 OK\r\n\r\nuntil the end",
    b"HTTP/1.1 503 Slow Down\r\nRetry-After: 2\r\nContent-Length: 79\r\n\r\n"
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>wait</Message></Error>",
    b"HTTP/1.1 403 Forbidden\r\nx-amz-bucket-region: eu-west-1\r\nRetry-After: Tue, 15 Nov 1994 08:12:31 GMT\r\n"
    b"Content-Length: 66\r\n\r\n<Error><Code>AccessDenied</Code><Region>eu-west-1</Region></Error>",
    b"HTTP/1.1 416 Range Not Satisfiable\r\nContent-Range: bytes */10\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 224\r\n\r\n<ListBucketResult xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>"
    b"<IsTruncated>false</IsTruncated><Contents><Key>a%20b</Key><Size>3</Size><ETag>&quot;x&quot;</ETag>"
    b"<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents></ListBucketResult>",
)


def _read_answer(data: bytes) -> None:
    """An answer in two pieces, and what is made of its headers and its body."""
    reading = Reading(False, Buffers(), 64)
    # Where it is cut depends on the bytes, so that an input can be replayed.
    at = data[-1] % (len(data) + 1) if data else 0
    response = reading.feed(data[:at])
    response = reading.feed(data[at:]) if response is None else response
    response = reading.at_end() if response is None else response
    if response is None:
        assert reading.missing()
        return
    headers = response.headers
    content_length(headers)
    date_us(headers)
    for wanted in (Range(2, 7), Suffix(4), None):
        size = served_size(headers, wanted, len(response.body))
        assert size is None or size >= 0
    answer = Answer(response.status, headers, response.body)
    is_transient(answer)
    is_throttled(answer)
    assert retry_after_s(answer) >= 0
    parse_refusal(answer)
    require_document("list", answer)


# -------------------------------------------------------------------------------------------- kerchunk and locations

_KERCHUNK: Final = tuple(
    json.dumps({"version": 1, "refs": refs}).encode()
    for refs in (
        {
            ".zgroup": '{"zarr_format":2}',
            ".zattrs": '{"title":"x"}',
            "t/.zarray": '{"shape":[4,2],"chunks":[2,2],"dtype":"<f4","fill_value":"NaN","order":"C","filters":null,'
            '"compressor":{"id":"zlib","level":1},"zarr_format":2}',
            "t/.zattrs": '{"_ARRAY_DIMENSIONS":["time","x"]}',
            "t/0.0": ["s3://bucket/file.nc", 100, 32],
            "t/1.0": ["file:///data/file.nc", 0, 32],
            "s/.zarray": '{"shape":[],"chunks":[],"dtype":">i2","fill_value":0,"compressor":null}',
            "s/0": "base64:AAE=",
        },
        {
            "a/.zarray": {"shape": [3], "chunks": [1], "dtype": "|S3", "fill_value": None, "order": "F",
                          "filters": [{"id": "shuffle", "elementsize": 4}], "compressor": {"id": "blosc",
                          "cname": "lz4", "clevel": 5, "shuffle": 1}},
            "a/0": "raw", "a/1": ["/data/x", 5, 6], "a/2": ["memory://x/y", 0, 1],
        },
    )
)  # fmt: skip
_LOCATIONS: Final = tuple(
    text.encode()
    for text in (
        "s3://bucket/a/b.nc", "file:///data/./x/../y.nc", "file://localhost/data/y", "vcc://name/path/x.nc", "gs://b/k%20k",
        "https://host:8080/a/b?version=1#x", "s3://bucket/a%2e%2e/b", "az://container/%2e%2e%2fx", "s3://bucket/a\\..\\b",
    )
)  # fmt: skip
_PREFIXES: Final = Prefixes(
    [
        VirtualChunkContainer("s3://bucket/", s3_store()),
        VirtualChunkContainer("file:///data/", local_filesystem_store("/data")),
        VirtualChunkContainer("https://host/a/", http_store(), name="name"),
    ]
)


def _read_location(data: bytes) -> None:
    """A location as it is stored is stored again as it is, and no path leaves its container."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return
    stored = stored_location(text)
    assert stored_location(stored) == stored
    resolved, container = _PREFIXES.resolve(stored)
    assert resolved.startswith(container.url_prefix)
    require_no_way_out(resolved)
    assert ".." not in key_of(resolved).split("/")


class _Kerchunk:
    """Imports documents into sessions in memory; a session takes a hundred, each into a group of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        config = RepositoryConfig()
        config.set_virtual_chunk_container(VirtualChunkContainer("s3://bucket/", s3_store()))
        config.set_virtual_chunk_container(VirtualChunkContainer("file:///data/", local_filesystem_store("/data")))
        self._repo = self._loop.run_until_complete(Repository.create_async(MemoryStorage(), config))
        self._left = 0
        self._session: Any = None

    def read(self, data: bytes) -> None:
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            return
        if not isinstance(document, dict):
            return
        self._loop.run_until_complete(self._import(document))

    def _import(self, document: dict[str, Any]) -> Coroutine[Any, Any, None]:
        async def work() -> None:
            if not self._left:
                self._session, self._left = await self._repo.writable_session_async("main"), 100
            self._left -= 1
            try:
                await from_kerchunk_async(self._session.store, document, group=f"g{self._left}")
            except IcechunkError:
                self._left = 0
                raise

        return work()


def all_targets() -> list[Target]:
    """All of them."""
    objects = asyncio.run(_repository())

    def at(prefix: str) -> list[bytes]:
        return [data for key, data in sorted(objects.items()) if key.startswith(prefix)]

    slots = at("log/")
    from icechunk.format.repo.codec import decode_repo

    marker = decode_repo(objects["repo"]).extra
    assert slots
    assert marker is not None
    found = [
        Target(name=name, group="decoders", read=read, examples=examples, mutate=how)
        for name, (read, how, examples) in decoders.targets().items()
    ]
    return [
        *found,
        Target(
            name="log entry",
            group="log",
            read=lambda data: decode_entry(data, n=3),
            examples=[json.dumps({**json.loads(data), "n": 3}).encode() for data in slots],
            mutate=mutate_json,
            share=3,
        ),
        Target(name="segment", group="log", read=_read_segment, examples=at("sessions/") or at("session/")),
        Target(name="marker", group="log", read=decode_marker, examples=[marker], mutate=mutate_json),
        Target(
            name="ref file",
            group="log",
            read=lambda data: read_ref(data, "a ref"),
            examples=[b'{"snapshot":"1CECHNKREP0F1RSTCMT0"}', b'{"closed":"1CECHNKREP0F1RSTCMT0"}'],
            mutate=mutate_json,
        ),
        Target(
            name="HTTP answer",
            group="http",
            read=_read_answer,
            examples=_ANSWERS,
            mutate=lambda chance, data: (mutate if chance.random() < 0.5 else mutate_text)(chance, data),
            refusals=(BadAnswerError, StorageError, ValueError),
            share=4,
        ),
        Target(
            name="virtual location",
            group="locations",
            read=_read_location,
            examples=_LOCATIONS,
            mutate=mutate_text,
            refusals=(InvalidInputError,),
            share=4,
        ),
        Target(
            name="kerchunk",
            group="kerchunk",
            read=_Kerchunk().read,
            examples=_KERCHUNK,
            mutate=mutate_json,
            refusals=(InvalidInputError,),
            share=0.3,
        ),
    ]
