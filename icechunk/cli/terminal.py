"""Progress, questions and errors of commands, on a terminal or as plain lines."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

__all__ = ["CommandError", "Failure", "Progress", "ask", "choose"]

BAR_COLUMNS = 24


class Progress:
    """Reports steps of known number on a stream: a bar that redraws itself on a terminal, one line a step elsewhere.

    Parameters
    ----------
    total
        Number of steps to come, at least 1.
    stream
        Where to report; usually standard error, so that results on standard output stay clean.
    """

    def __init__(self, total: int, stream: TextIO) -> None:
        self._total = max(total, 1)
        self._done = 0
        self._stream = stream
        self._live = stream.isatty()

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        """Report `label` as under way, and as done with its time when the block ends well."""
        if self._live:
            self._draw(label)
        started = time.perf_counter()
        yield
        self._done = min(self._done + 1, self._total)
        if self._live:
            self._draw(label)
        else:
            width = len(str(self._total))
            print(
                f"[{self._done:>{width}}/{self._total}] {label} ({time.perf_counter() - started:.2f} s)",
                file=self._stream,
                flush=True,
            )

    def close(self) -> None:
        """Take the bar off the screen; later output starts on a clean line."""
        if self._live:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()

    def _draw(self, label: str) -> None:
        filled = BAR_COLUMNS * self._done // self._total
        text = f"[{'█' * filled}{'·' * (BAR_COLUMNS - filled)}] {self._done}/{self._total} {label}"
        columns = shutil.get_terminal_size().columns
        self._stream.write("\r\x1b[2K" + text[: columns - 1])
        self._stream.flush()


class CommandError(Exception):
    """Ends the command with exit code 2 and this one line."""


class Failure(Exception):
    """Ends the command with exit code 1 and this one line."""


_TRIES = 3


def ask(what: str, *, required: bool = True) -> str:
    """A line of text, without blanks around it. Raises `Failure` where none comes."""
    for _ in range(_TRIES):
        print(f"Enter {what}: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            raise Failure(f"Failed to get {what}: the input has ended")
        if line.strip() or not required:
            return line.strip()
    raise Failure(f"Failed to get {what}: it cannot be empty")


def choose(what: str, choices: Sequence[str]) -> str:
    """One of the choices, by its number or its name; the first where the line is empty."""
    print(f"Select {what}:", file=sys.stderr)
    for number, choice in enumerate(choices, 1):
        print(f"  {number}. {choice}", file=sys.stderr)
    answer = ask(f"{what} [{choices[0]}]", required=False) or choices[0]
    for number, choice in enumerate(choices, 1):
        if answer.lower() in (str(number), choice.lower()):
            return choice
    raise Failure(f"{answer!r} is not one of {', '.join(choices)}")
