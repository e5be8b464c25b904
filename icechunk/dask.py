"""Storing dask arrays from any scheduler: every task writes to a fork, and the forks are merged in a tree.

``store_dask`` writes to a fork as ``dask.array.store`` writes to any target, and returns a session that holds the
changes of all workers; merge that into the writable session, and commit.

Worked example::

    fork = session.fork()
    target = zarr.open_array(fork.store, path="temperature")
    session.merge(store_dask(sources=[temperature], targets=[target]))
    session.commit("computed by many")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeAlias, TypeVar

import dask
import dask.array
import numpy as np
from dask.array import Array

from icechunk.distributed import extract_session, merge_sessions
from icechunk.errors import ErrorKind, InvalidInputError, SessionStateError
from icechunk.runtime.checks import WrongTypeError
from icechunk.session import ForkSession

if TYPE_CHECKING:
    import zarr
    from zarr.core.metadata import ArrayV3Metadata

__all__ = ["computing_meta", "merge_sessions_array_kwargs", "session_merge_reduction", "store_dask"]

P = ParamSpec("P")
R = TypeVar("R")

SimpleGraph: TypeAlias = Mapping[tuple[str, int], tuple[Any, ...]]
"""The graph type of older dask versions: tasks by key."""

_dask: Any = dask
"""Dask is only partly typed, and to a different extent in each version, hence Any."""
_SPLIT_EVERY = 8
"""Number of sessions that one task merges by default."""
_OLDEST_DASK: Final = (2025, 2, 0)
"""First version whose ``dask.array.store`` returns stored arrays without loading them."""


def computing_meta(func: Callable[P, R]) -> Callable[P, Any]:
    """Wrap a function for use in reductions: when dask only infers the type of its result, it returns an array of one
    object."""

    @wraps(func)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Any:
        if kwargs.pop("computing_meta", False):
            return np.array([object()], dtype=object)
        return func(*args, **kwargs)

    return wrapper


def merge_sessions_array_kwargs(*sessions: Any, axis: Any = None, keepdims: Any = None) -> ForkSession:
    """`merge_sessions` for reductions of array libraries, which pass ``axis`` and ``keepdims``."""
    return merge_sessions(*sessions)


def _assert_correct_dask_version() -> None:
    """Raise `ValueError` if dask is older than the oldest version that `store_dask` supports."""
    numbers = tuple(int(part) for part in _dask.__version__.split(".")[:3] if part.isdigit())
    if numbers < _OLDEST_DASK:
        wanted = ".".join(map(str, _OLDEST_DASK))
        raise InvalidInputError(
            f"writing dask arrays needs dask>={wanted}, and this is {_dask.__version__}: install a newer one",
            ErrorKind.INVALID_SETTING,
        )


def _reduction_for(arr: Any) -> Any:
    """The function that reduces arrays of this kind. Raises `TypeError` if ``arr`` is not a dask array."""
    if not isinstance(arr, Array):
        raise WrongTypeError(f"Expected a dask array, not {type(arr).__name__}", ErrorKind.INVALID_SETTING)
    return _dask.array.reduction


def store_dask(
    *,
    sources: list[Array],
    targets: list[zarr.Array[ArrayV3Metadata]],
    regions: list[tuple[slice, ...]] | None = None,
    split_every: int | None = None,
    through_storage: bool = False,
    **store_kwargs: Any,
) -> ForkSession:
    """Write dask arrays to zarr arrays of a fork, immediately, on the default scheduler.

    Parameters
    ----------
    sources
        Arrays to write.
    targets
        As many zarr arrays, of one `ForkSession` (see `Session.fork`). No zarr chunk may be written by two tasks: align
        the dask chunks to the zarr chunks.
    regions
        Region of its target that each source is written to; None: the whole target.
    split_every
        Number of sessions that one task merges.
    through_storage
        For targets of a fork that has joined a session by its id (`Repository.join_session`): every task hands its
        changes over through the repository, and nothing is sent back to this process. The session takes them with
        `Session.collect_forks`, also in another process if this one dies.
    store_kwargs
        For ``dask.array.store``; ``scheduler`` is for ``dask.compute``.

    Returns
    -------
    ForkSession
        A session with all changes; merge it into the session that was forked. With ``through_storage`` the fork of the
        targets, without those of tasks in other processes: there is nothing to merge.

    Raises
    ------
    InvalidInputError
        If there are no sources.
    SessionStateError
        With ``through_storage``, if the fork has not joined a session (kind ``not-allowed``).
    """
    _assert_correct_dask_version()
    if not sources:
        raise InvalidInputError("store_dask needs at least one source", ErrorKind.INVALID_SETTING)
    if through_storage:
        for target in targets:
            if extract_session(target).id is None:
                raise SessionStateError(
                    "cannot hand over through storage: the targets' fork has not joined a session by its id; "
                    "Repository.join_session makes one that has",
                    ErrorKind.NOT_ALLOWED,
                )
    compute_kwargs = {name: store_kwargs.pop(name) for name in ("scheduler",) if name in store_kwargs}
    for name in ("compute", "return_stored", "load_stored"):
        store_kwargs.pop(name, None)
    stored = _dask.array.store(
        sources=sources,
        targets=targets,
        regions=regions,
        compute=False,
        return_stored=True,
        load_stored=False,
        **{"lock": False, **store_kwargs},
    )
    arrays: list[Any] = [stored] if isinstance(stored, Array) else list(stored)
    if through_storage:
        hand_over = _dask.delayed(_hand_over)
        _dask.compute(*(hand_over(block) for array in arrays for block in array.to_delayed().ravel()), **compute_kwargs)
        return extract_session(targets[0])  # type: ignore[return-value]
    return session_merge_reduction(arrays, split_every=split_every, **compute_kwargs)


def _hand_over(array: zarr.Array[ArrayV3Metadata]) -> None:
    """Persist the changes of a task, for the session that its fork has joined."""
    extract_session(array).checkpoint()


def session_merge_reduction(
    arrays: Array | list[Array], *, split_every: int | None, **store_kwargs: Any
) -> ForkSession:
    """Compute arrays whose blocks are written zarr arrays, and merge the sessions of these in a tree.

    Parameters
    ----------
    arrays
        What ``dask.array.store(…, return_stored=True, load_stored=False)`` returns.
    split_every
        Number of sessions that one task merges, at least 2; None: 8.
    store_kwargs
        For ``dask.compute``.

    Raises
    ------
    TypeError
        One of them is not a dask array.
    """
    width = _SPLIT_EVERY if split_every is None else split_every
    if width < 2:
        raise InvalidInputError(f"split_every must be at least 2, not {split_every}", ErrorKind.INVALID_SETTING)
    extract, merge = _dask.delayed(extract_session), _dask.delayed(merge_sessions)
    listed: list[Any] = arrays if isinstance(arrays, list) else [arrays]
    for array in listed:
        _reduction_for(array)
    level = [extract(block) for array in listed for block in array.to_delayed().ravel()]
    while len(level) > 1:
        level = [merge(group) if len(group) > 1 else group[0] for group in _groups(level, width)]
    (result,) = _dask.compute(level[0], **store_kwargs)
    return result  # type: ignore[no-any-return]


def _groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    waiting = iter(items)
    while group := list(islice(waiting, size)):
        yield group
