"""Round trips of a configuration, by ours or by the official library, whichever is installed; prints JSON.

    python -m tools.interop.configurations scenarios VERSION      effective and persisted values, step by step
    python -m tools.interop.configurations defaults               settings of storages
    python -m tools.interop.configurations write FOLDER VERSION   a repository with every setting persisted
    python -m tools.interop.configurations save FOLDER            other settings merged over it, and persisted
    python -m tools.interop.configurations read FOLDER            effective and persisted values there

VERSION is 2, 1, or ``log`` (ours only).
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import icechunk

__all__ = ["defaults", "read", "save", "scenarios", "write"]

OURS = hasattr(icechunk.Repository, "checkpoint_async")
# Not public in the official library.
RepoUpdateRetryConfig: Any = importlib.import_module("icechunk._icechunk_python").RepoUpdateRetryConfig

Values = dict[str, Any]

_PLAIN = (
    "inline_chunk_threshold_bytes",
    "get_partial_values_concurrency",
    "max_concurrent_requests",
    "num_updates_per_repo_info_file",
    "max_concurrent_decodes",
)
_CACHING = (
    "num_snapshot_nodes",
    "num_chunk_refs",
    "num_transaction_changes",
    "num_bytes_attributes",
    "num_bytes_chunks",
)
_RETRIES = ("max_tries", "initial_backoff_ms", "max_backoff_ms")
_CONCURRENCY = ("max_concurrent_requests_for_object", "ideal_concurrent_request_size")
_TIMEOUTS = ("connect_timeout_ms", "read_timeout_ms", "operation_timeout_ms", "operation_attempt_timeout_ms")
_STORAGE = (
    "unsafe_use_conditional_create",
    "unsafe_use_conditional_update",
    "unsafe_use_metadata",
    "storage_class",
    "metadata_storage_class",
    "chunks_storage_class",
    "minimum_size_for_multipart_upload",
)


def _values(value: Any, names: tuple[str, ...], prefix: str = "") -> Values:
    """The values that are set, by name."""
    found = {} if value is None else {f"{prefix}{name}": getattr(value, name) for name in names}
    return {name: setting for name, setting in found.items() if setting is not None}


def _settings(storage: Any, prefix: str = "") -> Values:
    if storage is None:
        return {}
    return {
        **_values(storage, _STORAGE, prefix),
        **_values(storage.retries, _RETRIES, f"{prefix}retries."),
        **_values(storage.concurrency, _CONCURRENCY, f"{prefix}concurrency."),
        **_values(storage.timeouts, _TIMEOUTS, f"{prefix}timeouts."),
    }


def _shown(config: Any) -> Values | None:
    if config is None:
        return None
    updates = config.repo_update_retries
    containers = {prefix: c.name for prefix, c in sorted((config.virtual_chunk_containers or {}).items())}
    return {
        **_values(config, _PLAIN),
        **_values(config.compression, ("level",), "compression."),
        **_values(config.caching, _CACHING, "caching."),
        **_settings(config.storage, "storage."),
        **_values(None if updates is None else updates.default, _RETRIES, "repo_update_retries."),
        **_values(config.manifest, ("max_concurrent_manifest_fetches_during_commit",), "manifest."),
        **({"containers": containers} if containers else {}),
    }


def _look(repo: Any, storage: Any) -> dict[str, Any]:
    return {"effective": _shown(repo.config), "persisted": _shown(icechunk.Repository.fetch_config(storage))}


def _container(folder: str, name: str) -> Any:
    return icechunk.VirtualChunkContainer(f"file://{folder}/", icechunk.local_filesystem_store(folder), name)


def _everything() -> Any:
    config = icechunk.RepositoryConfig.default()
    config.inline_chunk_threshold_bytes = 7
    config.get_partial_values_concurrency = 8
    config.max_concurrent_requests = 9
    config.num_updates_per_repo_info_file = 3
    config.max_concurrent_decodes = 4
    config.compression = icechunk.CompressionConfig(level=5)
    config.caching = icechunk.CachingConfig(10, 11, 12, 13, 14)
    config.storage = icechunk.StorageSettings(
        retries=icechunk.StorageRetriesSettings(4, 5, 6),
        concurrency=icechunk.StorageConcurrencySettings(7, 8000),
        timeouts=icechunk.StorageTimeoutSettings(9000, 10_000, 11_000, 12_000),
        # Features that the official library can do without on a local disk.
        unsafe_use_conditional_create=True,
        unsafe_use_conditional_update=False,
        unsafe_use_metadata=False,
        storage_class="A",
        metadata_storage_class="B",
        chunks_storage_class="C",
        minimum_size_for_multipart_upload=6_000_000,
    )
    config.repo_update_retries = RepoUpdateRetryConfig(default=icechunk.StorageRetriesSettings(3, 4, 5))
    config.manifest = icechunk.ManifestConfig(max_concurrent_manifest_fetches_during_commit=6)
    config.set_virtual_chunk_container(_container("/one", "one"))
    return config


def _some() -> Any:
    """Single settings of many groups."""
    config = icechunk.RepositoryConfig.default()
    config.max_concurrent_requests = 90
    config.compression = icechunk.CompressionConfig(level=1)
    config.caching = icechunk.CachingConfig(num_chunk_refs=110)
    config.storage = icechunk.StorageSettings(
        retries=icechunk.StorageRetriesSettings(max_tries=40), unsafe_use_metadata=False, storage_class="D"
    )
    config.repo_update_retries = RepoUpdateRetryConfig(default=icechunk.StorageRetriesSettings(initial_backoff_ms=41))
    config.num_updates_per_repo_info_file = 2
    return config


def _others() -> Any:
    """Single settings beside those of `_some`, and another container."""
    config = icechunk.RepositoryConfig.default()
    config.caching = icechunk.CachingConfig(num_bytes_chunks=140)
    config.storage = icechunk.StorageSettings(
        retries=icechunk.StorageRetriesSettings(max_backoff_ms=60),
        timeouts=icechunk.StorageTimeoutSettings(read_timeout_ms=13_000),
        minimum_size_for_multipart_upload=7_000_000,
    )
    config.repo_update_retries = RepoUpdateRetryConfig(default=icechunk.StorageRetriesSettings(max_tries=30))
    config.manifest = icechunk.ManifestConfig(max_concurrent_manifest_fetches_during_commit=60)
    config.set_virtual_chunk_container(_container("/two", "two"))
    return config


def _version(version: str) -> dict[str, Any]:
    return {} if version == "log" else {"spec_version": int(version)}


def scenarios(version: str) -> dict[str, list[dict[str, Any]]]:
    """Effective and persisted configuration after each step of some stories, each begun with another configuration."""
    out: dict[str, list[dict[str, Any]]] = {}
    starts = {"none": None, "empty": icechunk.RepositoryConfig.default(), "some": _some(), "everything": _everything()}
    for name, start in starts.items():
        storage = icechunk.in_memory_storage()
        created: Any = icechunk.Repository.create(storage, config=start, **_version(version))
        steps = out[name] = [_look(created, storage)]
        opened = icechunk.Repository.open(storage)
        steps.append(_look(opened, storage))
        merged = icechunk.Repository.open(storage, config=_others())
        steps.append(_look(merged, storage))
        reopened = merged.reopen(config=_some())
        steps.append(_look(reopened, storage))
        steps.append(_look(merged, storage))
        reopened.save_config()
        steps.append(_look(icechunk.Repository.open(storage), storage))
        steps.append(_look(icechunk.Repository.open(storage, config=_everything()), storage))
        either = icechunk.Repository.open_or_create(storage, config=_others())
        steps.append(_look(either, storage))
    return out


def defaults() -> dict[str, Values]:
    """`default_settings` of storages in memory and on local disk."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            "memory": _settings(icechunk.in_memory_storage().default_settings()),
            "local": _settings(icechunk.local_filesystem_storage(folder).default_settings()),
        }


# --- one repository for both ----------------------------------------------------------------------------------


def write(folder: Path, version: str) -> dict[str, Any]:
    """A repository in ``folder``, and some commits beyond what one ``repo`` object keeps of its log."""
    storage = icechunk.local_filesystem_storage(str(folder))
    repo: Any = icechunk.Repository.create(storage, config=_everything(), **_version(version))
    return _continue(repo, folder)


def save(folder: Path) -> dict[str, Any]:
    """Some settings changed and persisted there, and some commits more."""
    storage = icechunk.local_filesystem_storage(str(folder))
    repo = icechunk.Repository.open(storage, config=_some())
    repo.save_config()
    return _continue(repo, folder)


def _continue(repo: Any, folder: Path) -> dict[str, Any]:
    for _ in range(4):
        repo.writable_session("main").commit("more", allow_empty=True)
    if OURS:
        repo.checkpoint()  # which is what the official library sees of a log
    return read(folder)


def read(folder: Path) -> dict[str, Any]:
    """The configuration of a repository that is opened without any, and the length of its history."""
    storage = icechunk.local_filesystem_storage(str(folder))
    repo = icechunk.Repository.open(storage)
    return {**_look(repo, storage), "snapshots": len(list(repo.ancestry(branch="main")))}


def main(arguments: list[str]) -> None:
    warnings.simplefilter("ignore")
    result: Any
    match arguments:
        case ["scenarios", version]:
            result = scenarios(version)
        case ["defaults"]:
            result = defaults()
        case ["write", folder, version]:
            result = write(Path(folder), version)
        case ["save", folder]:
            result = save(Path(folder))
        case ["read", folder]:
            result = read(Path(folder))
        case _:
            raise SystemExit(__doc__)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
