"""Defaults of settings: what ``str(config)`` shows, and `docs/tuning.md` says, is what the engine uses."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import icechunk
from icechunk.config import (
    EngineConfig,
    ManifestPreloadCondition,
    ManifestPreloadConfig,
    RepositoryConfig,
    StorageSettings,
    config_to_dict,
)
from icechunk.config.manifest_rules import manifests_to_preload
from icechunk.log.repository.objects import updates_per_file_of
from icechunk.log.repository.queue import retries_of
from icechunk.runtime.representation import Setting, effective_default
from icechunk.session import core as session_core
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.settings import Effective
from icechunk.transfer.assets import Assets
from icechunk.transfer.disk_cache import DiskCache
from tests.transfer.test_preloading import snapshot

TUNING = Path(__file__).parents[1] / "docs" / "tuning.md"
WITHOUT_EFFECT = {
    "caching.num_bytes_attributes": "no format in use has attributes files",
    "compression.algorithm": "there is only one",
}


def shown(setting: Setting, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and default of every setting whose default is shown."""
    for field in fields(setting):  # type: ignore[arg-type]  # every setting is a dataclass
        # A repository's storage settings are shown as None: each kind of storage has defaults of its own.
        default = StorageSettings() if field.name == "storage" else effective_default(field)
        given = getattr(setting, field.name) if path == "repo_update_retries.default." else default
        if isinstance(default, Setting):
            yield from shown(default, f"{path}{field.name}.")
        elif given is not None:
            yield path + field.name, given


SHOWN = dict(shown(RepositoryConfig()))


def configured(path: str, value: Any) -> RepositoryConfig:
    """A configuration with one setting."""
    config = RepositoryConfig()
    *parents, name = path.split(".")
    setting: Any = config
    for parent in parents:
        default: Any
        (default,) = (effective_default(field) for field in fields(setting) if field.name == parent)
        setattr(setting, parent, StorageSettings() if parent == "storage" else type(default)())
        setting = getattr(setting, parent)
    setattr(setting, name, value)
    return config


class Remote(MemoryStorage):
    """Memory that is read like a store with latency."""

    @property
    def batches_reads(self) -> bool:
        return False


def used(config: RepositoryConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The values that the rooms of the engine use for a configuration."""
    caches: dict[str, Any] = {}

    class Caches(Assets):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            caches.update({name: value for name, value in kwargs.items() if isinstance(value, int)})
            super().__init__(*args, **kwargs)

    class Disk(DiskCache):
        @staticmethod
        def at(folder: str, max_bytes: int) -> DiskCache:
            caches["disk"] = max_bytes
            return DiskCache(folder, max_bytes)

    monkeypatch.setattr(session_core, "Assets", Caches)
    monkeypatch.setattr(session_core, "DiskCache", Disk)
    config = copy.deepcopy(config)
    config.engine = config.engine or EngineConfig()
    config.engine.disk_cache_path = "a folder that nothing is written to"
    core = session_core.Core(Remote(), config)
    requests = Effective(config.storage)
    many, large = snapshot(**{f"x{i}": [1] for i in range(60)}), snapshot(x=[1000] * 12)
    preload = copy.copy(config.manifest.preload if config.manifest else None) or ManifestPreloadConfig()
    preload.preload_if = preload.preload_if or ManifestPreloadCondition.true()
    return {
        **{field.name: getattr(core.settings, field.name) for field in fields(core.settings)},
        **caches,
        "retries": retries_of(config_to_dict(config)),
        "updates_per_file": updates_per_file_of(config.num_updates_per_repo_info_file, None),
        "limits": requests.limits,
        "uploads": (requests.multipart_bytes, requests.part_bytes, requests.parts_at_once),
        "preconditions": requests.atomic_preconditions,
        "metadata": requests.uses_metadata,
        "preloaded": [len(list(manifests_to_preload(preload, found))) for found in (many, large)],
    }


def other(value: Any) -> Any:
    """A valid value that is not this one."""
    return not value if isinstance(value, bool) else value - 1 if value else 1


def test_many_defaults_are_shown() -> None:
    assert len(SHOWN) > 25
    assert {"max_concurrent_requests", "engine.put_memory_bytes", "storage.retries.max_tries"} <= set(SHOWN)


@pytest.mark.parametrize("path", SHOWN)
def test_a_setting_that_is_set_to_the_default_shown_changes_nothing(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert used(configured(path, SHOWN[path]), monkeypatch) == used(RepositoryConfig(), monkeypatch)


@pytest.mark.parametrize("path", [path for path in SHOWN if path not in WITHOUT_EFFECT])
def test_a_setting_that_is_set_to_another_value_has_an_effect(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert used(configured(path, other(SHOWN[path])), monkeypatch) != used(RepositoryConfig(), monkeypatch)


def test_the_page_of_tuning_tells_the_defaults_that_are_shown() -> None:
    row = re.compile(r"^\| `([\w.]+)` \| (\d[\d ]*?) ?(KiB|MiB|GiB|)(?: \(.*\)|) \|", re.MULTILINE)
    units = {"": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
    said = {
        name: int(number.replace(" ", "")) * units[unit]
        for name, number, unit in row.findall(TUNING.read_text("utf-8"))
    }
    # Not shown, since options of S3 may name another.
    assert said.pop("storage.timeouts.read_timeout_ms") == Effective(None).limits.read_s * 1000
    assert len(said) > 12
    assert said == {name: SHOWN[name] for name in said}


def test_defaults_are_shown_to_users() -> None:
    text = str(icechunk.RepositoryConfig())
    assert "put_memory_bytes: 134217728 (default)" in text
    assert "max_concurrent_requests: 256 (default)" in text
