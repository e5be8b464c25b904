"""Folders below a root: those that `LocalStorage` makes, syncs, and need not sync again.

Nothing is made or deleted through a symbolic link below the root: an untrusted repository must not lead out of its
folder. A folder that was in use is not made again: it was removed from outside.

A sync counts for all calls made before it began. Calls made while one is running wait for the next, and share it: a
batch of objects in one folder costs a few syncs, not one each.

A system reports once that a sync failed, and may then take the names for written: the next sync succeeds although they
are not on the medium. So the names that a failed sync was to make durable stay in doubt, whatever later syncs say,
until they are given anew.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Final, TypeAlias

from icechunk.storage.local.files import is_link, version_of
from icechunk.storage.local.syncs import Promises, fsync_folder, fsync_together, promises_of
from icechunk.storage.port import Version

__all__ = ["Folders"]

_SETTLED_AFTER_NS: Final = 120 * 1_000_000_000
_MANY_FILES: Final = 256
_CLOCK_GRAIN_NS: Final = 20_000_000
_MANY_FOLDERS: Final = 256
_NEVER_BEGAN: Final = frozenset({errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ENOENT, errno.EPERM})
"""Error numbers of a folder that cannot be opened: its names are as they were."""


class _Syncs:
    """The syncs of one folder, counted."""

    __slots__ = ("began", "ended", "failure", "running", "users")

    def __init__(self) -> None:
        self.began = 0
        self.ended = 0
        self.running = False
        self.failure: tuple[int, OSError] | None = None
        """The last sync that failed, and how."""
        self.users = 0


class Folders:
    """One process's knowledge of the folders below a root; for all its threads.

    Parameters
    ----------
    root
        Folders above it are made and synced if necessary, and may belong to another user.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        # Folders that are known to be durable with all their parents.
        self._durable: set[str] = set()
        # Folders that are no links, nor below any.
        self._real: set[str] = set()
        # Folders in which a file of ours was seen.
        self._used: set[str] = set()
        # When this process last began to sync a folder, ns.
        self._synced_ns: dict[str, int] = {}
        # For a folder with a sync that failed: the last success began before the first of these times, ns, and the
        # failure ended before the second. Names given between them are in doubt.
        self._doubts: dict[str, tuple[int, int]] = {}
        # Versions of files that this process has made durable, with their names; the newest ones.
        self._durable_versions: dict[str, Version] = {}
        # Above the root, the lowest folder that this process did not make.
        self._existed = os.path.dirname(root)
        self.promises: Promises = Promises()
        """Promises of the root's file system, once a folder was made or found."""
        self.group_mode: int = 0
        """Permission bits of the root for its group, where the group may write to it; else 0."""
        self._start()
        _everyone.add(self)

    def _start(self) -> None:
        self._syncs: dict[str, _Syncs] = {}
        self._changed = threading.Condition()

    @property
    def in_use(self) -> bool:
        """Whether a file was seen below the root."""
        return bool(self._used)

    def use(self, folder: str) -> None:
        """A file was seen in a folder, which is therefore not made again."""
        self._used.add(folder)

    def use_again(self) -> None:
        """The root was in use when this was pickled."""
        self._used.add(self._root)

    def begin_anew(self) -> None:
        """Drop all knowledge of folders, before a repository is created."""
        self._used.clear()
        self.forget()

    def forget(self) -> None:
        """Forget which folders exist, because one was removed from outside."""
        self._durable.clear()
        self._real.clear()

    def make(self, folder: str, *, durable: bool = True) -> None:
        """Make a folder and its parents, and sync every name from the root down, also of folders that existed.

        Parameters
        ----------
        durable
            False: nothing is synced.

        Raises
        ------
        OSError
            ``ENOENT``: the folder, or the root, was removed from outside while in use. ``ELOOP``: a symbolic link is in
            the way.
        """
        if folder in self._durable or (not durable and folder in self._real):
            return
        self._make(folder)
        level = folder
        while durable and level not in self._durable:
            parent = os.path.dirname(level)
            inside = len(parent) >= len(self._root)
            try:
                fsync_folder(parent)
            except PermissionError:
                if inside:
                    raise
            except OSError as error:
                if error.errno not in _NEVER_BEGAN:
                    self._doubt(parent)
                    self._unmake(folder)
                raise
            if not inside and len(parent) <= len(self._existed):
                break
            level = parent
        if durable:
            self._durable.add(folder)

    def _make(self, folder: str) -> None:
        if not os.path.isdir(self._root):
            self._require_unused(self._root)
            existed = os.path.dirname(self._root)
            while not os.path.isdir(existed):
                existed = os.path.dirname(existed)
            # Another thread may be making them.
            self._existed = min(self._existed, existed, key=len)
            os.makedirs(self._root, exist_ok=True)
        status = os.stat(self._root)
        self.promises = promises_of(status.st_dev)
        mode = stat.S_IMODE(status.st_mode)
        self.group_mode = mode & stat.S_IRWXG if mode & stat.S_IWGRP else 0
        for level in self._levels(folder):
            if level in self._real:
                continue
            try:
                status = os.lstat(level)
            except FileNotFoundError:
                self._require_unused(level)
                self._make_one(level)
                status = os.lstat(level)
            _require_real(level, status)
            self._real.add(level)

    def _require_unused(self, folder: str) -> None:
        """Refuse to make a folder again in which, or in the root below which, a file was seen."""
        is_used = bool(self._used) if folder == self._root else folder in self._used
        # Another thread may have made it, and used it, since it was found missing.
        if is_used and not os.path.lexists(folder):
            raise _removed(folder)

    def _make_one(self, folder: str) -> None:
        try:
            os.mkdir(folder)
        except FileExistsError:
            return
        if self.group_mode:
            os.chmod(folder, stat.S_IMODE(os.stat(folder).st_mode) | self.group_mode)

    def _unmake(self, folder: str) -> None:
        """Remove the folder and those above it that are empty, so that the next call of `make` gives names anew."""
        for level in self._levels(folder)[::-1]:
            if level in self._used or level in self._durable:
                return
            try:
                os.rmdir(level)
            except OSError:
                return
            self._real.discard(level)

    def check(self, folder: str) -> None:
        """Raise `OSError` where a folder is missing (``ENOENT``), or behind a symbolic link (``ELOOP``)."""
        for level in self._levels(folder):
            if level not in self._real:
                _require_real(level, os.lstat(level))
                self._real.add(level)

    def _levels(self, folder: str) -> list[str]:
        """The folder and those above it, below the root, from the root down."""
        found = []
        while len(folder) > len(self._root):
            found.append(folder)
            folder = os.path.dirname(folder)
        return found[::-1]

    def sync_together(self, paths: Sequence[str], *, put_follows: bool) -> bool:
        """Make these files and their names durable, as `fsync_together`; False: that is not possible here.

        Parameters
        ----------
        put_follows
            They need not be durable before the next file is synced, which flushes the device's cache.
        """
        if len(paths) < 2 or not self.promises.syncs_all:
            return False
        return fsync_together(paths, flush=not put_follows and not self.promises.flushes_all)

    def sync(self, folder: str, named_ns: int | None = None) -> None:
        """Return once a sync of the folder that began after this call has ended.

        Parameters
        ----------
        named_ns
            Time before the caller gave a name in the folder, ns.

        Raises
        ------
        OSError
            That sync failed, or one that ended after the name was given: it may be gone after a power failure.
        """
        try:
            self._sync(folder)
        except PermissionError:
            # The name was never synced, and no later reader could tell.
            self._doubt(folder)
            raise
        if named_ns is not None and self._doubts.get(folder, (0, 0))[1] >= named_ns:
            raise _doubtful(folder)

    def _sync(self, folder: str) -> None:
        with self._changed:
            syncs = self._syncs.setdefault(folder, _Syncs())
            syncs.users += 1
            wanted = syncs.began + 1
        try:
            while not self._led(folder, syncs, wanted):
                pass
        finally:
            with self._changed:
                syncs.users -= 1
                if not syncs.users:
                    del self._syncs[folder]
        if syncs.failure is not None and syncs.failure[0] == wanted:
            raise OSError(syncs.failure[1].errno, syncs.failure[1].strerror, folder)

    def _led(self, folder: str, syncs: _Syncs, wanted: int) -> bool:
        """Wait for the sync with that number, or make it if no other thread does; returns whether it has ended."""
        with self._changed:
            while syncs.running and syncs.ended < wanted:
                self._changed.wait()
            if syncs.ended >= wanted:
                return True
            syncs.running = True
            syncs.began += 1
            number = syncs.began
            began_ns = time.time_ns()
        failure: OSError | None = None
        try:
            fsync_folder(folder)
        except OSError as error:
            failure = error
        finally:
            with self._changed:
                syncs.running = False
                syncs.ended = number
                if failure is not None:
                    syncs.failure = (number, failure)
                    if failure.errno not in _NEVER_BEGAN:
                        self._doubt(folder)
                else:
                    self._synced_ns[folder] = began_ns
                self._changed.notify_all()
        return number >= wanted

    def _doubt(self, folder: str) -> None:
        with self._changed:
            now_ns = time.time_ns()
            first, last = self._doubts.get(folder, (0, 0))
            if now_ns - last > _SETTLED_AFTER_NS:
                first = self._synced_ns.get(folder, 0)
            self._doubts[folder] = first, now_ns

    def require_certain(self, path: str, status: os.stat_result) -> None:
        """Raise `OSError` (``EIO``) where a sync of its folder failed lately, after a file got its name."""
        if not self._is_certain(path, status):
            raise _doubtful(os.path.dirname(path))

    def _is_certain(self, path: str, status: os.stat_result) -> bool:
        first, last = self._doubts.get(os.path.dirname(path), (0, 0))
        # The kernel's coarse clock is never ahead.
        certain = not first - _CLOCK_GRAIN_NS <= status.st_ctime_ns <= last
        return certain or time.time_ns() - last > _SETTLED_AFTER_NS or self._is_durable(path, status)

    def _is_durable(self, path: str, status: os.stat_result) -> bool:
        return self._durable_versions.get(path) == version_of(status)

    def durable(self, path: str, version: Version) -> None:
        """This process has made that version of a file, and its name, durable."""
        with self._changed:
            self._durable_versions.pop(path, None)
            self._durable_versions[path] = version
            if len(self._durable_versions) > _MANY_FILES:
                del self._durable_versions[next(iter(self._durable_versions))]

    def is_settled(self, path: str, status: os.stat_result, *, unsynced: bool = False) -> bool:
        """Whether `settle` has no error to raise for a file and, unless it may be ``unsynced``, nothing to do."""
        folder = os.path.dirname(path)
        if not self._is_certain(path, status):
            return False
        if unsynced:
            return True
        if time.time_ns() - status.st_ctime_ns > _SETTLED_AFTER_NS or self._is_durable(path, status):
            return True
        # The change time is that of the link or rename, by the kernel's coarse clock.
        named_ns = status.st_ctime_ns + _CLOCK_GRAIN_NS
        if named_ns < self._synced_ns.get(folder, 0):
            return True
        return named_ns < _settled_ns.get(_identity(folder), 0)

    def settle(self, path: str, status: os.stat_result) -> None:
        """Sync the folder of a file before a reader sees it, if it is so young that its writer may not have.

        Raises
        ------
        OSError
            The file's name may be gone after a power failure: that sync failed, or an earlier one of this process.
        """
        if self.is_settled(path, status):
            return
        self.require_certain(path, status)
        now_ns = time.time_ns()
        folder = os.path.dirname(path)
        identity = _identity(folder)
        # A reader without the right to sync has a read-only view; the writer has synced it. A folder that was removed
        # meanwhile has no names.
        with contextlib.suppress(PermissionError, FileNotFoundError):
            self._sync(folder)
            # Another folder may have taken its place meanwhile.
            if identity is not None and identity == _identity(folder):
                _note_settled(identity, now_ns)
        # A sync that ended meanwhile may have failed.
        self.require_certain(path, status)
        self._synced_ns[folder] = now_ns
        self.durable(path, version_of(status))


_Identity: TypeAlias = tuple[int, int]

_settled_ns: Final[dict[_Identity | None, int]] = {}
"""Time at which the last sync of a folder for a reader began, ns, by the folder's identity; None is never a key. All
storages share it, since many programs open one repository again and again, each time with a new storage."""


def _identity(folder: str) -> _Identity | None:
    """Device and inode of a folder; None: it is not there."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _note_settled(identity: _Identity, began_ns: int) -> None:
    _settled_ns.pop(identity, None)
    _settled_ns[identity] = began_ns
    # Another thread may do the same at this moment.
    while len(_settled_ns) > _MANY_FOLDERS:
        with contextlib.suppress(StopIteration, RuntimeError):
            _settled_ns.pop(next(iter(_settled_ns)), None)


def _doubtful(folder: str) -> OSError:
    return OSError(
        errno.EIO, "a sync of its folder failed, so it may be gone after a power failure; check the disk", folder
    )


def _removed(folder: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "the folder was removed while it was in use", folder)


def _require_real(folder: str, status: os.stat_result) -> None:
    if is_link(status):
        raise OSError(errno.ELOOP, f"{folder!r} is a symbolic link", folder)
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder)


_everyone: weakref.WeakSet[Folders] = weakref.WeakSet()


def _after_fork() -> None:
    # The child would wait for syncs of threads that it does not have.
    for folders in _everyone:
        folders._start()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
