"""Which file a key of `LocalStorage` names, and which keys cannot name one."""

from __future__ import annotations

import os
from typing import Final

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.storage.keys import check_key

__all__ = ["RESERVED", "path_of"]

RESERVED: Final = ".aioicechunk"
"""First segment that keys may not have: the folder of unfinished files and the lock."""


def path_of(root: str, key: str) -> str:
    """The path of a key's file. Raises `InvalidInputError` (``invalid-key``) where a file system has no such name."""
    check_key(key)
    segments = key.split("/")
    if segments[0] == RESERVED:
        raise InvalidInputError(
            f"bad storage key {key!r}: {RESERVED!r} is kept for unfinished files", ErrorKind.INVALID_KEY
        )
    if os.name == "nt":
        check_windows_names(key, segments)
    for segment in segments:
        if len(segment) > 63 and len(segment.encode()) > 255:
            raise InvalidInputError(
                f"bad storage key {key!r}: a file name has at most 255 bytes", ErrorKind.INVALID_KEY
            )
    return os.path.join(root, *segments)


def check_windows_names(key: str, segments: list[str]) -> None:
    """Raise `InvalidInputError` where Windows would refuse a segment, or take it for something else."""
    devices = {"CON", "PRN", "AUX", "NUL", *(f"{name}{n}" for name in ("COM", "LPT") for n in range(1, 10))}
    for segment in segments:
        if any(character in '<>:"|?*\\' or ord(character) < 32 for character in segment):
            reason = "it has a character that Windows does not allow in file names"
        elif segment[-1] in ". ":
            reason = "Windows drops a final dot or space of a file name"
        elif segment.split(".")[0].upper() in devices:
            reason = "Windows keeps that name for a device"
        else:
            continue
        raise InvalidInputError(f"bad storage key {key!r}: {reason}", ErrorKind.INVALID_KEY)
