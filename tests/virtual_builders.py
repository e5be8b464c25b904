"""Repositories with virtual chunk containers, and a web server that can misbehave, for tests of virtual chunks."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import zarr

import icechunk
from icechunk import IcechunkStore, Repository, Session, VirtualChunkContainer
from icechunk.credentials import HttpAccess, LocalFileSystemAccess
from icechunk.storage.port import Storage

__all__ = ["FILE_BYTES", "WebServer", "array", "config_of", "local_repository", "prefix_of", "serve", "session_on"]

FILE_BYTES = bytes(i * 7 % 251 for i in range(1000))


def prefix_of(folder: Path) -> str:
    return f"file://{folder}/"


def config_of(*containers: VirtualChunkContainer) -> icechunk.RepositoryConfig:
    config = icechunk.RepositoryConfig()
    for container in containers:
        config.set_virtual_chunk_container(container)
    return config


def local_container(folder: Path, name: str | None = "local") -> VirtualChunkContainer:
    return VirtualChunkContainer(prefix_of(folder), icechunk.local_filesystem_store(str(folder)), name)


async def local_repository(
    folder: Path, storage: Storage | None = None, *, authorized: Mapping[str, Any] | None = None
) -> Repository:
    """A repository with one container for a folder's files, called ``local``, authorised unless said otherwise."""
    access: dict[str, Any] = {prefix_of(folder): LocalFileSystemAccess} if authorized is None else dict(authorized)
    return await Repository.create_async(
        storage or icechunk.in_memory_storage(), config_of(local_container(folder)), access
    )


async def session_on(folder: Path, *, authorized: Mapping[str, Any] | None = None) -> Session:
    return await (await local_repository(folder, authorized=authorized)).writable_session_async("main")


def array(
    store: IcechunkStore, shape: tuple[int, ...] = (40,), chunks: tuple[int, ...] = (10,), name: str = "a"
) -> zarr.Array[Any]:
    """An array whose chunks are plain bytes, and 7 where there is none."""
    return zarr.create_array(
        store, name=name, shape=shape, chunks=chunks, dtype="u1", filters=None, compressors=None, fill_value=7
    )


class WebServer:
    """Contents and headers of a served file; change them between requests."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/"
        self.body = FILE_BYTES
        self.etag: str | None = '"abc"'
        self.modified: int | None = 1_700_000_000
        self.status: int | None = None
        """Answered instead of the file."""
        self.failures = 0
        """So many requests are answered 503 first."""
        self.redirect: str | None = None
        """Requests below /base/ are sent there."""
        self.ranges = True
        self.requests: list[tuple[str, dict[str, str]]] = []


@contextmanager
def serve() -> Iterator[WebServer]:
    """A server of one file, at every path."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            server.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            status, body, headers = 200, server.body, {}
            if server.failures > 0:
                server.failures -= 1
                status, body = 503, b""
            elif server.status is not None:
                status, body = server.status, b"refused"
            elif server.redirect is not None and self.path.startswith("/base/"):
                status, body, headers = 302, b"", {"Location": server.redirect}
            elif server.ranges and "Range" in self.headers:
                first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                start, end = int(first), min(int(last), len(body) - 1)
                if start > end:
                    status, body = 416, b""
                else:
                    status = 206
                    headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
                    body = body[start : end + 1]
            if server.etag is not None:
                headers["ETag"] = server.etag
            if server.modified is not None:
                headers["Last-Modified"] = formatdate(server.modified, usegmt=True)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    server = WebServer(listener.server_port)
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


async def web_repository(server: WebServer, headers: dict[str, str] | None = None) -> Repository:
    """A repository with a container for everything below ``/base/`` of the server."""
    prefix = f"{server.url}base/"
    config = config_of(VirtualChunkContainer(prefix, icechunk.http_store(headers=headers), "web"))
    config.storage = icechunk.StorageSettings(
        retries=icechunk.StorageRetriesSettings(max_tries=3, initial_backoff_ms=1, max_backoff_ms=1)
    )
    return await Repository.create_async(icechunk.in_memory_storage(), config, {prefix: HttpAccess})
