"""The port through which objects outside the repository are read."""

from __future__ import annotations

from typing import Protocol

from icechunk.storage.port import GetResult, Range

__all__ = ["Reader"]


class Reader(Protocol):
    """Reads ranges of the objects of one container, on one event loop."""

    async def get(self, location: str, wanted: Range) -> GetResult:
        """Bytes of a range, clamped to the object's size, with version and time of the object they were read from.

        Parameters
        ----------
        location
            Resolved, within the container's prefix.

        Raises
        ------
        ObjectNotFoundError
            If there is no object at the location.
        IcechunkError
            Anything else that went wrong, after the tries that the settings allow.
        """
        ...

    async def aclose(self) -> None:
        """Close what is open."""
        ...
