"""Any sequence of commands, savepoints, round trips and commits equals a naive model."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from icechunk.errors import AlreadyExistsError, IcechunkError, InvalidInputError, NodeNotFoundError
from icechunk.format.ids import NodeId
from icechunk.format.values import INLINE, NATIVE, VIRTUAL, ChunkRef, NodeKind, NodeSnapshot, TransactionLog
from icechunk.log.session.columns import from_rows
from icechunk.log.session.log import SessionLog
from icechunk.log.session.merge.diff import Changes, net_diff
from icechunk.log.session.plan.compaction import Policy
from icechunk.log.session.wire import decode_log, encode_log
from tests.log.session.builders import Repo, array_json, check_snapshot, group_json, object_id

Coords = tuple[int, ...]

PATHS = ("/", "/a", "/a/b", "/a/b/c", "/a-b", "/a0", "/g", "/g/x")
SHAPES = ((), (0,), (3,), (9,), (6, 5), (2, 7), (3, 3, 3))


@dataclass
class Node:
    key: int
    kind: NodeKind
    document: bytes
    shape: Coords = ()


@dataclass
class World:
    nodes: dict[str, Node] = field(default_factory=dict)
    chunks: dict[tuple[int, Coords], ChunkRef] = field(default_factory=dict)
    touched: set[tuple[int, Coords]] = field(default_factory=set)


def in_grid(coords: Coords, shape: Coords) -> bool:
    return len(coords) == len(shape) and all(c < n for c, n in zip(coords, shape, strict=True))


class SessionLogMachine(RuleBasedStateMachine):
    @initialize(
        max_refs=st.sampled_from([2, 5, 1000]),
        fan_in=st.integers(2, 4),
        share=st.sampled_from([0, 3, 1000]),
        layout=st.sampled_from(["auto", "auto", "explicit", "tiles"]),
    )
    def start(self, max_refs: int, fan_in: int, share: int, layout: str) -> None:
        if layout == "explicit":
            policy = Policy.explicit()
        else:
            policy = Policy(
                max_refs_per_manifest=max_refs,
                fan_in=fan_in,
                share_below_refs=share,
                tile_shape=(lambda node: (2,) * len(node.shape)) if layout == "tiles" else None,
            )
        self.repo = Repo(policy)
        self.log = self.repo.log()
        self.base = World()
        self.now = World()
        self.first = self.repo.snapshot
        self.logs: list[TransactionLog] = []
        self.saved: list[Any] = []
        self.numbers = itertools.count(1)
        # Something to write to from the first step on: most rules are about chunks.
        self.set_metadata("/", None, 0)
        self.set_metadata("/a", (6, 5), 0)
        self.set_metadata("/a-b", (9,), 0)
        self.set_metadata("/g", None, 0)
        self.set_metadata("/g/x", (12,), 0)

    def node_at(self, path: str) -> Node | None:
        return self.now.nodes.get(path)

    def drop(self, keys: set[int]) -> None:
        self.now.chunks = {k: v for k, v in self.now.chunks.items() if k[0] not in keys}
        self.now.touched = {k for k in self.now.touched if k[0] not in keys}

    @rule(path=st.sampled_from(PATHS), shape=st.sampled_from((None, *SHAPES)), mark=st.integers(0, 2))
    def set_metadata(self, path: str, shape: Coords | None, mark: int) -> None:
        document = group_json(mark=mark) if shape is None else array_json(shape, mark=mark)
        kind = NodeKind.GROUP if shape is None else NodeKind.ARRAY
        node = self.node_at(path)
        if node is not None and node.kind != kind:
            with pytest.raises(AlreadyExistsError):
                self.log.set_metadata(path, document)
            return
        self.log.set_metadata(path, document)
        if node is None:
            self.now.nodes[path] = Node(next(self.numbers), kind, document, shape or ())
        else:
            if len(node.shape) != len(shape or ()):
                self.drop({node.key})
            self.now.nodes[path] = Node(node.key, kind, document, shape or ())

    @rule(path=st.sampled_from(PATHS[1:]))
    def delete_node(self, path: str) -> None:
        if self.node_at(path) is None:
            with pytest.raises(NodeNotFoundError):
                self.log.delete_node(path)
            return
        self.log.delete_node(path)
        prefix = path.rstrip("/") + "/"
        gone = {p for p in self.now.nodes if p == path or p.startswith(prefix)}
        self.drop({self.now.nodes[p].key for p in gone})
        self.now.nodes = {p: n for p, n in self.now.nodes.items() if p not in gone}

    @rule(source=st.sampled_from(PATHS), goal=st.sampled_from(PATHS))
    def move(self, source: str, goal: str) -> None:
        prefix, into = source.rstrip("/") + "/", goal.rstrip("/") + "/"
        parent = self.node_at(goal.rpartition("/")[0] or "/")
        allowed = (
            source in self.now.nodes
            and source != goal
            and not goal.startswith(prefix)
            and not any(p == goal or p.startswith(into) for p in self.now.nodes)
            and parent is not None
            and parent.kind == NodeKind.GROUP
        )
        if not allowed:
            with pytest.raises(IcechunkError):
                self.log.move_node(source, goal)
            return
        self.log.move_node(source, goal)
        self.now.nodes = {
            goal + p[len(source) :] if p == source or p.startswith(prefix) else p: n for p, n in self.now.nodes.items()
        }

    def arrays(self) -> list[str]:
        return sorted(p for p, n in self.now.nodes.items() if n.kind == NodeKind.ARRAY)

    def ref(self, kind: int) -> ChunkRef:
        n = next(self.numbers)
        match kind:
            case 0:
                return ChunkRef(INLINE, data=b"%d" % n, length=len(b"%d" % n))
            case 1:
                return ChunkRef(NATIVE, chunk_id=object_id(n), offset=n, length=3)
            case 2:
                return ChunkRef(VIRTUAL, location=f"s3://b/{n % 5}", offset=n, length=3)
            case 3:
                return ChunkRef(VIRTUAL, location=f"s3://b/{n % 5}", offset=n, length=3, etag=f"e{n % 3}")
            case _:
                return ChunkRef(VIRTUAL, location=f"s3://b/{n % 5}", offset=n, length=3, last_modified=n)

    @precondition(lambda self: self.arrays())
    @rule(data=st.data(), kind=st.integers(0, 5))
    def set_one(self, data: st.DataObject, kind: int) -> None:
        path = data.draw(st.sampled_from(self.arrays()))
        model, node = self.now.nodes[path], self.log.node(path)
        assert node is not None
        coords = tuple(data.draw(st.integers(0, n)) for n in model.shape)
        ref = self.ref(kind)

        def run() -> None:
            if kind == 5:
                self.log.delete_chunk(node, coords)
            elif ref.kind == INLINE:
                assert ref.data is not None
                self.log.set_inline(node, coords, ref.data)
            elif ref.kind == NATIVE:
                assert ref.chunk_id is not None
                self.log.set_native(node, coords, ref.chunk_id, ref.offset, ref.length)
            else:
                self.log.set_refs(node, from_rows({coords: ref}, len(coords)))

        if kind != 5 and not in_grid(coords, model.shape):
            with pytest.raises(InvalidInputError):
                run()
            return
        run()
        self.record({coords: None if kind == 5 else ref}, model)

    def record(self, rows: dict[Coords, ChunkRef | None], model: Node) -> None:
        for coords, ref in rows.items():
            if not in_grid(coords, model.shape):
                continue
            self.now.touched.add((model.key, coords))
            if ref is None:
                self.now.chunks.pop((model.key, coords), None)
            else:
                self.now.chunks[model.key, coords] = ref

    @precondition(lambda self: self.arrays())
    @rule(data=st.data(), delete=st.booleans())
    def box(self, data: st.DataObject, delete: bool) -> None:
        self.set_many(data, delete=delete, box=True)

    @precondition(lambda self: self.arrays())
    @rule(data=st.data(), delete=st.booleans())
    def scattered(self, data: st.DataObject, delete: bool) -> None:
        self.set_many(data, delete=delete, box=False)

    @precondition(lambda self: self.arrays())
    @rule(data=st.data())
    def write_and_commit(self, data: st.DataObject) -> None:
        for path in data.draw(st.lists(st.sampled_from(self.arrays()), min_size=1, max_size=3)):
            self.set_many(data, delete=False, box=data.draw(st.booleans()), path=path)
        self.commit()

    def set_many(self, data: st.DataObject, *, delete: bool, box: bool, path: str | None = None) -> None:
        path = path or data.draw(st.sampled_from(self.arrays()))
        model, node = self.now.nodes[path], self.log.node(path)
        assert node is not None
        if not prod(model.shape):
            return
        spot = st.tuples(*(st.integers(0, n - 1) for n in model.shape))
        if box:
            low, high = (
                (tuple(map(f, *data.draw(st.tuples(spot, spot)))) for f in (min, max)) if model.shape else ((), ())
            )
            coords = list(itertools.product(*(range(a, b + 1) for a, b in zip(low, high, strict=True))))
        else:
            coords = data.draw(st.lists(spot, max_size=12, unique=True))
        rows: dict[Coords, ChunkRef | None] = {c: self.ref(i % 5) for i, c in enumerate(coords)}
        if delete:
            self.log.delete_chunks(node, np.array(coords, np.uint32).reshape(len(coords), len(model.shape)))
            rows = dict.fromkeys(coords)
        else:
            self.log.set_refs(node, from_rows(rows, len(model.shape)))
        self.record(rows, model)

    @rule()
    def savepoint(self) -> None:
        self.saved.append((self.log.savepoint(), copy.deepcopy(self.now)))

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.saved) - 1))
        savepoint, world = self.saved[i]
        self.log.rollback(savepoint)
        self.now = copy.deepcopy(world)
        del self.saved[i + 1 :]

    @rule(which=st.sampled_from(["clear", "discard", *["neither"] * 8]))
    def start_again(self, which: str) -> None:
        if which == "clear":
            self.log.clear()
            self.now = World()
        elif which == "discard":
            self.log.discard()
            self.now = copy.deepcopy(self.base)
            self.saved = []
            assert self.log.is_empty

    @rule()
    def serialise(self) -> None:
        data = encode_log(self.log.base.id, self.log.events)
        self.log = decode_log(data, self.repo.snapshot, self.repo.new_node_id)
        assert encode_log(self.log.base.id, self.log.events) == data
        self.saved = []

    @rule()
    def replay_on_the_same_base(self) -> None:
        self.log = self.log.rebased(self.repo.snapshot)
        self.saved = []

    @rule()
    def commit(self) -> None:
        before = {p: n.id for p, n in self.base_ids().items()}
        status = self.log.changes()
        done = self.repo.commit(self.log)
        self.now.chunks = {
            (key, coords): ref
            for (key, coords), ref in self.now.chunks.items()
            if any(n.key == key and in_grid(coords, n.shape) for n in self.now.nodes.values())
        }
        self.check_changes(status, done.transaction, before)
        assert check_snapshot(self.repo) == len(self.now.chunks)
        self.check_reads(self.repo.log())
        kept = {i for m in done.snapshot.nodes.values() for i, _ in m.manifests}
        assert {m.id for m in done.manifests} <= kept, "a manifest was written that no array uses"
        self.logs.append(done.transaction)
        self.check_diff()
        self.now.touched = set()
        self.base = copy.deepcopy(self.now)
        self.log = self.repo.log()
        self.saved = []

    def base_ids(self) -> dict[str, NodeSnapshot]:
        return dict(self.repo.snapshot.nodes)

    def check_changes(self, status: Changes, transaction: TransactionLog, before: dict[str, NodeId]) -> None:
        old = {n.key: (p, n) for p, n in self.base.nodes.items()}
        new = {n.key: (p, n) for p, n in self.now.nodes.items()}
        ids = {p: n.id for p, n in self.repo.snapshot.nodes.items()}
        for kind, fresh, gone, updated, names in (
            (
                NodeKind.GROUP,
                transaction.new_groups,
                transaction.deleted_groups,
                transaction.updated_groups,
                (status.new_groups, status.deleted_groups, status.updated_groups),
            ),
            (
                NodeKind.ARRAY,
                transaction.new_arrays,
                transaction.deleted_arrays,
                transaction.updated_arrays,
                (status.new_arrays, status.deleted_arrays, status.updated_arrays),
            ),
        ):
            made = {p for k, (p, n) in new.items() if k not in old and n.kind == kind}
            lost = {p for k, (p, n) in old.items() if k not in new and n.kind == kind}
            other = {p for k, (p, n) in new.items() if k in old and n.kind == kind and n.document != old[k][1].document}
            assert (made, lost, other) == tuple(map(set, names))
            assert fresh == {ids[p] for p in made}
            assert gone == {before[p] for p in lost}
            assert updated == {ids[p] for p in other}
        moves = [(old[k][0], p) for k, (p, _) in new.items() if k in old and old[k][0] != p]
        assert list(status.moved_nodes) == sorted(moves, key=lambda m: m[0].split("/"))
        assert status.moved_nodes == tuple((m.source, m.target) for m in transaction.moved_nodes)
        chunks: dict[str, list[Coords]] = {}
        for key, coords in sorted(self.now.touched):
            chunks.setdefault(new[key][0], []).append(coords)
        assert {p: [tuple(c) for c in v.tolist()] for p, v in status.updated_chunks.items()} == chunks
        assert list(transaction.updated_chunks) == sorted(ids[p] for p in chunks)

    def check_diff(self) -> None:
        net = net_diff(self.logs, self.first, self.repo.snapshot)
        assert {n.path for n in net.new} == set(self.repo.snapshot.nodes)
        assert not net.deleted
        assert not net.moved

    def check_reads(self, log: SessionLog) -> None:
        paths = sorted(self.now.nodes, key=str.encode)
        assert [n.path for n in log.nodes()] == paths
        for path in paths:
            model, node = self.now.nodes[path], log.node(path)
            assert node is not None
            assert (node.kind, node.user_data) == (model.kind, model.document)
            assert tuple(d.array_length for d in node.shape) == model.shape
            depth = path.rstrip("/").count("/") + 1
            prefix = path.rstrip("/") + "/"
            inner = [p for p in paths if p.startswith(prefix) and p.count("/") == depth and p != "/"]
            assert log.children(path) == sorted(p[len(prefix) :] for p in inner)
            for coords in itertools.product(*(range(n + 1) for n in model.shape)):
                expected = self.now.chunks.get((model.key, coords)) if in_grid(coords, model.shape) else None
                assert self.repo.chunk(log, node, coords) == expected

    @invariant()
    def reads_equal_the_model(self) -> None:
        if hasattr(self, "log"):
            self.check_reads(self.log)


TestSessionLog = SessionLogMachine.TestCase
TestSessionLog.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
