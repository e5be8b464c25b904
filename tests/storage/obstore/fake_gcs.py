"""A Google Cloud Storage of the XML API in a thread: generations, conditions, listings, parts; and bad days on demand.

Modelled on the published behaviour of the service: every write gives an object a new, greater generation; the ETag is
the content's MD5; ``x-goog-if-generation-match`` refuses with 412, and 0 means that no object may exist; listings
ascend by UTF-8 bytes; deleting what does not exist is 404.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import gmtime, strftime, time
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

__all__ = ["FakeGcs", "serving_gcs"]


@dataclass(slots=True, kw_only=True)
class Stored:
    data: bytes
    generation: int
    headers: dict[str, str]
    modified: float

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.data).hexdigest()}"'


@dataclass
class FakeGcs:
    """The objects, the requests seen, and what goes wrong next."""

    endpoint: str = ""
    objects: dict[str, Stored] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)
    """(method, what): ``lose answer``, ``503 after``, ``503 before``, ``429 before``, ``hang``, ``hang after``; used
    up in order."""
    tokens: set[str] | None = None
    """Bearer tokens that are accepted; None: all."""
    buckets: set[str] = field(default_factory=lambda: {"bucket"})
    lock: threading.Lock = field(default_factory=threading.Lock)
    generations: Iterator[int] = field(default_factory=lambda: itertools.count(1_700_000_000_000_000))
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    page: int = 1000
    released: threading.Event = field(default_factory=threading.Event)
    """Set: requests that hang end."""

    def config(self) -> dict[str, str]:
        """Options for a storage here."""
        return {"google_base_url": self.endpoint, "allow_http": "true"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FakeGcs

    def log_message(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._dispatch
        raise AttributeError(name)

    def _dispatch(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length)
        state = self.state
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        fault = ""
        with state.lock:
            state.requests.append((self.command, self.path, headers))
            if state.faults and state.faults[0][0] == self.command:
                fault = state.faults.pop(0)[1]
        if fault == "hang":
            state.released.wait(30)
            self.close_connection = True
            return
        if fault.endswith("before"):
            self._refuse(int(fault[:3]), "Fault", "not now")
            return
        token = headers.get("authorization", "").removeprefix("Bearer ")
        if state.tokens is not None and token not in state.tokens:
            self._refuse(401, "AuthenticationRequired", "who are you")
            return
        bucket, _, key = unquote(parts.path.lstrip("/")).partition("/")
        if bucket not in state.buckets:
            self._refuse(404, "NoSuchBucket", "The specified bucket does not exist.")
            return
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        with state.lock:
            answer = self._answer(key, query, headers, body)
        if fault == "lose answer":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if fault == "hang after":
            state.released.wait(30)
        if fault == "503 after":
            answer = _refusal(503, "ServiceUnavailable", "try again")
        self._send(*answer)

    def _answer(
        self, key: str, query: dict[str, str], headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        state = self.state
        if not key:
            return self._list(query)
        found = state.objects.get(key)
        match self.command:
            case "GET" | "HEAD":
                if found is None:
                    return _refusal(404, "NoSuchKey", "The specified key does not exist.")
                return self._read(found, headers)
            case "DELETE":
                if found is None:
                    return _refusal(404, "NoSuchKey", "The specified key does not exist.")
                del state.objects[key]
                return 204, {}, b""
            case "POST" if "uploads" in query:
                name = f"upload-{next(state.generations)}"
                state.uploads[name] = {}
                xml = f"<InitiateMultipartUploadResult><UploadId>{name}</UploadId></InitiateMultipartUploadResult>"
                return 200, {}, xml.encode()
            case "PUT" if "uploadId" in query:
                state.uploads[query["uploadId"]][int(query["partNumber"])] = body
                return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b""
            case "POST":
                pieces = state.uploads.pop(query["uploadId"])
                stored = self._store(key, b"".join(pieces[n] for n in sorted(pieces)), {})
                xml = (
                    f"<CompleteMultipartUploadResult><ETag>{escape(stored.etag)}</ETag></CompleteMultipartUploadResult>"
                )
                return 200, {"x-goog-generation": str(stored.generation)}, xml.encode()
        wanted = headers.get("x-goog-if-generation-match")
        if wanted is not None and wanted != str(0 if found is None else found.generation):
            return _refusal(412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold.")
        if "x-goog-copy-source" in headers:
            source = state.objects.get(unquote(headers["x-goog-copy-source"]).lstrip("/").partition("/")[2])
            if source is None:
                return _refusal(404, "NoSuchKey", "The specified key does not exist.")
            stored = self._store(key, source.data, source.headers)
            return 200, {}, f"<CopyObjectResult><ETag>{escape(stored.etag)}</ETag></CopyObjectResult>".encode()
        kept = {n: v for n, v in headers.items() if n.startswith("x-goog-meta-") or n == "x-goog-storage-class"}
        stored = self._store(key, body, kept)
        return 200, {"ETag": stored.etag, "x-goog-generation": str(stored.generation)}, b""

    def _store(self, key: str, data: bytes, headers: dict[str, str]) -> Stored:
        stored = Stored(data=data, generation=next(self.state.generations), headers=headers, modified=time())
        self.state.objects[key] = stored
        return stored

    def _read(self, found: Stored, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        said = {
            "ETag": found.etag,
            "x-goog-generation": str(found.generation),
            "Last-Modified": formatdate(found.modified, usegmt=True),
            "Accept-Ranges": "bytes",
            **found.headers,
        }
        size = len(found.data)
        wish = headers.get("range")
        if wish is None:
            return 200, said, found.data
        first, _, last = wish.removeprefix("bytes=").partition("-")
        start = max(0, size - int(last)) if not first else int(first)
        stop = size if not first or not last else min(size, int(last) + 1)
        if start >= size:
            return _refusal(416, "InvalidRange", "The requested range cannot be satisfied.")
        said["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return 206, said, found.data[start:stop]

    def _list(self, query: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        prefix, after = query.get("prefix", ""), query.get("continuation-token") or query.get("start-after", "")
        names = sorted(
            (
                name
                for name in self.state.objects
                if name.startswith(prefix)
                and name.encode() > after.encode()
                and name.encode() >= query.get("start-offset", "").encode()
            ),
            key=str.encode,
        )
        most = min(self.state.page, int(query.get("max-keys", self.state.page)))
        rows = []
        for name in names[:most]:
            stored = self.state.objects[name]
            when = strftime("%Y-%m-%dT%H:%M:%S.000Z", gmtime(stored.modified))
            rows.append(
                f"<Contents><Key>{escape(name)}</Key><LastModified>{when}</LastModified>"
                f"<ETag>{escape(stored.etag)}</ETag><Size>{len(stored.data)}</Size></Contents>"
            )
        more = len(names) > most
        token = f"<NextContinuationToken>{escape(names[most - 1])}</NextContinuationToken>" if more else ""
        xml = (
            f"<?xml version='1.0' encoding='UTF-8'?><ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>"
            f"{''.join(rows)}{token}</ListBucketResult>"
        )
        return 200, {"Content-Type": "application/xml"}, xml.encode()

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(*_refusal(status, code, message))

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _refusal(status: int, code: str, message: str) -> tuple[int, dict[str, str], bytes]:
    xml = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return status, {"Content-Type": "application/xml"}, xml.encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving_gcs() -> Iterator[FakeGcs]:
    """A fake service with the bucket ``bucket``."""
    state = FakeGcs()
    handler = type("Handler", (_Handler,), {"state": state})
    server = _Server(("127.0.0.1", 0), handler)
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
