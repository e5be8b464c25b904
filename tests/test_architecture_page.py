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
    """Which of the functions were called while something ran, in the order of their first calls."""
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
