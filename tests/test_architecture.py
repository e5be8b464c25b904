"""The structure: dependencies point down, the pure layers stay pure, and public names are listed."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import re
import typing
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import icechunk

PACKAGE = Path(icechunk.__file__).parent
ROOT = PACKAGE.parent
FLOORS = [
    {"errors", "format.ids"},
    {"runtime"},
    {"format"},
    {"conflicts", "types", "ops"},
    {"log.session"},
    {"config", "credentials", "virtual", "inspection"},
    {"snapshots"},
    {"storage"},
    {"transfer"},
    {"log.repository", "log.repository.events"},
    {"log.repository.state"},
    {"log.repository.event_json", "log.repository.entry", "log.repository.marker"},
    {"log.repository.port", "log.repository.freshness"},
    {"log.repository.objects", "log.repository.ops_log", "log.repository.store_check", "log.repository.tokens"},
    {"log.repository.conditional", "log.repository.queue", "log.repository.settle"},
    {"log.repository.entries", "log.repository.ref_files", "log.repository.repo_object"},
    {"log.repository.successors", "log.repository.create", "log.repository.open", "log.repository.convert"},
    {"maintenance", "virtual_access"},
    {"store"},
    {"session"},
    {"appender"},
    {"repository"},
    {"distributed", "kerchunk"},
    {"dask"},
    {"xarray", "adapters"},
    {"cli", "testing", "_public", "_icechunk_python"},
]
"""Rooms from the ground up; each may import from its own floor and from those below; the longest name counts."""
IMPURE = {
    "aiobotocore", "aiohttp", "anyio", "asyncio", "concurrent", "datetime", "http", "logging", "os", "pathlib",
    "random", "secrets", "socket", "subprocess", "tempfile", "threading", "time", "uuid",
}  # fmt: skip
PURE = [
    "format", "log.session", "log.repository.events", "log.repository.state", "log.repository.event_json",
    "log.repository.entry", "log.repository.marker",
]  # fmt: skip
"""Rooms and modules without I/O, clock and chance."""
SIBLINGS = ["log.repository.entries", "log.repository.ref_files", "log.repository.repo_object"]
"""The three layouts of the repository log. They share the modules of `log.repository` below them."""

SEAMS = {
    "immutables": {"runtime.persistent_map"},
    "pyrsistent": {"runtime.persistent_map"},
    "orjson": {"runtime.json_codec"},
    "zstandard": {"runtime.zstd"},
    "backports": {"runtime.standard_zstd"},
    "compression": {"runtime.standard_zstd"},
}
"""Libraries that some Pythons lack, and the modules that have a stand-in for them."""

_KINDS = ("storage.http", "storage.local", "storage.obstore", "storage.s3")
SAME_NAMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "client": ("what one process knows of a log in this layout, and does to it", tuple(SIBLINGS)),
    "codec": ("the file's envelope and its root table", ("format.repo", "format.snapshot")),
    "events": ("the facts of this log", ("log.repository", "log.session")),
    "layout": ("what a log is in this layout", tuple(SIBLINGS)),
    "port": ("the protocol that other rooms see", ("log.repository", "storage", "store")),
    "reading": ("reads from this kind of storage", ("storage.http", "storage.obstore")),
    "repository": (
        "the class named like its room; of the configuration: pickles name the module",
        ("config", "repository"),
    ),
    "storage": ("this kind of storage; of the configuration: pickles name the module", ("config", *_KINDS)),
}
"""Names that several files have, with the part that they play in each of their rooms, and these."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below ``icechunk``; the package itself is the empty name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """Dotted names of all that a module imports: at its top, inside functions, and for type checkers only."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_modules(path: Path) -> set[str]:
    """Modules of the package, named as in `modules`, that a module imports or imports from."""
    found = set()
    for name in imports(path):
        first, _, rest = name.partition(".")
        if first == "icechunk":
            found.add(rest if rest in MODULES else rest.rpartition(".")[0])
    return found


def floor(module: str) -> int:
    fitting = [
        (len(room), i) for i, rooms in enumerate(FLOORS) for room in rooms if f"{module}.".startswith(f"{room}.")
    ]
    assert fitting, f"{module} has no floor"
    return max(fitting)[1]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_dependencies_point_down(module: str) -> None:
    if module in ("", "log"):
        return
    for other in imported_modules(MODULES[module]) - {""}:
        assert floor(other) <= floor(module), f"{module} imports {other}"


def test_there_is_no_circle_of_imports() -> None:
    graph = {module: imported_modules(path) - {module} for module, path in MODULES.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"circle of imports: {error.args[1]}")


@pytest.mark.parametrize("layout", SIBLINGS)
def test_layouts_do_not_know_one_another(layout: str) -> None:
    for module, path in MODULES.items():
        if f"{module}.".startswith(f"{layout}."):
            others = {
                other for other in imported_modules(path) for room in SIBLINGS if f"{other}.".startswith(f"{room}.")
            }
            assert all(f"{other}.".startswith(f"{layout}.") for other in others), f"{module} imports {others}"


@pytest.mark.parametrize("room", PURE)
def test_pure_packages_import_no_io_no_clock_and_no_randomness(room: str) -> None:
    for module, path in MODULES.items():
        if f"{module}.".startswith(f"{room}."):
            impure = {name for name in imports(path) if name.split(".")[0] in IMPURE}
            assert not impure, f"{module} imports {impure}"


@pytest.mark.parametrize("library", SEAMS)
def test_a_library_that_some_pythons_lack_is_imported_where_it_has_a_stand_in(library: str) -> None:
    found = {module for module, path in MODULES.items() if any(name.split(".")[0] == library for name in imports(path))}
    assert found == SEAMS[library]


@pytest.mark.parametrize(
    "package", sorted(name for name, path in MODULES.items() if path.name == "__init__.py" and name)
)
def test_every_package_says_what_belongs_there_and_where_its_neighbours_are(package: str) -> None:
    """A docstring says what a package holds and, after "Not here:", what it must not hold and the place of that.

    The package itself is left out: its docstring is for users.
    """
    docstring = ast.get_docstring(ast.parse(MODULES[package].read_text()))
    assert docstring
    holds, found, excluded = " ".join(docstring.split()).partition(" Not here: ")
    assert holds
    assert found
    places = re.findall(r"(?<!`)`([\w./]+)`(?!`)", excluded)
    assert places
    for place in places:
        is_there = (ROOT / place).is_dir() if place.endswith("/") else place in MODULES and place != package
        assert is_there, place


def test_two_files_have_one_name_only_if_they_play_one_part_in_sibling_rooms() -> None:
    rooms: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        if path.name != "__init__.py":
            room, _, name = module.rpartition(".")
            rooms.setdefault(name, set()).add(room)
    assert {name: found for name, found in rooms.items() if len(found) > 1} == {
        name: set(found) for name, (_, found) in SAME_NAMES.items()
    }


def test_every_module_lists_names_that_it_has() -> None:
    for info in pkgutil.walk_packages([str(PACKAGE)], "icechunk."):
        if info.name.endswith("__main__"):
            continue
        if info.name == "icechunk.adapters.zarr_url" and not importlib.util.find_spec("zarr.abc.url_pipeline"):
            continue  # the zarr that is installed knows no URL pipelines
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{info.name}.{name}"


def test_public_names_and_methods_have_docstrings() -> None:
    missing = []
    for name in getattr(icechunk, "__all__"):  # noqa: B009  made when it is first asked for
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


def test_synchronous_twins_are_final_so_that_every_type_checker_infers_their_signature() -> None:
    twin = re.compile(r"^\s*(\w+)(?:: (Final))? = (?:staticmethod\()?synchronous\(", re.MULTILINE)
    found = [match for path in MODULES.values() for match in twin.findall(path.read_text("utf-8"))]
    assert len(found) > 50
    assert [name for name, final in found if not final] == []


def test_asynchronous_methods_have_synchronous_twins_with_the_same_parameters() -> None:
    import inspect

    lonely = {"async_ancestry", "transaction_async"}
    for owner in (icechunk.Repository, icechunk.Session):
        for name, member in inspect.getmembers(owner, callable):
            if not name.endswith("_async") or name in lonely:
                continue
            twin = getattr(owner, name.removesuffix("_async"))
            assert inspect.signature(twin).parameters == inspect.signature(member).parameters, name
