"""The public functions that make storages on S3 and on services that speak its protocol."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from icechunk.config import ChecksumAlgorithm, ObjectStoreConfig, S3Options
from icechunk.credentials import S3StaticCredentials, s3_credentials
from icechunk.errors import ErrorKind, StorageError
from icechunk.storage.base import Storage
from icechunk.storage.places import TIGRIS_ENDPOINT, r2_bucket, r2_endpoint, tigris_headers

__all__ = ["hf_storage", "r2_storage", "s3_object_store_storage", "s3_storage", "s3_store", "tigris_storage"]


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
