"""The tests themselves: errors are expected by kind and names, and private names of other rooms have a reason."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import icechunk

TESTS = Path(__file__).parent
PACKAGE = Path(icechunk.__file__).parent
FILES = {path.relative_to(TESTS): path.read_text("utf-8") for path in sorted(TESTS.rglob("*.py"))}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(FILES[path])


def has_reason(path: Path, first: int, last: int, word: str) -> bool:
    """Whether a comment ``# word: reason`` ends one of these lines, or is the line before them."""
    lines = FILES[path].splitlines()
    return any(f"# {word}: " in line for line in lines[first - 1 : last]) or lines[first - 2].strip().startswith(
        f"# {word}: "
    )


# ---------------------------------------------------------------------------------------------- words of messages


def has_words(value: ast.AST) -> bool:
    """Whether a text is more than a name: it has a space in it."""
    return any(
        isinstance(part, ast.Constant) and isinstance(part.value, str) and " " in part.value for part in ast.walk(value)
    )


SUSPECT = re.compile(r'\bmatch=(?!re\.escape\([^ ]*\))|\braises\(($|.*" ?.* .*")', re.MULTILINE)
"""Files without it need not be parsed."""


def expectations_of_words(path: Path) -> Iterator[ast.Call]:
    """Calls of ``raises`` and ``warns`` whose ``match`` is no escaped name, or whose names are words."""
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id == "raises" and any(map(has_words, node.args[2:])):
            yield node
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("raises", "warns"):
            for match in (keyword.value for keyword in node.keywords if keyword.arg == "match"):
                escaped = isinstance(match, ast.Call) and ast.unparse(match.func) == "re.escape"
                if not escaped or has_words(match):
                    yield node


def test_errors_are_expected_by_kind_and_names_and_words_have_a_reason() -> None:
    """The way to expect class, kind and names is `tests.raising.raises`."""
    found = [
        f"tests/{path}:{node.lineno}"
        for path, text in FILES.items()
        if SUSPECT.search(text)
        for node in expectations_of_words(path)
        if not has_reason(path, node.lineno, node.end_lineno or node.lineno, "words")
    ]
    assert found == [], "these expect words without `# words: reason`"


# -------------------------------------------------------------------------------------- private names of other rooms

NAME = r"(_[A-Za-z]\w*)"
DEFINITION = re.compile(
    rf"^\s*(?:async def|def|class) {NAME}|\b(?:self|cls)\.{NAME}(?:: [^=]*)? =|^\s*{NAME}(?:: | = )", re.MULTILINE
)


def private_names_of(text: str) -> set[str]:
    """Private names that a module defines: functions, classes, fields, constants."""
    return {name for found in DEFINITION.findall(text) for name in found if name and not name.endswith("_")}


def room_of(path: Path) -> str:
    """The room of a module or of a test, from its path below the package or below ``tests``; empty if in none."""
    parts = path.parts[:-1]
    return "/".join(parts[: 2 if parts[:1] == ("log",) else 1])


def rooms_of_private_names() -> dict[str, set[str]]:
    """For each private name of the package, the rooms that define it."""
    rooms: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for name in private_names_of(path.read_text("utf-8")):
            rooms.setdefault(name, set()).add(room_of(path.relative_to(PACKAGE)))
    return rooms


def reached(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of what a test takes from elsewhere: attributes, imports, texts given to ``setattr`` and others."""
    for node in ast.walk(tree_of(path)):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case ast.Attribute(attr=name):
                yield node.end_lineno or node.lineno, name
            case ast.Call(func=ast.Name(id="getattr" | "setattr") | ast.Attribute(attr="setattr" | "__setattr__")):
                for argument in node.args:
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                        yield node.lineno, argument.value.rpartition(".")[2]
            case ast.ImportFrom(names=names):
                yield from ((alias.lineno, alias.name) for alias in names)


def test_private_names_of_another_room_are_reached_only_with_a_reason() -> None:
    """The room of a test is its folder; tests that are in none have all rooms for others."""
    rooms = rooms_of_private_names()
    found = []
    for path, text in FILES.items():
        # Of a named tuple `_replace` is public.
        words = set(re.findall(NAME, text)) - private_names_of(text) - {"_replace"}
        others = {name for name in words if name in rooms and (not room_of(path) or room_of(path) not in rooms[name])}
        found += [
            f"tests/{path}:{line} {name}"
            for line, name in (sorted(set(reached(path))) if others else ())
            if name in others and not has_reason(path, line, line, "private")
        ]
    assert found == [], "these reach private names without `# private: reason`"
