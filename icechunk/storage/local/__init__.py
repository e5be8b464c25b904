"""Objects as files below a folder.

Not here: virtual chunks in local files, which are read only (`virtual_access`).
"""

from __future__ import annotations

from typing import NoReturn

from icechunk.runtime.pickles import refuse_old


def __getattr__(name: str) -> NoReturn:
    refuse_old(__name__, name)
