"""The constructor of appenders, which append rows as they arrive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

from icechunk.repository.base import RepositoryBase
from icechunk.repository.sessions import Sessions
from icechunk.runtime.checks import require_type
from icechunk.session import Session

if TYPE_CHECKING:
    from icechunk.appender import Appender
    from icechunk.appender.appender import History

__all__ = ["Appending"]


class Appending(RepositoryBase):
    """Makes appenders."""

    def appender(
        self,
        branch: str,
        *,
        dim: str,
        source: str,
        group: str = "/",
        key: str | None = None,
        every: float = 10.0,
        max_rows: int = 100_000,
        max_bytes: int = 64 * 1024 * 1024,
        on_duplicate: Literal["error", "skip", "replace"] = "error",
        gaps: Literal["allow", "error"] = "allow",
        keep: int | None = None,
        begin_at: Any = None,
        message: str = "append",
    ) -> Appender:
        """Append rows to a group's arrays as they arrive, each row once, also after crashes; use it as ``async with``.

        It commits by itself, and records in each commit the offset of the source up to which rows are committed
        (metadata key ``aioicechunk_append``). So a consumer that starts again goes on after `Appender.position`, and
        of two consumers of one source the slower one is refused.

        Parameters
        ----------
        branch
            Where to commit.
        dim
            Name of the dimension along which rows are appended. All arrays of the group that have it grow.
        source
            Name of the source of the rows, for example ``"kafka:sst/3"``; one consumer at a time.
        group
            Path of the group. Its arrays may exist, or the first `xarray.Dataset` that is put creates the others.
        key
            ``dim``: rows are identified by the labels of the dimension's coordinate, and ``on_duplicate`` decides about
            late or repeated labels. All labels are kept in memory. None: labels must grow.
        every, max_rows, max_bytes
            A commit is made when the oldest buffered row is so many seconds old, or so many rows or bytes are buffered.
            `Appender.put` waits while twice ``max_bytes`` are in memory.
        on_duplicate
            Rows whose label is there: "error" refuses them, "skip" leaves the stored ones, "replace" writes them anew;
            the last two need ``key``.
        gaps
            "error": integer offsets must follow one another without a gap.
        keep
            Only about so many rows are kept: older ones are left out by whole chunks.
        begin_at
            The position where no commit has recorded one; after an expiration it is asked for, also of a new source.
        message
            Of the commits.

        Returns
        -------
        Appender
        """
        from icechunk.appender import Appender

        for name, value in (("branch", branch), ("dim", dim), ("source", source), ("group", group)):
            require_type(name, value, str)
        sessions = cast(Sessions, self)

        async def known_session() -> Session:
            # Nothing is read through it: the rows that a chunk needs are in memory.
            return await sessions._session_on(branch, (await self._core.log()).state, preload=False)

        return Appender(
            cast("History", self),
            known_session,
            branch,
            dim,
            source,
            group=group,
            key=key,
            every_s=every,
            max_rows=max_rows,
            max_bytes=max_bytes,
            on_duplicate=on_duplicate,
            gaps=gaps,
            keep=keep,
            begin_at=begin_at,
            message=message,
            place=repr(self._core.storage),
        )
