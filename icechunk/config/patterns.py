"""Regular expressions from configurations that others wrote, searched in bounded time.

A persisted configuration may hold any expression, and one such as ``^(a+)+$`` keeps Python's engine busy for a time
that doubles with each character. So an expression is searched by Python's engine only where an estimate of its steps is
small, which holds for nearly all that people write; the others are searched as a nondeterministic automaton, whose time
is the product of the lengths of expression and text. An automaton knows neither references back nor looking around, and
they are refused, as the official library's engine refuses them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple, TypeAlias

__all__ = ["Pattern", "PatternError"]

_parser: Any = re._parser  # type: ignore[attr-defined]
_MAX_STEPS: Final = 1_000_000
"""Steps that Python's engine may take; some 10 ms."""
_MAX_STATES: Final = 1_000

_Test: TypeAlias = Callable[[str], object]
_At: TypeAlias = Callable[[str, int], bool]


class PatternError(ValueError):
    """No regular expression, or one that cannot be searched in bounded time."""


class _Node(NamedTuple):
    test: _Test | None
    """Condition on the next character; None: none is read."""
    at: _At | None
    """Condition on this position; None: none."""
    following: tuple[int, ...]


class Pattern:
    """A compiled expression. Raises `PatternError` where it is none."""

    def __init__(self, expression: str) -> None:
        try:
            translated = _translated(expression)
            self._tree = _parser.parse(translated)
            self._quick = re.compile(translated)
            self._quick_length = 0
            self._nodes: list[_Node] = [_Node(None, None, ())]
            self._start = self._sequence(self._tree, 0, self._tree.state.flags)
        except (re.error, RecursionError, OverflowError) as error:
            raise PatternError(str(error)) from error

    def search(self, text: str) -> bool:
        """Whether the expression matches anywhere in the text."""
        n = len(text) + 1
        if n <= self._quick_length or _steps(self._tree, n) * n <= _MAX_STEPS:
            self._quick_length = max(n, self._quick_length)
            return self._quick.search(text) is not None
        live: set[int] = set()
        for position in range(n):
            live = self._reached(text, position, [*live, self._start])
            if 0 in live:
                return True
            if position < len(text):
                live = self._after(live, text[position])
        return False

    def _reached(self, text: str, position: int, states: Iterable[int]) -> set[int]:
        """The states that are reached without reading a character; 0 is the end."""
        found: set[int] = set()
        stack = list(states)
        while stack:
            state = stack.pop()
            if state in found:
                continue
            node = self._nodes[state]
            if node.at is not None and not node.at(text, position):
                continue
            found.add(state)
            if node.test is None:
                stack.extend(node.following)
        return found

    def _after(self, states: set[int], character: str) -> set[int]:
        nodes = (self._nodes[state] for state in states)
        return {next_ for node in nodes if node.test is not None and node.test(character) for next_ in node.following}

    # -- making the automaton, from the end ------------------------------------------------------------------------

    def _add(self, test: _Test | None, at: _At | None, *following: int) -> int:
        if len(self._nodes) >= _MAX_STATES:
            raise PatternError(f"it needs more than {_MAX_STATES} states")
        self._nodes.append(_Node(test, at, following))
        return len(self._nodes) - 1

    def _sequence(self, items: Any, following: int, flags: int) -> int:
        for item in reversed(list(items)):
            following = self._item(item, following, flags)
        return following

    def _item(self, item: tuple[Any, Any], following: int, flags: int) -> int:
        name, value = str(item[0]), item[1]
        match name:
            case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN":
                return self._add(_single([item], flags), None, following)
            case "AT":
                return self._add(None, _position(str(value), flags), following)
            case "BRANCH":
                return self._add(None, None, *(self._sequence(branch, following, flags) for branch in value[1]))
            case "SUBPATTERN":
                _, added, removed, body = value
                return self._sequence(body, following, (flags | added) & ~removed)
            case "MAX_REPEAT" | "MIN_REPEAT":
                low, high, body = value
                return self._repeat(low, high, body, following, flags)
        raise PatternError(f"{name.lower().replace('_', ' ')} is not supported in patterns of a configuration")

    def _repeat(self, low: int, high: Any, body: Any, following: int, flags: int) -> int:
        state = following
        if high == _parser.MAXREPEAT:
            state = self._add(None, None, following)
            again = self._sequence(body, state, flags)
            self._nodes[state] = _Node(None, None, (again, following))
        else:
            for _ in range(int(high) - low):
                state = self._add(None, None, self._sequence(body, state, flags), following)
        for _ in range(low):
            before, state = state, self._sequence(body, state, flags)
            if state == before:
                # It reads and tests nothing, for any number of repetitions, such as four thousand million.
                break
        return state


_POSIX: Final = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "ascii": r"\x00-\x7f",
    "blank": r"\t ",
    "cntrl": r"\x00-\x1f\x7f",
    "digit": "0-9",
    "graph": "!-~",
    "lower": "a-z",
    "print": " -~",
    "punct": r"!-/:-@\[-`{-~",
    "space": r"\t\n\v\f\r ",
    "upper": "A-Z",
    "word": "0-9A-Za-z_",
    "xdigit": "0-9A-Fa-f",
}
_LETTERS: Final = r"[^\W\d_]"
_PROPERTIES: Final = {"L": _LETTERS, "Letter": _LETTERS, "Alphabetic": _LETTERS, "Nd": r"\d", "N": r"\d"}
_ESCAPE: Final = re.compile(r"\\(?:[xuU]\{([0-9A-Fa-f]+)\}|p\{(\w+)\}|p([A-Z])|([PZ])|(z)|.)", re.DOTALL)
_POSIX_CLASS: Final = re.compile(r"\[:(\^?)(\w+):\]")
_OPENING: Final = re.compile(r"\[\^?\]?")
_NAMED_GROUP: Final = re.compile(r"\(\?<(?=[A-Za-z_])")


def _translated(expression: str) -> str:
    """An expression of the official library's engine (Rust's ``regex``) as Python writes it.

    Raises `PatternError` for a part that Python's engine would read as something else, or cannot express.
    """
    found: list[str] = []
    at, inside = 0, False
    while at < len(expression):
        if (escape := _ESCAPE.match(expression, at)) is not None:
            found.append(_escaped(escape, inside))
            at = escape.end()
        elif inside and (posix := _POSIX_CLASS.match(expression, at)) is not None:
            if posix[1] or posix[2] not in _POSIX:
                raise PatternError(f"{posix[0]} is not supported in patterns of a configuration")
            found.append(_POSIX[posix[2]])
            at = posix.end()
        elif inside and (expression[at] == "[" or expression[at : at + 2] in ("&&", "--", "~~")):
            raise PatternError("classes within classes are not supported in patterns of a configuration")
        elif not inside and (opening := _OPENING.match(expression, at)) is not None:
            found.append(opening[0])
            at, inside = opening.end(), True
        elif not inside and (group := _NAMED_GROUP.match(expression, at)) is not None:
            found.append("(?P<")
            at = group.end()
        else:
            inside = inside and expression[at] != "]"
            found.append(expression[at])
            at += 1
    return "".join(found)


def _escaped(escape: re.Match[str], inside: bool) -> str:
    code, long, short, unsupported, end = escape.groups()
    if code is not None and int(code, 16) <= 0x10FFFF:
        return re.escape(chr(int(code, 16)))
    if end is not None:
        return r"\Z"
    name = long or short
    if name is None and unsupported is None and code is None:
        return escape[0]
    known = _PROPERTIES.get(name or "")
    if known is None or (inside and known is _LETTERS):
        raise PatternError(f"{escape[0]} is not supported in patterns of a configuration")
    return known


def _single(items: list[tuple[Any, Any]], flags: int) -> _Test:
    """A test of one character, made of the parsed set or literal, by Python's engine."""
    tree = _parser.SubPattern(_parser.State(), items)
    tree.state.flags, tree.state.str = flags, ""
    test: _Test = re._compiler.compile(tree, flags).fullmatch  # type: ignore[attr-defined]
    return test


def _position(name: str, flags: int) -> _At:
    multiline = bool(flags & re.MULTILINE)
    match name:
        case "AT_BEGINNING" if not multiline:
            return lambda _, i: i == 0
        case "AT_BEGINNING_STRING":
            return lambda _, i: i == 0
        case "AT_BEGINNING":
            return lambda text, i: i == 0 or text[i - 1] == "\n"
        case "AT_END" if multiline:
            return lambda text, i: i == len(text) or text[i] == "\n"
        case "AT_END":
            return lambda text, i: i == len(text) or (i == len(text) - 1 and text[i] == "\n")
        case "AT_END_STRING":
            return lambda text, i: i == len(text)
        case "AT_BOUNDARY" | "AT_NON_BOUNDARY":
            search = re.compile(r"\b" if name == "AT_BOUNDARY" else r"\B", flags & re.ASCII)
            # In Python's engine an empty text has neither.
            return lambda text, i: search.match(text, i) is not None
    raise PatternError(f"{name.lower().replace('_', ' ')} is not supported in patterns of a configuration")


def _steps(items: Any, n: int) -> float:
    """Ways through a text of ``n`` characters that Python's engine has from one start: about so many at most."""
    steps = 1.0
    for name, value in items:
        match str(name):
            case "BRANCH":
                steps *= sum(_steps(branch, n) for branch in value[1])
            case "SUBPATTERN":
                steps *= _steps(value[3], n)
            case "MAX_REPEAT" | "MIN_REPEAT":
                low, high, body = value
                inner = _steps(body, n)
                if high == 1:
                    steps *= 1 + inner
                else:
                    # Repetitions within one another make it exponential.
                    steps *= min(n, int(high)) if inner == 1 else float("inf")
                    steps = max(steps, low)
    return steps
