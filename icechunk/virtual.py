"""Virtual references: chunks that are byte ranges of files outside the repository."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from icechunk.config.containers import VirtualChunkContainer
from icechunk.runtime.checks import aware, optional, text, unsigned
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.representation import IntLikeEnum, Represented, redacted_url

__all__ = ["ChunkType", "VirtualChunkContainer", "VirtualChunkSpec"]

_index = unsigned(32)
_number = unsigned(64)


class ChunkType(IntLikeEnum):
    """Kind of place where a chunk's bytes are."""

    uninitialized = 0
    native = 1
    virtual = 2
    inline = 3


@dataclass(frozen=True, slots=True, repr=False)
class VirtualChunkSpec(Represented):
    """One virtual reference, for `IcechunkStore.set_virtual_refs`."""

    index: list[int]
    """Coordinates in the chunk grid."""
    location: str
    """URL of the file, verbatim."""
    offset: int
    """First byte of the chunk in it."""
    length: int
    """Bytes of the chunk."""
    etag_checksum: str | None = None
    """The file must still have this ETag when it is read."""
    last_updated_at_checksum: datetime | None = None
    """The file must not be newer than this (with a time zone) when it is read."""

    def __post_init__(self) -> None:
        index: Iterable[Any] = self.index
        object.__setattr__(self, "index", [_index("VirtualChunkSpec.index", i) for i in index])
        text("VirtualChunkSpec.location", self.location)
        object.__setattr__(self, "offset", _number("VirtualChunkSpec.offset", self.offset))
        object.__setattr__(self, "length", _number("VirtualChunkSpec.length", self.length))
        optional(text)("VirtualChunkSpec.etag_checksum", self.etag_checksum)
        optional(aware)("VirtualChunkSpec.last_updated_at_checksum", self.last_updated_at_checksum)

    def _shown(self) -> list[tuple[str, Any, Any]]:
        return [(n, redacted_url(v) if n == "location" else v, d) for n, v, d in Represented._shown(self)]
