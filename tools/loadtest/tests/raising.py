"""The way these tests expect an error: by class and the names in its text, not by its words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def raises(error: type[Exception], *names: object) -> Iterator[None]:
    """The block raises an error of this class, whose text has each of these names: options, values, paths, numbers."""
    with pytest.raises(error) as caught:
        yield
    for name in names:
        assert str(name) in str(caught.value)
