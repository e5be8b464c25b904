"""Conditional writes to stores whose answers may be lost: sent until their outcome is certain.

A conditional write has a random id of its own in the object's user metadata. Its writer reads that back: its own id
means that an earlier try landed and only its answer was lost. Otherwise:

===========  ==========================  =====================================================
condition    found                       outcome
===========  ==========================  =====================================================
any          not looked for: every try   `PreconditionFailedError`
             so far was turned down
Absent       another's object            `PreconditionFailedError`: a late try can only land in an empty place
Absent       nothing                     the same bytes are sent again
Matches      still that version          the same bytes are sent again
Matches      anything else, every try    `PreconditionFailedError`
             so far was certain
Matches      anything else, after a try  `StorageError`, uncertain: ours may have landed and been
             without answer              replaced since
===========  ==========================  =====================================================

Some failures say for certain that nothing was written, if every try of the write failed so. That is said on the error:
`refused`, where another try would fare no better, and `unsent`, where it may.

An adapter supplies a try (`Tried`), the reading back (`Found`) and the pauses.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from icechunk.errors import (
    ErrorKind,
    IcechunkError,
    InvalidInputError,
    PreconditionFailedError,
    ReadOnlyError,
    StorageError,
)
from icechunk.storage.port import Absent, Matches, Precondition, PutResult, Unchecked, Version

__all__ = [
    "REFUSING_STATUSES",
    "Found",
    "Tried",
    "follow",
    "is_refusal",
    "precondition_failed",
    "refused",
    "replaced_since",
    "uncertain",
    "unsent",
]

REFUSING_STATUSES: Final = frozenset({400, 401, 403, 404, 405, 411, 501})
"""HTTP answers to a PUT that say for certain that it was not executed; 404 is that of the bucket."""

E = TypeVar("E", bound=StorageError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The result of reading back."""

    ours: bool
    """Whether the object is the one that this call wrote."""
    version: Version
    date_us: int | None
    """The store's clock when it answered; None where it does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """The result of one try of a conditional write."""

    put: PutResult | None = None
    """It landed, and this was the answer."""
    error: StorageError | None = None
    """To be raised if this was the last one."""
    turned_down: bool = False
    """Because the condition did not hold."""
    final: bool = False
    """Another try would not fare better."""
    refused: bool = False
    """For certain, and every other try would be too."""
    may_land: bool = False
    """It may have been executed, or may be later."""
    reached: bool = True
    """The service may have had the request."""
    look: bool = False
    """Worth reading back before the next one."""


async def follow(
    name: str,
    precondition: Precondition,
    *,
    send: Callable[[bool], Awaitable[Tried]],
    read_back: Callable[[bool], Awaitable[Found | StorageError | None]],
    again: Callable[[bool], Awaitable[bool]],
) -> PutResult:
    """Send a conditional write until its outcome is certain.

    Parameters
    ----------
    name
        Of the object, for messages.
    send
        Makes one try. Its argument: whether an earlier one may have landed.
    read_back
        Looks at the object; None: there is none; an error: it could not be read. Its argument is the same.
    again
        Pauses before another try; False if there will be none. Its argument: whether some try has reached the service.

    Raises
    ------
    PreconditionFailedError
        It did not land, for certain.
    StorageError
        As `Storage.put` says: ``refused``, ``unsent``, or not certain.
    """
    may_have_landed = reached = False
    while True:
        try:
            tried = await send(may_have_landed)
        except PreconditionFailedError:
            raise
        except IcechunkError as lapse:
            # It could not even be tried: there are no credentials any more, for one.
            if may_have_landed:
                raise uncertain(lapse) from lapse
            raise
        if tried.put is not None:
            return tried.put
        assert tried.error is not None
        reached = reached or tried.reached
        if tried.turned_down and not may_have_landed and not isinstance(precondition, Unchecked):
            # One try is one request, so the object that exists is not our own.
            raise precondition_failed(name, precondition) from tried.error
        may_have_landed = may_have_landed or tried.may_land
        if tried.final:
            if may_have_landed:
                raise uncertain(tried.error)
            raise refused(tried.error) if tried.refused else tried.error
        if tried.look:
            put = _judge(name, precondition, await read_back(may_have_landed), may_have_landed=may_have_landed)
            if put is not None:
                return put
        if not await again(reached):
            if may_have_landed:
                raise uncertain(tried.error)
            raise tried.error if reached else unsent(tried.error)


def _judge(
    name: str, precondition: Precondition, found: Found | StorageError | None, *, may_have_landed: bool
) -> PutResult | None:
    """Judge the result of reading back: the write landed; None: send the same bytes again. Raises as `follow`."""
    if isinstance(found, StorageError):
        return None
    if found is not None and found.ours:
        return PutResult(version=found.version, date_us=found.date_us)
    match precondition:
        case Absent():
            if found is not None:
                raise precondition_failed(name, precondition)
        case Matches(version):
            if found is None or found.version != version:
                if not may_have_landed:
                    raise precondition_failed(name, precondition)
                raise replaced_since(name)
        case Unchecked():
            pass
    return None


def replaced_since(name: str) -> StorageError:
    """The error for a replacement without answer whose object has another version by now."""
    return StorageError(
        f"cannot find out whether the write of {name} landed: its answer was lost, and the object has another "
        "version now; read it back to see which write it holds",
        ErrorKind.OBJECT_STORE,
    )


def precondition_failed(name: str, precondition: Precondition) -> PreconditionFailedError:
    """The error for a write that was refused for certain."""
    if isinstance(precondition, Matches):
        return PreconditionFailedError(
            f"cannot replace version {precondition.version} of {name}: the object has another version now, or is gone"
        )
    return PreconditionFailedError(f"cannot create {name}: the object exists already")


def refused(error: E) -> E:
    """Note on the error of a write that every try of it was refused for certain; returns the error."""
    error.refused = True
    return error


def unsent(error: E) -> E:
    """Note on the error of a write that no try of it reached the storage; returns the error."""
    error.unsent = True
    return error


def is_refusal(error: BaseException) -> bool:
    """Whether the error of a write says that it was refused for certain, and that the same write would be again."""
    if isinstance(error, StorageError):
        return error.refused
    # Arguments are refused before anything is sent.
    return isinstance(error, InvalidInputError | ReadOnlyError)


def uncertain(error: Exception) -> StorageError:
    """The error for a write that may have landed, or may land later."""
    result = StorageError(
        f"{error}; the outcome is uncertain: an earlier try may have landed, or may land later. Read the object back",
        getattr(error, "kind", ErrorKind.OBJECT_STORE),
    )
    result.__cause__ = error
    return result
