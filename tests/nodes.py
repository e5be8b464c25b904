"""Nodes and chunks of a session by the bytes of their keys: what tests of commits write, without zarr's arrays."""

from __future__ import annotations

from zarr.core.buffer import cpu, default_buffer_prototype

from icechunk import Session


def key_of(path: str, *rest: object) -> str:
    """The key of a node's document, or of one of its chunks, in the store."""
    return "/".join(map(str, (path.strip("/"), *rest))).lstrip("/")


async def write_node(session: Session, path: str, document: bytes) -> None:
    """Set the zarr.json of a node."""
    await session.store.set(key_of(path, "zarr.json"), cpu.Buffer.from_bytes(document))


async def write_chunk(session: Session, path: str, coords: tuple[int, ...], data: bytes) -> None:
    """Set the bytes of a chunk."""
    await session.store.set(key_of(path, "c", *coords), cpu.Buffer.from_bytes(data))


async def read_chunk(session: Session, path: str, coords: tuple[int, ...]) -> bytes | None:
    """The bytes of a chunk; None if there is none."""
    found = await session.store.get(key_of(path, "c", *coords), default_buffer_prototype())
    return None if found is None else found.to_bytes()


async def delete_chunk(session: Session, path: str, coords: tuple[int, ...]) -> None:
    """Delete a chunk."""
    await session.store.delete(key_of(path, "c", *coords))
