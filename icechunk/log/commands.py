"""What can be done to a session: checked against its fold, then appended to its log as an event."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from icechunk.errors import AlreadyExistsError, ErrorKind, InvalidInputError, SessionStateError
from icechunk.format.ids import ObjectId
from icechunk.format.tables import INLINE, NATIVE, VIRTUAL, ChunkRef, ChunkRefs, NodeKind, NodeSnapshot
from icechunk.log.columns import normalized
from icechunk.log.events import (
    ArrayCreated,
    GroupCreated,
    HierarchyCleared,
    MetadataReplaced,
    NodeDeleted,
    NodeMoved,
)
from icechunk.log.fold import Fold, in_grid
from icechunk.log.hierarchy import check_path, is_below, parent_of
from icechunk.log.layers import OPEN_ROWS, inside
from icechunk.log.lookup import sort_last
from icechunk.log.zarr_metadata import ArrayMeta, parse_node

__all__ = ["Commands"]

_new_ref = tuple.__new__


class Commands(Fold):
    """A command that raises has changed nothing."""

    def set_metadata(self, path: str, user_data: bytes) -> None:
        """Create a group or array, or replace the metadata of the one that is there.

        Nothing happens if the document is byte for byte the current one. Groups above it need not exist.

        Raises
        ------
        InvalidInputError
            If the path or the document is refused (see `parse_node`).
        AlreadyExistsError
            If a group stands where an array shall, or the other way round: delete it first.
        """
        check_path(path)
        node = self._tree.get(path)
        if node is not None and node.user_data == user_data:
            return
        meta = parse_node(user_data, path)
        kind = NodeKind.ARRAY if isinstance(meta, ArrayMeta) else NodeKind.GROUP
        if node is None:
            created = ArrayCreated if kind is NodeKind.ARRAY else GroupCreated
            self._append(created(node_id=self._new_node_id(), path=path, user_data=user_data), meta)
        elif node.kind != kind:
            raise AlreadyExistsError(
                f"cannot set the metadata of {path} to that of {_an(kind)}: there is {_an(node.kind)}; delete it first",
                ErrorKind.NODE_ALREADY_EXISTS,
            )
        else:
            self._append(MetadataReplaced(node_id=node.id, path=path, user_data=user_data), meta)

    def delete_node(self, path: str) -> None:
        """Delete a node and everything below it.

        Raises
        ------
        NodeNotFoundError
            If there is none.
        """
        self._append(NodeDeleted(node_id=self._existing(path, "delete").id, path=path))

    def clear(self) -> None:
        """Delete every node, the root too; nothing happens if there is none."""
        if next(self._tree.subtree("/"), None) is not None:
            self._append(HierarchyCleared())

    def move_node(self, source: str, target: str) -> None:
        """Move a node and everything below it; no data moves.

        Raises
        ------
        NodeNotFoundError
            If there is nothing at ``source``.
        AlreadyExistsError
            Kind ``move-wont-overwrite`` if there is something at ``target``.
        SessionStateError
            Kind ``move-into-self-or-descendant``, ``move-destination-parent-missing`` or
            ``move-destination-parent-not-group``.
        InvalidInputError
            If a path is malformed.
        """
        check_path(source)
        check_path(target)
        if source == target or is_below(target, source):
            raise SessionStateError(
                f"cannot move {source} to {target}: a node cannot move into itself or its own descendant",
                ErrorKind.MOVE_INTO_SELF_OR_DESCENDANT,
            )
        node = self._existing(source, "move")
        if self._tree.get(target) is not None:
            raise AlreadyExistsError(
                f"cannot move {source} to {target}: it would overwrite existing node {target}; delete that first, or "
                "choose another path",
                ErrorKind.MOVE_WONT_OVERWRITE,
            )
        above = parent_of(target)
        parent = self._tree.get(above)
        if parent is None:
            raise SessionStateError(
                f"cannot move {source} to {target}: the destination's parent group {above} does not exist; create it "
                "in an ordinary session first",
                ErrorKind.MOVE_DESTINATION_PARENT_MISSING,
            )
        if parent.kind != NodeKind.GROUP:
            raise SessionStateError(
                f"cannot move {source} to {target}: {above} is an array, not a group, and only groups hold nodes",
                ErrorKind.MOVE_DESTINATION_PARENT_NOT_GROUP,
            )
        if next((n for n in self._tree.subtree(target)), None) is not None:
            raise AlreadyExistsError(
                f"cannot move {source} to {target}: there are nodes below it", ErrorKind.MOVE_WONT_OVERWRITE
            )
        self._append(NodeMoved(node_id=node.id, source=source, target=target))

    def set_inline(self, node: NodeSnapshot, coords: tuple[int, ...], data: bytes) -> None:
        """Write a chunk whose bytes travel in the manifest.

        Raises
        ------
        InvalidInputError
            ``invalid-chunk-index`` outside the grid, ``zero-length-chunk``, ``not-an-array``.
        NodeNotFoundError
            If the node is there no more.
        """
        n = len(data)
        if not n:
            raise _zero_length(node, coords)
        fold = self._arrays.get(node.id) or self._fold_of(node)
        if not in_grid(coords, fold.grid):
            raise _outside(node, coords, fold.grid)
        rows = fold.rows
        rows[coords] = _new_ref(ChunkRef, (INLINE, data, None, None, 0, n, None, None))
        if len(rows) >= OPEN_ROWS:
            fold.close()

    def set_native(
        self, node: NodeSnapshot, coords: tuple[int, ...], chunk_id: ObjectId, offset: int, length: int
    ) -> None:
        """Write a chunk that is a range of bytes of a chunk object.

        Raises
        ------
        InvalidInputError
            ``invalid-chunk-index`` outside the grid, ``zero-length-chunk``, ``not-an-array``.
        NodeNotFoundError
            If the node is there no more.
        """
        if length <= 0:
            raise _zero_length(node, coords)
        fold = self._arrays.get(node.id) or self._fold_of(node)
        if not in_grid(coords, fold.grid):
            raise _outside(node, coords, fold.grid)
        rows = fold.rows
        rows[coords] = _new_ref(ChunkRef, (NATIVE, None, chunk_id, None, offset, length, None, None))
        if len(rows) >= OPEN_ROWS:
            fold.close()

    def set_virtual(
        self,
        node: NodeSnapshot,
        coords: tuple[int, ...],
        location: str,
        offset: int,
        length: int,
        etag: str | None = None,
        last_modified: int | None = None,
    ) -> None:
        """Write a chunk that is a range of bytes of somebody else's object.

        Parameters
        ----------
        etag, last_modified
            What the object must still have, or not be newer than (seconds since the epoch), when it is read.

        Raises
        ------
        InvalidInputError
            ``invalid-chunk-index`` outside the grid, ``not-an-array``.
        NodeNotFoundError
            If the node is there no more.
        """
        fold = self._arrays.get(node.id) or self._fold_of(node)
        if not in_grid(coords, fold.grid):
            raise _outside(node, coords, fold.grid)
        fold.rows[coords] = ChunkRef(VIRTUAL, None, None, location, offset, length, etag, last_modified)
        if len(fold.rows) >= OPEN_ROWS:
            fold.close()

    def set_refs(self, node: NodeSnapshot, refs: ChunkRefs) -> None:
        """Write many chunks.

        Parameters
        ----------
        refs
            In any order; of several rows with the same coordinates the last counts. The columns belong to the log now.

        Raises
        ------
        InvalidInputError
            ``invalid-chunk-index`` if any of them is outside the grid, ``not-an-array``.
        NodeNotFoundError
            If the node is there no more.
        """
        fold = self._arrays.get(node.id) or self._fold_of(node)
        _check_all_inside(node, refs.coords, fold.grid)
        if len(refs):
            fold.close()
            fold.push(normalized(refs))

    def delete_chunk(self, node: NodeSnapshot, coords: tuple[int, ...]) -> None:
        """Delete a chunk, whether it exists or not; nothing happens outside the grid.

        Raises
        ------
        InvalidInputError
            ``not-an-array``.
        NodeNotFoundError
            If the node is there no more.
        """
        fold = self._arrays.get(node.id) or self._fold_of(node)
        if in_grid(coords, fold.grid):
            fold.rows[coords] = None
            if len(fold.rows) >= OPEN_ROWS:
                fold.close()

    def delete_chunks(self, node: NodeSnapshot, coords: npt.NDArray[np.uint32]) -> None:
        """Delete many chunks, whether they exist or not; those outside the grid are passed over.

        Parameters
        ----------
        coords
            uint32[n, ndim], in any order.

        Raises
        ------
        InvalidInputError
            ``invalid-chunk-index`` if the rank is another one, ``not-an-array``.
        NodeNotFoundError
            If the node is there no more.
        """
        fold = self._arrays.get(node.id) or self._fold_of(node)
        if coords.ndim != 2 or coords.shape[1] != len(fold.grid):
            raise _outside(node, coords.shape, fold.grid)
        coords = coords[inside(coords, fold.grid)]
        order = sort_last(coords)
        if len(coords):
            fold.close()
            fold.push_deleted(coords if order is None else coords[order])


def _check_all_inside(node: NodeSnapshot, coords: npt.NDArray[np.uint32], grid: tuple[int, ...]) -> None:
    if coords.ndim != 2 or coords.shape[1] != len(grid):
        raise _outside(node, coords.shape, grid)
    good = inside(coords, grid)
    if not good.all():
        raise _outside(node, coords[int(np.argmin(good))].tolist(), grid)


def _outside(node: NodeSnapshot, coords: object, grid: tuple[int, ...]) -> InvalidInputError:
    return InvalidInputError(
        f"cannot write chunk {coords} of the array {node.path}: it is outside the grid of {grid} chunks",
        ErrorKind.INVALID_CHUNK_INDEX,
    )


def _zero_length(node: NodeSnapshot, coords: tuple[int, ...]) -> InvalidInputError:
    return InvalidInputError(
        f"cannot write chunk {coords} of the array {node.path}: it has no bytes, and no chunk encodes to none",
        ErrorKind.ZERO_LENGTH_CHUNK,
    )


def _an(kind: NodeKind) -> str:
    return "an array" if kind == NodeKind.ARRAY else "a group"
