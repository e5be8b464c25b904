from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from icechunk.errors import FormatError
from icechunk.format.envelope import FileType, seal, unseal
from icechunk.format.flat.flatbuffers import FlatTable, FlatWriter, Items, Scalar, id_struct, u8, u64
from icechunk.format.ids import ObjectId
from icechunk.format.repo.codec import RepoInfo, SnapshotRecord, Status, decode_repo, encode_and_keep, encode_repo
from icechunk.format.repo.snapshot_graph import ChildrenLeftError, SnapshotGraph
from icechunk.format.repo.stored_snapshots import StoredSnapshots
from tests.raising import raises
from tools.fuzz.strategies import metadata, texts

STATUS = Status(set_at_us=0)


def an_id(i: int) -> ObjectId:
    """Ids that differ at both ends, many of them with zero bytes there."""
    return ObjectId((i % 7).to_bytes(4) + bytes(4) + i.to_bytes(4, "little"))


def record(i: int, parent: int | None, message: str = "one more") -> SnapshotRecord:
    return SnapshotRecord(
        id=an_id(i), parent=None if parent is None else an_id(parent), flushed_at_us=1000 + i, message=message
    )


def history(count: int) -> dict[ObjectId, SnapshotRecord]:
    """A branch of so many commits, in the order of their ids."""
    records = [record(i, i - 1 if i else None) for i in range(count)]
    return {one.id: one for one in sorted(records, key=lambda one: one.id)}


def stored(records: Mapping[ObjectId, SnapshotRecord]) -> StoredSnapshots:
    found = decode_repo(encode_repo(RepoInfo(snapshots=records, status=STATUS))).snapshots
    assert isinstance(found, StoredSnapshots)
    return found


def read_later(graph: SnapshotGraph, id: ObjectId) -> list[SnapshotRecord]:
    """The lineage of a snapshot, read from the rows."""
    found = []
    for one in graph.lineage_rows(id):
        if isinstance(one, int):
            own, parent, flushed_at_us, message = graph.stored.plain(one)
            one = SnapshotRecord(id=own, parent=parent, flushed_at_us=flushed_at_us, message=message)
        found.append(one)
    return found


def read_count(snapshots: StoredSnapshots) -> int:
    return snapshots.tables.read_count


def test_only_requested_snapshots_are_decoded() -> None:
    records = history(3000)
    info = RepoInfo(branches={"main": an_id(2999)}, snapshots=records, status=STATUS)
    found = decode_repo(encode_repo(info)).snapshots
    assert isinstance(found, StoredSnapshots)
    # Where the branch is.
    assert (len(found), read_count(found)) == (3000, 1)
    assert an_id(17) in found
    assert an_id(3000) not in found
    assert found.get(an_id(3000)) is None
    assert list(found) == list(records)
    assert read_count(found) == 1
    assert found[an_id(2999)] == records[an_id(2999)]
    assert found[an_id(2999)] == records[an_id(2999)]
    assert read_count(found) == 1
    assert found == records


def test_a_file_is_written_again_without_decoding_its_snapshots() -> None:
    graph = SnapshotGraph.of(stored(history(500)))
    graph = graph.set(an_id(500), record(500, 499)).delete(an_id(3))
    again = encode_and_keep(RepoInfo(branches={"main": an_id(500)}, snapshots=graph, status=STATUS))
    assert read_count(graph.stored) == 0
    expected = {**history(501)}
    del expected[an_id(3)]
    expected[an_id(4)] = replace(expected[an_id(4)], parent=None)
    assert again.info.snapshots == expected
    assert decode_repo(again.data).snapshots == expected
    assert decode_repo(again.data).branches == {"main": an_id(500)}


RECORDS = st.builds(
    SnapshotRecord,
    id=st.integers(0, 12).map(an_id),
    parent=st.none(),
    flushed_at_us=st.integers(0, 2**64 - 1),
    message=texts,
    metadata=st.just({}) | metadata,
    pruned_ancestor_tx_logs=st.just(()) | st.lists(st.integers(0, 3).map(an_id), max_size=2).map(tuple),
)


@pytest.fixture(autouse=True, params=[0, 32], ids=["by column", "one by one"])
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few snapshots are copied another way than many."""
    monkeypatch.setattr("icechunk.format.repo.snapshot_encoding._FEW", request.param)
    monkeypatch.setattr("icechunk.format.repo.codec._FEW", 0)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.lists(RECORDS | st.integers(0, 12).map(an_id), max_size=6), min_size=1, max_size=3), st.randoms())
def test_a_graph_equals_a_dict_after_any_changes_and_files(
    rounds: list[list[SnapshotRecord | ObjectId]], chance: random.Random
) -> None:
    graph, model = SnapshotGraph.of({}), dict[ObjectId, SnapshotRecord]()
    for changes in rounds:
        for change in changes:
            if isinstance(change, SnapshotRecord):
                parent = chance.choice([None, *model])
                one = replace(change, parent=None if parent == change.id else parent)
                graph, model[one.id] = graph.set(one.id, one), one
            elif change in model:
                graph = graph.delete(change)
                del model[change]
                for child in [one for one in model.values() if one.parent == change]:
                    model[child.id] = replace(child, parent=None)
                    graph = graph.set(child.id, model[child.id])
            else:
                with pytest.raises(KeyError):
                    graph.delete(change)
        assert (len(graph), set(graph)) == (len(model), set(model))
        assert graph == model
        assert {one.id for one in graph.values()} == set(model)
        assert dict(graph.parents()) == {one.id: one.parent for one in model.values()}
        for id in model:
            try:
                expected = list(graph.lineage(id))
            except FormatError:
                # Parents that were chosen later may form a cycle.
                with pytest.raises(FormatError):
                    read_later(graph, id)
            else:
                assert read_later(graph, id) == expected
        encoded = encode_and_keep(RepoInfo(snapshots=graph, status=STATUS))
        assert decode_repo(encoded.data).snapshots == model
        assert list(encoded.info.snapshots) == sorted(model)
        if model:
            read, kept = decode_repo(encoded.data).snapshots, encoded.info.snapshots
            assert isinstance(read, StoredSnapshots)
            assert isinstance(kept, StoredSnapshots)
            assert (read.all_ids(), read.parent_rows.tolist()) == (kept.all_ids(), kept.parent_rows.tolist())
            assert read.rows_by_id().tolist() == kept.rows_by_id().tolist()
        graph = SnapshotGraph.of(encoded.info.snapshots)


def test_changes_are_compacted_before_they_are_many() -> None:
    graph, most = SnapshotGraph.of(stored(history(10))), 0
    for i in range(10, 1500):
        graph = graph.set(an_id(i), record(i, i - 1)).compacted()
        most = max(most, graph.changed_count)
    assert most < 300
    assert graph == history(1500)
    assert [one.id for one in graph.lineage(an_id(1499))] == [an_id(i) for i in range(1499, -1, -1)]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 600), st.integers(0, 40), st.integers(0, 5), st.booleans(), st.randoms(use_true_random=False))
def test_a_graph_without_released_snapshots_equals_a_dict_without_them(
    kept_in_file: int, added: int, deleted: int, valid: bool, chance: random.Random
) -> None:
    # Parents are older, so that children of the released ones are released too where that is asked for.
    count = kept_in_file + added
    parents = [chance.choice([None, chance.randrange(i)]) if i else None for i in range(count)]
    model = {an_id(i): record(i, parent) for i, parent in enumerate(parents)}
    graph = SnapshotGraph.of(stored({id: model[id] for id in map(an_id, range(kept_in_file))}))
    for i in range(kept_in_file, count):
        graph = graph.set(an_id(i), model[an_id(i)])
    for id in chance.sample(list(model), min(deleted, len(model))):
        if not any(one.parent == id for one in model.values()):
            graph = graph.delete(id)
            del model[id]
    for one in chance.sample(list(model.values()), min(5, len(model))):
        model[one.id] = replace(one, message="changed")
        graph = graph.set(one.id, model[one.id])
    first, share = chance.randrange(count + 1), chance.choice([0, 1, 100])
    ids = {an_id(i) for i in range(first, count) if chance.randrange(100) <= share} & model.keys()
    if valid:
        for one in model.values():
            if one.parent in ids:
                ids.add(one.id)
    orphans = {one.id for one in model.values() if one.parent in ids and one.id not in ids}
    assert {child: list(ancestors) for child, ancestors in graph.children_of(ids)} == {
        child: [one.id for one in graph.lineage(child)][1:] for child in orphans
    }
    if orphans:
        with pytest.raises(ChildrenLeftError):
            graph.released(ids)
        return
    for missing in (an_id(count), *(id for id in map(an_id, range(count)) if id not in model)):
        with pytest.raises(KeyError) as caught:
            graph.released({*ids, missing})
        assert caught.value.args == (missing,)
    left = graph.released(ids)
    assert left == {id: one for id, one in model.items() if id not in ids}
    assert set(map(str, left.parents())) == {str((one.id, one.parent)) for one in left.values()}
    # Written at once, so that nothing is kept of what was released.
    assert left.changed_count <= 300
    assert graph == model
    if left:
        assert stored(left) == left


def test_a_graph_moves_onto_the_file_that_an_earlier_version_of_it_was_written_to() -> None:
    before = SnapshotGraph.of(stored(history(5))).set(an_id(5), record(5, 4)).set(an_id(6), record(6, 5))
    written = stored(before)
    now = before.set(an_id(7), record(7, 6)).set(an_id(6), record(6, 5, "amended")).delete(an_id(0))
    moved = now.based_on(written, before)
    assert moved == now
    assert moved.changed_count == 3
    assert moved.stored is written
    compacted = SnapshotGraph.of(stored(now))
    assert compacted.based_on(written, before) is compacted


def test_a_lineage_ends_where_a_parent_is_not_known() -> None:
    graph = SnapshotGraph.of({an_id(i): record(i, i - 1) for i in range(3, 6)})
    assert [one.id for one in graph.lineage(an_id(5))] == [an_id(5), an_id(4), an_id(3)]
    assert list(graph.lineage(an_id(9))) == []


# -------------------------------------------------------------------------- damaged files

LOOKS: list[Callable[[RepoInfo], object]] = [
    lambda info: an_id(7) in info.snapshots,
    lambda info: info.snapshots.get(an_id(7)),
    lambda info: list(info.snapshots),
    lambda info: list(SnapshotGraph.of(info.snapshots).parents()),
    lambda info: list(SnapshotGraph.of(info.snapshots).lineage(an_id(1))),
    lambda info: list(SnapshotGraph.of(info.snapshots).lineage_rows(an_id(1))),
    lambda info: SnapshotGraph.of(info.snapshots).set(an_id(7), record(7, None)),
    lambda info: list(info.snapshots.values()),
    encode_repo,
]


def table_of(i: int, parent: int = -1, message: object = "m") -> FlatTable:
    return FlatTable({0: id_struct(an_id(i)), 1: Scalar("i", parent), 2: u64(i), 3: message, 4: []})  # type: ignore[dict-item]


def file_of(tables: list[FlatTable]) -> bytes:
    status = FlatTable({0: u8(0), 1: u64(0)})
    root = FlatTable({0: u8(2), 1: [], 2: [], 3: [], 4: tables, 5: status, 7: []})
    return seal(FileType.REPO_INFO, 2, FlatWriter().finish(root))


def test_a_file_in_another_order_is_read_as_well() -> None:
    order = [5, 1, 9, 0, 3]
    info = decode_repo(file_of([table_of(i, parent=(row + 1) % 5) for row, i in enumerate(order)]))
    assert list(info.snapshots) == [an_id(i) for i in order]
    for row, i in enumerate(order):
        assert info.snapshots[an_id(i)].flushed_at_us == i
        assert info.snapshots[an_id(i)].parent == an_id(order[(row + 1) % 5])
    assert an_id(2) not in info.snapshots
    again = decode_repo(encode_repo(info)).snapshots
    assert list(again) == sorted(an_id(i) for i in order)
    assert again == info.snapshots


def test_ids_with_a_common_beginning_are_distinguished() -> None:
    ids = [ObjectId(b"8 bytes!" + bytes(3) + bytes((i,))) for i in (0, 1, 255)]
    records = {id: SnapshotRecord(id=id, parent=None, flushed_at_us=1, message=id.hex()) for id in ids}
    found = stored(records)
    assert [found[id].message for id in ids] == [id.hex() for id in ids]
    assert ObjectId(b"8 bytes!" + bytes((0, 0, 0, 2))) not in found


@pytest.mark.parametrize("order", [[1, 1], [3, 1, 3]])
def test_a_duplicate_id_is_refused_by_every_lookup(order: list[int]) -> None:
    for look in LOOKS:
        info = decode_repo(file_of([table_of(i) for i in order]))
        for _ in range(2):
            with raises(FormatError, "invalid-file-format", an_id(order[0]).hex()):
                look(info)


@pytest.mark.parametrize("parent", [-2, 2, 2**31 - 1])
def test_a_missing_parent_is_refused_by_every_lookup(parent: int) -> None:
    for look in LOOKS:
        info = decode_repo(file_of([table_of(1), table_of(2, parent=parent)]))
        with raises(FormatError, "invalid-file-format", an_id(2).hex(), parent):
            look(info)


def test_reading_branches_reads_nothing_of_other_snapshots() -> None:
    status = FlatTable({0: u8(0), 1: u64(0)})
    branches = [FlatTable({0: "main", 1: Scalar("I", 1)})]
    tables = [table_of(1), table_of(2), FlatTable({3: "no id"})]
    root = FlatTable({0: u8(2), 1: [], 2: branches, 3: [], 4: tables, 5: status, 7: []})
    info = decode_repo(seal(FileType.REPO_INFO, 2, FlatWriter().finish(root)))
    assert info.branches == {"main": an_id(2)}
    assert len(info.snapshots) == 3
    for look in LOOKS:
        with raises(FormatError, "invalid-file-format", "no id"):  # words: only they tell the defect
            look(info)
    with raises(FormatError, "invalid-file-format", "'id'"):
        info.snapshots.id(2)  # type: ignore[attr-defined]


def test_a_history_whose_parents_form_a_cycle_ends_with_an_error() -> None:
    graph = SnapshotGraph.of(decode_repo(file_of([table_of(1, 1), table_of(2, 2), table_of(3, 0)])).snapshots)
    with raises(FormatError, "invalid-file-format", "cycle"):  # words: only they tell the defect
        list(graph.lineage(an_id(1)))
    with raises(FormatError, "invalid-file-format", "cycle"):  # words: only they tell the defect
        list(graph.lineage_rows(an_id(1)))


def test_only_the_read_part_of_a_long_lineage_is_decoded_and_an_unreadable_one_is_refused_at_once() -> None:
    records = history(300)
    found = stored(records)
    graph = SnapshotGraph.of(found)
    assert all(isinstance(one, int) for one in graph.lineage_rows(an_id(299)))
    assert read_count(found) == 0
    assert read_later(graph, an_id(299)) == list(graph.lineage(an_id(299)))
    _, payload = unseal(encode_repo(RepoInfo(snapshots=records, status=STATUS)), FileType.REPO_INFO)
    broken = payload[:].replace(b"one more", b"one m\xffre", 1)
    graph = SnapshotGraph.of(decode_repo(seal(FileType.REPO_INFO, 2, broken)).snapshots)
    with raises(FormatError, "invalid-file-format", "UTF-8"):
        list(graph.lineage_rows(an_id(299)))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms(use_true_random=False))
def test_a_damaged_lineage_is_refused_or_read_later_as_at_once(chance: random.Random) -> None:
    _, payload = unseal(encode_repo(RepoInfo(snapshots=history(4), status=STATUS)), FileType.REPO_INFO)
    octets = bytearray(payload)
    at = chance.randrange(8, len(octets))
    octets[at] = chance.choice((0, 1, 4, 255, octets[at] ^ 1 << chance.randrange(8)))
    try:
        graph = SnapshotGraph.of(decode_repo(seal(FileType.REPO_INFO, 2, octets)).snapshots)
        rows = list(graph.lineage_rows(an_id(3)))
    except FormatError:
        return
    del rows
    assert read_later(graph, an_id(3)) == list(graph.lineage(an_id(3)))


def test_a_damaged_snapshot_fails_only_the_reads_of_that_snapshot() -> None:
    info = decode_repo(file_of([table_of(1), table_of(2, message=None), table_of(3, message=Items(b"\xff", 1))]))
    assert info.snapshots[an_id(1)].message == "m"
    for damaged in (2, 3):
        for _ in range(2):
            with raises(FormatError, "invalid-file-format", "'message'" if damaged == 2 else "UTF-8"):
                info.snapshots[an_id(damaged)]
    with raises(FormatError, "invalid-file-format", "'message'"):
        encode_repo(info)
    graph = SnapshotGraph.of(info.snapshots)
    for i in range(10, 400):
        graph = graph.set(an_id(i), record(i, None)).compacted()
    assert graph[an_id(399)] == record(399, None)


@pytest.mark.parametrize("slot", [3, 4])
def test_many_snapshots_that_share_one_huge_text_are_refused_before_memory_fills(slot: int) -> None:
    count = 5000
    tables = [table_of(i) for i in range(count)]
    _, payload = unseal(file_of(tables), FileType.REPO_INFO)
    octets = bytearray(payload)
    root = struct.unpack_from("<I", octets)[0]
    fields = root - struct.unpack_from("<i", octets, root)[0]
    field = root + struct.unpack_from("<H", octets, fields + 4 + 2 * 4)[0]
    vector = field + struct.unpack_from("<I", octets, field)[0]
    huge = len(octets) + -len(octets) % 4
    octets += bytes(huge - len(octets)) + struct.pack("<I", 1_000_000) + bytes(4_000_000)
    for i in range(count):
        at = vector + 4 + 4 * i
        table = at + struct.unpack_from("<I", octets, at)[0]
        vtable = table - struct.unpack_from("<i", octets, table)[0]
        offset = table + struct.unpack_from("<H", octets, vtable + 4 + 2 * slot)[0]
        struct.pack_into("<I", octets, offset, huge - offset)
    info = decode_repo(seal(FileType.REPO_INFO, 2, octets, 1))
    began = time.process_time()
    with pytest.raises(FormatError):
        encode_repo(info)
    with pytest.raises(FormatError):
        list(info.snapshots.values())
    assert time.process_time() - began < 5


@given(
    count=st.integers(0, 90),
    changed=st.dictionaries(st.integers(0, 99), st.one_of(st.none(), st.integers(0, 2000)), max_size=60),
    limit_us=st.one_of(st.integers(-5, 1100), st.just(2**64)),
)
def test_columns_answer_as_the_records_do(count: int, changed: dict[int, int | None], limit_us: int) -> None:
    records = history(count)
    graph = SnapshotGraph.of(stored(records) if records else {})
    for number, time_us in changed.items():
        id = an_id(number)
        if time_us is not None:
            records[id] = SnapshotRecord(id=id, parent=None, flushed_at_us=time_us, message="")
            graph = graph.set(id, records[id])
        elif id in records:
            del records[id]
            graph = graph.delete(id)
    values = records.values()
    assert dict(graph.parents()) == {one.id: one.parent for one in values}
    assert graph.roots() == {one.id for one in values if one.parent is None}
    assert graph.older_than(limit_us) == sorted(one.id for one in values if one.flushed_at_us < limit_us)
    asked = [an_id(number) for number in range(0, 99, 1 + count % 3)]
    rows = [graph.stored.find(id) for id in asked]
    assert graph.stored.find_all(asked).tolist() == [-1 if row is None else row for row in rows]


@settings(max_examples=20)
@given(count=st.integers(33, 300), seed=st.integers(0, 2**32), same=st.integers(0, 3))
def test_many_ids_are_found_as_each_of_them_is(count: int, seed: int, same: int) -> None:
    chance = random.Random(seed)
    ids = [ObjectId(chance.randbytes(12)) for _ in range(count)]
    # Some begin with the same bytes as one that is not asked for.
    ids += [ObjectId(id[:8] + chance.randbytes(4)) for id in ids[:same]]
    others = [ObjectId(id[:8] + chance.randbytes(4)) for id in ids[-9:]]
    records = {id: SnapshotRecord(id=id, parent=None, flushed_at_us=1, message="") for id in ids}
    found = stored(records)
    asked = [*others, *chance.sample(ids, len(ids) - same)]
    assert found.find_all(asked).tolist() == [-1 if (row := found.find(id)) is None else row for id in asked]
    assert {found.id(row) for row in found.rows_of(set(asked)).tolist()} == {id for id in asked if id in records}


def test_a_file_without_half_of_the_snapshots_is_written_as_from_the_records() -> None:
    records = history(200)
    gone = [an_id(number) for number in range(1, 120)]
    left = {id: one for id, one in records.items() if id not in gone}
    left[an_id(120)] = replace(left[an_id(120)], parent=an_id(0), pruned_ancestor_tx_logs=tuple(gone))
    graph = SnapshotGraph.of(stored(records)).set(an_id(120), left[an_id(120)]).without(gone)
    assert dict(stored(graph)) == left
    assert dict(graph.compacted()) == left
