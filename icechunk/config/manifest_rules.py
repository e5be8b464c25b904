"""The meaning of splitting and preload settings for the arrays of a snapshot.

Regular expressions are Python's here (`patterns`) and Rust's in the official library; they agree on nearly everything
that people write for paths. One that cannot be compiled matches nothing, as one that Rust cannot compile does there: it
may be in a configuration that the other library keeps, and must not stop work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from typing import Any, Final, TypeAlias

from icechunk.config import manifest as m
from icechunk.config.patterns import Pattern, PatternError
from icechunk.format.ids import ObjectId
from icechunk.format.snapshot.nodes import array_paths
from icechunk.format.values import NodeSnapshot, Snapshot

__all__ = ["manifests_to_preload", "tile_shapes"]

_LOG: Final = logging.getLogger(__name__)
_WHOLE: Final = m.DEFAULT_SPLIT_SIZE

_TileShapes: TypeAlias = Callable[[NodeSnapshot], tuple[int, ...] | None]


@lru_cache(maxsize=256)
def _compiled(regex: str) -> Pattern | None:
    try:
        return Pattern(regex)
    except PatternError as error:
        _LOG.warning("the regular expression %r of a manifest condition matches nothing: %s", regex, error)
        return None


def _matches(regex: str, text: str) -> bool:
    pattern = _compiled(regex)
    return pattern is not None and pattern.search(text)


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


# --- splitting ------------------------------------------------------------------------------------------------


def tile_shapes(config: m.ManifestSplittingConfig | None) -> _TileShapes | None:
    """The function that gives the chunks along each dimension of one manifest of an array.

    The first rule whose condition holds counts, and in it for each dimension the first pair whose condition holds; a
    dimension for which none holds is not split. The function gives None for an array that no rule is for; it is itself
    None where there are no rules.
    """
    rules = list((config.split_sizes if config is not None else None) or ())
    if not rules:
        return None

    def shape(node: NodeSnapshot) -> tuple[int, ...] | None:
        for condition, sizes in rules:
            if _holds(condition, node.path):
                return _sizes(list(sizes), node)
        return None

    return shape


def _holds(condition: m.ManifestSplitCondition, path: str) -> bool:
    match condition:
        case m.SplitOr():
            return any(_holds(c, path) for c in condition.conditions)
        case m.SplitAnd():
            return all(_holds(c, path) for c in condition.conditions)
        case m.SplitPathMatches():
            return _matches(condition.regex, path)
        case m.SplitNameMatches():
            return _matches(condition.regex, _name(path))
    return True


def _sizes(pairs: Sequence[tuple[Any, int]], node: NodeSnapshot) -> tuple[int, ...]:
    names = node.dimension_names or (None,) * len(node.shape)
    return tuple(
        next((size for condition, size in pairs if _is_for(condition, axis, name)), _WHOLE)
        for axis, name in enumerate(names)
    )


def _is_for(condition: Any, axis: int, name: str | None) -> bool:
    match condition:
        case m.ManifestSplitDimCondition.Axis():
            return condition.axis == axis
        case m.ManifestSplitDimCondition.DimensionName():
            return name is not None and _matches(condition.regex, name)
    return True


# --- preloading -----------------------------------------------------------------------------------------------

# The official default, as found by tests of it: usual names of coordinates, whole and in lower case.
_COORDINATES: Final = (
    r"^t$",
    r"^(time|min|hour|day|week|month|year)[0-9]*$",
    r"^(z|nav_lev|gdep|lv_|o*lev|bottom_top|sigma|height|hght|altitude|depth|isobaric|pres|isotherm)[a-z_]*[0-9]*$",
    r"^(y|j|nlat|rlat|nj)$",
    r"^y?(nav_lat|lat|gphi)[a-z0-9]*$",
    r"^(x|i|nlon|rlon|ni)$",
    r"^x?(nav_lon|lon|glam)[a-z0-9]*$",
)


@cache
def _coordinate_like() -> m.ManifestPreloadCondition:
    names = [m.ManifestPreloadCondition.name_matches(regex) for regex in _COORDINATES]
    return m.ManifestPreloadCondition.and_conditions(
        [m.ManifestPreloadCondition.or_conditions(names), m.ManifestPreloadCondition.num_refs(None, 1001)]
    )


def manifests_to_preload(config: m.ManifestPreloadConfig | None, snapshot: Snapshot) -> Iterator[ObjectId]:
    """Ids of the manifests that a session on a snapshot fetches ahead of need, each once.

    The first ``max_arrays_to_scan`` arrays are looked at, in the order of their paths; a manifest that would bring the
    references together above ``max_total_refs`` is passed over.
    """
    config = config or m.ManifestPreloadConfig()
    condition = _coordinate_like() if config.preload_if is None else config.preload_if
    room = m.DEFAULT_MAX_TOTAL_REFS if config.max_total_refs is None else config.max_total_refs
    arrays = m.DEFAULT_MAX_ARRAYS_TO_SCAN if config.max_arrays_to_scan is None else config.max_arrays_to_scan
    chosen: set[ObjectId] = set()
    if not snapshot.manifest_files:
        return
    for path in array_paths(snapshot.nodes):
        if arrays <= 0 or room <= 0:
            return
        arrays -= 1
        if not _wanted(condition, path, None):
            # Most arrays: they are not decoded for this.
            continue
        node = snapshot.nodes[path]
        # By number of references: the manifests of one array often have as many.
        wanted: dict[int, bool] = {}
        for ref in node.manifests:
            file = snapshot.manifest_files.get(ref.object_id)
            if file is None or file.num_chunk_refs > room or ref.object_id in chosen:
                continue
            count = file.num_chunk_refs
            if count not in wanted:
                wanted[count] = _wanted(condition, node.path, count)
            if wanted[count]:
                chosen.add(ref.object_id)
                room -= file.num_chunk_refs
                yield ref.object_id


def _wanted(condition: m.ManifestPreloadCondition, path: str, refs: int | None) -> bool:
    """Whether a manifest with so many references, of the array at a path, is preloaded; None: with any number of them,
    and True where that is not certain."""
    match condition:
        case m.PreloadOr():
            return any(_wanted(c, path, refs) for c in condition.conditions)
        case m.PreloadAnd():
            return all(_wanted(c, path, refs) for c in condition.conditions)
        case m.PreloadPathMatches():
            return _matches(condition.regex, path)
        case m.PreloadNameMatches():
            return _matches(condition.regex, _name(path))
        case m.PreloadNumRefs() if refs is not None:
            below = condition.to_refs is None or refs < condition.to_refs
            return below and refs >= (condition.from_refs or 0)
        case m.PreloadFalse():
            return False
    return True
