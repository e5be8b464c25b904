"""Objects in Google Cloud Storage and Azure Blob Storage, through obstore.

Obstore keeps its connections and its event loop in threads of its own, so that one storage serves all loops of a
process. It repeats by itself what may be repeated. Conditional writes it is told to send once only: they carry a random
id in the object's metadata, and what became of one that was refused or not answered is found out as
`icechunk.storage.settling` describes.

Versions are ETags. Google's conditions are on generations instead: the one that belongs to an ETag is remembered from
the last answer, or asked for first. Obstore does not say when the store answered, so ``date_us`` is None throughout.
"""

from __future__ import annotations

import asyncio
import copy
import os
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from icechunk.config import StorageConcurrencySettings, StorageSettings
from icechunk.config.storage import (
    DEFAULT_IDEAL_REQUEST_BYTES,
    DEFAULT_MAX_REQUESTS_PER_OBJECT,
    DEFAULT_MULTIPART_BYTES,
)
from icechunk.errors import ErrorKind, InvalidInputError, ObjectNotFoundError, StorageError
from icechunk.storage.base import (
    ANY,
    Absent,
    ByteRange,
    DeleteResult,
    GetResult,
    Matches,
    ObjectInfo,
    ObjectKind,
    Precondition,
    PutResult,
    Range,
    Storage,
    Suffix,
    Unchecked,
    Version,
)
from icechunk.storage.defaults import object_store_settings
from icechunk.storage.keys import check_key, check_range, resolve_range
from icechunk.storage.obstore_errors import failure_of, missing, storage_error
from icechunk.storage.obstore_places import ObstorePlace
from icechunk.storage.s3_client import limits_of
from icechunk.storage.settling import Found, precondition_failed, settle, uncertain

__all__ = ["ObstoreStorage"]

# Azure takes only names of identifiers.
_WRITE_ID: Final = "icechunk_write_id"
_IDENTIFIER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_DELETE_BATCH: Final = 256
_DELETES_AT_ONCE: Final = 16
_FIRST_CONTACT_TRIES: Final = 4
_GENERATIONS: Final = 256
_PLAIN: Final = re.compile(r"[A-Za-z0-9_./=-]*")


class ObstoreStorage(Storage):
    """A storage in a bucket, below a prefix.

    Parameters
    ----------
    place
        Bucket, prefix, credentials and options.
    settings
        Tries, timeouts, storage classes; official defaults where silent.
    """

    def __init__(self, place: ObstorePlace, settings: StorageSettings | None = None) -> None:
        self._place = place
        # ETag and generation of objects seen last, oldest first.
        self._generations: dict[str, tuple[str, str]] = {}
        self._apply(settings)

    def _apply(self, settings: StorageSettings | None) -> None:
        self._settings = settings = copy.deepcopy(settings) if settings is not None else StorageSettings()
        self._limits = limits_of(settings, None)
        self._use_metadata = settings.unsafe_use_metadata is not False
        self._use_create = settings.unsafe_use_conditional_create is not False
        self._use_update = settings.unsafe_use_conditional_update is not False
        size = settings.minimum_size_for_multipart_upload
        self._multipart_bytes = DEFAULT_MULTIPART_BYTES if size is None else size
        concurrency = settings.concurrency or StorageConcurrencySettings()
        self._part_bytes = max(5 << 20, concurrency.ideal_concurrent_request_size or DEFAULT_IDEAL_REQUEST_BYTES)
        self._parts_at_once = concurrency.max_concurrent_requests_for_object or DEFAULT_MAX_REQUESTS_PER_OBJECT
        self._stores: tuple[int, dict[str, Any]] = (os.getpid(), {})

    def _store(self, role: str) -> Any:
        pid, stores = self._stores
        if pid != os.getpid():
            # A store's connections are its maker's.
            self._stores = (os.getpid(), stores := {})
        found = stores.get(role)
        if found is None:
            found = stores[role] = self._place.open(self._limits, role=role)
        return found

    # -- reading ---------------------------------------------------------------------------------------------------

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
                # Azure knows no suffixes.
                size = (await self.head(key)).size
                if size == 0:
                    return await self.get(key)
                options = {"range": (max(0, size - length), size)}
        store = self._store("read")
        try:
            answer = await _obstore().get_async(store, path, options=options)
            data = bytes(await answer.bytes_async())
        except Exception as error:
            raise await self._unread(key, byte_range, error) from error
        meta = answer.meta
        info = self._info(key, meta)
        return GetResult(data=data, size=info.size, version=info.version, modified_us=info.modified_us, date_us=None)

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
        return storage_error(f"read {self._name(key)}", error)

    async def head(self, key: str) -> ObjectInfo:
        return self._info(key, (await self._look(key)).meta)

    async def _look(self, key: str) -> Any:
        """What a HEAD says: ``meta`` and ``attributes``."""
        path = self._path(key)
        store = self._store("read")
        try:
            return await _obstore().get_async(store, path, options={"head": True})
        except Exception as error:
            if missing(error):
                raise self._not_found(key) from error
            raise storage_error(f"look at {self._name(key)}", error) from error

    async def list_pages(
        self, prefix: str = "", *, start_after: str | None = None, page_size: int = 1000
    ) -> AsyncIterator[list[ObjectInfo]]:
        root = self._place.root
        wanted = root + prefix
        offset = _just_before(wanted)
        if start_after is not None:
            offset = max(offset or "", _plain_part(root + start_after), key=str.encode)
        store = self._store("read")
        try:
            stream = _obstore().list(
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
                            # Beyond all that begin so.
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
            raise storage_error(f"list {self._name(prefix)}", error) from error

    # -- writing ---------------------------------------------------------------------------------------------------

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
        precondition = await self._downgraded(key, precondition)
        attributes: dict[str, str] = {}
        storage_class = self._settings.storage_class_of(kind)
        if storage_class is not None:
            attributes["Storage-Class"] = storage_class
        if metadata and self._use_metadata:
            attributes.update({_metadata_name(name): value for name, value in metadata.items()})
        if not isinstance(precondition, Unchecked):
            return await self._put_conditionally(key, path, content, precondition, attributes)
        store = self._store("write")
        try:
            put = await _obstore().put_async(
                store,
                path,
                content,
                attributes=attributes or None,
                use_multipart=len(content) >= max(1, self._multipart_bytes),
                chunk_size=self._part_bytes,
                max_concurrency=self._parts_at_once,
            )
        except Exception as error:
            raise storage_error(f"write {self._name(key)}", error) from error
        return PutResult(version=self._landed(key, put), date_us=None)

    async def _put_conditionally(
        self, key: str, path: str, content: bytes, precondition: Precondition, attributes: dict[str, str]
    ) -> PutResult:
        write_id = None
        if self._use_metadata:
            write_id = attributes[_WRITE_ID] = self._place.sources.random_bytes(16).hex()
        name, store = self._name(key), self._store("once")
        tries, unsettled = 0, False
        began_us = self._place.sources.elapsed_us()
        while True:
            mode, guessed = await self._mode(key, precondition, unsettled)
            tries += 1
            try:
                put = await _obstore().put_async(
                    store, path, content, attributes=attributes or None, mode=mode, use_multipart=False
                )
                return PutResult(version=self._landed(key, put), date_us=None)
            except Exception as error:
                failure = failure_of(error)
                refused = failure.refused or (failure.missing and isinstance(precondition, Matches))
                if refused and guessed:
                    # The generation that we remembered may be an older one of the same bytes.
                    self._generations.pop(key, None)
                    continue
                trouble = storage_error(f"write {name}", error)
                if not (refused or failure.transient):
                    raise (uncertain(trouble) if unsettled else trouble) from error
                unsettled = unsettled or not failure.certain
                if refused or unsettled:
                    found = await self._try_read_back(key, content, write_id, unsettled)
                    settled = settle(name, precondition, found, refused=refused, unsettled=unsettled)
                    if settled is not None:
                        return settled
                contacted = unsettled or failure.throttled
                if not await self._again(tries, began_us, contacted=contacted):
                    raise (uncertain(trouble) if unsettled else trouble) from error

    async def _mode(self, key: str, precondition: Precondition, unsettled: bool) -> tuple[Any, bool]:
        """Obstore's word for a condition, and whether it rests on a generation that we only remember."""
        if not isinstance(precondition, Matches):
            return "create", False
        version = precondition.version
        if not self._place.versions_are_generations:
            return {"e_tag": f'"{version}"'}, False
        known = self._generations.get(key)
        if known is not None and known[0] == version:
            return {"e_tag": f'"{version}"', "version": known[1]}, True
        try:
            meta = (await self._look(key)).meta
        except ObjectNotFoundError:
            meta = None
        if meta is None or _version(meta) != version:
            name = self._name(key)
            if unsettled:
                settle(name, precondition, None, refused=False, unsettled=True)
            raise precondition_failed(name, precondition)
        return {"e_tag": f'"{version}"', "version": meta["version"]}, False

    async def _again(self, tries: int, began_us: int, *, contacted: bool) -> bool:
        """Pause, with full jitter, and return True; False where the tries or the time are used up."""
        limits, sources = self._limits, self._place.sources
        if tries >= (limits.max_tries if contacted else min(limits.max_tries, _FIRST_CONTACT_TRIES)):
            return False
        ceiling_s = min(limits.max_backoff_s, limits.initial_backoff_s * 2.0 ** (tries - 1))
        pause_s = ceiling_s * int.from_bytes(sources.random_bytes(4), "big") / 2**32
        if limits.operation_s is not None:
            spent_s = (sources.elapsed_us() - began_us) / 1e6
            if spent_s + pause_s >= limits.operation_s:
                return False
        await sources.sleep(pause_s)
        return True

    async def _try_read_back(
        self, key: str, content: bytes, write_id: str | None, unsettled: bool
    ) -> Found | StorageError | None:
        try:
            if write_id is not None or not unsettled:
                answer = await self._look(key)
                ours = write_id is not None and dict(answer.attributes).get(_WRITE_ID) == write_id
                return Found(ours=ours, version=self._info(key, answer.meta).version, date_us=None)
            found = await self.get(key)
            return Found(ours=found.data == content, version=found.version, date_us=None)
        except ObjectNotFoundError:
            return None
        except StorageError as error:
            return error

    async def _downgraded(self, key: str, precondition: Precondition) -> Precondition:
        """Replace a condition that the settings turn off by a look beforehand."""
        match precondition:
            case Absent() if not self._use_create:
                try:
                    await self.head(key)
                except ObjectNotFoundError:
                    return ANY
                raise precondition_failed(self._name(key), precondition)
            case Matches(version) if not self._use_update:
                try:
                    current = (await self.head(key)).version
                except ObjectNotFoundError:
                    raise precondition_failed(self._name(key), precondition) from None
                if current != version:
                    raise precondition_failed(self._name(key), precondition)
                return ANY
        return precondition

    async def delete(self, keys: Iterable[str]) -> DeleteResult:
        wanted = [(key, self._path(key)) for key in keys]
        failures: list[tuple[str, str]] = []
        store = self._store("write")
        for start in range(0, len(wanted), _DELETE_BATCH):
            batch = wanted[start : start + _DELETE_BATCH]
            try:
                await _obstore().delete_async(store, [path for _, path in batch])
            except Exception:
                # The first failure ends a batch, be it only that some object does not exist.
                failures += await self._delete_each(batch)
        return DeleteResult(deleted=len(wanted) - len(failures), failures=tuple(failures))

    async def _delete_each(self, batch: list[tuple[str, str]]) -> list[tuple[str, str]]:
        failures: list[tuple[str, str]] = []
        slots, store = asyncio.Semaphore(_DELETES_AT_ONCE), self._store("write")

        async def delete_one(key: str, path: str) -> None:
            async with slots:
                try:
                    await _obstore().delete_async(store, path)
                except Exception as error:
                    if not missing(error):
                        failures.append((key, storage_error(f"delete {self._name(key)}", error).message))

        async with asyncio.TaskGroup() as tasks:
            for key, path in batch:
                tasks.create_task(delete_one(key, path))
        return failures

    async def copy(self, source: str, target: str) -> PutResult:
        paths = self._path(source), self._path(target)
        store = self._store("write")
        try:
            await _obstore().copy_async(store, *paths)
        except Exception as error:
            if missing(error):
                raise self._not_found(source) from error
            raise storage_error(f"copy {self._name(source)} to {self._name(target)}", error) from error
        return PutResult(version=(await self.head(target)).version, date_us=None)

    # -- the place -------------------------------------------------------------------------------------------------

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
        return copy.deepcopy(self._settings)

    def with_settings(self, settings: StorageSettings | None) -> Storage:
        other = object.__new__(type(self))
        other._place = self._place
        other._generations = self._generations
        other._apply(settings)
        return other

    def default_settings(self) -> StorageSettings:
        return object_store_settings()

    @property
    def atomic_preconditions(self) -> frozenset[type[Precondition]]:
        atomic: set[type[Precondition]] = {Unchecked}
        if self._use_create:
            atomic.add(Absent)
        if self._use_update:
            atomic.add(Matches)
        return frozenset(atomic)

    def describe(self) -> str:
        return self._place.describe()

    def __repr__(self) -> str:
        place = self._place
        rows = [("type", place.kind), *place.rows()]
        rows += [("prefix", place.root.rstrip("/"))] if place.root else []
        return "<icechunk.Storage>\n" + "".join(f"{name}: {value}\n" for name, value in rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ObstoreStorage):
            return NotImplemented
        return self._place.identity() == other._place.identity()

    def __hash__(self) -> int:
        return hash(self._place.identity())

    def __reduce__(self) -> tuple[Callable[..., Storage], tuple[Any, ...]]:
        return ObstoreStorage, (self._place, self._settings)

    def _path(self, key: str) -> str:
        check_key(key)
        for character in self._place.refused_characters:
            if character in key:
                raise InvalidInputError(
                    f"bad storage key {key!r}: {self._place.kind} takes {character!r} for something else",
                    ErrorKind.INVALID_KEY,
                )
        return self._place.root + key

    def _name(self, key: str) -> str:
        return self._place.describe() + key

    def _not_found(self, key: str) -> ObjectNotFoundError:
        return ObjectNotFoundError(f"no object {key!r} in {self.describe()}")

    def _info(self, key: str, meta: Mapping[str, Any]) -> ObjectInfo:
        self._remember(key, meta)
        return ObjectInfo(
            key=key,
            size=meta["size"],
            version=_version(meta),
            modified_us=(meta["last_modified"] - _EPOCH) // timedelta(microseconds=1),
        )

    def _landed(self, key: str, put: Mapping[str, Any]) -> Version:
        self._remember(key, put)
        return _version(put)

    def _remember(self, key: str, meta: Mapping[str, Any]) -> None:
        if not self._place.versions_are_generations or meta["version"] is None:
            return
        known = self._generations
        known.pop(key, None)
        if len(known) >= _GENERATIONS:
            known.pop(next(iter(known)), None)
        known[key] = (_version(meta), meta["version"])


def _obstore() -> Any:
    import obstore

    return obstore


def _version(meta: Mapping[str, Any]) -> Version:
    return Version((meta["e_tag"] or "").strip('"'))


def _plain_part(name: str) -> str:
    """The longest beginning of a name that obstore passes on unchanged; never sorts after the name."""
    match = _PLAIN.match(name)
    return match[0] if match is not None else ""


def _just_before(prefix: str) -> str:
    """A name that sorts before all that begin with the prefix, and not long before."""
    plain = _plain_part(prefix)
    return plain if plain != prefix else plain[:-1]


def _metadata_name(name: str) -> str:
    changed = name.lower().replace("-", "_")
    if not _IDENTIFIER.fullmatch(changed):
        raise InvalidInputError(
            f"the metadata {name!r} cannot be kept: names are letters, digits and dashes", ErrorKind.STORAGE_CONFIG
        )
    return changed
