from __future__ import annotations

from unittest import mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from icechunk.format import node_tables
from icechunk.format.by_node import ByNode, Coords, Part, coords_by_node, coords_part
from icechunk.format.flat.flatbuffers import Buffer, FlatTable, FlatWriter, Written
from icechunk.format.flat.vectors import Positions
from icechunk.format.ids import NodeId
from icechunk.format.node_tables import write_node_tables

ARRAYS = st.dictionaries(
    st.binary(min_size=8, max_size=8).map(NodeId),
    st.integers(1, 3).flatmap(
        lambda ndim: st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=ndim, max_size=ndim), min_size=1, max_size=4)
    ),
    max_size=70,
)


def columns(arrays: dict[NodeId, list[list[int]]]) -> ByNode[Coords]:
    by_rank: dict[int, list[NodeId]] = {}
    for node, rows in arrays.items():
        by_rank.setdefault(len(rows[0]), []).append(node)
    return coords_by_node(
        coords_part(nodes, [np.array(arrays[node], np.uint32) for node in nodes]) for nodes in by_rank.values()
    )


def written(arrays: dict[NodeId, list[list[int]]]) -> bytes:
    def write(writer: FlatWriter) -> int:
        def write_rows(part: Part[Coords]) -> Positions:
            spans = zip(part.edges[:-1].tolist(), part.edges[1:].tolist(), strict=True)
            numbers = [part.rows[first:last].astype("<u4").ravel() for first, last in spans]
            return np.array([writer.items(own.tobytes(), len(own), 4) for own in numbers], np.int64)

        return write_node_tables(writer, columns(arrays), write_rows)

    return bytes(FlatWriter().finish(FlatTable({0: Written(write)})))


@given(ARRAYS)
def test_arrays_are_found_in_ascending_order_with_their_own_rows(arrays: dict[NodeId, list[list[int]]]) -> None:
    found = {}
    for table in Buffer(written(arrays), "test").root().tables(0) or ():
        rows = np.frombuffer(table.items(1, 4) or b"", "<u4").tolist()
        found[NodeId(table.inline(0, 8) or b"")] = rows
    assert list(found) == sorted(arrays)
    assert found == {node: [number for row in rows for number in row] for node, rows in arrays.items()}


@given(ARRAYS)
def test_few_arrays_are_written_to_the_same_bytes_as_many(arrays: dict[NodeId, list[list[int]]]) -> None:
    # private: the number from which tables are written together
    with mock.patch.object(node_tables, "_FEW", -1):
        together = written(arrays)
    assert written(arrays) == together
