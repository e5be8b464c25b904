"""Compare the names, signatures and enum values of our package with the official wheel's.

``python tools/parity.py /path/to/oracle/python [name ...]`` prints one line per difference. The official package
is described by a script that runs in its own environment; ours by the same functions in this process.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["MODULES", "compare", "describe", "describe_official"]

MODULES = (
    "icechunk",
    "icechunk.config",
    "icechunk.conflicts",
    "icechunk.credentials",
    "icechunk.dask",
    "icechunk.distributed",
    "icechunk.ops",
    "icechunk.repository",
    "icechunk.session",
    "icechunk.snapshots",
    "icechunk.storage",
    "icechunk.store",
    "icechunk.testing",
    "icechunk.testing.invariants",
    "icechunk.testing.models",
    "icechunk.testing.strategies",
    "icechunk.testing.trees",
    "icechunk.testing.utils",
    "icechunk.types",
    "icechunk.virtual",
    "icechunk.xarray",
)


def describe(modules: Iterable[str]) -> dict[str, Any]:
    """The names of ``modules``, described as JSON values, by module and name; runs unchanged in either environment."""
    result: dict[str, Any] = {}
    for module in modules:
        loaded = importlib.import_module(module)
        listed = set(getattr(loaded, "__all__", ()))
        for name in sorted(listed | {n for n in vars(loaded) if _is_own(loaded, n)}):
            if hasattr(loaded, name):
                result[f"{module}.{name}"] = _describe(getattr(loaded, name), 0)
    return result


def _is_own(module: Any, name: str) -> bool:
    """Whether a name that no ``__all__`` lists is the module's own, and not something that it works with."""
    value = vars(module)[name]
    if name.startswith("__") or inspect.ismodule(value):
        return False
    home = getattr(value, "__module__", None)
    if isinstance(value, type) or inspect.isroutine(value):
        return home is not None and f"{home}.".startswith(f"{module.__name__}.")
    # Constants and aliases have no home, or that of what they are made of.
    return home is None or name.startswith("_") or home.startswith("hypothesis")


def _describe(value: Any, depth: int) -> dict[str, Any]:
    if inspect.ismodule(value):
        return {"what": "module"}
    if isinstance(value, type):
        members: dict[str, Any] = {}
        for name in sorted({*dir(value), *vars(value)}):
            member = inspect.getattr_static(value, name)
            if name.startswith("__") or (name.startswith("_") and name not in ("_0", "_1", "_repr_html_")):
                continue
            if isinstance(member, type):
                # A member of a union inherits its siblings as attributes; no user reaches them that way.
                if depth == 0:
                    members[name] = _describe(member, depth + 1)
                    # A union of ours says so by `issubclass`, without being a base.
                    members[name]["bases"] += [value.__name__] if issubclass(member, value) else []
            elif isinstance(getattr(value, name, None), property):
                members[name] = {"what": "attribute"}
            elif isinstance(member, staticmethod | classmethod):
                members[name] = {
                    "what": "function",
                    "parameters": _parameters(getattr(value, name)),
                    "awaited": _awaited(member.__func__),
                }
            elif type(member).__name__ in ("builtin_function_or_method",):
                members[name] = {"what": "function", "parameters": _parameters(member)}
            elif inspect.isroutine(member):
                members[name] = {"what": "method", "parameters": _parameters(member), "awaited": _awaited(member)}
            elif inspect.isfunction(getattr(value, name, None)):
                shown = getattr(value, name)
                members[name] = {"what": "method", "parameters": _parameters(shown), "awaited": _awaited(shown)}
            elif type(getattr(value, name, None)) is value:
                members[name] = {"what": "enum", "value": _number(getattr(value, name))}
            else:
                members[name] = {"what": "attribute"}
        bases = [base.__name__ for base in value.__mro__[1:]]
        return {
            "what": "class",
            "parameters": _parameters(value),
            "members": members,
            "hashable": _hashable(value),
            "bases": bases,
        }
    if callable(value):
        return {"what": "function", "parameters": _parameters(value), "awaited": _awaited(value)}
    return {"what": "value"}


def _awaited(value: Any) -> bool | None:
    """Whether a call gives something to await; None where the function does not show it."""
    plain = getattr(value, "__func__", value)
    return inspect.iscoroutinefunction(plain) if inspect.isfunction(plain) else None


def _hashable(value: type) -> bool:
    return value.__hash__ is not None


def _number(value: Any) -> int | str | None:
    try:
        return str(value) if isinstance(value, str) else int(value)
    except TypeError:
        return None


def _parameters(value: Any) -> list[list[str]] | None:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return None
    result = []
    for p in signature.parameters.values():
        if p.name in ("self", "$self", "cls"):
            continue
        default = "" if p.default is p.empty else "..." if p.default is ... else _default(p.default)
        result.append([p.name, p.kind.name, default])
    return result


def _default(value: Any) -> str:
    return repr(value) if value is None or isinstance(value, bool | int | str) else "..."


def describe_official(python: str, modules: Iterable[str]) -> dict[str, Any]:
    """`describe` of the official package, in the environment of the interpreter ``python``."""
    script = Path(__file__).read_text() + f"\nprint(json.dumps(describe({list(modules)!r})))\n"
    script = script.replace('if __name__ == "__main__":', "if False:")
    with tempfile.TemporaryDirectory() as folder:
        # Not from the project's folder, where ``import icechunk`` would find ours.
        answer = subprocess.run(
            [python, "-c", script],
            cwd=folder,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"ICECHUNK_LOG": "error"},
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        )
    result: dict[str, Any] = json.loads(answer.stdout)
    return result


def compare(ours: Mapping[str, Any], official: Mapping[str, Any], where: str = "") -> list[str]:
    """Differences that code written for the official package could meet, one line each; what we add is none."""
    lines = []
    for name, theirs in sorted(official.items()):
        full = f"{where}{name}"
        mine = ours.get(name)
        if mine is None:
            lines.append(f"{full}: missing")
            continue
        if mine["what"] != theirs["what"] and {mine["what"], theirs["what"]} != {"method", "function"}:
            lines.append(f"{full}: is {mine['what']}, official {theirs['what']}")
            continue
        if theirs.get("value") is not None and mine.get("value") != theirs["value"]:
            lines.append(f"{full}: value {mine.get('value')}, official {theirs['value']}")
        if None not in (mine.get("awaited"), theirs.get("awaited")) and mine["awaited"] != theirs["awaited"]:
            lines.append(f"{full}: is {'' if mine['awaited'] else 'not '}awaited")
        for base in theirs.get("bases", ()):
            if base not in mine.get("bases", ()) and base not in ("object", "BaseException"):
                lines.append(f"{full}: is no {base}")
        lines += _compare_parameters(full, mine.get("parameters"), theirs.get("parameters"))
        lines += compare(mine.get("members", {}), theirs.get("members", {}), f"{full}.")
    return lines


def _compare_parameters(full: str, mine: list[list[str]] | None, theirs: list[list[str]] | None) -> list[str]:
    if theirs is None or mine is None or mine == theirs:
        return []
    lines = []
    given = {p[0]: p for p in mine}
    for position, (name, kind, default) in enumerate(theirs):
        own = given.get(name)
        if own is None:
            if kind == "POSITIONAL_ONLY" or name.startswith("_"):
                continue
            if any(p[1] == "VAR_KEYWORD" for p in mine):
                continue
            lines.append(f"{full}: no parameter {name!r}")
        elif kind != own[1] and not (kind == "KEYWORD_ONLY" and own[1] == "POSITIONAL_OR_KEYWORD"):
            lines.append(f"{full}: parameter {name!r} is {own[1]}, official {kind}")
        elif "..." not in (default, own[2]) and default and own[2] != default:
            lines.append(f"{full}: parameter {name!r} defaults to {own[2] or 'nothing'}, official {default}")
        elif kind != "KEYWORD_ONLY" and own[1] != "KEYWORD_ONLY" and mine.index(own) != position:
            lines.append(f"{full}: parameter {name!r} is number {mine.index(own)}, official {position}")
    return lines


def main(arguments: list[str]) -> int:
    """Print the differences."""
    python, names = arguments[0], arguments[1:] or list(MODULES)
    lines = compare(describe(names), describe_official(python, names))
    print("\n".join(lines) or "no differences")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
