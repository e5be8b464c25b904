"""Hypothesis strategies for trees of groups and arrays, and for moves of their nodes.

Names resemble each other on purpose, as ``EC-Earth3`` and ``EC-Earth3-Veg`` do, so that code that confuses a path with
a prefix of it fails. Moves are pairs of absolute paths; a move that must fail has a pattern of its message.
"""

from __future__ import annotations

import re
from typing import Any, Literal, TypeAlias

import numpy as np
import zarr.testing.strategies as zrst
from hypothesis import strategies as st

from icechunk.testing.models import ArrayNode, GroupNode, Node
from icechunk.testing.utils import update_paths_after_move

__all__ = [
    "ERR_MISSING_PARENT",
    "ERR_OVERWRITE",
    "ERR_PARENT_NOT_GROUP",
    "ERR_SELF_OR_DESCENDANT",
    "ERR_SOURCE_MISSING",
    "InvalidMoveReason",
    "MixedMove",
    "absolute",
    "affix",
    "child_names_at",
    "fresh_name",
    "fresh_names",
    "invalid_move",
    "invalid_moves",
    "is_descendant",
    "separators",
    "similar_name",
    "skeletons",
    "tree_and_invalid_moves",
    "tree_and_mixed_moves",
    "tree_and_valid_moves",
    "trees",
    "valid_and_invalid_moves",
    "valid_move",
    "valid_moves",
    "wrap_tolerant",
]

InvalidMoveReason: TypeAlias = Literal[
    "self", "descendant", "missing_parent", "parent_not_group", "overwrite", "source_missing"
]
MixedMove: TypeAlias = tuple[str, str, str | None]
"""Source, destination, and the pattern of the message where the move must fail."""

ERR_SELF_OR_DESCENDANT = "into itself or its own descendant"
ERR_OVERWRITE = "overwrite existing node"
ERR_MISSING_PARENT = "destination's parent group"
ERR_SOURCE_MISSING = "node not found|could not create path"
ERR_PARENT_NOT_GROUP = "is an array, not a group"
_PATTERNS: dict[InvalidMoveReason, str] = {
    "self": ERR_SELF_OR_DESCENDANT,
    "descendant": ERR_SELF_OR_DESCENDANT,
    "missing_parent": ERR_MISSING_PARENT,
    "parent_not_group": ERR_PARENT_NOT_GROUP,
    "overwrite": ERR_OVERWRITE,
    "source_missing": ERR_SOURCE_MISSING,
}

affix: st.SearchStrategy[str] = st.text(zrst.zarr_key_chars, min_size=1, max_size=3)
separators: st.SearchStrategy[str] = st.sampled_from(["_", "-", "."])
_FEW = st.integers(min_value=1, max_value=10)
_LEAVES = st.integers(min_value=5, max_value=50)
_CHILDREN = st.integers(min_value=1, max_value=4)
_SHARES = st.floats(min_value=0.0, max_value=1.0)
_ARRAY = ArrayNode(shape=(1,), dtype=np.dtype("int32"))


# -- names -------------------------------------------------------------------------------------------------------------


def _is_name(text: str) -> bool:
    # Names that zarr refuses for a node.
    return text.strip(".") != "" and not text.startswith("__") and text not in ("zarr.json", "c")


def similar_name(non_sibling_names: set[str], sibling_names: set[str]) -> st.SearchStrategy[str]:
    """A name that resembles existing ones: that of a node elsewhere, or that of a sibling with a suffix."""
    choices = [st.sampled_from(sorted(non_sibling_names))] if non_sibling_names else []
    if sibling_names:
        parts = st.tuples(st.sampled_from(sorted(sibling_names)), separators, affix)
        choices += [parts.map("".join), parts.map(lambda part: "".join(reversed(part)))]
    return st.one_of(choices).filter(_is_name)


def fresh_name(pool: set[str], exclude: set[str]) -> st.SearchStrategy[str]:
    """A name that is not in ``exclude``, and is often in ``pool`` or resembles a name in it."""
    names = st.one_of(zrst.node_names, similar_name(pool, pool)) if pool else zrst.node_names
    return names.filter(lambda name: _is_name(name) and name not in exclude)


@st.composite
def fresh_names(draw: st.DrawFn, pool: set[str], exclude: set[str], n: int) -> list[str]:
    """``n`` different names, as from `fresh_name`."""
    names: list[str] = []
    for _ in range(n):
        names.append(draw(fresh_name(pool, exclude.union(names))))
    return names


# -- trees -------------------------------------------------------------------------------------------------------------


def _numbered(children: list[Node]) -> GroupNode:
    return GroupNode({str(number): child for number, child in enumerate(children)})


def skeletons(*, max_leaves: int = 50, max_children: int = 4) -> st.SearchStrategy[GroupNode]:
    """Trees whose nodes are only numbered."""
    leaves: st.SearchStrategy[Node] = st.sampled_from([_ARRAY, GroupNode()])
    nodes = st.recursive(
        leaves,
        lambda inner: st.lists(inner, min_size=1, max_size=max_children).map(_numbered),
        max_leaves=max_leaves,
    )
    return nodes.map(lambda node: node if isinstance(node, GroupNode) and node.children else _numbered([node]))


@st.composite
def trees(
    draw: st.DrawFn,
    *,
    max_leaves: st.SearchStrategy[int] = _LEAVES,
    max_children: st.SearchStrategy[int] = _CHILDREN,
) -> GroupNode:
    """A tree of groups and arrays with names that resemble each other."""
    pool: set[str] = set()

    def named(group: GroupNode) -> GroupNode:
        names: list[str] = []
        for _ in group.children:
            names.append(draw(_member_name(pool, set(names))))
        pool.update(names)
        children: dict[str, Node] = {}
        for name, child in zip(names, group.children.values(), strict=True):
            children[name] = named(child) if isinstance(child, GroupNode) else child
        return GroupNode(children)

    return named(draw(skeletons(max_leaves=draw(max_leaves), max_children=draw(max_children))))


def _member_name(pool: set[str], siblings: set[str]) -> st.SearchStrategy[str]:
    if not pool and not siblings:
        return fresh_name(set(), set())
    like = similar_name(pool - siblings, siblings).filter(lambda name: name not in siblings)
    return st.one_of(fresh_name(set(), siblings), like)


def child_names_at(parent: str, all_paths: set[str]) -> set[str]:
    """Names directly below a path, among paths without leading slash.

    >>> sorted(child_names_at("foo", {"foo/a", "foo/b/c", "bar"}))
    ['a', 'b']
    """
    prefix = f"{parent}/" if parent else ""
    return {path.removeprefix(prefix).split("/")[0] for path in all_paths if path.startswith(prefix)} - {""}


def is_descendant(path: str, ancestor: str) -> bool:
    """Whether one path is below another, and not the same."""
    return path != ancestor and (not ancestor or path.startswith(f"{ancestor}/"))


def absolute(path: str) -> str:
    """A path of a tree in the form that sessions use: ``"/"`` for the root."""
    return f"/{path}"


def wrap_tolerant(pattern: str) -> str:
    """The pattern, in which every space matches any white space, also a line break with its decoration."""
    return re.sub(" +", r"\\s+\\|?\\s*", pattern)


# -- moves -------------------------------------------------------------------------------------------------------------


def _below(parent: str, name: str) -> str:
    return f"{parent}/{name}" if parent else name


def _invalid_move_eligibility(all_nodes: set[str], all_arrays: set[str]) -> list[InvalidMoveReason]:
    movable = all_nodes - {""}
    reasons: list[InvalidMoveReason] = ["self", "descendant", "source_missing"]
    if len(movable) > 1:
        reasons.append("overwrite")
    if movable:
        reasons.append("missing_parent")
    if any(_outside(array, movable) for array in all_arrays):
        reasons.append("parent_not_group")
    return reasons


def _outside(path: str, nodes: set[str]) -> set[str]:
    """Nodes that are neither equal to nor above a target at or below ``path``."""
    return {node for node in nodes if node != path and not is_descendant(path, node)}


@st.composite
def invalid_move(
    draw: st.DrawFn,
    all_nodes: set[str],
    all_arrays: set[str],
    name_pool: set[str],
    *,
    eligible: list[InvalidMoveReason] | None = None,
) -> tuple[str, str, str]:
    """A move that must fail.

    Parameters
    ----------
    all_nodes, all_arrays
        Paths without leading slash.
    name_pool
        Names that there are.
    eligible
        The ways to fail that may be drawn; None: those that the tree allows.

    Returns
    -------
    tuple
        From and to, absolute, and a pattern that the message matches.
    """
    reasons = _invalid_move_eligibility(all_nodes, all_arrays) if eligible is None else eligible
    reason = draw(st.sampled_from(reasons))
    movable = sorted(all_nodes - {""})
    anything = st.sampled_from([*movable, ""])
    new = draw(fresh_name(name_pool, name_pool))
    match reason:
        case "self":
            source = target = draw(anything)
        case "descendant":
            source = draw(anything)
            target = _below(source, new)
        case "source_missing":
            source, target = _below(new, draw(fresh_name(name_pool, {new}))), draw(fresh_name(name_pool, {new}))
        case "missing_parent":
            source = draw(st.sampled_from(movable))
            target = _below(new, draw(fresh_name(name_pool, set())))
        case "overwrite":
            source = draw(st.sampled_from(movable))
            others = [node for node in movable if node != source and not is_descendant(node, source)]
            # A parent may be overwritten by its child; if everything else is below the source, the roles are swapped.
            if not others:
                source, others = next(node for node in movable if node != source), [source]
            target = draw(st.sampled_from(others))
        case "parent_not_group":
            fitting = [array for array in sorted(all_arrays) if _outside(array, set(movable))]
            array = draw(st.sampled_from(fitting))
            source = draw(st.sampled_from(sorted(_outside(array, set(movable)))))
            target = _below(array, new)
    return absolute(source), absolute(target), _PATTERNS[reason]


@st.composite
def valid_move(draw: st.DrawFn, all_nodes: set[str], all_groups: set[str], name_pool: set[str]) -> tuple[str, str]:
    """A move that must succeed; absolute paths.

    Parameters
    ----------
    all_nodes, all_groups
        Paths without leading slash; the root, ``""``, among the groups.
    name_pool
        Names that there are.
    """
    source = draw(st.sampled_from(sorted(all_nodes - {""})))
    parents = sorted(group for group in all_groups if group != source and not is_descendant(group, source))
    parent = draw(st.sampled_from(parents))
    name = draw(fresh_name(name_pool, child_names_at(parent, all_nodes)))
    return absolute(source), absolute(_below(parent, name))


@st.composite
def valid_and_invalid_moves(
    draw: st.DrawFn,
    tree: GroupNode,
    n_moves: st.SearchStrategy[int] = _FEW,
    p_invalid: st.SearchStrategy[float] = _SHARES,
) -> list[MixedMove]:
    """A sequence of moves, some of which must fail and change nothing.

    Parameters
    ----------
    p_invalid
        The share of those, one number for the whole sequence.
    """
    arrays, groups = set(tree.arrays()), set(tree.groups())
    share = draw(p_invalid)
    moves: list[MixedMove] = []
    for _ in range(draw(n_moves)):
        nodes = arrays | groups
        pool = {part for path in nodes for part in path.split("/")}
        if not nodes or draw(st.floats(min_value=0.0, max_value=1.0, exclude_max=True)) < share:
            moves.append(draw(invalid_move(nodes, arrays, pool)))
            continue
        source, target = draw(valid_move(nodes, groups | {""}, pool))
        moves.append((source, target, None))
        arrays, groups = update_paths_after_move(source[1:], target[1:], arrays, groups)
    return moves


@st.composite
def valid_moves(draw: st.DrawFn, tree: GroupNode, n_moves: st.SearchStrategy[int] = _FEW) -> list[tuple[str, str]]:
    """A sequence of moves that must all succeed; empty if the tree has no nodes."""
    if not tree.children:
        return []
    drawn = draw(valid_and_invalid_moves(tree, n_moves, st.just(0.0)))
    return [(source, target) for source, target, _ in drawn]


@st.composite
def invalid_moves(
    draw: st.DrawFn, tree: GroupNode, n_moves: st.SearchStrategy[int] = _FEW
) -> list[tuple[str, str, str]]:
    """Moves that must all fail, with the patterns of their messages."""
    drawn = draw(valid_and_invalid_moves(tree, n_moves, st.just(1.0)))
    return [(source, target, str(pattern)) for source, target, pattern in drawn]


def _tree(
    draw: st.DrawFn, max_leaves: st.SearchStrategy[int] | None, max_children: st.SearchStrategy[int] | None
) -> GroupNode:
    options: dict[str, Any] = {"max_leaves": max_leaves, "max_children": max_children}
    return draw(trees(**{name: value for name, value in options.items() if value is not None}))


@st.composite
def tree_and_valid_moves(
    draw: st.DrawFn,
    max_leaves: st.SearchStrategy[int] | None = None,
    max_children: st.SearchStrategy[int] | None = None,
    n_moves: st.SearchStrategy[int] = _FEW,
) -> tuple[GroupNode, list[tuple[str, str]]]:
    """A tree, and moves from `valid_moves`."""
    tree = _tree(draw, max_leaves, max_children)
    return tree, draw(valid_moves(tree, n_moves))


@st.composite
def tree_and_invalid_moves(
    draw: st.DrawFn,
    max_leaves: st.SearchStrategy[int] | None = None,
    max_children: st.SearchStrategy[int] | None = None,
    n_moves: st.SearchStrategy[int] = _FEW,
) -> tuple[GroupNode, list[tuple[str, str, str]]]:
    """A tree, and moves from `invalid_moves`."""
    tree = _tree(draw, max_leaves, max_children)
    return tree, draw(invalid_moves(tree, n_moves))


@st.composite
def tree_and_mixed_moves(
    draw: st.DrawFn,
    max_leaves: st.SearchStrategy[int] | None = None,
    max_children: st.SearchStrategy[int] | None = None,
    n_moves: st.SearchStrategy[int] = _FEW,
    p_invalid: st.SearchStrategy[float] = _SHARES,
) -> tuple[GroupNode, list[MixedMove]]:
    """A tree, and moves from `valid_and_invalid_moves`."""
    tree = _tree(draw, max_leaves, max_children)
    return tree, draw(valid_and_invalid_moves(tree, n_moves, p_invalid))
