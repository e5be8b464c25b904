"""Values that describe a snapshot, and the differences between two snapshots."""

from __future__ import annotations

import html
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from datetime import datetime
from typing import Any, Protocol, TypeVar

from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.representation import Described

__all__ = ["AncestryGraph", "Changes", "Diff", "ManifestFileInfo", "SnapshotInfo"]  # noqa: F822 - see `__getattr__`


class _ReadLater(Described):
    """Base of values whose fields are filled when the first of them is read."""

    __slots__ = ("_fill",)

    def __getattr__(self, name: str) -> Any:
        # Only called for an attribute that is not set.
        if name not in type(self).__dataclass_fields__:  # type: ignore[attr-defined]
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        # A function that returns the fields, and its argument.
        read, key = object.__getattribute__(self, "_fill")
        for field_name, value in read(key).items():
            object.__setattr__(self, field_name, value)
        return object.__getattribute__(self, name)


_T = TypeVar("_T", bound=_ReadLater)


def read_later(cls: type[_T], read: Callable[[Any], Mapping[str, Any]], keys: Iterable[Any]) -> Iterator[_T]:
    """For each key a value whose fields are those that ``read`` returns for the key, once one of them is needed."""
    new, remember = cls.__new__, _ReadLater.__dict__["_fill"].__set__
    for key in keys:
        made = new(cls)
        remember(made, (read, key))
        yield made


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class SnapshotInfo(_ReadLater):
    """A snapshot as history lists it."""

    id: str
    parent_id: str | None
    """Id of the parent; None for the first snapshot, and if the parent has expired."""
    written_at: datetime
    """Time of the commit, with a time zone (UTC)."""
    message: str
    metadata: dict[str, Any] = field(default_factory=dict)
    """Metadata that was passed to the commit."""


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class ManifestFileInfo(Described):
    """A manifest object of a snapshot."""

    id: str
    size_bytes: int
    """Bytes of the object."""
    num_chunk_refs: int
    """References in it."""


class _Rows(Protocol):
    """Chunk coordinates: an integer array of shape (n, ndim), or a list of lists."""

    def __len__(self) -> int: ...


class Changes(Protocol):
    """The input of `Diff.of`, for example `icechunk.log.session.merge.diff.Changes`. Paths begin with ``/``."""

    @property
    def new_groups(self) -> Collection[str]: ...
    @property
    def new_arrays(self) -> Collection[str]: ...
    @property
    def deleted_groups(self) -> Collection[str]: ...
    @property
    def deleted_arrays(self) -> Collection[str]: ...
    @property
    def updated_groups(self) -> Collection[str]: ...
    @property
    def updated_arrays(self) -> Collection[str]: ...
    @property
    def updated_chunks(self) -> Mapping[str, _Rows]: ...
    @property
    def moved_nodes(self) -> Sequence[tuple[str, str]]: ...


_SETS = (
    ("new_groups", "Groups created"),
    ("new_arrays", "Arrays created"),
    ("updated_groups", "Group definitions updated"),
    ("updated_arrays", "Array definitions updated"),
    ("deleted_groups", "Groups deleted"),
    ("deleted_arrays", "Arrays deleted"),
)
_CHUNKS_SHOWN = 10


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class Diff:
    """Differences between two snapshots, or between a session and its base. Paths begin with ``/``."""

    new_groups: set[str] = field(default_factory=set)
    new_arrays: set[str] = field(default_factory=set)
    deleted_groups: set[str] = field(default_factory=set)
    deleted_arrays: set[str] = field(default_factory=set)
    updated_groups: set[str] = field(default_factory=set)
    """Groups whose attributes changed."""
    updated_arrays: set[str] = field(default_factory=set)
    """Arrays whose metadata changed."""
    updated_chunks: dict[str, list[list[int]]] = field(default_factory=dict)
    """Ascending coordinates, by array, of chunks that were written or deleted."""
    moved_nodes: list[tuple[str, str]] = field(default_factory=list)
    """(from, to), every moved descendant included; ascending by the target path, compared name by name."""

    @classmethod
    def of(cls, changes: Changes) -> Diff:
        """The same as plain Python values."""
        return cls(
            new_groups=set(changes.new_groups),
            new_arrays=set(changes.new_arrays),
            deleted_groups=set(changes.deleted_groups),
            deleted_arrays=set(changes.deleted_arrays),
            updated_groups=set(changes.updated_groups),
            updated_arrays=set(changes.updated_arrays),
            updated_chunks={path: _lists(rows) for path, rows in sorted(changes.updated_chunks.items())},
            moved_nodes=sorted(((s, t) for s, t in changes.moved_nodes), key=lambda move: move[1].split("/")),
        )

    def is_empty(self) -> bool:
        """Whether nothing changed."""
        return not (self.moved_nodes or self.updated_chunks or any(getattr(self, name) for name, _ in _SETS))

    def _sections(self) -> Iterable[tuple[str, list[str]]]:
        if self.moved_nodes:
            yield "Nodes moved/renamed", [f"{source} -> {target}" for source, target in self.moved_nodes]
        for name, title in _SETS:
            if paths := getattr(self, name):
                yield title, sorted(paths)
        if self.updated_chunks:
            lines = []
            for path, rows in sorted(self.updated_chunks.items()):
                lines.append(f"{path}:")
                lines += [f"    {row}" for row in rows[:_CHUNKS_SHOWN]]
                if len(rows) > _CHUNKS_SHOWN:
                    lines.append(f"    ... {len(rows) - _CHUNKS_SHOWN} more")
            yield "Chunks updated", lines

    def __repr__(self) -> str:
        blocks = ["\n".join([f"{title}:", *(f"    {line}" for line in lines)]) for title, lines in self._sections()]
        return "\n\n".join(blocks) + ("\n" if self.updated_chunks else "\n\n") if blocks else "No changes\n"

    def _repr_html_(self) -> str:
        blocks = [
            f'<details open="open"><summary>{html.escape(title)}</summary>'
            f"<pre>{html.escape(chr(10).join(lines))}</pre></details>"
            for title, lines in self._sections()
        ]
        header = '<div class="icechunk-header">icechunk.snapshots.Diff</div>'
        return f'<div class="icechunk-repr">{header}{"".join(blocks) or "No changes"}</div>'


def _lists(rows: Any) -> list[list[int]]:
    return rows.tolist() if hasattr(rows, "tolist") else [list(row) for row in rows]


def __getattr__(name: str) -> object:
    # The official library has it in this module; ours is above it, in `icechunk.inspection`.
    if name == "AncestryGraph":
        from icechunk.inspection.drawing import AncestryGraph

        return AncestryGraph
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
