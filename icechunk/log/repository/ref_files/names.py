"""Format 1's keys of branches and tags.

The official library writes a name as it is on S3 and in memory, and percent-encoded where it goes through a library
that does so to every key: on local disk, GCS, Azure. Keys that do not parse are ignored.
"""

from __future__ import annotations

import hashlib
from typing import Final
from urllib.parse import unquote_to_bytes

from icechunk.errors import ErrorKind, FormatError, InvalidInputError
from icechunk.format.ids import ObjectId, encode_id, object_id_from_text
from icechunk.format.keys import REFS_PREFIX
from icechunk.runtime import json_codec
from icechunk.runtime.late_dataclass import dataclass
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.port import MAX_KEY_BYTES, Storage

__all__ = ["RefKey", "RefNames", "close_ref", "decode_ref", "encode_ref", "is_closed", "read_ref"]

_BRANCH: Final = "branch."
_TAG: Final = "tag."
_FILE: Final = "ref.json"
_TOMBSTONE: Final = "ref.json.deleted"
_MAX_FILE_NAME_BYTES: Final = 255
_CLOSED: Final = "upgraded_to_format_2"
_ENCODED: Final = frozenset(b'\\{^}%`]"[>~<#|\r\n*?') | frozenset(range(0x20)) | frozenset(range(0x7F, 0x100))


@dataclass(frozen=True, slots=True, kw_only=True)
class RefKey:
    """The ref that a key below ``refs/`` names."""

    is_tag: bool
    name: str
    tombstone: bool = False
    """Whether it says that the tag was deleted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefNames:
    """The form of names in the keys of one storage."""

    encoded: bool
    """Whether names are percent-encoded."""

    @staticmethod
    def of(storage: Storage) -> RefNames:
        """The names that the official library uses in a storage of this kind."""
        inner = storage
        while hasattr(inner, "inner"):
            inner = inner.inner
        return RefNames(encoded=isinstance(inner, LocalStorage))

    def branch_key(self, name: str) -> str:
        """Key of a branch."""
        return f"{REFS_PREFIX}{_BRANCH}{self._text(name)}/{_FILE}"

    def tag_key(self, name: str) -> str:
        """Key of a tag."""
        return f"{REFS_PREFIX}{_TAG}{self._text(name)}/{_FILE}"

    def tombstone_key(self, name: str) -> str:
        """Key that says that a tag was deleted."""
        return f"{REFS_PREFIX}{_TAG}{self._text(name)}/{_TOMBSTONE}"

    def checked(self, name: str, what: str) -> str:
        """A name that a new ref may have.

        Raises
        ------
        InvalidInputError
            Format 1 has no such names, or this place no such keys (kind ``invalid-ref-name``).
        """
        folder = len(f"{_BRANCH}{self._text(name)}".encode())
        if "/" in name or not name:
            why = "takes no '/' in names, and no empty ones"
        elif folder > (_MAX_FILE_NAME_BYTES if self.encoded else MAX_KEY_BYTES - len(f"{REFS_PREFIX}/{_TOMBSTONE}")):
            why = "keeps names in keys of its storage, and this one is too long for that"
        else:
            return name
        raise InvalidInputError(
            f"invalid {what} name {name!r}: a repository of format 1 {why}; choose another name, or upgrade the "
            "repository",
            ErrorKind.INVALID_REF_NAME,
        )

    def _text(self, name: str) -> str:
        if not self.encoded:
            return name
        return "".join(f"%{byte:02X}" if byte in _ENCODED else chr(byte) for byte in name.encode())

    def parse(self, key: str) -> RefKey | None:
        """The ref that a key names; None for a key that names none."""
        folder, _, file = key.removeprefix(REFS_PREFIX).partition("/")
        tombstone = file == _TOMBSTONE
        if not key.startswith(REFS_PREFIX) or not (file == _FILE or tombstone):
            return None
        kind = next((kind for kind in (_BRANCH, _TAG) if folder.startswith(kind)), None)
        if kind is None or (tombstone and kind == _BRANCH):
            return None
        name = folder.removeprefix(kind)
        if self.encoded:
            try:
                name = unquote_to_bytes(name).decode()
            except UnicodeDecodeError:
                return None
        return RefKey(is_tag=kind == _TAG, name=name, tombstone=tombstone)


MARK_BYTES: Final = 8
"""Bytes of the nonce that marks a write of a ref."""
MARK_CHARACTERS: Final = 4 * MARK_BYTES
"""Characters of a mark."""
_MARKS: Final = 32
"""Largest number of marks in one body."""
_SPACES: Final = b" \t\n\r"


def mark_of(nonce: bytes) -> bytes:
    """A nonce as white space, four characters a byte; at the end of a body no reader minds it."""
    return bytes(_SPACES[byte >> shift & 3] for byte in nonce for shift in (6, 4, 2, 0))


def mark_in(data: bytes) -> bytes:
    """The mark at the end of a ref's body; shorter where there is none."""
    end = len(data.rstrip(_SPACES))
    return data[end : end + MARK_CHARACTERS]


def marks_in(data: bytes) -> list[bytes]:
    """The mark of a ref's body, and those of the bodies before it, newest first."""
    end = len(data.rstrip(_SPACES))
    ends = range(end + MARK_CHARACTERS, len(data) + 1, MARK_CHARACTERS)
    return [data[at - MARK_CHARACTERS : at] for at in ends]


def known_mark(data: bytes) -> bytes:
    """The mark by which later bodies name this one; of one without a mark, made of what it says."""
    return marks_after(data)[:MARK_CHARACTERS]


def marks_after(data: bytes) -> bytes:
    """The marks of a body and of those before it, as the one that replaces it has them behind its own."""
    marks = marks_in(data) or [mark_of(hashlib.sha256(data.rstrip(_SPACES)).digest()[:MARK_BYTES])]
    return b"".join(marks[: _MARKS - 1])


def encode_ref(snapshot: ObjectId, mark: bytes = b"") -> bytes:
    """The body of a ref, with the mark of the write, or several."""
    return json_codec.dumps({"snapshot": encode_id(snapshot)}) + mark


def remarked(data: bytes, marks: bytes) -> bytes:
    """A ref's body with other marks."""
    return data.rstrip(_SPACES) + marks


def close_ref(snapshot: ObjectId, mark: bytes = b"") -> bytes:
    """The body of a branch's ref during an upgrade, with the marks that it had; clients of format 1 cannot read it."""
    return json_codec.dumps({_CLOSED: encode_id(snapshot)}) + mark


def is_closed(data: bytes) -> bool:
    """Whether it is the body of a ref that was closed by an upgrade."""
    return data.startswith(b'{"' + _CLOSED.encode())


def decode_ref(data: bytes, what: str) -> ObjectId:
    """The snapshot that a ref points to.

    Raises
    ------
    FormatError
        It names none, or it was closed by an upgrade (kind ``unsupported-spec-version``).
    """
    if is_closed(data):
        raise FormatError(
            f"cannot read {what}: the repository is being upgraded to format 2; open it again",
            ErrorKind.UNSUPPORTED_SPEC_VERSION,
        )
    return read_ref(data, what)


def read_ref(data: bytes, what: str) -> ObjectId:
    """The snapshot that a ref points to, closed or not. Raises `FormatError` where it names none."""
    try:
        return object_id_from_text(json_codec.loads(data)[_CLOSED if is_closed(data) else "snapshot"])
    except (json_codec.JSONDecodeError, KeyError, TypeError, InvalidInputError) as error:
        raise FormatError(f"cannot read {what}: it does not name a snapshot", ErrorKind.DESERIALIZATION) from error
