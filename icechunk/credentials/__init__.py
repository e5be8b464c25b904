"""Credentials for object stores: static, anonymous, from the environment, or fetched when they expire.

A representation never shows a secret. Values can be pickled (the official library's cannot), so that a read-only
session can take its user's credentials to a worker; nothing else sends or stores them. Not here: requests for
credentials, and signatures (`storage.refreshed_credentials`, `storage.s3`, `storage.obstore`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeAlias, cast

from icechunk.credentials.azure import (
    AnyAzureCredential,
    AnyAzureRefreshableCredential,
    AnyAzureStaticCredential,
    AzureCredentials,
    AzureRefreshableCredential,
    AzureStaticCredentials,
    azure_anonymous_credentials,
    azure_credentials,
    azure_from_env_credentials,
    azure_refreshable_credentials,
    azure_static_credentials,
)
from icechunk.credentials.credential import Credential
from icechunk.credentials.gcs import (
    AnyGcsCredential,
    AnyGcsStaticCredential,
    GcsBearerCredential,
    GcsCredentials,
    GcsStaticCredentials,
    gcs_anonymous_credentials,
    gcs_credentials,
    gcs_from_env_credentials,
    gcs_refreshable_credentials,
    gcs_static_credentials,
)
from icechunk.credentials.s3 import (
    AnyS3Credential,
    S3Credentials,
    S3StaticCredentials,
    s3_anonymous_credentials,
    s3_credentials,
    s3_from_env_credentials,
    s3_refreshable_credentials,
    s3_static_credentials,
)
from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.runtime.checks import instance_of
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.representation import VariantMeta

__all__ = [
    "AnyAzureCredential",
    "AnyAzureRefreshableCredential",
    "AnyAzureStaticCredential",
    "AnyCredential",
    "AnyGcsCredential",
    "AnyGcsStaticCredential",
    "AnyS3Credential",
    "AzureCredentials",
    "AzureRefreshableCredential",
    "AzureStaticCredentials",
    "Credentials",
    "GcsBearerCredential",
    "GcsCredentials",
    "GcsStaticCredentials",
    "HttpAccess",
    "LocalFileSystemAccess",
    "S3Credentials",
    "S3StaticCredentials",
    "azure_anonymous_credentials",
    "azure_credentials",
    "azure_from_env_credentials",
    "azure_refreshable_credentials",
    "azure_static_credentials",
    "containers_credentials",
    "gcs_anonymous_credentials",
    "gcs_credentials",
    "gcs_from_env_credentials",
    "gcs_refreshable_credentials",
    "gcs_static_credentials",
    "s3_anonymous_credentials",
    "s3_credentials",
    "s3_from_env_credentials",
    "s3_refreshable_credentials",
    "s3_static_credentials",
]


class Credentials(metaclass=VariantMeta):
    """Credentials for any kind of store, as virtual chunk containers take them. One of the nested classes."""

    @dataclass(frozen=True, slots=True, repr=False, match_args=False)
    class S3(Credential):
        """Credentials for S3 and compatible services."""

        __match_args__ = ("_0",)

        credentials: AnyS3Credential

        def __post_init__(self) -> None:
            instance_of(S3Credentials)("Credentials.S3", self.credentials)

    @dataclass(frozen=True, slots=True, repr=False, match_args=False)
    class Gcs(Credential):
        """Credentials for Google Cloud Storage."""

        __match_args__ = ("_0",)

        credentials: AnyGcsCredential

        def __post_init__(self) -> None:
            instance_of(GcsCredentials)("Credentials.Gcs", self.credentials)

    @dataclass(frozen=True, slots=True, repr=False, match_args=False)
    class Azure(Credential):
        """Credentials for Azure Blob Storage."""

        __match_args__ = ("_0",)

        credentials: AnyAzureCredential

        def __post_init__(self) -> None:
            instance_of(AzureCredentials)("Credentials.Azure", self.credentials)

    @dataclass(frozen=True, slots=True, repr=False)
    class LocalFileSystemAccess(Credential):
        """Allow reading this machine's files; nothing secret."""

    @dataclass(frozen=True, slots=True, repr=False)
    class HttpAccess(Credential):
        """Allow reading from web servers; nothing secret."""


AnyCredential: TypeAlias = (
    Credentials.S3 | Credentials.Gcs | Credentials.Azure | Credentials.LocalFileSystemAccess | Credentials.HttpAccess
)

LocalFileSystemAccess: Final = Credentials.LocalFileSystemAccess()
HttpAccess: Final = Credentials.HttpAccess()


def containers_credentials(
    m: Mapping[str, AnyS3Credential | AnyGcsCredential | AnyAzureCredential | AnyCredential | None],
) -> dict[str, AnyCredential | None]:
    """Credentials for virtual chunk containers, by URL prefix, as `Repository.open` takes them.

    None authorises a container without credentials of its own (the store's defaults are used).

    Raises
    ------
    InvalidInputError
        A value that is no credential (kind ``invalid-credentials``).
    """
    result: dict[str, AnyCredential | None] = {}
    for name, credential in m.items():
        if isinstance(credential, S3Credentials):
            result[name] = Credentials.S3(credential)
        elif isinstance(credential, GcsCredentials):
            result[name] = Credentials.Gcs(credential)
        elif isinstance(credential, AzureCredentials):
            result[name] = Credentials.Azure(credential)
        elif credential is None or isinstance(credential, Credentials):
            result[name] = cast("AnyCredential | None", credential)
        else:
            raise InvalidInputError(
                f"unknown type of credentials for container {name!r}: {type(credential).__name__}",
                ErrorKind.INVALID_CREDENTIALS,
            )
    return result
