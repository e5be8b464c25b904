"""Imported distributions are declared, with a lower bound, and declared ones are imported."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
DISTRIBUTIONS = {"yaml": "pyyaml"}
"""Distributions of imports that have another name."""
OPTIONAL = {
    "adapters/fsspec_files.py": "fsspec",
    "adapters/xarray_backend.py": "xarray",
    "dask.py": "dask",
    "testing/storage_contract.py": "testing",
    "testing/strategies.py": "testing",
    "testing/trees.py": "testing",
    "xarray.py": "xarray",
}
"""Modules that can be imported only with an extra."""
FOR_TESTS = {"runtime/standard_zstd.py": {"backports", "compression"} - sys.stdlib_module_names}
"""Parts of the standard library of newer Pythons; tests on older ones have `backports`."""
NOT_IMPORTED = {"pyarrow"}
"""Declared for what it does when it is installed."""


def name_of(requirement: str) -> str:
    return re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def imported(tree: ast.AST, *, at_import_only: bool) -> Iterator[str]:
    """Distributions of the absolute imports of other packages."""
    for node in ast.iter_child_nodes(tree):
        if at_import_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.If | ast.Try):
            continue
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module or ""]
        for module in modules:
            top = module.partition(".")[0]
            if top not in sys.stdlib_module_names and top not in ("icechunk", "__future__"):
                yield DISTRIBUTIONS.get(top, top).lower().replace("_", "-")
        yield from imported(node, at_import_only=at_import_only)


FILES = {
    path.relative_to(ROOT / "icechunk").as_posix(): ast.parse(path.read_text("utf-8"))
    for path in (ROOT / "icechunk").rglob("*.py")
}
REQUIRED = {name_of(requirement) for requirement in PROJECT["dependencies"]}
EXTRAS = {
    extra: {name_of(requirement) for requirement in requirements}
    for extra, requirements in PROJECT["optional-dependencies"].items()
}


def beyond(declared: set[str], *, at_import_only: bool) -> dict[str, set[str]]:
    """Other distributions that modules import, by module."""
    found = {name: set(imported(tree, at_import_only=at_import_only)) - declared for name, tree in FILES.items()}
    return {name: others for name, others in found.items() if others}


def test_imports_are_declared() -> None:
    assert beyond(REQUIRED.union(*EXTRAS.values()), at_import_only=False) == FOR_TESTS


def test_modules_are_imported_with_the_dependencies_alone_but_for_those_of_extras() -> None:
    optional = beyond(REQUIRED, at_import_only=True)
    assert set(optional) == set(OPTIONAL)
    for name, others in optional.items():
        assert others <= EXTRAS[OPTIONAL[name]], name


def test_declared_dependencies_are_imported() -> None:
    found = {name for tree in FILES.values() for name in imported(tree, at_import_only=False)}
    assert REQUIRED.union(*EXTRAS.values()) - found <= NOT_IMPORTED


@pytest.mark.parametrize("requirement", PROJECT["dependencies"])
def test_dependencies_have_a_lower_bound_and_no_upper_one(requirement: str) -> None:
    assert re.fullmatch(r"[\w.-]+>=[\d.]+(; python_version (<|>=) '3\.14')?", requirement)
