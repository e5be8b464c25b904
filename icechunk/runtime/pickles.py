"""Pickles that say which version made them, before anything in them is looked for.

Repositories, sessions, stores and storages pickle through `restore`, under the name of this module, which stays. So a
pickle of another MAJOR.MINOR version ends in an error that names both, wherever modules have moved meanwhile. Pickles
that are older than that name modules that are gone, and end in an error that says so.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from icechunk.errors import ErrorKind, FormatError
from icechunk.runtime.about import DISTRIBUTION, VERSION

__all__ = ["call_of", "instance_of_state", "refuse_old", "require_version", "restore"]

_GONE: Final = {"icechunk.core", "icechunk.forking", "icechunk.format.tables", "icechunk.refs.base", "icechunk.status"}
"""Modules that pickles without a version begin with."""


class MissingModuleError(FormatError, ModuleNotFoundError):
    """A module that only an old pickle asks for; also a `ModuleNotFoundError`, for code that imports it directly."""


class _MadeBy:
    """Our version, as the first part of a pickle: it is read before the parts that another version may not have."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return require_version, (VERSION,)


def call_of(make: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    """The result of ``__reduce__`` for an object that a call of ``make``, a class or module function, makes again."""
    return restore, (_MadeBy(), _place(make), *arguments)


def instance_of_state(value: Any, state: Any) -> tuple[Any, ...]:
    """The result of ``__reduce__`` for an object that ``__setstate__(state)`` makes of an empty one."""
    return restore, (_MadeBy(), _place(type(value))), state


def require_version(version: str) -> None:
    """Refuse a pickle that another MAJOR.MINOR version made. Raises `FormatError` of kind ``pickle``."""
    if version.split(".")[:2] != VERSION.split(".")[:2]:
        raise FormatError(_refusal(f"{DISTRIBUTION} {version}"), ErrorKind.PICKLE)


def restore(made_by: None, place: str, *arguments: Any) -> Any:
    """Make an object again: by a call of the function that ``place`` names, or as an empty object of that class."""
    module, _, name = place.partition(":")
    made: Any = importlib.import_module(module)
    for part in name.split("."):
        made = getattr(made, part)
    return object.__new__(made) if isinstance(made, type) and not arguments else made(*arguments)


def refuse_old(module: str, name: str) -> NoReturn:
    """Refuse a name of a module that only a pickle without a version asks for; else `AttributeError`."""
    if name in ("_unpickled", "LocalStorage"):
        raise FormatError(_refusal("an older version"), ErrorKind.PICKLE)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def _place(named: Any) -> str:
    return f"{named.__module__}:{named.__qualname__}"


def _refusal(made_by: str) -> str:
    return (
        f"cannot load the pickle: {made_by} made it, and this is {VERSION}; pickles pass between "
        "processes of one version only: make it anew, or open the repository and the snapshot by its id"
    )


class _OldModules:
    """Asked last for modules that nothing else finds."""

    @staticmethod
    def find_spec(fullname: str, path: Sequence[str] | None = None, target: object = None) -> None:
        if fullname in _GONE:
            raise MissingModuleError(f"no module {fullname}; {_refusal('an older version')}", ErrorKind.PICKLE)


sys.meta_path.append(_OldModules)
