"""Rows in layers, seen as one list; and geometry that cuts very many of them without much memory."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.format.values import ChunkRefs
from icechunk.log.session import array_fold
from icechunk.log.session import extents as boxes
from icechunk.log.session.array_fold import layered as spread
from icechunk.log.session.columns import concat, normalized, trimmed
from icechunk.log.session.extents import bounds, by_tile, overlap, slabs
from icechunk.log.session.plan import tiles
from icechunk.log.session.plan.compaction import Policy, plan
from tests.log.session.builders import Repo, array_json, compacted, native

RANK_AND_LAYERS = st.integers(1, 3).flatmap(
    lambda rank: st.lists(
        st.lists(st.tuples(*[st.integers(0, 6)] * rank), min_size=1, max_size=12, unique=True), min_size=1, max_size=6
    )
)


def same_rows(a: ChunkRefs, b: ChunkRefs) -> bool:
    a, b = trimmed(a), trimmed(b)
    columns = ("coords", "kind", "offset", "length", "chunk_id")
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in columns)


@settings(max_examples=80)
@given(RANK_AND_LAYERS, st.data())
def test_layers_seen_as_one_list_equal_the_merged_layer(
    points: list[list[tuple[int, ...]]], data: st.DataObject
) -> None:
    parts = [normalized(native(np.array(some, np.uint32), first=1000 * (i + 1))) for i, some in enumerate(points)]
    merged = normalized(concat(parts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_fold, "_SAMPLE", 2)
        patch.setattr(array_fold, "_SLAB_SAMPLES", 2)
        seen = spread(parts)
    assert len(seen) == len(merged)
    assert np.array_equal(seen.coords, merged.coords)
    assert np.array_equal(seen.kinds(), merged.kind)
    rows = np.array(data.draw(st.lists(st.integers(0, len(merged) - 1), max_size=10)), np.intp)
    assert same_rows(seen.take(rows), merged.take(rows))
    first = data.draw(st.integers(0, len(merged) - 1))
    run = np.arange(first, len(merged), dtype=np.uint32)
    assert same_rows(seen.take(run), merged.take(run))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(merged), max_size=len(merged))), np.bool_)
    some = seen.where(mask)
    assert np.array_equal(some.coords, merged.coords[mask])
    assert same_rows(some.take(np.arange(len(some))), merged.take(mask))


def test_selected_rows_do_not_keep_their_layer_alive() -> None:
    part = native(np.arange(1000, dtype=np.uint32)[:, None], first=1)
    later = native(np.arange(1000, 2000, dtype=np.uint32)[:, None], first=5000)
    taken = spread([part, later]).take(np.arange(990, 1010))
    assert taken.coords[:, 0].tolist() == list(range(990, 1010))
    assert not any(np.shares_memory(taken.offset, column) for column in (part.offset, later.offset))


def test_a_column_of_one_value_takes_no_room_however_rows_are_taken_and_joined() -> None:
    parts = []
    for first in (0, 100):
        part = native(np.arange(first, first + 100, dtype=np.uint32)[:, None], first=1)
        parts.append(replace(part, chunk_id=np.broadcast_to(part.chunk_id[0], 100)))
    for refs in (concat(parts), spread(parts).take(np.arange(50, 150)), parts[0].take(np.array([3, 1]))):
        assert refs.chunk_id.strides == (0,)
        assert len(refs.chunk_id) == len(refs)
        assert refs.row(1).chunk_id == parts[0].row(0).chunk_id


@settings(max_examples=80)
@given(st.integers(1, 3), st.integers(1, 9), st.data())
def test_slabs_are_runs_of_rows_in_disjoint_boxes(rank: int, most: int, data: st.DataObject) -> None:
    points = data.draw(st.lists(st.tuples(*[st.integers(0, 5)] * rank), max_size=60, unique=True))
    coords = np.array(sorted(points), np.uint32).reshape(-1, rank)
    runs = slabs(coords, most)
    assert [run.start for run in runs] + [len(coords)] == [0, *(run.stop for run in runs)]
    assert all(run.stop - run.start <= most for run in runs)
    held = [bounds(coords[run]) for run in runs if run.stop > run.start]
    assert not any(overlap(a, b) for i, a in enumerate(held) for b in held[:i])


@settings(max_examples=60)
@given(st.integers(1, 3), st.data())
def test_rows_are_grouped_by_tile_however_large_the_grid(rank: int, data: st.DataObject) -> None:
    most = data.draw(st.sampled_from([5, 70_000, 2**32 - 1]))
    points = data.draw(st.lists(st.tuples(*[st.integers(0, most)] * rank), min_size=1, max_size=30, unique=True))
    coords = np.array(sorted(points), np.uint32)
    tile = data.draw(st.tuples(*[st.sampled_from([1, 2, 3, 1000, 2**32 - 1])] * rank))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boxes, "_BLOCK", 4)
        groups = by_tile(coords, tile)
    cells = [[tuple(c // n for c, n in zip(coords[i].tolist(), tile, strict=True)) for i in rows] for rows in groups]
    assert all(len(set(cell)) == 1 for cell in cells)
    assert all(a[0] < b[0] for a, b in pairwise(cells))
    assert all((rows[1:] > rows[:-1]).all() for rows in groups)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(coords)))


WRITES = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "write", "delete", "commit", "shrink", "grow"]),
        st.tuples(st.integers(0, 9), st.integers(0, 9)),
        st.tuples(st.integers(1, 6), st.integers(1, 6)),
    ),
    min_size=2,
    max_size=12,
)


@settings(max_examples=60)
@given(WRITES, st.sampled_from([None, (3, 4), (2**32 - 1, 2)]))
def test_large_sessions_commit_the_same_as_small_ones(
    steps: list[tuple[str, tuple[int, int], tuple[int, int]]], tile: tuple[int, int] | None
) -> None:
    policy = Policy(max_refs_per_manifest=20, share_below_refs=4)
    if tile is not None:
        policy = Policy.explicit(lambda node: tile)

    def run(*, large: bool) -> list[object]:
        with pytest.MonkeyPatch.context() as patch:
            if large:
                patch.setattr(array_fold, "LARGE_LAYER", 6)
                if tile is not None:
                    # Tiles that no configuration gives are cut along slabs, and so may be others.
                    patch.setattr(tiles, "_SLAB", 64)
                patch.setattr(array_fold, "_SAMPLE", 3)
                patch.setattr(array_fold, "_SLAB_SAMPLES", 2)
            repo = Repo(policy)
            log = repo.log()
            log.set_metadata("/a", array_json((16, 16)))
            history: list[object] = []
            for i, (what, corner, size) in enumerate([*steps, ("commit", (0, 0), (1, 1))]):
                node = log.node("/a")
                assert node is not None
                grid = [d.num_chunks for d in node.shape]
                axes = [np.arange(a, min(a + n, g)) for a, n, g in zip(corner, size, grid, strict=True)]
                coords = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2).astype(np.uint32)
                match what:
                    case "write":
                        log.set_refs(node, native(coords, first=1000 * (i + 1)))
                    case "delete":
                        log.delete_chunks(node, coords)
                    case "shrink":
                        log.set_metadata("/a", array_json((8, 16)))
                    case "grow":
                        log.set_metadata("/a", array_json((16, 16)))
                    case "commit":
                        planned = plan(log, policy)
                        found = {i: repo.manifests[i] for i in planned.manifests_to_read}
                        done = compacted(planned, found, repo.new_object_id)
                        repo.manifests |= {m.id: m for m in done.manifests}
                        repo.snapshot = done.snapshot
                        history.append([coords.tolist() for coords in done.transaction.updated_chunks.values()])
                        history.append([ref.extents for ref in done.snapshot.nodes["/a"].manifests])
                        for manifest in done.manifests:
                            for refs in manifest.arrays.values():
                                history.append((refs.coords.tolist(), refs.chunk_id.tobytes(), refs.offset.tolist()))
                        log = repo.log()
            return history

    assert run(large=True) == run(large=False)


def test_savepoints_hold_although_events_are_made_late() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_fold, "LARGE_LAYER", 6)
        repo = Repo()
        log = repo.log()
        log.set_metadata("/a", array_json((100,)))
        node = log.node("/a")
        assert node is not None
        for first in range(0, 40, 5):
            log.set_refs(node, native(np.arange(first, first + 5)[:, None], first=first + 1))
        before = log.savepoint()
        for first in range(20, 60, 5):
            log.set_refs(node, native(np.arange(first, first + 5)[:, None], first=1000 + first))
        own = log.since(before).net_changes().chunks[node.id]
        assert own[:, 0].tolist() == list(range(20, 60))
        again = log.rebased(repo.snapshot)
        assert again.changes().updated_chunks["/a"][:, 0].tolist() == list(range(60))
        log.rollback(before)
        written, deleted = log.overlay(node)
        assert written.coords[:, 0].tolist() == list(range(40))
        assert not len(deleted)
        assert np.array_equal(written.chunk_id, normalized(native(np.arange(40)[:, None], first=1)).chunk_id)
