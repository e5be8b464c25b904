"""Values of metadata as FlexBuffers."""

from __future__ import annotations

from typing import Any

import pytest

from icechunk.errors import InvalidInputError
from icechunk.format.flat import flexbuffers
from icechunk.format.metadata import flexible


def test_a_value_is_refused_whatever_was_encoded_before() -> None:
    assert flexible(b"x") == flexbuffers.dumps(b"x")
    refused: Any
    for refused in (bytearray(b"x"), memoryview(b"x"), {"a": bytearray(b"x")}):
        with pytest.raises(InvalidInputError):
            flexible(refused)
