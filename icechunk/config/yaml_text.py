"""Format 1's ``config.yaml``: the stored shape of a configuration as YAML, enum variants as ``!tag``s."""

from __future__ import annotations

import re
from typing import Any, Final

import yaml

from icechunk.config.repository import RepositoryConfig
from icechunk.config.serialise import Tag, config_from_dict, config_tree
from icechunk.errors import ErrorKind, FormatError

__all__ = ["MAX_YAML_BYTES", "config_from_yaml", "config_to_yaml", "dump_yaml", "load_yaml"]

MAX_YAML_BYTES: Final = 1 << 18
"""Larger configuration files are refused unread."""


def config_to_yaml(config: RepositoryConfig) -> bytes:
    """The form for ``config.yaml``, UTF-8. Pure."""
    return dump_yaml(config_tree(config)).encode()


def dump_yaml(tree: Any) -> str:
    """Dicts, lists, plain scalars and `Tag`s as YAML. Pure."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def load_yaml(data: bytes) -> Any:
    """The same back; tags are one-key maps. Raises `ValueError` with the reason where it is not such YAML."""
    if len(data) > MAX_YAML_BYTES:
        raise ValueError(f"{len(data)} bytes, more than the {MAX_YAML_BYTES} that a configuration may have")
    try:
        return yaml.load(data, Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(type(error).__name__) from error


def config_from_yaml(data: bytes) -> RepositoryConfig:
    """Read ``config.yaml``.

    Raises
    ------
    FormatError
        Not YAML, larger than `MAX_YAML_BYTES`, with aliases, or no configuration (kind ``config-deserialization``).
    """
    try:
        value = load_yaml(data)
    except ValueError as error:
        raise _invalid(str(error)) from error
    return config_from_dict({} if value is None else value)


def _invalid(reason: str) -> FormatError:
    return FormatError(f"config.yaml is not the YAML of a configuration: {reason}", ErrorKind.CONFIG_DESERIALIZATION)


_MAX_DEPTH: Final = 100

# The official library's YAML is 1.2: of the plain scalars only these are no strings.
_NULL: Final = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL: Final = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT: Final = re.compile(r"^[-+]?[0-9]+$")
_PLAIN: Final = re.compile(r"[A-Za-z_/][A-Za-z_/.:-]*")


class _Loader(yaml.SafeLoader):
    """Safe scalars and collections, `!tag`s as one-key maps, no aliases (they can make a small file huge)."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own attribute

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        # PyYAML's effort grows with the square of this depth.
        if self.flow_level >= _MAX_DEPTH:
            raise yaml.YAMLError("too deep")
        super().fetch_flow_collection_start(token_class)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)


def _construct_tag(loader: _Loader, suffix: str, node: yaml.Node) -> dict[str, Any]:
    # The payload keeps the type that its text has without the tag.
    if isinstance(node, yaml.ScalarNode):
        plain = (node.style is None, False)
        tag = loader.resolve(yaml.ScalarNode, node.value, plain)  # type: ignore[no-untyped-call]
        inner = yaml.ScalarNode(tag, node.value)
        return {suffix: loader.construct_object(inner, deep=True)}
    if isinstance(node, yaml.SequenceNode):
        return {suffix: loader.construct_sequence(node, deep=True)}
    assert isinstance(node, yaml.MappingNode)
    return {suffix: loader.construct_mapping(node, deep=True)}


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_multi_constructor("!", _construct_tag)


class _Dumper(yaml.SafeDumper):
    """Block style, no aliases, strings quoted wherever some YAML version might read something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def choose_scalar_style(self) -> Any:
        style = super().choose_scalar_style()
        # PyYAML quotes every scalar with a tag, but other parsers read a quoted number under a tag as a string.
        event = self.event
        if isinstance(event, yaml.ScalarEvent) and str(event.tag).startswith("!") and not event.style:
            return ""
        return style


def _represent_str(dumper: _Dumper, value: str) -> yaml.Node:
    style = None if _PLAIN.fullmatch(value) and not _BOOL.match(value) and not _NULL.match(value) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


def _represent_tag(dumper: _Dumper, tag: Tag) -> yaml.Node:
    node = dumper.represent_data(tag.value)
    node.tag = f"!{tag.name}"
    return node


_Dumper.add_representer(str, _represent_str)
_Dumper.add_representer(Tag, _represent_tag)
