"""Splitting settings: which manifests there are, and that nothing else depends on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import icechunk
from icechunk.config.manifest_rules import tile_shapes
from icechunk.format.ids import NodeId
from icechunk.format.values import DimensionShape, NodeKind, NodeSnapshot
from icechunk.log.session.plan.compaction import EVERYTHING, Policy
from tests.inside import content_of
from tests.log.session.builders import Repo, array_json, check_snapshot, compacted, native

Condition = icechunk.ManifestSplitCondition
Dim = icechunk.ManifestSplitDimCondition
ANY = Condition.AnyArray()


def array(path: str = "/g/a", names: tuple[str | None, ...] | None = ("t", "x")) -> NodeSnapshot:
    return NodeSnapshot(
        id=NodeId(b"12345678"),
        path=path,
        kind=NodeKind.ARRAY,
        user_data=b"{}",
        shape=(DimensionShape(10, 10), DimensionShape(10, 10)),
        dimension_names=names,
    )


def shape(rules: dict, node: NodeSnapshot | None = None) -> tuple[int, ...] | None:  # type: ignore[type-arg]
    shapes = tile_shapes(icechunk.ManifestSplittingConfig.from_dict(rules))
    return None if shapes is None else shapes(node or array())


def test_the_first_rule_and_in_it_the_first_pair_that_hold_count() -> None:
    assert shape({Condition.name_matches("^a$"): {Dim.Axis(0): 6}, ANY: {Dim.Any(): 2}}) == (6, EVERYTHING)
    assert shape({Condition.name_matches("b"): {Dim.Axis(0): 6}, ANY: {Dim.Any(): 2}}) == (2, 2)
    assert shape({ANY: {Dim.DimensionName("t"): 4, Dim.Axis(0): 3, Dim.Any(): 5}}) == (4, 5)
    assert shape({ANY: {Dim.Any(): 5, Dim.Axis(0): 3}}) == (5, 5)
    assert shape({ANY: {Dim.Axis(7): 5}}) == (EVERYTHING, EVERYTHING)
    assert shape({ANY: {}}) == (EVERYTHING, EVERYTHING)
    assert shape({Condition.name_matches("b"): {Dim.Any(): 5}}) is None
    assert shape({}) is None


def test_conditions_look_at_names_and_whole_paths() -> None:
    five = {Dim.Any(): 5}
    assert shape({Condition.path_matches("^/g/a$"): five}) == (5, 5)
    assert shape({Condition.name_matches("g"): five}) is None
    assert shape({Condition.name_matches("a") & Condition.path_matches("/h"): five}) is None
    assert shape({Condition.name_matches("z") | Condition.path_matches("/g"): five}) == (5, 5)
    assert shape({Condition.or_conditions([]): five}) is None
    assert shape({Condition.and_conditions([]): five}) == (5, 5)
    assert shape({ANY: {Dim.DimensionName(""): 5}}, array(names=(None, "x"))) == (EVERYTHING, 5)
    assert shape({ANY: {Dim.DimensionName("x"): 5}}, array(names=None)) == (EVERYTHING, EVERYTHING)


def test_an_expression_that_does_not_compile_matches_nothing_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert shape({Condition.name_matches("(a-unique-one"): {Dim.Any(): 5}, ANY: {Dim.Any(): 2}}) == (2, 2)
    assert "(a-unique-one" in caplog.text


def configured(rules: dict | None, layout: Any) -> icechunk.RepositoryConfig:  # type: ignore[type-arg]
    options = icechunk.RepositoryConfig.default()
    options.inline_chunk_threshold_bytes = 0
    options.engine = icechunk.config.EngineConfig(layout=layout)
    if rules is not None:
        options.manifest = icechunk.ManifestConfig(splitting=icechunk.ManifestSplittingConfig.from_dict(rules))
    return options


@pytest.mark.parametrize("layout", ["log", "repo", "refs"])
async def test_arrays_with_a_rule_have_manifests_of_their_own_on_every_layout(layout: str) -> None:
    rules = {Condition.name_matches("split"): {Dim.Axis(0): 3}}
    repo = await icechunk.Repository.create_async(icechunk.in_memory_storage(), configured(rules, layout))
    session = await repo.writable_session_async("main")
    for name in ("split", "split2", "whole", "whole2"):
        made = await zarr.api.asynchronous.create_array(session.store, name=name, shape=(7,), chunks=(1,), dtype="i4")
        await made.setitem(slice(None), np.arange(1, 8))
    await session.commit_async("written")
    snapshot = content_of(session).log.base
    boxes = {path: [ref.extents for ref in node.manifests] for path, node in snapshot.nodes.items()}
    assert boxes["/split"] == boxes["/split2"] == [((0, 3),), ((3, 6),), ((6, 7),)]
    assert boxes["/whole"] == [((0, 7),)]
    shared = snapshot.nodes["/whole"].manifests[0].object_id == snapshot.nodes["/whole2"].manifests[0].object_id
    assert shared is (layout == "log")
    assert len(snapshot.manifest_files) == (7 if layout == "log" else 8)


# --- any splitting reads like none ------------------------------------------------------------------------------

SIDE = 7
TILES = st.none() | st.tuples(st.integers(1, 9), st.integers(1, 9))
POINTS = st.lists(st.tuples(st.integers(0, SIDE - 1), st.integers(0, SIDE - 1)), max_size=12, unique=True)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "delete", "resize", "rewrite"]),
        TILES,
        POINTS,
        st.tuples(st.integers(1, SIDE), st.integers(1, SIDE)),
    ),
    max_size=8,
)


def constantly(tile: tuple[int, ...]) -> Callable[[NodeSnapshot], tuple[int, ...]]:
    return lambda node: tile


@settings(max_examples=60)
@given(STEPS)
def test_the_same_values_are_read_under_any_splitting_and_after_its_changes(steps: list) -> None:  # type: ignore[type-arg]
    from icechunk.log.session.plan.compaction import plan

    repo = Repo(Policy.explicit())
    log = repo.log()
    log.set_metadata("/a", array_json((SIDE, SIDE)))
    repo.commit(log)
    model: dict[tuple[int, ...], bytes] = {}
    grid = (SIDE, SIDE)
    for number, (what, tile, points, size) in enumerate(steps):
        repo.policy = Policy.explicit(None if tile is None else constantly(tile))
        log = repo.log()
        node = log.node("/a")
        assert node is not None
        inside = np.array([p for p in points if p[0] < grid[0] and p[1] < grid[1]], np.uint32).reshape(-1, 2)
        if what == "write":
            refs = native(inside, 1000 * (number + 1))
            log.set_refs(node, refs)
            model |= {tuple(c): refs.chunk_id[i].tobytes() for i, c in enumerate(inside.tolist())}
        elif what == "delete":
            log.delete_chunks(node, inside)
            for c in inside.tolist():
                model.pop(tuple(c), None)
        elif what == "resize":
            log.set_metadata("/a", array_json(size))
            grid = size
            model = {c: i for c, i in model.items() if c[0] < grid[0] and c[1] < grid[1]}
        planned = plan(log, repo.policy, everything=what == "rewrite")
        done = compacted(planned, {i: repo.manifests[i] for i in planned.manifests_to_read}, repo.new_object_id)
        repo.snapshot = done.snapshot
        repo.manifests.update({m.id: m for m in done.manifests})
        assert check_snapshot(repo) == len(model)
        now = repo.snapshot.nodes["/a"]
        for coords, chunk_id in model.items():
            found = repo.committed(now, coords)
            assert found is not None
            assert found.chunk_id == chunk_id
        if tile is not None and what == "rewrite":
            cells = {(c[0] // tile[0], c[1] // tile[1]) for c in model}
            assert len(now.manifests) == len(cells)
