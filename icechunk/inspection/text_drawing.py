"""A history as text: box-drawing characters, with the colours of ANSI terminals or without."""

from __future__ import annotations

from icechunk.inspection.colours import TAG, rgb
from icechunk.inspection.colours import colour as line_colour
from icechunk.inspection.layout import Drawing, Row

__all__ = ["draw_text"]

_BOLD, _DIM, _ITALIC, _RESET = "\x1b[1m", "\x1b[2m", "\x1b[3m", "\x1b[0m"


def draw_text(drawing: Drawing, *, plain: bool) -> str:
    """Two lines for each snapshot (one for the last), the final one ended by a newline; empty for an empty history."""
    pen = _Pen(plain)
    lines: list[str] = []
    for i, row in enumerate(drawing.rows):
        lines.append(pen.snapshot(row, drawing.lanes))
        if i + 1 < len(drawing.rows):
            lines.append(pen.between(row, drawing.lanes))
    return "".join(f"{line}\n" for line in lines)


class _Pen:
    def __init__(self, plain: bool) -> None:
        self._plain = plain

    def snapshot(self, row: Row, lanes: int) -> str:
        cells = []
        last = row.joining[-1] if row.joining else row.lane
        for lane in range(lanes):
            number = row.colours[lane] if lane < len(row.colours) else None
            # What goes to the next joining lane has its colour, as the bend at its end.
            towards = next((row.colours[end] for end in row.joining if end > lane), None)
            if lane == row.lane:
                cells.append(self._line(number, "●"))
            elif row.lane < lane <= last:
                crossed = "╯" if lane == last else "┴" if lane in row.joining else "─" if number is None else "┼"
                cells.append(self._line(towards if crossed == "─" else number, crossed))
            else:
                cells.append(" " if number is None else self._line(number, "│"))
            cells.append(self._line(towards, "─") if row.lane <= lane < last else " ")
        names = [self._styled(name, _BOLD + self._code(row.colours[row.lane])) for name in row.branches]
        names += [self._styled(name, _BOLD + _ITALIC + _ansi(TAG)) for name in row.tags]
        refs = f"({', '.join(names)}) " if names else ""
        return "".join(cells) + self._styled(row.short_id, _DIM) + f" {refs}{row.message}"

    def between(self, row: Row, lanes: int) -> str:
        cells = []
        for lane in range(lanes):
            number = row.colours[lane] if lane < len(row.colours) else None
            ends = lane in row.joining or (lane == row.lane and not row.continues)
            cells.append("  " if number is None or ends else self._line(number, "│") + " ")
        return "".join(cells)

    def _line(self, number: int | None, text: str) -> str:
        return self._styled(text, self._code(number))

    def _code(self, number: int | None) -> str:
        return "" if number is None else _ansi(line_colour(number))

    def _styled(self, text: str, codes: str) -> str:
        return text if self._plain or not codes else f"{codes}{text}{_RESET}"


def _ansi(colour: str) -> str:
    return "\x1b[38;2;{};{};{}m".format(*rgb(colour))
