"""The structure: dependencies point down, the pure layers stay pure, and public names are listed."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import icechunk

PACKAGE = Path(icechunk.__file__).parent
FLOORS = [
    {"errors", "sync", "logs", "moments"},
    {"values", "keys", "format", "about", "vendor"},
    {"sources", "status", "snapshots", "conflicts", "log", "types", "inputs", "tasks"},
    {"config", "credentials", "ops", "virtual", "_exceptions", "inspection"},
    {"storage"},
    {"transfer", "refs"},
    {"virtual_access"},
    {"core", "maintenance"},
    {"commit_files", "committing", "reading", "rebasing"},
    {"session"},
    {"forking"},
    {"store", "virtual_writing"},
    {"repository", "distributed", "kerchunk", "cli", "testing"},
    {"dask"},
    {"xarray", "_icechunk_python"},
]
"""Modules and packages from the ground up; each may import from its own floor and from those below."""
IMPURE = {"anyio", "asyncio", "aiobotocore", "aiohttp", "time", "random", "secrets", "os", "threading"}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Dotted names that a module imports when it runs; those for type checkers only are left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in tree.body if top_level else ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(name: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if name in names)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_dependencies_point_down(path: Path) -> None:
    if room(path) == "__init__":
        return
    here = floor(room(path))
    for name in imports(path, top_level=True):
        parts = name.split(".")
        if parts[0] == "icechunk" and len(parts) > 1 and parts[1] not in icechunk.__all__:
            assert floor(parts[1]) <= here, f"{path.relative_to(PACKAGE)} imports {name}"


@pytest.mark.parametrize("layer", ["format", "log"])
def test_pure_layers_know_no_io_no_clock_and_no_chance(layer: str) -> None:
    for path in (PACKAGE / layer).rglob("*.py"):
        impure = {name for name in imports(path) if name.split(".")[0] in IMPURE}
        assert not impure, f"{path.relative_to(PACKAGE)} imports {impure}"


def test_every_module_lists_names_that_it_has() -> None:
    for info in pkgutil.walk_packages([str(PACKAGE)], "icechunk."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{info.name}.{name}"


def test_public_names_and_methods_have_docstrings() -> None:
    missing = []
    for name in icechunk.__all__:
        value = getattr(icechunk, name)
        if typing.get_origin(value) is not None or not callable(value):
            continue
        if not value.__doc__:
            missing.append(name)
        if isinstance(value, type) and value.__module__.startswith("icechunk"):
            for attribute, member in vars(value).items():
                target = getattr(member, "__func__", getattr(member, "fget", member))
                if not attribute.startswith("_") and callable(target) and not getattr(target, "__doc__", None):
                    missing.append(f"{name}.{attribute}")
    assert not missing


def test_asynchronous_methods_have_synchronous_twins_with_the_same_parameters() -> None:
    import inspect

    lonely = {"async_ancestry", "transaction_async"}
    for owner in (icechunk.Repository, icechunk.Session):
        for name, member in inspect.getmembers(owner, callable):
            if not name.endswith("_async") or name in lonely:
                continue
            twin = getattr(owner, name.removesuffix("_async"))
            assert inspect.signature(twin).parameters == inspect.signature(member).parameters, name
