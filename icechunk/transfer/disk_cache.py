"""A cache of immutable objects on local disk, which all processes of one user share.

A file holds one range of one object, with checksums of its blocks, under a name that tells the range and the object's
size. Files are complete when their names appear, and are never changed, so processes need no lock to read or write. A
file that is damaged is removed and counts as absent. Everything stays below ``v1`` in the folder; nothing else there
is read, written or removed.

Only what never changes under its key is taken: chunk objects, manifests, transaction logs and snapshots. Not taken are
the files of the first snapshot, which every repository has under the same key, and snapshots of format 1, which an
expiration writes again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import stat
import struct
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import BinaryIO, Final, TypeAlias

from icechunk.errors import ErrorKind, FormatError, InvalidInputError
from icechunk.format.envelope import FileType, read_header
from icechunk.format.ids import FIRST_SNAPSHOT, encode_id
from icechunk.format.keys import CHUNKS_PREFIX, MANIFESTS_PREFIX, SNAPSHOTS_PREFIX, TRANSACTIONS_PREFIX
from icechunk.runtime.late_dataclass import dataclass
from icechunk.storage.port import ByteRange, Octets, Range

__all__ = ["CachedBytes", "DiskCache", "ObjectsOnDisk"]

_LOG: Final = logging.getLogger(__name__)
_FORMAT: Final = "v1"
_PREFIXES: Final = (CHUNKS_PREFIX, MANIFESTS_PREFIX, TRANSACTIONS_PREFIX, SNAPSHOTS_PREFIX)
_FIRST: Final = encode_id(FIRST_SNAPSHOT)
_NAME: Final = re.compile(r"([0-9a-f]{1,16})-([0-9a-f]{1,16})-([0-9a-f]{1,16})")
_UNFINISHED: Final = re.compile(r"\.[0-9]+-[0-9a-f]{16}")
_HEADER: Final = struct.Struct("<8sQQQI")
_MAGIC: Final = b"iccache1"
_BLOCK: Final = 64 * 1024
"""Bytes that one checksum is of."""
_SHARE: Final = 16
"""A range that takes more than this part of the cache is not kept."""
_SWEEP_SHARE: Final = 32
"""The size of the cache is measured each time that this part of it was written by a process."""
_ROOM: Final = 0.9
_PENDING_BYTES: Final = 64 * 1024 * 1024
"""Bytes that may wait to be written; ranges that come when there are more are not kept."""
_THREADS: Final = 4
_KNOWN_OBJECTS: Final = 1 << 16
_UNFINISHED_AGE_S: Final = 3600.0
_TOUCH_AFTER_S: Final = 60.0
_REST_S: Final = 60.0
"""Nothing is written for this time after a write failed, as on a full disk."""

_Entry: TypeAlias = tuple[int, int, int]
"""First byte, end, and size of the object."""


@dataclass(frozen=True, slots=True)
class CachedBytes:
    """Bytes of an object from the cache."""

    body: bytes
    size: int
    """Bytes of the whole object."""


class DiskCache:
    """A folder with ranges of objects; made by `DiskCache.at`. Threads and loops may share it.

    Parameters
    ----------
    folder
        Absolute path.
    max_bytes
        Largest size of all files together. Each process may exceed it by a 32nd before it notices.
    """

    def __init__(self, folder: str, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._root = os.path.join(folder, _FORMAT)
        self._known: OrderedDict[str, list[_Entry]] = OrderedDict()
        self._fresh_bytes: int | None = None
        """Written by this process since the last sweep; None: the size of the cache is not known yet."""
        self._rests_until = 0.0
        self.begin_anew()

    def begin_anew(self) -> None:
        """Start without threads, as in the child of a fork, where those of the parent do not exist."""
        self._lock = threading.Condition()
        self._pending_bytes = 0
        self._executor: ThreadPoolExecutor | None = None

    @staticmethod
    def at(folder: str, max_bytes: int) -> DiskCache:
        """The cache in a folder, which is made if there is none. A process has one for each folder and size.

        Raises
        ------
        InvalidInputError
            The folder cannot be made, or other users may write to the cache in it (kind ``invalid-setting``).
        """
        cache = DiskCache(os.path.abspath(os.path.expanduser(folder)), max_bytes)
        cache._make_root()
        return _caches.setdefault((cache.folder, max_bytes), cache)

    def _make_root(self) -> None:
        try:
            os.makedirs(self._root, mode=0o700, exist_ok=True)
            status = os.lstat(self._root)
        except OSError as error:
            raise InvalidInputError(
                f"EngineConfig.disk_cache_path {self.folder!r} cannot be used: {error.strerror or error}; "
                "name a folder that this user may write to",
                ErrorKind.INVALID_SETTING,
            ) from error
        if not stat.S_ISDIR(status.st_mode) or not _is_private(self.folder, status):
            raise InvalidInputError(
                f"EngineConfig.disk_cache_path {self.folder!r} cannot be used: {self._root!r} is no folder of this "
                "user alone, so others could change the bytes in it; remove it, or name another folder",
                ErrorKind.INVALID_SETTING,
            )

    def of(self, place: str) -> ObjectsOnDisk:
        """The objects of one repository.

        Parameters
        ----------
        place
            Where the repository is, as text that no repository elsewhere has.
        """
        return ObjectsOnDisk(self, place)

    def run(self, work: object, *args: object) -> Future[object]:
        """Start work in one of the cache's threads. Raises `RuntimeError` where the process is ending."""
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(_THREADS, "icechunk-disk-cache")
            executor = self._executor
        return executor.submit(work, *args)  # type: ignore[arg-type]

    def read(self, name: str, start: int, end: int | None) -> CachedBytes | None:
        """Bytes ``start`` to ``end`` of an object; None: not all of them are there, or the object ends before.

        Parameters
        ----------
        name
            Of the object, as `ObjectsOnDisk` makes it.
        end
            Exclusive; None: to the end of the object.
        """
        for look in (self._known.get, self._listed):
            entries = look(name)
            if not entries:
                continue
            size = entries[0][2]
            last = size if end is None else min(end, size)
            chosen = _cover([entry for entry in entries if entry[2] == size], start, last)
            if chosen is None:
                continue
            parts = [self._read_part(name, entry, max(first, start), until) for first, until, entry in chosen]
            if None not in parts:
                return CachedBytes(b"".join([part for part in parts if part is not None]), size)
        return None

    def _listed(self, name: str) -> list[_Entry]:
        """The entries of an object that exist now; other processes write too."""
        entries: list[_Entry] = []
        with suppress(OSError):
            for file in os.listdir(self._path(name)):
                match = _NAME.fullmatch(file)
                if match is not None:
                    start, end, size = (int(part, 16) for part in match.groups())
                    if start < end <= size:
                        entries.append((start, end, size))
        with self._lock:
            self._known[name] = entries
            self._known.move_to_end(name)
            while len(self._known) > _KNOWN_OBJECTS:
                self._known.popitem(last=False)
        return entries

    def _read_part(self, name: str, entry: _Entry, start: int, end: int) -> bytes | None:
        """Bytes of one file, if it has them undamaged."""
        path = self._path(name, entry)
        try:
            with open(path, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                data = _read_checked(file, status.st_size, entry, start, end)
        except OSError:
            data = None
        if data is None:
            self._remove(name, entry)
        elif time.time() - status.st_mtime > _TOUCH_AFTER_S:
            # The least recently used files go first.
            with suppress(OSError):
                os.utime(path)
        return data

    def _remove(self, name: str, entry: _Entry) -> None:
        with suppress(OSError):
            os.unlink(self._path(name, entry))
        with self._lock:
            self._known.pop(name, None)

    def drop(self, name: str) -> bool:
        """Remove everything of an object; returns whether there was something."""
        entries = self._listed(name)
        for entry in entries:
            self._remove(name, entry)
        return bool(entries)

    def keep(self, name: str, start: int, size: int, data: Octets) -> None:
        """Write bytes of an object, in the background.

        Parameters
        ----------
        start
            Of the first byte.
        size
            Of the whole object.
        data
            Does not change any more.
        """
        if not len(data) or len(data) > self.max_bytes // _SHARE or time.monotonic() < self._rests_until:
            return
        with self._lock:
            if self._pending_bytes + len(data) > _PENDING_BYTES:
                return
            self._pending_bytes += len(data)
        try:
            self.run(self._write, name, (start, start + len(data), size), data)
        except RuntimeError:
            self._written(len(data))

    def _write(self, name: str, entry: _Entry, data: Octets) -> None:
        try:
            self._write_file(name, entry, data)
        except OSError as error:
            self._rests_until = time.monotonic() + _REST_S
            _LOG.warning("the disk cache %s takes nothing for a minute: %s", self.folder, error)
        finally:
            self._written(len(data))

    def _written(self, size: int) -> None:
        with self._lock:
            self._pending_bytes -= size
            self._lock.notify_all()

    def flush(self) -> None:
        """Wait until everything that was kept so far is on disk, or was given up."""
        with self._lock:
            self._lock.wait_for(lambda: not self._pending_bytes)

    def _write_file(self, name: str, entry: _Entry, data: Octets) -> None:
        path = self._path(name, entry)
        view = memoryview(data)
        sums = [zlib.crc32(view[first : first + _BLOCK]) for first in range(0, len(view), _BLOCK)]
        table = struct.pack(f"<{len(sums)}I", *sums)
        head = _HEADER.pack(_MAGIC, *entry, zlib.crc32(table))
        unfinished = os.path.join(self._root, f".{os.getpid()}-{os.urandom(8).hex()}")
        try:
            with open(unfinished, "xb", opener=_private) as file:
                file.write(head)
                file.write(table)
                file.write(view)
            try:
                os.replace(unfinished, path)
            except FileNotFoundError:
                os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
                os.replace(unfinished, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(unfinished)
            raise
        with self._lock:
            known = self._known.get(name)
            if known is not None:
                self._known[name] = [*known, entry]
            fresh = self._fresh_bytes
            if fresh is not None:
                self._fresh_bytes = fresh = fresh + len(view)
        if fresh is None or fresh > self.max_bytes // _SWEEP_SHARE:
            self._fresh_bytes = 0
            self._sweep()

    def _sweep(self) -> None:
        """Remove the least recently used files until the cache fits."""
        files: list[tuple[float, int, str]] = []
        for path, status in _files(self._root):
            file = os.path.basename(path)
            if _UNFINISHED.fullmatch(file):
                if time.time() - status.st_mtime > _UNFINISHED_AGE_S:
                    with suppress(OSError):
                        os.unlink(path)
            elif _NAME.fullmatch(file):
                files.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in files)
        if total <= self.max_bytes:
            return
        for _, size, path in sorted(files):
            if total <= self.max_bytes * _ROOM:
                break
            with suppress(OSError):
                os.unlink(path)
                total -= size
            # Fails while another range of the object is there.
            with suppress(OSError):
                os.rmdir(os.path.dirname(path))
        with self._lock:
            self._known.clear()

    def _path(self, name: str, entry: _Entry | None = None) -> str:
        folder = os.path.join(self._root, name[:2], name[2:])
        return folder if entry is None else os.path.join(folder, "{:x}-{:x}-{:x}".format(*entry))


_caches: dict[tuple[str, int], DiskCache] = {}


def _after_fork() -> None:
    for cache in _caches.values():
        cache.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class ObjectsOnDisk:
    """The part of a cache that belongs to one repository.

    Parameters
    ----------
    place
        See `DiskCache.of`: a repository that another user can write to must not fill the cache of another one.
    """

    def __init__(self, cache: DiskCache, place: str) -> None:
        self._cache = cache
        self._key = hashlib.blake2b(place.encode(), digest_size=32).digest()

    def takes(self, key: str) -> bool:
        """Whether an object's bytes never change."""
        return key.startswith(_PREFIXES) and not key.endswith(_FIRST)

    async def read(self, key: str, byte_range: ByteRange) -> CachedBytes | None:
        """Bytes of an object, or of a range of it; None if not all of them are in the cache."""
        if byte_range is None:
            start, end = 0, None
        elif isinstance(byte_range, Range):
            start, end = byte_range.start, byte_range.end
        else:
            return None
        try:
            future = self._cache.run(self._cache.read, self._name(key), start, end)
        except RuntimeError:
            return None
        found = await asyncio.wrap_future(future)
        return found if isinstance(found, CachedBytes) else None

    def keep(self, key: str, byte_range: ByteRange, size: int, data: Octets) -> None:
        """Write what was just read, in the background."""
        if not (byte_range is None or isinstance(byte_range, Range)) or not self.takes(key):
            return
        if key.startswith(SNAPSHOTS_PREFIX) and (byte_range is not None or not _never_changes(bytes(data[:64]))):
            return
        self._cache.keep(self._name(key), 0 if byte_range is None else byte_range.start, size, data)

    def drop(self, key: str) -> bool:
        """Remove what is there of an object, as its bytes turned out to be damaged; False where there is nothing."""
        return self._cache.drop(self._name(key))

    def _name(self, key: str) -> str:
        return hashlib.blake2b(key.encode(), digest_size=16, key=self._key).hexdigest()


def _is_private(folder: str, status: os.stat_result) -> bool:
    """Whether only this user can write to the cache in a folder, or put another one in its place."""
    if os.name != "posix":
        return True
    parent = os.stat(folder)
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return False
    return not parent.st_mode & stat.S_IWOTH or bool(parent.st_mode & stat.S_ISVTX)


def _never_changes(head: bytes) -> bool:
    try:
        return read_header(head, FileType.SNAPSHOT).spec_version > 1
    except FormatError:
        return False


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _cover(entries: Sequence[_Entry], start: int, end: int) -> list[tuple[int, int, _Entry]] | None:
    """Parts of entries that are together the bytes from start to end: first byte, end, entry; None: some are missing.

    The first byte of a part may lie before ``start`` only in the first part.
    """
    if start >= end:
        return None
    chosen: list[tuple[int, int, _Entry]] = []
    at = start
    while at < end:
        entry = max((e for e in entries if e[0] <= at < e[1]), key=lambda e: e[1], default=None)
        if entry is None:
            return None
        chosen.append((at, min(end, entry[1]), entry))
        at = entry[1]
    return chosen


def _read_checked(file: BinaryIO, file_size: int, entry: _Entry, start: int, end: int) -> bytes | None:
    """Bytes of the object from start to end, of an open file; None: it is damaged."""
    first, last, size = entry
    blocks = -(-(last - first) // _BLOCK)
    head = file.read(_HEADER.size + 4 * blocks)
    body_at = _HEADER.size + 4 * blocks
    if len(head) != body_at or file_size != body_at + last - first:
        return None
    table = head[_HEADER.size :]
    if _HEADER.unpack_from(head) != (_MAGIC, first, last, size, zlib.crc32(table)):
        return None
    low, high = (start - first) // _BLOCK, -(-(end - first) // _BLOCK)
    file.seek(body_at + low * _BLOCK)
    data = file.read(min(high * _BLOCK, last - first) - low * _BLOCK)
    view = memoryview(data)
    sums = struct.unpack_from(f"<{high - low}I", table, 4 * low)
    for i, wanted in enumerate(sums):
        if zlib.crc32(view[i * _BLOCK : (i + 1) * _BLOCK]) != wanted:
            return None
    skipped = start - first - low * _BLOCK
    return data if skipped == 0 and len(data) == end - start else data[skipped : skipped + end - start]


def _files(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    """All files below a folder; links are neither followed nor returned."""
    with suppress(OSError), os.scandir(folder) as found:
        for one in found:
            with suppress(OSError):
                if one.is_dir(follow_symlinks=False):
                    yield from _files(one.path)
                elif one.is_file(follow_symlinks=False):
                    yield one.path, one.stat(follow_symlinks=False)
