"""The tests themselves: they assert, expect errors by kind and names, and have a reason for others' private names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

import icechunk

ROOT = Path(__file__).parents[1]
PACKAGE = Path(icechunk.__file__).parent
TREES = ("tests", "tools/loadtest/tests")
FILES = {
    path.relative_to(ROOT): path.read_text("utf-8") for tree in TREES for path in sorted((ROOT / tree).rglob("*.py"))
}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(FILES[path])


def has_reason(path: Path, first: int, last: int, word: str) -> bool:
    """Whether a comment ``# word: reason`` ends one of these lines, or is the line before them."""
    lines = FILES[path].splitlines()
    return any(f"# {word}: " in line for line in lines[first - 1 : last]) or lines[first - 2].strip().startswith(
        f"# {word}: "
    )


# -------------------------------------------------------------------------------------------------------- assertions

HELPERS = ("icechunk/testing", "spec/model", "tools")
"""Folders of functions and classes that assert on behalf of tests, beside the tests themselves."""
ASSERTING = {
    "assert_allclose", "assert_array_equal", "assert_equal", "assert_identical", "raises", "run_state_machine_as_test",
    "warns",
}  # fmt: skip
"""Functions of other packages that assert."""


@dataclass(slots=True)
class Definition:
    """A function or class, with all that is inside it."""

    name: str
    line: int
    asserts: bool = False
    calls: set[str] = field(default_factory=set)
    """Names of the functions and methods that it calls."""


def definitions(tree: ast.Module) -> list[Definition]:
    found: list[Definition] = []

    def visit(node: ast.AST, inside: list[Definition]) -> None:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found.append(Definition(node.name, node.lineno))
                inside = [*inside, found[-1]]
            case ast.Assert():
                for definition in inside:
                    definition.asserts = True
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
                for definition in inside:
                    definition.calls.add(name)
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.expr_context | ast.operator | ast.cmpop):
                visit(child, inside)

    visit(tree, [])
    return found


def asserting_names(definitions: list[Definition]) -> set[str]:
    """Names of functions and classes that assert, or call such a function."""
    names = ASSERTING | {each.name for each in definitions if each.asserts}
    while more := {each.name for each in definitions if each.calls & names} - names:
        names |= more
    return names


def imported_names(tree: ast.Module) -> set[str]:
    """Names that a module imports from others, at its top."""
    return {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


@pytest.mark.thorough
def test_every_test_asserts() -> None:
    """In its body, or in a function that it calls: of its own file, one that is imported, or one that it inherits."""
    of_files = {path: definitions(tree_of(path)) for path in FILES}
    silent = {
        path: [each for each in own if each.name.startswith("test_") and not (each.asserts or each.calls & ASSERTING)]
        for path, own in of_files.items()
    }
    helpers = [path for folder in HELPERS for path in (ROOT / folder).rglob("*.py")]
    asserting = asserting_names(
        [each for own in of_files.values() for each in own]
        + [each for path in helpers for each in definitions(ast.parse(path.read_text("utf-8")))]
    )
    found = []
    for path, tests in silent.items():
        known = asserting & ({each.name for each in of_files[path]} | imported_names(tree_of(path)))
        for test in tests:
            inherits = {"super", test.name} <= test.calls
            if not inherits and not test.calls & known:
                found.append(f"{path}:{test.line} {test.name}")
    assert found == [], "these would pass whatever is the result"


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
        f"{path}:{node.lineno}"
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


OF_TUPLES = {"_asdict", "_fields", "_make", "_replace"}
"""Public names of named tuples."""


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
        words = set(re.findall(NAME, text)) - private_names_of(text)
        room = room_of(path.relative_to("tests")) if path.is_relative_to("tests") else ""
        others = {name for name in words - OF_TUPLES if name in rooms and (not room or room not in rooms[name])}
        found += [
            f"{path}:{line} {name}"
            for line, name in (sorted(set(reached(path))) if others else ())
            if name in others and not has_reason(path, line, line, "private")
        ]
    assert found == [], "these reach private names without `# private: reason`"
