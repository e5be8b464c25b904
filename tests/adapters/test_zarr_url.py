"""The adapter for zarr's URL pipelines, against the contract that zarr-python proposes."""

from __future__ import annotations

import importlib
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zarr

import icechunk
from icechunk.errors import InvalidInputError


@dataclass(frozen=True)
class Resolution:
    store: Any
    path: str = ""
    zarr_format: int | None = None


@dataclass(frozen=True)
class Segment:
    raw: str


@dataclass(frozen=True)
class Context:
    preceding_url: str
    mode: str | None = None
    storage_options: dict[str, Any] | None = None

    @property
    def read_only(self) -> bool:
        return self.mode == "r"


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Our adapter, compared with zarr's own contract if this zarr has it, else with its published form."""
    if importlib.util.find_spec("zarr.abc.url_pipeline") is None:
        contract = types.ModuleType("zarr.abc.url_pipeline")
        contract.AdapterResolution = Resolution  # type: ignore[attr-defined]
        contract.URLPipelineAdapter = object  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "zarr.abc.url_pipeline", contract)
    monkeypatch.delitem(sys.modules, "icechunk.adapters.zarr_url", raising=False)
    found = importlib.import_module("icechunk.adapters.zarr_url").IcechunkAdapter
    monkeypatch.delitem(sys.modules, "icechunk.adapters.zarr_url", raising=False)
    return found


async def test_a_stage_resolves_to_the_store_of_its_version(adapter: Any, tmp_path: Path) -> None:
    repo = await icechunk.Repository.create_async(icechunk.local_filesystem_storage(str(tmp_path)))
    session = await repo.writable_session_async("main")
    await zarr.api.asynchronous.create_array(store=session.store, name="a/b", shape=(2,), dtype="i4")
    snapshot = await session.commit_async("a")
    found = await adapter.open_pipeline_segment(Segment(f"icechunk:@{snapshot}/a"), Context(str(tmp_path)))
    assert found.path == "a"
    assert found.zarr_format == 3
    assert found.store.session.snapshot_id == snapshot
    assert found.store.read_only
    writable = await adapter.open_pipeline_segment(Segment("icechunk://branch.main/a"), Context(str(tmp_path), "r+"))
    assert not writable.store.read_only


async def test_a_mode_that_replaces_is_refused(adapter: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError):
        await adapter.open_pipeline_segment(Segment("icechunk:"), Context(str(tmp_path), "w"))


def test_the_entry_point_is_known() -> None:
    (found,) = importlib.metadata.entry_points(group="zarr.url_adapters", name="icechunk")
    assert found.value == "icechunk.adapters.zarr_url:IcechunkAdapter"
