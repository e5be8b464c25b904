"""A MinIO that answers as if it were some way off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tools import services

__all__ = ["slow_minio"]

BUCKET = "bench"


@contextmanager
def slow_minio(latency_ms: int) -> Iterator[dict[str, str]]:
    """Start MinIO and a proxy before it that adds `latency_ms` to every answer; the options of the wire workload.

    Raises
    ------
    services.Unavailable
        One of them is not on this machine; the message says how to get it.
    """
    with (
        services.minio(buckets=[BUCKET]) as minio,
        services.toxiproxy(minio.address, latency_ms=latency_ms) as proxy,
    ):
        yield {
            "endpoint": proxy.endpoint,
            "bucket": BUCKET,
            "access_key_id": minio.access_key,
            "secret_access_key": minio.secret_key,
        }
