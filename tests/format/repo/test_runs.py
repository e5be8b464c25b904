"""Files whose tables were copied from the file before: they hold what was to be written, whatever changed between."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from icechunk.format.flat.flatbuffers import FlatWriter
from icechunk.format.ids import ObjectId
from icechunk.format.repo import codec
from icechunk.format.repo.codec import decode_repo, encode_and_keep
from icechunk.format.repo.repo_info import (
    BranchReset,
    NewCommit,
    RepoInfo,
    RepoInitialized,
    SnapshotRecord,
    Status,
    TagCreated,
    Update,
    UpdateChange,
)
from icechunk.format.repo.snapshot_encoding import SameRows, SnapshotRows
from icechunk.format.repo.snapshot_graph import SnapshotGraph
from icechunk.format.repo.stored_snapshots import StoredSnapshots
from icechunk.format.repo.updates import UpdateList

FIRST = SnapshotRecord(id=ObjectId(bytes(11) + b"\1"), parent=None, flushed_at_us=1, message="first")


def initial() -> RepoInfo:
    return RepoInfo(
        spec_version=2,
        tags={},
        branches={"main": FIRST.id},
        deleted_tags=frozenset(),
        snapshots={FIRST.id: FIRST},
        status=Status(availability=0, set_at_us=1),
        updates=(Update(change=RepoInitialized(), updated_at_us=1),),
    )


class Life:
    """A repo info that changes at random, as it is written again and again and as it should be."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self.kept = initial()
        self.records = dict(self.kept.snapshots)
        self.updates = list(self.kept.updates)
        self._us = 1

    def step(self) -> None:
        graph, log = SnapshotGraph.of(self.kept.snapshots), UpdateList.of(self.kept.updates)
        for _ in range(self._chance.randint(0, 3)):
            graph = self._change(graph)
            update = self._update()
            self.updates.insert(0, update)
            log = log.after([update])
        if self._chance.random() < 0.05:
            self.updates = self.updates[: max(1, len(self.updates) // 2)]
            log = log[: len(self.updates)]
        elif self._chance.random() < 0.05:
            log = log.with_backup("backup")
            self.updates = [
                one if one.backup_path is not None else replace(one, backup_path="backup") for one in self.updates
            ]
        tip = max(self.records.values(), key=lambda record: record.flushed_at_us).id
        self.kept = replace(self.kept, snapshots=graph, updates=log, branches={"main": tip})
        encoded = encode_and_keep(self.kept)
        self.kept = encoded.info
        for info in (encoded.info, decode_repo(encoded.data)):
            assert dict(info.snapshots) == self.records
            assert list(info.updates) == self.updates
            assert info.branches == {"main": tip}

    def _change(self, graph: SnapshotGraph) -> SnapshotGraph:
        self._us += 1
        old = self._chance.choice(list(self.records.values()))
        kind = self._chance.random()
        leaves = self.records.keys() - {record.parent for record in self.records.values()} - {FIRST.id}
        if kind < 0.05 and leaves:
            gone = min(leaves)
            del self.records[gone]
            return graph.delete(gone)
        if kind < 0.1:
            record = replace(old, message=old.message + "!")
        else:
            pruned = (ObjectId(self._chance.randbytes(12)),) if kind < 0.2 else ()
            record = SnapshotRecord(
                id=ObjectId(self._chance.randbytes(12)),
                parent=old.id,
                flushed_at_us=self._us,
                message="m" * self._chance.randint(0, 9),
                metadata={"author": "ada", "n": self._us} if kind < 0.4 else {},
                pruned_ancestor_tx_logs=pruned,
            )
        self.records[record.id] = record
        return graph.set(record.id, record)

    def _update(self) -> Update:
        self._us += 1
        id = self._chance.choice(list(self.records))
        changes: list[UpdateChange] = [
            NewCommit(branch="main", snapshot=id),
            TagCreated(name="t"),
            BranchReset(name="main", previous_snapshot=id),
        ]
        change = self._chance.choice(changes)
        return Update(change=change, updated_at_us=self._us)


@pytest.mark.parametrize("seed", range(6))
def test_a_file_that_is_written_many_times_has_the_expected_contents(seed: int) -> None:
    life = Life(seed)
    for _ in range(80):
        life.step()
    assert len(life.records) > 50


def test_tables_are_copied_when_snapshots_are_only_added(monkeypatch: pytest.MonkeyPatch) -> None:
    life = Life(0)
    for _ in range(80):
        life.step()
    kept = encode_and_keep(life.kept).info

    def fail(*_: object) -> None:
        raise AssertionError("a stored snapshot was written again")

    monkeypatch.setattr("icechunk.format.repo.snapshot_encoding.write_blocks", fail)
    monkeypatch.setattr("icechunk.format.repo.updates.write_update_blocks", fail)
    for number in range(20):
        record = SnapshotRecord(
            id=ObjectId((100 + number).to_bytes(12)),
            parent=None,
            flushed_at_us=10**6 + number,
            message="",
            metadata={"n": 1},
        )
        updates = UpdateList.of(kept.updates).after([Update(change=RepoInitialized(), updated_at_us=10**6 + number)])
        kept = encode_and_keep(
            replace(kept, snapshots=SnapshotGraph.of(kept.snapshots).set(record.id, record), updates=updates)
        ).info
    assert len(codec.encode_repo(kept)) > 0


@pytest.mark.parametrize("before", [0, 1, 4, 7])
def test_unchanged_snapshots_are_written_as_those_that_might_have_changed(before: int) -> None:
    life = Life(before)
    for _ in range(60):
        life.step()
    stored = life.kept.snapshots
    assert isinstance(stored, StoredSnapshots)
    assert stored.run is not None
    same, any = SameRows(stored, stored.run), SnapshotRows(stored, {})
    written, expected = FlatWriter(), FlatWriter()
    written.out += bytes(before)
    expected.out += bytes(before)
    assert same.run() is None
    assert same.write(written) == any.write(expected)
    assert written.out == expected.out
    assert len(same) == len(any)
    assert [same.number(id) for id in (None, *life.records)] == [any.number(id) for id in (None, *life.records)]
    run, other = same.run(), any.run()
    assert run is not None
    assert other is not None
    assert (run.run.start, run.run.end, run.run.vtables) == (other.run.start, other.run.end, other.run.vtables)
    assert run.run.tables.tolist() == other.run.tables.tolist()
    assert run.parents.tolist() == other.parents.tolist()
    assert (run.known.ids, run.known.parents) == (other.known.ids, other.known.parents)
