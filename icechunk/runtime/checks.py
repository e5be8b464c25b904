"""Checks of input before anything is written: arguments, metadata, and the fields of value classes.

A field's check follows from its annotation (`check_of`): classes, unions with None, literals, and ``Annotated`` types
that carry a `Check`, such as `U16`.
"""

from __future__ import annotations

import dataclasses
import operator
import types
import typing
from collections.abc import Callable, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Final, Literal, TypeAlias

import numpy as np

from icechunk.errors import ErrorKind, InvalidInputError

__all__ = [
    "U8",
    "U16",
    "U32",
    "U64",
    "Aware",
    "Check",
    "OutOfRangeError",
    "WrongTypeError",
    "aware",
    "boolean",
    "check_of",
    "checks_of",
    "instance_of",
    "json_metadata",
    "optional",
    "require_text",
    "require_type",
    "text",
    "unsigned",
    "whole",
]

Check: TypeAlias = Callable[[str, Any], Any]
"""Takes the full name of a field and the value given; returns the value to keep or raises."""

_MAX_INT: Final = 2**64 - 1
_MIN_INT: Final = -(2**63)
_MAX_DEPTH: Final = 100


class WrongTypeError(InvalidInputError, TypeError):
    """An argument of a type that is not accepted there; also a `TypeError`, as the official library raises."""


class OutOfRangeError(InvalidInputError, OverflowError):
    """A number outside the range of its setting; also an `OverflowError`, as the official library raises there."""


# --- checks of fields -----------------------------------------------------------------------------------------


def whole(minimum: int, maximum: int) -> Check:
    """A check for whole numbers from ``minimum`` to ``maximum``."""

    def check(name: str, value: Any) -> int:
        try:
            number = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be a whole number, not {type(value).__name__}") from None
        if not minimum <= number <= maximum:
            raise OutOfRangeError(
                f"{name} must be from {minimum} to {maximum}, not {_short(number)}", ErrorKind.INVALID_SETTING
            )
        return number

    return check


def unsigned(bits: int, *, minimum: int = 0) -> Check:
    """A check for whole numbers from ``minimum`` to 2**bits - 1."""
    return whole(minimum, (1 << bits) - 1)


def instance_of(*types: type) -> Check:
    """A check for instances of one of ``types``."""
    expected = " or ".join(t.__qualname__ for t in types)

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, types):
            raise TypeError(f"{name} must be {expected}, not {type(value).__name__}")
        return value

    return check


def optional(check: Check) -> Check:
    """The same check, passing None."""

    def check_or_none(name: str, value: Any) -> Any:
        return None if value is None else check(name, value)

    return check_or_none


def aware(name: str, value: Any) -> datetime:
    """A check for points in time that name their time zone."""
    if not isinstance(value, datetime):
        raise TypeError(f"{name} must be datetime, not {type(value).__name__}")
    if value.utcoffset() is None:
        raise TypeError(f"{name} needs a time zone: give datetime(..., tzinfo=timezone.utc)")
    return value


text: Final[Check] = instance_of(str)
boolean: Final[Check] = instance_of(bool)

U8: TypeAlias = Annotated[int, unsigned(8)]
U16: TypeAlias = Annotated[int, unsigned(16)]
U32: TypeAlias = Annotated[int, unsigned(32)]
U64: TypeAlias = Annotated[int, unsigned(64)]
Aware: TypeAlias = Annotated[datetime, aware]


def check_of(annotation: Any) -> Check:
    """The check of a field with this (evaluated) annotation."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return typing.cast("Check", arguments[1])
    if origin is Literal:
        return _one_of(arguments)
    if origin in (typing.Union, types.UnionType):
        others = [kind for kind in arguments if kind is not type(None)]
        check = check_of(others[0]) if len(others) == 1 else instance_of(*others)
        return check if len(others) == len(arguments) else optional(check)
    return instance_of(annotation)


_checks: Final[dict[type, Mapping[str, Check]]] = {}


def checks_of(cls: type) -> Mapping[str, Check]:
    """The checks of a dataclass's fields, by name."""
    found = _checks.get(cls)
    if found is None:
        hints = typing.get_type_hints(cls, include_extras=True)
        names = (field.name for field in dataclasses.fields(cls))
        found = _checks[cls] = {name: check_of(hints[name]) for name in names}
    return found


def _one_of(choices: tuple[str, ...]) -> Check:
    def check(name: str, value: Any) -> Any:
        if text(name, value) not in choices:
            raise InvalidInputError(
                f"{name} must be {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}, not {value!r}",
                ErrorKind.INVALID_SETTING,
            )
        return value

    return check


# --- checks of arguments --------------------------------------------------------------------------------------


def require_type(name: str, value: object, *types: type, optional: bool = False) -> None:
    """Refuse an argument that is not an instance of one of ``types``, nor None where it is ``optional``.

    Raises
    ------
    WrongTypeError
        It is not.
    """
    if not (isinstance(value, types) or (optional and value is None)):
        expected = " or ".join(kind.__qualname__ for kind in types)
        raise WrongTypeError(
            f"{name} must be {expected}, not {type(value).__name__}: {_short(value)}", ErrorKind.INVALID_SETTING
        )


def require_text(name: str, value: object) -> None:
    """Refuse a value that is not text, or cannot be written as UTF-8. Raises `WrongTypeError`, `InvalidInputError`."""
    require_type(name, value, str)
    _text(name, str(value))


def json_metadata(name: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of metadata that every reader of the format can read; empty for None.

    JSON values: None, bool, int of 64 bits, float, str, list or tuple, mapping with str keys. NumPy's scalars and
    arrays of these, ranges and `decimal.Decimal` are converted. Not-a-number and infinities are kept; readers with
    strict JSON, the official library among them, see null.

    Raises
    ------
    WrongTypeError
        A value, or key, of another type; bytes among them, which would make the history unreadable to the official
        library.
    InvalidInputError
        An integer beyond 64 bits, text that is not Unicode, or nesting deeper than 100 (kind ``bad-metadata``).
    """
    if value is None:
        return {}
    require_type(name, value, Mapping)
    return {_key(name, key): _plain(f"{name}[{key!r}]", item, 1) for key, item in value.items()}


def _plain(name: str, value: Any, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise InvalidInputError(f"{name[:80]}… is nested deeper than {_MAX_DEPTH} levels", ErrorKind.BAD_METADATA)
    match value:
        case None | bool():
            return value
        case str():
            return _text(name, value)
        case int():
            if not _MIN_INT <= value <= _MAX_INT:
                raise InvalidInputError(
                    f"{name} is {_short(value)}, which does not fit into 64 bits; write it as text or as a float",
                    ErrorKind.BAD_METADATA,
                )
            return int(value)
        case float() | np.floating() | Decimal():
            return float(value)
        case list() | tuple() | range():
            return [_plain(f"{name}[{i}]", item, depth + 1) for i, item in enumerate(value)]
        case np.ndarray() | np.generic() if value.dtype.kind in "biufUO":
            return _plain(name, value.tolist(), depth)
        case Mapping():
            return {_key(name, key): _plain(f"{name}[{key!r}]", item, depth + 1) for key, item in value.items()}
    raise WrongTypeError(
        f"{name} is {type(value).__name__}, which is not JSON ({_short(value)}); convert it, for example to text",
        ErrorKind.BAD_METADATA,
    )


def _key(name: str, key: object) -> str:
    if not isinstance(key, str):
        raise WrongTypeError(
            f"{name} has the key {_short(key)}, a {type(key).__name__}; keys must be text", ErrorKind.BAD_METADATA
        )
    return _text(f"a key of {name}", key)


def _text(name: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"{name} is {_short(value)}, which cannot be written as UTF-8 ({error.reason})", ErrorKind.BAD_METADATA
        ) from None
    # Not `str(value)`: that of an enum's member is its name.
    return str.__str__(value)


def _short(value: object) -> str:
    shown = f"a number of {value.bit_length()} bits" if isinstance(value, int) and abs(value) > 2**128 else repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
