"""Values that describe conflicts, and the choices for solving them. Detection is `icechunk.log`'s."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from icechunk.errors import ConflictError, ErrorKind
from icechunk.runtime.checks import boolean, instance_of, text
from icechunk.runtime.representation import Described, IntLikeEnum

__all__ = [
    "BasicConflictSolver",
    "Conflict",
    "ConflictDetector",
    "ConflictSolver",
    "ConflictType",
    "RebaseFailedError",
    "VersionSelection",
]


class _ByIdentity(IntLikeEnum):
    """The official library compares these with themselves only, not with numbers."""

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return hash(self.value)


class VersionSelection(_ByIdentity):
    """Whose chunk stays when both sides wrote it."""

    Fail = 0
    UseOurs = 1
    UseTheirs = 2


class ConflictType(_ByIdentity):
    """What two sides did that does not go together."""

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
    """Of the node."""
    conflicted_chunks: list[list[int]] | None = None
    """Coordinates, where chunks are concerned."""

    def __post_init__(self) -> None:
        instance_of(ConflictType)("Conflict.conflict_type", self.conflict_type)
        text("Conflict.path", self.path)


class ConflictSolver:
    """What to do about conflicts while rebasing. Use one of the subclasses."""

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> ConflictSolver:
        if cls is ConflictSolver:
            raise TypeError("cannot create 'ConflictSolver' instances; use BasicConflictSolver or ConflictDetector")
        return object.__new__(cls)


@dataclass(frozen=True, slots=True, kw_only=True)
class BasicConflictSolver(ConflictSolver):
    """Solves what can be solved by rule; the rest fails the rebase."""

    on_chunk_conflict: VersionSelection = VersionSelection.UseOurs
    """Whose chunk stays when both sides wrote it."""
    fail_on_delete_of_updated_array: bool = False
    """Otherwise the deletion wins."""
    fail_on_delete_of_updated_group: bool = False
    """Otherwise the deletion wins."""

    def __post_init__(self) -> None:
        instance_of(VersionSelection)("BasicConflictSolver.on_chunk_conflict", self.on_chunk_conflict)
        boolean("BasicConflictSolver.fail_on_delete_of_updated_array", self.fail_on_delete_of_updated_array)
        boolean("BasicConflictSolver.fail_on_delete_of_updated_group", self.fail_on_delete_of_updated_group)


@dataclass(frozen=True, slots=True)
class ConflictDetector(ConflictSolver):
    """Solves nothing: any conflict fails the rebase."""


class RebaseFailedError(ConflictError):
    """The session's changes do not go together with the commits that landed since; nothing was changed.

    Look at ``conflicts``, mend them in the session (delete or rewrite the nodes concerned) and rebase again, or
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
        shown = ", ".join(sorted({f"{str(c.conflict_type).lower()} at {c.path}" for c in conflicts})[:3])
        super().__init__(
            message=f"rebase failed on snapshot {snapshot}: {len(conflicts)} conflicts found ({shown}); "
            "mend them in the session, or rebase with a solver that settles them"
        )
        # The arguments are API: the official library's error has these two.
        self.args = (snapshot, conflicts)
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
