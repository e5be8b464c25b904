"""The page about the architecture agrees with the code: its functions exist, and are passed in its order."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest
import zarr.api.asynchronous as azarr
from zarr.core.buffer import default_buffer_prototype

import icechunk

PAGE = Path(__file__).parent.parent / "docs" / "architecture.md"
JOURNEYS = ["A chunk is written", "A chunk is read", "A commit"]
PROTOTYPE = default_buffer_prototype()


def journey(title: str) -> list[str]:
    """Dotted names of the functions that a journey lists, in order."""
    section = PAGE.read_text(encoding="utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\d+\. `([\w.]+)`", section, re.MULTILINE)


def code_of(dotted: str) -> CodeType:
    """The code of a function or method. Fails where there is none."""
    parts = dotted.split(".")
    for i in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for name in parts[i:]:
            found = getattr(found, name)
        code: CodeType = found.__code__
        return code
    raise AssertionError(dotted)


async def passed(work: Callable[[], Coroutine[Any, Any, Any]], wanted: list[str]) -> list[str]:
    """The functions that were called while something ran, in the order of their first calls."""
    names = {code_of(name): name for name in wanted}
    found: dict[str, None] = {}

    def watch(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in names:
            found.setdefault(names[frame.f_code])

    sys.setprofile(watch)
    try:
        await work()
    finally:
        sys.setprofile(None)
    return list(found)


async def repository() -> icechunk.Repository:
    config = icechunk.RepositoryConfig(inline_chunk_threshold_bytes=0)
    repo = await icechunk.Repository.create_async(icechunk.in_memory_storage(), config)
    session = await repo.writable_session_async("main")
    array = await azarr.create_array(
        store=session.store, name="a", shape=(8, 64), chunks=(1, 64), dtype="i8", compressors=None
    )
    await array.setitem(slice(0, 4), np.ones((4, 64), "i8"))
    await session.commit_async("four chunks")
    return repo


def arrows() -> tuple[dict[str, str], dict[str, set[str]]]:
    """The node of each room of the diagram, and the nodes that each node's arrows lead to."""
    diagram = PAGE.read_text(encoding="utf-8").partition("```mermaid")[2].partition("```")[0]
    node_of = {
        room.strip().strip("/"): node
        for node, text in re.findall(r'(\w+)\["(.*?)(?: —.*?)?"\]', diagram)
        for room in text.split("·")
    }
    leads_to: dict[str, set[str]] = {node: set() for node in node_of.values()}
    for source, target in re.findall(r'^    (\w+)(?:\[".*?"\])? --> (\w+)', diagram, re.MULTILINE):
        leads_to[source].add(target)
    return node_of, leads_to


def room_of(module: str) -> str:
    """The room of a module, both named below the package: a folder, one of the two logs, or a single module."""
    parts = module.split(".")
    return "/".join(parts[:2]) if parts[0] == "log" and len(parts) > 1 else parts[0]


def imports_of_rooms() -> set[tuple[str, str]]:
    """Pairs of rooms of which the first imports the second."""
    package = Path(icechunk.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        source = room_of(".".join(path.relative_to(package).with_suffix("").parts))
        for target in re.findall(r"^ *from icechunk\.([\w.]+) import ", path.read_text(encoding="utf-8"), re.MULTILINE):
            found.add((source, room_of(target)))
    return found


def test_the_diagram_has_every_room() -> None:
    package = Path(icechunk.__file__).parent
    folders = {path.parent.name for path in package.glob("*/__init__.py")} - {"log"}
    modules = {"xarray", "dask", "distributed", "kerchunk"}
    assert set(arrows()[0]) == folders | modules | {"log/session", "log/repository"}


def test_a_room_imports_what_its_arrows_lead_to_and_each_arrow_is_an_import() -> None:
    node_of, leads_to = arrows()
    pairs = {
        (node_of[source], node_of[target])
        for source, target in imports_of_rooms()
        if {source, target} <= set(node_of) and node_of[source] != node_of[target]
    } - {("runtime", "format")}  # ids only, which are below both
    assert {(source, target) for source, targets in leads_to.items() for target in targets} <= pairs
    reached = {node: set(targets) for node, targets in leads_to.items()}
    for _ in reached:
        for targets in reached.values():
            targets.update(*(reached[target] for target in targets))
    assert {(source, target) for source, target in pairs if target not in reached[source]} == set()


@pytest.mark.parametrize("title", JOURNEYS)
def test_every_function_of_a_journey_exists(title: str) -> None:
    names = journey(title)
    assert len(names) >= 4
    for name in names:
        assert code_of(name)


@pytest.mark.parametrize(("title", "most"), [("A chunk is read", 6), ("A commit", 6)])
def test_a_journey_passes_few_files(title: str, most: int) -> None:
    assert len({code_of(name).co_filename for name in journey(title)}) <= most


async def test_a_chunk_is_written_through_the_functions_of_the_page() -> None:
    repo = await repository()
    session = await repo.writable_session_async("main")
    value = PROTOTYPE.buffer.from_bytes(bytes(512))

    async def work() -> None:
        await session.store.set("a/c/5/0", value)
        await session.commit_async("a fifth chunk")

    assert await passed(work, journey("A chunk is written")) == journey("A chunk is written")


async def test_a_chunk_is_read_through_the_functions_of_the_page() -> None:
    repo = await icechunk.Repository.open_async((await repository()).storage)
    session = await repo.readonly_session_async("main")
    wanted = journey("A chunk is read")
    assert await passed(lambda: session.store.get("a/c/2/0", PROTOTYPE), wanted) == wanted


async def test_a_commit_passes_the_functions_of_the_page() -> None:
    repo = await repository()
    session = await repo.writable_session_async("main")
    await session.store.set("a/c/6/0", PROTOTYPE.buffer.from_bytes(bytes(512)))
    wanted = journey("A commit")
    assert await passed(lambda: session.commit_async("a chunk"), wanted) == wanted
