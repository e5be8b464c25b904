"""Objects in buckets of S3 and of services with its protocol.

Not here: the HTTP exchanges under them (`storage.http`), and the names of services (`storage.presets`).
"""

from __future__ import annotations

from typing import NoReturn

from icechunk.runtime.pickles import refuse_old


def __getattr__(name: str) -> NoReturn:
    refuse_old(__name__, name)
