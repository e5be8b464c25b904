"""Storage for a load test: a server of its own, an endpoint that is named, local disk or memory; latency on request."""

from __future__ import annotations

import contextlib
import os
import tempfile
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from icechunk_loadtest import services
from icechunk_loadtest.errors import LoadTestError

__all__ = ["BUCKET", "SERVERS", "Place", "Requests", "memory_or_local", "named_endpoint", "own_server"]

BUCKET = "loadtest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """Counters of a server, since its start or between two readings."""

    by_name: Mapping[str, int] = field(default_factory=dict)
    """Requests by the name of the S3 call, e.g. ``GetObject``."""
    received_bytes: int = 0
    """Bytes of request bodies."""
    sent_bytes: int = 0
    """Bytes of response bodies."""

    def since(self, before: Requests) -> Requests:
        """The difference between this reading and the earlier reading `before`."""
        return Requests(
            by_name={
                name: count - before.by_name.get(name, 0)
                for name, count in self.by_name.items()
                if count > before.by_name.get(name, 0)
            },
            received_bytes=self.received_bytes - before.received_bytes,
            sent_bytes=self.sent_bytes - before.sent_bytes,
        )


@dataclass(slots=True, kw_only=True)
class Place:
    """Storage for the runs of one load test."""

    kind: str
    """``s3``, ``local`` or ``memory``."""
    about: str
    """Description for the report."""
    options: dict[str, Any]
    """Options for a worker: kind, endpoint, bucket and credentials, or a path; without a prefix."""
    metrics: str | None = None
    """URL of MinIO's counters; None for other servers."""
    pid: int | None = None
    """The server's process, where the load test started it."""
    proxy: services.Proxy | None = None
    """Proxy in front of the endpoint that adds latency; None where latency cannot be added."""
    _latency_ms: int = 0

    def at(self, latency_ms: int) -> dict[str, Any]:
        """Options with a fresh prefix; the proxy adds `latency_ms` from now on.

        Raises
        ------
        LoadTestError
            `latency_ms` is not 0, and there is no proxy.
        """
        options = {**self.options, "prefix": f"loadtest/{uuid.uuid4().hex}"}
        if self.proxy is None:
            if latency_ms:
                raise LoadTestError(f"{self.about}: no latency can be added here")
            return options
        if latency_ms != self._latency_ms:
            if self._latency_ms:
                self.proxy.remove("latency")
            if latency_ms:
                self.proxy.add("latency", latency=latency_ms)
            self._latency_ms = latency_ms
        if latency_ms:
            options["endpoint"] = self.proxy.endpoint
        return options

    def server_cpu_s(self) -> float | None:
        """CPU time of the server so far, in seconds; None where it is not known."""
        return None if self.pid is None else services.cpu_s(self.pid)

    def requests(self) -> Requests | None:
        """The server's counters now; None where they cannot be read."""
        if self.metrics is None:
            return None
        try:
            with urllib.request.urlopen(self.metrics, timeout=5) as response:
                return parse_counters(response.read().decode())
        except OSError:
            return None


def parse_counters(text: str) -> Requests:
    """The counters in MinIO's answer (Prometheus text, ``/minio/metrics/v3/api/requests``)."""
    by_name: dict[str, int] = {}
    received = sent = 0
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith("minio_api_requests_total{"):
            call = name.partition('name="')[2].partition('"')[0]
            by_name[call] = by_name.get(call, 0) + int(float(value))
        elif name.startswith("minio_api_requests_traffic_received_bytes"):
            received += int(float(value))
        elif name.startswith("minio_api_requests_traffic_sent_bytes"):
            sent += int(float(value))
    return Requests(by_name=by_name, received_bytes=received, sent_bytes=sent)


SERVERS = {"minio": services.minio, "versitygw": services.versitygw, "rclone": services.rclone}
"""Servers that the load test can start."""
_TITLES = {"minio": "MinIO", "versitygw": "Versity S3 Gateway", "rclone": "rclone serve s3"}


@contextlib.contextmanager
def own_server(name: str) -> Iterator[Place]:
    """A server, a key of `SERVERS`, that runs as long as the context; with a proxy for latency if toxiproxy is there.

    Raises
    ------
    LoadTestError
        The server is not on this machine; the message names the ways to get it.
    """
    with contextlib.ExitStack() as stack:
        # MinIO's request counters need a token by default; this one listens on 127.0.0.1 only
        stack.enter_context(_environment(MINIO_PROMETHEUS_AUTH_TYPE="public"))
        try:
            service = stack.enter_context(SERVERS[name](buckets=[BUCKET]))
        except services.Unavailable as error:
            raise LoadTestError(f"{error}; or name an endpoint with --endpoint, or use --on local") from error
        yield Place(
            kind="s3",
            about=f"{_TITLES[name]} on this machine",
            options={
                "kind": "s3",
                "endpoint": service.endpoint,
                "bucket": BUCKET,
                "region": service.region,
                "access_key_id": service.access_key,
                "secret_access_key": service.secret_key,
            },
            metrics=f"{service.endpoint}/minio/metrics/v3/api/requests" if name == "minio" else None,
            pid=service.pid,
            proxy=_proxy(stack, service.address),
        )


@contextlib.contextmanager
def named_endpoint(endpoint: str, bucket: str, *, region: str, delay: bool) -> Iterator[Place]:
    """An S3 endpoint that already runs; its bucket must exist, credentials come from the environment.

    Raises
    ------
    LoadTestError
        `endpoint` is no URL, there are no credentials, or `delay` is true and there is no toxiproxy or no plain HTTP.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise LoadTestError(f"--endpoint {endpoint!r} is no URL like http://127.0.0.1:9000")
    key, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    if not key or not secret:
        raise LoadTestError("--endpoint needs AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment")
    with contextlib.ExitStack() as stack:
        proxy = None
        if delay:
            if parts.scheme != "http":
                raise LoadTestError("latency can only be added to an endpoint of plain http")
            proxy = _proxy(stack, f"{parts.hostname}:{parts.port or 80}")
            if proxy is None:
                raise LoadTestError(f"latency needs toxiproxy: go install {services.TOXIPROXY_MODULE}")
        yield Place(
            kind="s3",
            about=endpoint,
            options={
                "kind": "s3",
                "endpoint": endpoint.rstrip("/"),
                "bucket": bucket,
                "region": region,
                "access_key_id": key,
                "secret_access_key": secret,
            },
            proxy=proxy,
        )


@contextlib.contextmanager
def memory_or_local(kind: str) -> Iterator[Place]:
    """Storage of `kind`: ``memory`` of each worker, or ``local``, a temporary folder."""
    if kind == "memory":
        yield Place(kind=kind, about="memory of the worker", options={"kind": kind})
        return
    with tempfile.TemporaryDirectory(prefix="icechunk-loadtest-", ignore_cleanup_errors=True) as folder:
        yield Place(kind=kind, about=f"local disk ({folder})", options={"kind": kind, "path": folder})


def _proxy(stack: contextlib.ExitStack, upstream: str) -> services.Proxy | None:
    try:
        return stack.enter_context(services.toxiproxy(upstream))
    except services.Unavailable:
        return None


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
