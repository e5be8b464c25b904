"""Proxies: which are used, what is sent to them, and the errors of those that do not work."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from icechunk.config import S3Options, StorageRetriesSettings, StorageSettings
from icechunk.credentials import S3Credentials
from icechunk.errors import StorageError
from icechunk.storage.http.connections import Connections, NotConnectedError, Origin
from icechunk.storage.http.proxies import Proxies, ProxyError
from icechunk.storage.http.storage import HttpStorage
from icechunk.storage.s3.storage import S3Storage
from tests.storage.http.certificates import tls_contexts
from tests.storage.http.test_connections import LIMITS, OK, saying, serving
from tests.storage.http.web_server import serving_files
from tests.storage.s3.faulty_s3 import serving as serving_s3

QUICK = StorageSettings(retries=StorageRetriesSettings(max_tries=2, initial_backoff_ms=1))
VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@dataclass
class FakeProxy:
    """A proxy that hands everything on."""

    url: str = ""
    heads: list[bytes] = field(default_factory=list)
    status: int = 200
    """Status of the answers to CONNECT."""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
        if method == "CONNECT":
            writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % self.status)
            if self.status != 200:
                return
            host, _, port = target.rpartition(":")
        else:
            host, port = urlsplit(target).hostname or "", str(urlsplit(target).port)
        onward, away = await asyncio.open_connection(host.strip("[]"), int(port))
        if method != "CONNECT":
            away.write(head.replace(target.encode(), target.partition(port)[2].encode()))

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await source.read(65536):
                    # A second request in the absolute form.
                    sink.write(data.replace(f" http://{host}:{port}/".encode(), b" /") if source is reader else data)
                    await sink.drain()
            sink.close()

        try:
            await asyncio.gather(pump(reader, away), pump(onward, writer))
        finally:
            away.close()


@contextlib.asynccontextmanager
async def proxying(tls: ssl.SSLContext | None = None) -> AsyncIterator[FakeProxy]:
    proxy = FakeProxy()
    async with serving(proxy.handle, tls) as origin:
        proxy.url = f"{origin.scheme}://user:p%40ss@{origin.host}:{origin.port}"
        yield proxy


async def test_plain_requests_go_through_the_proxy_of_their_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(saying(OK, OK)) as origin, proxying() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        made = Connections()
        for n in range(2):
            response = await made.exchange(origin, "GET", f"/{n}?x=1", {"host": "h"}, **LIMITS)
            assert response.body == b"hello"
        await made.aclose()
    [head] = proxy.heads
    assert head.startswith(f"GET http://{origin.host}:{origin.port}/0?x=1 HTTP/1.1\r\n".encode())
    assert b"proxy-authorization: Basic dXNlcjpwQHNz\r\n" in head


@pytest.mark.parametrize("encrypted", [False, True], ids=["http proxy", "https proxy"])
async def test_encrypted_requests_go_through_a_tunnel(
    encrypted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = tls_contexts(tmp_path)
    body = os.urandom(3_000_000)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n" + body
    async with serving(saying(answer, answer), server) as origin, proxying(server if encrypted else None) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        made = Connections(client)
        for _ in range(2):
            response = await made.exchange(origin, "PUT", "/secret", {"host": "h"}, body, **LIMITS)
            assert response.body == body
        await made.aclose()
    [head] = proxy.heads
    assert head.startswith(f"CONNECT {origin.host}:{origin.port} HTTP/1.1\r\n".encode())
    assert b"proxy-authorization: Basic dXNlcjpwQHNz\r\n" in head
    assert b"secret" not in head


async def test_hosts_that_are_excepted_are_reached_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(saying(OK)) as origin, proxying() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", origin.host)
        made = Connections()
        assert (await made.exchange(origin, "GET", "/", {"host": "h"}, **LIMITS)).body == b"hello"
        await made.aclose()
    assert proxy.heads == []


def test_variables_have_the_meaning_they_have_for_botocore_and_aiohttp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://all:1")
    assert Proxies().proxy_for("http", "h", 80) is None
    monkeypatch.setenv("https_proxy", "proxy.example:3128")
    found = Proxies().proxy_for("https", "h", 443)
    assert found is not None
    assert (found.scheme, found.host, found.port) == ("http", "proxy.example", 3128)
    assert Proxies().proxy_for("http", "h", 80) is None
    other = Proxies("http://mine:8080").proxy_for("https", "h", 443)
    assert other is not None
    assert other.host == "mine"


@pytest.mark.parametrize("url", ["socks5://user:hush@h:1", "http://", "http://h:port", "http://[x"])
async def test_proxies_that_cannot_be_used_are_named_without_their_secrets(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", url)
    with pytest.raises(ProxyError, match=re.escape("http_proxy")) as caught:
        Proxies().proxy_for("http", "h", 80)
    assert "hush" not in str(caught.value)
    with pytest.raises(NotConnectedError):
        await Connections().exchange(Origin("http", "h", 80), "GET", "/", {"host": "h"}, **LIMITS)


@pytest.mark.parametrize("how", ["dead", "refusing"])
async def test_a_proxy_that_does_not_work_is_named(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with proxying() as proxy:
        proxy.status = 407
        url = proxy.url if how == "refusing" else "http://user:hush@127.0.0.1:9"
        monkeypatch.setenv("https_proxy", url)
        options = S3Options(region="r", endpoint_url="https://s3.example.com", force_path_style=True)
        for storage in (
            S3Storage("b", options=options, credentials=S3Credentials.Anonymous(), settings=QUICK),
            HttpStorage("https://example.com/x", settings=QUICK),
            HttpStorage("https://example.com/x", {"proxy_url": url}, settings=QUICK),
        ):
            with pytest.raises(StorageError) as caught:
                await storage.get("x")
            assert caught.value.kind == "object-store"
            assert "the proxy http" in caught.value.message
            assert "hush" not in caught.value.message
            assert "p%40ss" not in caught.value.message


async def test_repositories_go_through_proxies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with proxying() as proxy, serving_s3() as server:
        monkeypatch.setenv("http_proxy", proxy.url)
        options = S3Options(region="r", endpoint_url=server.endpoint, allow_http=True, force_path_style=True)
        storage = S3Storage("b", options=options, credentials=S3Credentials.Anonymous(), settings=QUICK)
        await storage.put("x", b"content")
        assert (await storage.get("x")).data == b"content"
        assert len(proxy.heads) == 1
        await storage.aclose()
        (tmp_path / "y").write_bytes(b"file")
        with serving_files(tmp_path) as web:
            files = HttpStorage(web.url, settings=QUICK)
            assert (await files.get("y")).data == b"file"
            await files.aclose()
        assert len(proxy.heads) == 2


@pytest.mark.parametrize(
    "text", ["machine 127.0.0.1 login me password hush\n", "machine 127.0.0.1 login\n nonsense \0"]
)
async def test_the_netrc_of_the_user_is_not_looked_at(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text(text)
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    (tmp_path / "y").write_bytes(b"file")
    with serving_files(tmp_path) as web:
        files = HttpStorage(web.url, settings=QUICK)
        assert (await files.get("y")).data == b"file"
        assert "authorization" not in web.seen[0][2]
        await files.aclose()
