"""The public functions that make storages and store configurations, and `Storage.new_*`, under the official names.

This is the one module that knows every adapter. Those that need a library are imported when one is made: the libraries
take longer to load than everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import datetime
from typing import Any, Final, TypedDict

from icechunk.config import ChecksumAlgorithm, ObjectStoreConfig, S3Options
from icechunk.credentials import (
    GcsBearerCredential,
    S3StaticCredentials,
    azure_credentials,
    gcs_credentials,
    s3_credentials,
)
from icechunk.errors import ErrorKind, StorageError
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import Storage
from icechunk.storage.presets import hugging_face_options, r2_bucket, r2_options, tigris_headers, tigris_options

__all__ = [
    "azure_storage",
    "azure_store",
    "gcs_storage",
    "gcs_store",
    "hf_storage",
    "http_storage",
    "http_store",
    "in_memory_storage",
    "local_filesystem_storage",
    "local_filesystem_store",
    "r2_storage",
    "redirect_storage",
    "s3_object_store_storage",
    "s3_storage",
    "s3_store",
    "tigris_storage",
]

_OPTIONS: Final = frozenset(field.name for field in fields(S3Options)) - {"anonymous"}
_KEYS: Final = frozenset(
    {
        "access_key_id",
        "anonymous",
        "expires_after",
        "from_env",
        "get_credentials",
        "scatter_initial_credentials",
        "secret_access_key",
        "session_token",
    }
)
_REST: Final = frozenset({"headers", "legacy_rooted_keys", "read_headers", "write_headers"})

Headers = dict[str, str] | None


# -- storages ------------------------------------------------------------------------------------------------------


def in_memory_storage() -> Storage:
    """A storage in the memory of this process, gone with it; for tests and experiments."""
    return MemoryStorage()


def local_filesystem_storage(path: str) -> Storage:
    """A storage below a folder, which the first write makes.

    Crash-safe, and safe among threads and processes on one machine. Network mounts are as safe as their hard
    links, exclusive renames or locks are.
    """
    return LocalStorage(path)


def s3_storage(
    *,
    bucket: str,
    prefix: str | None,
    region: str | None = None,
    endpoint_url: str | None = None,
    allow_http: bool = False,
    access_key_id: str | None = None,
    secret_access_key: str | None = None,
    session_token: str | None = None,
    expires_after: datetime | None = None,
    anonymous: bool | None = None,
    from_env: bool | None = None,
    get_credentials: Callable[[], S3StaticCredentials] | None = None,
    scatter_initial_credentials: bool = False,
    force_path_style: bool = False,
    network_stream_timeout_seconds: int = 60,
    requester_pays: bool = False,
    checksum_algorithm: ChecksumAlgorithm | None = None,
    legacy_rooted_keys: bool | None = None,
    read_headers: dict[str, str] | None = None,
    write_headers: dict[str, str] | None = None,
    headers: dict[str, str] | None = None,
) -> Storage:
    """A storage in a bucket of S3, or of a service with its protocol.

    Parameters
    ----------
    bucket, prefix
        The bucket must exist. The prefix comes before all keys; None or empty for the whole bucket.
    region
        Taken from the environment, or from what the service says, where it is None.
    endpoint_url
        None for AWS itself. Plain ``http://`` needs ``allow_http``.
    access_key_id, secret_access_key, session_token, expires_after
        A given access key.
    anonymous, from_env
        No signatures, or the usual chain of environment, profile and instance metadata (the default).
    get_credentials, scatter_initial_credentials
        A function, picklable by name, that returns `icechunk.S3StaticCredentials` and is called again shortly before
        they expire; its first result is pickled too if the second argument is True.
    force_path_style
        The bucket's name in the path instead of the host name.
    network_stream_timeout_seconds
        A body that delivers nothing for that long is tried again.
    requester_pays
        Agree to be billed for requests to a bucket of another account.
    checksum_algorithm
        Checksum that the service verifies on upload; None for none beyond TLS's and the signature's.
    legacy_rooted_keys
        Keys begin with ``/``, as those of very old repositories without prefix do.
    read_headers, write_headers, headers
        Sent with requests that read, that write, and with both; server-side encryption is asked for in this way.

    Raises
    ------
    InvalidInputError
        Conflicting credentials (kind ``invalid-credentials``).
    StorageError
        ``legacy_rooted_keys`` with a prefix.
    """
    return _on_s3(Storage.new_s3, (bucket, prefix), locals())


def tigris_storage(
    *,
    bucket: str,
    prefix: str | None,
    region: str | None = None,
    endpoint_url: str | None = None,
    use_weak_consistency: bool = False,
    allow_http: bool = False,
    access_key_id: str | None = None,
    secret_access_key: str | None = None,
    session_token: str | None = None,
    expires_after: datetime | None = None,
    anonymous: bool | None = None,
    from_env: bool | None = None,
    get_credentials: Callable[[], S3StaticCredentials] | None = None,
    scatter_initial_credentials: bool = False,
    network_stream_timeout_seconds: int = 60,
    checksum_algorithm: ChecksumAlgorithm | None = None,
    legacy_rooted_keys: bool | None = None,
    read_headers: dict[str, str] | None = None,
    write_headers: dict[str, str] | None = None,
    headers: dict[str, str] | None = None,
) -> Storage:
    """A storage in a Tigris bucket; see `s3_storage` for the parameters.

    Tigris is consistent only within one region: with ``region`` every request asks for it. Without, only
    ``use_weak_consistency`` is left, which is for readers that may see old states.

    Raises
    ------
    StorageError
        Neither a region nor ``use_weak_consistency``.
    """
    return _on_s3(Storage.new_tigris, (bucket, prefix, use_weak_consistency), locals())


def r2_storage(
    *,
    bucket: str | None = None,
    prefix: str | None = None,
    account_id: str | None = None,
    endpoint_url: str | None = None,
    region: str | None = None,
    allow_http: bool = False,
    access_key_id: str | None = None,
    secret_access_key: str | None = None,
    session_token: str | None = None,
    expires_after: datetime | None = None,
    anonymous: bool | None = None,
    from_env: bool | None = None,
    get_credentials: Callable[[], S3StaticCredentials] | None = None,
    scatter_initial_credentials: bool = False,
    network_stream_timeout_seconds: int = 60,
    checksum_algorithm: ChecksumAlgorithm | None = None,
    legacy_rooted_keys: bool | None = None,
    read_headers: dict[str, str] | None = None,
    write_headers: dict[str, str] | None = None,
    headers: dict[str, str] | None = None,
) -> Storage:
    """A storage in a bucket of Cloudflare's R2; see `s3_storage` for the parameters.

    Parameters
    ----------
    bucket
        None: the first segment of ``prefix``.
    account_id
        Gives the endpoint, where ``endpoint_url`` does not.

    Raises
    ------
    StorageError
        No bucket in either argument, or neither account nor endpoint.
    """
    return _on_s3(Storage.new_r2, (bucket, prefix, account_id), locals())


def s3_object_store_storage(
    *,
    bucket: str,
    prefix: str | None,
    region: str | None = None,
    endpoint_url: str | None = None,
    allow_http: bool = False,
    access_key_id: str | None = None,
    secret_access_key: str | None = None,
    session_token: str | None = None,
    expires_after: datetime | None = None,
    anonymous: bool | None = None,
    from_env: bool | None = None,
    force_path_style: bool = False,
    read_headers: dict[str, str] | None = None,
    write_headers: dict[str, str] | None = None,
    headers: dict[str, str] | None = None,
) -> Storage:
    """The same as `s3_storage`: there is one way to S3 here, where the official library has two."""
    return _on_s3(Storage.new_s3_object_store, (bucket, prefix), locals())


def hf_storage(
    *,
    bucket: str,
    prefix: str | None,
    namespace: str,
    access_key_id: str | None = None,
    secret_access_key: str | None = None,
    session_token: str | None = None,
    expires_after: datetime | None = None,
    from_env: bool | None = None,
    get_credentials: Callable[[], S3StaticCredentials] | None = None,
    scatter_initial_credentials: bool = False,
    network_stream_timeout_seconds: int = 60,
    legacy_rooted_keys: bool | None = None,
    read_headers: dict[str, str] | None = None,
    write_headers: dict[str, str] | None = None,
    headers: dict[str, str] | None = None,
) -> Storage:
    """A storage in a bucket of Hugging Face, through its S3 gateway; see `s3_storage` for the other parameters.

    The gateway drops user metadata. A conditional write whose answer is lost is therefore recognised by its contents.

    Parameters
    ----------
    namespace
        The user or organization that owns the bucket.
    access_key_id, secret_access_key
        An S3 key made from a Hugging Face token, not the token itself.

    Raises
    ------
    InvalidInputError
        No namespace, or conflicting credentials.
    """
    return _on_s3(Storage.new_hf, (bucket, prefix, namespace), locals())


def _on_s3(new: Callable[..., Storage], place: tuple[Any, ...], arguments: Mapping[str, Any]) -> Storage:
    """Call one of `Storage.new_*` with what a function's arguments say of options, keys and headers."""

    def picked(names: frozenset[str]) -> dict[str, Any]:
        return {name: value for name, value in arguments.items() if name in names}

    return new(S3Options(**picked(_OPTIONS)), *place, credentials=s3_credentials(**picked(_KEYS)), **picked(_REST))


def gcs_storage(
    *,
    bucket: str,
    prefix: str | None,
    service_account_file: str | None = None,
    service_account_key: str | None = None,
    application_credentials: str | None = None,
    bearer_token: str | None = None,
    anonymous: bool | None = None,
    from_env: bool | None = None,
    config: dict[str, str] | None = None,
    get_credentials: Callable[[], GcsBearerCredential] | None = None,
    scatter_initial_credentials: bool = False,
    read_headers: dict[str, str] | None = None,
    write_headers: dict[str, str] | None = None,
    headers: dict[str, str] | None = None,
) -> Storage:
    """A storage in a bucket of Google Cloud Storage. Needs the extra ``obstore``.

    Parameters
    ----------
    bucket, prefix
        The bucket must exist. The prefix comes before all keys; None or empty for the whole bucket.
    service_account_file, service_account_key
        A service account's JSON key: the file's path, or the text itself.
    application_credentials
        Path of a file of application default credentials.
    bearer_token
        An OAuth token, never refreshed.
    anonymous, from_env
        Requests without credentials, which can only read; or what the environment has (the default).
    config
        Options as obstore's `GCSStore` and its HTTP client name them, such as ``google_base_url``.
    get_credentials, scatter_initial_credentials
        A function, picklable by name, that returns `icechunk.GcsBearerCredential` and is called again shortly before
        they expire; its first result is pickled too if the second argument is True.
    read_headers, write_headers, headers
        Sent with requests that read, that write, and with both.

    Raises
    ------
    InvalidInputError
        Conflicting credentials, or no bucket's name.
    """
    return Storage.new_gcs(
        bucket,
        prefix,
        gcs_credentials(
            service_account_file=service_account_file,
            service_account_key=service_account_key,
            application_credentials=application_credentials,
            bearer_token=bearer_token,
            from_env=from_env,
            anonymous=anonymous,
            get_credentials=get_credentials,
            scatter_initial_credentials=scatter_initial_credentials,
        ),
        config=config,
        read_headers=read_headers,
        write_headers=write_headers,
        headers=headers,
    )


def azure_storage(
    *,
    account: str,
    container: str,
    prefix: str,
    access_key: str | None = None,
    sas_token: str | None = None,
    bearer_token: str | None = None,
    from_env: bool | None = None,
    anonymous: bool | None = None,
    config: dict[str, str] | None = None,
) -> Storage:
    """A storage in a container of Azure Blob Storage. Needs the extra ``obstore``.

    For credentials that are refreshed, see `Storage.new_azure_blob` with `icechunk.azure_refreshable_credentials`.

    Parameters
    ----------
    account, container, prefix
        The container must exist. The prefix comes before all keys; empty for the whole container.
    access_key, sas_token, bearer_token
        The account's key, a shared access signature, or an OAuth token.
    from_env, anonymous
        What the environment has (the default), or no credentials, for containers that are public.
    config
        Options as obstore's `AzureStore` and its HTTP client name them, such as ``endpoint``.

    Raises
    ------
    InvalidInputError
        Conflicting credentials, or no names.
    """
    return Storage.new_azure_blob(
        account,
        container,
        prefix,
        azure_credentials(
            access_key=access_key,
            sas_token=sas_token,
            bearer_token=bearer_token,
            from_env=from_env,
            anonymous=anonymous,
        ),
        config=config,
    )


def http_storage(base_url: str, opts: dict[str, str] | None = None, headers: dict[str, str] | None = None) -> Storage:
    """A read-only storage on a web server, below a URL.

    Parameters
    ----------
    base_url
        The repository's root, ``http:`` or ``https:``.
    opts
        Options of the HTTP client: ``timeout``, ``connect_timeout``, ``read_timeout`` (``30s``, ``500ms``),
        ``allow_http``, ``allow_invalid_certificates``, ``proxy_url``, ``user_agent``.
    headers
        Sent with every request to that server: ``{"authorization": "Bearer …"}``.

    Raises
    ------
    InvalidInputError
        No such URL, or an option that is none.
    """
    return Storage.new_http(base_url, opts, headers)


def redirect_storage(base_url: str) -> Storage:
    """A read-only storage that a web server names, by redirecting to it; asked for at first use.

    Parameters
    ----------
    base_url
        Its answer is a redirect to ``s3://bucket/prefix?region=…``, ``gs://bucket/prefix``,
        ``r2://bucket/prefix?account_id=…``, ``tigris://bucket/prefix``, ``http+icechunk://host/path`` or
        ``https+icechunk://host/path``. The target must be readable without credentials.

    Raises
    ------
    InvalidInputError
        Not a URL of the web.
    """
    return Storage.new_redirect(base_url)


# -- Storage.new_* -------------------------------------------------------------------------------------------------


class _Sent(TypedDict):
    read_headers: dict[str, str]
    write_headers: dict[str, str]


def _sent(read_headers: Headers, write_headers: Headers, headers: Headers) -> _Sent:
    return {
        "read_headers": {**(headers or {}), **(read_headers or {})},
        "write_headers": {**(headers or {}), **(write_headers or {})},
    }


def _new_in_memory(cls: type[Storage]) -> Storage:
    """See `icechunk.in_memory_storage`."""
    return MemoryStorage()


def _new_local_filesystem(cls: type[Storage], path: str) -> Storage:
    """See `icechunk.local_filesystem_storage`."""
    return LocalStorage(path)


def _new_s3(
    cls: type[Storage],
    config: S3Options,
    bucket: str,
    prefix: str | None,
    credentials: Any = None,
    legacy_rooted_keys: bool | None = None,
    *,
    read_headers: Headers = None,
    write_headers: Headers = None,
    headers: Headers = None,
) -> Storage:
    """See `icechunk.s3_storage`; ``credentials`` is one of `icechunk.S3Credentials`."""
    return _s3(config, bucket, prefix, credentials, legacy_rooted_keys, _sent(read_headers, write_headers, headers))


def _new_s3_object_store(
    cls: type[Storage],
    config: S3Options,
    bucket: str,
    prefix: str | None,
    credentials: Any = None,
    *,
    read_headers: Headers = None,
    write_headers: Headers = None,
    headers: Headers = None,
) -> Storage:
    """The same storage as `new_s3`: there is one way to S3 here, where the official library has two."""
    return _s3(config, bucket, prefix, credentials, None, _sent(read_headers, write_headers, headers))


def _new_tigris(
    cls: type[Storage],
    config: S3Options,
    bucket: str,
    prefix: str | None,
    use_weak_consistency: bool,
    credentials: Any = None,
    legacy_rooted_keys: bool | None = None,
    *,
    read_headers: Headers = None,
    write_headers: Headers = None,
    headers: Headers = None,
) -> Storage:
    """See `icechunk.tigris_storage`."""
    headers = {**tigris_headers(config.region, use_weak_consistency), **(headers or {})}
    sent = _sent(read_headers, write_headers, headers)
    return _s3(tigris_options(config), bucket, prefix, credentials, legacy_rooted_keys, sent)


def _new_r2(
    cls: type[Storage],
    config: S3Options,
    bucket: str | None = None,
    prefix: str | None = None,
    account_id: str | None = None,
    credentials: Any = None,
    legacy_rooted_keys: bool | None = None,
    *,
    read_headers: Headers = None,
    write_headers: Headers = None,
    headers: Headers = None,
) -> Storage:
    """See `icechunk.r2_storage`."""
    options = r2_options(config, account_id)
    bucket, prefix = r2_bucket(bucket, prefix)
    return _s3(options, bucket, prefix, credentials, legacy_rooted_keys, _sent(read_headers, write_headers, headers))


def _new_hf(
    cls: type[Storage],
    config: S3Options,
    bucket: str,
    prefix: str | None,
    namespace: str,
    credentials: Any = None,
    legacy_rooted_keys: bool | None = None,
    *,
    read_headers: Headers = None,
    write_headers: Headers = None,
    headers: Headers = None,
) -> Storage:
    """See `icechunk.hf_storage`."""
    sent = _sent(read_headers, write_headers, headers)
    options = hugging_face_options(config, namespace)
    return _s3(options, bucket, prefix, credentials, legacy_rooted_keys, sent, keeps_metadata=False)


def _s3(
    options: S3Options,
    bucket: str,
    prefix: str | None,
    credentials: Any,
    legacy_rooted_keys: bool | None,
    sent: _Sent,
    keeps_metadata: bool = True,
) -> Storage:
    from icechunk.storage.s3.storage import S3Storage

    if legacy_rooted_keys and prefix and prefix.strip("/"):
        raise StorageError(
            "storage error: legacy_rooted_keys is only valid with an empty prefix", ErrorKind.STORAGE_CONFIG
        )
    return S3Storage(
        bucket,
        prefix,
        options=options,
        credentials=credentials,
        rooted_keys=bool(legacy_rooted_keys),
        keeps_metadata=keeps_metadata,
        **sent,
    )


def _new_gcs(
    cls: type[Storage],
    bucket: str,
    prefix: str | None,
    credentials: Any = None,
    *,
    config: dict[str, str] | None = None,
    read_headers: Headers = None,
    write_headers: Headers = None,
    headers: Headers = None,
) -> Storage:
    """See `icechunk.gcs_storage`; ``credentials`` is one of `icechunk.GcsCredentials`."""
    from icechunk.storage.obstore.buckets import GcsBucket
    from icechunk.storage.obstore.storage import ObstoreStorage

    sent = _sent(read_headers, write_headers, headers)
    return ObstoreStorage(GcsBucket(bucket, prefix, credentials=credentials, config=config, **sent))


def _new_azure_blob(
    cls: type[Storage],
    account: str,
    container: str,
    prefix: str,
    credentials: Any = None,
    *,
    config: dict[str, str] | None = None,
) -> Storage:
    """See `icechunk.azure_storage`; ``credentials`` is one of `icechunk.AzureCredentials`."""
    from icechunk.storage.obstore.buckets import AzureContainer
    from icechunk.storage.obstore.storage import ObstoreStorage

    return ObstoreStorage(AzureContainer(account, container, prefix, credentials=credentials, config=config))


def _new_http(
    cls: type[Storage],
    base_url: str,
    config: dict[str, str] | None = None,
    headers: dict[str, str] | None = None,
) -> Storage:
    """See `icechunk.http_storage`."""
    from icechunk.storage.http.storage import HttpStorage

    return HttpStorage(base_url, config, headers)


def _new_redirect(cls: type[Storage], base_url: str) -> Storage:
    """See `icechunk.redirect_storage`."""
    from icechunk.storage.redirect import RedirectStorage

    return RedirectStorage(base_url)


def _attach(*functions: Callable[..., Storage]) -> None:
    """Make the functions class methods of the port, under their names without the underscore."""
    for function in functions:
        name = function.__name__.removeprefix("_")
        function.__qualname__ = f"Storage.{name}"
        function.__name__ = name
        setattr(Storage, name, classmethod(function))


_attach(
    _new_in_memory,
    _new_local_filesystem,
    _new_s3,
    _new_s3_object_store,
    _new_tigris,
    _new_r2,
    _new_hf,
    _new_gcs,
    _new_azure_blob,
    _new_http,
    _new_redirect,
)


# -- kinds of stores of virtual chunks -----------------------------------------------------------------------------


def local_filesystem_store(path: str) -> ObjectStoreConfig.LocalFileSystem:
    """The kind of store of virtual chunks that are files of this machine."""
    return ObjectStoreConfig.LocalFileSystem(path)  # type: ignore[arg-type]


def s3_store(
    region: str | None = None,
    endpoint_url: str | None = None,
    allow_http: bool = False,
    anonymous: bool = False,
    s3_compatible: bool = False,
    force_path_style: bool = False,
    network_stream_timeout_seconds: int = 60,
    requester_pays: bool = False,
    checksum_algorithm: ChecksumAlgorithm | None = None,
) -> ObjectStoreConfig.S3Compatible | ObjectStoreConfig.S3:
    """The kind of store of virtual chunks in S3, or with ``s3_compatible`` in a service with its protocol.

    See `s3_storage` for the parameters.
    """
    arguments = locals()
    del arguments["s3_compatible"]
    options = S3Options(**arguments)
    return ObjectStoreConfig.S3Compatible(options) if s3_compatible else ObjectStoreConfig.S3(options)


def gcs_store(opts: dict[str, str] | None = None) -> ObjectStoreConfig.Gcs:
    """The kind of store of virtual chunks in Google Cloud Storage; ``opts`` are obstore's."""
    return ObjectStoreConfig.Gcs(opts)


def azure_store(*, account: str, config: dict[str, str] | None = None) -> ObjectStoreConfig.Azure:
    """The kind of store of virtual chunks in an account of Azure Blob Storage; ``config`` is obstore's."""
    return ObjectStoreConfig.Azure({"account": account, **(config or {})})


def http_store(opts: dict[str, str] | None = None, headers: dict[str, str] | None = None) -> ObjectStoreConfig.Http:
    """The kind of store of virtual chunks on web servers.

    Parameters
    ----------
    opts
        Options of the HTTP client, as `http_storage` takes them.
    headers
        Sent with every request to that server.
    """
    return ObjectStoreConfig.Http(opts, headers)
