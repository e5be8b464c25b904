"""A warning about virtual chunk containers that are authorised without saying how."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Final

from icechunk.credentials import AnyCredential

__all__ = ["announced", "warn_on_none_virtual_chunk_credentials"]

_S3: Final = "icechunk.Credentials.S3(icechunk.S3Credentials.FromEnv())"
_GCS: Final = "icechunk.Credentials.Gcs(icechunk.GcsCredentials.FromEnv())"
_AZURE: Final = "icechunk.Credentials.Azure(icechunk.AzureCredentials.FromEnv())"
_HTTP: Final = "icechunk.credentials.HttpAccess"
_INSTEAD: Final = {
    "file": "icechunk.credentials.LocalFileSystemAccess",
    "http": _HTTP,
    "https": _HTTP,
    "s3": _S3,
    "tigris": _S3,
    "gs": _GCS,
    "gcs": _GCS,
    "az": _AZURE,
    "azure": _AZURE,
    "abfs": _AZURE,
}
_FROM_ENVIRONMENT: Final = ", because it takes credentials from the environment without saying so"


def _none_credential_guidance(scheme: str) -> tuple[str, str]:
    """What to pass instead of None for containers of a URL scheme, and what is dangerous about None there."""
    instead = _INSTEAD.get(scheme, "explicit credentials")
    return instead, _FROM_ENVIRONMENT if ".FromEnv" in instead else ""


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
            instead, why = _none_credential_guidance(prefix.partition(":")[0])
            warnings.warn(
                f"None in authorize_virtual_chunk_access for the container {prefix!r} is deprecated{why}: "
                f"pass {instead}",
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
