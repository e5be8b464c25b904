"""One object a chunk, through obstore and aiobotocore directly: the speed of the connection itself."""

from __future__ import annotations

import asyncio
import contextlib
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import numpy as np

from .target import Target

__all__ = ["AiobotocoreTarget", "ObstoreTarget", "bounded", "obstore_store"]


async def bounded(
    function: Callable[[int], Awaitable[None]], items: Iterable[int], tasks: int, stop: Callable[[], bool] | None = None
) -> None:
    """Call `function` with every item, `tasks` at a time; no further item once `stop` returns true or a call raised."""
    waiting = iter(items)

    async def work() -> None:
        for item in waiting:
            if stop is not None and stop():
                return
            await function(item)

    async with asyncio.TaskGroup() as group:
        for _ in range(tasks):
            group.create_task(work())


class _ObjectsTarget(Target):
    """Objects called ``0``, ``1``, … below the prefix."""

    _n_chunks = 0

    @abstractmethod
    async def _put(self, name: str, data: np.ndarray[Any, Any]) -> None: ...

    @abstractmethod
    async def _get(self, name: str) -> np.ndarray[Any, Any]: ...

    async def create(self, n_chunks: int) -> None:
        self._n_chunks = n_chunks
        await self.attach()

    async def refresh(self) -> None:
        return

    async def read(self, index: int) -> np.ndarray[Any, Any]:
        return await self._get(str(index))

    async def read_all(self) -> np.ndarray[Any, Any]:
        made = np.empty((self._n_chunks, self.chunk_bytes), dtype="u1")

        async def one(index: int) -> None:
            made[index] = await self._get(str(index))

        await bounded(one, range(self._n_chunks), self.tasks)
        return made.reshape(-1)

    async def write(self, index: int, data: np.ndarray[Any, Any]) -> None:
        await self._put(str(index), data)

    async def write_all(self, data: np.ndarray[Any, Any]) -> None:
        await self._write_from(0, data)

    async def extend(self, data: np.ndarray[Any, Any]) -> None:
        first = self._n_chunks
        self._n_chunks += data.size // self.chunk_bytes
        await self._write_from(first, data)

    async def _write_from(self, first: int, data: np.ndarray[Any, Any]) -> None:
        rows = data.reshape(-1, self.chunk_bytes)

        async def one(row: int) -> None:
            await self._put(str(first + row), rows[row])

        await bounded(one, range(len(rows)), self.tasks)


class ObstoreTarget(_ObjectsTarget):
    """Raw obstore (Rust's object_store)."""

    _store: Any = None

    async def attach(self) -> None:
        if self._store is None or self.place["kind"] != "memory":
            self._store = obstore_store(self.place)

    async def _put(self, name: str, data: np.ndarray[Any, Any]) -> None:
        import obstore

        await obstore.put_async(self._store, name, data.tobytes(), use_multipart=False)

    async def _get(self, name: str) -> np.ndarray[Any, Any]:
        import obstore

        answer = await obstore.get_async(self._store, name)
        body: Any = await answer.bytes_async()
        return np.frombuffer(body, dtype="u1")


class AiobotocoreTarget(_ObjectsTarget):
    """Raw aiobotocore, with as many connections as tasks."""

    _client: Any = None
    _stack: contextlib.AsyncExitStack | None = None

    async def attach(self) -> None:
        from aiobotocore.config import AioConfig
        from aiobotocore.session import get_session

        await self.aclose()
        self._stack = contextlib.AsyncExitStack()
        self._client = await self._stack.enter_async_context(
            get_session().create_client(
                "s3",
                region_name=self.place["region"],
                endpoint_url=self.place["endpoint"],
                aws_access_key_id=self.place["access_key_id"],
                aws_secret_access_key=self.place["secret_access_key"],
                config=AioConfig(s3={"addressing_style": "path"}, max_pool_connections=max(self.tasks, 10)),
            )
        )

    async def aclose(self) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            await stack.aclose()

    async def _put(self, name: str, data: np.ndarray[Any, Any]) -> None:
        await self._client.put_object(Bucket=self.place["bucket"], Key=self._key(name), Body=data.tobytes())

    async def _get(self, name: str) -> np.ndarray[Any, Any]:
        answer = await self._client.get_object(Bucket=self.place["bucket"], Key=self._key(name))
        async with answer["Body"] as body:
            read: bytes = await body.read()
            return np.frombuffer(read, dtype="u1")

    def _key(self, name: str) -> str:
        return f"{self.place['prefix']}/{name}"


def obstore_store(place: Mapping[str, Any]) -> Any:
    """An obstore store whose root is the place's prefix."""
    import obstore.store

    match place["kind"]:
        case "memory":
            return obstore.store.MemoryStore()
        case "local":
            return obstore.store.LocalStore(f"{place['path']}/{place['prefix']}", mkdir=True)
        case _:
            return obstore.store.S3Store(
                place["bucket"],
                prefix=place["prefix"],
                endpoint=place["endpoint"],
                region=place["region"],
                access_key_id=place["access_key_id"],
                secret_access_key=place["secret_access_key"],
                virtual_hosted_style_request=False,
                client_options={"allow_http": place["endpoint"].startswith("http://")},
            )
