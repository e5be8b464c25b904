"""The parts of a node's zarr.json that the engine needs: its kind, its chunk grid, the names of its dimensions.

Everything else in the document (data type, codecs, fill value, attributes) belongs to zarr; its
presence is checked, because a document without it is not Zarr, but its content is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NoReturn

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.format.documents import parse_document
from icechunk.format.values import DimensionShape, NodeKind, NodeSnapshot
from icechunk.runtime.late_dataclass import dataclass

__all__ = ["ArrayMeta", "GroupMeta", "encoding_of", "parse_node", "parse_replacement", "require_regular_grid"]

_MAX_CHUNKS: Final = 2**32 - 1
_ARRAY_FIELDS: Final = ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMeta:
    """The document describes a group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayMeta:
    """The document describes an array."""

    shape: tuple[int, ...]
    """Number of elements along each dimension."""
    num_chunks: tuple[int, ...]
    """Number of chunks along each dimension; 0 if the dimension has no elements."""
    dimension_names: tuple[str | None, ...] | None
    """One per dimension; None if the document names none at all."""

    @property
    def dimensions(self) -> tuple[DimensionShape, ...]:
        """Shape and grid in the form that a snapshot stores."""
        return tuple(map(DimensionShape, self.shape, self.num_chunks))


def parse_node(user_data: bytes, path: str) -> GroupMeta | ArrayMeta:
    """Read a zarr.json.

    Parameters
    ----------
    user_data
        The document: UTF-8 JSON of Zarr format 3.
    path
        Path of the node, for messages.

    Raises
    ------
    InvalidInputError
        Kind ``bad-metadata`` if it is not a Zarr 3 group or array; ``invalid-array-metadata`` if it is an array
        that cannot be stored: a chunk key encoding other than ``default`` with ``/``, more than 2³²−1 chunks along a
        dimension, or grid and names that do not fit the shape.
    """
    try:
        document = parse_document(user_data)
    except ValueError as error:
        _bad(path, str(error))
    if not isinstance(document, dict):
        _bad(path, "not a JSON object")
    if document.get("zarr_format") != 3:
        _bad(path, f"zarr_format is {document.get('zarr_format')!r}, only 3 can be stored")
    match document.get("node_type"):
        case "group":
            return GroupMeta()
        case "array":
            return _parse_array(document, path)
        case other:
            _bad(path, f"node_type is {other!r}, expected 'group' or 'array'")


_FREE_FIELDS: Final = ("shape", "attributes", "dimension_names", "consolidated_metadata")


def encoding_of(user_data: bytes) -> dict[str, Any]:
    """The parts of an array's zarr.json that determine where its chunks are and how they are encoded; equal for equal
    encodings."""
    document: dict[str, Any] = parse_document(user_data)
    return {name: value for name, value in document.items() if name not in _FREE_FIELDS}


def require_regular_grid(user_data: bytes, path: str) -> None:
    """Refuse an array with another grid, which format 1 cannot hold. Raises `InvalidInputError` as `parse_node`."""
    if b'"rectilinear"' not in user_data or isinstance(parse_node(user_data, path), GroupMeta):
        return
    name = parse_document(user_data)["chunk_grid"]["name"]
    if name != "regular":
        _invalid(path, f"chunk grid {name!r}, and format 1 has only regular ones; use format 2")


def parse_replacement(user_data: bytes, node: NodeSnapshot) -> GroupMeta | ArrayMeta:
    """Read the zarr.json that a node is to have instead of its own.

    An array whose present document would be refused, which the official library has made (chunk keys or a grid that
    cannot be stored here), keeps its chunks where they are: its attributes may change, and nothing else. Raises
    `InvalidInputError` as `parse_node`.
    """
    try:
        return parse_node(user_data, node.path)
    except InvalidInputError:
        if node.kind is not NodeKind.ARRAY or not _differ_in_attributes_only(user_data, node.user_data):
            raise
    return ArrayMeta(
        shape=tuple([dimension.array_length for dimension in node.shape]),
        num_chunks=tuple([dimension.num_chunks for dimension in node.shape]),
        dimension_names=node.dimension_names,
    )


def _differ_in_attributes_only(one: bytes, other: bytes) -> bool:
    try:
        documents = [parse_document(data) for data in (one, other)]
    except ValueError:
        return False
    if not all(isinstance(document, dict) for document in documents):
        return False
    kept = [{name: value for name, value in document.items() if name != "attributes"} for document in documents]
    return bool(kept[0] == kept[1])


def _parse_array(document: Mapping[str, Any], path: str) -> ArrayMeta:
    for name in _ARRAY_FIELDS:
        if name not in document:
            _bad(path, f"field {name!r} is missing")
    shape = document["shape"]
    if not isinstance(shape, list) or not all(_is_length(n, 0) for n in shape):
        _bad(path, f"shape is {shape!r}, expected a list of lengths")
    _check_key_encoding(document["chunk_key_encoding"], path)
    num_chunks = _parse_grid(document["chunk_grid"], shape, path)
    for n in num_chunks:
        if n > _MAX_CHUNKS:
            _invalid(path, f"{n} chunks along one dimension; at most {_MAX_CHUNKS} fit, choose larger chunks")
    names = document.get("dimension_names")
    if names is not None:
        if not isinstance(names, list) or not all(n is None or isinstance(n, str) for n in names):
            _bad(path, f"dimension_names is {names!r}, expected a list of names and nulls")
        if len(names) != len(shape):
            _invalid(path, f"{len(names)} dimension names for {len(shape)} dimensions")
        names = tuple(names)
    return ArrayMeta(shape=tuple(shape), num_chunks=num_chunks, dimension_names=names)


def _check_key_encoding(encoding: object, path: str) -> None:
    # Keys are stored as coordinates, so only one spelling of a key can be restored.
    name: object
    configuration: Any
    if isinstance(encoding, str):
        name, configuration = encoding, None
    elif isinstance(encoding, dict):
        name, configuration = encoding.get("name"), encoding.get("configuration")
    else:
        _bad(path, f"chunk_key_encoding is {encoding!r}")
    if configuration is not None and not isinstance(configuration, dict):
        _bad(path, f"chunk_key_encoding is {encoding!r}")
    separator = "/" if configuration is None else configuration.get("separator", "/")
    if name != "default" or separator != "/":
        _invalid(
            path, f"chunk key encoding {name!r} with separator {separator!r}; only 'default' with '/' is supported"
        )


def _parse_grid(grid: object, shape: list[int], path: str) -> tuple[int, ...]:
    if not isinstance(grid, dict) or not isinstance(grid.get("configuration"), dict):
        _bad(path, f"chunk_grid is {grid!r}")
    name, configuration = grid.get("name"), grid["configuration"]
    if name == "regular":
        chunks = configuration.get("chunk_shape")
        if not isinstance(chunks, list) or not all(_is_length(c, 0) for c in chunks):
            _bad(path, f"chunk_shape is {chunks!r}, expected a list of positive lengths")
        if len(chunks) != len(shape):
            _invalid(path, f"chunk_shape has {len(chunks)} dimensions, shape has {len(shape)}")
        # zarr writes a chunk length of 0 for a dimension without elements, which has no chunks anyway.
        if any(n and not c for n, c in zip(shape, chunks, strict=True)):
            _bad(path, f"chunk_shape is {chunks!r}, expected positive lengths wherever shape {shape!r} has elements")
        return tuple([-(-n // c) if n else 0 for n, c in zip(shape, chunks, strict=True)])
    if name == "rectilinear":
        chunks = configuration.get("chunk_shapes")
        if configuration.get("kind", "inline") != "inline" or not isinstance(chunks, list):
            _bad(path, f"rectilinear chunk_grid is {configuration!r}, expected kind 'inline' and chunk_shapes")
        if len(chunks) != len(shape):
            _invalid(path, f"chunk_shapes has {len(chunks)} dimensions, shape has {len(shape)}")
        return tuple(_count_edges(edges, n, path) for edges, n in zip(chunks, shape, strict=True))
    _bad(path, f"chunk grid {name!r}; 'regular' and 'rectilinear' can be stored")


def _count_edges(edges: object, length: int, path: str) -> int:
    if _is_length(edges, 1):
        assert isinstance(edges, int)
        return -(-length // edges)
    if not isinstance(edges, list):
        _bad(path, f"rectilinear chunk_shapes has {edges!r}, expected a list of chunk lengths")
    count = 0
    for edge in edges:
        if _is_length(edge, 1):
            count += 1
        elif isinstance(edge, list) and len(edge) == 2 and _is_length(edge[0], 1) and _is_length(edge[1], 1):
            count += edge[1]
        else:
            _bad(path, f"rectilinear chunk_shapes has {edge!r}, expected a length or [length, repetitions]")
    return count


def _is_length(value: object, least: int) -> bool:
    return type(value) is int and least <= value < 2**64


def _bad(path: str, why: str) -> NoReturn:
    raise InvalidInputError(f"cannot set the metadata of {path}: {why}", ErrorKind.BAD_METADATA)


def _invalid(path: str, why: str) -> NoReturn:
    raise InvalidInputError(f"cannot set the metadata of {path}: {why}", ErrorKind.INVALID_ARRAY_METADATA)
