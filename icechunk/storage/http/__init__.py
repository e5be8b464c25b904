"""HTTP/1.1 exchanges, and repositories on web servers.

Not here: S3's requests and signatures, which go over these exchanges (`storage.s3`).
"""

from __future__ import annotations

from typing import NoReturn

from icechunk.runtime.pickles import refuse_old


def __getattr__(name: str) -> NoReturn:
    refuse_old(__name__, name)
