"""The systems under test, each behind the interface `Target`.

Every system gets the same calls, at the defaults of its own API.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import numpy as np
import zarr
import zarr.api.asynchronous as zarr_async

from .target import Target

__all__ = ["IcechunkTarget", "ZarrTarget", "make_target", "set_zarr_concurrency"]

ARRAY = "chunks"
DIMENSION = "byte"


class _ArrayTarget(Target):
    """A target whose interface is a zarr store."""

    _writing: Any = None
    _reading: Any = None

    async def read(self, index: int) -> np.ndarray[Any, Any]:
        start = index * self.chunk_bytes
        return np.asarray(await self._reading.getitem(slice(start, start + self.chunk_bytes)))

    async def read_all(self) -> np.ndarray[Any, Any]:
        return np.asarray(await self._reading.getitem(slice(None)))

    async def write(self, index: int, data: np.ndarray[Any, Any]) -> None:
        start = index * self.chunk_bytes
        await self._writing.setitem(slice(start, start + self.chunk_bytes), data)

    async def write_all(self, data: np.ndarray[Any, Any]) -> None:
        await self._writing.setitem(slice(None), data)

    async def extend(self, data: np.ndarray[Any, Any]) -> None:
        before = self._writing.shape[0]
        await self._writing.resize((before + data.size,))
        await self._writing.setitem(slice(before, None), data)

    async def _make(self, store: Any, n_chunks: int) -> None:
        self._writing = await zarr_async.create_array(
            store,
            name=ARRAY,
            shape=(n_chunks * self.chunk_bytes,),
            chunks=(self.chunk_bytes,),
            dtype="u1",
            compressors=None,
            filters=None,
            dimension_names=(DIMENSION,),
        )

    async def _open(self, store: Any) -> Any:
        return await zarr_async.open_array(store=store, path=ARRAY, zarr_format=3)


class IcechunkTarget(_ArrayTarget):
    """The library that ``import icechunk`` finds: ours, or the official one."""

    repo: Any = None
    _storage: Any = None
    _session: Any = None

    async def create(self, n_chunks: int) -> None:
        import icechunk

        self.repo = await icechunk.Repository.create_async(self.storage())
        session = await self.repo.writable_session_async("main")
        await self._make(session.store, n_chunks)
        await session.commit_async("an empty array")

    async def attach(self) -> None:
        import icechunk

        await self._forget()
        self.repo = await icechunk.Repository.open_async(self.storage())
        await self.refresh()

    async def refresh(self) -> None:
        session = await self.repo.readonly_session_async("main")
        self._reading = await self._open(session.store)

    async def begin(self) -> None:
        self._session = await self.repo.writable_session_async("main")
        self._writing = await self._open(self._session.store)

    async def commit(self, message: str) -> None:
        await self._session.commit_async(message)

    @contextlib.asynccontextmanager
    async def ingesting(self) -> AsyncIterator[Callable[[np.ndarray[Any, Any], int], Awaitable[None]]]:
        if not hasattr(self.repo, "appender"):
            async with super().ingesting() as put_by_hand:
                yield put_by_hand
            return
        rows = 1_000_000_000
        async with self.repo.appender("main", dim=DIMENSION, source="loadtest", max_rows=rows) as appender:

            async def put(data: np.ndarray[Any, Any], offset: int) -> None:
                await appender.put({ARRAY: data}, offset=offset, durable=True)

            yield put

    async def touch(self, name: str, value: int) -> None:
        """A transaction of its own that makes one small group; loses the race where another commits meanwhile.

        Raises
        ------
        icechunk.ConflictError
            Another commit came first.
        """
        session = await self.repo.writable_session_async("main")
        group = await zarr_async.open_group(session.store, path=f"writers/{name}", mode="a")
        await group.update_attributes({"value": value})
        await session.commit_async(f"{name} {value}")

    async def history(self) -> list[str]:
        """Messages of all commits on main, newest first."""
        return [info.message async for info in self.repo.async_ancestry(branch="main")]

    async def aclose(self) -> None:
        await self._forget()

    async def _forget(self) -> None:
        self._reading = self._writing = self._session = None
        repo, self.repo = self.repo, None
        close = getattr(repo, "aclose", None)
        if close is not None:
            await close()

    def storage(self) -> Any:
        """The storage of the place; in memory always the same one, since another would be empty."""
        import icechunk

        place = self.place
        match place["kind"]:
            case "memory":
                self._storage = self._storage or icechunk.in_memory_storage()
                return self._storage
            case "local":
                return icechunk.local_filesystem_storage(f"{place['path']}/{place['prefix']}")
            case _:
                return icechunk.s3_storage(
                    bucket=place["bucket"],
                    prefix=place["prefix"],
                    region=place["region"],
                    endpoint_url=place["endpoint"],
                    allow_http=place["endpoint"].startswith("http://"),
                    force_path_style=True,
                    access_key_id=place["access_key_id"],
                    secret_access_key=place["secret_access_key"],
                )


class ZarrTarget(_ArrayTarget):
    """Plain zarr on obstore or on fsspec: no transactions, every write is visible at once."""

    def __init__(self, place: Mapping[str, Any], chunk_bytes: int, tasks: int, *, through: str) -> None:
        super().__init__(place, chunk_bytes, tasks)
        self._through = through
        self._memory: Any = None

    async def create(self, n_chunks: int) -> None:
        await self._make(self._store(), n_chunks)

    async def attach(self) -> None:
        self._reading = self._writing = await self._open(self._store())

    async def refresh(self) -> None:
        self._reading = await self._open(self._store())

    async def begin(self) -> None:
        self._writing = await self._open(self._store())

    def _store(self) -> Any:
        place = self.place
        if self._through == "obstore":
            from .objects import obstore_store

            self._memory = self._memory or (obstore_store(place) if place["kind"] == "memory" else None)
            return zarr.storage.ObjectStore(self._memory or obstore_store(place))
        return zarr.storage.FsspecStore.from_url(
            f"s3://{place['bucket']}/{place['prefix']}",
            storage_options={
                "key": place["access_key_id"],
                "secret": place["secret_access_key"],
                "endpoint_url": place["endpoint"],
                "client_kwargs": {"region_name": place["region"]},
                "asynchronous": True,
                "skip_instance_cache": True,
                "use_listings_cache": False,
            },
        )


def make_target(system: str, place: Mapping[str, Any], chunk_bytes: int, tasks: int) -> Target:
    """The target of a system by its name.

    Raises
    ------
    ImportError
        A package that the system needs is not installed.
    ValueError
        There is no such system, or it does not support that kind of storage.
    """
    match system:
        case "ours" | "official":
            return IcechunkTarget(place, chunk_bytes, tasks)
        case "zarr-obstore":
            return ZarrTarget(place, chunk_bytes, tasks, through="obstore")
        case "zarr-fsspec":
            _only_s3(system, place)
            return ZarrTarget(place, chunk_bytes, tasks, through="fsspec")
        case "obstore":
            from .objects import ObstoreTarget

            return ObstoreTarget(place, chunk_bytes, tasks)
        case "aiobotocore":
            from .objects import AiobotocoreTarget

            _only_s3(system, place)
            return AiobotocoreTarget(place, chunk_bytes, tasks)
        case _:
            raise ValueError(f"no such system: {system}")


def _only_s3(system: str, place: Mapping[str, Any]) -> None:
    if place["kind"] != "s3":
        raise ValueError(f"{system} is measured on S3 only")


def set_zarr_concurrency(tasks: int) -> contextlib.AbstractContextManager[Any]:
    """While the returned context lasts, zarr works on that many chunks of one call at a time (its default is 10)."""
    made: contextlib.AbstractContextManager[Any] = zarr.config.set({"async.concurrency": tasks})
    return made
