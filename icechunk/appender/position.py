"""The record that commits of appenders keep of their sources: up to which offset each is in the data, and by whom.

The record is a value of the snapshot's metadata under `KEY`::

    {"sources": {"kafka:sst/3": {"offset": 4711, "owner": "9f3c…", "rows": 120}}}

Every commit of an appender has the records of all sources, with its own updated, so the newest record in a
branch's ancestry is complete. A commit is valid only if the branch did not move since that record was read; so two
consumers of one source cannot both commit the rows after one offset.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

import numpy as np

from icechunk.errors import ErrorKind, FormatError, InvalidInputError, ObjectNotFoundError
from icechunk.ops import Update, UpdateType
from icechunk.session.commit import APPENDED
from icechunk.snapshots import SnapshotInfo

__all__ = ["KEY", "Sources", "as_metadata", "newest_sources", "recorded", "valid_offset", "with_record"]

KEY: Final = APPENDED
"""Reserved in the metadata of snapshots."""


class Sources(dict[str, dict[str, Any]]):
    """The records of sources by name."""

    complete: bool = True
    """False: history was shortened before any commit recorded sources that is left, so others may have existed."""


async def newest_sources(
    ancestry: AsyncIterator[SnapshotInfo], ops_log: Callable[[], AsyncIterator[Update]]
) -> Sources:
    """The records of all sources as of the newest commit of an appender, looked for from a tip backwards.

    Parameters
    ----------
    ancestry
        Of the tip.
    ops_log
        Gives the ops log, which tells whether snapshots have expired; read only where no record is found.
    """
    last: SnapshotInfo | None = None
    length = 0
    async for info in ancestry:
        last = info
        length += 1
        found = info.metadata.get(KEY)
        if isinstance(found, Mapping):
            sources = Sources((str(name), dict(record)) for name, record in dict(found.get("sources") or {}).items())
            sources.complete = not found.get("incomplete")
            return sources
    sources = Sources()
    if last is not None and last.metadata.get("__icechunk") != {"is_root": True} and last.parent_id is not None:
        sources.complete = False
    elif length > 1:
        # An expiration gives the oldest commit that is left the first snapshot as its parent.
        try:
            async for update in ops_log():
                if isinstance(update.kind, UpdateType.ExpirationRan):
                    sources.complete = False
                    break
        except ObjectNotFoundError:
            # Older updates are no longer known.
            sources.complete = False
        except FormatError as error:
            # Format 1 has no ops log: an expiration leaves no trace there.
            if error.kind != ErrorKind.UNSUPPORTED_SPEC_VERSION:
                raise
    return sources


def as_metadata(sources: Sources) -> dict[str, Any]:
    """The metadata of a commit that keeps these records."""
    return {KEY: {"sources": dict(sources)} | ({} if sources.complete else {"incomplete": True})}


def with_record(sources: Sources, source: str, record: dict[str, Any]) -> Sources:
    """The same records, but this one of one source."""
    found = Sources({**sources, source: record})
    found.complete = sources.complete
    return found


def recorded(sources: Sources, source: str, *, offset: Any, owner: str, rows: int) -> Sources:
    """The records after a commit that brings one source up to an offset."""
    before = sources.get(source, {})
    return with_record(sources, source, {"offset": offset, "owner": owner, "rows": int(before.get("rows") or 0) + rows})


def valid_offset(offset: Any) -> int | str:
    """An offset as it is recorded.

    Raises
    ------
    InvalidInputError
        It is neither an int of 64 bits nor a text (kind ``invalid-setting``).
    """
    if type(offset) is int or (isinstance(offset, (int, np.integer)) and not isinstance(offset, bool)):
        if -(2**63) <= offset < 2**63:
            return int(offset)
        raise InvalidInputError(f"offset {offset} does not fit into 64 bits", ErrorKind.INVALID_SETTING)
    if isinstance(offset, str) and (offset.isascii() or offset.encode(errors="ignore").decode() == offset):
        return str(offset)
    raise InvalidInputError(
        f"an offset is an int or a text that grows, not {offset!r:.60} of type {type(offset).__name__}",
        ErrorKind.INVALID_SETTING,
    )
