"""What became of a conditional write that was refused, or had no certain answer, by what is found in its place.

A conditional write carries a random id of its own in the object's user metadata. Whoever made it reads that back: his
own id means that an earlier try landed and only its answer was lost. Otherwise:

===========  ==========================  =====================================================
condition    found                       outcome
===========  ==========================  =====================================================
Absent       another's object            `PreconditionFailedError`: a late try can only land in an empty place
Absent       nothing                     the same bytes are sent again
Matches      still that version          the same bytes are sent again
Matches      anything else, every try    `PreconditionFailedError`
             so far refused
Matches      anything else, after a try  `StorageError`, uncertain: ours may have landed and been
             without answer              replaced since
===========  ==========================  =====================================================

Pure; the requests are the adapters' affair.
"""

from __future__ import annotations

from dataclasses import dataclass

from icechunk.errors import ErrorKind, PreconditionFailedError, StorageError
from icechunk.storage.port import Absent, Matches, Precondition, PutResult, Unchecked, Version

__all__ = ["Found", "precondition_failed", "settle", "uncertain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What reading back found."""

    ours: bool
    """Whether it is what this call wrote."""
    version: Version
    date_us: int | None
    """The store's clock when it answered; None where it does not say."""


def settle(
    name: str, precondition: Precondition, found: Found | StorageError | None, *, refused: bool, unsettled: bool
) -> PutResult | None:
    """Judge what reading back found.

    Parameters
    ----------
    name
        Of the object, for messages.
    found
        None: nothing there; an error: it could not be read.
    refused
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
        if refused and not unsettled:
            raise precondition_failed(name, precondition)
        return None
    if found is not None and found.ours:
        return PutResult(version=found.version, date_us=found.date_us)
    match precondition:
        case Absent():
            if found is not None or (refused and not unsettled):
                raise precondition_failed(name, precondition)
        case Matches(version):
            if refused and not unsettled:
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


def uncertain(error: Exception) -> StorageError:
    """The error for a write that may have landed, or may land later."""
    result = StorageError(
        f"{error}; the outcome is uncertain: an earlier try may have landed, or may land later. Read the object back",
        getattr(error, "kind", ErrorKind.OBJECT_STORE),
    )
    result.__cause__ = error
    return result
