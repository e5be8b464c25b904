"""The way tests expect an error of this package: by class, kind and the names in its text, not by its words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from icechunk.errors import IcechunkError

E = TypeVar("E", bound=IcechunkError)


@contextmanager
def raises(error: type[E], kind: str, *names: object) -> Iterator[pytest.ExceptionInfo[E]]:
    """The block raises an error of this class and kind, whose text has each of these names.

    A name is what the error is about: a path, a key, an id, a setting, a number. The words around it are free.
    """
    with pytest.raises(error) as caught:
        yield caught
    assert caught.value.kind == kind, caught.value
    for name in names:
        assert str(name) in str(caught.value)
