"""Icechunk for asyncio: a transactional storage engine for Zarr on object storage.

>>> import icechunk, zarr
>>> repo = icechunk.Repository.create(icechunk.in_memory_storage())
>>> session = repo.writable_session("main")
>>> array = zarr.create_array(session.store, name="temperature", shape=(4,), chunks=(2,), dtype="f4")
>>> array[:] = 20.5
>>> snapshot_id = session.commit("first measurements")
>>> float(zarr.open_array(repo.readonly_session("main").store, path="temperature")[0])
20.5

Importing the package is quick: the engine and numpy load when the first public name is used, zarr when a session makes
its store.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from icechunk.runtime import pickles as _pickles  # noqa: F401  pickles of other versions end in an error that says so
from icechunk.runtime.about import API_VERSION as _API_VERSION
from icechunk.runtime.logging import initialize_on_import as _initialize_logs_on_import

if TYPE_CHECKING:
    from icechunk._public import *  # noqa: F403

__api_version__ = _API_VERSION
"""The version of the official library whose names and semantics this package offers."""
__version__ = _API_VERSION
"""The same: other packages compare it with versions of the official library.

The version of this distribution is ``importlib.metadata.version("aioicechunk")``.
"""


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Load all public names when one is first asked for; modules of the package are attributes from then on too."""
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        public = importlib.import_module("icechunk._public")
        loaded = vars(public)
        names = {known: loaded[known] for known in (*public.__all__, "_InvalidatedRepository") if known in loaded}
        globals().update(names, __all__=[*public.__all__, "__api_version__", "__version__"])
        if name in public.__all__ and name not in globals():
            globals()[name] = getattr(public, name)
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})


_initialize_logs_on_import()
