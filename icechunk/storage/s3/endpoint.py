"""Host, path and region of requests to a bucket."""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from typing import Any
from urllib.parse import SplitResult, urlsplit

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore import UNSIGNED
from botocore.exceptions import BotoCoreError

from icechunk.config import S3Options
from icechunk.errors import ErrorKind, StorageError
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.representation import redacted_url
from icechunk.storage.http.connections import Origin

__all__ = ["Endpoint", "resolve_endpoint"]

# Names that are valid as the first label of a host name, and that a TLS wildcard certificate covers.
_HOSTABLE = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
_REGION = re.compile(r"[A-Za-z0-9._-]+")
_DEFAULT_REGION = "us-east-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """The address of a bucket."""

    scheme: str
    """``http`` or ``https``."""
    host: str
    """Host name, with the port where it is not the scheme's own."""
    path: str
    """Comes before ``/{key}``: empty, or ``/{bucket}``."""
    region: str
    """Region of the signatures."""
    region_is_a_guess: bool
    """No region was configured; the one that the service names is used instead."""

    @property
    def url(self) -> str:
        """Scheme, host and path, for messages."""
        return f"{self.scheme}://{self.host}{self.path}"

    @property
    def is_this_machine(self) -> bool:
        """Whether the service is on this machine: a loopback address."""
        return _is_loopback(self.origin.host)

    @property
    def origin(self) -> Origin:
        """The target of connections."""
        return _origin(self.scheme, self.host)


@lru_cache(maxsize=64)
def _origin(scheme: str, host: str) -> Origin:
    parts = urlsplit(f"{scheme}://{host}")
    return Origin(scheme, parts.hostname or "", parts.port or (443 if scheme == "https" else 80))


@lru_cache(maxsize=64)
def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def resolve_endpoint(bucket: str, options: S3Options, region: str | None = None) -> Endpoint:
    """Find a bucket's endpoint.

    With ``endpoint_url`` this is pure: the bucket goes into the host name, as the official library does it, unless
    path style is configured or the name is not valid there. Otherwise botocore's rules decide (region and partition,
    dual stack, FIPS, endpoints from the environment).

    Raises
    ------
    StorageError
        Plain http without ``allow_http``, or no endpoint to be found (kind ``storage-config``).
    """
    region = region or options.region
    guess = region is None
    if region is not None and not _REGION.fullmatch(region):
        raise StorageError(f"bad region {region!r} of bucket {bucket!r}", ErrorKind.STORAGE_CONFIG)
    if options.endpoint_url is None:
        session = get_session()
        if region is None:
            region = session.get_config_variable("region")
            guess = region is None
        url = await _ask_botocore(session, bucket, options, region or _DEFAULT_REGION)
        parts = urlsplit(url)
        path = parts.path.removesuffix("/x")
    else:
        if region is None:
            region = get_session().get_config_variable("region")
            guess = region is None
        given = _checked_parts(options.endpoint_url)
        if given is None:
            raise StorageError(
                f"bad endpoint_url {redacted_url(options.endpoint_url)!r} for bucket {bucket!r}: give a URL like https://host:port",
                ErrorKind.CANNOT_PARSE_URL,
            )
        parts = given
        path = parts.path.rstrip("/")
    if parts.scheme == "http" and not options.allow_http:
        raise StorageError(
            f"the endpoint of bucket {bucket!r} is plain http ({parts.scheme}://{parts.hostname}): set "
            "allow_http=True if "
            "that is meant, or use https",
            ErrorKind.STORAGE_CONFIG,
        )
    host = parts.netloc.rpartition("@")[2]
    if (parts.scheme, parts.port) in (("http", 80), ("https", 443)):
        host = host.rpartition(":")[0]
    if options.endpoint_url is not None:
        if _in_path(bucket, options, parts.hostname or "", parts.scheme):
            path = f"{path}/{bucket}"
        else:
            host = f"{bucket}.{host}"
    return Endpoint(
        scheme=parts.scheme, host=host, path=path, region=region or _DEFAULT_REGION, region_is_a_guess=guess
    )


def _checked_parts(url: str) -> SplitResult | None:
    """The parts of an endpoint's URL; None where it is none that requests can go to."""
    if not url.isprintable() or " " in url:
        return None
    try:
        parts = urlsplit(url)
        # urlsplit checks the port only when it is read.
        return parts if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 else None
    except ValueError:
        return None


def _in_path(bucket: str, options: S3Options, host: str, scheme: str) -> bool:
    if options.force_path_style or not _HOSTABLE.fullmatch(bucket) or "." not in host:
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def _ask_botocore(session: Any, bucket: str, options: S3Options, region: str) -> str:
    config = AioConfig(
        signature_version=UNSIGNED, s3={"addressing_style": "path" if options.force_path_style else "virtual"}
    )
    try:
        # A presigned URL without a signature: botocore's public way to say where a request would go.
        async with session.create_client("s3", region_name=region, config=config) as client:
            url: str = await client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "x"})
            return url.partition("?")[0]
    except (BotoCoreError, ValueError) as error:
        raise StorageError(
            f"no endpoint for bucket {bucket!r} in region {region!r}: {error}", ErrorKind.STORAGE_CONFIG
        ) from error
