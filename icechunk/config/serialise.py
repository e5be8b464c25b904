"""The stored shape of a configuration, for FlexBuffers inside ``repo`` objects and (`yaml_text`) format 1's YAML.

Both have one shape, written once here: snake_case keys, nulls written, and enum variants as `Tag`, which is a
one-key map in a FlexBuffer and a ``!tag`` in YAML. Unknown keys are skipped when reading, as the official library
does; our own settings travel under such a key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from icechunk.config import manifest as m
from icechunk.config.containers import VirtualChunkContainer
from icechunk.config.repository import (
    CachingConfig,
    CompressionAlgorithm,
    CompressionConfig,
    EngineConfig,
    RepositoryConfig,
    RepoUpdateRetryConfig,
)
from icechunk.config.storage import (
    AnyObjectStoreConfig,
    ChecksumAlgorithm,
    ObjectStoreConfig,
    S3Options,
    StorageConcurrencySettings,
    StorageRetriesSettings,
    StorageSettings,
    StorageTimeoutSettings,
)
from icechunk.errors import ErrorKind, FormatError

__all__ = ["Tag", "config_from_dict", "config_to_dict", "config_tree"]

T = TypeVar("T")

_ENGINE_KEY: Final = "aioicechunk"


@dataclass(frozen=True, slots=True)
class Tag:
    """An enum variant with a payload."""

    name: str
    value: Any


def config_to_dict(config: RepositoryConfig) -> dict[str, Any]:
    """The form for a FlexBuffer: dicts, lists, strings, ints, booleans and None only. Pure."""
    result: dict[str, Any] = _untagged(config_tree(config))
    return result


def config_from_dict(data: Mapping[str, Any]) -> RepositoryConfig:
    """Read `config_to_dict`'s form, or what another version wrote; absent keys are None, unknown ones are skipped.

    Raises
    ------
    FormatError
        Something that is no configuration (kind ``config-deserialization``).
    """
    try:
        return _read_repository(data)
    except (TypeError, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise FormatError(
            f"the stored repository configuration is invalid: {error}", ErrorKind.CONFIG_DESERIALIZATION
        ) from error


# --- writing --------------------------------------------------------------------------------------------------


def _untagged(value: Any) -> Any:
    match value:
        case Tag(name=name, value=inner):
            return {name: _untagged(inner)}
        case dict():
            return {k: _untagged(v) for k, v in value.items()}
        case list():
            return [_untagged(v) for v in value]
        case _:
            return value


def _plain(setting: Any) -> dict[str, Any] | None:
    """A settings object all of whose fields are numbers, strings or booleans."""
    return None if setting is None else {f.name: getattr(setting, f.name) for f in dataclasses.fields(setting)}


def config_tree(config: RepositoryConfig) -> dict[str, Any]:
    """The shape that both stored forms have, with enum variants as `Tag`."""
    compression, storage, manifest = config.compression, config.storage, config.manifest
    containers, retries = config.virtual_chunk_containers, config.repo_update_retries
    result = {
        "inline_chunk_threshold_bytes": config.inline_chunk_threshold_bytes,
        "get_partial_values_concurrency": config.get_partial_values_concurrency,
        "compression": None
        if compression is None
        else {"algorithm": None if compression.algorithm is None else "zstd", "level": compression.level},
        "max_concurrent_requests": config.max_concurrent_requests,
        "max_concurrent_decodes": config.max_concurrent_decodes,
        "caching": _plain(config.caching),
        "storage": None if storage is None else _storage(storage),
        "virtual_chunk_containers": None
        if containers is None
        else {
            key: {"name": c.name, "url_prefix": c.url_prefix, "store": _store(c.store)} for key, c in containers.items()
        },
        "manifest": None if manifest is None else _manifest(manifest),
        "previous_file": config.previous_file,
        "repo_update_retries": None if retries is None else {"default": _plain(retries.default)},
        "num_updates_per_repo_info_file": config.num_updates_per_repo_info_file,
    }
    engine = {k: v for k, v in (_plain(config.engine) or {}).items() if v is not None and k != "layout"}
    return result | ({_ENGINE_KEY: engine} if engine else {})


def _storage(settings: StorageSettings) -> dict[str, Any]:
    return {
        "concurrency": _plain(settings.concurrency),
        "retries": _plain(settings.retries),
        "timeouts": _plain(settings.timeouts),
        "unsafe_use_conditional_update": settings.unsafe_use_conditional_update,
        "unsafe_use_conditional_create": settings.unsafe_use_conditional_create,
        "unsafe_use_metadata": settings.unsafe_use_metadata,
        "storage_class": settings.storage_class,
        "metadata_storage_class": settings.metadata_storage_class,
        "chunks_storage_class": settings.chunks_storage_class,
        "minimum_size_for_multipart_upload": settings.minimum_size_for_multipart_upload,
    }


_CHECKSUMS: Final = {
    ChecksumAlgorithm.Crc32: "crc32",
    ChecksumAlgorithm.Crc32c: "crc32c",
    ChecksumAlgorithm.Crc64Nvme: "crc64_nvme",
    ChecksumAlgorithm.Sha1: "sha1",
    ChecksumAlgorithm.Sha256: "sha256",
}


def _s3(options: S3Options) -> dict[str, Any]:
    checksum = options.checksum_algorithm
    return {
        "region": options.region,
        "endpoint_url": options.endpoint_url,
        "anonymous": options.anonymous,
        "allow_http": options.allow_http,
        "force_path_style": options.force_path_style,
        "network_stream_timeout_seconds": options.network_stream_timeout_seconds,
        "requester_pays": options.requester_pays,
        "checksum_algorithm": None if checksum is None else _CHECKSUMS[checksum],
    }


def _store(store: AnyObjectStoreConfig) -> Any:
    match store:
        case ObjectStoreConfig.InMemory():
            return "in_memory"
        case ObjectStoreConfig.LocalFileSystem():
            return Tag("local_file_system", str(store.path))
        case ObjectStoreConfig.S3():
            return Tag("s3", _s3(store.options))
        case ObjectStoreConfig.S3Compatible():
            return Tag("s3_compatible", _s3(store.options))
        case ObjectStoreConfig.Tigris():
            return Tag("tigris", _s3(store.opts))
        case ObjectStoreConfig.Gcs():
            return Tag("gcs", dict(store.opts or {}))
        case ObjectStoreConfig.Azure():
            return Tag("azure", dict(store.opts or {}))
        case ObjectStoreConfig.Http():
            headers = {"headers": dict(store.headers)} if store.headers else {}
            return Tag("http", dict(store.opts or {}) | headers)


def _manifest(config: m.ManifestConfig) -> dict[str, Any]:
    preload, splitting = config.preload, config.splitting
    return {
        "preload": None
        if preload is None
        else {
            "max_total_refs": preload.max_total_refs,
            "preload_if": None if preload.preload_if is None else _condition(preload.preload_if),
            "max_arrays_to_scan": preload.max_arrays_to_scan,
        },
        "splitting": None
        if splitting is None
        else {
            "split_sizes": None
            if splitting.split_sizes is None
            else [
                [_condition(c), [{"condition": _dimension(d), "num_chunks": n} for d, n in sizes]]
                for c, sizes in splitting.split_sizes
            ]
        },
        "virtual_chunk_location_compression": _plain(config.virtual_chunk_location_compression),
        "max_concurrent_manifest_fetches_during_commit": config.max_concurrent_manifest_fetches_during_commit,
    }


def _condition(condition: m.ManifestPreloadCondition | m.ManifestSplitCondition) -> Any:
    match condition:
        case m.PreloadOr() | m.SplitOr():
            return Tag("or", [_condition(c) for c in condition.conditions])
        case m.PreloadAnd() | m.SplitAnd():
            return Tag("and", [_condition(c) for c in condition.conditions])
        case m.PreloadPathMatches() | m.SplitPathMatches():
            return Tag("path_matches", {"regex": condition.regex})
        case m.PreloadNameMatches() | m.SplitNameMatches():
            return Tag("name_matches", {"regex": condition.regex})
        case m.PreloadNumRefs():
            low, high = condition.from_refs, condition.to_refs
            return Tag(
                "num_refs",
                {
                    "from": "Unbounded" if low is None else Tag("Included", low),
                    "to": "Unbounded" if high is None else Tag("Excluded", high),
                },
            )
        case m.PreloadTrue():
            return "true"
        case m.PreloadFalse():
            return "false"
        case m.SplitAnyArray():
            return "any_array"
    raise TypeError(f"not a condition: {type(condition).__name__}")


def _dimension(condition: Any) -> Any:
    match condition:
        case m.ManifestSplitDimCondition.Axis():
            return Tag("Axis", condition.axis)
        case m.ManifestSplitDimCondition.DimensionName():
            return Tag("DimensionName", condition.regex)
        case _:
            return "Any"


# --- reading --------------------------------------------------------------------------------------------------


def _map(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} is {type(value).__name__}, not a map")
    return value


def _items(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{what} is {type(value).__name__}, not a list")
    return list(value)


def _maybe(read: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else read(value)


def _variant(value: Any, what: str) -> tuple[str, Any]:
    """Name and payload of an enum variant; a bare string has none."""
    if isinstance(value, str):
        return value, None
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, payload),) = value.items()
        return str(name), payload
    raise TypeError(f"{what} is {type(value).__name__}, not the name of a variant or a map with one key")


def _simple(cls: Callable[..., T]) -> Callable[[Any], T]:
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]

    def read(value: Any) -> T:
        data = _map(value, getattr(cls, "__name__", "setting"))
        return cls(**{name: data[name] for name in names if name in data})

    return read


def _read_repository(value: Any) -> RepositoryConfig:
    data = _map(value, "the configuration")
    plain = (
        "inline_chunk_threshold_bytes",
        "get_partial_values_concurrency",
        "max_concurrent_requests",
        "max_concurrent_decodes",
        "num_updates_per_repo_info_file",
    )
    config = RepositoryConfig(
        **{name: data.get(name) for name in plain},
        compression=_maybe(_read_compression, data.get("compression")),
        caching=_maybe(_simple(CachingConfig), data.get("caching")),
        storage=_maybe(_read_storage, data.get("storage")),
        virtual_chunk_containers=_maybe(_read_containers, data.get("virtual_chunk_containers")),
        manifest=_maybe(_read_manifest, data.get("manifest")),
        repo_update_retries=_maybe(
            lambda v: RepoUpdateRetryConfig(
                _maybe(_simple(StorageRetriesSettings), _map(v, "repo_update_retries").get("default"))
            ),
            data.get("repo_update_retries"),
        ),
        engine=_maybe(_simple(EngineConfig), data.get(_ENGINE_KEY)),
    )
    config.previous_file = data.get("previous_file")
    return config


def _read_compression(value: Any) -> CompressionConfig:
    data = _map(value, "compression")
    algorithm = data.get("algorithm")
    if algorithm not in (None, "zstd"):
        raise ValueError(f"unknown compression algorithm {algorithm!r}")
    return CompressionConfig(None if algorithm is None else CompressionAlgorithm.Zstd, data.get("level"))


def _read_storage(value: Any) -> StorageSettings:
    data = _map(value, "storage")
    nested: dict[str, Callable[[Any], Any]] = {
        "concurrency": _simple(StorageConcurrencySettings),
        "retries": _simple(StorageRetriesSettings),
        "timeouts": _simple(StorageTimeoutSettings),
    }
    names = [f.name for f in dataclasses.fields(StorageSettings)]
    values: dict[str, Any] = {n: _maybe(nested[n], data[n]) if n in nested else data[n] for n in names if n in data}
    return StorageSettings(**values)


def _read_containers(value: Any) -> dict[str, VirtualChunkContainer]:
    result = {}
    for key, item in _map(value, "virtual_chunk_containers").items():
        data = _map(item, "a virtual chunk container")
        # Format 1's first releases had no prefix but the name.
        prefix = data.get("url_prefix", key)
        result[str(key)] = VirtualChunkContainer(prefix, _read_store(data["store"]), data.get("name"))
    return result


def _read_s3(value: Any) -> S3Options:
    data = dict(_map(value, "S3 options"))
    checksum = data.get("checksum_algorithm")
    if checksum is not None:
        names = {v: k for k, v in _CHECKSUMS.items()}
        if checksum not in names:
            raise ValueError(f"unknown checksum algorithm {checksum!r}")
        data["checksum_algorithm"] = names[checksum]
    return _simple(S3Options)(data)


def _read_store(value: Any) -> AnyObjectStoreConfig:
    name, payload = _variant(value, "a store")
    match name:
        case "in_memory":
            return ObjectStoreConfig.InMemory()
        case "local_file_system":
            return ObjectStoreConfig.LocalFileSystem(Path(payload))
        case "s3":
            return ObjectStoreConfig.S3(_read_s3(payload))
        case "s3_compatible":
            return ObjectStoreConfig.S3Compatible(_read_s3(payload))
        case "tigris":
            return ObjectStoreConfig.Tigris(_read_s3(payload))
        case "gcs":
            return ObjectStoreConfig.Gcs(payload)
        case "azure":
            return ObjectStoreConfig.Azure(payload)
        case "http":
            options = dict(_map({} if payload is None else payload, "http options"))
            headers = options.pop("headers", None)
            return ObjectStoreConfig.Http(options, headers)
    raise ValueError(f"unknown kind of store {name!r}")


def _read_manifest(value: Any) -> m.ManifestConfig:
    data = _map(value, "manifest")
    return m.ManifestConfig(
        preload=_maybe(_read_preload, data.get("preload")),
        splitting=_maybe(_read_splitting, data.get("splitting")),
        virtual_chunk_location_compression=_maybe(
            _simple(m.ManifestVirtualChunkLocationCompressionConfig), data.get("virtual_chunk_location_compression")
        ),
        max_concurrent_manifest_fetches_during_commit=data.get("max_concurrent_manifest_fetches_during_commit"),
    )


def _read_preload(value: Any) -> m.ManifestPreloadConfig:
    data = _map(value, "preload")
    return m.ManifestPreloadConfig(
        data.get("max_total_refs"),
        _maybe(_read_preload_condition, data.get("preload_if")),
        data.get("max_arrays_to_scan"),
    )


def _read_preload_condition(value: Any) -> m.ManifestPreloadCondition:
    condition = m.ManifestPreloadCondition
    # An unquoted YAML ``true`` is a boolean.
    name, payload = ("true" if value else "false", None) if isinstance(value, bool) else _variant(value, "preload_if")
    match name:
        case "or":
            return condition.or_conditions([_read_preload_condition(v) for v in _items(payload, "or")])
        case "and":
            return condition.and_conditions([_read_preload_condition(v) for v in _items(payload, "and")])
        case "path_matches":
            return condition.path_matches(_map(payload, name)["regex"])
        case "name_matches":
            return condition.name_matches(_map(payload, name)["regex"])
        case "num_refs":
            bounds = _map(payload, name)
            return condition.num_refs(_bound(bounds["from"], 0), _bound(bounds["to"], 1))
        case "true":
            return condition.true()
        case "false":
            return condition.false()
    raise ValueError(f"unknown preload condition {name!r}")


def _bound(value: Any, inclusive_extra: int) -> int | None:
    """A bound as `num_refs` takes it; ours starts inclusive and ends exclusive, the format allows both everywhere."""
    name, number = _variant(value, "a bound")
    match name, number:
        case "Unbounded", _:
            return None
        case "Included", int():
            return number + inclusive_extra
        case "Excluded", int():
            return number + 1 - inclusive_extra
    raise ValueError(f"unknown bound {name!r}")


def _read_splitting(value: Any) -> m.ManifestSplittingConfig:
    data = _map(value, "splitting")
    rules = data.get("split_sizes")
    if rules is None:
        return m.ManifestSplittingConfig()
    result = []
    for rule in _items(rules, "split_sizes"):
        condition, sizes = _items(rule, "a rule of split_sizes")
        pairs = [_map(size, "a size") for size in _items(sizes, "the sizes of a rule")]
        result.append(
            (_read_split_condition(condition), [(_read_dimension(p["condition"]), p["num_chunks"]) for p in pairs])
        )
    return m.ManifestSplittingConfig(result)


def _read_split_condition(value: Any) -> m.ManifestSplitCondition:
    condition = m.ManifestSplitCondition
    name, payload = _variant(value, "a split condition")
    match name:
        case "or":
            return condition.or_conditions([_read_split_condition(v) for v in _items(payload, "or")])
        case "and":
            return condition.and_conditions([_read_split_condition(v) for v in _items(payload, "and")])
        case "path_matches":
            return condition.path_matches(_map(payload, name)["regex"])
        case "name_matches":
            return condition.name_matches(_map(payload, name)["regex"])
        case "any_array":
            return condition.AnyArray()
    raise ValueError(f"unknown split condition {name!r}")


def _read_dimension(value: Any) -> Any:
    name, payload = _variant(value, "a dimension")
    match name:
        case "Axis":
            return m.ManifestSplitDimCondition.Axis(payload)
        case "DimensionName":
            return m.ManifestSplitDimCondition.DimensionName(payload)
        case "Any":
            return m.ManifestSplitDimCondition.Any()
    raise ValueError(f"unknown dimension condition {name!r}")
