"""Transaction logs in several objects say together what one would say."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.transaction import in_parts
from icechunk.format.values import TransactionLog

SIZES = st.lists(st.integers(0, 20), max_size=5)


@settings(max_examples=60)
@given(SIZES, st.integers(1, 10))
def test_every_chunk_is_in_one_part_and_everything_else_in_the_last(sizes: list[int], most: int) -> None:
    ids = (ObjectId(bytes([i]) * 12) for i in itertools.count(1))
    nodes = [NodeId(bytes([i]) * 8) for i in range(len(sizes))]
    log = TransactionLog(
        id=ObjectId(bytes(12)),
        new_arrays=frozenset(nodes[:1]),
        updated_chunks={n: np.arange(2 * k, dtype=np.uint32).reshape(k, 2) for n, k in zip(nodes, sizes, strict=True)},
    )
    own, others = in_parts(log, lambda: next(ids), most)
    parts = [*others, own]
    assert own.id == log.id
    assert own.new_arrays == log.new_arrays
    assert not any(other.new_arrays for other in others)
    assert len({part.id for part in parts}) == len(parts)
    assert len(parts) == max(1, -(-sum(sizes) // most))
    assert all(sum(map(len, part.updated_chunks.values())) <= most for part in parts)
    for node, size in zip(nodes, sizes, strict=True):
        rows = [part.updated_chunks[node] for part in parts if node in part.updated_chunks]
        assert np.array_equal(np.concatenate(rows) if rows else np.empty((0, 2)), log.updated_chunks[node])
        assert size == sum(map(len, rows))
