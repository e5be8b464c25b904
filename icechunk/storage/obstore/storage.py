"""Objects in Google Cloud Storage and Azure Blob Storage, through obstore.

Obstore keeps its connections and its event loop in threads of its own, so that one storage serves all loops of a
process. It repeats requests by itself if that is safe. Conditional writes are sent once only: they have a random
id in the object's metadata, by which the outcome of one that was refused or not answered is found out, as
`icechunk.storage.outcome` describes.

Versions are ETags. Google's conditions are on generations instead: the one that belongs to an ETag is remembered from
the last answer, or asked for first. Obstore does not say when the store answered, so ``date_us`` is None throughout.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from icechunk.config import StorageSettings
from icechunk.errors import AccessDeniedError, ErrorKind, InvalidInputError, ObjectNotFoundError, StorageError
from icechunk.runtime.pickles import call_of
from icechunk.storage.obstore.buckets import ObstoreBucket
from icechunk.storage.obstore.obstore_errors import failure_of, missing, obstore_module
from icechunk.storage.obstore.reading import ObstoreReading, version_of_meta
from icechunk.storage.outcome import (
    Found,
    Seen,
    Tried,
    follow,
    judge,
    landed,
    precondition_failed,
    refused,
    replaced_since,
)
from icechunk.storage.port import (
    ANY,
    DeleteResult,
    Matches,
    ObjectKind,
    Precondition,
    PutResult,
    Sender,
    Storage,
    Unchecked,
    Version,
)
from icechunk.storage.retry import Tries
from icechunk.storage.rights import Right
from icechunk.storage.settings import Effective, object_store_settings

__all__ = ["ObstoreStorage"]

# Azure takes only names of identifiers.
_WRITE_ID: Final = "icechunk_write_id"
_IDENTIFIER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LEAST_PART_BYTES: Final = 5 << 20
_DELETE_BATCH: Final = 256
_DELETES_AT_ONCE: Final = 16
_LARGE_BYTES: Final = 64 * 1024


class ObstoreStorage(ObstoreReading):
    """A storage in a bucket, below a prefix; parameters as `ObstoreReading`."""

    async def put(
        self,
        key: str,
        data: bytes | bytearray | memoryview,
        precondition: Precondition = ANY,
        *,
        kind: ObjectKind = "metadata",
        metadata: Mapping[str, str] | None = None,
    ) -> PutResult:
        path = self._path(key)
        content = data if isinstance(data, bytes) else bytes(data)
        precondition = await self._effective.condition_of(self, key, self._name(key), precondition)
        attributes: dict[str, str] = {}
        storage_class = self._effective.storage_class(kind)
        if storage_class is not None:
            attributes["Storage-Class"] = storage_class
        if metadata and self._effective.uses_metadata:
            attributes.update({_metadata_name(name): value for name, value in metadata.items()})
        if not isinstance(precondition, Unchecked):
            return await self._put_conditionally(key, path, content, precondition, attributes)
        store = self._store("write")
        try:
            if len(content) >= self._effective.multipart_bytes:
                put = await obstore_module().put_async(
                    store,
                    path,
                    content,
                    attributes=attributes or None,
                    use_multipart=True,
                    chunk_size=max(_LEAST_PART_BYTES, self._effective.part_bytes),
                    max_concurrency=self._effective.parts_at_once,
                )
            else:
                put = await self._ask(
                    lambda: obstore_module().put_async(
                        store, path, content, attributes=attributes or None, use_multipart=False
                    ),
                    _large(content),
                )
        except Exception as error:
            denied = self._denied_or(Right.WRITE, key, f"write {self._name(key)}", error)
            raise (refused(denied) if isinstance(denied, AccessDeniedError) else denied) from error
        return PutResult(version=self._landed(key, put), date_us=None)

    async def _put_conditionally(
        self, key: str, path: str, content: bytes, precondition: Precondition, attributes: dict[str, str]
    ) -> PutResult:
        write_id = None
        if self._effective.uses_metadata:
            write_id = attributes[_WRITE_ID] = self._bucket.sources.random_bytes(16).hex()
        write = _ConditionalPut(self, key, path, content, precondition, attributes, write_id)
        return landed(self._name(key), precondition, await follow(write))

    async def _mode(self, key: str, precondition: Precondition, unsettled: bool) -> tuple[Any, bool]:
        """Obstore's value for a condition, and whether it depends on a remembered generation."""
        if not isinstance(precondition, Matches):
            return "create", False
        version = precondition.version
        if not self._bucket.versions_are_generations:
            return {"e_tag": f'"{version}"'}, False
        known = self._generations.get(key)
        if known is not None and known[0] == version:
            return {"e_tag": f'"{version}"', "version": known[1]}, True
        try:
            meta = (await self._look(key)).meta
        except ObjectNotFoundError:
            meta = None
        if meta is None or version_of_meta(meta) != version:
            name = self._name(key)
            if unsettled:
                raise replaced_since(name)
            raise precondition_failed(name, precondition)
        return {"e_tag": f'"{version}"', "version": meta["version"]}, False

    async def delete(self, keys: Iterable[str]) -> DeleteResult:
        wanted = [(key, self._path(key)) for key in keys]
        failures: list[tuple[str, str]] = []
        store = self._store("write")
        for start in range(0, len(wanted), _DELETE_BATCH):
            batch = wanted[start : start + _DELETE_BATCH]
            try:
                await obstore_module().delete_async(store, [path for _, path in batch])
            except Exception:
                # The first failure ends a batch, even if only an object does not exist.
                failures += await self._delete_each(batch)
        return DeleteResult(deleted=len(wanted) - len(failures), failures=tuple(failures))

    async def _delete_each(self, batch: list[tuple[str, str]]) -> list[tuple[str, str]]:
        failures: list[tuple[str, str]] = []
        denied: list[AccessDeniedError] = []
        slots, store = asyncio.Semaphore(_DELETES_AT_ONCE), self._store("write")

        async def delete_one(key: str, path: str) -> None:
            async with slots:
                try:
                    await obstore_module().delete_async(store, path)
                except Exception as error:
                    if not missing(error):
                        why = self._denied_or(Right.DELETE, key, f"delete {self._name(key)}", error)
                        failures.append((key, why.message))
                        if isinstance(why, AccessDeniedError):
                            denied.append(why)

        async with asyncio.TaskGroup() as tasks:
            for key, path in batch:
                tasks.create_task(delete_one(key, path))
        if denied and len(denied) == len(batch):
            raise refused(denied[0])
        return failures

    async def copy(self, source: str, target: str) -> PutResult:
        paths = self._path(source), self._path(target)
        store = self._store("write")
        try:
            await obstore_module().copy_async(store, *paths)
        except Exception as error:
            if missing(error):
                raise self._not_found(source) from error
            what = f"copy {self._name(source)} to {self._name(target)}"
            raise self._denied_or(Right.WRITE, target, what, error) from error
        return PutResult(version=(await self.head(target)).version, date_us=None)

    def _landed(self, key: str, put: Mapping[str, Any]) -> Version:
        self._remember(key, put)
        return version_of_meta(put)

    # -- the bucket ------------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        return None

    @property
    def supports_writes(self) -> bool:
        return True

    @property
    def lists_any_prefix_fast(self) -> bool:
        # Obstore lists folders only.
        return False

    @property
    def settings(self) -> StorageSettings:
        """The settings in force; those that are None have the defaults of `default_settings`."""
        return self._effective.settings

    def with_settings(self, settings: StorageSettings | None) -> Storage:
        return self._with(self._bucket, Effective(settings))

    def for_sender(self, sender: Sender) -> Storage:
        return self._with(self._bucket, self._effective.for_sender(sender))

    def with_user_agent(self, user_agent: str) -> Storage:
        return self._with(self._bucket.named(user_agent), self._effective)

    def _with(self, bucket: ObstoreBucket, effective: Effective) -> Storage:
        other = object.__new__(type(self))
        other._bucket = bucket
        other._generations = self._generations
        other._patience = self._patience
        other._use(effective)
        return other

    def default_settings(self) -> StorageSettings:
        return object_store_settings()

    @property
    def atomic_preconditions(self) -> frozenset[type[Precondition]]:
        return self._effective.atomic_preconditions

    def __repr__(self) -> str:
        bucket = self._bucket
        rows = [("type", bucket.kind), *bucket.rows()]
        rows += [("prefix", bucket.root.rstrip("/"))] if bucket.root else []
        return "<icechunk.Storage>\n" + "".join(f"{name}: {value}\n" for name, value in rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ObstoreStorage):
            return NotImplemented
        return self._bucket.identity() == other._bucket.identity()

    def __hash__(self) -> int:
        return hash(self._bucket.identity())

    def __reduce__(self) -> tuple[Any, ...]:
        return call_of(ObstoreStorage, self._bucket, self._effective.settings)


def _large(content: bytes) -> int:
    """The size of a body that needs time of its own, else 0."""
    return len(content) if len(content) > _LARGE_BYTES else 0


def _metadata_name(name: str) -> str:
    changed = name.lower().replace("-", "_")
    if not _IDENTIFIER.fullmatch(changed):
        raise InvalidInputError(
            f"the metadata {name!r} cannot be kept: names are letters, digits and dashes", ErrorKind.STORAGE_CONFIG
        )
    return changed


class _ConditionalPut:
    """A conditional PUT, as `icechunk.storage.outcome.follow` sends it."""

    def __init__(
        self,
        storage: ObstoreStorage,
        key: str,
        path: str,
        content: bytes,
        precondition: Precondition,
        attributes: dict[str, str],
        write_id: str | None,
    ) -> None:
        self._storage = storage
        self._store = storage._store("once")
        self._key = key
        self._path = path
        self._content = content
        self._precondition = precondition
        self._attributes = attributes
        self._write_id = write_id
        self._tries = Tries(storage._effective.limits, storage._bucket.sources)

    async def send(self, may_land: bool) -> Tried:
        storage, key, tries = self._storage, self._key, self._tries
        while True:
            mode, guessed = await storage._mode(key, self._precondition, may_land)
            try:
                sending = obstore_module().put_async(
                    self._store,
                    self._path,
                    self._content,
                    attributes=self._attributes or None,
                    mode=mode,
                    use_multipart=False,
                )
                async with asyncio.timeout(tries.limits.attempt_s):
                    # A copy that was given up may still land, like one whose answer is lost.
                    put = await storage._patience.within(sending, tries.limits, _large(self._content))
                return Tried(landed=True, put=PutResult(version=storage._landed(key, put), date_us=None))
            except Exception as error:
                failure = failure_of(error)
                turned_down = failure.refused or (failure.missing and isinstance(self._precondition, Matches))
                if turned_down and guessed:
                    # The generation that we remembered may be an older one of the same bytes.
                    storage._generations.pop(key, None)
                    continue
                return Tried(
                    error=storage._denied_or(Right.WRITE, key, f"write {storage._name(key)}", error),
                    turned_down=turned_down,
                    final=not (turned_down or failure.transient),
                    refused=failure.final,
                    may_land=not failure.certain,
                    reached=not failure.certain or failure.throttled,
                    look=may_land or not failure.certain,
                )

    async def look(self, may_land: bool) -> Seen:
        return judge(await self._read_back(), self._precondition, may_land=may_land)

    async def _read_back(self) -> Found | StorageError | None:
        storage, key = self._storage, self._key
        try:
            if self._write_id is not None:
                answer = await storage._look(key)
                ours = dict(answer.attributes).get(_WRITE_ID) == self._write_id
                return Found(ours=ours, version=storage._info(key, answer.meta).version, date_us=None)
            found = await storage.get(key)
            return Found(ours=found.data == self._content, version=found.version, date_us=None)
        except ObjectNotFoundError:
            return None
        except StorageError as error:
            return error

    async def again(self, reached: bool) -> bool:
        return await self._tries.again(contacted=reached)
