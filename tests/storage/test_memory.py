from __future__ import annotations

import asyncio
import contextlib
import pickle
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icechunk.errors import InvalidInputError, PreconditionFailedError
from icechunk.runtime.clock import Sources
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import Absent, Matches
from icechunk.testing.storage_contract import StorageContract
from tests.raising import raises


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage()


class TestMemoryContract(StorageContract):
    pass


async def test_a_version_never_comes_back_with_its_content() -> None:
    storage = MemoryStorage()
    first = await storage.put("x", b"a")
    await storage.put("x", b"b")
    again = await storage.put("x", b"a")
    assert again.version != first.version
    with pytest.raises(PreconditionFailedError):
        await storage.put("x", b"c", Matches(first.version))


KEYS = st.sampled_from(["a", "a/b", "b", "ab", "é"])


@given(st.lists(st.tuples(st.sampled_from(["put", "delete", "list"]), KEYS)))
def test_a_listing_is_in_order_after_any_writes_since_the_last(steps: list[tuple[str, str]]) -> None:
    async def run() -> None:
        storage, expected = MemoryStorage(), set[str]()
        for verb, key in [*steps, ("list", "")]:
            if verb == "put":
                await storage.put(key, b"")
                expected.add(key)
            elif verb == "delete":
                await storage.delete([key])
                expected.discard(key)
            else:
                assert [item.key async for page in storage.list_pages() for item in page] == sorted(expected)

    asyncio.run(run())


async def test_its_clock_is_the_injected_one() -> None:
    storage = MemoryStorage(Sources(wall_us=lambda: 123))
    assert (await storage.put("x", b"")).date_us == 123
    got = await storage.get("x")
    assert (got.modified_us, got.date_us) == (123, 123)


def test_pickling_is_refused_with_the_remedy() -> None:
    with raises(InvalidInputError, "pickle", "local_filesystem_storage"):
        pickle.dumps(MemoryStorage())


def test_two_memories_are_two_places() -> None:
    assert MemoryStorage() != MemoryStorage()


def test_of_threads_that_create_one_key_exactly_one_wins() -> None:
    storage = MemoryStorage()
    won: list[int] = []
    barrier = threading.Barrier(8)

    def create(n: int) -> None:
        async def attempt() -> None:
            await storage.put("x", b"%d" % n, Absent())
            won.append(n)

        barrier.wait()
        with contextlib.suppress(PreconditionFailedError):
            asyncio.run(attempt())

    threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
