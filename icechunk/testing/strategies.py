"""Hypothesis strategies for configurations, chunks, and points in a repository's time."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from hypothesis import strategies as st

from icechunk.config import (
    ManifestConfig,
    ManifestSplitCondition,
    ManifestSplitDimCondition,
    ManifestSplittingConfig,
    RepositoryConfig,
)
from icechunk.repository import Repository
from icechunk.storage.port import Storage

if TYPE_CHECKING:
    import zarr
    from zarr.core.metadata import ArrayV3Metadata

__all__ = [
    "chunk_coordinates",
    "chunk_paths",
    "chunk_slicers",
    "draw_older_than",
    "repository_configs",
    "splitting_configs",
]

_FEW_UPDATES = st.integers(min_value=1, max_value=5)
_MICROSECOND = datetime.timedelta(microseconds=1)


@st.composite
def splitting_configs(draw: st.DrawFn, *, arrays: Iterable[zarr.Array[ArrayV3Metadata]]) -> ManifestSplittingConfig:
    """A splitting configuration for (some of) these arrays, each named by its path or by its name.

    Dimensions are given by axis or by name, and the last of them may be "any other".
    """
    sizes: dict[Any, dict[Any, int]] = {}
    for array in arrays:
        if not array.ndim or not draw(st.booleans()):
            continue
        path, name = f"/{array.path}", array.path.rpartition("/")[2]
        condition = draw(
            st.sampled_from(
                [
                    ManifestSplitCondition.path_matches(f"^{path}$"),
                    ManifestSplitCondition.name_matches(f"^{name}$"),
                    ManifestSplitCondition.AnyArray(),
                ]
            )
        )
        sizes[condition] = _dimensions(draw, array)
    if not sizes:
        sizes[ManifestSplitCondition.AnyArray()] = {ManifestSplitDimCondition.Any(): draw(st.integers(1, 10))}
    return ManifestSplittingConfig.from_dict(sizes)


def _dimensions(draw: st.DrawFn, array: Any) -> dict[Any, int]:
    names = array.metadata.dimension_names or (None,) * array.ndim
    found: dict[Any, int] = {}
    for axis in draw(st.lists(st.integers(0, array.ndim - 1), min_size=1, max_size=array.ndim, unique=True)):
        ways: list[Any] = [ManifestSplitDimCondition.Axis(axis)]
        if names[axis]:
            ways.append(ManifestSplitDimCondition.DimensionName(names[axis]))
        found[draw(st.sampled_from(ways))] = draw(st.integers(1, 10))
    if draw(st.booleans()):
        found[ManifestSplitDimCondition.Any()] = draw(st.integers(1, 10))
    return found


@st.composite
def repository_configs(
    draw: st.DrawFn,
    num_updates_per_repo_info_file: st.SearchStrategy[int] = _FEW_UPDATES,
    inline_chunk_threshold_bytes: st.SearchStrategy[int] | None = None,
    splitting: st.SearchStrategy[ManifestSplittingConfig] | None = None,
    ic_module: ModuleType | None = None,
) -> RepositoryConfig:
    """A repository configuration.

    Parameters
    ----------
    num_updates_per_repo_info_file, inline_chunk_threshold_bytes, splitting
        Strategies for these options; the last two options stay unset if no strategy is given.
    ic_module
        Build the configuration with the classes of this package instead: another version of the library, say.
    """
    classes: Any = ic_module
    config = RepositoryConfig if classes is None else classes.RepositoryConfig
    manifest = ManifestConfig if classes is None else classes.ManifestConfig
    options: dict[str, Any] = {"num_updates_per_repo_info_file": draw(num_updates_per_repo_info_file)}
    if inline_chunk_threshold_bytes is not None:
        options["inline_chunk_threshold_bytes"] = draw(inline_chunk_threshold_bytes)
    if splitting is not None:
        options["manifest"] = manifest(splitting=draw(splitting))
    return cast(RepositoryConfig, config(**options))


@st.composite
def chunk_coordinates(draw: st.DrawFn, numblocks: tuple[int, ...]) -> tuple[int, ...]:
    """A chunk of a grid with that many chunks along each axis."""
    return tuple(draw(st.integers(0, count - 1)) for count in numblocks)


@st.composite
def chunk_slicers(draw: st.DrawFn, numblocks: tuple[int, ...], chunk_shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Slices that select one whole chunk of a regular grid."""
    coords = draw(chunk_coordinates(numblocks))
    return tuple(slice(at * size, (at + 1) * size) for at, size in zip(coords, chunk_shape, strict=True))


@st.composite
def chunk_paths(draw: st.DrawFn, numblocks: tuple[int, ...]) -> str:
    """A chunk of a grid as its key spells it, without array and ``c``: ``"0/1"``."""
    return "/".join(map(str, draw(chunk_coordinates(numblocks))))


def draw_older_than(data: st.DataObject, storage: Storage, repo: Repository) -> datetime.datetime:
    """A cutoff for expiration or collection, just after an existing object or snapshot, so that it makes a difference.

    Both the times of objects and the times in snapshots are used.
    """
    written = {
        info.created_at
        for prefix in ("snapshots", "transactions")
        for info in storage.list_objects_metadata(prefix=prefix)
    }
    for branch in sorted(repo.list_branches()):
        written.update(snapshot.written_at for snapshot in repo.ancestry(branch=branch))
    return data.draw(st.sampled_from(sorted(written)), label="older_than") + _MICROSECOND
