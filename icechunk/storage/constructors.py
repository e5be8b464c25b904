"""The public functions that make storages and store configurations, with the official names and signatures.

Those of S3 are in `icechunk.storage.s3_constructors`.
"""

from __future__ import annotations

from collections.abc import Callable

from icechunk.config import ObjectStoreConfig
from icechunk.credentials import (
    GcsBearerCredential,
    azure_credentials,
    gcs_credentials,
)
from icechunk.storage.base import Storage
from icechunk.storage.local import LocalStorage
from icechunk.storage.memory import MemoryStorage

__all__ = [
    "azure_storage",
    "azure_store",
    "gcs_storage",
    "gcs_store",
    "http_storage",
    "http_store",
    "in_memory_storage",
    "local_filesystem_storage",
    "local_filesystem_store",
    "redirect_storage",
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
