"""Folders whose names are durable: what `LocalStorage` makes, syncs, and need not sync again.

A sync serves everybody who asked before it began. Whoever asks while one is running waits for the next, and all who
wait share that one: a batch of objects in one folder costs a few syncs, not one each.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from typing import Final

from icechunk.storage.local.files import fsync_folder

__all__ = ["Folders"]

_SETTLED_AFTER_NS: Final = 120 * 1_000_000_000
_CLOCK_GRAIN_NS: Final = 20_000_000


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
    """What one process knows of the folders below a root; for all its threads.

    Parameters
    ----------
    root
        Folders above it are made and synced where need be, and may belong to somebody else.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        # Folders that are known to be durable with all their parents.
        self._durable: set[str] = set()
        # When this process last began to sync a folder, ns.
        self._synced_ns: dict[str, int] = {}
        self._start()
        _everyone.add(self)

    def _start(self) -> None:
        self._syncs: dict[str, _Syncs] = {}
        self._changed = threading.Condition()

    def make(self, folder: str) -> None:
        """Make a folder and its parents, and sync every name from the root down, whoever made it."""
        if folder in self._durable:
            return
        existed = os.path.dirname(folder)
        while not os.path.isdir(existed):
            existed = os.path.dirname(existed)
        os.makedirs(folder, exist_ok=True)
        level = folder
        while level not in self._durable:
            parent = os.path.dirname(level)
            inside = len(parent) >= len(self._root)
            try:
                fsync_folder(parent)
            except PermissionError:
                if inside:
                    raise
            if not inside and len(parent) <= len(existed):
                break
            level = parent
        self._durable.add(folder)

    def forget(self) -> None:
        """Know nothing any more: somebody else removed a folder."""
        self._durable.clear()

    def sync(self, folder: str) -> None:
        """Return once a sync of the folder that began after this call has ended.

        Raises
        ------
        OSError
            That sync failed: names given before it may be gone after a power failure.
        """
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
        """Wait for the sync with that number, or make it where nobody does; whether it has ended."""
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
                else:
                    self._synced_ns[folder] = began_ns
                self._changed.notify_all()
        return number >= wanted

    def settle(self, path: str, status: os.stat_result) -> None:
        """Before a file is shown to anybody: sync its folder if it is so young that its writer may not have yet."""
        now_ns = time.time_ns()
        if now_ns - status.st_ctime_ns > _SETTLED_AFTER_NS:
            return
        folder = os.path.dirname(path)
        # The change time is that of the link or rename, by the kernel's coarse clock.
        if status.st_ctime_ns + _CLOCK_GRAIN_NS < self._synced_ns.get(folder, 0):
            return
        # A reader without the right to sync has a read-only view; whoever wrote it has synced it.
        with contextlib.suppress(OSError):
            self.sync(folder)
        self._synced_ns[folder] = now_ns


_everyone: weakref.WeakSet[Folders] = weakref.WeakSet()


def _after_fork() -> None:
    # The threads that were syncing do not exist in the child, and would be waited for.
    for folders in _everyone:
        folders._start()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
