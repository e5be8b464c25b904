"""Files are decoded once for all clients of a schedule, since bytes that do not change decode to the same.

Every client of a schedule is in this process, and the store hands out the same bytes again and again. Decoded
values are immutable, so clients may share them. Decoding was a tenth of a schedule's time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, Final

from icechunk.format.repo import codec
from icechunk.log.repository import entry

__all__ = ["share"]

_SHARED: Final[tuple[Callable[..., Any], ...]] = (codec.decode_repo, entry.decode_entry)


@cache
def share() -> None:
    """Let all modules of the engine that were imported by now share what some decoders return."""
    for decoder in _SHARED:
        shared = lru_cache(maxsize=64)(decoder)
        for name, module in list(sys.modules.items()):
            if name.startswith("icechunk.") and getattr(module, decoder.__name__, None) is decoder:
                setattr(module, decoder.__name__, shared)
