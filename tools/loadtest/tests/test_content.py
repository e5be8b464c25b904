"""A chunk that differs from the written one in any byte is refused."""

from __future__ import annotations

import numpy as np
import pytest

from icechunk_loadtest.worker.content import Content, Corrupt
from tools.loadtest.tests.raising import raises


def test_every_chunk_and_version_has_bytes_of_its_own_that_check() -> None:
    content = Content(256)
    seen = set()
    for index in range(20):
        for version in range(3):
            data = content.chunk(index, version)
            assert content.check(index, data) == version
            seen.add(data.tobytes())
    assert len(seen) == 60


def test_chunks_in_a_row_are_the_chunks_one_by_one() -> None:
    content = Content(64)
    row = content.chunks(5, 3)
    assert row.tobytes() == b"".join(content.chunk(index).tobytes() for index in (5, 6, 7))
    content.check_all(row, first=5)


@pytest.mark.parametrize("at", [0, 8, 16, 255])
def test_one_wrong_byte_is_noticed(at: int) -> None:
    content = Content(256)
    data = content.chunk(3, 1)
    data[at] ^= 1
    with pytest.raises(Corrupt):
        content.check(3, data)


def test_a_wrong_chunk_a_short_one_and_an_old_version_are_noticed() -> None:
    content = Content(256)
    with raises(Corrupt, 3, 4):
        content.check(3, content.chunk(4))
    with raises(Corrupt, 3, 255, 256):
        content.check(3, content.chunk(3)[:-1])
    with raises(Corrupt, 3, 1, 2):
        content.check(3, content.chunk(3, 1), at_least=2)
    with raises(Corrupt, 300, 256):
        content.check_all(np.zeros(300, dtype="u1"))
    with pytest.raises(Corrupt):
        content.check_all(np.zeros(512, dtype="u1"))
