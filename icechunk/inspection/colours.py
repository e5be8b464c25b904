"""Colours of the lines of a history, legible on light and on dark grounds."""

from __future__ import annotations

from typing import Final

__all__ = ["TAG", "colour", "rgb"]

_LINES: Final = ("#3a9d5d", "#8b63d9", "#d9822b", "#2f8fbf", "#cf4f6b", "#a08c1c", "#2fa39a", "#c05fae")
TAG: Final = "#4a8fe0"
"""Of the names of tags."""


def colour(number: int) -> str:
    """The colour of a line, ``#rrggbb``; neighbours differ, and they repeat after eight."""
    return _LINES[number % len(_LINES)]


def rgb(colour: str) -> tuple[int, int, int]:
    """Red, green and blue of ``#rrggbb``, 0 to 255 each."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
