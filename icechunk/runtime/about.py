"""The package about itself: its version, the official API that it matches, and the libraries that it runs with."""

from __future__ import annotations

from typing import Final

__all__ = ["API_VERSION", "CLIENT_NAME", "DISTRIBUTION", "VERSION", "print_debug_info", "user_agent"]

DISTRIBUTION: Final = "aioicechunk"
"""The name under which package indexes know this package."""
VERSION = "0.9.0"  # the only place: the build reads this line (pyproject.toml, tool.hatch.version)
"""The version of the distribution: of this implementation, not of the official API."""
API_VERSION: Final = "2.3.0"
"""The version of the official library whose names and semantics the package offers: ``icechunk.__version__``."""
CLIENT_NAME: Final = f"{DISTRIBUTION}-{VERSION}"
"""The name of this program in the files that it writes and in its requests; at most 24 bytes of UTF-8."""

_SHOWN: Final = ("zarr", "numcodecs", "numpy", "aiobotocore", "xarray", "virtualizarr", "obstore")


def user_agent() -> str:
    """The package's name in requests to storage and in the files that it writes.

    The version in it is the distribution's, not that of the official API.
    """
    return CLIENT_NAME


def print_debug_info() -> None:
    """Print the versions that a report of a problem should name.

    ``icechunk`` is the official API that is matched, ``aioicechunk`` the distribution that matches it.
    """
    # Both are slow to load, and `import icechunk` needs neither.
    import platform
    from importlib.metadata import PackageNotFoundError, version

    rows = [
        ("platform", platform.platform()),
        ("python", platform.python_version()),
        (DISTRIBUTION, VERSION),
        ("icechunk", f"{API_VERSION} (the official API that is matched)"),
    ]
    for name in _SHOWN:
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            continue
    width = max(len(name) for name, _ in rows) + 3
    for name, value in rows:
        print(f"{name + ':':<{width}}{value}")
