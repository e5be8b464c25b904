"""The vector of tables that name an array each and hold its rows: a manifest's references, or changed chunks."""

from __future__ import annotations

import struct
from collections.abc import Callable
from operator import itemgetter
from typing import Final, TypeVar

import numpy as np

from icechunk.format.by_node import ByNode, Part
from icechunk.format.flat.flatbuffers import FlatWriter
from icechunk.format.flat.vectors import Positions

__all__ = ["write_node_tables"]

T = TypeVar("T")

_FEW: Final = 64
"""Number of arrays up to which their tables are written one by one."""
_TABLE: Final = np.dtype([("vtable", "<i4"), ("rows", "<u4"), ("node", "V8")])
_PACKER: Final = struct.Struct("<iI8s")
_OFFSETS: Final = {0: 8, 1: 4}
"""Offsets in a table of the array's id and of the vector of its rows, by slot."""


def write_node_tables(writer: FlatWriter, columns: ByNode[T], write_rows: Callable[[Part[T]], Positions]) -> int:
    """Write the vector of tables, in ascending order of node ids, and all below it; returns its position.

    Parameters
    ----------
    columns
        Each array is in one part only.
    write_rows
        Writes the vectors of the rows of a part's arrays; returns their positions. Arrays of one part are written
        together, so that a thousand small ones cost as much as a large one.
    """
    vtable = writer.vtable(_OFFSETS, _TABLE.itemsize)
    writer.align(4)
    out = writer.out
    start, count = len(out), sum([len(part.nodes) for part in columns.parts])
    first = start + 4 + 4 * count
    out += count.to_bytes(4, "little") + bytes((4 + _TABLE.itemsize) * count)
    if count <= _FEW:
        placed = [own for part in columns.parts for own in zip(part.nodes, write_rows(part).tolist(), strict=True)]
        placed.sort(key=itemgetter(0))
        fields = [struct.pack(f"<{count}I", *[first - start - 4 + (_TABLE.itemsize - 4) * i for i in range(count)])]
        for i, (node, vector) in enumerate(placed):
            table = first + _TABLE.itemsize * i
            fields.append(_PACKER.pack(table - vtable, vector - (table + _OFFSETS[1]), node))
        data = b"".join(fields)
        out[start + 4 : start + 4 + len(data)] = data
        return start
    vectors = np.zeros(count, np.int64)
    ids = np.zeros(count, "V8")
    for part, ranks in zip(columns.parts, columns.ranks(), strict=True):
        vectors[ranks] = write_rows(part)
        ids[ranks] = np.frombuffer(b"".join(part.nodes), "V8")
    tables = first + _TABLE.itemsize * np.arange(count, dtype=np.int64)
    np.frombuffer(out, "<u4", count, start + 4)[:] = tables - (start + 4 + 4 * np.arange(count, dtype=np.int64))
    blocks = np.frombuffer(out, _TABLE, count, first)
    blocks["vtable"] = tables - vtable
    blocks["rows"] = vectors - (tables + _OFFSETS[1])
    blocks["node"] = ids
    return start
