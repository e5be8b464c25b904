"""zstd by zstandard, or by the standard library of Python 3.14 and later where zstandard is not installed.

zstandard has no wheels for free-threaded Pythons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["zstd"]

if TYPE_CHECKING:
    import zstandard as zstd
else:
    try:
        import zstandard as zstd
    except ImportError:
        from icechunk.runtime import standard_zstd as zstd
