"""The manifests that commits read and write, and how manifests grow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from icechunk.errors import FormatError
from icechunk.format.values import Manifest, ManifestFile, ManifestRef
from icechunk.log.session.plan.compaction import Policy, new_manifests, plan
from tests.log.session.builders import Repo, array_json, check_snapshot, native, object_id
from tests.raising import raises


def write(repo: Repo, coords: np.ndarray, path: str = "/a", first: int = 1) -> None:
    log = repo.log()
    node = log.node(path)
    assert node is not None
    log.set_refs(node, native(coords, first))
    repo.commit(log)


def with_array(shape: tuple[int, ...], policy: Policy | None = None) -> Repo:
    repo = Repo(policy)
    log = repo.log()
    log.set_metadata("/a", array_json(shape))
    repo.commit(log)
    return repo


def box(*axes: tuple[int, int]) -> np.ndarray:
    return np.stack(np.meshgrid(*(np.arange(a, b) for a, b in axes), indexing="ij"), -1).reshape(-1, len(axes))


def manifests_of(repo: Repo, path: str = "/a") -> int:
    return len(repo.snapshot.nodes[path].manifests)


@pytest.mark.parametrize(("size", "backwards"), [(1, False), (3, True), (10, False)])
def test_a_thousand_appends_keep_few_manifests_and_rewrite_n_log_n(size: int, backwards: bool) -> None:
    repo = with_array((1000 * size, 2))
    most = quiet = 0
    for k in range(1000):
        at = 999 - k if backwards else k
        write(repo, box((at * size, (at + 1) * size), (0, 2)), first=k + 1)
        most = max(most, manifests_of(repo))
        quiet += not repo.read
    n = 2000 * size
    assert check_snapshot(repo) == n
    assert most <= 16 * 4
    assert quiet >= 800
    assert repo.written_refs <= n * (1 + np.log(n) / np.log(8))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_five_hundred_writes_anywhere_keep_few_manifests(rank: int) -> None:
    side = {1: 3000, 2: 60, 3: 15}[rank]
    repo = with_array((side,) * rank, Policy(max_refs_per_manifest=64))
    rng = np.random.default_rng(rank)
    seen = set()
    most = 0
    for k in range(500):
        coords = rng.integers(0, side, (1, rank))
        seen.add(tuple(coords[0].tolist()))
        write(repo, coords, first=k + 1)
        most = max(most, manifests_of(repo))
    assert check_snapshot(repo) == len(seen)
    assert most <= 4 * 8 + 2 * len(seen) // 32
    assert repo.written_refs <= 500 * 2 * 64


def test_an_append_to_a_large_array_reads_and_writes_only_its_own() -> None:
    repo = with_array((400, 100), Policy(max_refs_per_manifest=1000))
    write(repo, box((0, 200), (0, 100)))
    assert manifests_of(repo) == 20
    before = repo.written_refs
    write(repo, box((200, 201), (0, 100)))
    assert repo.read == ()
    assert repo.written_refs == before + 100
    assert manifests_of(repo) == 21


def test_scattered_updates_rewrite_only_the_tiles_they_fall_in() -> None:
    repo = with_array((400, 100), Policy(max_refs_per_manifest=1000))
    write(repo, box((0, 200), (0, 100)))
    before = {r.object_id for r in repo.snapshot.nodes["/a"].manifests}
    write(repo, np.array([[3, 3], [4, 4], [150, 20]]), first=10**6)
    after = {r.object_id for r in repo.snapshot.nodes["/a"].manifests}
    assert len(repo.read) == 2
    assert len(before & after) == 18
    assert check_snapshot(repo) == 20_000


def test_an_overwritten_tile_is_not_read() -> None:
    repo = with_array((400, 100), Policy(max_refs_per_manifest=1000))
    write(repo, box((0, 200), (0, 100)))
    write(repo, box((0, 200), (0, 100)), first=10**6)
    assert repo.read == ()
    assert check_snapshot(repo) == 20_000


def test_a_fully_deleted_array_keeps_no_manifest_and_reads_none() -> None:
    repo = with_array((20, 10), Policy(max_refs_per_manifest=50))
    write(repo, box((0, 20), (0, 10)))
    log = repo.log()
    node = log.node("/a")
    assert node is not None
    log.delete_chunks(node, box((0, 20), (0, 10)).astype(np.uint32))
    done = repo.commit(log)
    assert (repo.read, done.manifests, dict(done.snapshot.manifest_files)) == ((), (), {})


def test_new_rows_around_a_large_tile_are_cut_along_its_faces() -> None:
    repo = with_array((30, 30))
    write(repo, box((10, 20), (10, 20)))
    ring = np.array([[9, 15], [20, 15], [15, 9], [15, 20], [0, 0], [29, 29]])
    write(repo, ring, first=1000)
    assert check_snapshot(repo) == 106


def test_new_rows_absorb_smaller_tiles_that_they_cross() -> None:
    repo = with_array((30, 30), Policy(fan_in=1000))
    write(repo, box((10, 11), (10, 11)))
    write(repo, np.array([[0, 0], [29, 29], [3, 9]]), first=1000)
    assert len(repo.read) == 1
    assert manifests_of(repo) == 1
    assert check_snapshot(repo) == 4


def test_many_small_arrays_share_one_manifest_and_part_with_it_one_by_one() -> None:
    repo = Repo()
    log = repo.log()
    for i in range(50):
        log.set_metadata(f"/a{i}", array_json((2,)))
        node = log.node(f"/a{i}")
        assert node is not None
        for j in range(2):
            log.set_native(node, (j,), object_id(2 * i + j), 0, 1)
    repo.commit(log)
    shared = list(repo.snapshot.manifest_files)
    assert len(shared) == 1
    assert repo.snapshot.manifest_files[shared[0]].num_chunk_refs == 100
    log = repo.log()
    node = log.node("/a7")
    assert node is not None
    log.set_native(node, (0,), object_id(1000), 0, 1)
    done = repo.commit(log)
    assert repo.read == tuple(shared)
    assert [list(m.arrays) for m in done.manifests] == [[node.id]]
    assert len(done.snapshot.manifest_files) == 2
    assert check_snapshot(repo) == 100


def test_a_shared_manifest_is_bounded() -> None:
    repo = Repo(Policy(max_refs_per_manifest=100))
    log = repo.log()
    for i in range(100):
        log.set_metadata(f"/a{i}", array_json((5,)))
        node = log.node(f"/a{i}")
        assert node is not None
        log.set_refs(node, native(box((0, 5)), 5 * i))
    repo.commit(log)
    assert [f.num_chunk_refs for f in repo.snapshot.manifest_files.values()] == [100] * 5


def test_the_explicit_policy_keeps_one_manifest_per_array_as_official() -> None:
    repo = with_array((100, 4), Policy.explicit())
    for k in range(10):
        write(repo, box((k * 10, k * 10 + 10), (0, 4)), first=40 * k)
        assert manifests_of(repo) == 1
    assert check_snapshot(repo) == 400


def test_configured_tiles_are_kept_and_only_those_with_changes_rewritten() -> None:
    repo = with_array((100, 4), Policy.explicit(lambda node: (10, 4)))
    write(repo, box((0, 100), (0, 4)))
    assert manifests_of(repo) == 10
    write(repo, np.array([[15, 1], [77, 0]]), first=1000)
    assert len(repo.read) == 2
    assert manifests_of(repo) == 10
    assert check_snapshot(repo) == 400


def first_axis(repo: Repo) -> list[tuple[int, int]]:
    return [ref.extents[0] for ref in repo.snapshot.nodes["/a"].manifests]


def test_after_a_change_of_grid_changed_cells_are_gathered_and_other_straddling_manifests_are_cut_as_official() -> None:
    repo = with_array((10, 4), Policy.explicit(lambda node: (5, 4)))
    write(repo, box((0, 10), (0, 4)))
    repo.policy = Policy.explicit(lambda node: (3, 4))
    write(repo, np.array([[0, 0]]), first=1000)
    assert first_axis(repo) == [(0, 3), (3, 5), (5, 6), (6, 9), (9, 10)]
    write(repo, np.array([[4, 0]]), first=1001)
    assert len(repo.read) == 2
    assert first_axis(repo) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    repo.policy = Policy.explicit()
    write(repo, np.array([[9, 0]]), first=1002)
    assert first_axis(repo) == [(0, 10)]
    assert check_snapshot(repo) == 40


def test_a_cell_that_is_overwritten_whole_is_not_read() -> None:
    repo = with_array((100, 4), Policy.explicit(lambda node: (10, 4)))
    write(repo, box((0, 100), (0, 4)))
    write(repo, box((10, 30), (0, 4)), first=1000)
    assert repo.read == ()
    assert check_snapshot(repo) == 400


def test_a_scalar_keeps_its_manifest_when_only_its_metadata_change() -> None:
    repo = with_array((), Policy.explicit(lambda node: ()))
    write(repo, np.empty((1, 0), np.uint32))
    (before,) = repo.snapshot.nodes["/a"].manifests
    log = repo.log()
    log.set_metadata("/a", array_json((), units="m"))
    repo.commit(log)
    assert repo.snapshot.nodes["/a"].manifests == (before,)


def test_a_million_references_are_one_commit_of_bounded_tiles() -> None:
    repo = with_array((1000, 1000))
    rows = box((0, 1000), (0, 1000)).astype(np.uint32)
    write(repo, rows)
    assert manifests_of(repo) == 16
    assert max(f.num_chunk_refs for f in repo.snapshot.manifest_files.values()) <= 65_536


def test_metadata_alone_rewrites_no_manifest() -> None:
    repo = with_array((100, 4))
    write(repo, box((0, 100), (0, 4)))
    files = dict(repo.snapshot.manifest_files)
    log = repo.log()
    log.set_metadata("/a", array_json((100, 4), units="m"))
    done = repo.commit(log)
    assert (repo.read, done.manifests, dict(done.snapshot.manifest_files)) == ((), (), files)


def test_a_manifest_without_the_array_that_the_snapshot_promises_is_a_format_error() -> None:
    repo = with_array((100,))
    write(repo, box((0, 100)))
    log = repo.log()
    node = log.node("/a")
    assert node is not None
    log.set_native(node, (3,), object_id(1), 0, 1)
    planned = plan(log, repo.policy)
    wrong = {i: Manifest(id=i, arrays={}) for i in planned.manifests_to_read}
    with raises(FormatError, "inconsistent-manifests", "/a"):
        list(new_manifests(planned, wrong, repo.new_object_id))


def test_five_thousand_small_arrays_share_a_handful_of_manifests_when_they_are_made_and_when_they_change() -> None:
    repo = Repo()
    log = repo.log()
    document = array_json((2,))
    for i in range(5000):
        log.set_metadata(f"/a{i}", document)
    for c in range(2):
        for i in range(5000):
            node = log.node(f"/a{i}")
            assert node is not None
            log.set_native(node, (c,), object_id(2 * i + c), 0, 7)
    assert len(repo.commit(log).manifests) == 1
    assert check_snapshot(repo) == 10_000
    log = repo.log()
    for i in range(5000):
        log.set_native(repo.snapshot.nodes[f"/a{i}"], (1,), object_id(20_000 + i), 0, 7)
    assert len(repo.commit(log).manifests) == 1
    assert len(repo.read) == 1
    assert check_snapshot(repo) == 10_000
    for i in (0, 17, 4999):
        node = repo.snapshot.nodes[f"/a{i}"]
        for c, id in ((0, 2 * i), (1, 20_000 + i)):
            ref = repo.committed(node, (c,))
            assert ref is not None
            assert ref.chunk_id == object_id(id)


def test_appends_of_a_thousand_to_ten_million_read_and_write_none_of_those() -> None:
    count, size = 153, 65_536
    repo = with_array((count * size + 20_000,))
    large = [object_id(10**6 + i) for i in range(count)]
    node = replace(
        repo.snapshot.nodes["/a"],
        manifests=tuple(ManifestRef(id, ((i * size, (i + 1) * size),)) for i, id in enumerate(large)),
    )
    # The manifests themselves do not exist: reading one fails.
    repo.snapshot = replace(
        repo.snapshot,
        nodes={**repo.snapshot.nodes, "/a": node},
        manifest_files={id: ManifestFile(id, 10**6, size) for id in large},
    )
    assert sum(file.num_chunk_refs for file in repo.snapshot.manifest_files.values()) > 10**7
    for k in range(20):
        before = repo.written_refs
        first = count * size + 1000 * k
        write(repo, np.arange(first, first + 1000)[:, None], first=10**7 + 1000 * k)
        assert len(repo.last.manifests if repo.last else ()) == 1
        assert repo.written_refs - before in (1000, 8000)  # its own, or with those of the seven before
        assert (repo.written_refs - before == 1000) == (repo.read == ())
        assert not set(repo.read) & set(large)
    assert set(large) <= set(repo.snapshot.manifest_files)


def test_scalars_of_one_layout_have_plans_of_their_own() -> None:
    repo = Repo()
    log = repo.log()
    for number, path in enumerate(("/a", "/b", "/c"), 1):
        log.set_metadata(path, array_json(()))
        node = log.node(path)
        assert node is not None
        log.set_refs(node, native(np.zeros((1, 0), np.uint32), number))
    repo.commit(log)
    log = repo.log()
    nodes = [log.node(path) for path in ("/a", "/b")]
    assert nodes[0] is not None
    assert nodes[1] is not None
    assert nodes[0].manifests == nodes[1].manifests
    log.delete_chunk(nodes[0], ())
    log.set_refs(nodes[1], native(np.zeros((1, 0), np.uint32), 9))
    repo.commit(log)
    assert check_snapshot(repo) == 2
    kept = [repo.committed(repo.snapshot.nodes[path], ()) for path in ("/a", "/b", "/c")]
    assert [None if ref is None else ref.chunk_id for ref in kept] == [None, object_id(9), object_id(3)]
