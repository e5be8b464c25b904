"""Values that describe conflicts, and the choices for solving them. `icechunk.log.session.merge` finds them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from icechunk.errors import ConflictError, ErrorKind, SessionStateError
from icechunk.runtime.checks import boolean, instance_of, text
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.representation import Described, IntLikeEnum

__all__ = [
    "BasicConflictSolver",
    "Conflict",
    "ConflictDetector",
    "ConflictSolver",
    "ConflictType",
    "MergeConflict",
    "MergeConflictType",
    "MergeFailedError",
    "RebaseFailedError",
    "VersionSelection",
]


class _ByIdentity(IntLikeEnum):
    """An enumeration whose members equal only themselves, not numbers, as in the official library."""

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return hash(self.value)


class VersionSelection(_ByIdentity):
    """The side whose chunk is kept if both sides wrote it."""

    Fail = 0
    UseOurs = 1
    UseTheirs = 2


class ConflictType(_ByIdentity):
    """Kinds of incompatible changes of two sides."""

    NewNodeConflictsWithExistingNode = 1
    NewNodeInInvalidGroup = 2
    ZarrMetadataDoubleUpdate = 3
    ZarrMetadataUpdateOfDeletedArray = 4
    ZarrMetadataUpdateOfDeletedGroup = 5
    ChunkDoubleUpdate = 6
    ChunksUpdatedInDeletedArray = 7
    ChunksUpdatedInUpdatedArray = 8
    DeleteOfUpdatedArray = 9
    DeleteOfUpdatedGroup = 10
    MoveOperationCannotBeRebased = 11

    def __repr__(self) -> str:
        return self.name

    def __str__(self) -> str:
        words = "".join(f" {c.lower()}" if c.isupper() else c for c in self.name).strip()
        return words[0].upper() + words[1:]


@dataclass(frozen=True, slots=True, repr=False)
class Conflict(Described):
    """One conflict between a session and the commits it is to be rebased on."""

    conflict_type: ConflictType
    path: str
    """Path of the node."""
    conflicted_chunks: list[list[int]] | None = None
    """Coordinates, where chunks are concerned."""

    def __post_init__(self) -> None:
        instance_of(ConflictType)("Conflict.conflict_type", self.conflict_type)
        text("Conflict.path", self.path)


class ConflictSolver:
    """The way in which a rebase settles conflicts. Use one of the subclasses."""

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> ConflictSolver:
        if cls is ConflictSolver:
            raise TypeError("cannot create 'ConflictSolver' instances; use BasicConflictSolver or ConflictDetector")
        return object.__new__(cls)


@dataclass(frozen=True, slots=True, kw_only=True)
class BasicConflictSolver(ConflictSolver):
    """Solves the conflicts for which it has a rule; any other conflict fails the rebase."""

    on_chunk_conflict: VersionSelection = VersionSelection.UseOurs
    """The side whose chunk is kept when both wrote it."""
    fail_on_delete_of_updated_array: bool = False
    """Whether deleting an array that the other side updated is a conflict; False: the deletion wins."""
    fail_on_delete_of_updated_group: bool = False
    """Whether deleting a group that the other side updated is a conflict; False: the deletion wins."""

    def __post_init__(self) -> None:
        instance_of(VersionSelection)("BasicConflictSolver.on_chunk_conflict", self.on_chunk_conflict)
        boolean("BasicConflictSolver.fail_on_delete_of_updated_array", self.fail_on_delete_of_updated_array)
        boolean("BasicConflictSolver.fail_on_delete_of_updated_group", self.fail_on_delete_of_updated_group)


@dataclass(frozen=True, slots=True)
class ConflictDetector(ConflictSolver):
    """Solves nothing: any conflict fails the rebase."""


class RebaseFailedError(ConflictError):
    """The session's changes do not go together with the commits that landed since; nothing was changed.

    Read ``conflicts``, resolve them in the session (delete or rewrite the nodes concerned) and rebase again, or
    rebase with a solver that settles them.

    Parameters
    ----------
    snapshot
        Id of the commit with which the changes conflict; commits before it were rebased over.
    conflicts
        All conflicts with it.
    """

    default_kind = ErrorKind.REBASE_FAILED

    def __init__(self, snapshot: str, conflicts: list[Conflict]) -> None:
        message = f"Rebase failed on snapshot {snapshot}: {len(conflicts)} conflicts found"
        if conflicts:
            shown = ", ".join(sorted({f"{str(c.conflict_type).lower()} at {c.path}" for c in conflicts})[:3])
            message += f" ({shown}); resolve them in the session, or rebase with a solver that settles them"
        super().__init__(message=message)
        # The arguments are API: the official library's error has these two.
        self.args: tuple[Any, ...] = (snapshot, conflicts)
        self._snapshot = snapshot
        self._conflicts = list(conflicts)

    @property
    def snapshot(self) -> str:
        """Id of the commit with which the changes conflict."""
        return self._snapshot

    @property
    def conflicts(self) -> list[Conflict]:
        """All conflicts with it."""
        return list(self._conflicts)

    def __repr__(self) -> str:
        return f'icechunk.RebaseFailedError(snapshot="{self._snapshot}", conflicts={self._conflicts!r})'

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self._snapshot, self._conflicts))


class MergeConflictType(StrEnum):
    """Kinds of incompatible changes of two sessions that are merged."""

    CHUNKS_CHANGED_TWICE = "chunks-changed-twice"
    """Both wrote or deleted the same chunks, and not to the same effect."""
    METADATA_CHANGED_TWICE = "metadata-changed-twice"
    """Both changed the metadata of one array, shape or attributes, alike or not; or those of a group, not alike."""
    CHUNKS_OUTSIDE_SHAPE = "chunks-outside-shape"
    """One changed chunks that the other's new shape leaves out."""
    ENCODING_CHANGED = "encoding-changed"
    """One wrote chunks, and the other changed how chunks are laid out or encoded."""
    CREATED_TWICE = "created-twice"
    """Both created, or moved, a node at one path."""
    DELETED_AND_CHANGED = "deleted-and-changed"
    """One deleted a node that the other changed, or needs as a parent."""
    MOVED_TWICE = "moved-twice"
    """Both moved one node, to different paths."""


_HINTS = {
    MergeConflictType.CHUNKS_CHANGED_TWICE: "let every fork write chunks of its own, or choose with on_conflict",
    MergeConflictType.METADATA_CHANGED_TWICE: (
        "resize arrays and set attributes before forking, or choose with on_conflict"
    ),
    MergeConflictType.CHUNKS_OUTSIDE_SHAPE: "resize arrays before forking, or choose with on_conflict",
    MergeConflictType.ENCODING_CHANGED: "replace an array's metadata before forking",
    MergeConflictType.CREATED_TWICE: "create nodes before forking, or in one fork",
    MergeConflictType.DELETED_AND_CHANGED: "delete nodes before forking, or after the merge",
    MergeConflictType.MOVED_TWICE: "move nodes before forking, or in one fork",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeConflict:
    """One conflict between sessions that are to be merged."""

    type: MergeConflictType
    path: str
    """Path of the node in the session that the forks are merged into; of a node that is not there, its path in the
    fork."""
    sessions: tuple[int | None, ...]
    """Numbers of the forks, from 0, in the order in which they were given to `merge`; None for the session that they
    are merged into, with its changes since the fork."""
    chunks: tuple[tuple[int, int], ...] | None = None
    """The box of chunks concerned: for each dimension the first and the last coordinate; None where it is not about
    chunks. Not every chunk inside need be concerned."""

    def __str__(self) -> str:
        box = ""
        if self.chunks is not None:
            first, last = (list(edge) for edge in zip(*self.chunks, strict=True)) if self.chunks else ([], [])
            box = f" chunk {first}" if first == last else f" chunks {first} to {last}"
        return f"{self.type.replace('-', ' ')} at {self.path}{box} by {_names(self.sessions)}"


def _names(sessions: Sequence[int | None]) -> str:
    return " and ".join("this session" if number is None else f"fork {number}" for number in sessions)


class MergeFailedError(SessionStateError):
    """Forks, or a fork and the session that it is merged into, have changes that conflict; nothing was merged.

    Parameters
    ----------
    conflicts
        All that were found with the first fork that has any.
    """

    default_kind = ErrorKind.MERGE_FAILED

    def __init__(self, conflicts: Sequence[MergeConflict]) -> None:
        shown = "; ".join(map(str, conflicts[:3])) + (f"; and {len(conflicts) - 3} more" if len(conflicts) > 3 else "")
        hints = dict.fromkeys(_HINTS[conflict.type] for conflict in conflicts)
        super().__init__(f"cannot merge sessions: {shown}; {'; '.join(hints)}", ErrorKind.MERGE_FAILED)
        self.args: tuple[Any, ...] = (list(conflicts),)
        self._conflicts = list(conflicts)

    @property
    def conflicts(self) -> list[MergeConflict]:
        """All that were found with the first fork that has any."""
        return list(self._conflicts)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self._conflicts,))
