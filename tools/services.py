"""Real components for tests and benchmarks: MinIO, toxiproxy, Azurite, and a moto server.

They are `icechunk_loadtest.services`, in the load test's distribution; here they work where it is not installed, with
nothing but Python::

    python -m tools.services install minio toxiproxy azurite
    python -m tools.services minio --port 9000 --bucket data
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "loadtest" / "src"))

from icechunk_loadtest.services import (
    AzureService,
    Proxy,
    S3Service,
    Unavailable,
    azurite,
    free_port,
    main,
    minio,
    moto,
    toxiproxy,
)

__all__ = ["AzureService", "Proxy", "S3Service", "Unavailable", "azurite", "free_port", "minio", "moto", "toxiproxy"]

if __name__ == "__main__":
    sys.exit(main())
