"""Sessions of many workers: extraction from a written array, and merging into one session.

A scheduler calls these two functions: ``extract_session`` after a task has written, and ``merge_sessions`` to reduce
the results of the tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from icechunk.errors import ErrorKind
from icechunk.log.session.merge.merging import MergePolicy
from icechunk.runtime.checks import WrongTypeError
from icechunk.session import ForkSession, Session
from icechunk.store import IcechunkStore

if TYPE_CHECKING:
    import zarr
    from zarr.core.metadata import ArrayV3Metadata

__all__ = ["extract_session", "merge_sessions"]


def extract_session(zarray: zarr.Array[ArrayV3Metadata], axis: Any = None, keepdims: Any = None) -> Session:
    """The session that an array writes to.

    Parameters
    ----------
    zarray
        A zarr array on an `IcechunkStore`.
    axis, keepdims
        Not used; reductions of array libraries pass them.

    Raises
    ------
    WrongTypeError
        The array is on another store.
    """
    store = getattr(zarray, "store", None)
    if not isinstance(store, IcechunkStore):
        raise WrongTypeError(
            f"no session can be extracted: an array on an IcechunkStore is needed, not {type(zarray).__name__} on "
            f"{type(store).__name__}",
            ErrorKind.INVALID_SETTING,
        )
    session: Session = store.session
    return session


def merge_sessions(
    *sessions: ForkSession | list[ForkSession] | list[list[ForkSession]], on_conflict: MergePolicy = "error"
) -> ForkSession:
    """Merge forks into the first of them, which is returned; see `Session.merge`.

    Parameters
    ----------
    sessions
        Forks, or lists of them, nested however deep.
    on_conflict
        As in `Session.merge`: ``"ours"`` keeps the change that is given first, ``"theirs"`` the one that is given last.

    Raises
    ------
    ValueError
        There is none.
    TypeError
        One of them is no fork. To merge forks into the session that they come from, call its `Session.merge`.
    MergeFailedError
        There are conflicts, which number the forks from the second on (kind ``merge-failed``).
    """
    forks: list[ForkSession] = list(_flatten(sessions))
    if not forks:
        raise ValueError("merge_sessions needs at least one session")
    for fork in forks:
        if not isinstance(fork, ForkSession):
            raise WrongTypeError(
                f"merge_sessions only accepts ForkSession objects. Received {type(fork).__name__!r}; to merge forks "
                "into the session that they come from, call session.merge(*forks)",
                ErrorKind.INVALID_SETTING,
            )
    first, *others = forks
    # Tasks of one process may have written through one and the same fork.
    distinct = {id(other): other for other in others if other is not first}
    if distinct:
        first.merge(*distinct.values(), on_conflict=on_conflict)
    return first


def _flatten(seq: Iterable[Any], container: type[Any] = list) -> Iterator[Any]:
    for item in seq:
        if isinstance(item, container | tuple):
            yield from _flatten(item, container)
        else:
            yield item
