"""The record that commits of appenders keep of their sources: up to which offset each is in the data, and by whom.

The record is a value of the snapshot's metadata under `KEY`::

    {"sources": {"kafka:sst/3": {"offset": 4711, "owner": "9f3c…", "rows": 120}}}

Every commit of an appender has the records of all sources, with its own updated, so the newest record in a
branch's ancestry is complete. A commit is valid only if the branch did not move since that record was read; so two
consumers of one source cannot both commit the rows after one offset.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import numpy as np

from icechunk.errors import ErrorKind, InvalidInputError, SessionStateError
from icechunk.session.commit import APPENDED
from icechunk.snapshots import SnapshotInfo

__all__ = ["KEY", "Sources", "newest_sources", "recorded", "valid_offset"]

KEY: Final = APPENDED
"""Reserved in the metadata of snapshots."""

Sources = dict[str, dict[str, Any]]


async def newest_sources(ancestry: AsyncIterator[SnapshotInfo]) -> Sources:
    """The records of all sources as of the newest commit of an appender, looked for from a tip backwards.

    Raises
    ------
    SessionStateError
        The record may have expired: history ends before one was found, and not at the repository's first snapshot.
    """
    last: SnapshotInfo | None = None
    async for info in ancestry:
        last = info
        found = info.metadata.get(KEY)
        if isinstance(found, Mapping):
            return {str(name): dict(record) for name, record in dict(found.get("sources") or {}).items()}
    if last is not None and last.metadata.get("__icechunk") != {"is_root": True} and last.parent_id is not None:
        raise SessionStateError(
            "cannot find the position of a source: the commits that recorded it have expired; keep the newest commit "
            "of each appender, or give the appender a position to begin at"
        )
    return {}


def recorded(sources: Sources, source: str, *, offset: Any, owner: str, rows: int) -> dict[str, Any]:
    """The metadata of a commit that brings one source up to an offset."""
    before = sources.get(source, {})
    record = {"offset": offset, "owner": owner, "rows": int(before.get("rows") or 0) + rows}
    return {KEY: {"sources": {**sources, source: record}}}


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
