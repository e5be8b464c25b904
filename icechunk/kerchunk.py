"""Kerchunk references: read into a session as virtual chunks, and written from a snapshot.

A kerchunk document of version 1 maps Zarr keys to bytes (text, or ``base64:…``), to a whole file ``[url]``, or to a
range of one, ``[url, offset, length]``. Documents of Zarr 2 are converted to Zarr 3 when they are read; exports are
in Zarr 3, key by key, as fsspec's ``reference://`` file system serves it.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import zarr
import zarr.codecs
from zarr.abc.codec import ArrayArrayCodec, ArrayBytesCodec
from zarr.core.buffer import cpu
from zarr.registry import get_codec_class

from icechunk.errors import ErrorKind, IcechunkError, InvalidInputError
from icechunk.format.values import NodeKind
from icechunk.runtime import json_codec
from icechunk.runtime.twins import synchronous
from icechunk.session import Session
from icechunk.store import IcechunkStore
from icechunk.store.zarr_keys import chunk_key_text, metadata_key_text, to_path
from icechunk.virtual import ChunkType, VirtualChunkSpec

__all__ = ["from_kerchunk", "from_kerchunk_async", "read_kerchunk_parquet", "to_kerchunk", "to_kerchunk_async"]

_CHUNK: Final = re.compile(r"(?:(.*)/)?(\d+(?:[./]\d+)*)")
_DTYPE: Final = re.compile(r"[<>|=]?[A-Za-z]+\d*(?:\[\d*[A-Za-z]+\])?", re.ASCII)
_BUILT_IN: Final = frozenset({"gzip", "zstd", "blosc"})


async def from_kerchunk_async(
    store: IcechunkStore, references: Mapping[str, Any], *, group: str = "", validate_containers: bool = True
) -> list[str]:
    """Write the arrays, groups and references of a kerchunk document.

    Parameters
    ----------
    references
        The document: ``{"version": 1, "refs": {…}}`` without templates, or the references themselves. Paths without
        a scheme are taken for files of this machine.
    group
        Path of the group that becomes the root of the references.
    validate_containers
        Leave references out that no virtual chunk container holds, instead of writing them.

    Returns
    -------
    list of str
        Kerchunk's keys of the references that were left out.

    Raises
    ------
    InvalidInputError
        Not a kerchunk document, of Zarr 2, that this understands. The session may have some of it by then: discard
        its changes, or roll back to a savepoint.
    AlreadyExistsError
        The session has an array where the document has a group.
    """
    refs = references.get("refs", references)
    if references.get("templates") or references.get("gen") or not isinstance(refs, Mapping):
        raise _bad("templates and generated references are not supported; resolve them first, for example with fsspec")
    root = to_path(group)
    arrays: dict[str, Any] = {}
    described: dict[str, str] = {}
    for key in sorted(refs):
        parent, _, name = key.rpartition("/")
        if name not in {".zgroup", ".zarray"}:
            continue
        path = _join(root, parent)
        if path in described:
            raise _bad(f"{described[path]!r} and {key!r} describe the same node")
        described[path] = key
        attributes = _document(refs.get(key[: -len(name)] + ".zattrs", "{}"))
        if name == ".zgroup":
            text = json_codec.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes})
            await store.set(metadata_key_text(path), cpu.Buffer.from_bytes(text))
        else:
            arrays[parent] = _document(refs[key])
            await asyncio.to_thread(_create, store, path, arrays[parent], attributes)
    specs: dict[str, list[VirtualChunkSpec]] = {}
    keys: dict[tuple[str, tuple[int, ...]], str] = {}
    for key, value in refs.items():
        match = _CHUNK.fullmatch(key)
        if match is None or (match[1] or "") not in arrays:
            continue
        parent = match[1] or ""
        coords = tuple(int(part) for part in re.split(r"[./]", match[2]))
        if not arrays[parent]["shape"]:
            coords = ()
        if isinstance(value, str | bytes):
            await store.set(chunk_key_text(_join(root, parent), coords), cpu.Buffer.from_bytes(_bytes(value)))
            continue
        if not isinstance(value, list | tuple) or len(value) != 3:
            raise _bad(f"the reference {key!r} names no range of bytes: {value!r}")
        try:
            spec = VirtualChunkSpec(list(coords), _url(value[0]), value[1], value[2])
        except (TypeError, ValueError) as error:
            raise _bad(f"the reference {key!r} names no range of bytes: {value!r} ({error})") from error
        specs.setdefault(parent, []).append(spec)
        keys[parent, coords] = key
    left_out: list[str] = []
    for parent, found in specs.items():
        refused = await store.set_virtual_refs_async(
            _join(root, parent), found, validate_containers=validate_containers
        )
        left_out += [keys[parent, coords] for coords in refused or ()]
    return left_out


from_kerchunk: Final = synchronous(from_kerchunk_async)


async def to_kerchunk_async(session: Session, *, group: str = "", chunks_url: str | None = None) -> dict[str, Any]:
    """The nodes and references below a group as a kerchunk document of version 1, with Zarr 3 metadata.

    Parameters
    ----------
    chunks_url
        URL of the folder that has the repository's own chunk objects, such as ``s3://bucket/prefix/chunks``; needed
        where there are such chunks.

    Raises
    ------
    InvalidInputError
        There are chunks in the repository's own objects, and no ``chunks_url``.
    """
    root = to_path(group)
    cut = len(metadata_key_text(root)) - len("zarr.json")
    refs: dict[str, Any] = {}
    for node in session._content.nodes(root):
        refs[metadata_key_text(node.path)[cut:]] = node.user_data.decode()
        if node.kind is not NodeKind.ARRAY:
            continue
        async for coords, kinds, places, offsets, lengths, inline in session.store.array_chunk_iterator(node.path):
            native = kinds == ChunkType.native.value
            if native.any() and chunks_url is None:
                raise _bad(f"array {node.path!r} has chunks in the repository itself: pass chunks_url to refer to them")
            columns = zip(coords.tolist(), places, native.tolist(), offsets.tolist(), lengths.tolist(), strict=True)
            for row, (index, place, is_native, offset, length) in enumerate(columns):
                key = chunk_key_text(node.path, index)[cut:]
                if row in inline:
                    refs[key] = "base64:" + base64.b64encode(inline[row]).decode()
                else:
                    refs[key] = [f"{str(chunks_url).rstrip('/')}/{place}" if is_native else place, offset, length]
    return {"version": 1, "refs": refs}


to_kerchunk: Final = synchronous(to_kerchunk_async)


def read_kerchunk_parquet(folder: str | Path) -> dict[str, Any]:
    """A kerchunk document that is kept as a folder of Parquet files, as `from_kerchunk` takes it.

    Needs pandas, with pyarrow or fastparquet.

    Raises
    ------
    InvalidInputError
        The folder has no ``.zmetadata`` of that kind.
    """
    import pandas

    place = Path(folder)
    try:
        described = _document((place / ".zmetadata").read_bytes())
        metadata, record_size = described["metadata"], int(described["record_size"])
    except (FileNotFoundError, NotADirectoryError, KeyError) as error:
        raise _bad(f"{place} is no folder of kerchunk's Parquet files: {error}") from error
    refs: dict[str, Any] = dict(metadata)
    for key, document in metadata.items():
        if not key.endswith(".zarray"):
            continue
        array = key.removesuffix(".zarray")
        shape, chunks = document["shape"], document["chunks"]
        grid = [-(-n // size) for n, size in zip(shape, chunks, strict=True)]
        names = map(".".join, itertools.product(*(map(str, range(n)) for n in grid))) if grid else iter(["0"])
        for number in itertools.count():
            batch = list(itertools.islice(names, record_size))
            if not batch:
                break
            file = place / array / f"refs.{number}.parq"
            if not file.exists():
                continue  # a record that is missing has no references
            rows = pandas.read_parquet(file)
            columns = [rows[name].astype(object).tolist() for name in ("path", "offset", "size", "raw")]
            for name, path, offset, size, raw in zip(
                batch, *(column[: len(batch)] for column in columns), strict=False
            ):
                if isinstance(raw, bytes) and raw:
                    refs[array + name] = raw
                elif isinstance(path, str) and path:
                    refs[array + name] = [path, int(offset), int(size)] if size else [path]
    return {"version": 1, "refs": refs}


def _create(store: IcechunkStore, path: str, document: Mapping[str, Any], attributes: dict[str, Any]) -> None:
    """Create the Zarr 3 array that a Zarr 2 document describes."""
    names = attributes.pop("_ARRAY_DIMENSIONS", None)
    try:
        dtype = _dtype(document["dtype"])
        filters: list[Any] = []
        compressors: list[Any] = []
        for config in [*(document.get("filters") or ()), *filter(None, [document.get("compressor")])]:
            codec = _codec(dict(config), dtype)
            (filters if isinstance(codec, ArrayArrayCodec) else compressors).append(codec)
        if document.get("order", "C") == "F" and len(document["shape"]) > 1:
            filters.append(zarr.codecs.TransposeCodec(order=tuple(reversed(range(len(document["shape"]))))))
        shape = tuple(document["shape"])
        zarr.create_array(
            store,
            name=path,
            shape=shape,
            chunks=tuple(document["chunks"]) or (),
            dtype=dtype.newbyteorder("="),
            serializer=zarr.codecs.BytesCodec(endian="big" if dtype.str.startswith(">") else "little"),
            filters=filters or None,
            compressors=compressors or None,
            fill_value=_fill_value(document.get("fill_value"), dtype),
            attributes=attributes,
            dimension_names=names if names and len(names) == len(shape) else None,
            overwrite=True,
        )
    except IcechunkError:
        raise
    except Exception as error:  # the codecs of other libraries raise any class for configurations that they do not take
        raise _bad(f"the metadata of array {path!r} cannot be converted to Zarr 3: {error}") from error


def _dtype(value: Any) -> np.dtype[Any]:
    # numpy takes far more than Zarr 2 writes: it reads lists of types by Python's parser, and a datetime unit that is
    # divided by zero ends the process. Thus only the form that Zarr 2 defines reaches it.
    if not isinstance(value, str) or not _DTYPE.fullmatch(value):
        raise ValueError(f"{value!r} is no data type that can be converted")
    return np.dtype(value)


def _codec(config: dict[str, Any], dtype: np.dtype[Any]) -> Any:
    name = str(config.pop("id"))
    if name == "shuffle":
        config.setdefault("elementsize", dtype.itemsize)
    if name == "blosc":
        shuffle = {0: "noshuffle", 1: "shuffle", 2: "bitshuffle"}.get(config.get("shuffle", 1), "noshuffle")
        config = {**config, "shuffle": shuffle, "typesize": dtype.itemsize}
    if name == "zstd":
        config.setdefault("checksum", False)
    full = name if name in _BUILT_IN else f"numcodecs.{name}"
    made = get_codec_class(full).from_dict({"name": full, "configuration": config})
    if isinstance(made, ArrayBytesCodec):
        raise ValueError(f"the codec {name!r} has no counterpart in Zarr 3")
    return made


def _fill_value(value: Any, dtype: np.dtype[Any]) -> Any:
    if value is None:
        return np.zeros((), dtype.newbyteorder("="))[()]
    if isinstance(value, str) and dtype.kind == "f":
        return float(value.replace("Infinity", "inf"))
    return value


def _document(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    try:
        parsed = json_codec.loads(_bytes(value))
    except json_codec.JSONDecodeError as error:
        raise _bad(f"metadata is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise _bad("metadata is not a JSON object")
    return parsed


def _bytes(value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise _bad(f"{value!r} is neither text nor a range of bytes")
    try:
        return base64.b64decode(value[7:]) if value.startswith("base64:") else value.encode()
    except ValueError as error:
        raise _bad(f"{value[:80]!r} is no text that can be read: {error}") from error


def _url(place: object) -> str:
    text = str(place)
    return text if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text) else f"file://{text}"


def _join(root: str, relative: str) -> str:
    return to_path(f"{root}/{relative}")


def _bad(reason: str) -> InvalidInputError:
    return InvalidInputError(f"kerchunk references: {reason}", ErrorKind.INVALID_VIRTUAL_REF)
