"""Credentials for S3 and compatible services."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from datetime import datetime
from typing import Any, TypeAlias

from icechunk.credentials.credential import (
    Credential,
    RefreshableCredential,
    conflicting_arguments,
    refreshable,
)
from icechunk.runtime.checks import Aware, instance_of
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.representation import Setting, VariantMeta

__all__ = [
    "AnyS3Credential",
    "S3Credentials",
    "S3StaticCredentials",
    "s3_anonymous_credentials",
    "s3_credentials",
    "s3_from_env_credentials",
    "s3_refreshable_credentials",
    "s3_static_credentials",
]


@dataclass(slots=True, repr=False)
class S3StaticCredentials(Setting):
    """An access key."""

    access_key_id: str
    """Public part; representations show its first four characters."""
    secret_access_key: str = field(metadata={"secret": True})
    session_token: str | None = field(default=None, metadata={"secret": True})
    """Part of temporary credentials."""
    expires_after: Aware | None = None
    """The credentials are replaced before this time (with a time zone); None: never."""

    def _shown(self) -> list[tuple[str, Any, Any]]:
        masked = self.access_key_id[:4] + "****"
        return [(n, masked if n == "access_key_id" else v, d) for n, v, d in Setting._shown(self)]


class S3Credentials(metaclass=VariantMeta):
    """Credentials for S3. One of the nested classes."""

    @dataclass(frozen=True, slots=True, repr=False)
    class FromEnv(Credential):
        """The usual chain: environment, profile, web identity, instance metadata."""

    @dataclass(frozen=True, slots=True, repr=False)
    class Anonymous(Credential):
        """No signature."""

    @dataclass(frozen=True, slots=True, repr=False, match_args=False)
    class Static(Credential):
        """A given access key."""

        __match_args__ = ("_0",)

        credentials: S3StaticCredentials

    class Refreshable(RefreshableCredential):
        """A function that returns `S3StaticCredentials`."""

        __slots__ = ()
        current: S3StaticCredentials | None

        def _check(self, value: Any) -> Any:
            return instance_of(S3StaticCredentials)("S3Credentials.Refreshable.current", value)


AnyS3Credential: TypeAlias = (
    S3Credentials.Static | S3Credentials.Anonymous | S3Credentials.FromEnv | S3Credentials.Refreshable
)


def s3_refreshable_credentials(
    get_credentials: Callable[[], S3StaticCredentials], scatter_initial_credentials: bool = False
) -> S3Credentials.Refreshable:
    """S3 credentials that are fetched again when they expire.

    Parameters
    ----------
    get_credentials
        Function without arguments, picklable by name; it may block.
    scatter_initial_credentials
        Call it now, and include the result when this object is pickled, so that many workers that start together do not
        all call it.
    """
    return refreshable(S3Credentials.Refreshable, get_credentials, scatter_initial_credentials)


def s3_static_credentials(
    *,
    access_key_id: str,
    secret_access_key: str,
    session_token: str | None = None,
    expires_after: datetime | None = None,
) -> S3Credentials.Static:
    """A given S3 access key; ``expires_after`` needs a time zone."""
    return S3Credentials.Static(S3StaticCredentials(access_key_id, secret_access_key, session_token, expires_after))


def s3_anonymous_credentials() -> S3Credentials.Anonymous:
    """Unsigned requests to S3."""
    return S3Credentials.Anonymous()


def s3_from_env_credentials() -> S3Credentials.FromEnv:
    """S3 credentials from the usual chain: environment, profile, web identity, instance metadata."""
    return S3Credentials.FromEnv()


def s3_credentials(
    *,
    access_key_id: str | None = None,
    secret_access_key: str | None = None,
    session_token: str | None = None,
    expires_after: datetime | None = None,
    anonymous: bool | None = None,
    from_env: bool | None = None,
    get_credentials: Callable[[], S3StaticCredentials] | None = None,
    scatter_initial_credentials: bool = False,
) -> AnyS3Credential:
    """S3 credentials of the kind that the arguments describe; from the environment where none is given.

    Raises
    ------
    InvalidInputError
        Arguments of more than one kind, or half an access key (kind ``invalid-credentials``).
    """
    has_key = not (access_key_id is None and secret_access_key is None)
    has_any_static = has_key or session_token is not None or expires_after is not None
    if anonymous and not (has_any_static or from_env or get_credentials):
        return s3_anonymous_credentials()
    if from_env and not (has_any_static or anonymous or get_credentials):
        return s3_from_env_credentials()
    if get_credentials is not None and not (has_any_static or anonymous or from_env):
        return s3_refreshable_credentials(get_credentials, scatter_initial_credentials)
    if access_key_id and secret_access_key and not (anonymous or from_env or get_credentials):
        return s3_static_credentials(
            access_key_id=access_key_id,
            secret_access_key=secret_access_key,
            session_token=session_token,
            expires_after=expires_after,
        )
    if has_any_static or anonymous or from_env is not None or get_credentials is not None:
        raise conflicting_arguments(
            "s3_credentials", "an access key with its secret, anonymous=True, from_env=True, or get_credentials"
        )
    return s3_from_env_credentials()
