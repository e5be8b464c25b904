"""Large bodies over plain HTTP/1.1: received in place, and sent in pieces."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.storage.buffers import Buffers
from icechunk.storage.http import messages
from icechunk.storage.http.connections import BadAnswerError
from icechunk.storage.http.messages import LARGE_BYTES, Reading
from tests.storage.http.test_connections import LIMITS, OK, connections, saying, serving

SIZE = 3 * LARGE_BYTES + 17
BODY = os.urandom(SIZE)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % SIZE


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that is about to happen; it has five seconds."""
    for _ in range(5_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not happen")


def reset(writer: asyncio.StreamWriter) -> None:
    connected = writer.get_extra_info("socket")
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def test_an_answer_is_complete_and_read_only_and_the_connection_is_kept() -> None:
    async with serving(saying(HEAD + BODY, OK, HEAD + BODY)) as origin, connections() as made:
        for expected in (BODY, b"hello", BODY):
            response = await made.exchange(origin, "GET", "/", {"host": "h"}, **LIMITS)
            assert response.body == expected
            assert memoryview(response.body).readonly
        assert len(made._open) == 1


async def test_a_body_goes_out_whole_to_a_peer_that_reads_little_at_a_time() -> None:
    received = bytearray()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            await reader.readuntil(b"\r\n\r\n")
            received.clear()
            while len(received) < SIZE:
                received.extend(await reader.read(min(37_777, SIZE - len(received))))
            writer.write(OK)
        await reader.read()

    async with serving(talk) as origin, connections() as made:
        for body in (BODY, BODY[::-1]):
            response = await made.exchange(origin, "PUT", "/", {"host": "h"}, memoryview(body), **LIMITS)
            assert (response.body, bytes(received)) == (b"hello", body)
        assert len(made._open) == 1


@pytest.mark.parametrize("sent", [0, 1, LARGE_BYTES, SIZE - 1])
@pytest.mark.parametrize("gone", ["closed", "reset"])
async def test_an_answer_that_breaks_off_is_an_error(sent: int, gone: str) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD + BODY[:sent])
        await writer.drain()
        if gone == "reset":
            reset(writer)

    async with serving(talk) as origin, connections() as made:
        with pytest.raises(ConnectionError) as caught:
            await made.exchange(origin, "GET", "/", {"host": "h"}, **LIMITS)
        if gone == "closed":
            assert isinstance(caught.value, BadAnswerError)
            assert f"{sent} bytes came instead of {SIZE}" in str(caught.value)
        assert made._kept(origin) is None


async def test_bytes_beyond_an_answer_are_no_part_of_it_nor_of_the_next() -> None:
    async with serving(saying(HEAD + BODY + b"surplus", close=True)) as origin, connections() as made:
        for _ in range(2):
            response = await made.exchange(origin, "GET", "/", {"host": "h"}, **LIMITS)
            assert response.body == BODY
            await until(lambda: made._kept(origin) is None)


async def test_a_peer_that_falls_silent_within_an_answer_is_given_up() -> None:
    async with serving(saying(HEAD + BODY[:-1])) as origin, connections() as made:
        with pytest.raises(TimeoutError, match=re.escape("0.1")):
            await made.exchange(origin, "GET", "/", {"host": "h"}, connect_s=5.0, read_s=0.1)


async def test_a_slow_connection_is_not_taken_for_a_broken_one() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD + BODY[: SIZE - 40])
        for n in range(SIZE - 40, SIZE):
            await asyncio.sleep(0.02)
            writer.write(BODY[n : n + 1])
        await reader.read()

    async with serving(talk) as origin, connections() as made:
        response = await made.exchange(origin, "GET", "/", {"host": "h"}, connect_s=5.0, read_s=0.4)
    assert response.body == BODY


@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_the_deadline_ends_a_transfer(method: str) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if method == "GET":
            writer.write(HEAD + BODY[:-1])
        await asyncio.Event().wait()

    body = b"x" * 64_000_000 if method == "PUT" else b""
    async with serving(talk) as origin, connections() as made:
        with pytest.raises(TimeoutError, match="in time"):  # words: every limit of time is a TimeoutError
            await made.exchange(origin, method, "/", {"host": "h"}, body, **LIMITS, total_s=0.2)


async def test_a_peer_that_stops_reading_is_given_up() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with serving(talk) as origin, connections() as made:
        with pytest.raises(TimeoutError, match=re.escape("0.1")):
            await made.exchange(origin, "PUT", "/", {"host": "h"}, b"x" * 64_000_000, connect_s=5.0, read_s=0.1)


@pytest.mark.parametrize("status", [b"200 OK", b"503 Slow Down"])
async def test_an_answer_to_a_body_that_is_still_being_sent_ends_the_sending(status: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
        await asyncio.Event().wait()

    async with serving(talk) as origin, connections() as made:
        response = await made.exchange(origin, "PUT", "/", {"host": "h"}, b"x" * 64_000_000, **LIMITS)
        assert response.status == int(status[:3])
        assert made._kept(origin) is None


async def test_a_peer_that_breaks_the_connection_while_it_is_sent_to_is_an_error() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        reset(writer)

    async with serving(talk) as origin, connections() as made:
        with pytest.raises(ConnectionError):
            await made.exchange(origin, "PUT", "/", {"host": "h"}, b"x" * 64_000_000, **LIMITS)


@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_a_transfer_that_is_given_up_leaves_no_connection(method: str) -> None:
    under_way, gone = asyncio.Event(), asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if method == "GET":
            writer.write(HEAD + BODY[:-1])
            await writer.drain()
        under_way.set()
        with contextlib.suppress(ConnectionError):
            await (reader.read() if method == "GET" else asyncio.Event().wait())
        gone.set()

    body = b"x" * 64_000_000 if method == "PUT" else b""
    async with serving(talk) as origin, connections() as made:
        task = asyncio.create_task(made.exchange(origin, method, "/", {"host": "h"}, body, **LIMITS))
        await under_way.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not made._open and (method == "PUT" or gone.is_set()))


async def test_many_transfers_at_once_all_come_through() -> None:
    count = 35
    async with serving(saying(*[HEAD + BODY] * count)) as origin, connections() as made:
        answers = await asyncio.gather(
            *(made.exchange(origin, "PUT", "/", {"host": "h"}, BODY, connect_s=30.0, read_s=30.0) for _ in range(count))
        )
    assert all(answer.body == BODY for answer in answers)


async def test_an_absurd_length_in_a_header_allocates_no_memory() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\nx" % 10**15
    async with serving(saying(answer, close=True)) as origin, connections() as made:
        with pytest.raises(BadAnswerError, match=re.escape("1000000000000000")):
            await made.exchange(origin, "GET", "/", {"host": "h"}, **LIMITS)


@settings(max_examples=60)
@given(cuts=st.lists(st.integers(0, 120), max_size=12), placed=st.integers(0, 40), surplus=st.binary(max_size=9))
def test_a_body_is_put_together_wherever_its_pieces_end(cuts: list[int], placed: int, surplus: bytes) -> None:
    body = bytes(range(32))
    stream = b"HTTP/1.1 200 OK\r\nContent-Length: 32\r\n\r\n" + body + surplus
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "LARGE_BYTES", 16)
        reading, at, response = Reading(bodiless=False, buffers=Buffers()), 0, None
        for cut in [*sorted(min(cut, len(stream)) for cut in cuts), len(stream)]:
            if response is None and cut > at:
                response = reading.feed(stream[at:cut])
                at = cut
                rest = reading.rest
                if response is None and rest is not None:
                    # As a connection does: it receives directly into the buffer.
                    count = min(placed, len(rest))
                    rest[:count] = stream[at : at + count]
                    at += count
                    response = reading.fill(count)
    assert response is not None
    assert response.body == body
    assert reading.keep is (at == len(stream) - len(surplus))
