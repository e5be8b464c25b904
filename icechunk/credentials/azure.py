"""Credentials for Azure Blob Storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from icechunk.credentials.credential import (
    Credential,
    RefreshableCredential,
    SecretCredential,
    conflicting_arguments,
    refreshable,
)
from icechunk.runtime.checks import Aware, instance_of
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.representation import VariantMeta, hidden

__all__ = [
    "AnyAzureCredential",
    "AnyAzureRefreshableCredential",
    "AnyAzureStaticCredential",
    "AzureCredentials",
    "AzureRefreshableCredential",
    "AzureStaticCredentials",
    "azure_anonymous_credentials",
    "azure_credentials",
    "azure_from_env_credentials",
    "azure_refreshable_credentials",
    "azure_static_credentials",
]


class _Expiring(Credential):
    """Base of the credentials that a refresh function returns."""

    __slots__ = ()

    def _shown(self) -> list[tuple[str, Any, Any]]:
        return [("secret", hidden(), None), ("expires_after", self._fields()[1], None)]


class AzureRefreshableCredential(metaclass=VariantMeta):
    """Result of a refresh function for Azure. One of the nested classes."""

    @dataclass(frozen=True, slots=True, repr=False)
    class AccessKey(_Expiring):
        """The account's key."""

        key: str
        expires_after: Aware | None = None
        """Replaced before this time (with a time zone); None: never."""

    @dataclass(frozen=True, slots=True, repr=False)
    class SasToken(_Expiring):
        """A shared access signature."""

        token: str
        expires_after: Aware | None = None
        """Replaced before this time (with a time zone); None: never."""

    @dataclass(frozen=True, slots=True, repr=False)
    class BearerToken(_Expiring):
        """An OAuth token."""

        bearer: str
        expires_after: Aware | None = None
        """Replaced before this time (with a time zone); None: never."""


AnyAzureRefreshableCredential: TypeAlias = (
    AzureRefreshableCredential.AccessKey | AzureRefreshableCredential.SasToken | AzureRefreshableCredential.BearerToken
)


class AzureStaticCredentials(metaclass=VariantMeta):
    """Given credentials for Azure. One of the nested classes."""

    class AccessKey(SecretCredential):
        """The account's key."""

        __slots__ = ()

    class SasToken(SecretCredential):
        """A shared access signature."""

        __slots__ = ()

    class BearerToken(SecretCredential):
        """An OAuth token that is never refreshed."""

        __slots__ = ()


AnyAzureStaticCredential: TypeAlias = (
    AzureStaticCredentials.AccessKey | AzureStaticCredentials.SasToken | AzureStaticCredentials.BearerToken
)


class AzureCredentials(metaclass=VariantMeta):
    """Credentials for Azure Blob Storage. One of the nested classes."""

    @dataclass(frozen=True, slots=True, repr=False)
    class FromEnv(Credential):
        """The environment's Azure settings."""

    @dataclass(frozen=True, slots=True, repr=False)
    class Anonymous(Credential):
        """No authorisation."""

    @dataclass(frozen=True, slots=True, repr=False, match_args=False)
    class Static(Credential):
        """Given credentials."""

        __match_args__ = ("_0",)

        credentials: AnyAzureStaticCredential

    class Refreshable(RefreshableCredential):
        """A function that returns one of `AzureRefreshableCredential`'s classes."""

        __slots__ = ()
        current: AnyAzureRefreshableCredential | None

        def _check(self, value: Any) -> Any:
            return instance_of(AzureRefreshableCredential)("AzureCredentials.Refreshable.current", value)


AnyAzureCredential: TypeAlias = (
    AzureCredentials.FromEnv | AzureCredentials.Anonymous | AzureCredentials.Static | AzureCredentials.Refreshable
)


def azure_static_credentials(
    *, access_key: str | None = None, sas_token: str | None = None, bearer_token: str | None = None
) -> AnyAzureStaticCredential:
    """Given credentials for Azure.

    Raises
    ------
    InvalidInputError
        Not exactly one argument (kind ``invalid-credentials``).
    """
    match (access_key, sas_token, bearer_token):
        case (str(), None, None):
            return AzureStaticCredentials.AccessKey(access_key)
        case (None, str(), None):
            return AzureStaticCredentials.SasToken(sas_token)
        case (None, None, str()):
            return AzureStaticCredentials.BearerToken(bearer_token)
    raise conflicting_arguments(
        "azure_static_credentials", "exactly one of access_key, sas_token, bearer_token, as a string"
    )


def azure_refreshable_credentials(
    get_credentials: Callable[[], AnyAzureRefreshableCredential], scatter_initial_credentials: bool = False
) -> AzureCredentials.Refreshable:
    """Azure credentials that are fetched again when they expire; see `s3_refreshable_credentials`."""
    return refreshable(AzureCredentials.Refreshable, get_credentials, scatter_initial_credentials)


def azure_from_env_credentials() -> AzureCredentials.FromEnv:
    """Azure credentials from the environment."""
    return AzureCredentials.FromEnv()


def azure_anonymous_credentials() -> AzureCredentials.Anonymous:
    """Unauthorised requests to Azure."""
    return AzureCredentials.Anonymous()


def azure_credentials(
    *,
    access_key: str | None = None,
    sas_token: str | None = None,
    bearer_token: str | None = None,
    from_env: bool | None = None,
    anonymous: bool | None = None,
    get_credentials: Callable[[], AnyAzureRefreshableCredential] | None = None,
    scatter_initial_credentials: bool = False,
) -> AnyAzureCredential:
    """Azure credentials of the kind that the arguments describe; from the environment where none is given.

    Raises
    ------
    InvalidInputError
        ``from_env`` together with given credentials, or several of these (kind ``invalid-credentials``).
    """
    has_static = any(value is not None for value in (access_key, sas_token, bearer_token))
    if anonymous:
        return azure_anonymous_credentials()
    if from_env and has_static:
        raise conflicting_arguments("azure_credentials", "either from_env=True or the credentials themselves")
    if has_static:
        static = azure_static_credentials(access_key=access_key, sas_token=sas_token, bearer_token=bearer_token)
        return AzureCredentials.Static(static)
    if get_credentials is not None:
        return azure_refreshable_credentials(get_credentials, scatter_initial_credentials)
    return azure_from_env_credentials()
