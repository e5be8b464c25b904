"""Reading zarr.json documents: all JSON that the official library keeps, some of which orjson refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from icechunk.runtime import json_codec

__all__ = ["parse_document"]

_MAX_SHOWN: Final = 3


def parse_document(data: bytes) -> Any:
    """The value of a JSON document.

    Escaped lone surrogates, which a Latin-1 attribute of an HDF5 file becomes, are kept, and numbers beyond the range
    of a float are infinite.

    Raises
    ------
    ValueError
        It is no JSON. Where that is for ``NaN`` or an infinity, which JSON does not have, the message names the place.
    """
    try:
        return json_codec.loads(data)
    except json_codec.JSONDecodeError as error:
        refused = error
    constants: list[_Constant] = []

    def constant(word: str) -> _Constant:
        constants.append(_Constant(word))
        return constants[-1]

    try:
        document = json.loads(data.decode(), parse_constant=constant)
    except (ValueError, RecursionError):
        raise ValueError(f"not JSON ({refused})") from None
    if constants:
        places = list(_places(document, ""))
        shown = ", ".join(places[:_MAX_SHOWN]) + (f" and {len(places) - _MAX_SHOWN} more" if len(places) > 3 else "")
        raise ValueError(f"not JSON: {shown}; write such numbers as text, or leave them out")
    return document


class _Constant(str):
    """A word that Python's parser knows and JSON does not."""

    __slots__ = ()


def _places(value: Any, place: str) -> Iterator[str]:
    """Positions of such words."""
    if isinstance(value, _Constant):
        yield f"{place} is {value}"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _places(item, f"{place}[{key!r}]" if place else key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _places(item, f"{place}[{i}]")
