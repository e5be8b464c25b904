"""Manifests of an earlier try of a commit serve the next one, if and only if they hold the same."""

from __future__ import annotations

import numpy as np
import pytest

from icechunk.log.session.log import SessionLog
from icechunk.log.session.plan.compaction import Policy, placed, plan
from icechunk.log.session.plan.reuse import Earlier
from tests.log.session.builders import Compaction, Repo, array_json, check_snapshot, compacted, native


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


@pytest.mark.parametrize("kept", [0, 100], ids=["digests", "references"])
def test_a_manifest_that_comes_out_the_same_is_taken_and_one_that_does_not_is_written(kept: int) -> None:
    repo = two_arrays()
    log = writing(repo, "/a", 10)
    node = log.node("/b")
    assert node is not None
    log.set_refs(node, native(np.array([[5]]), 30))

    def attempt(log: SessionLog, earlier: Earlier) -> Compaction:
        done = plan(log, repo.policy)
        return compacted(done, {i: repo.manifests[i] for i in done.manifests_to_read}, repo.new_object_id, earlier)

    earlier = Earlier(kept)
    first = attempt(log, earlier)
    earlier.add([earlier.remembered(m, placed(m, 100 + m.num_chunk_refs)) for m in first.manifests])
    repo.commit(writing(repo, "/b", 50))
    second = attempt(log.rebased(repo.snapshot), earlier)
    of_a = {m.id for m in first.manifests if repo.snapshot.nodes["/a"].id in m.arrays}
    assert not of_a & {m.id for m in second.manifests}
    assert {ref.object_id for ref in second.snapshot.nodes["/a"].manifests} == of_a
    repo.manifests.update({m.id: m for m in (*first.manifests, *second.manifests)})
    repo.snapshot = second.snapshot
    check_snapshot(repo)
