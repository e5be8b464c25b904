"""Many small arrays at once come out as each of them alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import count, product
from random import Random
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

import icechunk.log.session.plan.small_arrays as small_arrays_module
from icechunk.errors import FormatError
from icechunk.format.ids import ObjectId
from icechunk.format.values import INLINE, NATIVE, VIRTUAL, ChunkRef, ChunkRefs, NodeSnapshot
from icechunk.log.session.columns import DELETED, from_rows
from icechunk.log.session.log import SessionLog
from icechunk.log.session.plan.compaction import Policy
from icechunk.log.session.plan.small_arrays import columns_of_many
from tests.log.session.builders import Repo, array_json, check_snapshot
from tests.raising import raises
from tools.fuzz.strategies import rows

KINDS = st.sampled_from((INLINE, NATIVE, NATIVE, VIRTUAL))


@st.composite
def small_arrays(draw: st.DrawFn, ndim: int, virtual: bool, tombstones: bool) -> dict[tuple[int, ...], ChunkRef | None]:
    number = count(draw(st.integers(0, 1000)))
    places = draw(st.sets(st.tuples(*[st.integers(0, 3)] * ndim), max_size=5))
    found: dict[tuple[int, ...], ChunkRef | None] = {}
    for coords in places:
        kind = draw(KINDS)
        n = next(number)
        if tombstones and draw(st.booleans()):
            found[coords] = None
        elif kind == INLINE:
            data = b"%d" % n * draw(st.integers(0, 3))
            found[coords] = ChunkRef(INLINE, data=data, length=len(data))
        elif kind == VIRTUAL and virtual:
            found[coords] = ChunkRef(VIRTUAL, location=f"s3://b/{n}", offset=n, length=1, etag="e")
        else:
            found[coords] = ChunkRef(NATIVE, chunk_id=ObjectId(n.to_bytes(12)), offset=n, length=n)
    return found


def content(refs: ChunkRefs) -> list[tuple[object, ...]]:
    live = refs.kind != DELETED
    return [*rows(refs.take(live)), *map(tuple, refs.coords[~live].tolist())]


@settings(max_examples=60)
@given(st.data(), st.integers(0, 2), st.booleans())
def test_rows_of_many_arrays_become_the_columns_of_each(data: st.DataObject, ndim: int, virtual: bool) -> None:
    many = data.draw(st.lists(small_arrays(ndim, virtual, True), max_size=5))
    for refs, own in zip(columns_of_many(many, ndim), many, strict=True):
        assert content(refs) == content(from_rows(own, ndim))


def some_rows(rng: Random, grid: tuple[int, ...], virtual: bool) -> dict[tuple[int, ...], ChunkRef | None]:
    found: dict[tuple[int, ...], ChunkRef | None] = {}
    share = rng.choice((0.2, 0.6, 1.0))
    for coords in product(*[range(n) for n in grid]):
        n = rng.randrange(1, 1000)
        if rng.random() < share:
            found[coords] = rng.choice(
                (
                    None,
                    ChunkRef(INLINE, data=b"%d" % n, length=len(b"%d" % n)),
                    ChunkRef(NATIVE, chunk_id=ObjectId(n.to_bytes(12)), offset=n, length=n),
                    ChunkRef(NATIVE, chunk_id=ObjectId(n.to_bytes(12)), length=n)
                    if not virtual
                    else ChunkRef(VIRTUAL, location=f"s3://b/{n}", offset=n, length=1, etag="e"),
                )
            )
    return found


@settings(max_examples=40)
@given(st.randoms(use_true_random=False), st.integers(0, 2), st.booleans())
def test_commits_of_many_small_arrays_equal_commits_of_each_alone(rng: Random, ndim: int, virtual: bool) -> None:
    """Commits in which arrays are written, deleted from and resized, some of it laid down in columns before."""
    together, alone = Repo(), Repo(Policy(share_below_refs=0))
    grids = [tuple([rng.randrange(1, 5) for _ in range(ndim)]) for _ in range(6)]
    for _ in range(3):
        logs = together.log(), alone.log()
        for i, grid in enumerate(grids):
            path = f"/{i:02}"
            then = tuple([rng.randrange(1, 5) for _ in grid]) if rng.random() < 0.4 else grid
            now = rng.choice((grid, then))
            values, columns = some_rows(rng, now, virtual), rng.random() < 0.5
            for log in logs:
                log.set_metadata(path, array_json(now))
                node = log.node(path)
                assert node is not None
                write(log, node, values, columns)
                # Rows may be out of the grid by now.
                log.set_metadata(path, array_json(then))
            grids[i] = then
        for repo, log in zip((together, alone), logs, strict=True):
            with mock.patch.object(small_arrays_module, "MANY", 1):
                repo.commit(log)
            check_snapshot(repo)
        assert together.snapshot.nodes.keys() == alone.snapshot.nodes.keys()
        for path in together.snapshot.nodes:
            assert held(together, path) == held(alone, path)
        first, second = [repo.last.transaction.updated_chunks for repo in (together, alone) if repo.last is not None]
        assert [coords.tolist() for coords in first.values()] == [coords.tolist() for coords in second.values()]


def write(log: SessionLog, node: NodeSnapshot, values: dict[tuple[int, ...], ChunkRef | None], columns: bool) -> None:
    if columns and values:
        live = from_rows({coords: ref for coords, ref in values.items() if ref is not None}, len(node.shape))
        log.set_refs(node, live)
        log.delete_chunks(node, from_rows({c: r for c, r in values.items() if r is None}, len(node.shape)).coords)
        return
    for coords, ref in values.items():
        if ref is None:
            log.delete_chunk(node, coords)
        elif ref.kind == INLINE:
            assert ref.data is not None
            log.set_inline(node, coords, ref.data)
        elif ref.kind == NATIVE:
            assert ref.chunk_id is not None
            log.set_native(node, coords, ref.chunk_id, ref.offset, ref.length)
        else:
            log.set_refs(node, from_rows({coords: ref}, len(coords)))


def node_at(log: SessionLog, path: str) -> NodeSnapshot:
    node = log.node(path)
    assert node is not None
    return node


def held(repo: Repo, path: str) -> list[tuple[tuple[int, ...], ChunkRef]]:
    """Every reference of an array, from all of its manifests."""
    node = repo.snapshot.nodes[path]
    found = [row for ref in node.manifests for row in rows(repo.manifests[ref.object_id].arrays[node.id])]
    return sorted(found, key=lambda row: row[0])


def test_a_commit_of_many_small_arrays_reads_only_the_manifests_that_change() -> None:
    repo = Repo()
    log = repo.log()
    for i in range(40):
        log.set_metadata(f"/{i:02}", array_json((4,)))
        for c in range(2):
            log.set_native(node_at(log, f"/{i:02}"), (c,), ObjectId(bytes(12)), 0, 1)
    first = repo.commit(log)
    assert len(first.manifests) == 1
    log = repo.log()
    for i in range(40):
        for c in range(2):
            log.set_native(node_at(log, f"/{i:02}"), (c,), ObjectId(bytes(12)), 0, 2)
    repo.commit(log)
    assert repo.read == ()  # all of it was written again
    log = repo.log()
    for i in range(40):
        log.set_native(node_at(log, f"/{i:02}"), (1,), ObjectId(bytes(12)), 0, 3)
    second = repo.commit(log)
    assert len(repo.read) == 1
    assert len(second.manifests) == 1
    log = repo.log()
    for i in range(40):
        log.set_native(node_at(log, f"/{i:02}"), (2,), ObjectId(bytes(12)), 0, 3)
    repo.commit(log)
    assert repo.read == ()  # appended
    log = repo.log()
    for i in range(40):
        for c in range(3):
            log.delete_chunk(log.node(f"/{i:02}"), (c,))
    assert repo.commit(log).manifests == ()
    assert all(node.manifests == () for node in repo.snapshot.nodes.values())


def test_many_small_arrays_fill_one_manifest_after_another() -> None:
    repo = Repo(Policy(max_refs_per_manifest=10, share_below_refs=8))
    log = repo.log()
    for i in range(20):
        log.set_metadata(f"/{i:02}", array_json((3,)))
        for c in range(3):
            log.set_inline(node_at(log, f"/{i:02}"), (c,), b"%d-%d" % (i, c))
    log.set_metadata("/large", array_json((20,)))
    for c in range(20):
        log.set_inline(node_at(log, "/large"), (c,), b"%d" % c)
    done = repo.commit(log)
    check_snapshot(repo)
    assert [m.num_chunk_refs for m in done.manifests if len(m.arrays) == 3] == [9] * 6
    assert all(m.num_chunk_refs <= 10 for m in done.manifests)
    for i in range(20):
        assert [row[1].data for row in held(repo, f"/{i:02}")] == [b"%d-%d" % (i, c) for c in range(3)]


def test_an_array_that_its_manifest_lacks_is_named() -> None:
    repo = Repo()
    log = repo.log()
    for i in range(10):
        log.set_metadata(f"/{i:02}", array_json((4,)))
        for c in range(2):
            log.set_native(node_at(log, f"/{i:02}"), (c,), ObjectId(bytes(12)), 0, 1)
    repo.commit(log)
    ((id, manifest),) = repo.manifests.items()
    lost = repo.snapshot.nodes["/07"].id
    repo.manifests[id] = replace(manifest, arrays={i: refs for i, refs in manifest.arrays.items() if i != lost})
    log = repo.log()
    for i in range(10):
        log.set_native(node_at(log, f"/{i:02}"), (1,), ObjectId(bytes(12)), 0, 3)
    with raises(FormatError, "inconsistent-manifests", "/07"):
        repo.commit(log)
