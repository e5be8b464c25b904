"""Numbers as text, with units."""

from __future__ import annotations

import math

__all__ = ["bytes_text", "number_text", "rate_text", "ratio_text", "seconds_text"]


def number_text(value: float) -> str:
    """Three significant digits, thousands with a thin space."""
    if math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def bytes_text(count: float) -> str:
    """Bytes with a binary unit."""
    units = iter(("B", "KiB", "MiB"))
    unit = next(units)
    while abs(count) >= 1024 and unit != "GiB":
        count /= 1024
        unit = next(units, "GiB")
    digits = f"{count:.1f}".removesuffix(".0") if count < 100 else f"{count:.0f}"
    return f"{digits} {unit}"


def seconds_text(seconds: float) -> str:
    """Seconds with the unit that fits."""
    if math.isnan(seconds):
        return "–"
    if seconds == 0:
        return "0 s"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def rate_text(rate: float, unit: str) -> str:
    """Units per second."""
    return f"{number_text(rate)} {unit}/s"


def ratio_text(ratio: float) -> str:
    """A ratio, like ``2.00×``; a dash where there is none."""
    return "–" if math.isnan(ratio) or math.isinf(ratio) else f"{number_text(ratio)}×"
