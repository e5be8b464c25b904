"""Questions on a terminal, or answered by the lines of standard input where that is none."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from icechunk.cli.failure import Failure

__all__ = ["ask", "choose"]

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
