"""A warning about virtual chunk containers that are authorised without saying how."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Final

from icechunk.credentials import AnyCredential

__all__ = ["announced", "warn_on_none_virtual_chunk_credentials"]

_INSTEAD: Final = {
    "file": "icechunk.credentials.LocalFileSystemAccess",
    "http": "icechunk.credentials.HttpAccess",
    "https": "icechunk.credentials.HttpAccess",
    "s3": "icechunk.Credentials.S3(icechunk.S3Credentials.FromEnv())",
    "gs": "icechunk.Credentials.Gcs(icechunk.GcsCredentials.FromEnv())",
    "az": "icechunk.Credentials.Azure(icechunk.AzureCredentials.FromEnv())",
}


class _Announced(dict[str, "AnyCredential | None"]):
    """Access whose warnings have been given."""


def warn_on_none_virtual_chunk_credentials(
    authorize_virtual_chunk_access: Mapping[str, AnyCredential | None] | None, *, stacklevel: int = 3
) -> None:
    """Give a `DeprecationWarning` for each container whose credentials are None.

    Parameters
    ----------
    stacklevel
        Of the user's call, counted from here.
    """
    if authorize_virtual_chunk_access is None or isinstance(authorize_virtual_chunk_access, _Announced):
        return
    for prefix, credential in authorize_virtual_chunk_access.items():
        if credential is None:
            instead = _INSTEAD.get(prefix.partition(":")[0], "explicit credentials")
            warnings.warn(
                f"None in authorize_virtual_chunk_access for the container {prefix!r} is deprecated, because it takes "
                f"credentials from the environment without saying so: pass {instead}",
                DeprecationWarning,
                stacklevel=stacklevel + 1,
            )


def announced(access: dict[str, AnyCredential | None] | None) -> dict[str, AnyCredential | None] | None:
    """The same access after its warnings, which name the caller of the synchronous twin that calls this."""
    if not isinstance(access, dict):
        # None, or something that the engine refuses in words of its own.
        return access
    warn_on_none_virtual_chunk_credentials(access)
    return _Announced(access)
