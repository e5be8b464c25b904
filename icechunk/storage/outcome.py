"""What became of a conditional write that was refused, or had no certain answer, by what is found in its place.

A conditional write carries a random id of its own in the object's user metadata. Whoever made it reads that back: his
own id means that an earlier try landed and only its answer was lost. Otherwise:

===========  ==========================  =====================================================
condition    found                       outcome
===========  ==========================  =====================================================
any          not looked for: every try   `PreconditionFailedError`
             so far was refused
Absent       another's object            `PreconditionFailedError`: a late try can only land in an empty place
Absent       nothing                     the same bytes are sent again
Matches      still that version          the same bytes are sent again
Matches      anything else, every try    `PreconditionFailedError`
             so far refused
Matches      anything else, after a try  `StorageError`, uncertain: ours may have landed and been
             without answer              replaced since
===========  ==========================  =====================================================

Some failures say for certain that nothing was written, if every try of the write failed so. An adapter says that on the
error: `refused`, where another try would fare no better, and `unsent`, where it may.

Pure; the requests are the adapters' affair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeVar

from icechunk.errors import ErrorKind, InvalidInputError, PreconditionFailedError, ReadOnlyError, StorageError
from icechunk.storage.port import Absent, Matches, Precondition, PutResult, Unchecked, Version

__all__ = [
    "REFUSING_STATUSES",
    "Found",
    "is_refusal",
    "precondition_failed",
    "refused",
    "settle",
    "uncertain",
    "unsent",
]

REFUSING_STATUSES: Final = frozenset({400, 401, 403, 404, 405, 411, 501})
"""HTTP answers to a PUT that say for certain that it was not executed; 404 is that of the bucket."""

E = TypeVar("E", bound=StorageError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What reading back found."""

    ours: bool
    """Whether it is what this call wrote."""
    version: Version
    date_us: int | None
    """The store's clock when it answered; None where it does not say."""


def settle(
    name: str, precondition: Precondition, found: Found | StorageError | None, *, turned_down: bool, unsettled: bool
) -> PutResult | None:
    """Judge what reading back found.

    Parameters
    ----------
    name
        Of the object, for messages.
    found
        None: nothing there; an error: it could not be read.
    turned_down
        The last try was refused for the sake of its condition.
    unsettled
        Some try had no certain answer.

    Returns
    -------
    PutResult or None
        The write landed; None: send the same bytes again.

    Raises
    ------
    PreconditionFailedError
        It did not land, for certain.
    StorageError
        That cannot be told any more.
    """
    if isinstance(found, StorageError):
        if turned_down and not unsettled:
            raise precondition_failed(name, precondition)
        return None
    if found is not None and found.ours:
        return PutResult(version=found.version, date_us=found.date_us)
    match precondition:
        case Absent():
            if found is not None or (turned_down and not unsettled):
                raise precondition_failed(name, precondition)
        case Matches(version):
            if turned_down and not unsettled:
                raise precondition_failed(name, precondition)
            if found is None or found.version != version:
                if not unsettled:
                    raise precondition_failed(name, precondition)
                raise StorageError(
                    f"cannot tell whether the write of {name} landed: its answer was lost, and the object has another "
                    "version now; read it back before believing either",
                    ErrorKind.OBJECT_STORE,
                )
        case Unchecked():
            pass
    return None


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
    """Whether what a write raised says that it was refused for certain, and that the same write would be again."""
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
