"""Byte ranges of one value that are read together: those near each other by one request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from zarr.abc.store import ByteRequest, RangeByteRequest

__all__ = ["Joined", "join_ranges"]


class Joined(NamedTuple):
    """A request that serves one or more of those asked for."""

    request: ByteRequest | None
    parts: list[tuple[int, slice]]
    """Place of each among those asked for, and its bytes within the answer."""


def join_ranges(wanted: Sequence[ByteRequest | None], *, max_gap_bytes: int, max_joined_bytes: int) -> list[Joined]:
    """The requests by which all are served.

    Parameters
    ----------
    wanted
        Only those with a start and an end are joined.
    max_gap_bytes
        Two with at most so many bytes between them are joined.
    max_joined_bytes
        Unless the request would become longer than this.

    Returns
    -------
    list of Joined
        Those that are not joined first, then the others in ascending order.

    Examples
    --------
    >>> near = [RangeByteRequest(50, 60), RangeByteRequest(0, 10), RangeByteRequest(12, 20)]
    >>> for request, parts in join_ranges(near, max_gap_bytes=5, max_joined_bytes=1000):
    ...     print(request, parts)
    RangeByteRequest(start=0, end=20) [(1, slice(0, 10, None)), (2, slice(12, 20, None))]
    RangeByteRequest(start=50, end=60) [(0, slice(0, 10, None))]
    """
    joined = [Joined(each, [(i, slice(None))]) for i, each in enumerate(wanted) if type(each) is not RangeByteRequest]
    bounded = sorted((each.start, each.end, i) for i, each in enumerate(wanted) if type(each) is RangeByteRequest)
    first = last = 0
    members: list[tuple[int, slice]] = []
    for start, end, i in bounded:
        if members and (start - last > max_gap_bytes or max(last, end) - first > max_joined_bytes):
            joined.append(Joined(RangeByteRequest(first, last), members))
            members = []
        if not members:
            first = last = start
        last = max(last, end)
        members.append((i, slice(start - first, max(start, end) - first)))
    if members:
        joined.append(Joined(RangeByteRequest(first, last), members))
    return joined
