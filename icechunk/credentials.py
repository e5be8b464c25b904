"""Credentials for object stores: static, anonymous, from the environment, or fetched when they expire.

A representation never shows a secret. Values pickle (the official library's do not), so that a read-only
session can carry what its user gave it to a worker; nothing else puts them on a wire or a disk.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar, Final, TypeAlias, TypeVar, cast

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.values import Setting, TupleVariant, VariantMeta, aware, checked, hidden, instance_of, optional, text

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

T = TypeVar("T")


# --- shared shapes --------------------------------------------------------------------------------------------


class _Credential(TupleVariant):
    """Base of every member of a credentials union."""

    __slots__ = ()

    @property
    def _public_name(self) -> str:  # type: ignore[override]
        return f"icechunk.credentials.{type(self).__qualname__}"


@dataclass(frozen=True, slots=True, repr=False, match_args=False)
class _Secret(_Credential):
    """One string that is never shown."""

    __match_args__ = ("_0",)

    secret: str

    def __post_init__(self) -> None:
        text(type(self).__qualname__, self.secret)

    def _shown(self) -> list[tuple[str, Any, Any]]:
        return [("secret", hidden(), None)]


@dataclass(frozen=True, slots=True, repr=False, match_args=False)
class _FilePath(_Credential):
    """Path of a file that holds the secret."""

    __match_args__ = ("_0",)

    path: str

    def __post_init__(self) -> None:
        text(type(self).__qualname__, self.path)


@dataclass(frozen=True, slots=True, repr=False)
class _Refreshable(_Credential):
    """A function that is called for new credentials whenever the current ones have expired."""

    pickled_function: bytes
    """``pickle.dumps`` of a callable without arguments."""
    current: Any = None
    """What it returned last, or None where it is to be called at first use."""

    def __post_init__(self) -> None:
        instance_of(bytes)(f"{type(self).__qualname__}.pickled_function", self.pickled_function)
        if self.current is not None:
            self._check(self.current)

    def _check(self, value: Any) -> Any:
        return value

    def _shown(self) -> list[tuple[str, Any, Any]]:
        return [("pickled_function", hidden("function"), None), ("current", self.current, None)]

    def refreshed(self) -> Any:
        """Call the function and return the credentials that it gives. It may block: call it in a thread.

        Raises
        ------
        InvalidInputError
            The function cannot be unpickled, fails, or returns something else than credentials
            (kind ``invalid-credentials``).
        """
        try:
            value = pickle.loads(self.pickled_function)()
        except Exception as error:
            # The cause is chained; its text stays out of ours, which may end up in a log beside no secret.
            raise InvalidInputError(
                f"refreshing {type(self).__qualname__} failed with {type(error).__name__}: check the function given",
                ErrorKind.INVALID_CREDENTIALS,
            ) from error
        try:
            return self._check(value)
        except TypeError as error:
            raise InvalidInputError(
                f"the function of {type(self).__qualname__} returned {type(value).__name__}: "
                "let it return the static credentials of the same service",
                ErrorKind.INVALID_CREDENTIALS,
            ) from error


def _refreshable(
    cls: Callable[[bytes, Any], T], get_credentials: Callable[[], Any], scatter_initial_credentials: bool
) -> T:
    if not callable(get_credentials):
        raise TypeError(f"get_credentials must be a function without arguments, not {type(get_credentials).__name__}")
    current = get_credentials() if scatter_initial_credentials else None
    return cls(pickle.dumps(get_credentials), current)


# --- S3 -------------------------------------------------------------------------------------------------------


@dataclass(slots=True, repr=False, eq=True, unsafe_hash=False)
class S3StaticCredentials(Setting):
    """An access key."""

    _public_name: ClassVar[str] = "icechunk.credentials.S3StaticCredentials"

    access_key_id: str = field(metadata=checked(text))
    """Public part; representations show its first four characters."""
    secret_access_key: str = field(metadata=checked(text, secret=True))
    session_token: str | None = field(default=None, metadata=checked(optional(text), secret=True))
    """Part of temporary credentials."""
    expires_after: datetime | None = field(default=None, metadata=checked(optional(aware)))
    """The credentials are replaced before this time (with a time zone); None: never."""

    def _shown(self) -> list[tuple[str, Any, Any]]:
        masked = self.access_key_id[:4] + "****"
        return [(n, masked if n == "access_key_id" else v, d) for n, v, d in Setting._shown(self)]


class S3Credentials(metaclass=VariantMeta):
    """How requests to S3 are signed. One of the nested classes."""

    @dataclass(frozen=True, slots=True, repr=False)
    class FromEnv(_Credential):
        """The usual chain: environment, profile, web identity, instance metadata."""

    @dataclass(frozen=True, slots=True, repr=False)
    class Anonymous(_Credential):
        """No signature."""

    @dataclass(frozen=True, slots=True, repr=False, match_args=False)
    class Static(_Credential):
        """A given access key."""

        __match_args__ = ("_0",)

        credentials: S3StaticCredentials

        def __post_init__(self) -> None:
            instance_of(S3StaticCredentials)("S3Credentials.Static", self.credentials)

    class Refreshable(_Refreshable):
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
        Call it now, and carry the result along when this object is pickled, so that many workers that start
        together do not all call it.
    """
    return _refreshable(S3Credentials.Refreshable, get_credentials, scatter_initial_credentials)


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
        raise _conflict(
            "s3_credentials", "an access key with its secret, anonymous=True, from_env=True, or get_credentials"
        )
    return s3_from_env_credentials()


def _conflict(function: str, choices: str) -> InvalidInputError:
    return InvalidInputError(f"conflicting arguments to {function}: give {choices}", ErrorKind.INVALID_CREDENTIALS)


# --- Google Cloud Storage -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, repr=False)
class GcsBearerCredential(_Credential):
    """An OAuth token."""

    bearer: str
    expires_after: datetime | None = field(default=None, kw_only=True)
    """The token is replaced before this time (with a time zone); None: never."""

    def __post_init__(self) -> None:
        text("GcsBearerCredential.bearer", self.bearer)
        optional(aware)("GcsBearerCredential.expires_after", self.expires_after)

    def _shown(self) -> list[tuple[str, Any, Any]]:
        return [("bearer", hidden(), None), ("expires_after", self.expires_after, None)]


class GcsStaticCredentials(metaclass=VariantMeta):
    """Given credentials for Google Cloud Storage. One of the nested classes."""

    class ServiceAccount(_FilePath):
        """Path of a service account's JSON key."""

        __slots__ = ()

    class ServiceAccountKey(_Secret):
        """A service account's JSON key itself."""

        __slots__ = ()

    class ApplicationCredentials(_FilePath):
        """Path of application default credentials."""

        __slots__ = ()

    class BearerToken(_Secret):
        """An OAuth token that is never refreshed."""

        __slots__ = ()


AnyGcsStaticCredential: TypeAlias = (
    GcsStaticCredentials.ServiceAccount
    | GcsStaticCredentials.ServiceAccountKey
    | GcsStaticCredentials.ApplicationCredentials
    | GcsStaticCredentials.BearerToken
)


class GcsCredentials(metaclass=VariantMeta):
    """How requests to Google Cloud Storage are authorised. One of the nested classes."""

    @dataclass(frozen=True, slots=True, repr=False)
    class Anonymous(_Credential):
        """No authorisation."""

    @dataclass(frozen=True, slots=True, repr=False)
    class FromEnv(_Credential):
        """Application default credentials, or the machine's service account."""

    @dataclass(frozen=True, slots=True, repr=False, match_args=False)
    class Static(_Credential):
        """Given credentials."""

        __match_args__ = ("_0",)

        credentials: AnyGcsStaticCredential

        def __post_init__(self) -> None:
            instance_of(GcsStaticCredentials)("GcsCredentials.Static", self.credentials)

    class Refreshable(_Refreshable):
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
    raise _conflict(
        "gcs_static_credentials",
        "one of service_account_file, service_account_key, application_credentials, bearer_token",
    )


def gcs_refreshable_credentials(
    get_credentials: Callable[[], GcsBearerCredential], scatter_initial_credentials: bool = False
) -> GcsCredentials.Refreshable:
    """Google Cloud Storage tokens that are fetched again when they expire; see `s3_refreshable_credentials`."""
    return _refreshable(GcsCredentials.Refreshable, get_credentials, scatter_initial_credentials)


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
        raise _conflict("gcs_credentials", "either from_env=True or the credentials themselves")
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


# --- Azure Blob Storage ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, repr=False)
class _AzureExpiring(_Credential):
    expires_after: datetime | None = field(default=None, kw_only=True)
    """Replaced before this time (with a time zone); None: never."""

    def __post_init__(self) -> None:
        for name, value in zip(("secret", "expires_after"), self._fields()[::-1], strict=True):
            (text if name == "secret" else optional(aware))(f"{type(self).__qualname__}.{name}", value)

    def _shown(self) -> list[tuple[str, Any, Any]]:
        return [("secret", hidden(), None), ("expires_after", self.expires_after, None)]


class AzureRefreshableCredential(metaclass=VariantMeta):
    """What a refresh function for Azure returns. One of the nested classes."""

    @dataclass(frozen=True, slots=True, repr=False)
    class AccessKey(_AzureExpiring):
        """The account's key."""

        __match_args__ = ("key", "expires_after")
        key: str

    @dataclass(frozen=True, slots=True, repr=False)
    class SasToken(_AzureExpiring):
        """A shared access signature."""

        __match_args__ = ("token", "expires_after")
        token: str

    @dataclass(frozen=True, slots=True, repr=False)
    class BearerToken(_AzureExpiring):
        """An OAuth token."""

        __match_args__ = ("bearer", "expires_after")
        bearer: str


AnyAzureRefreshableCredential: TypeAlias = (
    AzureRefreshableCredential.AccessKey | AzureRefreshableCredential.SasToken | AzureRefreshableCredential.BearerToken
)


class AzureStaticCredentials(metaclass=VariantMeta):
    """Given credentials for Azure. One of the nested classes."""

    class AccessKey(_Secret):
        """The account's key."""

        __slots__ = ()

    class SasToken(_Secret):
        """A shared access signature."""

        __slots__ = ()

    class BearerToken(_Secret):
        """An OAuth token that is never refreshed."""

        __slots__ = ()


AnyAzureStaticCredential: TypeAlias = (
    AzureStaticCredentials.AccessKey | AzureStaticCredentials.SasToken | AzureStaticCredentials.BearerToken
)


class AzureCredentials(metaclass=VariantMeta):
    """How requests to Azure Blob Storage are authorised. One of the nested classes."""

    @dataclass(frozen=True, slots=True, repr=False)
    class FromEnv(_Credential):
        """The environment's Azure settings."""

    @dataclass(frozen=True, slots=True, repr=False)
    class Anonymous(_Credential):
        """No authorisation."""

    @dataclass(frozen=True, slots=True, repr=False, match_args=False)
    class Static(_Credential):
        """Given credentials."""

        __match_args__ = ("_0",)

        credentials: AnyAzureStaticCredential

        def __post_init__(self) -> None:
            instance_of(AzureStaticCredentials)("AzureCredentials.Static", self.credentials)

    class Refreshable(_Refreshable):
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
    raise _conflict("azure_static_credentials", "exactly one of access_key, sas_token, bearer_token, as a string")


def azure_refreshable_credentials(
    get_credentials: Callable[[], AnyAzureRefreshableCredential], scatter_initial_credentials: bool = False
) -> AzureCredentials.Refreshable:
    """Azure credentials that are fetched again when they expire; see `s3_refreshable_credentials`."""
    return _refreshable(AzureCredentials.Refreshable, get_credentials, scatter_initial_credentials)


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
        raise _conflict("azure_credentials", "either from_env=True or the credentials themselves")
    if has_static:
        static = azure_static_credentials(access_key=access_key, sas_token=sas_token, bearer_token=bearer_token)
        return AzureCredentials.Static(static)
    if get_credentials is not None:
        return azure_refreshable_credentials(get_credentials, scatter_initial_credentials)
    return azure_from_env_credentials()


# --- any store ------------------------------------------------------------------------------------------------


class Credentials(metaclass=VariantMeta):
    """Credentials for any kind of store, as virtual chunk containers take them. One of the nested classes."""

    @dataclass(frozen=True, slots=True, repr=False, match_args=False)
    class S3(_Credential):
        """For S3 and compatible services."""

        __match_args__ = ("_0",)

        credentials: AnyS3Credential

        def __post_init__(self) -> None:
            instance_of(S3Credentials)("Credentials.S3", self.credentials)

    @dataclass(frozen=True, slots=True, repr=False, match_args=False)
    class Gcs(_Credential):
        """For Google Cloud Storage."""

        __match_args__ = ("_0",)

        credentials: AnyGcsCredential

        def __post_init__(self) -> None:
            instance_of(GcsCredentials)("Credentials.Gcs", self.credentials)

    @dataclass(frozen=True, slots=True, repr=False, match_args=False)
    class Azure(_Credential):
        """For Azure Blob Storage."""

        __match_args__ = ("_0",)

        credentials: AnyAzureCredential

        def __post_init__(self) -> None:
            instance_of(AzureCredentials)("Credentials.Azure", self.credentials)

    @dataclass(frozen=True, slots=True, repr=False)
    class LocalFileSystemAccess(_Credential):
        """Allow reading this machine's files; nothing secret."""

    @dataclass(frozen=True, slots=True, repr=False)
    class HttpAccess(_Credential):
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
