"""Zarr documents, buffers and store helpers for tests of the store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from zarr.abc.store import ByteRequest
from zarr.core.buffer import cpu, default_buffer_prototype

import icechunk
from icechunk import IcechunkStore, Repository, Session
from icechunk.runtime import json_codec
from icechunk.storage.port import Storage

__all__ = [
    "READ_ONLY",
    "array_document",
    "buffer",
    "collect",
    "group_document",
    "open_session",
    "read",
    "refused",
    "state_of",
]

PROTOTYPE = default_buffer_prototype()
READ_ONLY = "store was opened in read-only mode and does not support writing"
"""Words that zarr's own tests of stores look for."""


def buffer(data: bytes) -> cpu.Buffer:
    """A buffer as zarr passes it to `IcechunkStore.set`."""
    return cpu.Buffer.from_bytes(data)


def group_document(**attributes: Any) -> bytes:
    """zarr.json of a group."""
    return json_codec.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def array_document(shape: tuple[int, ...] = (4, 4), chunks: tuple[int, ...] | None = None, **changes: Any) -> bytes:
    """zarr.json of an array of bytes; ``changes`` replace fields, None leaves one out."""
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks or (1,) * len(shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "bytes"}],
        "attributes": {},
    }
    document.update(changes)
    return json_codec.dumps({name: value for name, value in document.items() if value is not None})


async def open_session(storage: Storage, *, inline_bytes: int = 512) -> Session:
    """A writable session of a new repository."""
    config = icechunk.RepositoryConfig(inline_chunk_threshold_bytes=inline_bytes)
    repository = await Repository.create_async(storage, config)
    return await repository.writable_session_async("main")


async def read(store: IcechunkStore, key: str, byte_range: ByteRequest | None = None) -> bytes | None:
    """Bytes of a key."""
    found = await store.get(key, PROTOTYPE, byte_range)
    return None if found is None else found.to_bytes()


async def collect(items: AsyncIterator[str]) -> list[str]:
    """Everything that an asynchronous iterator gives, sorted; nothing may come twice."""
    found = [item async for item in items]
    assert len(set(found)) == len(found)
    return sorted(found)


async def state_of(store: IcechunkStore) -> dict[str, bytes | None]:
    """All keys with their bytes."""
    return {key: await read(store, key) for key in await collect(store.list())}


@contextmanager
def refused(session: Session, error: type[icechunk.IcechunkError], kind: icechunk.ErrorKind) -> Iterator[None]:
    """The block raises this error of this kind, and changes nothing that a commit would see."""
    before, dirty = session.status(), session.has_uncommitted_changes
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error
    assert caught.value.kind == kind
    assert session.status() == before
    assert session.has_uncommitted_changes == dirty
