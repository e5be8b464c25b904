"""A drawing of a repository's history, as users get it."""

from __future__ import annotations

from typing import final

from icechunk.inspection.layout import Drawing
from icechunk.inspection.svg_drawing import draw_svg
from icechunk.inspection.text_drawing import draw_text

__all__ = ["AncestryGraph"]


@final
class AncestryGraph:
    """A drawing of history: text where it is printed, a picture in a notebook.

    Made by `Repository.ancestry_graph`. Names and messages are shown without control characters, and escaped in the
    picture, so that nothing in them acts on a terminal or a page.
    """

    __slots__ = ("_drawing", "_plain")

    def __init__(self, drawing: Drawing, *, plain: bool = False) -> None:
        self._drawing = drawing
        self._plain = plain

    def __repr__(self) -> str:
        return draw_text(self._drawing, plain=self._plain)

    __str__ = __repr__

    def _repr_svg_(self) -> str:
        return draw_svg(self._drawing, plain=self._plain)
