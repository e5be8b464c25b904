"""``icechunk://``: the Zarr keys of one version of a repository as a read-only fsspec file system."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping
from functools import partial
from io import BytesIO
from typing import Any, ClassVar, Final

from fsspec.asyn import AsyncFileSystem
from zarr.abc.store import RangeByteRequest
from zarr.core.buffer import default_buffer_prototype

from icechunk.config import RepositoryConfig
from icechunk.credentials import AnyCredential
from icechunk.errors import ErrorKind, InvalidInputError, ReadOnlyError
from icechunk.repository.by_url import session_at
from icechunk.session import Session
from icechunk.storage.url import parse_url

__all__ = ["IcechunkFileSystem"]


_CHUNK: Final = re.compile(r"(^|/)c(/\d+)*$")
"""Keys of chunks, those of arrays without dimensions among them; and directories above keys of several numbers."""


class IcechunkFileSystem(AsyncFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Reads the keys of one version: ``group/array/zarr.json``, ``group/array/c/0/0``. Nothing can be written.

    >>> fs = fsspec.filesystem("icechunk", fo="s3://bucket/prefix|icechunk:@tag.v1")  # doctest: +SKIP
    >>> fs.ls("temperature")  # doctest: +SKIP

    A chained URL names the place behind ``::``: ``icechunk://temperature/zarr.json::file:///data/repo`` reads the tip
    of ``main``.

    Parameters
    ----------
    fo
        The repository and the version, as in `icechunk.open`. A path in it is the root of this file system.
    storage_options
        Keyword arguments of the storage: see `icechunk.storage_from_url`.
    config, authorize_virtual_chunk_access
        As for `Repository.open`.
    target_protocol, target_options
        Given by fsspec for chained URLs: the scheme of ``fo``, and its storage options.
    """

    protocol: ClassVar[str] = "icechunk"
    root_marker = ""
    cachable = True

    def __init__(
        self,
        fo: str,
        *,
        storage_options: Mapping[str, Any] | None = None,
        config: RepositoryConfig | None = None,
        authorize_virtual_chunk_access: dict[str, AnyCredential | None] | None = None,
        target_protocol: str | None = None,
        target_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if target_protocol and target_protocol not in ("file", "local") and "://" not in fo:
            fo = f"{target_protocol}://{fo}"
        self._url = parse_url(fo)
        self._open_session = partial(
            session_at,
            self._url,
            storage_options=storage_options or target_options or None,
            config=config,
            authorize_virtual_chunk_access=authorize_virtual_chunk_access,
        )
        self._opening: asyncio.Lock | None = None
        self._session: Session | None = None

    async def _store(self) -> Any:
        if self._session is None:
            # Everything runs on fsspec's loop, so a lock of that loop is enough.
            self._opening = self._opening or asyncio.Lock()
            async with self._opening:
                if self._session is None:
                    self._session = await self._open_session()
        return self._session.store

    def invalidate_cache(self, path: str | None = None) -> None:
        """Read the newest version of the branch from now on; fsspec hands out one instance for equal arguments."""
        self._session = None
        super().invalidate_cache(path)

    def _key(self, path: str) -> str:
        inside = self._strip_protocol(path).strip("/")
        return "/".join(filter(None, (self._url.path, inside)))

    def _name(self, key: str) -> str:
        return key.removeprefix(self._url.path).strip("/")

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        store, key = await self._store(), self._key(path)
        name = self._name(key)
        if await self._is_file(key):
            return {"name": name, "size": await store.getsize(key), "type": "file"}
        if not key or not await store.is_empty(key):
            return {"name": name, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    async def _is_file(self, key: str) -> bool:
        if key.rpartition("/")[2] != "zarr.json" and not _CHUNK.search(key):
            return False
        try:
            found: bool = await (await self._store()).exists(key)
        except InvalidInputError as error:
            if error.kind != ErrorKind.NOT_AN_ARRAY:
                raise
            return False  # a group whose name is as that of a chunk
        return found

    async def _ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        store, key = await self._store(), self._key(path)
        children = [child async for child in store.list_dir(key)]
        if not children:
            entry = await self._info(path)
            found = [entry] if entry["type"] == "file" else []
        else:
            found = [await self._info(self._name(f"{key}/{child}" if key else child)) for child in sorted(children)]
        return found if detail else [entry["name"] for entry in found]

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        store, key = await self._store(), self._key(path)
        if (await self._info(path))["type"] != "file":
            raise IsADirectoryError(path)
        span = None
        if start is not None or end is not None:
            size = await store.getsize(key)
            first, last, _step = slice(start, end).indices(size)
            if last <= first:
                return b""
            span = RangeByteRequest(first, last)
        data = await store.get(key, default_buffer_prototype(), span)
        if data is None:
            raise FileNotFoundError(path)
        found: bytes = data.to_bytes()
        return found

    async def _get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        if (await self._info(rpath))["type"] == "directory":
            # A recursive `get` asks for these as well.
            await asyncio.to_thread(os.makedirs, lpath, exist_ok=True)
            return
        data = await self._cat_file(rpath)
        await asyncio.to_thread(_write, lpath, data)

    async def _pipe_file(self, path: str, *_: Any, **__: Any) -> None:
        raise _read_only(path)

    async def _put_file(self, lpath: str, rpath: str, *_: Any, **__: Any) -> None:
        raise _read_only(rpath)

    async def _rm_file(self, path: str, **_: Any) -> None:
        raise _read_only(path)

    async def _cp_file(self, path1: str, path2: str, **_: Any) -> None:
        raise _read_only(path2)

    async def _mkdir(self, path: str, *_: Any, **__: Any) -> None:
        raise _read_only(path)

    async def _makedirs(self, path: str, *_: Any, **__: Any) -> None:
        raise _read_only(path)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "rb":
            raise _read_only(path)
        return BytesIO(self.cat_file(path))


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def _read_only(path: str) -> ReadOnlyError:
    return ReadOnlyError(
        f"cannot write {path!r}: a file system of icechunk:// is read-only; write through a session of the repository",
        ErrorKind.READ_ONLY_STORAGE,
    )
