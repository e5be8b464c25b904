"""Rows of many arrays in a few shared columns, accessible as a mapping from each array's id to its own rows.

A numpy call costs as much for two rows as for ten thousand, so five thousand small arrays in columns of their own would
cost five thousand calls. Arrays of one rank are therefore concatenated in columns that are filled, merged and encoded
at once; the rows of one array are sliced out when they are requested.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from icechunk.format.ids import NodeId
from icechunk.runtime.late_dataclass import dataclass

__all__ = ["ByNode", "Coords", "Part", "by_rank", "coords_by_node", "grouped_coords", "is_twice", "num_rows", "owners"]

T = TypeVar("T")

Coords = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, eq=False)
class Part(Generic[T]):
    """Rows of several arrays of one rank, concatenated array by array."""

    nodes: tuple[NodeId, ...]
    """The arrays, each once, in any order; at least one."""
    edges: npt.NDArray[np.int64]
    """int64[len(nodes) + 1]: the first row of each array, and the end of the last array's rows."""
    rows: T
    """Columns; their number of rows is the last edge."""


class ByNode(Mapping[NodeId, T]):
    """A mapping, in ascending order of node ids, whose values are slices of columns.

    Parameters
    ----------
    parts
        A node is in one of them, or, where others have written references of several ranks for one array, in one for
        each rank. The mapping then shows the rows of the part where it has most.
    cut
        Returns consecutive rows of columns.
    """

    __slots__ = ("_cut", "_order", "_places", "parts")

    def __init__(self, parts: Iterable[Part[T]], cut: Callable[[T, slice], T]) -> None:
        self.parts: tuple[Part[T], ...] = tuple(parts)
        """The columns."""
        self._cut = cut
        self._order: list[NodeId] | None = None
        self._places: dict[NodeId, tuple[Part[T], int]] | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows of all arrays together."""
        return sum(int(part.edges[-1]) for part in self.parts)

    def ranks(self) -> list[npt.NDArray[np.int64]]:
        """For each part, the rank of each of its nodes among all nodes in ascending order."""
        if not self.parts:
            return []
        ids = b"".join([node for part in self.parts for node in part.nodes])
        order = np.argsort(np.frombuffer(ids, ">u8"), kind="stable")
        ranks = np.empty(len(order), np.int64)
        ranks[order] = np.arange(len(order))
        return np.split(ranks, np.cumsum([len(part.nodes) for part in self.parts])[:-1])

    def where(self, node: NodeId) -> tuple[Part[T], int] | None:
        """The part that holds an array's rows, and the array's index in it; None if the array is in no part."""
        return self._index().get(node)

    def _index(self) -> dict[NodeId, tuple[Part[T], int]]:
        if self._places is None:
            places = {node: (part, i) for part in self.parts for i, node in enumerate(part.nodes)}
            if len(places) < sum(len(part.nodes) for part in self.parts):
                for part in self.parts:
                    for i, node in enumerate(part.nodes):
                        known, at = places[node]
                        if part.edges[i + 1] - part.edges[i] > known.edges[at + 1] - known.edges[at]:
                            places[node] = part, i
            self._places = places
        return self._places

    def __len__(self) -> int:
        return len(self._index())

    def __iter__(self) -> Iterator[NodeId]:
        if self._order is None:
            self._order = sorted(self._index())
        return iter(self._order)

    def __contains__(self, node: object) -> bool:
        return self.where(node) is not None  # type: ignore[arg-type]

    def __getitem__(self, node: NodeId) -> T:
        found = self.where(node)
        if found is None:
            raise KeyError(node)
        part, i = found
        return self._cut(part.rows, slice(int(part.edges[i]), int(part.edges[i + 1])))

    def items(self) -> ItemsView[NodeId, T]:
        """The arrays and their rows; faster than a look-up for each."""
        return _Items(self)

    def in_order(self) -> Iterator[tuple[NodeId, T]]:
        """The arrays, in ascending order, and their rows."""
        places, edges = self._index(), {id(part): part.edges.tolist() for part in self.parts}
        for node in self:
            part, i = places[node]
            own = edges[id(part)]
            yield node, self._cut(part.rows, slice(own[i], own[i + 1]))

    def __repr__(self) -> str:
        return f"ByNode({dict(self)!r})"


class _Items(ItemsView[NodeId, T]):
    def __init__(self, rows: ByNode[T]) -> None:
        super().__init__(rows)
        self._rows = rows

    def __iter__(self) -> Iterator[tuple[NodeId, T]]:
        return self._rows.in_order()


def owners(edges: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """For each row the index of the array that it belongs to, given the edges of a part."""
    return np.repeat(np.arange(len(edges) - 1), np.diff(edges))


def by_rank(
    owner: npt.NDArray[np.int64], ranks: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
) -> Iterator[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64], Any]]:
    """Rows of many arrays, apart by rank.

    Parameters
    ----------
    owner
        int64[n]: the array of each row, ascending.
    ranks
        int64[n]: number of dimensions of each row.
    counts
        int64[m]: number of rows of each array.

    Yields
    ------
    ndim : int
    members : int64[k]
        Arrays with rows of this rank, ascending; for rank 0 those without any row, whose rank is not known, as well.
    edges : int64[k + 1]
        Of these rows.
    rows : bool[n] or slice
        Which rows they are.
    """
    empty = counts == 0
    # Not `np.unique`, whose first call imports a package that takes longer than most manifests.
    known = {int(ranks.min()), int(ranks.max())} if len(ranks) else set[int]()
    if len(known) > 1:
        known = set(ranks.tolist())
    for ndim in sorted(known | {0} if empty.any() else known):
        own = ranks == ndim
        sizes = np.bincount(owner[own], minlength=len(counts)).astype(np.int64)
        present = (sizes > 0) | empty if ndim == 0 else sizes > 0
        edges = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[present])])
        yield ndim, np.flatnonzero(present), edges, slice(None) if own.all() else own


def is_twice(ids: npt.NDArray[np.uint64], file_of: npt.NDArray[np.int64]) -> bool:
    """Whether an array is listed twice in one of several files.

    Parameters
    ----------
    ids
        uint64[n]: ids of the arrays, as numbers of either byte order.
    file_of
        int64[n]: number of the file that each of them is listed in, ascending.
    """
    # Stable, so that the files of one array stay ascending.
    ids = ids.astype(np.uint64)
    order = np.argsort(ids, kind="stable")
    ids, files = ids[order], file_of[order]
    return bool(((ids[1:] == ids[:-1]) & (files[1:] == files[:-1])).any())


def coords_by_node(parts: Iterable[Part[Coords]]) -> ByNode[Coords]:
    """Coordinates, uint32[n, ndim], of many arrays."""
    return ByNode(parts, _cut_coords)


def grouped_coords(chunks: Mapping[NodeId, Coords]) -> ByNode[Coords]:
    """The same from the coordinates of each array; returned as it is if it is a `ByNode` already."""
    if isinstance(chunks, ByNode):
        return chunks
    by_rank: dict[int, list[NodeId]] = {}
    for node, coords in chunks.items():
        by_rank.setdefault(coords.shape[1], []).append(node)
    return coords_by_node([coords_part(nodes, [chunks[node] for node in nodes]) for nodes in by_rank.values()])


def num_rows(chunks: Mapping[NodeId, Coords]) -> int:
    """Number of coordinates of all arrays together."""
    return chunks.num_rows if isinstance(chunks, ByNode) else sum(map(len, chunks.values()))


def coords_part(nodes: Sequence[NodeId], batch: Sequence[Coords]) -> Part[Coords]:
    """A part with the coordinates of one or more arrays of one rank."""
    return Part(tuple(nodes), edges_of(batch), batch[0] if len(batch) == 1 else np.concatenate(batch))


def edges_of(batch: Sequence[object]) -> npt.NDArray[np.int64]:
    """Edges of a part that concatenates these rows."""
    edges = np.zeros(len(batch) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, batch), np.int64, len(batch)), out=edges[1:])  # type: ignore[arg-type]
    return edges


def _cut_coords(rows: Coords, span: slice) -> Coords:
    return rows[span]
