"""The public functions that make storages and store configurations, with the official names and signatures.

Those of S3 are in `icechunk.storage.constructors`.

The public functions that make storages on S3 and on services that speak its protocol.

The storages of named services, made from what users say of them.

The adapters are imported when one is made: their libraries take longer to load than all else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from icechunk.config import ChecksumAlgorithm, ObjectStoreConfig, S3Options
from icechunk.credentials import (
    GcsBearerCredential,
    S3StaticCredentials,
    azure_credentials,
    gcs_credentials,
    s3_credentials,
)
from icechunk.errors import ErrorKind, InvalidInputError, StorageError
from icechunk.runtime.clock import SYSTEM
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import Storage

if TYPE_CHECKING:
    from icechunk.storage.port import Storage

__all__ = [
    "TIGRIS_ENDPOINT",
    "azure_place",
    "azure_storage",
    "azure_store",
    "gcs_place",
    "gcs_storage",
    "gcs_store",
    "hf_options",
    "hf_storage",
    "http_storage",
    "http_store",
    "in_memory_storage",
    "local_filesystem_storage",
    "local_filesystem_store",
    "r2_bucket",
    "r2_endpoint",
    "r2_options",
    "r2_storage",
    "redirect_storage",
    "s3_object_store_storage",
    "s3_place",
    "s3_storage",
    "s3_store",
    "tigris_headers",
    "tigris_options",
    "tigris_storage",
]


def in_memory_storage() -> Storage:
    """A storage in the memory of this process, gone with it; for tests and experiments."""
    return MemoryStorage()


def local_filesystem_storage(path: str) -> Storage:
    """A storage below a folder, which the first write makes.

    Crash-safe, and safe among threads and processes on one machine. Network mounts are as safe as their hard
    links, exclusive renames or locks are.
    """
    return LocalStorage(path)


def local_filesystem_store(path: str) -> ObjectStoreConfig.LocalFileSystem:
    """The kind of store of virtual chunks that are files of this machine."""
    return ObjectStoreConfig.LocalFileSystem(path)  # type: ignore[arg-type]


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


def gcs_store(opts: dict[str, str] | None = None) -> ObjectStoreConfig.Gcs:
    """The kind of store of virtual chunks in Google Cloud Storage; ``opts`` are obstore's."""
    return ObjectStoreConfig.Gcs(opts)


def azure_store(*, account: str, config: dict[str, str] | None = None) -> ObjectStoreConfig.Azure:
    """The kind of store of virtual chunks in an account of Azure Blob Storage; ``config`` is obstore's."""
    return ObjectStoreConfig.Azure({"account": account, **(config or {})})


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
        they expire; its first result travels with pickles where the second argument is True.
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
        ``https+icechunk://host/path``. What is there must be readable without credentials.

    Raises
    ------
    InvalidInputError
        Not a URL of the web.
    """
    return Storage.new_redirect(base_url)


TIGRIS_ENDPOINT: Final = "https://t3.storage.dev"
_HUGGING_FACE: Final = "https://s3.hf.co"

Headers = Mapping[str, str] | None


def s3_place(
    options: S3Options,
    bucket: str,
    prefix: str | None,
    credentials: Any,
    legacy_rooted_keys: bool | None,
    read_headers: Headers,
    write_headers: Headers,
    headers: Headers,
    *,
    keeps_metadata: bool = True,
) -> Storage:
    """A storage of S3 or a service like it. Raises `StorageError` for ``legacy_rooted_keys`` with a prefix."""
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
        read_headers={**(headers or {}), **(read_headers or {})},
        write_headers={**(headers or {}), **(write_headers or {})},
    )


def tigris_headers(region: str | None, use_weak_consistency: bool) -> dict[str, str]:
    """What makes Tigris consistent. Raises `StorageError` where nothing can."""
    if use_weak_consistency:
        return {}
    if region is None:
        raise StorageError(
            "a Tigris storage needs the bucket's region to be consistent: give region, or for reading possibly old "
            "states use_weak_consistency=True",
            ErrorKind.STORAGE_CONFIG,
        )
    return {"X-Tigris-Consistent": "true", "X-Tigris-Regions": region}


def tigris_options(options: S3Options) -> S3Options:
    """The options with Tigris' endpoint, unless they have one."""
    changed = copy.copy(options)
    changed.endpoint_url = options.endpoint_url or TIGRIS_ENDPOINT
    return changed


def r2_endpoint(account_id: str) -> str:
    """Where the buckets of an account of Cloudflare's R2 are."""
    return f"https://{account_id}.r2.cloudflarestorage.com"


def r2_options(options: S3Options, account_id: str | None) -> S3Options:
    """The options with R2's endpoint and ways. Raises `StorageError` with neither endpoint nor account."""
    if options.endpoint_url is None and account_id is None:
        raise StorageError("an R2 storage needs endpoint_url or account_id", ErrorKind.STORAGE_CONFIG)
    changed = copy.copy(options)
    changed.region = options.region or "auto"
    changed.endpoint_url = options.endpoint_url or r2_endpoint(account_id or "")
    changed.force_path_style = True
    return changed


def r2_bucket(bucket: str | None, prefix: str | None) -> tuple[str, str | None]:
    """Bucket and prefix, where the first segment of the prefix may be the bucket. Raises `StorageError` with none."""
    if bucket is not None:
        return bucket, prefix
    bucket, _, prefix = (prefix or "").strip("/").partition("/")
    if not bucket:
        raise StorageError(
            "an R2 storage needs a bucket: give bucket, or a prefix that begins with it", ErrorKind.STORAGE_CONFIG
        )
    return bucket, prefix


def hf_options(options: S3Options, namespace: str) -> S3Options:
    """The options with the S3 gateway of Hugging Face. Raises `InvalidInputError` for what is no namespace."""
    if not isinstance(namespace, str) or not namespace or "/" in namespace:
        raise InvalidInputError(
            f"bad namespace {namespace!r}: give the user or organization that owns the bucket", ErrorKind.STORAGE_CONFIG
        )
    changed = copy.copy(options)
    changed.region = options.region or "us-east-1"
    changed.endpoint_url = options.endpoint_url or f"{_HUGGING_FACE}/{namespace}"
    changed.force_path_style = True
    return changed


def gcs_place(
    bucket: str,
    prefix: str | None,
    credentials: Any,
    config: Mapping[str, str] | None,
    read_headers: Headers,
    write_headers: Headers,
    headers: Headers,
) -> Storage:
    """A storage in a bucket of Google Cloud Storage."""
    from icechunk.storage.obstore.buckets import GcsPlace, check_bucket, checked_config
    from icechunk.storage.obstore.storage import ObstoreStorage

    return ObstoreStorage(
        GcsPlace(
            check_bucket("bucket", bucket),
            _root(prefix),
            credentials=credentials,
            config=checked_config(config),
            read_headers={**(headers or {}), **(read_headers or {})},
            write_headers={**(headers or {}), **(write_headers or {})},
            sources=SYSTEM,
        )
    )


def azure_place(
    account: str, container: str, prefix: str | None, credentials: Any, config: Mapping[str, str] | None
) -> Storage:
    """A storage in a container of Azure."""
    from icechunk.storage.obstore.buckets import AzurePlace, check_bucket, checked_config
    from icechunk.storage.obstore.storage import ObstoreStorage

    return ObstoreStorage(
        AzurePlace(
            check_bucket("account", account),
            check_bucket("container", container),
            _root(prefix),
            credentials=credentials,
            config=checked_config(config),
            read_headers={},
            write_headers={},
            sources=SYSTEM,
        )
    )


def _root(prefix: str | None) -> str:
    folder = (prefix or "").strip("/")
    return folder + "/" if folder else ""


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
    """The kind of store of virtual chunks in S3, or with ``s3_compatible`` in a service that speaks its protocol.

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
    """A storage in a bucket of S3, or of a service that speaks its protocol.

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
        they expire; its first result travels with pickles where the second argument is True.
    force_path_style
        The bucket's name in the path instead of the host name.
    network_stream_timeout_seconds
        A body that delivers nothing for that long is tried again.
    requester_pays
        Agree to be billed for requests to somebody else's bucket.
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
    return Storage.new_s3(
        S3Options(
            region=region,
            endpoint_url=endpoint_url,
            allow_http=allow_http,
            force_path_style=force_path_style,
            network_stream_timeout_seconds=network_stream_timeout_seconds,
            requester_pays=requester_pays,
            checksum_algorithm=checksum_algorithm,
        ),
        bucket,
        prefix,
        s3_credentials(
            access_key_id=access_key_id,
            secret_access_key=secret_access_key,
            session_token=session_token,
            expires_after=expires_after,
            anonymous=anonymous,
            from_env=from_env,
            get_credentials=get_credentials,
            scatter_initial_credentials=scatter_initial_credentials,
        ),
        legacy_rooted_keys,
        read_headers=read_headers,
        write_headers=write_headers,
        headers=headers,
    )


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
    strong = tigris_headers(region, use_weak_consistency)
    return s3_storage(
        bucket=bucket,
        prefix=prefix,
        region=region,
        endpoint_url=endpoint_url or TIGRIS_ENDPOINT,
        allow_http=allow_http,
        access_key_id=access_key_id,
        secret_access_key=secret_access_key,
        session_token=session_token,
        expires_after=expires_after,
        anonymous=anonymous,
        from_env=from_env,
        get_credentials=get_credentials,
        scatter_initial_credentials=scatter_initial_credentials,
        network_stream_timeout_seconds=network_stream_timeout_seconds,
        checksum_algorithm=checksum_algorithm,
        legacy_rooted_keys=legacy_rooted_keys,
        read_headers=read_headers,
        write_headers=write_headers,
        headers={**strong, **(headers or {})},
    )


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
    if endpoint_url is None and account_id is None:
        raise StorageError("an R2 storage needs endpoint_url or account_id", ErrorKind.STORAGE_CONFIG)
    bucket, prefix = r2_bucket(bucket, prefix)
    return s3_storage(
        bucket=bucket,
        prefix=prefix,
        region=region or "auto",
        endpoint_url=endpoint_url or r2_endpoint(account_id or ""),
        allow_http=allow_http,
        access_key_id=access_key_id,
        secret_access_key=secret_access_key,
        session_token=session_token,
        expires_after=expires_after,
        anonymous=anonymous,
        from_env=from_env,
        get_credentials=get_credentials,
        scatter_initial_credentials=scatter_initial_credentials,
        force_path_style=True,
        network_stream_timeout_seconds=network_stream_timeout_seconds,
        checksum_algorithm=checksum_algorithm,
        legacy_rooted_keys=legacy_rooted_keys,
        read_headers=read_headers,
        write_headers=write_headers,
        headers=headers,
    )


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
    return s3_storage(
        bucket=bucket,
        prefix=prefix,
        region=region,
        endpoint_url=endpoint_url,
        allow_http=allow_http,
        access_key_id=access_key_id,
        secret_access_key=secret_access_key,
        session_token=session_token,
        expires_after=expires_after,
        anonymous=anonymous,
        from_env=from_env,
        force_path_style=force_path_style,
        read_headers=read_headers,
        write_headers=write_headers,
        headers=headers,
    )


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
    return Storage.new_hf(
        S3Options(network_stream_timeout_seconds=network_stream_timeout_seconds),
        bucket,
        prefix,
        namespace,
        s3_credentials(
            access_key_id=access_key_id,
            secret_access_key=secret_access_key,
            session_token=session_token,
            expires_after=expires_after,
            from_env=from_env,
            get_credentials=get_credentials,
            scatter_initial_credentials=scatter_initial_credentials,
        ),
        legacy_rooted_keys,
        read_headers=read_headers,
        write_headers=write_headers,
        headers=headers,
    )
