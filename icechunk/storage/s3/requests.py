"""Requests to one bucket: signed, sent, tried again.

One `S3Client` belongs to one event loop. A *try* ends in an `Answer` or in `Unanswered`. Refusals that certainly
changed nothing and that the client can correct (an expired token, a wrong clock, a guessed region) are corrected and
repeated inside the try. Everything else is left to `call`, which retries with full jitter, or to the caller, for
conditional writes, where the outcome of a try must be looked up before the next.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import field
from functools import partial
from typing import Final

from botocore.httpsession import get_cert_path
from botocore.session import get_session

from icechunk.errors import ErrorKind, StorageError
from icechunk.runtime.about import CLIENT_NAME
from icechunk.runtime.clock import Sources
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.tasks import in_thread
from icechunk.storage.http.connections import Connections, NotConnectedError, TooLargeError
from icechunk.storage.http.headers import date_us
from icechunk.storage.outcome import REFUSING_STATUSES, refused
from icechunk.storage.retry import Limits, Pace, Tries
from icechunk.storage.rights import Right
from icechunk.storage.s3.answers import (
    Answer,
    Unanswered,
    is_throttled,
    is_transient,
    parse_refusal,
    retry_after_s,
    to_error,
)
from icechunk.storage.s3.credentials import KeyProvider
from icechunk.storage.s3.endpoint import Endpoint
from icechunk.storage.s3.sigv4 import UNSIGNED_PAYLOAD, SigningKeys, encode_query, sign

__all__ = ["Request", "S3Client"]

_LOG: Final = logging.getLogger(__name__)
_EMPTY_HASH: Final = hashlib.sha256(b"").hexdigest()
_HASH_IN_THREAD_BYTES: Final = 512 * 1024
_SLOWEST_UPLOAD_BYTES_PER_S: Final = 64 * 1024
_PATIENCE_WITH_MUCH_WORK: Final = 4.0
_REGION: Final = re.compile(r"[a-z]{2,}(?:-[a-z0-9]+)+|auto")
_MENDABLE: Final = frozenset({301, 307, 400, 401, 403})
_EXPIRED: Final = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request, before it is signed."""

    what: str
    """The attempt and its object, for messages: ``read s3://bucket/key``."""
    method: str
    key: str = ""
    """Key of its object, relative to the root, for errors."""
    path: str = ""
    """Encoded, after the endpoint's own; empty or beginning with ``/``."""
    query: tuple[tuple[str, str], ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    """Names in lower case."""
    body: bytes | memoryview = b""
    most_bytes: int | None = 0
    """Bytes of a range of an object that is asked for, at most; 0: none is. None: as large as the object is."""

    @property
    def right(self) -> Right:
        """The rights that the client needs."""
        if self.method in ("GET", "HEAD"):
            return Right.READ if self.path else Right.LIST
        return Right.WRITE if self.path and self.method != "DELETE" else Right.DELETE

    @property
    def is_simple(self) -> bool:
        """Whether the service has little to do for it: one object, or a part of one."""
        return self.method in ("GET", "HEAD", "PUT") and bool(self.path) and "x-amz-copy-source" not in self.headers


class S3Client:
    """Connections to a bucket, on one event loop.

    Parameters
    ----------
    endpoint
        Where requests go; replaced when a guessed region turns out wrong.
    relocate
        Resolves the endpoint for another region.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        keys: KeyProvider,
        sources: Sources,
        connections: Connections,
        user_agent: str = CLIENT_NAME,
    ) -> None:
        self.endpoint: Endpoint = endpoint
        self._keys = keys
        self._sources = sources
        self._connections = connections
        self._user_agent = user_agent
        self._contacted = False
        self.pace: Pace = Pace()
        # The store's clock minus ours, µs; set when the store says that they differ too much.
        self._skew_us = 0
        # The service refused a body that was sent without its hash over plain http.
        self._wants_hashes = False

    @classmethod
    async def open(
        cls, endpoint: Endpoint, keys: KeyProvider, sources: Sources, user_agent: str = CLIENT_NAME
    ) -> S3Client:
        """A client on the running loop."""
        return cls(endpoint, keys, sources, Connections(_tls_context), user_agent)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._connections.aclose()

    async def call(self, request: Request, limits: Limits) -> Answer:
        """Send a request that may be sent again, until it is answered.

        Returns
        -------
        Answer
            Of status 2xx, 404, 412 or 416; the caller decides about their meaning.

        Raises
        ------
        StorageError
            Refused, or not answered within the limits.
        """
        retrier = self.retrier(limits, request)
        while True:
            outcome = await self.attempt(request, retrier.limits)
            if isinstance(outcome, Answer):
                if outcome.status < 300 or (outcome.status in (404, 412, 416) and not is_transient(outcome)):
                    return outcome
                if not is_transient(outcome):
                    error = self._error(request, outcome, 1)
                    raise refused(error) if retrier.tries == 1 and outcome.status in REFUSING_STATUSES else error
            if not await retrier.again(outcome):
                raise self.failure(request, outcome, retrier.tries)

    def retrier(self, limits: Limits, request: Request) -> Retrier:
        """Counts the tries of one operation and makes the pauses between them."""
        return Retrier(self, limits, self._sources, request.what)

    def failure(self, request: Request, outcome: Answer | Unanswered, tries: int) -> StorageError:
        """The error for an operation whose tries are used up."""
        error = self._error(request, outcome, tries)
        if isinstance(outcome, Unanswered):
            error.__cause__ = outcome.cause
        return error

    def _error(self, request: Request, outcome: Answer | Unanswered, tries: int) -> StorageError:
        return to_error(request.what, outcome, tries, self.endpoint.url, right=request.right, key=request.key)

    @property
    def contacted(self) -> bool:
        """Whether this client ever had an answer from the service."""
        return self._contacted

    async def attempt(self, request: Request, limits: Limits) -> Answer | Unanswered:
        """Send a request once; correct token and clock after refusals that certainly changed nothing."""
        corrected: set[str] = set()
        while True:
            keys = await self._keys.get()
            epoch, throttled = await self.pace.enter(), None
            try:
                outcome = await self._send(request, keys, limits)
                throttled = is_throttled(outcome)
            finally:
                self.pace.leave(epoch, throttled)
            if isinstance(outcome, Unanswered) or outcome.status not in _MENDABLE or limits.are_over:
                return outcome
            if outcome.status in (400, 403) and self.endpoint.scheme == "http" and self._leaves_unsigned(request.body):
                self._wants_hashes = True
                continue
            code = parse_refusal(outcome).code
            if code in corrected or not code:
                return outcome
            corrected.add(code)
            if code in _EXPIRED:
                if not self._keys.expired(keys):
                    return outcome
            elif code == "RequestTimeTooSkewed":
                theirs_us = date_us(outcome.headers)
                if theirs_us is None:
                    return outcome
                self._skew_us = theirs_us - self._sources.wall_us()
            elif not self._adopt_region(parse_refusal(outcome).region):
                return outcome

    def _adopt_region(self, region: str | None) -> bool:
        endpoint = self.endpoint
        if region is None or not endpoint.region_is_a_guess or region == endpoint.region:
            return False
        if not _REGION.fullmatch(region):
            # The region would become part of the host that receives requests and credentials.
            return False
        self.endpoint = Endpoint(
            scheme=endpoint.scheme,
            host=endpoint.host.replace(f".s3.{endpoint.region}.", f".s3.{region}.").replace(
                ".s3.amazonaws.com", f".s3.{region}.amazonaws.com"
            ),
            path=endpoint.path,
            region=region,
            region_is_a_guess=False,
        )
        return True

    async def _send(self, request: Request, keys: SigningKeys | None, limits: Limits) -> Answer | Unanswered:
        endpoint = self.endpoint
        path = endpoint.path + request.path or "/"
        query = encode_query(request.query) if request.query else ""
        headers = {"host": endpoint.host, **request.headers}
        if keys is not None:
            headers = sign(
                request.method,
                path,
                query,
                headers,
                await self._payload_hash(request.body),
                keys,
                endpoint.region,
                self._sources.wall_us() + self._skew_us,
            )
        headers["user-agent"] = self._user_agent
        headers["accept-encoding"] = "identity"
        size = len(request.body)
        try:
            response = await self._connections.exchange(
                endpoint.origin,
                request.method,
                f"{path}?{query}" if query else path,
                headers,
                request.body,
                connect_s=limits.connect_s,
                read_s=limits.read_s,
                # Without a limit of the user's, a large body may take the time that a slow line needs.
                total_s=limits.attempt_s
                or (None if not size else limits.connect_s + 2 * limits.read_s + size / _SLOWEST_UPLOAD_BYTES_PER_S),
                most_bytes=request.most_bytes,
                patience=limits.patience * (1.0 if request.is_simple else _PATIENCE_WITH_MUCH_WORK),
            )
        except NotConnectedError as error:
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            return Unanswered(cause, connected=False, final=isinstance(cause, ssl.SSLError))
        except (OSError, TimeoutError) as error:
            return Unanswered(error, connected=True, final=isinstance(error, TooLargeError))
        except ValueError as error:
            # It was found before anything was sent.
            return Unanswered(error, connected=False, final=True)
        self._contacted = True
        return Answer(response.status, response.headers, response.body)

    async def _payload_hash(self, body: bytes | memoryview) -> str:
        if not body:
            return _EMPTY_HASH
        if self._leaves_unsigned(body):
            return UNSIGNED_PAYLOAD
        if len(body) >= _HASH_IN_THREAD_BYTES:
            return (await in_thread(partial(hashlib.sha256, body))).hexdigest()
        return hashlib.sha256(body).hexdigest()

    def _leaves_unsigned(self, body: bytes | memoryview) -> bool:
        """Whether a body goes without its hash: TLS keeps it whole, or it never leaves this machine and is large."""
        if self.endpoint.scheme == "https":
            return bool(body)
        return len(body) >= _HASH_IN_THREAD_BYTES and not self._wants_hashes and self.endpoint.is_this_machine


class Retrier:
    """The tries of one operation of a client."""

    def __init__(self, client: S3Client, limits: Limits, sources: Sources, what: str) -> None:
        self._tries = Tries(limits, sources)
        self._what = what
        self._client = client

    @property
    def tries(self) -> int:
        """So many so far."""
        return self._tries.count

    @property
    def limits(self) -> Limits:
        """Limits of the next try."""
        return self._tries.limits

    async def again(self, outcome: Answer | Unanswered) -> bool:
        """Pause, as long as the service asks and with full jitter on top, and return True; False where the tries or the
        time are used up.
        """
        if isinstance(outcome, Answer):
            pause_s = self._tries.pause_s(asked_s=retry_after_s(outcome))
        elif outcome.final:
            return False
        else:
            pause_s = self._tries.pause_s(contacted=outcome.connected or self._client.contacted)
        if pause_s is None:
            return False
        _LOG.debug(
            "trying again to %s in %.0f ms, after try %d: %s", self._what, pause_s * 1e3, self.tries, _reason(outcome)
        )
        return await self._tries.after(pause_s)


def _reason(outcome: Answer | Unanswered) -> str:
    # The service's own text is left out: it may quote the request, credentials included.
    return f"HTTP {outcome.status}" if isinstance(outcome, Answer) else type(outcome.cause).__name__


def _tls_context() -> ssl.SSLContext:
    """Trusts the authorities that botocore would: those of a bundle that is named, and of it alone.

    Raises
    ------
    StorageError
        There is no such bundle, or it is none (kind ``storage-config``).
    """
    named = {
        "AWS_CA_BUNDLE": os.environ.get("AWS_CA_BUNDLE"),
        "ca_bundle of the AWS configuration": get_session().get_config_variable("ca_bundle"),
        "REQUESTS_CA_BUNDLE": os.environ.get("REQUESTS_CA_BUNDLE"),
    }
    for source, path in named.items():
        if path:
            try:
                return ssl.create_default_context(
                    cafile=None if os.path.isdir(path) else path, capath=path if os.path.isdir(path) else None
                )
            except OSError as error:
                raise StorageError(
                    f"no certificates in {path!r}, which {source} names ({error}): let it name a file of certificates, "
                    "or unset it",
                    ErrorKind.STORAGE_CONFIG,
                ) from error
    context = ssl.create_default_context()
    context.load_verify_locations(get_cert_path(True))
    return context
