"""Reading from Google Cloud Storage and Azure Blob Storage, through obstore.

Versions are ETags. Google's conditions are on generations instead: the one that belongs to an ETag is remembered from
the last answer. Obstore does not say when the store answered, so ``date_us`` is None throughout.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final

from icechunk.config import StorageSettings
from icechunk.errors import ErrorKind, InvalidInputError, ObjectNotFoundError, StorageError
from icechunk.runtime.clock import us_of
from icechunk.storage.obstore.buckets import ObstoreBucket
from icechunk.storage.obstore.obstore_errors import access_error, missing, obstore_module
from icechunk.storage.patience import Patience
from icechunk.storage.port import (
    ByteRange,
    GetResult,
    ObjectInfo,
    Range,
    Storage,
    Suffix,
    Version,
    check_key,
    check_range,
    resolve_range,
)
from icechunk.storage.retry import Tries
from icechunk.storage.rights import Right
from icechunk.storage.settings import Effective

__all__ = ["ObstoreReading", "version_of_meta"]

_GENERATIONS: Final = 256
_PLAIN: Final = re.compile(r"[A-Za-z0-9_./=-]*")


class ObstoreReading(Storage):
    """The reading half of a storage in a bucket, with the parts that the writing half uses too.

    Parameters
    ----------
    bucket
        Bucket, prefix, credentials and options.
    settings
        Tries, timeouts, storage classes; official defaults where silent.
    """

    def __init__(self, bucket: ObstoreBucket, settings: StorageSettings | None = None) -> None:
        self._bucket = bucket
        # ETag and generation of objects seen last, oldest first.
        self._generations: dict[str, tuple[str, str]] = {}
        self._patience = Patience()
        self._use(Effective(settings))

    def _use(self, effective: Effective) -> None:
        self._effective = effective
        self._stores: tuple[int, dict[str, Any]] = (os.getpid(), {})

    def _store(self, role: str) -> Any:
        pid, stores = self._stores
        if pid != os.getpid():
            # Connections of a store belong to the process that made it.
            self._stores = (os.getpid(), stores := {})
        found = stores.get(role)
        if found is None:
            found = stores[role] = self._bucket.open(self._effective.limits, role=role)
        return found

    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        check_range(byte_range)
        path = self._path(key)
        match byte_range:
            case None:
                options: dict[str, Any] = {}
            case Range(start, None):
                options = {"range": {"offset": start}}
            case Range(start, end):
                options = {"range": (start, end)}
            case Suffix(length):
                # Azure has no suffix ranges.
                size = (await self.head(key)).size
                if size == 0:
                    return await self.get(key)
                options = {"range": (max(0, size - length), size)}
        store = self._store("read")
        try:
            answer = await self._ask(lambda: obstore_module().get_async(store, path, options=options))
            data = bytes(await answer.bytes_async())
        except Exception as error:
            raise await self._unread(key, byte_range, error) from error
        meta = answer.meta
        info = self._info(key, meta)
        return GetResult(body=data, size=info.size, version=info.version, modified_us=info.modified_us, date_us=None)

    async def _ask(self, send: Callable[[], Awaitable[Any]], body_bytes: int = 0) -> Any:
        """The answer to a request that may be sent again; it is, where it is probably stuck."""
        tries = Tries(self._effective.limits, self._bucket.sources)
        while True:
            try:
                return await self._patience.within(send(), tries.limits, body_bytes)
            except TimeoutError:
                if not await tries.again():
                    raise

    async def _unread(self, key: str, byte_range: ByteRange, error: Exception) -> Exception:
        """The error to raise for one while reading."""
        if missing(error):
            return self._not_found(key)
        if isinstance(byte_range, Range):
            # Stores and obstore say in many ways that an object is shorter.
            try:
                resolve_range(byte_range, (await self.head(key)).size, key)
            except InvalidInputError as refusal:
                return refusal
            except StorageError:
                pass
        return self._denied_or(Right.READ, key, f"read {self._name(key)}", error)

    async def head(self, key: str) -> ObjectInfo:
        return self._info(key, (await self._look(key)).meta)

    async def _look(self, key: str) -> Any:
        """The answer to a HEAD: ``meta`` and ``attributes``."""
        path = self._path(key)
        store = self._store("read")
        try:
            return await self._ask(lambda: obstore_module().get_async(store, path, options={"head": True}))
        except Exception as error:
            if missing(error):
                raise self._not_found(key) from error
            raise self._denied_or(Right.READ, key, f"look at {self._name(key)}", error) from error

    async def list_pages(
        self, prefix: str = "", *, start_after: str | None = None, page_size: int = 1000
    ) -> AsyncIterator[list[ObjectInfo]]:
        root = self._bucket.root
        wanted = root + prefix
        offset = _just_before(wanted)
        if start_after is not None:
            offset = max(offset or "", _plain_part(root + start_after), key=str.encode)
        store = self._store("read")
        try:
            stream = obstore_module().list(
                store,
                wanted.rpartition("/")[0] or None,
                offset=offset or None,
                chunk_size=page_size,
            )
            page: list[ObjectInfo] = []
            async for metas in stream:
                for meta in metas:
                    name = meta["path"]
                    if not name.startswith(wanted):
                        if name.encode() > wanted.encode():
                            # Keys from here on do not begin with the prefix.
                            if page:
                                yield page
                            return
                        continue
                    key = name[len(root) :]
                    if start_after is not None and key.encode() <= start_after.encode():
                        continue
                    page.append(self._info(key, meta))
                    if len(page) >= page_size:
                        yield page
                        page = []
            if page:
                yield page
        except GeneratorExit:
            raise
        except StorageError:
            raise
        except Exception as error:
            raise self._denied_or(Right.LIST, prefix, f"list {self._name(prefix)}", error) from error

    def describe(self) -> str:
        return self._bucket.describe()

    def _path(self, key: str) -> str:
        check_key(key)
        for character in self._bucket.refused_characters:
            if character in key:
                raise InvalidInputError(
                    f"bad storage key {key!r}: {self._bucket.kind} does not keep {character!r} in names",
                    ErrorKind.INVALID_KEY,
                )
        return self._bucket.root + key

    def _name(self, key: str) -> str:
        return self._bucket.describe() + key

    def _denied_or(self, right: Right, key: str, what: str, error: BaseException) -> StorageError:
        """The error for one of obstore's, which names the right if one is missing."""
        return access_error(self._bucket.service, right, key, what, error)

    def _not_found(self, key: str) -> ObjectNotFoundError:
        return ObjectNotFoundError(f"no object {key!r} in {self.describe()}")

    def _info(self, key: str, meta: Mapping[str, Any]) -> ObjectInfo:
        self._remember(key, meta)
        return ObjectInfo(
            key=key,
            size=meta["size"],
            version=version_of_meta(meta),
            modified_us=us_of(meta["last_modified"]),
        )

    def _remember(self, key: str, meta: Mapping[str, Any]) -> None:
        if not self._bucket.versions_are_generations or meta["version"] is None:
            return
        known = self._generations
        known.pop(key, None)
        if len(known) >= _GENERATIONS:
            known.pop(next(iter(known)), None)
        known[key] = (version_of_meta(meta), meta["version"])


def version_of_meta(meta: Mapping[str, Any]) -> Version:
    return Version((meta["e_tag"] or "").strip('"'))


def _plain_part(name: str) -> str:
    """The longest beginning of a name that obstore passes on unchanged; never sorts after the name."""
    match = _PLAIN.match(name)
    return match[0] if match is not None else ""


def _just_before(prefix: str) -> str:
    """A name that sorts before all that begin with the prefix, and not long before."""
    plain = _plain_part(prefix)
    return plain if plain != prefix else plain[:-1]
