"""Construction of obstore's stores for buckets of Google and containers of Azure.

A bucket makes up to three stores for the settings of one storage: for reads, for writes that may be repeated,
and for conditional writes. The last never repeats a request by itself: a conditional write may be sent again only after
its outcome was looked up.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import Any, ClassVar, Final, Self, TypeAlias

from icechunk.credentials import AzureCredentials, AzureStaticCredentials, GcsCredentials, GcsStaticCredentials
from icechunk.credentials.azure import AzureRefreshableCredential
from icechunk.errors import ErrorKind, InvalidInputError, StorageError
from icechunk.runtime.about import CLIENT_NAME
from icechunk.runtime.clock import SYSTEM, Sources
from icechunk.storage.refreshed_credentials import Refreshed
from icechunk.storage.retry import Limits
from icechunk.storage.rights import Service

__all__ = [
    "Access",
    "AzureContainer",
    "GcsBucket",
    "ObstoreBucket",
    "azure_options",
    "gcs_options",
    "stores_of_obstore",
]

# Options of the HTTP client, which obstore takes beside those of the service.
_CLIENT_OPTIONS: Final = frozenset(
    {
        "allow_http",
        "allow_invalid_certificates",
        "connect_timeout",
        "default_content_type",
        "http1_only",
        "http2_keep_alive_interval",
        "http2_keep_alive_timeout",
        "http2_keep_alive_while_idle",
        "http2_only",
        "pool_idle_timeout",
        "pool_max_idle_per_host",
        "proxy_ca_certificate",
        "proxy_excludes",
        "proxy_url",
        "randomize_addresses",
        "read_timeout",
        "timeout",
        "user_agent",
    }
)
_LONGEST_REQUEST: Final = timedelta(hours=1)
_LONGEST_OPERATION: Final = timedelta(minutes=5)


class ObstoreBucket(ABC):
    """A bucket and prefix, with the state that all storages on it share.

    Parameters
    ----------
    bucket
        Its name.
    prefix
        Comes before every key, with a ``/`` between; None or empty for the whole bucket.
    config
        Options as obstore names them, of the service or of the HTTP client.
    read_headers, write_headers
        Sent with requests that read, and with those that write.

    Raises
    ------
    InvalidInputError
        No bucket, or options that are no strings.
    """

    kind: ClassVar[str]
    service: ClassVar[Service]
    """The service's name in representations."""
    scheme: ClassVar[str]
    """Scheme of URLs of its objects."""
    part: ClassVar[str] = "bucket"
    """The service's name for a bucket."""
    refused_characters: ClassVar[str] = ""
    """Characters that the service silently changes in keys."""
    versions_are_generations: ClassVar[bool] = False
    """Conditions are on a generation number, not on the ETag."""

    def __init__(
        self,
        bucket: str,
        prefix: str | None = None,
        *,
        config: Mapping[str, str] | None = None,
        read_headers: Mapping[str, str] | None = None,
        write_headers: Mapping[str, str] | None = None,
        sources: Sources = SYSTEM,
    ) -> None:
        folder = (prefix or "").strip("/")
        self.bucket: str = _checked_name(self.part, bucket)
        self.root: str = folder + "/" if folder else ""
        self.config: dict[str, str] = _checked_config(config)
        self.read_headers: dict[str, str] = dict(read_headers or {})
        self.write_headers: dict[str, str] = dict(write_headers or {})
        self.sources = sources
        self.user_agent = CLIENT_NAME
        self._access: Access | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Clocks and credentials that are being refreshed belong to a process.
        return {name: value for name, value in self.__dict__.items() if name not in ("sources", "_access")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, sources=SYSTEM, _access=None)

    def named(self, user_agent: str) -> Self:
        """The same bucket, whose requests name themselves so where the options do not say otherwise."""
        other = copy.copy(self)
        other.sources, other._access, other.user_agent = self.sources, self._access, user_agent
        return other

    @property
    def access(self) -> Access:
        """Options and credential provider, one for all stores, so that they refresh credentials together."""
        if self._access is None:
            self._access = self._make_access()
        return self._access

    @abstractmethod
    def _make_access(self) -> Access:
        """The credentials as obstore takes them."""

    @abstractmethod
    def rows(self) -> list[tuple[str, str]]:
        """The rows of a representation, besides the kind."""

    @abstractmethod
    def identity(self) -> tuple[Any, ...]:
        """Equal for buckets with the same objects."""

    @abstractmethod
    def _make(self, stores: Any, config: dict[str, str], common: dict[str, Any]) -> Any:
        """One of obstore's stores."""

    def open(self, limits: Limits, *, role: str) -> Any:
        """A store to read (``read``), write (``write``), or write under conditions (``once``).

        Raises
        ------
        StorageError
            obstore is not installed (kind ``unimplemented``), or does not take the configuration (``storage-config``).
        """
        stores = stores_of_obstore(f"a repository in {self.describe()}")
        # No try may take longer than the limit for all tries together.
        longest_s = min((s for s in (limits.attempt_s, limits.operation_s) if s is not None), default=None)
        client: dict[str, Any] = {
            "timeout": _LONGEST_REQUEST if longest_s is None else timedelta(seconds=longest_s),
            "connect_timeout": timedelta(seconds=limits.connect_s),
            "read_timeout": timedelta(seconds=limits.read_s),
            "user_agent": self.user_agent,
        }
        config: dict[str, str] = {}
        for name, value in self.config.items():
            (client if name.lower() in _CLIENT_OPTIONS else config)[name.lower()] = value
        headers = self.read_headers if role == "read" else self.write_headers
        if headers:
            client["default_headers"] = dict(headers)
        retry = {
            "max_retries": 0 if role == "once" else max(0, limits.max_tries - 1),
            "backoff": {
                "init_backoff": timedelta(seconds=limits.initial_backoff_s),
                "max_backoff": timedelta(seconds=max(limits.max_backoff_s, limits.initial_backoff_s)),
                "base": 2,
            },
            "retry_timeout": _LONGEST_OPERATION
            if limits.operation_s is None
            else timedelta(seconds=limits.operation_s),
        }
        try:
            return self._make(stores, config, {"client_options": client, "retry_config": retry})
        except Exception as error:
            # Obstore's text may quote the configuration, and with it a secret.
            raise StorageError(
                f"cannot open {self.describe()}: obstore does not take its configuration or credentials "
                f"({type(error).__name__}); check the options {sorted(self.config)} and the credentials",
                ErrorKind.STORAGE_CONFIG,
            ) from error

    def describe(self) -> str:
        """URL of the bucket and prefix."""
        return f"{self.scheme}://{self.bucket}/{self.root}"


class GcsBucket(ObstoreBucket):
    """A bucket of Google Cloud Storage. Parameters as `ObstoreBucket`; credentials None: as the environment says."""

    kind = "GCS"
    service = Service.GCS
    scheme = "gs"
    versions_are_generations = True

    def __init__(self, bucket: str, prefix: str | None = None, *, credentials: Any = None, **options: Any) -> None:
        super().__init__(bucket, prefix, **options)
        self.credentials: Any = GcsCredentials.FromEnv() if credentials is None else credentials
        if not isinstance(self.credentials, GcsCredentials):
            raise _wrong_credentials("Google Cloud Storage", self.credentials)

    def rows(self) -> list[tuple[str, str]]:
        return [("bucket", self.bucket)]

    def identity(self) -> tuple[Any, ...]:
        base = next((v for n, v in self.config.items() if n.lower() in ("base_url", "google_base_url")), "")
        return ("gs", base, self.bucket, self.root)

    def _make_access(self) -> Access:
        return gcs_options(self.credentials, self.sources)

    def _make(self, stores: Any, config: dict[str, str], common: dict[str, Any]) -> Any:
        given, provider = self.access
        return stores.GCSStore(self.bucket, config={**config, **given}, credential_provider=provider, **common)


class AzureContainer(ObstoreBucket):
    """A container of Azure Blob Storage. Parameters as `ObstoreBucket`; credentials None: as the environment says."""

    kind = "Azure"
    service = Service.AZURE
    scheme = "az"
    part = "container"
    # Azure takes it for a slash.
    refused_characters = "\\"

    def __init__(
        self, account: str, container: str, prefix: str | None = None, *, credentials: Any = None, **options: Any
    ) -> None:
        super().__init__(container, prefix, **options)
        self.account: str = _checked_name("account", account)
        self.credentials: Any = AzureCredentials.FromEnv() if credentials is None else credentials
        if not isinstance(self.credentials, AzureCredentials):
            raise _wrong_credentials("Azure", self.credentials)

    def rows(self) -> list[tuple[str, str]]:
        return [("account", self.account), ("container", self.bucket)]

    def identity(self) -> tuple[Any, ...]:
        return ("az", self.account, self.bucket, self.root)

    def _make_access(self) -> Access:
        return azure_options(self.credentials, self.sources)

    def _make(self, stores: Any, config: dict[str, str], common: dict[str, Any]) -> Any:
        given, provider = self.access
        options = {**config, "account_name": self.account, **given}
        return stores.AzureStore(self.bucket, config=options, credential_provider=provider, **common)

    def describe(self) -> str:
        return f"az://{self.account}/{self.bucket}/{self.root}"


def stores_of_obstore(what: str) -> Any:
    """The module of obstore's stores.

    Raises
    ------
    StorageError
        It is not installed; the message names the remedy (kind ``unimplemented``).
    """
    try:
        from obstore import store
    except ImportError as error:
        raise StorageError(
            f"{what} needs obstore: install it with pip install 'aioicechunk[obstore]'", ErrorKind.UNIMPLEMENTED
        ) from error
    return store


def _checked_name(what: str, name: Any) -> str:
    """A bucket's, container's or account's name. Raises `InvalidInputError` for anything else."""
    if not isinstance(name, str) or not name or "/" in name:
        raise InvalidInputError(f"bad {what} {name!r}: give its name alone", ErrorKind.STORAGE_CONFIG)
    return name


def _checked_config(config: Mapping[str, str] | None) -> dict[str, str]:
    """A copy of options, which are strings. Raises `InvalidInputError` where they are not."""
    for name, value in (config or {}).items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise InvalidInputError(
                f"bad option {name!r} of a storage: names and values are strings", ErrorKind.STORAGE_CONFIG
            )
    return dict(config or {})


def _wrong_credentials(service: str, given: Any) -> InvalidInputError:
    return InvalidInputError(f"{type(given).__name__} are no credentials for {service}", ErrorKind.INVALID_CREDENTIALS)


Provider: TypeAlias = Callable[[], Awaitable[Mapping[str, Any]]]
Access: TypeAlias = tuple[dict[str, str], Provider | None]
"""Options of a store, and the provider that it calls for credentials."""


def gcs_options(credential: Any, sources: Sources = SYSTEM) -> Access:
    """Options and credential provider of a `GCSStore`; None: as the environment says."""
    match credential:
        case GcsCredentials.Anonymous():
            return {"skip_signature": "true"}, None
        case GcsCredentials.Static(GcsStaticCredentials.ServiceAccount(path)):
            return {"service_account": path}, None
        case GcsCredentials.Static(GcsStaticCredentials.ServiceAccountKey(key)):
            return {"service_account_key": key}, None
        case GcsCredentials.Static(GcsStaticCredentials.ApplicationCredentials(path)):
            return {"application_credentials": path}, None
        case GcsCredentials.Static(GcsStaticCredentials.BearerToken(token)):
            return {}, _constant({"token": token, "expires_at": None})
        case GcsCredentials.Refreshable():
            return {}, Refreshed(credential, _gcs_token, sources).get
    return {}, None


def azure_options(credential: Any, sources: Sources = SYSTEM) -> Access:
    """Options and credential provider of an `AzureStore`; None: as the environment says."""
    match credential:
        case AzureCredentials.Anonymous():
            return {"skip_signature": "true"}, None
        case AzureCredentials.Static(AzureStaticCredentials.AccessKey(key)):
            return {"access_key": key}, None
        case AzureCredentials.Static(AzureStaticCredentials.SasToken(token)):
            return {"sas_token": token}, None
        case AzureCredentials.Static(AzureStaticCredentials.BearerToken(token)):
            return {"bearer_token": token}, None
        case AzureCredentials.Refreshable():
            return {}, Refreshed(credential, _azure_secret, sources).get
    return {}, None


def _gcs_token(found: Any) -> dict[str, Any]:
    return {"token": found.bearer, "expires_at": found.expires_after}


def _azure_secret(found: Any) -> dict[str, Any]:
    match found:
        case AzureRefreshableCredential.AccessKey(key, expires):
            return {"access_key": key, "expires_at": expires}
        case AzureRefreshableCredential.SasToken(token, expires):
            return {"sas_token": token, "expires_at": expires}
    return {"token": found.bearer, "expires_at": found.expires_after}


def _constant(value: Mapping[str, Any]) -> Provider:
    async def provide() -> Mapping[str, Any]:
        return value

    return provide
