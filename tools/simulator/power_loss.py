"""The contents of a disk after a power failure: each write, name and sync of a local repository, replayed to any point.

`Recorder` notes what the local storage asks of the system. `Trace.image` then makes the folder as it may be found after
the power failed at some point:

- a name that was given, moved or taken away counts up to some point chosen at random in each folder, but at the least
  up to that folder's last sync;
- a file that was not synced since it was written is empty, cut short, garbage of the right length, or whole.

With `Promises.names_follow_files` the sync of a file or folder makes the names durable that it and the folders above it
were given before, as on ext4, XFS and btrfs, and there is a call that syncs everything at once.

With `Promises.orders` the journal of ext4 or XFS is modelled: one list of all changes to folders, and of files that
were handed over, in the order in which they were made. What is found after a power failure is the result of the first
of them, up to some point chosen at random, but at the least up to the last change of what was synced last. A file that
was handed over before that point has the bytes that it had then, since a commit of the journal flushes the device's
cache first. A file that was not may have its name, and any bytes.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final

from icechunk.storage.local import files as local_files
from icechunk.storage.local import folders as local_folders
from icechunk.storage.local import syncs
from icechunk.storage.local.syncs import Promises

__all__ = ["Event", "Loss", "Recorder", "Trace"]


class Loss(Enum):
    """The part of the unsynced data that is lost."""

    ALL = "all"
    """No name and no byte of it is there."""
    BYTES = "bytes"
    """All names are there, and nothing is in the files."""
    NOTHING = "nothing"
    """All of it is there: the process was killed, the machine goes on."""
    ANY = "any"
    """Anything in between, by chance."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that the system was asked for."""

    verb: str
    """``write``, ``hand-over``, ``sync``, ``name`` (of a file), ``folder``, ``gone``, ``sync-folder``, ``sync-all`` or
    ``acknowledged``."""
    path: str = ""
    """Relative to the root; a folder's for ``sync-folder``."""
    file: int = 0
    """Number of the file."""
    data: bytes = b""
    value: Any = None
    """The acknowledged value."""


@dataclass(slots=True)
class _File:
    data: bytearray = field(default_factory=bytearray)
    synced: bytes | None = None
    """As of the last sync; None: there was none."""
    handed: list[tuple[int, bytes]] = field(default_factory=list)
    """Bytes that the device was given, and the changes that the journal had got then."""


@dataclass(slots=True)
class _Folder:
    changes: list[tuple[str, int | None]] = field(default_factory=list)
    """Name, and the file that it was given to; −1: a folder; None: it was taken away."""
    journal: list[int] = field(default_factory=list)
    """Number of each in the journal, from 1 on."""
    durable: int = 0
    """So many of them."""


class Trace:
    """The events below one folder, in order."""

    def __init__(self, events: list[Event], promises: Promises) -> None:
        self.events = events
        self._promises = promises

    def acknowledged(self, end: int) -> list[Any]:
        """The values acknowledged in the first ``end`` events."""
        return [event.value for event in self.events[:end] if event.verb == "acknowledged"]

    def image(self, end: int, into: Path, loss: Loss, chance: random.Random) -> None:
        """Make the folder as it may be found if the power failed after the first ``end`` events."""
        files: dict[int, _File] = {}
        folders: dict[str, _Folder] = {"": _Folder()}
        # Changes that the journal was given, and those of them that a sync has committed.
        given = committed = 0
        for event in self.events[:end]:
            given += event.verb in ("name", "folder", "gone", "hand-over")
            self._apply(event, files, folders, given)
            if event.verb in ("sync", "sync-folder", "sync-all"):
                committed = max(committed, _newest(event, files, folders, given))
        if self._promises.orders:
            kept = {Loss.ALL: committed, Loss.ANY: chance.randint(committed, given)}.get(loss, given)
            _keep_in_order(files, folders, kept)
        self._make(into, "", files, folders, loss, chance)

    def _apply(self, event: Event, files: dict[int, _File], folders: dict[str, _Folder], given_changes: int) -> None:
        parent, _, name = event.path.rpartition("/")
        if event.verb in ("name", "folder", "gone"):
            folders[parent].journal.append(given_changes)
        match event.verb:
            case "write":
                files.setdefault(event.file, _File()).data += event.data
            case "hand-over":
                files[event.file].handed.append((given_changes, bytes(files[event.file].data)))
            case "sync":
                files[event.file].synced = bytes(files[event.file].data)
                if self._promises.names_follow_files:
                    for path, folder in folders.items():
                        given = [n for n, (_, file) in enumerate(folder.changes, 1) if file == event.file]
                        # A journal keeps the order, so what came before in the folder is durable with it.
                        folder.durable = max(folder.durable, *given, 0)
                        if given:
                            _keep_name(path, folders)
            case "name":
                files.setdefault(event.file, _File())
                folders[parent].changes.append((name, event.file))
            case "folder":
                folders[parent].changes.append((name, -1))
                folders.setdefault(event.path, _Folder())
            case "gone":
                folders[parent].changes.append((name, None))
            case "sync-folder":
                folders[event.path].durable = len(folders[event.path].changes)
                if self._promises.names_follow_files:
                    _keep_name(event.path, folders)
            case "sync-all":
                for file in files.values():
                    file.synced = bytes(file.data)
                for folder in folders.values():
                    folder.durable = len(folder.changes)

    def _make(
        self,
        into: Path,
        path: str,
        files: dict[int, _File],
        folders: dict[str, _Folder],
        loss: Loss,
        chance: random.Random,
    ) -> None:
        into.mkdir()
        folder = folders[path]
        kept = {Loss.ALL: folder.durable, Loss.ANY: chance.randint(folder.durable, len(folder.changes))}.get(
            loss, len(folder.changes)
        )
        if self._promises.orders:
            kept = folder.durable
        names: dict[str, int] = {}
        for name, what in folder.changes[:kept]:
            if what is None:
                names.pop(name, None)
            else:
                names[name] = what
        for name, what in names.items():
            if what == -1:
                self._make(into / name, f"{path}/{name}".lstrip("/"), files, folders, loss, chance)
            else:
                (into / name).write_bytes(_contents(files[what], loss, chance))


def _newest(event: Event, files: dict[int, _File], folders: dict[str, _Folder], given: int) -> int:
    """The number, in the journal, of the last change of what a sync is about."""
    if event.verb == "sync-all":
        return given
    if event.verb == "sync-folder":
        parent, _, name = event.path.rpartition("/")
        own = [
            n for n, (named, _) in zip(folders[parent].journal, folders[parent].changes, strict=True) if named == name
        ]
        return max([0, *folders[event.path].journal, *own])
    found = [n for n, _ in files[event.file].handed]
    for folder in folders.values():
        found += [n for n, (_, file) in zip(folder.journal, folder.changes, strict=True) if file == event.file]
    return max([0, *found])


def _keep_in_order(files: dict[int, _File], folders: dict[str, _Folder], kept: int) -> None:
    """The first ``kept`` changes of the journal are on the medium, and no others."""
    for folder in folders.values():
        folder.durable = sum(number <= kept for number in folder.journal)
    for file in files.values():
        for number, data in file.handed:
            if number <= kept and len(data) >= len(file.synced or b""):
                file.synced = data


def _keep_name(path: str, folders: dict[str, _Folder]) -> None:
    """The names of a folder and of those above it are durable."""
    while path:
        parent, _, name = path.rpartition("/")
        folder = folders[parent]
        folder.durable = max(
            folder.durable, *(n for n, (given, what) in enumerate(folder.changes, 1) if given == name and what == -1), 0
        )
        path = parent


def _contents(file: _File, loss: Loss, chance: random.Random) -> bytes:
    whole = bytes(file.data)
    if loss is Loss.NOTHING or file.synced == whole:
        return whole
    kept = file.synced or b""
    if loss is not Loss.ANY:
        return kept
    torn = whole[: chance.randint(0, len(whole))]
    return chance.choice([kept, torn, torn + bytes(len(whole) - len(torn)), chance.randbytes(len(whole)), whole])


_PATCHED: Final = {
    "open": "_open_file",
    "close": "_close",
    "write": "_write",
    "fsync": "_fsync",
    "link": "_link",
    "unlink": "_unlink",
    "replace": "_replace",
    "mkdir": "_mkdir",
}
"""Calls of the system that are recorded, and by what."""
_TOGETHER: Final = syncs.fsync_together.__name__
"""Under this name `folders` has the sync of all files at once, which is replaced in place of the system's call."""
_EXCHANGE: Final = "_exchange"
"""Under this name `files` has the system's call that gives two files each other's name."""
_RANGE: Final = "_sync_file_range"
"""Under this name `syncs` has the system's call that hands over."""
_HANDED_OVER: Final = 7
"""Flags of that call when it waits until the device has all bytes."""


class Recorder:
    """Notes what all threads of this process ask of the system below one folder; what is there already is durable."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self.events: list[Event] = []
        self._lock = threading.RLock()
        self._files: dict[str, int] = {}
        """Number of the file under each name now."""
        self._open: dict[int, str | int] = {}
        """Descriptors of folders, by path, and of files, by number."""
        self._count = 0
        self._real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in _PATCHED}
        self._real_exchange = getattr(local_files, _EXCHANGE)
        self._real_range = getattr(syncs, _RANGE)
        if root.is_dir():
            self._note_present(root)

    def _note_present(self, folder: Path) -> None:
        """Note the existing files, which are durable."""
        for path in sorted(folder.iterdir()):
            inside = str(path.relative_to(self._root))
            if path.is_dir():
                self._note("folder", inside)
                self._note_present(path)
                continue
            self._count += 1
            self._files[inside] = self._count
            self._note("name", inside, self._count)
            self._note("write", file=self._count, data=path.read_bytes())
            self._note("sync", file=self._count)
        self._note("sync-folder", "" if folder == Path(self._root) else str(folder.relative_to(self._root)))

    def acknowledge(self, value: Any) -> None:
        """A caller was notified that something is done, which has to be true from now on."""
        with self._lock:
            self.events.append(Event("acknowledged", value=value))

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Record until the end of the block."""
        for name, method in _PATCHED.items():
            setattr(os, name, getattr(self, method))
        setattr(local_files, _EXCHANGE, self._exchange)
        setattr(local_folders, _TOGETHER, self._fsync_together)
        setattr(syncs, _RANGE, lambda: self._sync_file_range)
        try:
            yield self
        finally:
            setattr(syncs, _RANGE, self._real_range)
            setattr(local_folders, _TOGETHER, syncs.fsync_together)
            setattr(local_files, _EXCHANGE, self._real_exchange)
            for name, real in self._real.items():
                setattr(os, name, real)

    def _inside(self, path: Any) -> str | None:
        if not isinstance(path, str) or not (path + "/").startswith(self._root + "/"):
            return None
        return path[len(self._root) + 1 :]

    def _note(self, verb: str, path: str = "", file: int = 0, data: bytes = b"") -> None:
        self.events.append(Event(verb, path, file, data))

    def _opened(self, descriptor: int, path: str, flags: int) -> None:
        if flags & getattr(os, "O_DIRECTORY", 0) or os.path.isdir(os.path.join(self._root, path)):
            self._open[descriptor] = path
        elif path in self._files:
            self._open[descriptor] = self._files[path]
        elif flags & os.O_CREAT:
            self._count += 1
            self._files[path] = self._open[descriptor] = self._count
            self._note("name", path, self._count)

    def _open_file(self, path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        with self._lock:
            descriptor = int(self._real["open"](path, flags, *arguments, **options))
            if (inside := self._inside(path)) is not None:
                self._opened(descriptor, inside, flags)
            return descriptor

    def _close(self, descriptor: int) -> None:
        with self._lock:
            self._open.pop(descriptor, None)
            self._real["close"](descriptor)

    def _write(self, descriptor: int, data: Any) -> int:
        with self._lock:
            count = int(self._real["write"](descriptor, data))
            file = self._open.get(descriptor)
            if isinstance(file, int):
                self._note("write", file=file, data=bytes(memoryview(data)[:count]))
            return count

    def _fsync(self, descriptor: int) -> None:
        # Writes that begin while it runs may not be part of it.
        with self._lock:
            self._real["fsync"](descriptor)
            what = self._open.get(descriptor)
            if isinstance(what, int):
                self._note("sync", file=what)
            elif what is not None:
                self._note("sync-folder", what)

    def _sync_file_range(self, descriptor: int, offset: int, size: int, flags: int) -> int:
        with self._lock:
            what = self._open.get(descriptor)
            if flags == _HANDED_OVER and isinstance(what, int):
                self._note("hand-over", file=what)
        return 0

    def _fsync_together(self, paths: Sequence[str], *, flush: bool) -> bool:
        with self._lock:
            for path in paths:
                os.stat(path)
            self._note("sync-all")
        return True

    def _link(self, source: Any, target: Any, **options: Any) -> None:
        with self._lock:
            self._real["link"](source, target, **options)
            old, new = self._inside(source), self._inside(target)
            if old is not None and new is not None:
                self._files[new] = self._files[old]
                self._note("name", new, self._files[old])

    def _unlink(self, path: Any, **options: Any) -> None:
        with self._lock:
            self._real["unlink"](path, **options)
            name = self._inside(path)
            if name is not None:
                self._files.pop(name, None)
                self._note("gone", name)

    def _replace(self, source: Any, target: Any, **options: Any) -> None:
        with self._lock:
            self._real["replace"](source, target, **options)
            old, new = self._inside(source), self._inside(target)
            if old is not None and new is not None:
                self._files[new] = self._files.pop(old)
                self._note("name", new, self._files[new])
                self._note("gone", old)

    def _exchange(self, one: str, other: str) -> bool:
        with self._lock:
            exchanged = bool(self._real_exchange(one, other))
            first, second = self._inside(one), self._inside(other)
            if exchanged and first is not None and second is not None:
                self._files[first], self._files[second] = self._files[second], self._files[first]
                self._note("name", second, self._files[second])
                self._note("name", first, self._files[first])
            return exchanged

    def _mkdir(self, path: Any, *arguments: Any, **options: Any) -> None:
        with self._lock:
            self._real["mkdir"](path, *arguments, **options)
            name = self._inside(path)
            if name:
                self._note("folder", name)
