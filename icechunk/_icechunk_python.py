"""Public names under the module path of the official library's compiled module.

Code that imports from ``icechunk._icechunk_python`` (VirtualiZarr and older notebooks import configuration classes and
error kinds from there) finds the same objects as in `icechunk`. Nothing else belongs here.
"""

from __future__ import annotations

from icechunk import _public
from icechunk.config.repository import RepoUpdateRetryConfig
from icechunk.errors import ErrorKind

__all__ = ["RepoUpdateRetryConfig", "_all_error_kinds"]


def _all_error_kinds() -> list[str]:
    return [str(kind) for kind in ErrorKind]


def __getattr__(name: str) -> object:
    if name in _public.__all__:
        return getattr(_public, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
