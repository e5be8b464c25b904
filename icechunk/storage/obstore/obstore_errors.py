"""Translation of obstore's errors, and a workaround for crashes at the end of the process.

A thread of obstore's runtime answers a request: it wakes the event loop while it holds the interpreter's lock, and
needs the lock again afterwards to release its references. If the program ends in between, the thread cannot get the
lock any more: the interpreter then makes it exit, which compiled code cannot handle (SIGABRT), or since Python 3.14
(gh-87135) lets it hang, and it reads memory that is gone (SIGSEGV): the process fails although its work is done. There
is no way to know when those threads have finished, so the end of the process waits for them a little, without holding
the lock.
"""

from __future__ import annotations

import atexit
import re
import time
from typing import Any, Final

from icechunk.errors import ErrorKind, StorageError
from icechunk.runtime.late_dataclass import dataclass
from icechunk.storage.outcome import REFUSING_STATUSES
from icechunk.storage.rights import Right, Service, access_denied

__all__ = ["Failure", "access_error", "failure_of", "missing", "obstore_module", "storage_error"]

_STATUS: Final = re.compile(r"Server returned non-2xx status code: (\d{3})")
_ELAPSED: Final = re.compile(r" in [\d.]+(?:ns|µs|ms|s)\b")
_URL_QUERY: Final = re.compile(r"(https?://[^\s?]+)\?\S+")
_TRANSIENT: Final = frozenset({408, 425, 429, 499, 500, 502, 503, 504})
_NO_BUCKET: Final = re.compile(r"<Code>(?:NoSuchBucket|ContainerNotFound|ContainerBeingDeleted)</Code>")
_FINAL_NAMES: Final = frozenset(
    {
        "FileNotFoundError",
        "InvalidPathError",
        "NotFoundError",
        "NotSupportedError",
        "PermissionDeniedError",
        "UnauthenticatedError",
        "UnknownConfigurationKeyError",
    }
)
_NEVER_SENT: Final = re.compile(r"client error \(Connect\)|dns error|builder error|failed to lookup address")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One failed request."""

    refused: bool
    """Whether its condition does not hold."""
    missing: bool
    """There is no such object."""
    transient: bool
    """Another try may go better."""
    certain: bool
    """Nothing of it landed, nor will."""
    throttled: bool
    """The service asks to slow down."""
    final: bool = False
    """Refused for certain, as the same request would be again."""


def missing(error: BaseException) -> bool:
    """Whether an error says that there is no such object; that there is no such bucket is another matter."""
    if not (isinstance(error, FileNotFoundError) or type(error).__name__ == "NotFoundError"):
        return False
    return _NO_BUCKET.search(str(error)) is None


def failure_of(error: BaseException) -> Failure:
    """Judge the error of a request that was sent at most once."""
    name = type(error).__name__
    status = _status_of(error)
    refused = name in ("AlreadyExistsError", "PreconditionError") or isinstance(error, FileExistsError)
    gone = missing(error)
    if refused or gone or name in _FINAL_NAMES:
        final = not (refused or gone)
        return Failure(refused=refused, missing=gone, transient=False, certain=True, throttled=False, final=final)
    if status is None:
        never_sent = _NEVER_SENT.search(str(error)) is not None
        return Failure(refused=False, missing=False, transient=True, certain=never_sent, throttled=False)
    throttled = status in (429, 503)
    return Failure(
        refused=False,
        missing=False,
        transient=status in _TRANSIENT,
        certain=status in REFUSING_STATUSES or (status < 500 and status not in (408, 499)),
        throttled=throttled,
        final=status in REFUSING_STATUSES,
    )


def _status_of(error: BaseException) -> int | None:
    """The status of the service's answer; None where there was none."""
    match = _STATUS.search(str(error))
    return None if match is None else int(match[1])


def access_error(service: Service, right: Right, key: str, what: str, error: BaseException) -> StorageError:
    """As `storage_error`, for a request that needs a right; parameters as `icechunk.storage.rights.access_denied`."""
    if type(error).__name__ != "PermissionDeniedError":
        return storage_error(what, error)
    denied = access_denied(service, right, key, what, _said(error), "the credentials and their rights")
    denied.__cause__ = error
    return denied


def storage_error(what: str, error: BaseException) -> StorageError:
    """The error to raise for one of obstore's: its first line, without signed or secret parts of a URL.

    Parameters
    ----------
    what
        What was attempted on which object: ``read gs://bucket/key``.
    """
    said = _said(error)
    name = type(error).__name__
    hint, kind = "", ErrorKind.OBJECT_STORE
    if name in ("PermissionDeniedError", "UnauthenticatedError"):
        hint = "; check the credentials and their rights"
    elif name == "UnknownConfigurationKeyError":
        hint, kind = "; check the names of the options", ErrorKind.STORAGE_CONFIG
    elif isinstance(error, FileNotFoundError) or name == "NotFoundError":
        hint = "; create the bucket or container, or check its name"
    elif _status_of(error) == 429:
        kind = ErrorKind.THROTTLED
    result = StorageError(f"cannot {what}: {said}{hint}", kind)
    result.__cause__ = error
    return result


def _said(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).split("\n\nDebug source:")[0].splitlines() if line.strip()]
    return _URL_QUERY.sub(r"\1?…", _ELAPSED.sub("", " ".join(lines)))[:600]


_TURNS: Final = 25
_TURN_S: Final = 0.004

_used = False


def obstore_module() -> Any:
    """The module of obstore's functions; where it is not installed, making a store has said so before."""
    global _used
    import obstore

    _used = True
    return obstore


def _let_threads_finish() -> None:
    # Many short turns: on a busy machine each takes longer, and so do the threads that are waited for.
    if _used:
        for _ in range(_TURNS):
            time.sleep(_TURN_S)


# At import, before anything of the package is in use: hooks run last in, first out, and those of `PerLoop` still make
# requests.
atexit.register(_let_threads_finish)
