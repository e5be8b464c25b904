"""Memory that is used again, but never while a reference to it is left."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.storage.buffers import Buffers

SIZE = 1_000_000


def address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def test_unreferenced_memory_is_used_again() -> None:
    buffers = Buffers()
    first = buffers.take(SIZE)
    place = address(first)
    del first
    assert address(buffers.take(SIZE)) == place
    assert address(buffers.take(SIZE - 1)) == place


@pytest.mark.parametrize("size", [1, SIZE, 20 * SIZE])
def test_memory_begins_at_a_page(size: int) -> None:
    buffers = Buffers()
    kept = [buffers.take(size) for _ in range(3)]
    assert [address(view) % 4096 for view in kept] == [0, 0, 0]
    assert all(view.nbytes == size for view in kept)


@pytest.mark.thorough
def test_views_slices_and_arrays_each_hold_their_memory() -> None:
    buffers = Buffers()
    keepers: list[Any] = []
    for keep in (
        lambda view: view[10:20],
        lambda view: view.toreadonly(),
        lambda view: np.frombuffer(view, np.uint8),
        lambda view: np.frombuffer(view.toreadonly(), np.uint8)[5:].view(np.int8).reshape(-1, 1),
        lambda view: np.frombuffer(view, np.uint8)[3:9].data,
    ):
        view = buffers.take(SIZE)
        view[:] = b"\x07" * SIZE
        keepers.append(keep(view))
        del view
        gc.collect()
        buffers.take(SIZE)[:] = b"\x01" * SIZE
    assert all(set(bytes(keeper)) == {7} for keeper in keepers)


def test_a_small_request_does_not_get_a_large_buffer_and_huge_ones_are_not_kept() -> None:
    buffers = Buffers()
    buffers.take(8 * SIZE)
    buffers.take(100 * SIZE)
    buffers.take(SIZE)
    assert [memory.nbytes >= 8 * SIZE for memory in buffers._idle] in ([True, False], [False, True])
    for _ in range(3):
        held = [buffers.take(SIZE) for _ in range(40)]
        assert len({address(view) for view in held}) == 40
        del held
    assert len(buffers._idle) <= 12


@settings(max_examples=50)
@given(steps=st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1, 1000, 300_000, 2_000_000])), max_size=30))
def test_memory_in_use_is_never_written_to_by_others(steps: list[tuple[int, int]]) -> None:
    buffers = Buffers()
    held: dict[int, tuple[memoryview, int]] = {}
    for number, (slot, size) in enumerate(steps):
        held.pop(slot, None)
        view = buffers.take(size)
        assert len(view) == size
        view[0] = view[-1] = number
        held[slot] = (view.toreadonly(), number)
        assert all(kept[0] == kept[-1] == marked for kept, marked in held.values())


def test_threads_share_buffers_and_never_the_same() -> None:
    buffers = Buffers()
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            view = buffers.take(SIZE)
            view[:8] = bytes([number]) * 8
            if bytes(view[:8]) != bytes([number]) * 8:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
