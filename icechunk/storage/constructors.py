"""The public functions that make storages and store configurations, under the official names, and the builders.

A function describes a storage (`icechunk.storage.kinds`), and `build` makes it; ``Storage.new_*``
(`icechunk.storage.class_methods`) do the same. This is the one module that knows every adapter. Those that need a
library are imported when one is made: the libraries take longer to load than everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from icechunk.config import ChecksumAlgorithm, ObjectStoreConfig, S3Options
from icechunk.credentials import (
    GcsBearerCredential,
    S3StaticCredentials,
    azure_credentials,
    gcs_credentials,
    s3_credentials,
)
from icechunk.storage.kinds import (
    AzureKind,
    GcsKind,
    Headers,
    HttpKind,
    LocalKind,
    MemoryKind,
    RedirectKind,
    S3Kind,
    StorageKind,
)
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import Storage
from icechunk.storage.presets import hugging_face, r2, r2_bucket, tigris

__all__ = [
    "azure_storage",
    "azure_store",
    "build",
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

# -- storages ------------------------------------------------------------------------------------------------------


def in_memory_storage() -> Storage:
    """A storage in the memory of this process, gone with it; for tests and experiments."""
    return build(MemoryKind())


def local_filesystem_storage(path: str) -> Storage:
    """A storage below a folder, which the first write makes.

    Crash-safe, and safe among threads and processes on one machine. Network mounts are as safe as their hard
    links, exclusive renames or locks are.
    """
    return build(LocalKind(path))


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
        Taken from the environment, or from the service's answers, where it is None.
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
    options = S3Options(
        region=region,
        endpoint_url=endpoint_url,
        allow_http=allow_http,
        force_path_style=force_path_style,
        network_stream_timeout_seconds=network_stream_timeout_seconds,
        requester_pays=requester_pays,
        checksum_algorithm=checksum_algorithm,
    )
    credentials = s3_credentials(
        access_key_id=access_key_id,
        secret_access_key=secret_access_key,
        session_token=session_token,
        expires_after=expires_after,
        anonymous=anonymous,
        from_env=from_env,
        get_credentials=get_credentials,
        scatter_initial_credentials=scatter_initial_credentials,
    )
    sent = Headers(read_headers, write_headers, headers)
    return build(S3Kind(options, bucket, prefix, credentials, legacy_rooted_keys, sent))


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
    options = S3Options(
        region=region,
        endpoint_url=endpoint_url,
        allow_http=allow_http,
        network_stream_timeout_seconds=network_stream_timeout_seconds,
        checksum_algorithm=checksum_algorithm,
    )
    credentials = s3_credentials(
        access_key_id=access_key_id,
        secret_access_key=secret_access_key,
        session_token=session_token,
        expires_after=expires_after,
        anonymous=anonymous,
        from_env=from_env,
        get_credentials=get_credentials,
        scatter_initial_credentials=scatter_initial_credentials,
    )
    sent = Headers(read_headers, write_headers, headers)
    kind = S3Kind(options, bucket, prefix, credentials, legacy_rooted_keys, sent)
    return build(tigris(kind, use_weak_consistency))


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
    options = S3Options(
        region=region,
        endpoint_url=endpoint_url,
        allow_http=allow_http,
        network_stream_timeout_seconds=network_stream_timeout_seconds,
        checksum_algorithm=checksum_algorithm,
    )
    credentials = s3_credentials(
        access_key_id=access_key_id,
        secret_access_key=secret_access_key,
        session_token=session_token,
        expires_after=expires_after,
        anonymous=anonymous,
        from_env=from_env,
        get_credentials=get_credentials,
        scatter_initial_credentials=scatter_initial_credentials,
    )
    sent = Headers(read_headers, write_headers, headers)
    kind = S3Kind(options, *r2_bucket(bucket, prefix), credentials, legacy_rooted_keys, sent)
    return build(r2(kind, account_id))


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
    options = S3Options(
        region=region,
        endpoint_url=endpoint_url,
        allow_http=allow_http,
        force_path_style=force_path_style,
    )
    credentials = s3_credentials(
        access_key_id=access_key_id,
        secret_access_key=secret_access_key,
        session_token=session_token,
        expires_after=expires_after,
        anonymous=anonymous,
        from_env=from_env,
    )
    sent = Headers(read_headers, write_headers, headers)
    return build(S3Kind(options, bucket, prefix, credentials, None, sent))


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
    options = S3Options(
        network_stream_timeout_seconds=network_stream_timeout_seconds,
    )
    credentials = s3_credentials(
        access_key_id=access_key_id,
        secret_access_key=secret_access_key,
        session_token=session_token,
        expires_after=expires_after,
        from_env=from_env,
        get_credentials=get_credentials,
        scatter_initial_credentials=scatter_initial_credentials,
    )
    sent = Headers(read_headers, write_headers, headers)
    kind = S3Kind(options, bucket, prefix, credentials, legacy_rooted_keys, sent)
    return build(hugging_face(kind, namespace))


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
        Requests without credentials, which can only read; or those of the environment (the default).
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
    credentials = gcs_credentials(
        service_account_file=service_account_file,
        service_account_key=service_account_key,
        application_credentials=application_credentials,
        bearer_token=bearer_token,
        from_env=from_env,
        anonymous=anonymous,
        get_credentials=get_credentials,
        scatter_initial_credentials=scatter_initial_credentials,
    )
    return build(GcsKind(bucket, prefix, credentials, config, Headers(read_headers, write_headers, headers)))


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
    credentials = azure_credentials(
        access_key=access_key,
        sas_token=sas_token,
        bearer_token=bearer_token,
        from_env=from_env,
        anonymous=anonymous,
    )
    return build(AzureKind(account, container, prefix, credentials, config))


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
    return build(HttpKind(base_url, opts, headers))


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
    return build(RedirectKind(base_url))


# -- the builders: one for each kind -------------------------------------------------------------------------------


def build(kind: StorageKind) -> Storage:
    """Make a storage.

    Raises
    ------
    InvalidInputError
        Something that it is made from is bad: a name, an option, a header, credentials of another service.
    """
    match kind:
        case MemoryKind():
            return MemoryStorage()
        case LocalKind(path):
            return LocalStorage(path)
        case S3Kind():
            return _s3(kind)
        case GcsKind():
            return _gcs(kind)
        case AzureKind():
            return _azure(kind)
        case HttpKind():
            return _http(kind)
        case RedirectKind():
            return _redirect(kind)


def _s3(kind: S3Kind) -> Storage:
    from icechunk.storage.s3.storage import S3Storage

    return S3Storage(
        kind.bucket,
        kind.prefix,
        options=kind.options,
        credentials=kind.credentials,
        read_headers=kind.headers.of_reads(),
        write_headers=kind.headers.of_writes(),
        rooted_keys=bool(kind.legacy_rooted_keys),
        keeps_metadata=kind.keeps_metadata,
    )


def _gcs(kind: GcsKind) -> Storage:
    from icechunk.storage.obstore.buckets import GcsBucket
    from icechunk.storage.obstore.storage import ObstoreStorage

    bucket = GcsBucket(
        kind.bucket,
        kind.prefix,
        credentials=kind.credentials,
        config=kind.config,
        read_headers=kind.headers.of_reads(),
        write_headers=kind.headers.of_writes(),
    )
    return ObstoreStorage(bucket)


def _azure(kind: AzureKind) -> Storage:
    from icechunk.storage.obstore.buckets import AzureContainer
    from icechunk.storage.obstore.storage import ObstoreStorage

    container = AzureContainer(
        kind.account, kind.container, kind.prefix, credentials=kind.credentials, config=kind.config
    )
    return ObstoreStorage(container)


def _http(kind: HttpKind) -> Storage:
    from icechunk.storage.http.storage import HttpStorage

    return HttpStorage(kind.base_url, kind.config, kind.headers)


def _redirect(kind: RedirectKind) -> Storage:
    from icechunk.storage.redirect import RedirectStorage

    return RedirectStorage(kind.base_url)


Storage._build = build


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
    options = S3Options(
        region=region,
        endpoint_url=endpoint_url,
        allow_http=allow_http,
        anonymous=anonymous,
        force_path_style=force_path_style,
        network_stream_timeout_seconds=network_stream_timeout_seconds,
        requester_pays=requester_pays,
        checksum_algorithm=checksum_algorithm,
    )
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
