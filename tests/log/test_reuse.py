"""Manifests of an earlier try of a commit serve the next one, if and only if they hold the same."""

from __future__ import annotations

import numpy as np

from icechunk.log.compaction import Compaction, Policy, compact, finish, plan
from icechunk.log.reuse import reuse
from icechunk.log.session_log import SessionLog
from tests.log.builders import Repo, array_json, check_snapshot, native


def two_arrays() -> Repo:
    repo = Repo(Policy(share_below_refs=0))
    log = repo.log()
    for path in ("/a", "/b"):
        log.set_metadata(path, array_json([100]))
    repo.commit(log)
    return repo


def writing(repo: Repo, path: str, first: int) -> SessionLog:
    log = repo.log()
    node = log.node(path)
    assert node is not None
    log.set_refs(node, native(np.array([[0], [1]]), first))
    return log


def test_a_manifest_that_comes_out_the_same_is_taken_and_one_that_does_not_is_written() -> None:
    repo = two_arrays()
    log = writing(repo, "/a", 10)
    node = log.node("/b")
    assert node is not None
    log.set_refs(node, native(np.array([[5]]), 30))

    def attempt(log: SessionLog) -> Compaction:
        done = plan(log, repo.policy)
        return compact(
            done,
            {i: repo.manifests[i] for i in done.manifests_to_read},
            snapshot_id=repo.new_object_id(),
            parent_id=None,
            flushed_at_us=9,
            message="m",
            metadata={},
            new_object_id=repo.new_object_id,
        )

    first = attempt(log)
    repo.commit(writing(repo, "/b", 50))
    second = reuse(attempt(log.rebased(repo.snapshot)), first.manifests)
    of_a = {m.id for m in first.manifests if repo.snapshot.nodes["/a"].id in m.arrays}
    assert not of_a & {m.id for m in second.manifests}
    assert {ref.object_id for ref in second.snapshot.nodes["/a"].manifests} == of_a
    sizes = {m.id: 100 + m.num_chunk_refs for m in (*first.manifests, *second.manifests)}
    repo.manifests.update({m.id: m for m in (*first.manifests, *second.manifests)})
    repo.snapshot = finish(second, sizes)
    check_snapshot(repo)
    assert reuse(second, ()) is second
