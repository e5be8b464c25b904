"""A bucket and prefix: its description, and the common parts of requests to its objects."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypedDict, Unpack

from icechunk.config import S3Options
from icechunk.credentials import AnyS3Credential, S3Credentials
from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.runtime.about import CLIENT_NAME
from icechunk.runtime.clock import Sources
from icechunk.runtime.loops import PerLoop
from icechunk.storage.port import Absent, Matches, Precondition, Unchecked, check_key
from icechunk.storage.s3.credentials import KeyProvider, key_provider
from icechunk.storage.s3.endpoint import resolve_endpoint
from icechunk.storage.s3.requests import Request, S3Client
from icechunk.storage.s3.sigv4 import encode_key

__all__ = ["Bucket", "BucketOptions", "condition_header", "require_sendable"]


class BucketOptions(TypedDict, total=False):
    """All that describes a bucket beside its name and prefix."""

    options: S3Options | None
    """Region, endpoint and the like; copied."""
    credentials: AnyS3Credential | None
    """None: the environment's, or none at all where ``options.anonymous`` is set."""
    read_headers: Mapping[str, str] | None
    """Sent with every request that reads objects (GET, HEAD), as a customer's key of encryption needs it."""
    write_headers: Mapping[str, str] | None
    """Sent with every request that writes objects: ``{"x-amz-server-side-encryption": "aws:kms"}``."""
    rooted_keys: bool
    """Keys in the bucket begin with ``/``, as very old repositories without prefix have them."""
    keeps_metadata: bool
    """False: the service drops user metadata, so that lost answers are judged by contents instead."""


class Bucket:
    """A bucket and prefix, with the connections that all storages on it share.

    Parameters
    ----------
    name
        The bucket's. It must exist.
    prefix
        Comes before every key, with a ``/`` between; None or empty for the whole bucket.
    user_agent
        The name that requests give themselves.
    described
        See `BucketOptions`.

    Raises
    ------
    InvalidInputError
        No bucket, or headers that cannot be sent.
    """

    def __init__(
        self,
        name: str,
        prefix: str | None,
        sources: Sources,
        user_agent: str = CLIENT_NAME,
        **described: Unpack[BucketOptions],
    ) -> None:
        if not isinstance(name, str) or not name or "/" in name:
            raise InvalidInputError(f"bad bucket {name!r}: give its name alone", ErrorKind.STORAGE_CONFIG)
        given = described.get("options")
        options = S3Options() if given is None else copy.copy(given)
        credentials = described.get("credentials")
        if credentials is None:
            credentials = S3Credentials.Anonymous() if options.anonymous else S3Credentials.FromEnv()
        reading, writing = dict(described.get("read_headers") or {}), dict(described.get("write_headers") or {})
        require_sendable({**reading, **writing})
        folder = (prefix or "").rstrip("/")
        self.name = name
        self.prefix = prefix
        self.root: str = folder + "/" if folder else "/" if described.get("rooted_keys") else ""
        self.options = options
        self.credentials = credentials
        self.keeps_metadata: bool = described.get("keeps_metadata", True)
        self.described: BucketOptions = {
            **described,
            "options": options,
            "credentials": credentials,
            "read_headers": reading,
            "write_headers": writing,
        }
        payer = {"x-amz-request-payer": "requester"} if options.requester_pays else {}
        self.read_headers: dict[str, str] = {**payer, **{header.lower(): value for header, value in reading.items()}}
        self.write_headers: dict[str, str] = {**payer, **{header.lower(): value for header, value in writing.items()}}
        self.plain_headers = payer
        self.sources = sources
        self.user_agent = user_agent
        self.keys: KeyProvider = key_provider(credentials, sources)
        self.clients: PerLoop[S3Client] = PerLoop(self._open_client, S3Client.aclose)

    def named(self, user_agent: str) -> Bucket:
        """The same, with connections of its own whose requests name themselves so."""
        return Bucket(self.name, self.prefix, self.sources, user_agent, **self.described)

    async def _open_client(self) -> S3Client:
        endpoint = await resolve_endpoint(self.name, self.options)
        return await S3Client.open(endpoint, self.keys, self.sources, self.user_agent)

    async def client(self) -> S3Client:
        """The running loop's connections."""
        return self.clients.peek() or await self.clients.get()

    def path(self, key: str) -> str:
        """The path of a key's object in requests. Raises `InvalidInputError` for a bad key."""
        check_key(key)
        return "/" + encode_key(self.root + key)

    def url(self, key: str = "") -> str:
        """An object's URL, for messages."""
        return f"s3://{self.name}/{self.root}{key}"

    def request(self, verb: str, method: str, key: str, headers: Mapping[str, str], body: bytes = b"") -> Request:
        """A request for one object."""
        return Request(
            what=f"{verb} {self.url(key)}", method=method, key=key, path=self.path(key), headers=headers, body=body
        )


def condition_header(precondition: Precondition) -> dict[str, str]:
    """The header that makes a write conditional."""
    match precondition:
        case Absent():
            return {"if-none-match": "*"}
        case Matches(version):
            return {"if-match": f'"{version}"'}
        case Unchecked():
            return {}


def require_sendable(headers: Mapping[str, str]) -> None:
    """Raise `InvalidInputError` (``storage-config``) where a header cannot be sent or signed."""
    for name, value in headers.items():
        if not name.isascii() or not value.isascii() or not name.replace("-", "").replace("_", "").isalnum():
            raise InvalidInputError(
                f"invalid HTTP header {name!r}: names and values, also those of metadata, are plain ASCII",
                ErrorKind.STORAGE_CONFIG,
            )
        if any(ord(character) < 32 for character in value):
            raise InvalidInputError(
                f"invalid HTTP header value for {name!r}: it has control characters", ErrorKind.STORAGE_CONFIG
            )
