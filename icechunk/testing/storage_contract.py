"""The contract of every `Storage`, as tests.

A back end's test subclasses `StorageContract` and provides the fixture ``storage``: an empty storage. No override may
weaken a test.
"""

from __future__ import annotations

import asyncio
import time
from typing import ClassVar

import pytest

from icechunk.errors import InvalidInputError, ObjectNotFoundError, PreconditionFailedError
from icechunk.storage.port import (
    Absent,
    ByteRange,
    Following,
    Matches,
    ObjectInfo,
    Put,
    Range,
    Storage,
    Suffix,
    Version,
)

__all__ = ["StorageContract"]

_DAY_US = 24 * 3600 * 1_000_000

ODD_KEYS = [
    "a b",
    "a+b",
    "a%2Fb",
    "a%b",
    "ü/ß",
    "日本/語",
    "e\u0301/\u00e9",
    "q?x=1&y=2",
    "hash#1",
    "semi;colon,comma",
    "'quote'",
    "(par)",
    "a=b",
    "a@b:c",
    "~tilde",
    "*star!",
    ".hidden",
    "a..b/...",
    "x/.y",
    "$dollar",
    "<tag>",
    "a\\b",
]


async def list_all(storage: Storage, prefix: str = "", **options: object) -> list[ObjectInfo]:
    """Every object of a listing, page after page."""
    return [info async for page in storage.list_pages(prefix, **options) for info in page]  # type: ignore[arg-type]


class _Two(Following):
    """Two objects that are made when the storage asks for them."""

    def __init__(self, key: str = "snapshots/1") -> None:
        self._key = key
        self._puts: list[Put] = []

    @property
    def puts(self) -> list[Put]:
        return self._puts

    def make(self) -> None:
        self._puts = [Put(self._key, b"a", Absent()), Put("snapshots/2", b"b", Absent())]


class StorageContract:
    """Contract suite of the storage port."""

    refused_keys: ClassVar[frozenset[str]] = frozenset()
    """Unusual keys that this back end cannot hold and therefore has to refuse."""

    async def test_get_returns_the_bytes_that_were_put(self, storage: Storage) -> None:
        before_us = time.time_ns() // 1000
        put = await storage.put("a/b/c", b"hello")
        got = await storage.get("a/b/c")
        assert (got.data, got.size, got.version) == (b"hello", 5, put.version)
        for stamp in (got.modified_us, got.date_us, put.date_us):
            assert stamp is None or abs(stamp - before_us) < _DAY_US

    @pytest.mark.parametrize("data", [b"", b"\0", bytes(range(256)) * 4096], ids=["empty", "nul", "1 MiB"])
    async def test_any_bytes_come_back_unchanged(self, storage: Storage, data: bytes) -> None:
        await storage.put("x", data)
        got = await storage.get("x")
        assert got.data == data
        assert got.size == len(data)
        assert (await storage.head("x")).size == len(data)
        at_once = storage.get_at_once("x")
        assert at_once is None or (at_once.data, at_once.version) == (data, got.version)

    async def test_large_objects_come_whole_and_are_not_changed_by_the_next_answers(self, storage: Storage) -> None:
        contents = [bytes([n]) * (3 * 2**20 + n) for n in (1, 2)]
        for n, data in enumerate(contents):
            await storage.put(str(n), data)
        first = (await storage.get("0")).body
        part = (await storage.get("0", Range(7, 2**21 + 7))).body
        for _ in range(3):
            assert (await storage.get("1")).body == contents[1]
        assert (first, part) == (contents[0], contents[0][: 2**21])
        assert memoryview(first).readonly
        assert memoryview(part).readonly

    async def test_bytearray_and_memoryview_are_copied_when_they_are_put(self, storage: Storage) -> None:
        changing = bytearray(b"abc")
        await storage.put("x", changing)
        await storage.put("y", memoryview(b"0123456789")[2:5])
        changing[0] = 0
        assert (await storage.get("x")).data == b"abc"
        assert (await storage.get("y")).data == b"234"

    async def test_a_missing_object_raises_object_not_found(self, storage: Storage) -> None:
        await storage.put("folder/x", b"1")
        for key in ("nothing", "folder", "folder/x/y", "no/such/folder"):
            with pytest.raises(ObjectNotFoundError, match=key):
                await storage.get(key)
            with pytest.raises(ObjectNotFoundError, match=key):
                await storage.head(key)
        with pytest.raises(ObjectNotFoundError, match="nothing"):
            await storage.get("nothing", Range(0, 1))
        assert storage.get_at_once("nothing") is None

    async def test_several_objects_come_in_the_order_of_their_keys_and_missing_ones_as_none(
        self, storage: Storage
    ) -> None:
        for n in range(150):
            await storage.put(f"some/{n}", b"%d" % n)
        keys = [f"some/{n}" for n in range(149, -1, -1)] + ["some/none", "none/0", "some/3"]
        found = await storage.get_all(keys)
        assert [None if one is None else one.data for one in found] == [
            *(b"%d" % n for n in range(149, -1, -1)),
            None,
            None,
            b"3",
        ]
        assert await storage.get_all([]) == []
        assert await storage.get_all(["some/none", "none/0"]) == [None, None]
        few = await storage.get_all(["some/none", "some/3"])
        assert [None if one is None else one.data for one in few] == [None, b"3"]

    @pytest.mark.parametrize(
        ("byte_range", "expected"),
        [
            (None, b"0123456789"),
            (Range(0), b"0123456789"),
            (Range(0, 1), b"0"),
            (Range(3, 7), b"3456"),
            (Range(9), b"9"),
            (Range(5, 10), b"56789"),
            (Range(5, 1000), b"56789"),
            (Suffix(1), b"9"),
            (Suffix(10), b"0123456789"),
            (Suffix(1000), b"0123456789"),
        ],
    )
    async def test_ranges_are_clamped_to_the_object(
        self, storage: Storage, byte_range: ByteRange, expected: bytes
    ) -> None:
        put = await storage.put("x", b"0123456789")
        got = await storage.get("x", byte_range)
        assert (got.data, got.size, got.version) == (expected, 10, put.version)

    @pytest.mark.parametrize("byte_range", [Range(10), Range(10, 20), Range(5, 5), Range(5, 4), Range(-1), Suffix(0)])
    async def test_ranges_that_name_no_byte_are_refused(self, storage: Storage, byte_range: ByteRange) -> None:
        await storage.put("x", b"0123456789")
        with pytest.raises(InvalidInputError) as caught:
            await storage.get("x", byte_range)
        assert caught.value.kind == "invalid-byte-range"

    async def test_suffix_of_an_empty_object_is_empty(self, storage: Storage) -> None:
        await storage.put("x", b"")
        got = await storage.get("x", Suffix(4))
        assert (got.data, got.size) == (b"", 0)

    async def test_absent_creates_once(self, storage: Storage) -> None:
        first = await storage.put("slot/1", b"first", Absent())
        with pytest.raises(PreconditionFailedError, match="slot/1"):
            await storage.put("slot/1", b"second", Absent())
        got = await storage.get("slot/1")
        assert (got.data, got.version) == (b"first", first.version)

    async def test_absent_is_refused_even_if_the_object_has_the_same_bytes(self, storage: Storage) -> None:
        await storage.put("slot", b"same", Absent())
        with pytest.raises(PreconditionFailedError):
            await storage.put("slot", b"same", Absent())

    async def test_absent_succeeds_again_after_deletion(self, storage: Storage) -> None:
        await storage.put("x", b"1", Absent())
        await storage.delete(["x"])
        await storage.put("x", b"2", Absent())
        assert (await storage.get("x")).data == b"2"

    async def test_matches_replaces_that_version_only(self, storage: Storage) -> None:
        first = await storage.put("repo", b"one")
        second = await storage.put("repo", b"two", Matches(first.version))
        with pytest.raises(PreconditionFailedError, match="repo"):
            await storage.put("repo", b"three", Matches(first.version))
        assert (await storage.get("repo")).data == b"two"
        assert second.version != first.version
        assert (await storage.head("repo")).version == second.version

    async def test_an_object_is_put_after_others_on_its_condition(self, storage: Storage) -> None:
        await storage.put_unsynced([Put("snapshots/1", b"a"), Put("snapshots/2", b"b", Absent())])
        first = await storage.put_after(["snapshots/1", "snapshots/2"], Put("repo", b"one", Absent()))
        await storage.put_unsynced([Put("snapshots/3", b"c")])
        second = await storage.put_after(["snapshots/3"], Put("repo", b"two", Matches(first.version)))
        for condition in (Absent(), Matches(first.version)):
            with pytest.raises(PreconditionFailedError, match="repo"):
                await storage.put_after(["snapshots/3"], Put("repo", b"three", condition))
        got = await storage.get("repo")
        assert (got.data, got.version) == (b"two", second.version)
        assert [info.key async for page in storage.list_pages("snapshots/") for info in page] == [
            f"snapshots/{n}" for n in (1, 2, 3)
        ]

    async def test_objects_follow_one_that_is_put_on_its_condition(self, storage: Storage) -> None:
        for number in (1, 2):
            following = _Two()
            put, answers = await storage.put_before(Put(f"log/{number}", b"entry", Absent()), following)
            assert (await storage.head(f"log/{number}")).version == put.version
            for one, answer in zip(following.puts if answers else (), answers, strict=True):
                # The second finds the first one's object.
                assert (answer is None) == (number == 2)
                assert (await storage.get(one.key)).data == one.data
        following = _Two("repo")
        with pytest.raises(PreconditionFailedError, match="log/1"):
            await storage.put_before(Put("log/1", b"other", Absent()), following)
        await storage.put_unsynced([Put("chunks/1", b"a"), Put("chunks/2", b"b")])
        put, _ = await storage.put_before(Put("log/3", b"entry", Absent()), _Two("other"), ["chunks/1", "chunks/2"])
        assert (await storage.head("log/3")).version == put.version
        with pytest.raises(ObjectNotFoundError):
            await storage.head("repo")

    async def test_matches_on_a_missing_object_is_a_failed_precondition(self, storage: Storage) -> None:
        first = await storage.put("x", b"1")
        await storage.delete(["x"])
        with pytest.raises(PreconditionFailedError, match="x"):
            await storage.put("x", b"2", Matches(first.version))
        with pytest.raises(PreconditionFailedError):
            await storage.put("never", b"2", Matches(Version("0")))
        assert await list_all(storage) == []

    async def test_versions_of_get_head_and_list_agree(self, storage: Storage) -> None:
        put = await storage.put("x", b"1")
        assert {
            put.version,
            (await storage.get("x")).version,
            (await storage.get("x", Range(0, 1))).version,
            (await storage.head("x")).version,
            (await list_all(storage))[0].version,
        } == {put.version}

    async def test_contents_that_differ_have_different_versions(self, storage: Storage) -> None:
        versions = [(await storage.put("x", b"%d" % n)).version for n in range(10)]
        assert len(set(versions)) == 10

    async def test_exactly_one_of_racing_creators_wins(self, storage: Storage) -> None:
        async def create(n: int) -> bool:
            try:
                await storage.put("race", b"%d" % n, Absent())
            except PreconditionFailedError:
                return False
            return True

        won = await asyncio.gather(*(create(n) for n in range(8)))
        assert sum(won) == 1
        assert (await storage.get("race")).data == b"%d" % won.index(True)

    async def test_exactly_one_of_racing_replacers_wins(self, storage: Storage) -> None:
        base = await storage.put("race", b"base")

        async def replace(n: int) -> bool:
            try:
                await storage.put("race", b"%d" % n, Matches(base.version))
            except PreconditionFailedError:
                return False
            return True

        won = await asyncio.gather(*(replace(n) for n in range(8)))
        assert sum(won) == 1
        assert (await storage.get("race")).data == b"%d" % won.index(True)

    async def test_listing_ascends_by_the_bytes_of_whole_keys(self, storage: Storage) -> None:
        keys = ["a-b", "a/x", "a/b/c", "a.b", "a0", "b", "A", "a/b-c", "zz/1", "é", "日"]
        for key in keys:
            await storage.put(key, key.encode())
        listed = await list_all(storage)
        assert [info.key for info in listed] == sorted(keys, key=str.encode)
        assert [info.size for info in listed] == [len(info.key.encode()) for info in listed]

    async def test_listing_accepts_any_string_as_prefix(self, storage: Storage) -> None:
        for key in ("log/a1", "log/a2", "log/b1", "logs/x", "other"):
            await storage.put(key, b"")

        async def keys(prefix: str) -> list[str]:
            return [info.key for info in await list_all(storage, prefix)]

        assert await keys("log/a") == ["log/a1", "log/a2"]
        assert await keys("log/") == ["log/a1", "log/a2", "log/b1"]
        assert await keys("log") == ["log/a1", "log/a2", "log/b1", "logs/x"]
        assert await keys("nothing/") == []
        assert await keys("other") == ["other"]

    async def test_listing_starts_after_a_key_and_comes_in_pages(self, storage: Storage) -> None:
        keys = [f"k/{n:02}" for n in range(7)]
        for key in keys:
            await storage.put(key, b"x")
        pages = [[info.key for info in page] async for page in storage.list_pages("k/", page_size=3)]
        assert pages == [keys[:3], keys[3:6], keys[6:]]
        for start_after, first in (("k/02", 3), ("k/02x", 3), ("k/", 0), ("a", 0), ("k/06", 7), ("z", 7)):
            listed = await list_all(storage, "k/", start_after=start_after, page_size=2)
            assert [info.key for info in listed] == keys[first:], start_after

    async def test_listing_may_be_left_early(self, storage: Storage) -> None:
        for n in range(3):
            await storage.put(f"{n}", b"")
        pages = storage.list_pages(page_size=1)
        assert [info.key for info in await anext(pages)] == ["0"]
        await pages.aclose()  # type: ignore[attr-defined]

    async def test_listing_an_empty_storage_is_empty(self, storage: Storage) -> None:
        assert await list_all(storage) == []

    async def test_deletion_counts_keys_that_are_gone(self, storage: Storage) -> None:
        await storage.put("a", b"1")
        await storage.put("d/b", b"1")
        result = await storage.delete(["a", "never", "d/b"])
        assert (result.deleted, result.failures) == (3, ())
        assert await list_all(storage) == []
        assert (await storage.delete([])).deleted == 0

    async def test_copy_replaces_the_target(self, storage: Storage) -> None:
        await storage.put("source", b"content")
        await storage.put("folder/target", b"old")
        copied = await storage.copy("source", "folder/target")
        got = await storage.get("folder/target")
        assert (got.data, got.version) == (b"content", copied.version)
        with pytest.raises(ObjectNotFoundError, match="never"):
            await storage.copy("never", "folder/target")

    async def test_unusual_but_legal_keys_work(self, storage: Storage) -> None:
        for key in self.refused_keys:
            with pytest.raises(InvalidInputError) as caught:
                await storage.put(key, b"x")
            assert caught.value.kind == "invalid-key"
        odd = [key for key in ODD_KEYS if key not in self.refused_keys]
        for key in odd:
            await storage.put(key, key.encode(), Absent())
        for key in odd:
            assert (await storage.get(key)).data == key.encode(), key
            assert (await storage.head(key)).key == key
        assert [info.key for info in await list_all(storage)] == sorted(odd, key=str.encode)
        assert [info.key for info in await list_all(storage, "q?")] == ["q?x=1&y=2"]
        copied = await storage.copy("q?x=1&y=2", "日本/copy of %")
        assert (await storage.head("日本/copy of %")).version == copied.version
        assert (await storage.delete([*odd, "日本/copy of %"])).failures == ()
        assert await list_all(storage) == []

    @pytest.mark.parametrize(
        "key",
        ["", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", "a/..", "a\0b", "\ud800", "k" * 1025],
        ids=repr,
    )
    async def test_keys_that_could_leave_the_root_are_refused(self, storage: Storage, key: str) -> None:
        with pytest.raises(InvalidInputError) as caught:
            await storage.put(key, b"x")
        assert caught.value.kind == "invalid-key"
        with pytest.raises((InvalidInputError, ObjectNotFoundError)):
            await storage.get(key)
        assert await list_all(storage) == []

    async def test_cancelling_a_put_leaves_the_storage_usable(self, storage: Storage) -> None:
        await storage.put("x", b"0")
        task = asyncio.create_task(storage.put("x", b"1" * 100_000))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert (await storage.get("x")).size in (1, 100_000)
        await storage.put("x", b"2")
        assert (await storage.get("x")).data == b"2"

    def test_each_event_loop_can_use_it(self, storage: Storage) -> None:
        async def write(n: int) -> None:
            await storage.put(f"loop/{n}", b"%d" % n)

        async def read() -> list[bytes]:
            return [(await storage.get(f"loop/{n}")).data for n in range(2)]

        asyncio.run(write(0))
        asyncio.run(write(1))
        assert asyncio.run(read()) == [b"0", b"1"]

    def test_representation_names_the_place(self, storage: Storage) -> None:
        assert repr(storage).startswith("<icechunk.Storage>\ntype: ")
        assert storage.describe()
        assert storage == storage
        assert storage.supports_writes
