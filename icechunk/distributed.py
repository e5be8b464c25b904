"""Sessions of many workers: from the array that one wrote to, and merged into one.

These are the two functions to give to a scheduler: ``extract_session`` after a task has written, ``merge_sessions`` to
reduce what the tasks return.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

from icechunk.errors import ErrorKind
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
        Not used: what reductions of array libraries pass.

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


def merge_sessions(*sessions: ForkSession | list[ForkSession] | list[list[ForkSession]]) -> ForkSession:
    """Merge forks into the first of them, which is returned; see `Session.merge`.

    Parameters
    ----------
    sessions
        Forks, or lists of them, nested however deep.

    Raises
    ------
    ValueError
        There is none.
    SessionStateError
        They do not go together (kind ``merge-failed``).
    """
    forks = list(_flatten(sessions))
    if not forks:
        raise ValueError("merge_sessions needs at least one session")
    for fork in forks:
        if not isinstance(fork, Session):
            raise WrongTypeError(f"only sessions can be merged, not {type(fork).__name__}", ErrorKind.INVALID_SETTING)
    first, *others = forks
    # Tasks of one process may have written through one and the same fork.
    distinct = {id(other): other for other in others if other is not first}
    if distinct:
        first.merge(*distinct.values())
    return cast(ForkSession, first)


def _flatten(seq: Iterable[Any], container: type[Any] = list) -> Iterator[Any]:
    for item in seq:
        if isinstance(item, container | tuple):
            yield from _flatten(item, container)
        else:
            yield item
