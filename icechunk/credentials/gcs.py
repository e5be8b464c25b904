"""Credentials for Google Cloud Storage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any, TypeAlias

from icechunk.credentials.credential import (
    Credential,
    FileCredential,
    RefreshableCredential,
    SecretCredential,
    conflicting_arguments,
    refreshable,
)
from icechunk.runtime.checks import Aware, instance_of
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.representation import VariantMeta, hidden

__all__ = [
    "AnyGcsCredential",
    "AnyGcsStaticCredential",
    "GcsBearerCredential",
    "GcsCredentials",
    "GcsStaticCredentials",
    "gcs_anonymous_credentials",
    "gcs_credentials",
    "gcs_from_env_credentials",
    "gcs_refreshable_credentials",
    "gcs_static_credentials",
]


@dataclass(frozen=True, slots=True, repr=False)
class GcsBearerCredential(Credential):
    """An OAuth token."""

    bearer: str
    expires_after: Aware | None = field(default=None, kw_only=True)
    """The token is replaced before this time (with a time zone); None: never."""

    def _shown(self) -> list[tuple[str, Any, Any]]:
        return [("bearer", hidden(), None), ("expires_after", self.expires_after, None)]


class GcsStaticCredentials(metaclass=VariantMeta):
    """Given credentials for Google Cloud Storage. One of the nested classes."""

    class ServiceAccount(FileCredential):
        """Path of a service account's JSON key."""

        __slots__ = ()

    class ServiceAccountKey(SecretCredential):
        """A service account's JSON key itself."""

        __slots__ = ()

    class ApplicationCredentials(FileCredential):
        """Path of application default credentials."""

        __slots__ = ()

    class BearerToken(SecretCredential):
        """An OAuth token that is never refreshed."""

        __slots__ = ()


AnyGcsStaticCredential: TypeAlias = (
    GcsStaticCredentials.ServiceAccount
    | GcsStaticCredentials.ServiceAccountKey
    | GcsStaticCredentials.ApplicationCredentials
    | GcsStaticCredentials.BearerToken
)


class GcsCredentials(metaclass=VariantMeta):
    """Credentials for Google Cloud Storage. One of the nested classes."""

    @dataclass(frozen=True, slots=True, repr=False)
    class Anonymous(Credential):
        """No authorisation."""

    @dataclass(frozen=True, slots=True, repr=False)
    class FromEnv(Credential):
        """Application default credentials, or the machine's service account."""

    @dataclass(frozen=True, slots=True, repr=False, match_args=False)
    class Static(Credential):
        """Given credentials."""

        __match_args__ = ("_0",)

        credentials: AnyGcsStaticCredential

    class Refreshable(RefreshableCredential):
        """A function that returns a `GcsBearerCredential`."""

        __slots__ = ()
        current: GcsBearerCredential | None

        def _check(self, value: Any) -> Any:
            return instance_of(GcsBearerCredential)("GcsCredentials.Refreshable.current", value)


AnyGcsCredential: TypeAlias = (
    GcsCredentials.Anonymous | GcsCredentials.FromEnv | GcsCredentials.Static | GcsCredentials.Refreshable
)


def gcs_static_credentials(
    *,
    service_account_file: str | None = None,
    service_account_key: str | None = None,
    application_credentials: str | None = None,
    bearer_token: str | None = None,
) -> AnyGcsStaticCredential:
    """Given credentials for Google Cloud Storage; of several arguments the first in this order counts.

    Raises
    ------
    InvalidInputError
        No argument (kind ``invalid-credentials``).
    """
    if service_account_file is not None:
        return GcsStaticCredentials.ServiceAccount(service_account_file)
    if service_account_key is not None:
        return GcsStaticCredentials.ServiceAccountKey(service_account_key)
    if application_credentials is not None:
        return GcsStaticCredentials.ApplicationCredentials(application_credentials)
    if bearer_token is not None:
        return GcsStaticCredentials.BearerToken(bearer_token)
    raise conflicting_arguments(
        "gcs_static_credentials",
        "one of service_account_file, service_account_key, application_credentials, bearer_token",
    )


def gcs_refreshable_credentials(
    get_credentials: Callable[[], GcsBearerCredential], scatter_initial_credentials: bool = False
) -> GcsCredentials.Refreshable:
    """Google Cloud Storage tokens that are fetched again when they expire; see `s3_refreshable_credentials`."""
    return refreshable(GcsCredentials.Refreshable, get_credentials, scatter_initial_credentials)


def gcs_anonymous_credentials() -> GcsCredentials.Anonymous:
    """Unauthorised requests to Google Cloud Storage."""
    return GcsCredentials.Anonymous()


def gcs_from_env_credentials() -> GcsCredentials.FromEnv:
    """Application default credentials, or the machine's service account."""
    return GcsCredentials.FromEnv()


def gcs_credentials(
    *,
    service_account_file: str | None = None,
    service_account_key: str | None = None,
    application_credentials: str | None = None,
    bearer_token: str | None = None,
    from_env: bool | None = None,
    anonymous: bool | None = None,
    get_credentials: Callable[[], GcsBearerCredential] | None = None,
    scatter_initial_credentials: bool = False,
) -> AnyGcsCredential:
    """Google Cloud Storage credentials of the kind that the arguments describe; from the environment where none is.

    Raises
    ------
    InvalidInputError
        ``from_env`` together with given credentials (kind ``invalid-credentials``).
    """
    static = (service_account_file, service_account_key, application_credentials, bearer_token)
    has_static = any(value is not None for value in static)
    if anonymous:
        return gcs_anonymous_credentials()
    if from_env and has_static:
        raise conflicting_arguments("gcs_credentials", "either from_env=True or the credentials themselves")
    if has_static:
        return GcsCredentials.Static(
            gcs_static_credentials(
                service_account_file=service_account_file,
                service_account_key=service_account_key,
                application_credentials=application_credentials,
                bearer_token=bearer_token,
            )
        )
    if get_credentials is not None and not from_env:
        return gcs_refreshable_credentials(get_credentials, scatter_initial_credentials)
    return gcs_from_env_credentials()
