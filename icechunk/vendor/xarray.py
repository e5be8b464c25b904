"""How xarray's modes of writing follow from one another."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Literal, TypeAlias

from icechunk.errors import ErrorKind, InvalidInputError

__all__ = ["ZarrWriteModes"]

ZarrWriteModes: TypeAlias = Literal["w", "w-", "a", "a-", "r+", "r"]

_WRITING = ("w", "w-", "a", "a-", "r+")


def _choose_default_mode(
    *,
    mode: ZarrWriteModes | None,
    append_dim: Hashable | None,
    region: Mapping[str, slice | Literal["auto"]] | Literal["auto"] | None,
) -> ZarrWriteModes:
    """The mode that a write has where none is given; raises `ValueError` for one that does not fit."""
    if mode is None:
        return "a" if append_dim is not None else "w-" if region is None else "r+"
    if append_dim is not None and mode not in ("a", "a-"):
        raise _refused(f"append_dim goes with mode 'a', 'a-' or None, not with mode={mode!r}")
    if region is not None and mode not in ("a", "a-", "r+"):
        raise _refused(f"region goes with mode 'a', 'a-', 'r+' or None, not with mode={mode!r}")
    if mode not in _WRITING:
        raise _refused(f"mode must be one of {', '.join(map(repr, _WRITING))}, not {mode!r}")
    return mode


def _refused(reason: str) -> InvalidInputError:
    return InvalidInputError(reason, ErrorKind.INVALID_SETTING)
