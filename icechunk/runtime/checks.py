"""What callers hand in, checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from icechunk.errors import ErrorKind, InvalidInputError

__all__ = ["WrongTypeError", "json_metadata", "require_text", "require_type"]

_MAX_INT: Final = 2**64 - 1
_MIN_INT: Final = -(2**63)
_MAX_DEPTH: Final = 100


class WrongTypeError(InvalidInputError, TypeError):
    """An argument of a type that is not accepted there; also a `TypeError`, as the official library raises."""


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
    """Refuse what is not text, or cannot be written as UTF-8. Raises `WrongTypeError`, `InvalidInputError`."""
    require_type(name, value, str)
    _text(name, str(value))


def json_metadata(name: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of metadata that every reader of the format can read; empty for None.

    JSON values: None, bool, int of 64 bits, float, str, list or tuple, mapping with str keys. Not-a-number and
    infinities are kept; readers with strict JSON, the official library among them, see null.

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
        case float():
            return float(value)
        case list() | tuple():
            return [_plain(f"{name}[{i}]", item, depth + 1) for i, item in enumerate(value)]
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
    return str(value)


def _short(value: object) -> str:
    shown = f"a number of {value.bit_length()} bits" if isinstance(value, int) and abs(value) > 2**128 else repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
