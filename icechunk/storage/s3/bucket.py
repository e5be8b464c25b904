"""A bucket and prefix: what requests to its objects have in common."""

from __future__ import annotations

from collections.abc import Mapping

from icechunk.config import S3Options
from icechunk.credentials import AnyS3Credential
from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.runtime.about import CLIENT_NAME
from icechunk.runtime.clock import Sources
from icechunk.runtime.loops import PerLoop
from icechunk.storage.port import Absent, Matches, Precondition, Unchecked, check_key
from icechunk.storage.s3.client import Request, S3Client
from icechunk.storage.s3.credentials import key_provider
from icechunk.storage.s3.endpoint import resolve_endpoint
from icechunk.storage.s3.sigv4 import encode_key

__all__ = ["Place", "condition_header", "require_sendable"]


class Place:
    """A bucket and prefix with everything that all storages on it share."""

    def __init__(
        self,
        bucket: str,
        root: str,
        options: S3Options,
        credentials: AnyS3Credential,
        read_headers: Mapping[str, str],
        write_headers: Mapping[str, str],
        sources: Sources,
        user_agent: str = CLIENT_NAME,
    ) -> None:
        self.bucket = bucket
        self.root = root
        self.options = options
        self.credentials = credentials
        payer = {"x-amz-request-payer": "requester"} if options.requester_pays else {}
        self.given_headers = (dict(read_headers), dict(write_headers))
        self.read_headers = {**payer, **{name.lower(): value for name, value in read_headers.items()}}
        self.write_headers = {**payer, **{name.lower(): value for name, value in write_headers.items()}}
        self.plain_headers = payer
        self.sources = sources
        self.user_agent = user_agent
        self.keeps_metadata = True
        self.keys = key_provider(credentials, sources)
        self.clients: PerLoop[S3Client] = PerLoop(self._open_client, S3Client.aclose)

    def named(self, user_agent: str) -> Place:
        """The same, with connections of its own whose requests name themselves so."""
        place = Place(
            self.bucket, self.root, self.options, self.credentials, *self.given_headers, self.sources, user_agent
        )
        place.keeps_metadata = self.keeps_metadata
        return place

    async def _open_client(self) -> S3Client:
        endpoint = await resolve_endpoint(self.bucket, self.options)
        return await S3Client.open(endpoint, self.keys, self.sources, self.user_agent)

    async def client(self) -> S3Client:
        """The running loop's connections."""
        return self.clients.peek() or await self.clients.get()

    def path(self, key: str) -> str:
        """The path of a key's object in requests. Raises `InvalidInputError` where it is no key."""
        check_key(key)
        return "/" + encode_key(self.root + key)

    def name(self, key: str) -> str:
        """An object's URL, for messages."""
        return f"s3://{self.bucket}/{self.root}{key}"

    def request(self, verb: str, method: str, key: str, headers: Mapping[str, str], body: bytes = b"") -> Request:
        """A request for one object."""
        return Request(what=f"{verb} {self.name(key)}", method=method, path=self.path(key), headers=headers, body=body)


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
                f"the header or metadata {name!r} cannot be sent: names and values are plain ASCII",
                ErrorKind.STORAGE_CONFIG,
            )
        if any(ord(character) < 32 for character in value):
            raise InvalidInputError(f"the value of {name!r} has control characters", ErrorKind.STORAGE_CONFIG)
