"""The appender: it buffers rows, commits them, and places them again if another writer was first.

One task at a time commits. It opens a session at the branch's tip, as far as that is known, writes all buffered rows
after the last one, and commits with the record of its source (`icechunk.appender.position`); the commit is valid only
if the branch did not move.
If it moved, the changes are rebased if the others changed other arrays; else they are dropped, and the rows, still in
memory, are placed again after those of the winner. Before either, the newest record of the source is read: an entry of
another owner ends this appender. An outcome that is not known is settled before anything else is written.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final, Literal, NoReturn, Protocol, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np

from icechunk.appender.position import Sources, as_metadata, newest_sources, recorded, valid_offset, with_record
from icechunk.appender.row_memory import RowMemory
from icechunk.appender.target import Batch, Target
from icechunk.appender.written_ahead import WriteAhead
from icechunk.conflicts import ConflictDetector
from icechunk.errors import (
    CommitOutcomeUnknown,
    ConflictError,
    ErrorKind,
    InvalidInputError,
    SessionStateError,
    StorageError,
)
from icechunk.format.ids import encode_id
from icechunk.log.repository.port import Layout
from icechunk.ops import Update
from icechunk.runtime.checks import WrongTypeError, require_text
from icechunk.runtime.late_dataclass import dataclass
from icechunk.session import Session
from icechunk.snapshots import SnapshotInfo

__all__ = ["Appender", "AppenderStats", "History", "Promise"]

Promise: TypeAlias = Literal["buffered", "committed", "skipped"]
OnDuplicate: TypeAlias = Literal["error", "skip", "replace"]

_TIP_STAYS_S: Final = 5.0
_LONGEST_RUN_S: Final = 0.0005
"""Seconds for which puts that never wait run at most: then other tasks have a turn, the commit's among them."""
_SETTLE_PAUSES_S: Final = (0.05, 0.2, 1.0, 5.0)
_UNCHECKED_BELOW: Final = 2**62
_FIRST_RETRY_S: Final = 0.1
"""Pause before a commit that failed is tried again by itself; each further failure doubles it."""
_LAST_RETRY_S: Final = 10.0


class History(Protocol):
    """The part of a repository that an appender uses."""

    async def writable_session_async(self, branch: str) -> Session: ...

    async def readonly_session_async(self, *, snapshot_id: str) -> Session: ...

    async def settle_async(self, token: Any) -> bool: ...

    def async_ancestry(self, *, snapshot_id: str) -> AsyncIterator[SnapshotInfo]: ...

    def ops_log_async(self) -> AsyncIterator[Update]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AppenderStats:
    """Counts of an appender."""

    rows_buffered: int
    """Rows that were put and are in no commit yet."""
    bytes_buffered: int
    """Their size, as it is in memory; on a local disk some are written already."""
    rows_committed: int
    """Rows that this appender committed, those among them that replaced stored ones; not those before the first."""
    commits: int
    """Commits that it made."""
    placed_again: int
    """Times that rows were written again since another commit to the same arrays was first."""
    rebased: int
    """Times that a commit was rebased over commits to other arrays."""
    puts_repeated: int
    """Calls of `put` that were skipped, since their offset was seen before."""
    lag_s: float
    """Seconds since the oldest buffered row was put; 0 where none is buffered."""


@dataclass(slots=True)
class _Counts:
    rows: int = 0
    commits: int = 0
    placed_again: int = 0
    rebased: int = 0
    repeated: int = 0


class _Labels:
    """Labels, ascending, in memory that doubles when it is full; or the last of them alone."""

    __slots__ = ("_count", "_last_only", "_room")

    def __init__(self, labels: Any, *, last_only: bool) -> None:
        self._room = labels[-1:].copy() if last_only else labels
        self._count, self._last_only = len(self._room), last_only

    @property
    def known(self) -> Any:
        return self._room[: self._count]

    @property
    def last(self) -> Any:
        return self._room[self._count - 1] if self._count else None

    def append(self, labels: Any) -> None:
        if self._last_only:
            labels, self._count = labels[-1:], 0
        count = self._count + len(labels)
        if count > len(self._room):
            room = np.empty(2 * count, self._room.dtype)
            room[: self._count] = self.known
            self._room = room
        self._room[self._count : count] = labels
        self._count = count


_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, asyncio.Lock]] = WeakKeyDictionary()
"""Appenders of one branch in one process commit one after the other instead of against each other."""


class Appender:
    """Appends rows along one dimension of a group's arrays, each row once. Made by `Repository.appender`.

    Use it as ``async with``: it opens on entering, and commits buffered rows on leaving, also after an error in the
    block, so no row that `put` accepted is lost. Belongs to one event loop.
    """

    def __init__(
        self,
        history: History,
        known_session: Callable[[], Awaitable[Session]],
        branch: str,
        dim: str,
        source: str,
        *,
        group: str,
        key: str | None,
        every_s: float,
        max_rows: int,
        max_bytes: int,
        on_duplicate: OnDuplicate,
        gaps: Literal["allow", "error"],
        keep: int | None,
        begin_at: Any,
        message: str,
        place: str,
    ) -> None:
        _require_positive("every", every_s, (int, float))
        for name, number in (("max_rows", max_rows), ("max_bytes", max_bytes)):
            _require_positive(name, number, int)
        if keep is not None:
            _require_positive("keep", keep, int)
        if gaps not in ("allow", "error"):
            raise InvalidInputError(f"gaps must be 'allow' or 'error', not {gaps!r}", ErrorKind.INVALID_SETTING)
        if any(part in ("", ".", "..") for part in group.strip("/").split("/")) and group.strip("/"):
            raise InvalidInputError(
                f"group {group!r} is no path of a group: it has an empty, '.' or '..' segment",
                ErrorKind.INVALID_SETTING,
            )
        if on_duplicate not in ("error", "skip", "replace"):
            raise InvalidInputError(
                f"on_duplicate must be 'error', 'skip' or 'replace', not {on_duplicate!r}", ErrorKind.INVALID_SETTING
            )
        if on_duplicate != "error" and key is None:
            raise InvalidInputError(
                f"on_duplicate={on_duplicate!r} needs key={dim!r}: rows are found again by the labels of the key",
                ErrorKind.INVALID_SETTING,
            )
        if key is not None and key != dim:
            raise InvalidInputError(
                f"key must be the append dimension's coordinate {dim!r}, not {key!r}", ErrorKind.INVALID_SETTING
            )
        self._history, self._known_session = history, known_session
        self._branch, self._dim, self._source, self._group = branch, dim, source, group.strip("/")
        self._key, self._every_s, self._max_rows, self._max_bytes = key, every_s, max_rows, max_bytes
        self._on_duplicate, self._gaps, self._keep, self._message = on_duplicate, gaps, keep, message
        for name, text in (("branch", branch), ("source", source), ("message", message)):
            require_text(name, text)
        if not source:
            raise InvalidInputError("source is the name of the rows' source, not empty", ErrorKind.INVALID_SETTING)
        self._begin_at = None if begin_at is None else valid_offset(begin_at)
        self._place = place
        self._owner = secrets.token_hex(8)
        self._counts = _Counts()
        self._buffered: deque[Batch] = deque()
        self._rows = self._bytes = 0
        self._oldest_s: float | None = None
        self._position: Any = None
        self._last_offset: Any = None
        self._seen: tuple[Any, ...] | None = None
        """The newest record of the source that is known: owner, offset and rows."""
        self._labels: _Labels | None = None
        """Labels: with a key all stored and buffered ones, without it the last one alone."""
        self._target: Target | None = None
        self._sources = Sources()
        self._session: Session | None = None
        self._overtaken = False
        """Another writer's rows may have the labels of buffered ones."""
        self._turn_given_s = -math.inf
        self._tip_expected_s = -math.inf
        """Time at which this appender's commit was the tip (`time.monotonic`)."""
        self._error: SessionStateError | None = None
        """The error that has ended this appender."""
        self._has_raised_error = False
        """Whether a caller knows that it has ended."""
        self._refused: list[str] = []
        """Rows that could not be stored beside another writer's, and that no caller has been told of; each with why."""
        self._schema = 0
        """Grows whenever the arrays are no longer like those that rows were checked against."""
        self._putting = asyncio.Lock()
        self._has_left = False
        self._committing: asyncio.Task[str | None] | None = None
        self._alongside = set[asyncio.Task[str | None]]()
        """Commits of replacements and of rows before the first."""
        self._timer: asyncio.Task[None] | None = None
        self._ahead: WriteAhead | None = None
        self._memory = RowMemory()

    # -- properties ------------------------------------------------------------------------------------------------

    @property
    def position(self) -> Any:
        """The offset that was committed last for this source; None where nothing was: where to resume."""
        return self._position

    def stats(self) -> AppenderStats:
        """Its counts so far."""
        lag = 0.0 if self._oldest_s is None else time.monotonic() - self._oldest_s
        return AppenderStats(
            rows_buffered=self._rows,
            bytes_buffered=self._bytes,
            rows_committed=self._counts.rows,
            commits=self._counts.commits,
            placed_again=self._counts.placed_again,
            rebased=self._counts.rebased,
            puts_repeated=self._counts.repeated,
            lag_s=lag,
        )

    def __enter__(self) -> NoReturn:
        raise WrongTypeError("an appender belongs to an event loop: write `async with repo.appender(...) as appender`")

    def __exit__(self, *_: object) -> None:
        """Never called, but `with` asks for it before `__enter__` says what to write."""

    async def __aenter__(self) -> Appender:
        await self._begin()
        record = self._sources.get(self._source)
        if record is None and self._begin_at is None and not self._sources.complete:
            raise SessionStateError(
                f"cannot find the position of source {self._source!r}: a part of the history has expired, and no "
                "commit that is left recorded it. Give begin_at: the offset of the source's last row that is in the "
                "data, or -1 (for offsets that are texts: '') if there is none"
            )
        self._position = self._last_offset = self._begin_at if record is None else record["offset"]
        self._seen = _facts(record)
        self._has_left = False
        self._timer = asyncio.create_task(self._tick())
        self._ahead = WriteAhead(self._require_session()._content.core)
        return self

    async def __aexit__(
        self, kind: object = None, raised: BaseException | None = None, traceback: object = None
    ) -> None:
        self._has_left = True
        if self._timer is not None:
            self._timer.cancel()
            await asyncio.gather(self._timer, return_exceptions=True)
        if self._alongside:
            await asyncio.gather(*self._alongside, return_exceptions=True)
        if self._error is None:
            try:
                await self.flush()
            except Exception as error:
                self._raise_untold(error)
                raise
        elif self._committing is not None:
            await asyncio.gather(self._committing, return_exceptions=True)
        if self._ahead is not None:
            await asyncio.gather(*self._ahead.cut())
        self._raise_untold(raised)

    def _raise_untold(self, raised: BaseException | None) -> None:
        """Raise what no caller knows of yet; where the block has raised already, add it there as a note."""
        untold: list[Exception] = []
        if self._error is not None and not self._has_raised_error:
            untold.append(self._error)
        if (refused := self._take_refused()) is not None:
            untold.append(refused)
        if raised is None and untold:
            raised = untold.pop(0)
            for other in untold:
                raised.add_note(str(other))
            self._has_raised_error = True
            raise raised
        for other in untold:
            assert raised is not None
            raised.add_note(str(other))

    # -- rows ------------------------------------------------------------------------------------------------------

    async def put(self, data: Any, *, offset: Any = None, durable: bool = False) -> Promise:
        """Accept rows; they are committed with others soon.

        Waits while more than twice ``max_bytes`` are buffered, and on a local disk while many rows are being written
        ahead of their commit.

        Parameters
        ----------
        data
            An `xarray.Dataset`, or a mapping of variable names to arrays, of one row or several. It is copied.
        offset
            Of the source, behind these rows: an int or a text that grows. None where the source has none; such rows are
            not protected against being put twice.
        durable
            Wait until the rows are committed.

        Returns
        -------
        str
            "buffered": they will be committed; "committed": they are; "skipped": the offset was seen before, or all
            labels were there and ``on_duplicate`` is "skip". Rows that replace stored ones are committed at once, by
            this call, and all buffered ones before them: "committed" also without ``durable``, unless others of these
            rows are buffered.

        Raises
        ------
        InvalidInputError
            The data do not fit, labels do not grow, the offset goes backwards, or leaves a gap that is refused (kind
            ``invalid-setting``). Nothing of these data is buffered. Also, once, where rows of an earlier `put` were
            refused as they were committed, since another writer has stored their labels; the message names them.
        SessionStateError
            Another consumer of this source has committed (fenced), the branch was reset, or another writer has changed
            the arrays: open a new appender.
        StorageError
            An earlier commit failed; the buffered rows are kept, and the next `flush` or `put` tries again.
        """
        async with self._putting:
            promise = await self._accepted(data, offset)
        if durable:
            await self.flush()
            return "committed" if promise == "buffered" else promise
        if self._rows >= self._max_rows or self._bytes >= self._max_bytes:
            self._commit_soon()
            while self._bytes >= 2 * self._max_bytes and (committing := self._running_commit()) is not None:
                await self._wait(committing)
        while self._ahead is not None and self._ahead.is_full:
            await self._ahead.wait()
        # A caller that has its rows at hand would let nothing else run, the commit least of all.
        if self._running_commit() is not None or time.monotonic() - self._turn_given_s > _LONGEST_RUN_S:
            await asyncio.sleep(0)
            self._turn_given_s = time.monotonic()
        return promise

    async def _accepted(self, data: Any, offset: Any) -> Promise:
        """Check rows and buffer them; one call at a time, so that offsets and labels are checked in order."""
        self._require_open()
        if (refused := self._take_refused("the rows of this `put` were not taken: put them again")) is not None:
            raise refused
        if offset is not None:
            if type(offset) is not int or abs(offset) >= _UNCHECKED_BELOW:
                offset = valid_offset(offset)
            if not self._is_new(offset):
                self._counts.repeated += 1
                return "skipped"
        while True:
            schema, target = self._schema, self._require_target()
            batch = await target.checked(self._require_session(), data, keep=self._keep, memory=self._memory)
            batch.offset = offset
            if batch.rows == 0:
                break
            batch = await self._by_labels(batch, batch.fresh or target)
            if schema == self._schema:
                if batch.fresh is not None:
                    batch.fresh.snapshot_id = self._require_target().snapshot_id
                    self._target = batch.fresh
                break
            # These rows are not buffered yet.
            self._labels = None
            self._require_open()
        if batch.rows:
            self._buffered.append(batch)
            if self._ahead is not None:
                target = self._require_target()
                self._ahead.add(batch, target, target.length + self._rows)
            self._rows += batch.rows
            self._bytes += batch.num_bytes
            self._oldest_s = self._oldest_s or time.monotonic()
        self._last_offset = self._last_offset if offset is None else offset
        if batch.rows:
            return "buffered"
        return "committed" if batch.replaced else "skipped"

    async def flush(self) -> str | None:
        """Commit all buffered rows. Returns the id of the newest snapshot it made; None if nothing was buffered.

        Raises
        ------
        SessionStateError, StorageError, CommitOutcomeUnknown
            As for `put`; rows that are not committed stay buffered.
        InvalidInputError
            With a key: another writer has stored labels of rows that were buffered, and they are not to be skipped or
            replaced. The rows of that `put` are dropped; all others have been committed.
        """
        self._require_usable()
        made: str | None = None
        while self._buffered or self._running_commit() is not None:
            made = await self._wait(self._commit_soon()) or made
        if (refused := self._take_refused()) is not None:
            raise refused
        return made

    async def prepend(self, data: Any) -> str:
        """Put rows before the first one, in a commit of their own.

        Their number must be a multiple of the chunks' rows, since whole chunks are shifted. Positions of sources do not
        change.

        Raises
        ------
        InvalidInputError
            The data do not fit, their labels do not grow up to the first one, their number is not such a multiple, or
            there are no arrays yet.
        """
        self._require_open()
        async with self._putting:
            await self.flush()
            made = await self._alone(self._prepended(data))
            assert made is not None
            return made

    async def _prepended(self, data: Any) -> str | None:
        async with self._turn():
            while True:
                session = await self._begin()
                target = self._require_target()
                batch = await target.checked_before_first(session, data)
                after = await target.prepend(session, batch)
                made = await self._try_commit(session, self._sources)
                if made is not None:
                    self._adopt(after, session, made)
                    if not target.length:
                        self._labels = None
                    if self._key is not None and self._labels is not None:
                        labels = np.concatenate([batch.values[self._dim], self._labels.known])
                        self._labels = _Labels(labels, last_only=False)
                    return made
                self._counts.placed_again += 1

    # -- checks ----------------------------------------------------------------------------------------------------

    def _require_usable(self) -> None:
        if self._timer is None:
            raise SessionStateError("the appender is not open: use it as `async with repo.appender(...) as appender`")
        if self._error is not None:
            self._has_raised_error = True
            raise self._error

    def _require_open(self) -> None:
        if self._has_left:
            raise SessionStateError(
                "the appender's block has been left: rows that are put now would never be committed; open a new one"
            )
        if self._timer is None or self._error is not None:
            self._require_usable()

    def _take_refused(self, besides: str = "") -> InvalidInputError | None:
        """The error that tells of rows that were refused as they were committed, once; None where there are none."""
        if not self._refused:
            return None
        told = [*self._refused, "all other rows that were buffered then are stored", besides]
        self._refused = []
        return InvalidInputError("; ".join(filter(None, told)), ErrorKind.INVALID_SETTING)

    def _is_new(self, offset: Any) -> bool:
        """Whether an offset follows the last one; False: it was seen before, whether its rows are committed or not."""
        last = self._last_offset
        if last is None:
            return True
        if type(offset) is not type(last):
            raise InvalidInputError(
                f"offsets of source {self._source!r} are {'texts' if isinstance(last, str) else 'ints'}, the last one "
                f"was {last!r}; {offset!r} is none: give offsets of one type, or this source another name",
                ErrorKind.INVALID_SETTING,
            )
        if offset == last or (self._position is not None and offset <= self._position):
            return False
        if offset < last:
            if any(batch.offset == offset for batch in self._buffered):
                return False
            by_characters = ""
            if isinstance(offset, str):
                by_characters = "; texts are compared by characters: pad numbers with zeros, or give ints"
            raise InvalidInputError(
                f"offset {offset!r} of source {self._source!r} goes backwards: {last!r} was put before it; put rows in "
                f"the source's order{by_characters}",
                ErrorKind.INVALID_SETTING,
            )
        if self._gaps == "error" and isinstance(offset, int) and offset != last + 1:
            raise InvalidInputError(
                f"offset {offset} of source {self._source!r} leaves a gap behind {last}: fetch offset "
                f"{last + 1} and put it first; if the source has none of it, give gaps='allow'",
                ErrorKind.INVALID_SETTING,
            )
        return True

    async def _by_labels(self, batch: Batch, target: Target) -> Batch:
        """The rows that are appended: labels must grow; rows of labels that are there are dealt with at once."""
        labels = batch.values.get(self._dim)
        if labels is None:
            if self._key is not None:
                raise InvalidInputError(
                    f"key={self._key!r} needs a variable {self._key!r} along its own dimension, in the data and in the "
                    "group; give it, or leave key out",
                    ErrorKind.INVALID_SETTING,
                )
            return batch
        target.require_labels(labels)
        kept = await self._known_labels(target)
        last = kept.last
        late = 0 if last is None or labels[0] > last else int(np.searchsorted(labels, last, side="right"))
        if late:
            if self._key is None:
                raise InvalidInputError(
                    f"label {target.shown_label(labels[0])} of {self._dim!r} does not follow "
                    f"{target.shown_label(last)}, the last one; "
                    f"give key={self._dim!r} to write into rows that are there",
                    ErrorKind.INVALID_SETTING,
                )
            self._require_known(target, labels[:late], kept.known)
            if self._on_duplicate == "replace":
                # The offset is in the data only with all its rows.
                offset = batch.offset if late == batch.rows else None
                await self._replace(labels[:late], {name: v[:late] for name, v in batch.values.items()}, offset)
                batch.replaced += late
            batch.values = {name: values[late:] for name, values in batch.values.items()}
            batch.rows -= late
            batch.num_bytes = sum(v.nbytes for v in batch.values.values())
            labels = labels[late:]
            if len(labels) and self._on_duplicate == "replace":
                # The commit may have shown labels that another writer has stored.
                return await self._by_labels(batch, self._require_target())
        if len(labels):
            kept.append(labels)
        return batch

    def _require_known(self, target: Target, labels: Any, known: Any) -> None:
        """Refuse labels that do not follow the last one, unless they are there and may be."""
        there = np.isin(labels, known)
        if not there.all():
            last = f"does not follow {target.shown_label(known[-1])}" if len(known) else "no row is"
            raise InvalidInputError(
                f"label {target.shown_label(labels[~there][0])} of {self._dim!r} is not there and {last}: "
                "rows are put between others only by prepend",
                ErrorKind.INVALID_SETTING,
            )
        if self._on_duplicate == "error":
            raise InvalidInputError(
                f"label {target.shown_label(labels[0])} of {self._dim!r} is there already; "
                "on_duplicate may be 'skip' or 'replace'",
                ErrorKind.INVALID_SETTING,
            )

    async def _behind_others(
        self, session: Session, target: Target, batches: list[Batch]
    ) -> tuple[list[Batch], Target, list[str]]:
        """The buffered rows without those whose labels another writer has stored since, and the target as it is then:
        by ``on_duplicate`` the session has these values instead.

        Batches of which a row can neither be stored nor left out are left out whole; the last value tells of them.
        """
        known = await target.labels(session) if target.created else None
        if known is None or not len(known):
            return batches, target, []
        new: list[Batch] = []
        refused: list[str] = []
        replaced: list[tuple[int, Mapping[str, Any]]] = []
        for batch in batches:
            labels = batch.values[self._dim]
            late = int(np.searchsorted(labels, known[-1], side="right"))
            if late:
                try:
                    self._require_known(target, labels[:late], known)
                except InvalidInputError as error:
                    refused.append(
                        f"of the rows with offset {batch.offset!r}, {_counted(batch.rows, 'row')} not stored, since "
                        f"another writer was first: {error.message}"
                    )
                    continue
            if late and self._on_duplicate == "replace":
                places = np.searchsorted(known, labels[:late]).tolist()
                replaced += [(p, _row(batch.values, i)) for i, p in enumerate(places)]
            values = {name: v[late:] for name, v in batch.values.items()} if late else batch.values
            replacing = late if self._on_duplicate == "replace" else 0
            new.append(Batch(rows=batch.rows - late, values=values, offset=batch.offset, replaced=replacing))
        after = await target.replace_rows(session, replaced)
        return new, after, refused

    async def _known_labels(self, target: Target) -> _Labels:
        """Stored and buffered labels; without a key the last of them alone."""
        while self._labels is None:
            tip, stored = self._target, None
            if target.created:
                # The session of a commit that is being made may have left out rows already.
                session = await self._history.readonly_session_async(snapshot_id=target.snapshot_id)
                stored = await target.labels(session, last_only=self._key is None)
            if self._target is not tip:
                # A commit has landed meanwhile, and its rows are no longer buffered.
                target = self._require_target()
                continue
            variable = target.variables.get(self._dim)
            dtype = "i8" if variable is None else variable.dtype
            stored = np.empty(0, dtype) if stored is None else stored
            buffered = [b.values[self._dim] for b in self._buffered if self._dim in b.values]
            found = np.concatenate([stored, *buffered])
            if self._key is not None:
                found = np.unique(found)
            self._labels = _Labels(found, last_only=self._key is None)
        return self._labels

    async def _replace(self, labels: Any, values: Mapping[str, Any], offset: Any) -> None:
        """Write rows that are there anew, in a commit of their own, so that their offset counts."""
        await self.flush()
        await self._alone(self._replaced(labels, values, offset))

    async def _replaced(self, labels: Any, values: Mapping[str, Any], offset: Any) -> str | None:
        async with self._turn():
            while True:
                session = await self._begin()
                target = self._require_target()
                known = await target.labels(session)
                known = np.empty(0, labels.dtype) if known is None else known
                # Another writer, or a window of rows, may have left rows out since.
                self._require_known(target, labels, known)
                places = np.searchsorted(known, labels).tolist()
                rows = [(p, _row(values, i)) for i, p in enumerate(places)]
                after = await target.replace_rows(session, rows)
                made = await self._try_commit(session, self._record(offset, 0))
                if made is not None:
                    self._counts.rows += len(rows)
                    self._adopt(after, session, made, offset=offset, rows=0)
                    return made
                self._counts.placed_again += 1

    # -- commits ---------------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        pause_s = 0.0
        while True:
            due_s = min(self._every_s, 0.05) if self._oldest_s is None else self._until_due_s()
            await asyncio.sleep(max(due_s, pause_s))
            if self._oldest_s is not None and self._until_due_s() <= 0 and self._error is None:
                committing = self._commit_soon()
                await asyncio.wait([committing])
                has_failed = committing.cancelled() or committing.exception() is not None
                pause_s = min(max(2 * pause_s, _FIRST_RETRY_S), _LAST_RETRY_S) if has_failed else 0.0

    def _until_due_s(self) -> float:
        return max(0.0, self._every_s - (time.monotonic() - (self._oldest_s or time.monotonic())))

    def _running_commit(self) -> asyncio.Task[str | None] | None:
        """The commit that has not ended; None: there is none."""
        # A task ends before its callbacks run: waiting for one that has ended would not give them a turn.
        return None if self._committing is None or self._committing.done() else self._committing

    def _commit_soon(self) -> asyncio.Task[str | None]:
        """The running commit, or one that begins: of the rows that are buffered."""
        committing = self._running_commit()
        if committing is None:
            committing = self._committing = asyncio.create_task(self._commit())
            committing.add_done_callback(_ended)
        return committing

    async def _wait(self, task: asyncio.Task[str | None]) -> str | None:
        # A caller that is cancelled leaves; the commit goes on.
        try:
            return await asyncio.shield(task)
        except SessionStateError as error:
            self._has_raised_error |= error is self._error
            raise

    async def _alone(self, commit: Coroutine[Any, Any, str | None]) -> str | None:
        """Make a commit that is not of buffered rows; as any commit it goes on when its caller is cancelled."""
        task = asyncio.create_task(commit)
        self._alongside.add(task)
        task.add_done_callback(self._alongside.discard)
        task.add_done_callback(_ended)
        return await self._wait(task)

    async def _commit(self) -> str | None:
        """Commit the rows that are buffered now, behind all that are in the arrays."""
        batches = list(self._buffered)
        if self._ahead is not None and (writing := self._ahead.cut(self._target)):
            await asyncio.wait(writing)
        async with self._turn():
            while True:
                session = await self._begin()
                target = self._require_target()
                await self._have_rows(session, target, batches)
                new, refused, replaced = batches, list[str](), 0
                if self._overtaken and self._key is not None:
                    new, target, refused = await self._behind_others(session, target, batches)
                    replaced = sum(b.replaced for b in new) if new is not batches else 0
                offset = next((b.offset for b in reversed(new) if b.offset is not None), None)
                rows = sum(b.rows for b in new)
                if not new:
                    after, made = target, None
                    break
                after = await target.write(session, new)
                after = await self._within(session, after)
                try:
                    made = await self._try_commit(session, self._record(offset, rows))
                except SessionStateError:
                    if self._error is not None or not await self._was_collected(session, batches):
                        raise
                    continue
                if made is not None:
                    break
                self._counts.placed_again += 1
        self._overtaken = False
        for batch in batches:
            self._buffered.popleft()
            self._rows -= batch.rows
            self._bytes -= batch.num_bytes
        if len(new) < len(batches) or (self._key is not None and after.length < target.length + rows):
            # Those of refused rows are not stored, and those of rows that were left out no longer.
            self._labels = None
        self._oldest_s = time.monotonic() if self._buffered else None
        self._counts.rows += rows + replaced
        self._refused += refused
        if made is not None:
            self._adopt(after, session, made, offset=offset, rows=rows)
        if len(new) < len(batches) and not self._buffered:
            # The last rows were refused: their offset may be put again.
            self._last_offset = self._position
        return made

    async def _have_rows(self, session: Session, target: Target, batches: list[Batch]) -> None:
        """Read back the written rows that cannot be referred to where they go now."""
        written = {id(b.written): b.written for b in batches if b.written is not None}
        if not written:
            return
        log = await session._content.core.log()
        unfit = {id(one) for one in target.unfit(batches)}
        for number, one in written.items():
            is_old = one.since_us < log.state.gc_cutoff_us
            try:
                if is_old or number in unfit or (self._overtaken and self._key is not None):
                    await target.read_back(session, one)
                elif log.layout is not Layout.LOG:
                    # Collections of format 1, and those of the official library, leave no trace.
                    await one.require_stored(session)
            except StorageError as error:
                if not is_old and error.kind != ErrorKind.OBJECT_NOT_FOUND:
                    raise
                self._error = SessionStateError(
                    f"the appender of source {self._source!r} has ended: a collection has deleted rows that it had "
                    f"written and not committed; {_counted(self._rows, 'buffered row')} not committed. Open a new "
                    "appender and continue after its position; collections should spare what is younger than the time "
                    "between commits"
                )
                raise self._error from error

    async def _was_collected(self, session: Session, batches: list[Batch]) -> bool:
        """Whether rows are written that a collection may have deleted since this commit began."""
        collected_us = (await session._content.core.log()).state.gc_cutoff_us
        return any(b.written is not None and b.written.since_us < collected_us for b in batches)

    async def _within(self, session: Session, target: Target) -> Target:
        """Leave out the oldest rows, chunk by chunk, where only so many are kept."""
        if self._keep is None or target.length <= self._keep:
            return target
        drop = (target.length - self._keep) // target.chunk_rows * target.chunk_rows
        if not drop:
            return target
        return await target.drop_first(session, drop)

    def _record(self, offset: Any, rows: int) -> Sources:
        newest = self._last_committed() if offset is None else offset
        return recorded(self._sources, self._source, offset=newest, owner=self._owner, rows=rows)

    def _last_committed(self) -> Any:
        record = self._sources.get(self._source)
        return self._begin_at if record is None else record["offset"]

    async def _try_commit(self, session: Session, sources: Sources) -> str | None:
        """Commit, rebasing over others while that works; None where the rows must be placed again."""
        while True:
            try:
                # Rows may all have been skipped: the offset counts all the same.
                metadata = as_metadata(sources) if sources else {}
                return await session.commit_async(self._message, metadata, allow_empty=True)
            except CommitOutcomeUnknown as unknown:
                if await self._settled(unknown.token):
                    return self._made(unknown)
                return None
            except ConflictError:
                pass
            try:
                await session.rebase_async(ConflictDetector())
            except ConflictError:
                # Others changed the same arrays, or the branch was reset.
                session.discard_changes()
                return None
            self._counts.rebased += 1
            if await self._has_other_arrays(session):
                session.discard_changes()
                return None
            mine = sources.get(self._source)
            self._sources = await self._newest_sources(session)
            self._require_owner()
            sources = self._sources if mine is None else with_record(self._sources, self._source, mine)

    async def _has_other_arrays(self, session: Session) -> bool:
        """Whether another writer has made or removed arrays along the dimension, or changed one."""
        try:
            found = await Target.open(session, self._group, self._dim)
        except InvalidInputError:
            return True
        target = self._require_target()
        return (target.unlike(found) or await self._unlike_fixed(target, found, session)) is not None

    async def _unlike_fixed(self, target: Target, found: Target, session: Session) -> str | None:
        """A difference of the arrays that do not grow, where buffered rows would have created them."""
        return await target.unlike_fixed(found, session) if not target.created and self._buffered else None

    async def _settled(self, token: Any) -> bool:
        for pause_s in _SETTLE_PAUSES_S:
            try:
                return await self._history.settle_async(token)
            except StorageError:
                await asyncio.sleep(pause_s)
        return await self._history.settle_async(token)

    def _made(self, unknown: CommitOutcomeUnknown) -> str:
        return encode_id(unknown.token.snapshots[-1])

    # -- knowledge of the branch -----------------------------------------------------------------------------------

    def _turn(self) -> asyncio.Lock:
        """Appenders of this process to one branch of one repository take turns."""
        turns = _turns.setdefault(asyncio.get_running_loop(), {})
        return turns.setdefault(f"{self._place}#{self._branch}", asyncio.Lock())

    def _require_session(self) -> Session:
        assert self._session is not None
        return self._session

    def _require_target(self) -> Target:
        assert self._target is not None
        return self._target

    async def _begin(self) -> Session:
        """A session at the branch's tip, whose arrays and sources are known then.

        Right after an own commit that is likely still the tip: the store is not asked. If it is not, the commit fails.
        """
        expected_s, self._tip_expected_s = self._tip_expected_s, -math.inf
        if time.monotonic() - expected_s < _TIP_STAYS_S:
            session = await self._known_session()
        else:
            session = await self._history.writable_session_async(self._branch)
        await self._learn(session)
        return session

    async def _newest_sources(self, session: Session) -> Sources:
        ancestry = self._history.async_ancestry(snapshot_id=session.snapshot_id)
        return await newest_sources(ancestry, self._history.ops_log_async)

    async def _learn(self, session: Session) -> None:
        """Know the arrays and the sources as of a session's snapshot."""
        self._session = session
        target = self._target
        if target is not None and target.snapshot_id == session.snapshot_id:
            return
        self._sources = await self._newest_sources(session)
        if target is None:
            self._target = await Target.open(session, self._group, self._dim)
            return
        self._require_owner()
        # The other commit may have written the values again that are kept in memory.
        found = await Target.open(session, self._group, self._dim)
        reason: str | None = None
        if found.created or target.created:
            reason = target.unlike(found) or await self._unlike_fixed(target, found, session)
        elif target.growing and self._buffered:
            try:
                self._target = await target.planned_beside(found, session)
                return
            except InvalidInputError as error:
                reason = error.message
        else:
            # A first dataset that is being checked now is checked again, beside what is there now.
            self._schema += 1
        if reason is not None:
            self._schema += 1
        if reason is not None and self._buffered:
            self._error = SessionStateError(
                f"the appender of source {self._source!r} has ended: another writer has changed the arrays, {reason}; "
                f"{_counted(self._rows, 'buffered row')} not committed, since checked against others. Open a new "
                "appender and continue after its position"
            )
            raise self._error
        self._target, self._labels, self._overtaken = found, None, True

    def _require_owner(self) -> None:
        record = self._sources.get(self._source)
        if _facts(record) == self._seen:
            return
        if record is None or (self._seen is not None and record["owner"] == self._seen[0]):
            reason = f"branch {self._branch!r} no longer has its commits: it was reset, or they have expired"
        else:
            reason = f"the branch was reset, or another consumer committed; its position is {record['offset']!r} now"
        self._error = SessionStateError(
            f"the appender of source {self._source!r} has ended: {reason}; "
            f"{_counted(self._rows, 'buffered row')} not committed. Open a new appender and continue after its position"
        )
        raise self._error

    def _adopt(
        self,
        target: Target,
        session: Session,
        made: str,
        *,
        offset: Any = None,
        rows: int | None = None,
    ) -> None:
        """Go on from a commit that was made; ``rows`` is None where it recorded nothing of this source."""
        target.snapshot_id = made
        self._target, self._session = target, session
        self._counts.commits += 1
        if self._ahead is not None:
            self._ahead.resume()
        self._tip_expected_s = time.monotonic()
        if rows is not None:
            # From the sources as they are now: a rebase has read others' newer records.
            self._sources = self._record(offset, rows)
            self._seen = _facts(self._sources[self._source])
            if offset is not None:
                self._position = offset


def _require_positive(name: str, value: Any, types: Any) -> None:
    if not isinstance(value, types) or isinstance(value, bool) or not value > 0:
        kind = "an int" if types is int else "a number (of seconds)"
        raise InvalidInputError(f"{name} must be {kind} of more than 0, not {value!r}", ErrorKind.INVALID_SETTING)


def _counted(number: int, what: str) -> str:
    """A number of things with its verb: "1 row is", "2 rows are"."""
    return f"{number} {what} is" if number == 1 else f"{number} {what}s are"


def _row(values: Mapping[str, Any], number: int) -> dict[str, Any]:
    """One of the rows, by array."""
    return {name: rows[number : number + 1] for name, rows in values.items()}


def _ended(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # raised to the callers that wait; if there are none, by the next call


def _facts(record: Mapping[str, Any] | None) -> tuple[Any, ...] | None:
    """The parts of a source's record in which it differs from an older one, and from that of another consumer."""
    return None if record is None else (str(record["owner"]), record["offset"], int(record.get("rows") or 0))
