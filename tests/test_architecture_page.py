"""The page about the architecture agrees with the code: its functions exist, and are passed in its order."""

from __future__ import annotations

import asyncio
import importlib
import re
import sys
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest
import zarr.api.asynchronous as azarr
from zarr.core.buffer import default_buffer_prototype

import icechunk
from icechunk.storage.memory import MemoryStorage

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
    """The functions that were called while something ran, each after the ones before it in the list.

    Other work may have called them too, before: the loop of conditional writes also serves a checkpoint.
    """
    names = {code_of(name): name for name in wanted}
    calls: list[str] = []
    seen: set[FrameType] = set()

    def watch(frame: FrameType, event: str, _: object) -> None:
        # A coroutine that goes on is the same frame again.
        if event == "call" and frame.f_code in names and frame not in seen:
            seen.add(frame)
            calls.append(names[frame.f_code])

    sys.setprofile(watch)
    try:
        await work()
    finally:
        sys.setprofile(None)
    in_order = iter(calls)
    return [name for name in wanted if name in in_order]


CAME_FROM: ContextVar[frozenset[str]] = ContextVar("CAME_FROM", default=frozenset())
"""Files on the stacks that led to the task or callback that runs, back to the first step of a journey."""


def files_on_the_stack(first: CodeType) -> frozenset[str]:
    """Files of the package from the one that runs back to ``first``, also through tasks and callbacks."""
    package = str(Path(icechunk.__file__).parent)
    found: set[str] = set()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(package):
            found.add(frame.f_code.co_filename)
        if frame.f_code is first:
            return frozenset(found)
        frame = frame.f_back
    came_from = CAME_FROM.get()
    return came_from | found if came_from else came_from


async def files_to(
    monkeypatch: pytest.MonkeyPatch, work: Callable[[], Coroutine[Any, Any, Any]], first: str, verb: str, prefix: str
) -> set[str]:
    """Files that requests of a verb for keys with a prefix have passed since the first step of a journey."""
    step = code_of(first)
    loop = asyncio.get_running_loop()
    call_soon, request = loop.call_soon, getattr(MemoryStorage, verb)
    found: set[str] = set()

    def from_here() -> Context:
        context = copy_context()
        context.run(CAME_FROM.set, files_on_the_stack(step))
        return context

    def new_task(loop: asyncio.AbstractEventLoop, coro: Any, **named: Any) -> asyncio.Task[Any]:
        context = named.pop("context", None)
        return asyncio.Task(coro, loop=loop, context=from_here() if context is None else context, **named)

    def soon(callback: Callable[..., object], *args: Any, context: Context | None = None) -> asyncio.Handle:
        return call_soon(callback, *args, context=from_here() if context is None else context)

    async def watched(self: MemoryStorage, key: str, *args: Any, **named: Any) -> Any:
        if key.startswith(prefix):
            found.update(files_on_the_stack(step))
        return await request(self, key, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "call_soon", soon)
        patch.setattr(MemoryStorage, verb, watched)
        loop.set_task_factory(new_task)
        try:
            await work()
        finally:
            loop.set_task_factory(None)
    return found


def require_few_files(title: str, on_the_stack: set[str]) -> None:
    """Fails where a journey passes a file that it does not list, or more than six after that of its first step."""
    first, *listed = [code_of(name).co_filename for name in journey(title)]
    assert on_the_stack
    assert on_the_stack <= {first, *listed}
    assert len({*listed} - {first}) <= 6


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


async def test_a_read_passes_few_files_and_the_page_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    repo = await icechunk.Repository.open_async((await repository()).storage)
    session = await repo.readonly_session_async("main")
    first = journey("A chunk is read")[0]
    files = await files_to(monkeypatch, lambda: session.store.get("a/c/2/0", PROTOTYPE), first, "get", "chunks/")
    require_few_files("A chunk is read", files)


async def test_a_commit_passes_the_functions_of_the_page() -> None:
    repo = await repository()
    session = await repo.writable_session_async("main")
    await session.store.set("a/c/6/0", PROTOTYPE.buffer.from_bytes(bytes(512)))
    wanted = journey("A commit")
    assert await passed(lambda: session.commit_async("a chunk"), wanted) == wanted


async def test_a_commit_passes_few_files_and_the_page_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    repo = await repository()
    session = await repo.writable_session_async("main")
    await session.store.set("a/c/6/0", PROTOTYPE.buffer.from_bytes(bytes(512)))
    first = journey("A commit")[0]
    files = await files_to(monkeypatch, lambda: session.commit_async("a chunk"), first, "put", "log/")
    require_few_files("A commit", files)
