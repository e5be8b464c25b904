"""JSON by orjson, or by the standard library where orjson is not installed, with the same results.

orjson has no wheels for free-threaded Pythons. What the standard library would do otherwise is undone here: it writes
and reads numbers that are not finite, integers of any size and lone surrogates, and raises other errors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from json import JSONDecodeError
from typing import Any, Final

try:
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment]

__all__ = ["JSONDecodeError", "JSONEncodeError", "dumps", "loads", "standard_dumps", "standard_loads"]

JSONEncodeError: Final = TypeError
"""The error of a value that JSON cannot hold; the same as orjson's."""

_INTEGERS: Final = range(-(2**63), 2**64)
_LONGEST_INTEGER: Final = 20
"""Characters of the longest text of an integer in that range."""
_MAX_DEPTH: Final = 254
"""Levels of what orjson writes."""
_MAX_DEPTH_READ: Final = 1024
"""Levels of what orjson reads."""


def standard_dumps(value: Any) -> bytes:
    """The compact UTF-8 text of a value of dicts with text as keys, lists, tuples, text, numbers, booleans and None.

    A float that is not finite becomes null.

    Raises
    ------
    TypeError
        Another value, an integer beyond 64 bits, text with lone surrogates, or nesting deeper than 254.
    """
    try:
        return json.dumps(_writable(value, 0), ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise JSONEncodeError(f"text cannot be written as UTF-8: {error}") from None


def _writable(value: Any, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise JSONEncodeError(f"nested deeper than {_MAX_DEPTH} levels")
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        if value not in _INTEGERS:
            raise JSONEncodeError(f"integer {value} does not fit into 64 bits")
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise JSONEncodeError("the key of a dict is not text")
        return {key: _writable(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_writable(item, depth + 1) for item in value]
    raise JSONEncodeError(f"type {type(value).__name__} has no JSON")


def standard_loads(data: bytes | bytearray | memoryview | str) -> Any:
    """The value of a JSON text in UTF-8; an integer beyond 64 bits becomes a float.

    Raises
    ------
    JSONDecodeError
        It is no JSON, or has NaN, an infinity, a float beyond the range of floats, or a lone surrogate in it.
    """
    try:
        text = data if isinstance(data, str) else str(data, "utf-8")
        text.encode()
    except UnicodeError as error:
        raise JSONDecodeError(f"not UTF-8 ({error})", "", 0) from None
    if text.startswith("\ufeff"):
        raise JSONDecodeError("a byte order mark", text, 0)
    try:
        value = json.loads(text, parse_constant=_refuse, parse_int=_integer, parse_float=_float)
    except RecursionError:
        raise JSONDecodeError("nested too deep", text, 0) from None
    except JSONDecodeError:
        raise
    except ValueError as error:
        raise JSONDecodeError(str(error), text, 0) from None
    if text.count("[") + text.count("{") > _MAX_DEPTH_READ and not _is_shallow(value):
        raise JSONDecodeError("nested too deep", text, 0)
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise JSONDecodeError("a lone surrogate", text, text.index("\\u")) from None
    return value


def _is_shallow(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH_READ):
        level = [
            item
            for one in level
            if isinstance(one, (dict, list))
            for item in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return True
    return not any(isinstance(one, (dict, list)) for one in level)


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no JSON")


def _integer(text: str) -> int | float:
    if len(text) <= _LONGEST_INTEGER and (number := int(text)) in _INTEGERS:
        return number
    return _float(text)


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"number {text} is beyond the range of floats")
    return number


dumps: Callable[[Any], bytes] = standard_dumps if orjson is None else orjson.dumps
loads: Callable[[bytes | bytearray | memoryview | str], Any] = standard_loads if orjson is None else orjson.loads
