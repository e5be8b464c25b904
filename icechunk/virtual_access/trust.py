"""Rules for where credentials may be sent: to the service's own hosts, and to endpoints that the reader has named.

A user who may write to a repository can change its persisted configuration, which may name an endpoint or a proxy for a
container. A reader that authorises ``s3://trusted/`` with a key has not allowed that key to go to another host. Such
options are therefore obeyed only if the reader's own configuration has them too, or if nothing secret is sent.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from icechunk.config import ObjectStoreConfig, S3Options, VirtualChunkContainer
from icechunk.credentials import AnyCredential, AzureCredentials, Credentials, GcsCredentials, S3Credentials
from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.runtime.representation import redacted_url

__all__ = ["require_named"]

# Options of obstore, and of the client of web servers, that change no host, no certificate and no credential.
_HARMLESS: Final = frozenset(
    {
        "account",
        "account_name",
        "allow_http",
        "azure_storage_account_name",
        "connect_timeout",
        "default_content_type",
        "google_skip_signature",
        "http1_only",
        "http2_keep_alive_interval",
        "http2_keep_alive_timeout",
        "http2_keep_alive_while_idle",
        "http2_max_frame_size",
        "http2_only",
        "pool_idle_timeout",
        "pool_max_idle_per_host",
        "randomize_addresses",
        "read_timeout",
        "skip_signature",
        "timeout",
        "user_agent",
    }
)
_VARIABLES: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


def require_named(
    container: VirtualChunkContainer,
    credential: AnyCredential | None,
    named: Mapping[str, VirtualChunkContainer],
    endpoint: str | None,
) -> None:
    """Refuse to send credentials to a host that only the repository's persisted configuration names.

    Parameters
    ----------
    container
        As the reader's configuration over the persisted one has it.
    credential
        What the reader authorises it with; None: the environment's.
    named
        The containers of the reader's own configuration, by prefix.
    endpoint
        Of the repository's own storage, which the reader has named too.

    Raises
    ------
    InvalidInputError
        Kind ``unauthorized-virtual-chunk-container``.
    """
    asked = _endpoint_options(container.store)
    own = named.get(container.url_prefix)
    if not asked or _is_anonymous(container, credential) or (own is not None and _endpoint_options(own.store) == asked):
        return
    known = {url.rstrip("/") for url in (endpoint, *map(os.environ.get, _VARIABLES)) if url}
    if set(asked) == {"endpoint_url"} and str(asked["endpoint_url"]).rstrip("/") in known:
        return
    shown = ", ".join(f"{name}={redacted_url(str(value))!r}" for name, value in sorted(asked.items()))
    raise InvalidInputError(
        f"the repository's persisted configuration gives the virtual chunk container {container.url_prefix!r} the "
        f"options {shown}, and credentials are sent only to endpoints that their owner names: open the repository with "
        "a config whose container has the same options, or authorize it with anonymous credentials",
        ErrorKind.UNAUTHORIZED_VIRTUAL_CHUNK_CONTAINER,
    )


def _endpoint_options(store: Any) -> Mapping[str, Any]:
    """The options of a container's store that say where requests, and with them credentials, go."""
    options: Any = next(iter(store._fields()), None)
    if isinstance(options, S3Options):
        return {} if options.endpoint_url is None else {"endpoint_url": options.endpoint_url}
    if isinstance(store, ObjectStoreConfig.LocalFileSystem) or options is None:
        return {}
    return {name.lower(): value for name, value in options.items() if name.lower() not in _HARMLESS}


def _is_anonymous(container: VirtualChunkContainer, credential: AnyCredential | None) -> bool:
    match credential:
        case Credentials.S3(S3Credentials.Anonymous()):
            return True
        case Credentials.Gcs(GcsCredentials.Anonymous()) | Credentials.Azure(AzureCredentials.Anonymous()):
            return True
        case None:
            options: Any = next(iter(container.store._fields()), None)
            return isinstance(options, S3Options) and options.anonymous
    return False
