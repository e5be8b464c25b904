"""The meaning of an S3 service's answers: which to try again, and the errors for the others."""

from __future__ import annotations

import errno
import re
import socket
import ssl
from collections.abc import Mapping
from typing import Final
from xml.etree import ElementTree

from icechunk.errors import ErrorKind, StorageError
from icechunk.runtime.late_dataclass import dataclass
from icechunk.storage.http.headers import date_us
from icechunk.storage.http.messages import TooLargeError
from icechunk.storage.http.proxies import ProxyError
from icechunk.storage.rights import Right, Service, access_denied

__all__ = [
    "Answer",
    "Refusal",
    "Unanswered",
    "is_throttled",
    "is_transient",
    "parse_refusal",
    "parse_xml",
    "require_document",
    "retry_after_s",
    "text_of",
    "to_error",
]

_TRANSIENT_STATUSES: Final = frozenset({408, 425, 429, 499, 500, 502, 503, 504, 509})
_TRANSIENT_CODES: Final = frozenset(
    {
        "BandwidthLimitExceeded",
        "ConditionalRequestConflict",
        "InternalError",
        "OperationAborted",
        "PriorRequestNotComplete",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "TransactionInProgress",
        "XMinioServerNotInitialized",
    }
)
_THROTTLING_CODES: Final = frozenset({"SlowDown", "Throttling", "TooManyRequests", "RequestLimitExceeded"})
_BAD_CREDENTIALS: Final = frozenset(
    {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "TokenRefreshRequired"}
)
_NAMESPACE: Final = re.compile(r"\{[^}]*\}")


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer."""

    status: int
    headers: Mapping[str, str]
    """Names in any case."""
    content: bytes | memoryview

    @property
    def body(self) -> bytes:
        """The same as `content`, as bytes: a copy where that is a view of a large body."""
        return bytes(self.content)


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A try without a complete answer; the request may have been executed nevertheless."""

    cause: Exception
    connected: bool
    """False where the request certainly never left: no connection could be made."""
    final: bool
    """True where trying again cannot help."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The error document of an answer."""

    code: str
    message: str
    region: str | None = None
    """The region that the bucket is in, where the service says so."""


def parse_xml(body: bytes) -> ElementTree.Element:
    """An answer's document, without name spaces. Raises `ElementTree.ParseError`."""
    try:
        root = ElementTree.fromstring(body)
    except (ValueError, LookupError) as error:
        # An encoding that expat does not know.
        raise ElementTree.ParseError(str(error)) from error
    for element in root.iter():
        element.tag = _NAMESPACE.sub("", element.tag)
    return root


def text_of(element: ElementTree.Element, name: str) -> str:
    """Text of a child; empty where there is none."""
    return element.findtext(name) or ""


def require_document(what: str, answer: Answer) -> ElementTree.Element:
    """The document of an answer that has one. Raises `StorageError` where it has none."""
    try:
        return parse_xml(answer.body)
    except ElementTree.ParseError as error:
        raise StorageError(
            f"cannot {what}: the answer is not the document that S3 sends ({error}); is the endpoint an S3 service?",
            ErrorKind.OBJECT_STORE,
        ) from error


def parse_refusal(answer: Answer) -> Refusal:
    """The contents of an error answer; answers to HEAD have only headers."""
    region = answer.headers.get("x-amz-bucket-region")
    try:
        root = parse_xml(answer.body)
    except ElementTree.ParseError:
        text = answer.body[:200].decode("utf-8", "replace").strip()
        return Refusal("", text, region)
    return Refusal(text_of(root, "Code"), text_of(root, "Message"), region or text_of(root, "Region") or None)


def is_transient(answer: Answer) -> bool:
    """Whether another try may succeed."""
    if answer.status in _TRANSIENT_STATUSES:
        return True
    return answer.status >= 400 and parse_refusal(answer).code in _TRANSIENT_CODES


def is_throttled(outcome: Answer | Unanswered) -> bool | None:
    """Whether the service asked to slow down; None where it did not answer."""
    if isinstance(outcome, Unanswered):
        return None
    if outcome.status < 400:
        return False
    return outcome.status in (429, 503) or parse_refusal(outcome).code in _THROTTLING_CODES


def retry_after_s(answer: Answer) -> float:
    """The pause that the service asks for, seconds; 0 if it asks for none."""
    text = answer.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    until_us = date_us(answer.headers, "Retry-After") if text else None
    now_us = date_us(answer.headers)
    return 0.0 if until_us is None or now_us is None else max(0.0, (until_us - now_us) / 1e6)


def to_error(
    what: str, outcome: Answer | Unanswered, tries: int, endpoint: str, *, right: Right, key: str
) -> StorageError:
    """The error for a request that failed for good.

    Parameters
    ----------
    what
        What was attempted on which object, as in ``read s3://bucket/key``.
    endpoint
        Where requests went, for messages about connections.
    right, key
        That the request needs, and on which object, relative to the root.
    """
    times = "" if tries <= 1 else f" ({tries} tries)"
    if isinstance(outcome, Unanswered):
        reason, kind = _connection_trouble(outcome.cause, outcome.connected, endpoint)
        return StorageError(f"cannot {what}: {reason}{times}", kind)
    refusal = parse_refusal(outcome)
    if outcome.status == 403 and refusal.code not in _BAD_CREDENTIALS | {"RequestTimeTooSkewed"}:
        return access_denied(Service.S3, right, key, what, _said(403, refusal), "credentials and the bucket's policy")
    reason, kind = _refusal_trouble(outcome.status, refusal, endpoint)
    return StorageError(f"cannot {what}: {reason}{times}", kind)


def _connection_trouble(cause: Exception, connected: bool, endpoint: str) -> tuple[str, ErrorKind]:
    kind = ErrorKind.OBJECT_STORE
    if isinstance(cause, ProxyError):
        return f"{cause}; check the proxy, or unset the variable that names it", kind
    if isinstance(cause, TooLargeError):
        return f"{cause}; something between here and {endpoint} changes answers", kind
    if isinstance(cause, ValueError) and not isinstance(cause, OSError):
        return f"the request cannot be sent: {cause}", ErrorKind.STORAGE_CONFIG
    if isinstance(cause, ssl.SSLError):
        return (
            f"no TLS connection to {endpoint} ({cause}); if the endpoint uses plain http, write http:// and set "
            "allow_http=True, else check its certificate and AWS_CA_BUNDLE"
        ), kind
    if isinstance(cause, socket.gaierror):
        return f"no such host: {endpoint} cannot be resolved; check endpoint_url, region, bucket and DNS", kind
    if isinstance(cause, OSError) and not connected and not isinstance(cause, TimeoutError):
        # asyncio sums the failures of several addresses up in one text.
        refused = isinstance(cause, ConnectionRefusedError) or f"[Errno {errno.ECONNREFUSED}]" in str(cause)
        problem = "the connection was refused" if refused else f"no connection ({cause.strerror or cause})"
        return f"{problem} by {endpoint}; check endpoint_url and that the service runs", kind
    if isinstance(cause, TimeoutError):
        return f"{endpoint} did not answer in time; check the network, or raise the timeouts", kind
    return f"the connection to {endpoint} broke ({type(cause).__name__}: {cause})", kind


def _said(status: int, refusal: Refusal) -> str:
    return f"{refusal.code or f'HTTP {status}'}{': ' + refusal.message if refusal.message else ''}"


def _refusal_trouble(status: int, refusal: Refusal, endpoint: str) -> tuple[str, ErrorKind]:
    said = _said(status, refusal)
    kind = ErrorKind.OBJECT_STORE
    if refusal.code in _BAD_CREDENTIALS:
        return f"the credentials were not accepted ({said}); check access key, secret and session token", kind
    match refusal.code:
        case "NoSuchBucket":
            return f"the bucket does not exist at {endpoint}; create it, or check its name and the endpoint", kind
        case "RequestTimeTooSkewed":
            return f"this machine's clock is wrong ({said}); set it", kind
        case "AuthorizationHeaderMalformed" | "PermanentRedirect" | "IllegalLocationConstraintException":
            where = f"it is in {refusal.region!r}" if refusal.region else "the service does not say which"
            return f"the bucket is in another region ({said}); set region: {where}", ErrorKind.BAD_REDIRECT
        case "EntityTooLarge":
            return f"the object is too large for one request ({said})", kind
    if refusal.code in _THROTTLING_CODES or status == 429:
        return f"the service asks to slow down ({said}); send fewer requests at once", ErrorKind.THROTTLED
    if status in (301, 302, 307, 308):
        where = f"; set region to {refusal.region!r}" if refusal.region else "; check region and endpoint_url"
        return f"the service redirects elsewhere ({said}){where}", ErrorKind.BAD_REDIRECT
    if status == 400 and "HTTPS server" in refusal.message:
        return f"{endpoint} uses TLS; write https:// in endpoint_url", kind
    return f"the service answered {status} ({said})", kind
