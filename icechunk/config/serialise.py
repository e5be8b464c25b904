"""The stored form of a configuration, for FlexBuffers inside ``repo`` objects and (`yaml_text`) format 1's YAML.

Both have one form, which follows from the classes: a settings class is a map of its fields, nulls written; an
enumeration its member's name in snake case; a member of a tagged union a `Tag` with its snake-case name, which is a
one-key map in a FlexBuffer and a ``!tag`` in YAML, or the bare name if it has no fields. Exceptions are in the
tables and functions for single classes below. Unknown keys are skipped when reading, as the official library does; our
own settings are kept under such a key.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final

from icechunk.config import manifest as m
from icechunk.config.containers import VirtualChunkContainer
from icechunk.config.repository import NEVER_STORED, RepositoryConfig
from icechunk.config.storage import AnyObjectStoreConfig, ObjectStoreConfig, S3Options, StorageSettings
from icechunk.errors import ErrorKind, FormatError
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.representation import Setting, TupleVariant, snake_case

__all__ = ["Tag", "config_from_dict", "config_to_dict", "config_tree"]

_ENGINE_KEY: Final = "aioicechunk"
_ORDER: Final[dict[type, str]] = {
    RepositoryConfig: "inline_chunk_threshold_bytes get_partial_values_concurrency compression max_concurrent_requests "
    "max_concurrent_decodes caching storage virtual_chunk_containers manifest previous_file repo_update_retries "
    "num_updates_per_repo_info_file",
    StorageSettings: "concurrency retries timeouts unsafe_use_conditional_update unsafe_use_conditional_create "
    "unsafe_use_metadata storage_class metadata_storage_class chunks_storage_class minimum_size_for_multipart_upload",
    S3Options: "region endpoint_url anonymous allow_http force_path_style network_stream_timeout_seconds "
    "requester_pays checksum_algorithm",
    VirtualChunkContainer: "name url_prefix store",
}
"""Fields in the order of the official library's YAML, where it is not that of the class."""
_UNIONS: Final[dict[Any, dict[str, type]]] = {
    AnyObjectStoreConfig: {snake_case(kind.__name__): kind for kind in typing.get_args(AnyObjectStoreConfig)},
    m.ManifestPreloadCondition: {snake_case(kind.__name__): kind for kind in m.PRELOAD_CONDITIONS},
    m.ManifestSplitCondition: {snake_case(kind.__name__): kind for kind in m.SPLIT_CONDITIONS},
    m.ManifestSplitDimCondition: {kind.__name__: kind for kind in typing.get_args(m.AnyDimension)},
}
"""Members of the tagged unions by their stored names."""
_TAGS: Final = {kind: tag for members in _UNIONS.values() for tag, kind in members.items()}


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
    """Read `config_to_dict`'s form, or another version's; absent keys are None, unknown ones are skipped.

    Raises
    ------
    FormatError
        Something that is no configuration (kind ``config-deserialization``).
    """
    try:
        found = dict(_map(data, "the configuration"))
        engine = found.pop(_ENGINE_KEY, None)
        if isinstance(engine, Mapping):
            # Only the reader may name a folder on the reader's disk.
            engine = {name: value for name, value in engine.items() if name not in NEVER_STORED}
        found["engine"] = engine
        config: RepositoryConfig = _read(RepositoryConfig, found)
        return config
    except (TypeError, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise FormatError(
            f"the stored repository configuration is invalid: {error}", ErrorKind.CONFIG_DESERIALIZATION
        ) from error


def config_tree(config: RepositoryConfig) -> dict[str, Any]:
    """The shape that both stored forms have, with enum variants as `Tag`."""
    result: dict[str, Any] = _write(config)
    engine = {} if config.engine is None else _write(config.engine)
    engine = {name: value for name, value in engine.items() if value is not None and name not in NEVER_STORED}
    return result | ({_ENGINE_KEY: engine} if engine else {})


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


def _write(value: Any) -> Any:
    match value:
        case m.ManifestSplittingConfig(split_sizes=rules):
            return {"split_sizes": None if rules is None else [_write_rule(*rule) for rule in rules]}
        case Setting():
            order = _ORDER.get(type(value))
            names = order.split() if order else [field.name for field in dataclasses.fields(value)]  # type: ignore[arg-type]
            return {name: _write(getattr(value, name)) for name in names}
        case TupleVariant():
            tag = _TAGS[type(value)]
            return Tag(tag, _write_payload(value)) if dataclasses.fields(value) else tag  # type: ignore[arg-type]
        case Enum():
            return snake_case(value.name)
        case Path():
            return str(value)
        case Mapping():
            return {key: _write(item) for key, item in value.items()}
        case tuple() | list():
            return [_write(item) for item in value]
        case _:
            return value


def _write_payload(value: TupleVariant) -> Any:
    match value:
        case m.PreloadNumRefs(from_refs=low, to_refs=high):
            return {
                "from": "Unbounded" if low is None else Tag("Included", low),
                "to": "Unbounded" if high is None else Tag("Excluded", high),
            }
        case m.PreloadPathMatches() | m.PreloadNameMatches() | m.SplitPathMatches() | m.SplitNameMatches():
            return {"regex": value.regex}
        case ObjectStoreConfig.Http(opts=options, headers=headers):
            return dict(options or {}) | ({"headers": dict(headers)} if headers else {})
        case _:
            return _write(value[0])


def _write_rule(condition: m.ManifestSplitCondition, sizes: Any) -> list[Any]:
    return [_write(condition), [{"condition": _write(dimension), "num_chunks": size} for dimension, size in sizes]]


# --- reading --------------------------------------------------------------------------------------------------


def _map(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} is {type(value).__name__}, not a map")
    return value


def _items(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{what} is {type(value).__name__}, not a list")
    return list(value)


@functools.cache
def _kinds(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _read(kind: Any, value: Any) -> Any:
    """The value of a field, from its type and the stored value; the field's own check does the rest."""
    if kind in _UNIONS:
        return _read_member(kind, value)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        # All other unions are of one type and None.
        return None if value is None else _read(typing.get_args(kind)[0], value)
    if typing.get_origin(kind) is Annotated:
        read = _READERS.get(kind)
        return value if read is None else read(value)
    if not isinstance(kind, type):
        return value
    if issubclass(kind, Setting):
        return _read_setting(kind, _map(value, kind.__name__))
    if issubclass(kind, Enum):
        members = {snake_case(member.name): member for member in kind}
        if value not in members:
            raise ValueError(f"unknown {kind.__name__} {value!r}")
        return members[value]
    return value


def _read_setting(cls: Any, data: Mapping[str, Any]) -> Any:
    kinds = _kinds(cls)
    values = {f.name: _read(kinds[f.name], data[f.name]) for f in dataclasses.fields(cls) if f.name in data}
    later = {f.name: values.pop(f.name) for f in dataclasses.fields(cls) if f.name in values and not f.init}
    setting = cls(**values)
    for name, value in later.items():
        setattr(setting, name, value)
    return setting


def _read_member(union: Any, value: Any) -> Any:
    """A member of a tagged union: a bare name, or a map from the name to the payload."""
    if isinstance(value, bool):
        value = str(value).lower()  # an unquoted YAML ``true``
    if isinstance(value, str):
        name, payload = value, None
    elif isinstance(value, Mapping) and len(value) == 1:
        ((name, payload),) = value.items()
    else:
        raise TypeError(f"{type(value).__name__} is neither the name of a variant nor a map with one key")
    cls: Any = _UNIONS[union].get(name)
    if cls is None:
        raise ValueError(f"unknown variant {name!r}; the variants are {', '.join(_UNIONS[union])}")
    match cls:
        case m.PreloadNumRefs:
            bounds = _map(payload, name)
            return cls(_read_bound(bounds["from"], 0), _read_bound(bounds["to"], 1))
        case m.PreloadPathMatches | m.PreloadNameMatches | m.SplitPathMatches | m.SplitNameMatches:
            return cls(_map(payload, name)["regex"])
        case m.PreloadOr | m.PreloadAnd | m.SplitOr | m.SplitAnd:
            return cls(tuple(_read_member(union, item) for item in _items(payload, name)))
        case ObjectStoreConfig.Http:
            options = dict(_map({} if payload is None else payload, name))
            headers = options.pop("headers", None)
            return cls(options, headers)
    kinds = _kinds(cls)
    return cls(*(_read(kinds[field.name], payload) for field in dataclasses.fields(cls)))


def _read_bound(value: Any, inclusive_extra: int) -> int | None:
    """A bound as `num_refs` takes it; ours starts inclusive and ends exclusive, the format allows both everywhere."""
    match value:
        case "Unbounded":
            return None
        case {"Included": int(number)}:
            return number + inclusive_extra
        case {"Excluded": int(number)}:
            return number + 1 - inclusive_extra
    raise ValueError(f"unknown bound {value!r}")


def _read_rules(value: Any) -> list[tuple[Any, list[tuple[Any, Any]]]]:
    rules = []
    for rule in _items(value, "split_sizes"):
        condition, sizes = _items(rule, "a rule of split_sizes")
        pairs = [_map(size, "a size") for size in _items(sizes, "the sizes of a rule")]
        rules.append(
            (
                _read_member(m.ManifestSplitCondition, condition),
                [(_read_member(m.ManifestSplitDimCondition, p["condition"]), p["num_chunks"]) for p in pairs],
            )
        )
    return rules


def _read_containers(value: Any) -> dict[str, VirtualChunkContainer]:
    containers = _map(value, "virtual_chunk_containers").items()
    # Format 1's first releases had no prefix but the key.
    return {
        str(key): _read_setting(VirtualChunkContainer, {"url_prefix": key, **_map(item, "a virtual chunk container")})
        for key, item in containers
    }


def _annotation(cls: type, field: str) -> Any:
    return typing.get_args(_kinds(cls)[field])[0]


_READERS: Final[dict[Any, Any]] = {
    _annotation(RepositoryConfig, "virtual_chunk_containers"): _read_containers,
    _annotation(m.ManifestSplittingConfig, "split_sizes"): _read_rules,
}
"""Fields whose stored shape does not follow from their types."""
