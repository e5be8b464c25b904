"""What this package is, and what it runs with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from icechunk.format.envelope import CLIENT_NAME

__all__ = ["print_debug_info", "user_agent"]

_DISTRIBUTIONS = ("aioicechunk", "zarr", "numcodecs", "numpy", "aiobotocore", "xarray", "virtualizarr", "obstore")


def user_agent() -> str:
    """How the package names itself in requests to storage, and in the files that it writes."""
    return CLIENT_NAME


def print_debug_info() -> None:
    """Print the versions that a report of a problem should name."""
    rows = [("platform", platform.platform()), ("python", platform.python_version()), ("icechunk", user_agent())]
    for name in _DISTRIBUTIONS:
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            continue
    width = max(len(name) for name, _ in rows) + 3
    for name, value in rows:
        print(f"{name + ':':<{width}}{value}")
