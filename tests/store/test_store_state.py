"""zarr's state machines on our store, with commits between their steps.

`ZarrHierarchyStateMachine` runs as it is, against zarr's own memory store; added are commits, reopening from a fresh
repository, discarding, savepoints, and comparisons of every chunk and document. Its `delete_dir` of zarr 3.1.6 forgets
siblings whose name begins with the deleted one (``startswith`` without the slash, repaired in later versions), so here
the machine's bookkeeping is read off its model.

`ZarrStoreStateMachine` keeps any bytes under any key. Shaped to a hierarchy: keys are drawn from a few groups and
arrays; values of zarr.json are documents; a chunk without its array is refused and changes nothing; deleting a
zarr.json deletes what is below it in the model too. Its invariants run unchanged.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test
from hypothesis.strategies import DataObject
from zarr.core.buffer import Buffer
from zarr.testing.stateful import ZarrHierarchyStateMachine, ZarrStoreStateMachine

import icechunk
from icechunk import IcechunkStore, NodeNotFoundError, Repository, Session
from icechunk.storage.memory import MemoryStorage
from tests.raising import raises
from tests.store.store_builders import PROTOTYPE, array_document, buffer, group_document

SETTINGS = settings(
    max_examples=12,
    stateful_step_count=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::zarr.errors.UnstableSpecificationWarning", "ignore::zarr.errors.ZarrUserWarning"
)


class Committing:
    """A repository under test: its commits, and the snapshot of its newest session."""

    def __init__(self) -> None:
        self.storage = MemoryStorage()
        # Chunks of a few bytes: half of them are stored as objects.
        self.repository = Repository.create(self.storage, icechunk.RepositoryConfig(inline_chunk_threshold_bytes=16))
        self.session: Session = self.repository.writable_session("main")

    def commit(self) -> IcechunkStore:
        """Commit if anything changed; the store of a new session on the branch."""
        if self.session.has_uncommitted_changes:
            before = self.session.snapshot_id
            assert self.session.commit("state") != before
        self.session = self.repository.writable_session("main")
        assert not self.session.has_uncommitted_changes
        assert self.session.status().is_empty()
        return self.session.store

    def reopen(self) -> IcechunkStore:
        """Commit, and see it with fresh eyes."""
        self.commit()
        self.repository = Repository.open(self.storage)
        self.session = self.repository.writable_session("main")
        return self.session.store


class HierarchyMachine(ZarrHierarchyStateMachine):
    def __init__(self) -> None:
        self.repo = Committing()
        self.committed: tuple[dict[str, Buffer], set[str], set[str]] | None = None
        self.saved: tuple[Any, tuple[dict[str, Buffer], set[str], set[str]]] | None = None
        super().__init__(self.repo.session.store)

    @rule(data=st.data())
    @precondition(lambda self: bool(self.all_arrays) or bool(self.all_groups))
    def delete_dir(self, data: DataObject) -> None:
        groups, arrays = self.all_groups, self.all_arrays
        super().delete_dir(data)
        there = {key.removesuffix("/zarr.json") for key in self.model._store_dict if key.endswith("/zarr.json")}
        self.all_groups, self.all_arrays = groups & there, arrays & there

    @precondition(lambda self: bool(self.all_groups))
    @rule(data=st.data())
    def check_list_dir(self, data: DataObject) -> None:
        path = self.draw_directory(data)
        # An array has a directory of chunks whether it has chunks or not, as in the official library.
        expected = set(self._sync_iter(self.model.list_dir(path))) | ({"c"} if path in self.all_arrays else set())
        assert sorted(self._sync_iter(self.store.list_dir(path))) == sorted(expected)

    @rule()
    def commit(self) -> None:
        self.store = self.repo.commit()
        self.keep()

    @rule()
    def reopen(self) -> None:
        self.store = self.repo.reopen()
        self.keep()

    def keep(self) -> None:
        self.check_bytes()
        self.committed, self.saved = self.state(), None

    def state(self) -> tuple[dict[str, Buffer], set[str], set[str]]:
        return dict(self.model._store_dict), set(self.all_groups), set(self.all_arrays)

    def restore(self, state: tuple[dict[str, Buffer], set[str], set[str]]) -> None:
        model, groups, arrays = state
        self.model._store_dict.clear()
        self.model._store_dict.update(model)
        self.all_groups, self.all_arrays = set(groups), set(arrays)

    @precondition(lambda self: self.committed is not None)
    @rule()
    def discard(self) -> None:
        assert self.committed is not None
        self.repo.session.discard_changes()
        assert not self.repo.session.has_uncommitted_changes
        self.saved = None
        self.restore(self.committed)

    @rule()
    def savepoint(self) -> None:
        self.saved = (self.repo.session.savepoint(), self.state())

    @precondition(lambda self: self.saved is not None)
    @rule()
    def rollback(self) -> None:
        assert self.saved is not None
        savepoint, state = self.saved
        self.repo.session.rollback(savepoint)
        self.restore(state)

    @invariant()
    def check_bytes(self) -> None:
        for key, expected in self.model._store_dict.items():
            found = self._sync(self.store.get(key, PROTOTYPE))
            assert found is not None, key
            if key.endswith("zarr.json"):
                # zarr 3.1.6's machine draws dimension names for each store anew.
                # Not by orjson, which refuses lone surrogates; attributes may have them.
                documents = [json.loads(value.to_bytes()) for value in (found, expected)]
                for document in documents:
                    document.pop("dimension_names", None)
                assert documents[0] == documents[1]
            else:
                assert found.to_bytes() == expected.to_bytes()

    @invariant()
    def check_sizes(self) -> None:
        chunks = {key: len(value) for key, value in self.model._store_dict.items() if not key.endswith("zarr.json")}
        documents = {key: self._sync(self.store.getsize(key)) for key in self.model._store_dict if key not in chunks}
        for key, size in chunks.items():
            assert self._sync(self.store.getsize(key)) == size
        assert self._sync(self.store.getsize_prefix("")) == sum(chunks.values()) + sum(documents.values())


GROUPS = ("", "a", "a/b", "ab")
ARRAYS = {"v": (3,), "a/v": (2, 2), "a/b/s": ()}
CHUNK_KEYS = [
    "/".join([path, "c", *map(str, coords)])
    for path, grid in ARRAYS.items()
    for coords in itertools.product(*map(range, grid))
]
METADATA_KEYS = [f"{path}/zarr.json".lstrip("/") for path in (*GROUPS, *ARRAYS)]


class StoreMachine(ZarrStoreStateMachine):
    def __init__(self) -> None:
        self.repo = Committing()
        super().__init__(self.repo.session.store)

    @rule(key=st.sampled_from(CHUNK_KEYS + METADATA_KEYS), data=st.binary(min_size=1, max_size=40))
    def set(self, key: str, data: bytes) -> None:
        path, _, _ = key.partition("/c") if key in CHUNK_KEYS else key.rpartition("/zarr.json")
        if key in CHUNK_KEYS:
            if f"{path}/zarr.json" not in self.model:
                before = self.repo.session.status()
                with raises(NodeNotFoundError, "node-not-found", repr(f"/{path}")):
                    self.store.set(key, buffer(data))
                assert self.repo.session.status() == before
                return
            value = data
        else:
            attributes = {"value": list(data)}
            grid = ARRAYS.get(path)
            value = group_document(**attributes) if grid is None else array_document(grid, attributes=attributes)
        self.store.set(key, buffer(value))
        self.model[key] = buffer(value)

    @rule(key=st.sampled_from(CHUNK_KEYS + METADATA_KEYS), data=st.data())
    def get_invalid_zarr_keys(self, key: str, data: DataObject) -> None:
        assume(key not in self.model)
        assert self.store.get(key, PROTOTYPE) is None

    @precondition(lambda self: len(self.model) > 0)
    @rule(data=st.data())
    def delete(self, data: DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.model)))
        self.store.delete(key)
        below = key.removesuffix("zarr.json") if key.endswith("zarr.json") else key
        for other in [other for other in self.model if other.startswith(below)]:
            del self.model[other]

    @rule(key=st.sampled_from(CHUNK_KEYS + METADATA_KEYS))
    def exists(self, key: str) -> None:
        assert self.store.exists(key) == (key in self.model)

    @rule(prefix=st.sampled_from(["", "a", "a/", "a/b", "ab", "v", "v/c", "a/v/c", "a/v/c/0", "a/v/c/0/1", "a/b/s/c"]))
    def list(self, prefix: str) -> None:
        store = self.store.store
        directory = prefix.rstrip("/") + "/" if prefix else ""
        below = [key.removeprefix(directory) for key in self.model if key.startswith(directory)]
        names = {key.split("/")[0] for key in below}
        if directory.rstrip("/") in ARRAYS and f"{directory}zarr.json" in self.model:
            names.add(
                "c"
            )  # an array has a directory of chunks whether it has chunks or not, as in the official library
        assert sorted(self.store._sync_iter(store.list_dir(prefix))) == sorted(names)
        assert self.store.is_empty(prefix) == (not names)
        found = sorted(self.store._sync_iter(store.list_prefix(prefix)))
        assert found == sorted(key for key in self.model if key.startswith(prefix))

    @rule()
    def commit(self) -> None:
        self.store.store = self.repo.commit()

    @rule()
    def reopen(self) -> None:
        self.store.store = self.repo.reopen()


def test_hierarchy_equals_that_of_a_memory_store_of_zarr_after_commits_and_reopening() -> None:
    run_state_machine_as_test(HierarchyMachine, settings=SETTINGS)


def test_store_is_a_mapping_of_the_keys_of_a_hierarchy_through_commits_and_reopening() -> None:
    run_state_machine_as_test(StoreMachine, settings=settings(SETTINGS, max_examples=20))


def test_machines_leave_no_task_on_zarrs_loop() -> None:
    from zarr.core.sync import sync

    async def others() -> set[str]:
        return {task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()}

    repo = Committing()
    store = repo.session.store
    sync(store.set("zarr.json", buffer(group_document())))
    sync(store.set("v/zarr.json", buffer(array_document((3,)))))
    sync(store.set("v/c/0", buffer(bytes(100))))
    repo.commit()
    assert sync(others()) == set()
