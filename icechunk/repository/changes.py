"""The changed chunks between two versions, the last writer of each chunk, and the chunks that exist.

All three read transaction logs, snapshots and manifests, never chunks. Changes read the logs of the commits in between,
blame the logs until every chunk is found, coverage the manifests of one array.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from icechunk.errors import ErrorKind, InvalidInputError, NodeNotFoundError
from icechunk.format.by_node import Coords
from icechunk.format.documents import parse_document
from icechunk.format.ids import NodeId, ObjectId, encode_id, object_id_from_text
from icechunk.format.repo.repo_info import SnapshotRecord
from icechunk.format.snapshot.nodes import with_ids
from icechunk.format.values import NodeKind, NodeSnapshot, Snapshot, TransactionLog
from icechunk.log.session.extents import volume
from icechunk.log.session.merge.diff import net_diff
from icechunk.repository.base import RepositoryBase, require_at_most_one, select, snapshot_id_from_text
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.representation import Described
from icechunk.runtime.twins import synchronous
from icechunk.session import Session
from icechunk.session.content import SessionContent

__all__ = ["ArrayChange", "Blame", "ChangedRegions", "Changes"]

Region: TypeAlias = "Sequence[slice | int] | None"

_FIRST_BATCH: Final = 16
"""Commits whose transaction logs `Changes.blame_async` reads first; then twice as many at once, and so on."""
_MOST_BATCH: Final = 1024


@dataclass(frozen=True, slots=True, repr=False, kw_only=True, eq=False)
class ArrayChange(Described):
    """The changes of one array between two versions."""

    _public_name: ClassVar[str] = "icechunk.ArrayChange"

    path: str
    """Path in the later version, with a leading ``/``."""
    chunks: Coords
    """uint32[n, ndim], ascending: chunks that were written, replaced or deleted; of a new array all it has."""
    shape: tuple[int, ...]
    """Elements along each dimension, in the later version."""
    chunk_shape: tuple[int, ...]
    """Elements of a chunk along each dimension; of irregular grids the longest."""
    dimension_names: tuple[str | None, ...]
    """One per dimension; None for a dimension without a name."""
    is_new: bool = False
    """The array did not exist in the earlier version."""
    metadata_changed: bool = False
    """Its zarr.json changed: shape, attributes or anything else."""

    @property
    def boxes(self) -> list[tuple[slice, ...]]:
        """The same chunks as few disjoint boxes of chunk coordinates, ascending."""
        return [tuple(slice(a, b) for a, b in box) for box in boxes_of(self.chunks)]

    @property
    def slices(self) -> list[tuple[slice, ...]]:
        """The boxes as slices of elements, clipped to the shape; boxes behind the end of the array are left out."""
        found = []
        for box in boxes_of(self.chunks):
            ends = [(a * c, min(b * c, n)) for (a, b), c, n in zip(box, self.chunk_shape, self.shape, strict=True)]
            if all(a < b for a, b in ends):
                found.append(tuple(slice(a, b) for a, b in ends))
        return found

    @property
    def indexers(self) -> list[dict[str, slice]]:
        """The slices by dimension name, for ``xarray.Dataset.isel``; dimensions without a name are left out."""
        names = self.dimension_names
        return [{n: s for n, s in zip(names, one, strict=True) if n is not None} for one in self.slices]


@dataclass(frozen=True, slots=True, repr=False, kw_only=True, eq=False)
class ChangedRegions(Described):
    """The changes between two versions, by array."""

    _public_name: ClassVar[str] = "icechunk.ChangedRegions"

    since: str
    """Id of the earlier snapshot."""
    until: str
    """Id of the later snapshot."""
    arrays: Mapping[str, ArrayChange]
    """Changes by path, ascending, of arrays that are new, or whose chunks or metadata changed."""
    deleted: tuple[str, ...] = ()
    """Paths of arrays and groups that are gone."""
    moved: tuple[tuple[str, str], ...] = ()
    """(before, after): the paths of nodes that moved."""

    def __iter__(self) -> Any:
        return iter(self.arrays.values())


@dataclass(frozen=True, slots=True, repr=False, kw_only=True, eq=False)
class Blame(Described):
    """The snapshot that wrote each chunk of a region last."""

    _public_name: ClassVar[str] = "icechunk.Blame"

    snapshots: tuple[str, ...]
    """Ids, newest first."""
    index: npt.NDArray[np.int32]
    """int32, one element for each chunk of the region: position in ``snapshots``; −1: the chunk was never written, or
    by a snapshot that has expired together with its transaction log."""
    origin: tuple[int, ...]
    """Chunk coordinates of the first element of ``index``."""

    def __getitem__(self, chunk: tuple[int, ...]) -> str | None:
        """The snapshot of a chunk by its coordinates in the array; None where it is not known."""
        found = int(self.index[tuple(c - o for c, o in zip(chunk, self.origin, strict=True))])
        return None if found < 0 else self.snapshots[found]


class Changes(RepositoryBase):
    """Asks transaction logs and manifests."""

    async def changes_async(self, since: str, until: str | None = None) -> ChangedRegions:
        """Find the chunks, by array, that changed after one snapshot, up to and with another.

        Parameters
        ----------
        since
            Id of a snapshot.
        until
            Id of a descendant; None: the tip of ``main``.

        Raises
        ------
        InvalidInputError
            The first is no ancestor of the second (kind ``bad-snapshot-chain-for-diff``), or a text is no id, as the
            name of a branch or tag is not (kind ``invalid-snapshot-id``).
        SnapshotNotFoundError
            There is no such snapshot.
        """
        for name, id in (("since", since), ("until", until)):
            if id is not None:
                snapshot_id_from_text(name, id)
        first = object_id_from_text(since)
        state = await self._core.state(since)
        select(state, snapshot_id=since)
        last = state.branch_tip("main") if until is None else object_id_from_text(until)
        logs, before, after = await self._between(first, last)
        net = net_diff(logs, before, after)
        older = await self._made_without_log(logs, before, after)
        chunks = {**net.chunks, **older}
        new, updated = {*older, *(n.id for n in net.new)}, {n.id for n in net.updated}
        touched = new | updated | set(chunks)
        nodes = [n for n in with_ids(after.nodes, touched).values() if n.kind is NodeKind.ARRAY]
        arrays = {}
        for node in sorted(nodes, key=lambda node: node.path):
            meta = _grid(node)
            arrays[node.path] = ArrayChange(
                path=node.path,
                chunks=chunks.get(node.id, np.empty((0, len(node.shape)), np.uint32)),
                shape=tuple(d.array_length for d in node.shape),
                chunk_shape=meta,
                dimension_names=node.dimension_names or (None,) * len(node.shape),
                is_new=node.id in new,
                metadata_changed=node.id in updated,
            )
        return ChangedRegions(
            since=since,
            until=encode_id(last),
            arrays=MappingProxyType(arrays),
            deleted=tuple(sorted(node.path for node in net.deleted)),
            moved=tuple((move.source, move.target) for move in net.moved),
        )

    changes: Final = synchronous(changes_async)

    async def _made_without_log(
        self, logs: Sequence[TransactionLog], before: Snapshot, after: Snapshot
    ) -> dict[NodeId, Coords]:
        """The arrays that none of the logs creates, each with the chunks that it has.

        An expiration in format 1, and of older libraries, leaves no log of the commits that it takes out of the
        history; it makes the next commit a child of the first snapshot, which has no nodes.
        """
        if len(before.nodes):
            return {}
        created = frozenset[NodeId]().union(*(log.new_arrays for log in logs))
        found = {}
        for node in after.nodes.values():
            if node.kind is NodeKind.ARRAY and node.id not in created:
                grid = tuple((0, d.num_chunks) for d in node.shape)
                found[node.id] = np.argwhere(await self._coverage(node, grid, after)).astype(np.uint32)
        return found

    async def changed_labels_async(self, changes: ChangedRegions, path: str) -> list[dict[str, slice]]:
        """The changed boxes of one array as label slices, for ``xarray.Dataset.sel``.

        A dimension takes the labels of the one-dimensional array of its name beside the array, as xarray has it;
        a dimension without such an array is left out. Times and packed numbers are decoded as xarray decodes them;
        where xarray is not installed, labels are the stored values.

        Parameters
        ----------
        changes
            What `changes` returned.
        path
            Of one of its arrays.

        Raises
        ------
        NodeNotFoundError
            The array is not among the changes.
        """
        import zarr.api.asynchronous as azarr

        change = changes.arrays.get(path if path.startswith("/") else f"/{path}")
        if change is None:
            raise NodeNotFoundError(f"array {path!r} did not change between {changes.since} and {changes.until}")
        snapshot = await self._core.assets.snapshot(object_id_from_text(changes.until))
        store = Session(SessionContent.on(self._core, snapshot)).store
        group = change.path.rpartition("/")[0]
        labels: dict[str, Any] = {}
        for name in {n for n in change.dimension_names if n is not None}:
            node = snapshot.nodes.get(f"{group}/{name}")
            if node is not None and node.kind is NodeKind.ARRAY and len(node.shape) == 1:
                array = await azarr.open_array(store=store, path=node.path.strip("/"), mode="r")
                labels[name] = _decoded(name, await array.getitem(slice(None)), array.attrs)
        return [
            {name: slice(labels[name][s.start], labels[name][s.stop - 1]) for name, s in one.items() if name in labels}
            for one in change.indexers
        ]

    changed_labels: Final = synchronous(changed_labels_async)

    async def blame_async(
        self,
        path: str,
        region: Region = None,
        *,
        branch: str | None = None,
        tag: str | None = None,
        snapshot_id: str | None = None,
    ) -> Blame:
        """Find the snapshot that wrote each chunk of an array last.

        Parameters
        ----------
        path
            Of the array.
        region
            Chunk coordinates, not elements: a tuple with a slice or an integer for each dimension; None: all chunks.
        branch, tag, snapshot_id
            The version that is asked about, at most one of them; branch ``main`` where none is given.

        Raises
        ------
        NodeNotFoundError
            There is no such array.
        InvalidInputError
            The region is no tuple of slices and ints, has another number of dimensions than the array, has steps, or
            is outside of the grid (kind ``invalid-setting``).
        """
        tip, snapshot = await self._version(branch, tag, snapshot_id)
        node = _array(snapshot, path)
        grid = tuple(d.num_chunks for d in node.shape)
        box = _box(region, grid)
        index = np.full([b - a for a, b in box], -1, np.int32)
        missing = await self._coverage(node, box, snapshot)
        ids: list[str] = []
        # Newest first: the first commit found is the last writer.
        lineage = await self._ancestry(tip)
        start, batch = 0, _FIRST_BATCH
        created = False
        while start < len(lineage) and missing.any() and not created:
            part = lineage[start : start + batch]
            start, batch = start + batch, min(2 * batch, _MOST_BATCH)
            writers, logs = await self._logs_until_created(node.id, part)
            created = len(logs) > 0 and node.id in logs[-1].new_arrays
            changed = [(number, log.updated_chunks.get(node.id)) for number, log in zip(writers, logs, strict=True)]
            rows = [(n, _inside(c, box)) for n, c in changed if c is not None and c.shape[1] == len(box)]
            if rows:
                cells = np.concatenate([c for _, c in rows])
                owner = np.repeat([n for n, _ in rows], [len(c) for _, c in rows])
                places = _numbers(cells, index.shape)
                fresh = missing.reshape(-1)[places]
                # The first of equal places is the newest.
                places, first = np.unique(places[fresh], return_index=True)
                found, numbers = np.unique(owner[fresh][first], return_inverse=True)
                index.reshape(-1)[places] = numbers + len(ids)
                missing.reshape(-1)[places] = False
                ids += [encode_id(part[number].id) for number in found.tolist()]
            if created and missing.any():
                # Chunks that no later commit wrote are from the one that made the array.
                id = encode_id(part[writers[-1]].id)
                if not ids or ids[-1] != id:
                    ids.append(id)
                index[missing] = len(ids) - 1
        return Blame(snapshots=tuple(ids), index=index, origin=tuple(a for a, _ in box))

    blame: Final = synchronous(blame_async)

    async def coverage_async(
        self, path: str, *, branch: str | None = None, tag: str | None = None, snapshot_id: str | None = None
    ) -> npt.NDArray[np.bool_]:
        """Find the chunks of an array that exist: bool, one element for each chunk of its grid.

        A manifest whose references fill its bounding box is not read.

        Parameters
        ----------
        path
            Of the array.
        branch, tag, snapshot_id
            The version, at most one of them; branch ``main`` where none is given.

        Raises
        ------
        NodeNotFoundError
            There is no such array.
        """
        _, snapshot = await self._version(branch, tag, snapshot_id)
        node = _array(snapshot, path)
        return await self._coverage(node, tuple((0, d.num_chunks) for d in node.shape), snapshot)

    coverage: Final = synchronous(coverage_async)

    async def _coverage(
        self, node: NodeSnapshot, box: tuple[tuple[int, int], ...], snapshot: Snapshot
    ) -> npt.NDArray[np.bool_]:
        found = np.zeros([b - a for a, b in box], np.bool_)
        # A manifest of this array alone whose references fill its box need not be read: each chunk is in it once.
        users: dict[ObjectId, int] = {}
        for other in snapshot.nodes.values():
            for ref in other.manifests:
                users[ref.object_id] = users.get(ref.object_id, 0) + 1
        wanted = []
        for ref in node.manifests:
            inside = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(ref.extents, box, strict=True))
            if any(a >= b for a, b in inside):
                continue
            file = snapshot.manifest_files.get(ref.object_id)
            if file is not None and users[ref.object_id] == 1 and file.num_chunk_refs == volume(ref.extents):
                found[tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(inside, box, strict=True))] = True
            else:
                wanted.append(ref.object_id)

        mark = partial(_mark, found, box=box)
        await self._core.assets.each_coords(wanted, node, mark, limit=self._core.settings.max_requests)
        return found

    async def _logs_until_created(
        self, node: NodeId, part: Sequence[SnapshotRecord]
    ) -> tuple[list[int], list[TransactionLog]]:
        """The transaction logs of these commits, newest first, up to that which made an array; each with the number of
        its commit.

        Further logs of the commit that made the array are not read.
        """
        # The first snapshot changed nothing, and has no transaction log in format 1.
        own = [record.id for record in part if record.parent is not None]
        by_id = {log.id: log for log in await self._transaction_logs(own)}
        steps: list[tuple[int, ObjectId]] = []
        for number, record in enumerate(part):
            log = by_id.get(record.id)
            if log is not None:
                steps.append((number, record.id))
                if node in log.new_arrays:
                    break
            steps += [(number, id) for id in reversed(record.pruned_ancestor_tx_logs)]
        others = [id for _, id in steps if id not in by_id]
        by_id |= {log.id: log for log in await self._transaction_logs(others)}
        numbers, logs = [], []
        for number, id in steps:
            numbers.append(number)
            logs.append(by_id[id])
            if node in by_id[id].new_arrays:
                break
        return numbers, logs

    async def _version(self, branch: str | None, tag: str | None, snapshot_id: str | None) -> tuple[ObjectId, Snapshot]:
        require_at_most_one(branch, tag, snapshot_id)
        if branch is tag is snapshot_id is None:
            branch = "main"
        state = await self._core.state(snapshot_id, branch=branch, tag=tag)
        tip = select(state, branch=branch, tag=tag, snapshot_id=snapshot_id)
        return tip, await self._core.assets.snapshot(tip)

    async def _ancestry(self, tip: ObjectId) -> list[SnapshotRecord]:
        return list((await self._core.learn(tip, ancestry=True)).ancestry(tip))


def boxes_of(coords: Coords) -> list[tuple[tuple[int, int], ...]]:
    """Distinct coordinates as disjoint boxes (start, end): runs along the last axis, joined along the others.

    Costs some passes over the columns, for every rank.
    """
    n, ndim = coords.shape
    if n == 0:
        return []
    if ndim == 0:
        return [()]
    lower = coords.astype(np.int64)
    upper = lower + 1
    for axis in range(ndim - 1, -1, -1):
        others = [d for d in range(ndim) if d != axis]
        # Boxes that agree in all other axes come next to each other, in order along this one.
        keys = [lower[:, axis]]
        for d in reversed(others):
            keys += [upper[:, d], lower[:, d]]
        order = np.lexsort(keys)
        lower, upper = lower[order], upper[order]
        same = np.ones(len(lower) - 1, np.bool_)
        for d in others:
            same &= (lower[1:, d] == lower[:-1, d]) & (upper[1:, d] == upper[:-1, d])
        joined = same & (lower[1:, axis] == upper[:-1, axis])
        first = np.flatnonzero(np.concatenate([[True], ~joined]))
        last = np.concatenate([first[1:], [len(lower)]]) - 1
        ends = upper[last, axis]
        lower, upper = lower[first], upper[first]
        upper[:, axis] = ends
    order = np.lexsort([lower[:, d] for d in range(ndim - 1, -1, -1)])
    return [tuple(zip(a, b, strict=True)) for a, b in zip(lower[order].tolist(), upper[order].tolist(), strict=True)]


def _decoded(name: str, values: Any, attributes: Mapping[str, Any]) -> Any:
    try:
        import xarray as xr
    except ImportError:
        return values
    # The value of absent elements is written in several ways; labels have none.
    known = {key: value for key, value in attributes.items() if key not in ("_FillValue", "missing_value")}
    return np.asarray(xr.conventions.decode_cf_variable(name, xr.Variable((name,), values, known)).values)


def _mark(found: npt.NDArray[np.bool_], coords: Coords, box: Sequence[tuple[int, int]]) -> None:
    """Set the elements of these coordinates in the array of a box's chunks."""
    if not box:
        found[...] = found[...] | bool(len(coords))
        return
    if not len(coords):
        return
    # One number for each chunk.
    places = np.zeros(len(coords), np.int64)
    for d, (a, b) in enumerate(box):
        # A coordinate before the box becomes a large number.
        column = coords[:, d] - np.uint32(a)
        if column.max() >= b - a:
            found[tuple(_inside(coords, box).T)] = True
            return
        places *= b - a
        places += column
    found.reshape(-1)[places] = True


def _numbers(cells: npt.NDArray[np.int64], shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Positions of these elements in an array of the shape, in C order."""
    if not shape:
        return np.zeros(len(cells), np.int64)
    places: npt.NDArray[np.int64] = np.ravel_multi_index(tuple(cells.T), shape)
    return places


def _inside(coords: Coords, box: Sequence[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """Coordinates inside a box, relative to its start."""
    if not box:
        return np.empty((len(coords), 0), np.int64)
    keep = np.ones(len(coords), np.bool_)
    for d, (a, b) in enumerate(box):
        keep &= (coords[:, d] >= a) & (coords[:, d] < b)
    return coords[keep].astype(np.int64) - np.array([a for a, _ in box], np.int64)


def _array(snapshot: Snapshot, path: str) -> NodeSnapshot:
    node = snapshot.nodes.get("/" + path.strip("/"))
    if node is None or node.kind is not NodeKind.ARRAY:
        raise NodeNotFoundError(f"there is no array {path!r} in snapshot {encode_id(snapshot.id)}")
    return node


def _grid(node: NodeSnapshot) -> tuple[int, ...]:
    """Elements of a chunk along each dimension, from the shape and the number of chunks."""
    document = _regular_chunk_shape(node)
    if document is not None:
        return document
    return tuple(-(-d.array_length // max(d.num_chunks, 1)) for d in node.shape)


def _regular_chunk_shape(node: NodeSnapshot) -> tuple[int, ...] | None:
    """The chunk shape that a zarr.json of a regular grid names; None for other grids."""
    try:
        grid = parse_document(node.user_data)["chunk_grid"]
        shape = tuple(int(n) for n in grid["configuration"]["chunk_shape"]) if grid["name"] == "regular" else None
    except (ValueError, KeyError, TypeError):
        return None
    return shape if shape is not None and len(shape) == len(node.shape) else None


def _box(region: Region, grid: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    if region is None:
        return tuple((0, n) for n in grid)
    if not isinstance(region, tuple | list):
        raise _refused_region(f"is {region!r:.60}", grid)
    if len(region) != len(grid):
        raise _refused_region(f"has {len(region)} dimensions", grid)
    return tuple(_side(one, d, grid) for d, one in enumerate(region))


def _side(one: Any, d: int, grid: tuple[int, ...]) -> tuple[int, int]:
    """The chunks of a region along one dimension: from, to."""
    n = grid[d]
    if not isinstance(one, slice):
        try:
            number = operator.index(one)
        except TypeError as error:
            raise _refused_region(f"has {one!r:.60} for dimension {d}", grid) from error
        if not -n <= number < n:
            raise _refused_region(f"is outside: chunk {number} of dimension {d}", grid)
        return number % n, number % n + 1
    try:
        start, stop, step = one.indices(n)
    except (TypeError, ValueError) as error:
        raise _refused_region(f"has {one!r:.60} for dimension {d}", grid) from error
    if step != 1:
        raise _refused_region(f"has a step of {step} in dimension {d}, where only 1 is possible", grid)
    if start >= stop and n and one.start != one.stop:
        raise _refused_region(f"is outside: chunks {one.start}:{one.stop} of dimension {d}", grid)
    return start, max(start, stop)


def _refused_region(reason: str, grid: tuple[int, ...]) -> InvalidInputError:
    return InvalidInputError(
        f"the region {reason}; it is a tuple of a slice or an int for each dimension, in chunk coordinates (not "
        f"elements), and the array has {grid} chunks",
        ErrorKind.INVALID_SETTING,
    )
