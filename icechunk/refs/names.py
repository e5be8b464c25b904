"""Which names branches and tags may have.

Format 2 keeps names in a table and takes any text, as the official library does (``..``, ``/`` and the empty
string included). Format 1 writes them into keys, where ``/`` would name another object.
"""

from __future__ import annotations

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.inputs import WrongTypeError

__all__ = ["validate_branch_name", "validate_tag_name"]


def _validate(what: str, name: object, spec_version: int) -> None:
    if not isinstance(name, str):
        raise WrongTypeError(
            f"invalid {what} name {name!r}: a str expected, not {type(name).__name__}", ErrorKind.INVALID_REF_NAME
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"invalid {what} name {name!r}: it cannot be written as UTF-8 ({error.reason}); choose another name",
            ErrorKind.INVALID_REF_NAME,
        ) from None
    if spec_version == 1 and "/" in name:
        raise InvalidInputError(
            f"invalid {what} name {name!r}: a repository of format 1 takes no '/' in names; choose another name, "
            "or upgrade the repository",
            ErrorKind.INVALID_REF_NAME,
        )


def validate_branch_name(name: str, *, spec_version: int = 2) -> None:
    """Refuse a name that no branch can have.

    Raises
    ------
    InvalidInputError
        Kind ``invalid-ref-name``: not text, not UTF-8, or with ``/`` in a repository of format 1.
    """
    _validate("branch", name, spec_version)


def validate_tag_name(name: str, *, spec_version: int = 2) -> None:
    """Refuse a name that no tag can have; as `validate_branch_name`."""
    _validate("tag", name, spec_version)
