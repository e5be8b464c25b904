"""A web server for the files of a folder in a thread: with configurable ranges, redirects, statuses and headers."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["WebServer", "serving_files"]


@dataclass
class WebServer:
    """The served folder, and the requests that were made."""

    folder: Path
    url: str = ""
    ranges: bool = True
    missing: int = 404
    """Status of what does not exist."""
    statuses: dict[str, list[int]] = field(default_factory=dict)
    """Statuses to answer with, by path, used up in order."""
    redirects: dict[str, str] = field(default_factory=dict)
    """Location by path."""
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    """Method, path, headers."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: WebServer

    def log_message(self, *_: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._dispatch
        raise AttributeError(name)

    def _dispatch(self) -> None:
        state = self.server_state
        path = unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        state.seen.append((self.command, self.path, headers))
        if state.statuses.get(path):
            self._send(state.statuses[path].pop(0), {}, b"")
            return
        if path in state.redirects:
            self._send(302, {"Location": state.redirects[path]}, b"")
            return
        file = state.folder / path.lstrip("/")
        if self.command not in ("GET", "HEAD"):
            self._send(405, {}, b"")
        elif not file.is_file():
            self._send(state.missing, {}, b"nothing here")
        else:
            self._file(file, headers.get("range") if state.ranges else None)

    def _file(self, file: Path, wish: str | None) -> None:
        data = file.read_bytes()
        status = file.stat()
        said = {
            "Last-Modified": formatdate(status.st_mtime, usegmt=True),
            "ETag": f'"{status.st_mtime_ns:x}-{len(data)}"',
        }
        if wish is None:
            self._send(200, said, data)
            return
        first, _, last = wish.removeprefix("bytes=").partition("-")
        start = max(0, len(data) - int(last)) if not first else int(first)
        stop = len(data) if not first or not last else min(len(data), int(last) + 1)
        if start >= len(data):
            self._send(416, {"Content-Range": f"bytes */{len(data)}"}, b"")
            return
        said["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self._send(206, said, data[start:stop])

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving_files(folder: Path, tls: ssl.SSLContext | None = None) -> Iterator[WebServer]:
    """The files of a folder on a free port of 127.0.0.1, by https where there is a context for it."""
    state = WebServer(folder=folder)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_state": state}))
    if tls is not None:
        # The handshake is left to the connection's own thread.
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    state.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
