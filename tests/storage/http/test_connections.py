"""Exchanges over HTTP/1.1, against a server that sends exactly the given bytes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.storage.buffers import Buffers
from icechunk.storage.http import messages
from icechunk.storage.http.connections import BadAnswerError, Connections, NotConnectedError, Origin, TooLargeError
from icechunk.storage.http.messages import Reading
from tests.storage.http.certificates import tls_contexts


class Limits(TypedDict):
    connect_s: float
    read_s: float


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b'HTTP/1.1 200 OK\r\nContent-Length: 5\r\nETag: "x"\r\n\r\nhello'
LIMITS: Limits = {"connect_s": 5.0, "read_s": 5.0}


@contextlib.asynccontextmanager
async def serving(talk: Talk, tls: ssl.SSLContext | None = None) -> AsyncIterator[Origin]:
    talks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talks.add(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await talk(reader, writer)
        talks.discard(task)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    try:
        yield Origin("https" if tls else "http", "127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        for task in talks:
            task.cancel()
        server.close()
        await server.wait_closed()


@contextlib.asynccontextmanager
async def connections(tls: ssl.SSLContext | None = None) -> AsyncIterator[Connections]:
    made = Connections(tls)
    try:
        yield made
    finally:
        await made.aclose()


def saying(*answers: bytes, close: bool = False) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            head = await reader.readuntil(b"\r\n\r\n")
            for line in head.decode().lower().split("\r\n"):
                if line.startswith("content-length: "):
                    await reader.readexactly(int(line[16:]))
            writer.write(answer)
            await writer.drain()
        if not close:
            await reader.read()

    return talk


async def test_an_answer_has_status_headers_in_any_case_and_body() -> None:
    async with serving(saying(OK)) as origin, connections() as made:
        response = await made.exchange(origin, "GET", "/key?x=1", {"host": "h"}, **LIMITS)
        assert (response.status, response.headers["etag"], response.body) == (200, '"x"', b"hello")


async def test_a_connection_is_used_again() -> None:
    heads: list[bytes] = []
    opened = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        while True:
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(OK)

    async with serving(talk) as origin, connections() as made:
        for n in range(3):
            await made.exchange(origin, "GET", f"/{n}", {"host": "h"}, **LIMITS)
    assert opened == 1
    assert heads[2] == b"GET /2 HTTP/1.1\r\nhost: h\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        OK.replace(b"ETag", b"Connection: close\r\nETag"),
        OK.replace(b"1.1", b"1.0"),
        b"HTTP/1.1 200 OK\r\n\r\nhello",
        OK + b"surplus",
        OK.replace(b"ETag", b"Connection: keep-alive\r\nConnection: close\r\nETag"),
        OK.replace(b"ETag", b"Connection: keep-alive, Close\r\nETag"),
    ],
    ids=["connection: close", "HTTP/1.0", "until the end", "surplus bytes", "close is second", "close in a list"],
)
async def test_a_connection_that_cannot_be_trusted_further_is_not_used_again(answer: bytes) -> None:
    async with serving(saying(answer, close=True)) as origin, connections() as made:
        for _ in range(2):
            response = await made.exchange(origin, "GET", "/", {"host": "h"}, **LIMITS)
            assert response.body == b"hello"


async def test_large_bodies_go_out_whole_and_are_not_copied_into_one_write() -> None:
    received = bytearray()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.decode().lower().split("content-length: ")[1].split("\r\n")[0])
        received.extend(await reader.readexactly(size))
        writer.write(OK)
        await reader.read()

    body = bytes(range(256)) * 20_000
    async with serving(talk) as origin, connections() as made:
        response = await made.exchange(origin, "PUT", "/", {"host": "h"}, memoryview(body), **LIMITS)
    assert response.status == 200
    assert received == body


async def test_an_answer_that_comes_before_the_body_was_sent_is_taken_and_the_connection_closed() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n")
        await asyncio.Event().wait()

    async with serving(talk) as origin, connections() as made:
        response = await made.exchange(origin, "PUT", "/", {"host": "h"}, b"x" * 64_000_000, **LIMITS)
        assert response.status == 503
        assert made._kept(origin) is None


async def test_answers_without_body() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
    async with serving(saying(head, b"HTTP/1.1 204 No Content\r\n\r\n", OK)) as origin, connections() as made:
        response = await made.exchange(origin, "HEAD", "/", {"host": "h"}, **LIMITS)
        assert (response.headers["Content-Length"], response.body) == ("5", b"")
        assert (await made.exchange(origin, "DELETE", "/", {"host": "h"}, **LIMITS)).status == 204
        assert (await made.exchange(origin, "GET", "/", {"host": "h"}, **LIMITS)).body == b"hello"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        OK[:-1],
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
        b"\x15\x03\x01\x00\x02\x02\x16",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000,
        b"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1  200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + OK,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 100 + OK,
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\nhe",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: a\rb\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: a\nb: c\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: a\0b\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
        b"HTTP/1.1 200 OK\r\nx y: a\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n folded\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a\nb\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\nhello\n0\n\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"x: y\r\n" * 20_000,
    ],
)
async def test_an_incomplete_answer_is_an_error(answer: bytes) -> None:
    async with serving(saying(answer, close=True)) as origin, connections() as made:
        with pytest.raises(BadAnswerError):
            await made.exchange(origin, "GET", "/", {"host": "h"}, **LIMITS)


async def test_a_silent_peer_is_given_up() -> None:
    async with serving(saying()) as origin, connections() as made:
        with pytest.raises(TimeoutError, match=re.escape("0.05")):
            await made.exchange(origin, "GET", "/", {"host": "h"}, connect_s=5.0, read_s=0.05)


async def test_a_peer_that_sends_slowly_is_given_up_at_the_deadline() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.005)

    async with serving(talk) as origin, connections() as made:
        with pytest.raises(TimeoutError, match="in time"):  # words: every limit of time is a TimeoutError
            await made.exchange(origin, "GET", "/", {"host": "h"}, connect_s=5.0, read_s=5.0, total_s=0.1)


@pytest.mark.parametrize(
    "what", [b"HTTP/1.1 100 Continue\r\n\r\n", b"x", b"1\r\nx\r\n"], ids=["1xx", "bytes", "chunks"]
)
async def test_a_peer_that_sends_slowly_is_given_up_without_a_deadline(
    what: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if not what.startswith(b"HTTP"):
            coding = b"Transfer-Encoding: chunked" if what != b"x" else b"Content-Length: 100000"
            writer.write(b"HTTP/1.1 200 OK\r\n" + coding + b"\r\n\r\n")
        while True:
            writer.write(what)
            await writer.drain()
            await asyncio.sleep(0.05)

    monkeypatch.setattr(messages, "_MOST_INTERIM", 1_000_000)
    async with serving(talk) as origin, connections() as made, asyncio.timeout(10):
        with pytest.raises(TimeoutError, match="only"):  # words: every limit of time is a TimeoutError
            await made.exchange(origin, "GET", "/", {"host": "h"}, connect_s=5.0, read_s=0.2)


@pytest.mark.parametrize("coding", ["length", "chunked", "until the end"])
@pytest.mark.parametrize(
    ("status", "asked", "most"),
    [(206, 4, 4), (200, 4, 64 << 20), (200, 80 << 20, 80 << 20), (404, None, 1 << 20), (503, 4, 1 << 20)],
)
async def test_answers_are_bounded_by_the_requested_size(
    coding: str, status: int, asked: int | None, most: int
) -> None:
    def reading(size: int) -> Reading:
        head = {
            "length": b"Content-Length: %d\r\n" % size,
            "chunked": b"Transfer-Encoding: chunked\r\n",
            "until the end": b"",
        }[coding]
        made = Reading(bodiless=False, buffers=Buffers(), most_bytes=asked)
        made.feed(b"HTTP/1.1 %d X\r\n" % status + head + b"\r\n")
        if coding == "chunked":
            made.feed(b"%x\r\n" % size)
        return made

    async with connections():
        if coding == "until the end":
            with pytest.raises(TooLargeError):
                reading(most).feed(bytes(most + 1))
            assert reading(most).feed(bytes(min(most, 4))) is None
        else:
            with pytest.raises(TooLargeError):
                reading(most + 1)
            reading(most)


async def test_an_answer_that_is_too_large_ends_the_exchange_at_once() -> None:
    answer = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 300000000\r\n\r\n" + bytes(1000)
    async with serving(saying(answer)) as origin, connections() as made:
        with pytest.raises(TooLargeError):
            await made.exchange(origin, "GET", "/", {"host": "h"}, **LIMITS, most_bytes=4)
        assert made._kept(origin) is None


async def test_a_refused_connection_is_another_error_than_a_broken_one() -> None:
    async with serving(saying()) as origin:
        pass
    async with connections() as made:
        with pytest.raises(NotConnectedError) as caught:
            await made.exchange(origin, "GET", "/", {"host": "h"}, **LIMITS)
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


async def test_hosts_are_reached_by_name_and_unknown_ones_said_to_be() -> None:
    async with serving(saying(OK)) as origin, connections() as made:
        by_name = Origin("http", "localhost", origin.port)
        assert (await made.exchange(by_name, "GET", "/", {"host": "h"}, **LIMITS)).body == b"hello"
        with pytest.raises(NotConnectedError) as caught:
            await made.exchange(Origin("http", "no-such-host.invalid", 80), "GET", "/", {"host": "h"}, **LIMITS)
        assert isinstance(caught.value.__cause__, socket.gaierror)


async def test_cancelling_closes_the_connection() -> None:
    gone = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        gone.set()

    asked = asyncio.Event()
    async with serving(talk) as origin, connections() as made:
        task = asyncio.create_task(made.exchange(origin, "GET", "/", {"host": "h"}, **LIMITS))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(5):
            await gone.wait()


async def test_closing_leaves_exchanges_under_way_to_end_and_keeps_no_connection() -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            asked.set()
            await go_on.wait()
            writer.write(OK)

    async with serving(talk) as origin, connections() as made:
        task = asyncio.create_task(made.exchange(origin, "GET", "/", {"host": "h"}, **LIMITS))
        await asked.wait()
        await made.aclose()
        go_on.set()
        assert (await task).body == b"hello"
        assert (await made.exchange(origin, "GET", "/", {"host": "h"}, **LIMITS)).body == b"hello"
        assert made._kept(origin) is None
        assert not made._idle[origin]


async def test_closing_waits_for_no_end_that_never_comes() -> None:
    async with serving(saying(OK)) as origin:
        made = Connections()
        await made.exchange(origin, "GET", "/", {"host": "h"}, **LIMITS)
        [connection] = made._open
        connection.closed = asyncio.get_running_loop().create_future()
        connection.connection_lost = lambda error: None  # type: ignore[method-assign]
        async with asyncio.timeout(5):
            await made.aclose()
        assert not connection.closed.done()


async def test_cancelling_while_connecting_ends() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # it never takes part in a handshake

    async with serving(talk) as origin, connections() as made:
        for n in range(20):
            to = Origin("https" if n % 2 else "http", "localhost" if n % 4 < 2 else origin.host, origin.port)
            task = asyncio.create_task(made.exchange(to, "GET", "/", {"host": "h"}, **LIMITS))
            for _ in range(n // 2):
                await asyncio.sleep(0)
            task.cancel()
            async with asyncio.timeout(5):
                with pytest.raises(asyncio.CancelledError):
                    await task
        async with asyncio.timeout(5):
            await made.aclose()


@pytest.mark.parametrize("bad", ["a\r\nb: c", "a\nb", "a\0b"])
async def test_a_line_break_in_a_header_or_target_is_refused_before_anything_is_sent(bad: str) -> None:
    async with serving(saying(OK)) as origin, connections() as made:
        with pytest.raises(ValueError, match=re.escape("'x'")):
            await made.exchange(origin, "GET", "/", {"host": "h", "x": bad}, **LIMITS)
        for target in (f"/{bad}", "/a b", "/ä"):
            with pytest.raises(ValueError, match=re.escape("URL")):
                await made.exchange(origin, "GET", target, {"host": "h"}, **LIMITS)
        assert not made._open


async def test_over_tls(tmp_path: Path) -> None:
    server, client = tls_contexts(tmp_path)
    body = os.urandom(3_000_000)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n" + body
    async with serving(saying(answer, answer), server) as origin, connections(client) as made:
        for _ in range(2):
            response = await made.exchange(origin, "PUT", "/", {"host": "h"}, body, **LIMITS)
            assert response.body == body
    async with serving(saying(OK), server) as origin, connections() as strangers:
        with pytest.raises(NotConnectedError) as caught:
            await strangers.exchange(origin, "GET", "/", {"host": "h"}, **LIMITS)
    assert isinstance(caught.value.__cause__, ssl.SSLError)


async def test_answers_that_come_in_pieces_at_the_same_time_are_not_mixed_up() -> None:
    bodies = [os.urandom(size) for size in (10, 5_000, 100_000, 700_000, 1_500_000)]

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:  # until the client closes
            number = int((await reader.readuntil(b"\r\n\r\n")).split()[1][1:])
            answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(bodies[number]) + bodies[number]
            step = max(1, len(answer) // 20)
            for start in range(0, len(answer), step):
                writer.write(answer[start : start + step])
                await asyncio.sleep(0.001)

    async with serving(talk) as origin, connections() as made:
        numbers = [*range(len(bodies))] * 4
        found = await asyncio.gather(
            *(made.exchange(origin, "GET", f"/{number}", {"host": "h"}, **LIMITS) for number in numbers)
        )
    assert all(response.body == bodies[number] for number, response in zip(numbers, found, strict=True))


CHUNKED = (
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 206 Partial Content\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3;name=value\r\nhel\r\n0002\r\nlo\r\n0\r\nTrailer: x\r\n\r\n"
)


@pytest.mark.parametrize("whole", [OK, CHUNKED], ids=["length", "chunked"])
@settings(max_examples=60)
@given(cuts=st.lists(st.integers(0, 200), max_size=12))
def test_an_answer_is_the_same_however_it_is_cut(whole: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(cut % len(whole) for cut in cuts), len(whole)]
    reading = Reading(bodiless=False, buffers=Buffers())
    answers = [reading.feed(whole[a:b]) for a, b in itertools.pairwise(edges) if a < b]
    assert answers[:-1] == [None] * (len(answers) - 1)
    assert answers[-1] is not None
    assert answers[-1].body == b"hello"
    assert reading.keep


@settings(max_examples=200)
@given(data=st.binary(max_size=300), after=st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n", CHUNKED[:80], OK[:40]]))
def test_random_bytes_are_refused_or_wait_for_more(data: bytes, after: bytes) -> None:
    try:
        answer = Reading(bodiless=False, buffers=Buffers()).feed(after + data)
    except (ValueError, BadAnswerError):
        return
    assert answer is None or 200 <= answer.status <= 999
