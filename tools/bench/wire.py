"""A MinIO, that answers as if it were some way off where that is wanted, and storages on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from tools import services

__all__ = ["LATENCY_MS", "minio", "near_and_far", "storage_at"]

BUCKET = "bench"
LATENCY_MS = 20
"""Latency that the benchmarks add, ms."""


@contextmanager
def minio(latency_ms: int = 0) -> Iterator[dict[str, str]]:
    """Start MinIO, and before it a proxy that adds `latency_ms` to every answer, none for 0; what `storage_at` takes.

    Raises
    ------
    services.Unavailable
        One of them is not on this machine; the message says how to get it.
    """
    with ExitStack() as stack:
        server = stack.enter_context(services.minio(buckets=[BUCKET]))
        endpoint = server.endpoint
        if latency_ms:
            endpoint = stack.enter_context(services.toxiproxy(server.address, latency_ms=latency_ms)).endpoint
        yield {
            "endpoint": endpoint,
            "bucket": BUCKET,
            "access_key_id": server.access_key,
            "secret_access_key": server.secret_key,
        }


@contextmanager
def near_and_far() -> Iterator[dict[str, Any]]:
    """Start MinIO, and a proxy before it: what `storage_at` takes, with ``endpoints`` by the end of a row's name."""
    with minio() as place:
        address = place["endpoint"].removeprefix("http://")
        with services.toxiproxy(address, latency_ms=LATENCY_MS) as proxy:
            yield {**place, "endpoints": {"": place["endpoint"], f", {LATENCY_MS} ms": proxy.endpoint}}


def storage_at(place: Mapping[str, str], prefix: str) -> Any:
    """A storage there, of whichever library the environment has as ``icechunk``."""
    import icechunk

    return icechunk.s3_storage(
        bucket=place["bucket"],
        prefix=prefix,
        region="us-east-1",
        endpoint_url=place["endpoint"],
        access_key_id=place["access_key_id"],
        secret_access_key=place["secret_access_key"],
        allow_http=True,
        force_path_style=True,
    )
