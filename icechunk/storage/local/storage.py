"""Objects as files below a folder.

A file is never changed in place: every write makes a new one and gives it its name in one step, so a reader has
either the old object or the new one, whole. Unfinished files and the lock are in `RESERVED`, a folder that no key can
name and no listing shows.

Versions are ``inode-mtime-size``. The time is set by the writer from the nanosecond clock, not left to the kernel,
whose file clock advances in steps of milliseconds: an inode that is reused within one would bring an old version back.

Replacing or deleting an existing object needs the lock; creating one does not, since the name itself is
exclusive. A `Matches` compares inside the lock.

Three ways make a name exclusive (`icechunk.storage.local.files`). Links and exclusive renames exclude each other too,
as the kernel decides both; a look and a rename under the lock exclude only others who do the same. So where some mount
of a folder offers neither links nor exclusive renames, all who write to that folder have to come through such a mount:
one that links may otherwise lose a file to one that only locks. Every process of one machine finds the same way.

Nothing is made or deleted through a symbolic link below the root. A folder that was removed from outside while it was
in use is not made again, except for a new repository (`LocalStorage.prepare`).

A reader that finds a file younger than two minutes syncs its folder once before it returns the file: the writer may not
have done so yet, and a file that was returned must not vanish in a power failure. For two minutes after a failed sync,
this process does not return the files that it was to make durable, unless they are written again. Files that are only
read because another one refers to them need no sync: they were durable, or need not be, before that one was written.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Final, TypeVar

from icechunk.config import StorageSettings
from icechunk.errors import (
    ErrorKind,
    InvalidInputError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
)
from icechunk.format.keys import CHUNKS_PREFIX, MANIFESTS_PREFIX, SNAPSHOTS_PREFIX, TRANSACTIONS_PREFIX
from icechunk.runtime.clock import SYSTEM, Sources
from icechunk.runtime.pickles import instance_of_state
from icechunk.runtime.tasks import run_jobs, to_its_end
from icechunk.runtime.threads import ProcessPool
from icechunk.storage.buffers import Buffers
from icechunk.storage.local.direct import DirectWrites
from icechunk.storage.local.files import (
    NOT_TOLD,
    RESERVED,
    TELLS_CACHED,
    Exclusion,
    info_of,
    locked,
    path_of,
    publish_new,
    read_cached,
    read_file,
    replace_lazily,
    sweep,
    temporary_name,
    try_stat,
    version_of,
    walk,
    write_new,
)
from icechunk.storage.local.folders import Folders
from icechunk.storage.local.syncs import fsync_each, fsync_file, hand_over, hand_over_together
from icechunk.storage.outcome import lost, refused, unsent
from icechunk.storage.port import (
    ANY,
    Absent,
    ByteRange,
    DeleteResult,
    Following,
    GetResult,
    Matches,
    ObjectInfo,
    ObjectKind,
    Octets,
    Precondition,
    Put,
    PutResult,
    Range,
    Storage,
    Unchecked,
    Version,
    resolve_range,
)
from icechunk.storage.settings import local_settings

__all__ = ["RESERVED", "LocalStorage"]

T = TypeVar("T")

_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})
_THREADS: Final = 32
_READ: Final = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
"""Flags for reading; a named pipe must not stop us."""
_READ_TOGETHER: Final = 64
"""Number of files that one thread reads, where many are wanted."""
_REFUSED: Final = frozenset(
    {
        errno.EACCES,
        errno.EDQUOT,
        errno.EEXIST,
        errno.EFBIG,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
        errno.EXDEV,
    }
)
"""Error numbers of a system that refused, and will refuse the next time."""
_ABANDONED_AFTER_S: Final = 24 * 3600
_DELETE_BATCH: Final = 1000
_SYNCS_AT_ONCE: Final = 8
_LOOP_PATIENCE_S: Final = 0.1
_SYNCS_EACH: Final = 4
"""Fewer than so many files are not worth a thread."""
_FEW_KEYS: Final = 4
"""Number of keys that are looked up in less time than a thread takes to begin."""
_REFERRED_TO: Final = (CHUNKS_PREFIX, MANIFESTS_PREFIX, SNAPSHOTS_PREFIX, TRANSACTIONS_PREFIX)
"""Objects that are durable, or need not be, before an object that refers to them can be read."""


_THREADS_OF_PROCESS: Final = ProcessPool(_THREADS, "icechunk-files")
"""The threads that work on files, for all storages: starting one takes longer than a small file."""


class LocalStorage(Storage):
    """A storage below a folder of a file system; safe among threads, forks and processes.

    Parameters
    ----------
    path
        The root folder; made by the first write. Relative paths are resolved now.
    sources
        Its wall clock is the store's clock.
    """

    def __init__(self, path: str | os.PathLike[str], sources: Sources = SYSTEM) -> None:
        text = os.fspath(path)
        if not isinstance(text, str) or not text or "\0" in text:
            raise InvalidInputError(f"bad path {path!r} of a local storage: give a folder", ErrorKind.BAD_PREFIX)
        self._root = os.path.abspath(text)
        self._sources = sources
        self._start()

    def _start(self) -> None:
        self._lock_path = os.path.join(self._root, RESERVED, "lock")
        self._exclusion = Exclusion.LINK
        self._folders = Folders(self._root)
        self._swept = False
        self._buffers = Buffers()
        self._direct = DirectWrites()
        self._tells_cached = TELLS_CACHED

    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        found = self._get_cached(key, byte_range)
        return await self._in_thread(self._get, key, byte_range) if found is None else found

    def get_at_once(self, key: str, *, unsynced: bool = False) -> GetResult | None:
        try:
            return self._get_cached(key, None, unsynced=unsynced)
        except (StorageError, InvalidInputError):
            return None

    async def get_all(self, keys: Sequence[str]) -> list[GetResult | None]:
        if len(keys) <= _FEW_KEYS and (found := self._all_cached(keys)) is not None:
            return found
        # A thread for each file would cost more than the files.
        shares = [keys[first : first + _READ_TOGETHER] for first in range(0, len(keys), _READ_TOGETHER)]
        jobs = [partial(self._in_thread, self._get_some, share) for share in shares]
        return list(itertools.chain.from_iterable(await run_jobs(jobs, limit=_THREADS)))

    async def put(
        self,
        key: str,
        data: bytes | bytearray | memoryview,
        precondition: Precondition = ANY,
        *,
        kind: ObjectKind = "metadata",
        metadata: Mapping[str, str] | None = None,
    ) -> PutResult:
        # A bytearray may change while the thread writes it.
        content = data if isinstance(data, bytes) else bytes(data)
        return await self._in_thread(self._put, key, content, precondition)

    async def put_unsynced(self, puts: Sequence[Put]) -> list[PutResult | None]:
        return await self._in_thread(self._put_unsynced, puts)

    async def put_after(self, keys: Collection[str], put: Put) -> PutResult:
        before = {self._path(key): key for key in keys}
        return await self._in_thread(partial(self._put, put.key, put.data, put.precondition, before=before))

    async def put_before(
        self, put: Put, following: Following, after: Collection[str] = ()
    ) -> tuple[PutResult, list[PutResult | None]]:
        before = {self._path(key): key for key in after}
        if len(before) >= 2 * _SYNCS_EACH:
            try:
                await self._sync(before, put_follows=True)
            except StorageError as error:
                raise lost(error) from error.__cause__
            before = {}
        return await self._in_thread(self._put_before, put, _Making(following), before)

    async def barrier(self, keys: Iterable[str]) -> None:
        await self._sync({self._path(key): key for key in keys}, put_follows=True)

    async def sync(self, keys: Iterable[str]) -> None:
        await self._sync({self._path(key): key for key in keys}, put_follows=False)

    async def _sync(self, paths: Mapping[str, str], *, put_follows: bool) -> None:
        """Make files durable; at the latest before the name of an object is, which a later put writes."""
        files = list(paths)
        if not files:
            return
        if await self._in_thread(self._try_sync, paths, put_follows):
            return
        parts = min(_SYNCS_AT_ONCE, len(files) // _SYNCS_EACH)
        await run_jobs([partial(self._in_thread, self._sync_files, files[n::parts], paths) for n in range(parts)])
        await self._in_thread(self._sync_rest, [], paths)

    async def head(self, key: str) -> ObjectInfo:
        return await self._in_thread(self._head, key)

    async def list_pages(
        self, prefix: str = "", *, start_after: str | None = None, page_size: int = 1000
    ) -> AsyncIterator[list[ObjectInfo]]:
        found = self._walk(prefix, start_after)
        while True:
            page = await self._in_thread(_take, found, page_size)
            if page:
                yield page
            if len(page) < page_size:
                return

    async def delete(self, keys: Iterable[str]) -> DeleteResult:
        wanted = list(keys)
        deleted = 0
        failures: list[tuple[str, str]] = []
        for start in range(0, len(wanted), _DELETE_BATCH):
            count, failed = await self._in_thread(self._delete, wanted[start : start + _DELETE_BATCH])
            deleted += count
            failures += failed
        # The files still have their names after any error of the system.
        return DeleteResult(deleted=deleted, failures=tuple(failures), refused=bool(failures))

    async def copy(self, source: str, target: str) -> PutResult:
        return await self._in_thread(self._copy, source, target)

    async def prepare(self, folders: Iterable[str]) -> None:
        await self._in_thread(self._prepare, list(folders))

    async def aclose(self) -> None:
        return None

    @property
    def supports_writes(self) -> bool:
        return True

    @property
    def defers_syncs(self) -> bool:
        return True

    @property
    def batches_reads(self) -> bool:
        return True

    @property
    def clock_resolution_us(self) -> int:
        # File systems take the time of the system's last tick, which comes at least a hundred times a second.
        return 10_000

    @property
    def lists_any_prefix_fast(self) -> bool:
        return False

    @property
    def lists_first_keys_fast(self) -> bool:
        # The names in a folder come in no order.
        return False

    def default_settings(self) -> StorageSettings:
        """The official library's defaults. Conditions hold here with any settings."""
        settings = local_settings(ideal_request_bytes=4096)
        settings.unsafe_use_conditional_update = settings.unsafe_use_metadata = False
        return settings

    @property
    def reads_nowait(self) -> bool:
        return True

    def read_nowait(self, key: str, start: int, end: int) -> Octets | None:
        try:
            return self._get(key, Range(start, end)).body
        except (StorageError, InvalidInputError):
            return None

    @property
    def gains_from_split_reads(self) -> bool:
        # The official library keeps a request size of 4 KiB for local disks, which was never meant to be acted on.
        return False

    def describe(self) -> str:
        return f"file://{self._root}"

    def __repr__(self) -> str:
        return f"<icechunk.Storage>\ntype: local filesystem\npath: {self._root}\n"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LocalStorage) and other._root == self._root

    def __hash__(self) -> int:
        return hash((LocalStorage, self._root))

    def __reduce__(self) -> tuple[Any, ...]:
        return instance_of_state(self, self.__getstate__())

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self._root, "in_use": self._folders.in_use}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._root = state["root"]
        self._sources = SYSTEM
        self._start()
        if state.get("in_use"):
            self._folders.use_again()

    # -- threads ---------------------------------------------------------------------------------------------------

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run blocking work in a thread and wait for its end, also when cancelled: nothing lands afterwards."""
        return await to_its_end(_THREADS_OF_PROCESS, work, *arguments)

    # -- blocking work ---------------------------------------------------------------------------------------------

    def _path(self, key: str) -> str:
        return path_of(self._root, key)

    def _is_absent(self, key: str) -> bool:
        """Whether there is certainly no such object.

        Clients poll whether the next slots of a log exist: the call takes less time than a thread.
        """
        try:
            return try_stat(self._path(key)) is None
        except OSError:
            return False

    def _get_cached(self, key: str, byte_range: ByteRange, *, unsynced: bool = False) -> GetResult | None:
        """As `_get`, in less time than a thread takes to begin; None: that may take longer, or `_get` raises an error.

        Raises
        ------
        ObjectNotFoundError
            There is no such object.
        """
        if not self._tells_cached:
            if self._is_absent(key):
                raise self._not_found(key)
            return None
        path = self._path(key)
        try:
            descriptor, status = self._opened(key, path)
        except OSError:
            return None
        try:
            if not self._is_settled(key, path, status, unsynced=unsynced):
                return None
            start, stop = resolve_range(byte_range, status.st_size, key)
            data = read_cached(descriptor, start, stop - start)
        except OSError as error:
            self._tells_cached = error.errno not in NOT_TOLD
            return None
        finally:
            os.close(descriptor)
        return None if data is None else self._result(data, status)

    def _all_cached(self, keys: Sequence[str]) -> list[GetResult | None] | None:
        """Whole objects as by `_get_cached`, each None where there is none; None: `_get_some` has to read them."""
        found: list[GetResult | None] = []
        for key in keys:
            try:
                answer = self._get_cached(key, None)
            except ObjectNotFoundError:
                found.append(None)
                continue
            if answer is None:
                return None
            found.append(answer)
        return found

    def _get(self, key: str, byte_range: ByteRange) -> GetResult:
        path = self._path(key)
        try:
            descriptor, status = self._opened(key, path)
            try:
                self._seen(key, path, status)
                start, stop = resolve_range(byte_range, status.st_size, key)
                data = read_file(descriptor, start, stop - start, self._buffers)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._trouble("read", key, error) from error
        if len(data) != stop - start:
            raise StorageError(
                f"cannot read {key!r} of {self.describe()}: {len(data)} bytes came instead of {stop - start}; "
                "the file was truncated by another program",
                ErrorKind.IO,
            )
        return self._result(data, status)

    def _opened(self, key: str, path: str) -> tuple[int, os.stat_result]:
        """A descriptor of an object's file, to be closed. Raises `ObjectNotFoundError`, or `OSError` untranslated."""
        try:
            descriptor = os.open(path, _READ)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise self._not_found(key) from None
        except PermissionError:
            if os.name == "nt" and os.path.isdir(path):
                raise self._not_found(key) from None
            raise
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise self._not_found(key)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor, status

    def _result(self, data: Octets, status: os.stat_result) -> GetResult:
        return GetResult(
            body=data,
            size=status.st_size,
            version=version_of(status),
            modified_us=status.st_mtime_ns // 1000,
            date_us=self._sources.wall_us(),
        )

    def _is_settled(self, key: str, path: str, status: os.stat_result, *, unsynced: bool) -> bool:
        """Whether `_seen` has no folder to sync for a file, or need not; if so, does what else that does."""
        if not key.startswith(_REFERRED_TO) and not self._folders.is_settled(path, status, unsynced=unsynced):
            return False
        self._folders.use(os.path.dirname(path))
        return True

    def _seen(self, key: str, path: str, status: os.stat_result) -> None:
        self._folders.use(os.path.dirname(path))
        if not key.startswith(_REFERRED_TO):
            self._folders.settle(path, status)

    def _get_some(self, keys: Sequence[str]) -> list[GetResult | None]:
        found: list[GetResult | None] = []
        for key in keys:
            try:
                found.append(self._get(key, None))
            except ObjectNotFoundError:
                found.append(None)
        return found

    def _head(self, key: str) -> ObjectInfo:
        path = self._path(key)
        with self._translated("look at", key):
            status = try_stat(path)
            if status is None:
                raise self._not_found(key)
            self._seen(key, path, status)
        return info_of(key, status)

    def _put(
        self,
        key: str,
        data: bytes | memoryview,
        precondition: Precondition,
        *,
        synced: bool = True,
        bulk: bool = False,
        before: Mapping[str, str] = _NOTHING,
        begin_wait: Callable[[], None] | None = None,
    ) -> PutResult:
        """Write an object.

        Parameters
        ----------
        bulk
            As `Put` has it.
        before
            Paths and keys of files that are made durable before it appears.
        begin_wait
            Called before the first wait for the medium.
        """
        path = self._path(key)
        folder = os.path.dirname(path)
        with self._translated("write", key, writes=True):
            match precondition:
                case Absent():
                    if os.path.lexists(path):
                        raise self._taken(key, path)
                case Matches(version):
                    # Checked before any byte is written, and again under the lock, which decides.
                    self._require_version(key, path, version)
                case Unchecked():
                    pass
            temporary, result = self._write_temporary(
                data, synced=synced, alone=not before, bulk=bulk, begin_wait=begin_wait
            )
        try:
            if before:
                # A sync of everything waits also for what others have written, and for what followed the last object.
                together = len(before) > 1 or begin_wait is None
                self._sync_before(before, key, temporary, together=together)
            with self._translated("write", key, writes=True, names=True):
                self._folders.make(folder, durable=synced and not self._folders.promises.names_follow_files)
                named_ns = time.time_ns()
                self._publish(key, path, temporary, precondition, synced=synced)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        self._folders.use(folder)
        if synced:
            self._sync_after_landing(key, folder, named_ns)
            self._folders.durable(path, result.version)
        return result

    def _put_before(
        self, put: Put, making: _Making, before: Mapping[str, str]
    ) -> tuple[PutResult, list[PutResult | None]]:
        result = self._put(put.key, put.data, put.precondition, before=before, begin_wait=making.begin)
        with contextlib.suppress(StorageError):
            return result, self._put_unsynced(making.wait())
        return result, []

    def _put_unsynced(self, puts: Sequence[Put]) -> list[PutResult | None]:
        answers: list[PutResult | None] = []
        for key, data, precondition, bulk in puts:
            if not isinstance(precondition, Absent):
                try:
                    answers.append(self._put(key, data, precondition, synced=False, bulk=bulk))
                except PreconditionFailedError:
                    answers.append(None)
            elif self._holds(key, data):
                answers.append(None)
            else:
                # The name determines the bytes: a file with other bytes is torn.
                answers.append(self._put(key, data, ANY, synced=False, bulk=bulk))
        return answers

    def _holds(self, key: str, data: bytes | memoryview) -> bool:
        """Whether an object has these bytes, under a name that is not in doubt."""
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                self._folders.require_certain(path, os.fstat(file.fileno()))
                return file.read() == data
        except OSError:
            return False

    def _sync_before(self, before: Mapping[str, str], key: str, temporary: str, *, together: bool) -> None:
        """Make these files durable before the name of an object is, and its unfinished file too; waits seldom.

        Parameters
        ----------
        together
            Where the file system has a sync of everything, it may be used.
        """
        try:
            if self._folders.promises.orders:
                self._try_sync_together(before, True)
                return
            if together and self._try_sync_together({**before, temporary: key}, False):
                return
            self._sync_files([temporary, *before], {**before, temporary: key})
            self._sync_rest([], before)
        except StorageError as error:
            raise lost(error) from error.__cause__

    def _try_sync_together(self, keys: Mapping[str, str], put_follows: bool) -> bool:
        """As `_sync`, if there is a way that waits less often than once for each file."""
        try:
            if put_follows and self._folders.promises.orders:
                hand_over_together(list(keys))
                return True
            return self._folders.sync_together(list(keys), put_follows=put_follows)
        except OSError as error:
            with self._translated("sync", keys.get(error.filename, next(iter(keys.values())))):
                raise

    def _try_sync(self, keys: Mapping[str, str], put_follows: bool) -> bool:
        """As `_sync`, if that waits once, or seldom enough for one thread."""
        if self._try_sync_together(keys, put_follows):
            return True
        if len(keys) >= 2 * _SYNCS_EACH:
            return False
        self._sync_rest(list(keys), keys)
        return True

    def _sync_files(self, paths: Sequence[str], keys: Mapping[str, str]) -> None:
        try:
            fsync_each(paths)
        except OSError as error:
            with self._translated("sync", keys.get(error.filename, next(iter(keys.values())))):
                raise

    def _sync_rest(self, files: Sequence[str], keys: Mapping[str, str]) -> None:
        """Sync these files, and the names of all."""
        self._sync_files(files, keys)
        if self._folders.promises.names_follow_files:
            return
        for folder in sorted({os.path.dirname(path) for path in keys}):
            with self._translated("sync", os.path.relpath(folder, self._root)):
                self._folders.make(folder)
                self._folders.sync(folder)
        for path, key in keys.items():
            with self._translated("sync", key):
                self._folders.require_certain(path, os.stat(path))

    def _write_temporary(
        self,
        data: bytes | memoryview,
        *,
        synced: bool,
        alone: bool,
        bulk: bool,
        begin_wait: Callable[[], None] | None,
    ) -> tuple[str, PutResult]:
        """Write an unfinished file. It will be durable before the name that it gets next, if it is synced ``alone``."""
        folder = os.path.join(self._root, RESERVED)
        path = os.path.join(folder, temporary_name())
        if not self._swept:
            # First of all: on a full disk this may make room.
            self._swept = True
            sweep(folder, _ABANDONED_AFTER_S)
        self._folders.make(folder, durable=False)
        sync: Callable[[int], None] | None = None
        if synced and self._folders.promises.orders:
            sync = hand_over
        elif synced and alone:
            sync = fsync_file

        def finish(descriptor: int) -> None:
            if begin_wait is not None:
                begin_wait()
            if sync is not None:
                sync(descriptor)

        # Others may know no such writes, or imitate them slowly.
        direct = self._direct if bulk and self._folders.promises.syncs_all else None

        def write() -> os.stat_result:
            return write_new(path, data, group_mode=self._folders.group_mode, finish=finish, direct=direct)

        try:
            status = write()
        except FileNotFoundError:
            self._folders.forget()
            self._folders.make(folder, durable=False)
            status = write()
        return path, PutResult(version=version_of(status), date_us=self._sources.wall_us())

    def _publish(self, key: str, path: str, temporary: str, precondition: Precondition, *, synced: bool) -> None:
        if isinstance(precondition, Matches):
            with self._locked():
                self._require_version(key, path, precondition.version)
                if synced:
                    os.replace(temporary, path)
                else:
                    replace_lazily(temporary, path)
            return
        try:
            self._publish_new(temporary, path)
        except FileExistsError:
            if isinstance(precondition, Absent) or os.path.isdir(path):
                raise self._taken(key, path) from None
            with self._locked():
                os.replace(temporary, path)

    def _publish_new(self, temporary: str, path: str) -> None:
        try:
            self._exclusion = publish_new(temporary, path, self._exclusion, self._lock_path)
        except FileNotFoundError:
            # The folder was removed from outside.
            self._folders.forget()
            self._folders.make(os.path.dirname(path))
            self._exclusion = publish_new(temporary, path, self._exclusion, self._lock_path)

    def _sync_after_landing(self, key: str, folder: str, named_ns: int) -> None:
        try:
            self._folders.sync(folder, named_ns)
        except OSError as error:
            raise StorageError(
                f"cannot find out whether the write of {key!r} to {self.describe()} is durable ({error.strerror}): the "
                "object is there now, but may be gone after a power failure; check the disk and read it back",
                ErrorKind.IO,
            ) from error

    def _require_version(self, key: str, path: str, version: Version) -> None:
        status = try_stat(path)
        found = None if status is None else version_of(status)
        if found != version:
            state = "it does not exist" if found is None else f"it is at version {found}"
            raise PreconditionFailedError(f"cannot replace version {version} of {key!r} in {self.describe()}: {state}")

    def _taken(self, key: str, path: str) -> StorageError:
        if os.path.isdir(path):
            return refused(
                StorageError(
                    f"cannot write {key!r} to {self.describe()}: a folder of that name holds other objects",
                    ErrorKind.IO,
                )
            )
        return PreconditionFailedError(f"cannot create {key!r} in {self.describe()}: the object exists already")

    def _prepare(self, folders: list[str]) -> None:
        self._folders.begin_anew()
        with self._translated("create", ".", writes=True):
            for name in folders:
                self._folders.make(os.path.join(self._root, *name.split("/")))

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        self._folders.make(os.path.dirname(self._lock_path), durable=False)
        return locked(self._lock_path, group_mode=self._folders.group_mode)

    def _delete(self, keys: list[str]) -> tuple[int, list[tuple[str, str]]]:
        paths = [(key, self._path(key)) for key in keys]
        found = next((key for key, path in paths if os.path.lexists(path)), None)
        if found is None:
            return len(keys), []
        deleted = 0
        failures: list[tuple[str, str]] = []
        folders: set[str] = set()
        with self._translated("delete", found):
            # The lock keeps a `Matches` from bringing back an object that it compared before the lock was held.
            with self._locked():
                for key, path in paths:
                    folder = os.path.dirname(path)
                    try:
                        if folder not in folders:
                            self._folders.check(folder)
                        os.unlink(path)
                        folders.add(folder)
                    except OSError as error:
                        # A folder is no object.
                        if os.path.isfile(path) or os.path.islink(path):
                            failures.append((key, error.strerror or str(error)))
                            continue
                    deleted += 1
            for folder in folders:
                with contextlib.suppress(FileNotFoundError):
                    self._folders.sync(folder)
        return deleted, failures

    def _copy(self, source: str, target: str) -> PutResult:
        return self._put(target, self._get(source, None).data, ANY)

    def _walk(self, prefix: str, start_after: str | None) -> Iterator[ObjectInfo]:
        with self._translated("list", prefix):
            yield from walk(self._root, prefix, start_after)

    def _not_found(self, key: str) -> ObjectNotFoundError:
        return ObjectNotFoundError(f"no object {key!r} in {self.describe()}")

    @contextlib.contextmanager
    def _translated(self, verb: str, key: str, *, writes: bool = False, names: bool = False) -> Iterator[None]:
        """Raise `StorageError` for an error of the system.

        Parameters
        ----------
        writes
            An object is written, and did not have its name yet.
        names
            It was about to get its name: a network file system that gives no answer may have done it.
        """
        try:
            yield
        except OSError as error:
            trouble = self._trouble(verb, key, error)
            if writes and error.errno in _REFUSED:
                raise refused(trouble) from error
            raise (unsent(trouble) if writes and not names else trouble) from error

    def _trouble(self, verb: str, key: str, error: OSError) -> StorageError:
        remedy = _remedy(error.errno)
        if verb == "create" and error.errno == errno.ENOENT:
            remedy = f"; the folder {error.filename or self._root!r} cannot be made: choose another path"
        return StorageError(
            f"cannot {verb} {key!r} in {self.describe()}: {error.strerror or error}{remedy}", ErrorKind.IO
        )


class _Making:
    """The making of objects by the event loop, begun and awaited by a thread."""

    def __init__(self, following: Following) -> None:
        self._following = following
        self._loop = asyncio.get_running_loop()
        self._made = threading.Event()

    def begin(self) -> None:
        """The thread begins to wait for the medium."""
        # The loop may have been closed.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._make)

    def _make(self) -> None:
        try:
            self._following.make()
        finally:
            self._made.set()

    def wait(self) -> Sequence[Put]:
        """The objects, if they are made soon. A loop that is busy longer writes them itself, or has been closed."""
        return self._following.puts if self._made.wait(_LOOP_PATIENCE_S) else ()


def _take(found: Iterator[ObjectInfo], count: int) -> list[ObjectInfo]:
    return list(itertools.islice(found, count))


def _remedy(code: int | None) -> str:
    match code:
        case errno.ENOSPC | errno.EDQUOT:
            return "; nothing of it is visible. Free some space and try again"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "; check the permissions of the folder and how it is mounted"
        case errno.ENOENT:
            return "; open the repository again where it is now, or create it again"
        case errno.ELOOP:
            return "; nothing is written or deleted through a link below the folder. Put its target in its place"
        case errno.EEXIST:
            return "; there is a file where the repository has a folder: choose another path"
        case errno.ENOTDIR:
            return "; there is an object where the key has a folder"
        case errno.ENAMETOOLONG:
            return "; choose a root folder with a shorter path"
        case errno.EMFILE | errno.ENFILE:
            return "; raise the limit of open files (ulimit -n)"
        case errno.EXDEV:
            return "; the whole folder has to be on one file system"
        case _:
            return ""
