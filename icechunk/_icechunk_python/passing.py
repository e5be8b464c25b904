"""Members that an adapter has because what it wraps has them."""

from __future__ import annotations

from typing import Any

__all__ = ["Passed"]


class Passed:
    """A member of an adapter that is the wrapped object's own, of the same name.

    Parameters
    ----------
    source
        The wrapped class: what the adapter's class shows of the member, signature included.
    through
        The adapter's attribute that holds the wrapped object.
    """

    def __init__(self, source: type, through: str) -> None:
        self._source = source
        self._through = through
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        return getattr(self._source if instance is None else getattr(instance, self._through), self._name)
