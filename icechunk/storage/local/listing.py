"""Keys below a folder, in the order of whole keys: the listing of `LocalStorage`."""

from __future__ import annotations

import heapq
import os
import stat
from collections.abc import Iterator

from icechunk.storage.local.files import RESERVED
from icechunk.storage.port import ObjectInfo, Version

__all__ = ["info_of", "try_stat", "version_of", "walk"]


def try_stat(path: str) -> os.stat_result | None:
    """The status of a regular file, links followed; None where there is none."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def version_of(status: os.stat_result) -> Version:
    """``inode-mtime-size``."""
    return Version(f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}")


def info_of(key: str, status: os.stat_result) -> ObjectInfo:
    """A file as an object."""
    return ObjectInfo(key=key, size=status.st_size, version=version_of(status), modified_us=status.st_mtime_ns // 1000)


def walk(root: str, prefix: str, start_after: str | None) -> Iterator[ObjectInfo]:
    """Objects whose keys begin with ``prefix`` and come after ``start_after``, ascending. Raises `OSError`."""
    folder_key = prefix.rpartition("/")[0]
    segments = folder_key.split("/") if folder_key else []
    if "\0" in prefix or any(segment in ("", ".", "..") for segment in segments) or segments[:1] == [RESERVED]:
        return
    path = os.path.join(root, *segments)
    yield from _walk_folder(path, folder_key + "/" if segments else "", prefix, start_after, frozenset())


def _walk_folder(
    path: str, key: str, prefix: str, start_after: str | None, above: frozenset[tuple[int, int]]
) -> Iterator[ObjectInfo]:
    try:
        status = os.stat(path)
        with os.scandir(path) as entries:
            # A folder sorts with its slash, so that "a-b" comes before "a/b" as whole keys do.
            names = [entry.name + "/" if entry.is_dir() else entry.name for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return  # a symbolic link that leads back up
    # A listing of a long log needs its first few keys only: no others are sorted, or looked at.
    heapq.heapify(names)
    while names:
        name = heapq.heappop(names)
        if not _is_utf8(name) or (key == "" and name.rstrip("/") == RESERVED):
            continue
        full, entry_path = key + name, os.path.join(path, name.rstrip("/"))
        if name.endswith("/"):
            if not (full.startswith(prefix) or prefix.startswith(full)):
                continue
            if start_after is not None and full < start_after and not start_after.startswith(full):
                continue
            yield from _walk_folder(entry_path, full, prefix, start_after, above | {identity})
        elif full.startswith(prefix) and (start_after is None or full > start_after):
            found = try_stat(entry_path)
            if found is not None:
                yield info_of(full, found)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
