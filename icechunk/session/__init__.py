"""Sessions: one consistent view of a repository; writable ones collect changes until their commit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from icechunk.session.arranging import Arranging
from icechunk.session.ending import Ending
from icechunk.session.sharing import Sharing
from icechunk.status import SessionMode

if TYPE_CHECKING:
    from icechunk._icechunk_python.session import PySession
    from icechunk.store import IcechunkStore

__all__ = ["ForkSession", "Session", "SessionMode"]


class Session(Arranging, Ending, Sharing):
    """One consistent view of a repository; writable ones collect changes until `commit`.

    Made by `Repository.readonly_session` and `Repository.writable_session`. Safe to use from several loops and
    threads. A read-only session pickles; a writable one refuses.
    """

    @property
    def store(self) -> IcechunkStore:
        """The Zarr store of this session: hand it to zarr or xarray."""
        from icechunk.store import IcechunkStore

        return IcechunkStore(self)

    @property
    def _session(self) -> PySession:
        """This session in the shape of the official library's compiled class."""
        from icechunk._icechunk_python.session import PySession

        return PySession(self)


def __getattr__(name: str) -> object:
    # The official library has forks in this module; ours stand on top of it.
    if name == "ForkSession":
        from icechunk.forking import ForkSession

        return ForkSession
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
