"""zarr's own tests of a store, on ours, with memory, local and S3 storage.

A flat key-value store keeps any bytes under any key. Ours keeps one Zarr 3 hierarchy: keys are ``{path}/zarr.json`` and
``{path}/c/0/1``, a zarr.json holds a Zarr document, a chunk lies in the grid of an array that exists and has at least
one byte. zarr's suite reads and writes behind the store's back through its hooks `set` and `get`; ours translate
what no hierarchy has:

- ``foo/bar`` stands for the group ``foo/bar``; ``foo/c/0.0`` and ``foo/0/0`` for the chunk ``foo/c/0/0``;
- an array that a chunk needs is created;
- bytes for a zarr.json that are no document stand in one as an attribute.

Overrides, and why. None asserts less than the original; "parameters" means that the original runs on other arguments.

======================================== =====================================================================
`test_serializable_store`                a writable session must not travel: asserted; the read-only one does, with data
`test_with_read_only_store`              writes "foo": the same on the key of a group
`test_get`, `test_getsize`               parameters: keys of a hierarchy, more of them; no empty chunks (see `test_set`)
`test_get_many`                          keys "0" to "9": the same on ten chunks
`test_getsize_prefix`                    chunks without an array; the sibling is a group, as "cc/0" is no key
`test_set`                               parameters: as `test_get`; that an empty chunk is refused is asserted instead
`test_set_not_open`                      original after its array was created
`test_set_many`                          values are documents and chunks; the arrays' documents come first
`test_exists`, `test_delete`             key "foo" is refused (asserted) rather than absent; values are documents
`test_delete_nonexistent_key_…`          its key is refused (asserted); absent keys of a hierarchy do not raise
`test_delete_dir`                        values are documents
`test_list`, `test_list_prefix`,         values are documents; chunks are not empty; `test_list_dir` has chunks and
`test_list_empty_path`, `test_list_dir`  nodes below its roots, which plain names stood for
`test_set_if_not_exists`                 keys "k", "k2": the same on chunks, and on groups
`test_get_bytes`, `test_get_json` (…)    a zarr.json holds a document: asserted on that, and on a chunk
======================================== =====================================================================

`test_get_sync` and its like are left out: their keys belong to no hierarchy. `tests/store/test_store_sync.py` makes
those calls with keys that do.
"""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, cpu
from zarr.core.sync import sync
from zarr.testing.store import StoreTests

from icechunk import IcechunkStore, InvalidInputError, ReadOnlyError, Session
from icechunk.errors import ErrorKind
from icechunk.format.values import NodeKind
from icechunk.runtime import json_codec
from icechunk.storage.port import Storage
from icechunk.store.zarr_keys import ChunkKey, MetadataKey, chunk_key_text, metadata_key_text, parse_key, to_path
from tests.raising import raises
from tests.store.store_builders import (
    PROTOTYPE,
    READ_ONLY,
    array_document,
    buffer,
    collect,
    group_document,
    open_session,
    read,
    refused,
)

CHUNKS = ("c/0", "foo/bar/c/1/2/3", "scalar/c")
"""Chunk keys at the root and below, of several ranks."""


def translate(key: str) -> str:
    """The key in our hierarchy for a key of the suite."""
    try:
        parse_key(key)
    except InvalidInputError:
        for end in ("/c/0.0", "/0/0"):
            if key.endswith(end):
                return chunk_key_text(to_path(key.removesuffix(end)), (0, 0))
        return metadata_key_text(to_path(key))
    return key


class TestIcechunkStore(StoreTests[IcechunkStore, cpu.Buffer]):
    store_cls = IcechunkStore
    buffer_cls = cpu.Buffer

    # zarr 3.3 and later; see above.
    test_get_sync = None  # type: ignore[assignment, unused-ignore]
    test_get_sync_missing = None  # type: ignore[assignment, unused-ignore]
    test_set_sync = None  # type: ignore[assignment, unused-ignore]
    test_delete_sync = None  # type: ignore[assignment, unused-ignore]
    test_delete_sync_missing = None  # type: ignore[assignment, unused-ignore]
    test_sync_async_set_get_parity = None  # type: ignore[assignment, unused-ignore]
    test_get_sync_byte_range_parity = None  # type: ignore[assignment, unused-ignore]
    test_delete_sync_visible_to_async_get = None  # type: ignore[assignment, unused-ignore]

    @pytest.fixture
    async def store_kwargs(self, storage: Storage) -> dict[str, Any]:
        # A threshold of 8 bytes: the suite's values are inline; those of our `test_get` are inline and in objects.
        return {"session": await open_session(storage, inline_bytes=8)}

    async def set(self, store: IcechunkStore, key: str, value: Buffer) -> None:
        session, parsed, data = store.session, parse_key(translate(key)), value.to_bytes()
        if isinstance(parsed, ChunkKey):
            if session._content.node(parsed.path) is None:
                session._content.set_metadata(parsed.path, array_document((16,) * len(parsed.coords)))
            await session._content.set_chunk(parsed.path, parsed.coords, data)
        else:
            assert isinstance(parsed, MetadataKey)
            node = session._content.node(parsed.path)
            if not data.startswith(b"{"):
                data = (
                    array_document((16,) * len(node.shape), attributes={"value": data.decode()})
                    if node is not None and node.kind is NodeKind.ARRAY
                    else group_document(value=data.decode())
                )
            session._content.set_metadata(parsed.path, data)

    async def get(self, store: IcechunkStore, key: str) -> Buffer:
        session, parsed = store.session, parse_key(translate(key))
        if isinstance(parsed, ChunkKey):
            data = await session._content.get_chunk(parsed.path, parsed.coords, None)
        else:
            assert isinstance(parsed, MetadataKey)
            node = session._content.node(parsed.path)
            data = None if node is None else node.user_data
        assert data is not None
        return self.buffer_cls.from_bytes(data)

    async def set_document(self, store: IcechunkStore, key: str) -> None:
        """Create the array that a chunk needs, by the store itself."""
        parsed = parse_key(key)
        assert isinstance(parsed, ChunkKey)
        await store.set(metadata_key_text(parsed.path), buffer(array_document((16,) * len(parsed.coords))))

    # -- what the suite leaves to the store ----------------------------------------------------------------------

    def test_store_repr(self, store: IcechunkStore) -> None:
        assert repr(store) == str(store)
        assert repr(store).splitlines() == [
            "<icechunk.IcechunkStore>",
            "read_only: False",
            f"snapshot_id: {store.session.snapshot_id}",
            "branch: main",
        ]

    def test_store_supports_writes(self, store: IcechunkStore) -> None:
        assert store.supports_writes
        assert store.supports_deletes

    def test_store_supports_listing(self, store: IcechunkStore) -> None:
        assert store.supports_listing

    # -- overrides -----------------------------------------------------------------------------------------------

    async def test_serializable_store(  # type: ignore[override]  # pytest passes the fixtures that it names
        self, store: IcechunkStore, storage: Storage
    ) -> None:
        await self.set(store, "foo/c/0", buffer(b"\x01\x02\x03\x04"))
        await self.set(store, "foo/c/1", buffer(b"\x05" * 100))
        with pytest.raises(ValueError, match=re.escape("Session.fork()")):
            pickle.dumps(store)
        await store.session.commit_async("data")
        if type(storage).__name__ == "MemoryStorage":
            with raises(InvalidInputError, "pickle", "local_filesystem_storage"):
                pickle.dumps(store)
            return
        new_store = pickle.loads(pickle.dumps(store))
        assert new_store == store
        assert new_store.read_only == store.read_only
        assert await read(new_store, "foo/c/0") == b"\x01\x02\x03\x04"
        assert await read(new_store, "foo/c/1") == b"\x05" * 100

    async def test_with_read_only_store(self, open_kwargs: dict[str, Any]) -> None:
        store = await self.store_cls.open(**{**open_kwargs, "read_only": True})
        assert store.read_only
        key, value = "foo/zarr.json", buffer(group_document())
        with pytest.raises(ValueError, match=re.escape(READ_ONLY)):
            await store.set(key, value)
        writer = store.with_read_only(read_only=False)
        assert not writer._is_open
        assert not writer.read_only
        await writer.set(key, value)
        assert await read(store, key) == value.to_bytes()
        await writer.delete(key)
        assert await read(store, key) is None
        assert store.read_only
        for reader in (store, store.with_read_only(read_only=True)):
            assert reader.read_only
            with pytest.raises(ValueError, match=re.escape(READ_ONLY)):
                await reader.set(key, value)
            with pytest.raises(ValueError, match=re.escape(READ_ONLY)):
                await reader.delete(key)

    @pytest.mark.parametrize("key", CHUNKS)
    @pytest.mark.parametrize(
        ("data", "byte_range"),
        [
            (b"\x01\x02\x03\x04", None),
            (b"\x01\x02\x03\x04", RangeByteRequest(1, 4)),
            (b"\x01\x02\x03\x04", OffsetByteRequest(1)),
            (b"\x01\x02\x03\x04", SuffixByteRequest(1)),
            (b"\x01", None),
            (bytes(range(100)), RangeByteRequest(1, 4)),
        ],
    )
    async def test_get(self, store: IcechunkStore, key: str, data: bytes, byte_range: ByteRequest) -> None:
        await super().test_get(store, key, data, byte_range)

    async def test_get_many(self, store: IcechunkStore) -> None:
        values = {f"foo/c/{i}": str(i).encode() for i in range(10)}
        for key, value in values.items():
            await self.set(store, key, buffer(value))
        found = [pair async for pair in store._get_many((key, PROTOTYPE, None) for key in values)]
        assert {key: value.to_bytes() for key, value in found if value is not None} == values
        assert len(found) == len(values)

    @pytest.mark.parametrize("key", CHUNKS)
    @pytest.mark.parametrize("data", [b"\x01\x02\x03\x04", b"\x01", bytes(100)])
    async def test_getsize(self, store: IcechunkStore, key: str, data: bytes) -> None:
        await super().test_getsize(store, key, data)

    async def test_getsize_prefix(self, store: IcechunkStore) -> None:
        value = buffer(b"\x01\x02\x03\x04")
        keys = ["c/0/0", "c/0/1", "c/1/0", "c/1/1"]
        await self.set_document(store, keys[0])
        await store._set_many([*((key, value) for key in keys), ("cc/zarr.json", buffer(group_document()))])
        assert await store.getsize_prefix("c") == len(value) * len(keys)
        assert await store.getsize_prefix("c/") == len(value) * len(keys)
        assert await store.getsize_prefix("c/1") == len(value) * 2
        documents = sum([await store.getsize(key) for key in ("zarr.json", "cc/zarr.json")])
        assert await store.getsize_prefix("") == len(value) * len(keys) + documents

    @pytest.mark.parametrize("key", CHUNKS)
    @pytest.mark.parametrize("data", [b"\x01\x02\x03\x04", b"\x01", bytes(100)])
    async def test_set(self, store: IcechunkStore, key: str, data: bytes) -> None:
        await self.set_document(store, key)
        await super().test_set(store, key, data)
        with refused(store.session, InvalidInputError, ErrorKind.ZERO_LENGTH_CHUNK):
            await store.set(key, buffer(b""))
        assert await read(store, key) == data

    @pytest.mark.parametrize("key", ["zarr.json", "foo/zarr.json", "foo/bar/zarr.json"])
    @pytest.mark.parametrize("data", [group_document(), group_document(a=1), array_document(), array_document(())])
    async def test_set_metadata(self, store: IcechunkStore, key: str, data: bytes) -> None:
        await super().test_set(store, key, data)

    async def test_set_not_open(self, store_not_open: IcechunkStore) -> None:
        assert not store_not_open._is_open
        await self.set_document(store_not_open, "c/0")
        await super().test_set_not_open(store_not_open)

    async def test_set_many(self, store: IcechunkStore) -> None:
        values = {
            "zarr.json": group_document(),
            "bar/zarr.json": array_document((4,)),
            "bar/c/0": b"bar/c/0",
            "foo/zarr.json": array_document((4, 4)),
            "foo/c/0/0": b"foo/c/0/0",
        }
        await store._set_many([(key, buffer(value)) for key, value in values.items()])
        for key, value in values.items():
            assert (await self.get(store, key)).to_bytes() == value

    async def test_exists(self, store: IcechunkStore) -> None:
        with refused(store.session, InvalidInputError, ErrorKind.INVALID_KEY):
            await store.exists("foo")
        assert not await store.exists("foo/zarr.json")
        await store.set("foo/zarr.json", buffer(group_document()))
        assert await store.exists("foo/zarr.json")

    async def test_delete(self, store: IcechunkStore) -> None:
        await store.set("foo/zarr.json", buffer(group_document()))
        assert await store.exists("foo/zarr.json")
        await store.delete("foo/zarr.json")
        assert not await store.exists("foo/zarr.json")

    async def test_delete_nonexistent_key_does_not_raise(self, store: IcechunkStore) -> None:
        with refused(store.session, InvalidInputError, ErrorKind.INVALID_KEY):
            await store.delete("nonexistent_key")
        for key in ("zarr.json", "foo/zarr.json", "foo/c/0/0", "foo/c", ".zgroup", "foo/.zarray"):
            await store.delete(key)

    async def test_delete_dir(self, store: IcechunkStore) -> None:
        await store.set("zarr.json", buffer(group_document()))
        await store.set("foo-bar/zarr.json", buffer(group_document()))
        await store.set("foo/zarr.json", buffer(array_document((1,))))
        await store.set("foo/c/0", buffer(b"chunk"))
        await store.delete_dir("foo")
        assert await store.exists("zarr.json")
        assert await store.exists("foo-bar/zarr.json")
        assert not await store.exists("foo/zarr.json")
        assert not await store.exists("foo/c/0")

    async def test_list(self, store: IcechunkStore) -> None:
        assert await collect(store.list()) == []
        values = {"foo/zarr.json": array_document((10,)), **{f"foo/c/{i}": b"\x01" for i in range(10)}}
        await store._set_many([(key, buffer(value)) for key, value in values.items()])
        assert await collect(store.list()) == sorted(values)

    async def test_list_prefix(self, store: IcechunkStore) -> None:
        prefixes = ("", "a/", "a/b/", "a/b/c/")
        values = {f"{prefix}zarr.json": group_document() for prefix in prefixes}
        await store._set_many([(key, buffer(value)) for key, value in values.items()])
        for prefix in (*prefixes, "z", "a", "a/b/z", "nothing/"):
            assert await collect(store.list_prefix(prefix)) == sorted(k for k in values if k.startswith(prefix))

    async def test_list_empty_path(self, store: IcechunkStore) -> None:
        values = {
            "foo/bar/zarr.json": array_document((2,)),
            "foo/bar/c/1": b"\x01",
            "foo/baz/zarr.json": array_document((2,)),
            "foo/baz/c/0": b"\x01",
        }
        await store._set_many([(key, buffer(value)) for key, value in values.items()])
        assert await collect(store.list()) == sorted(values)
        assert await collect(store.list_prefix("")) == sorted(values)
        assert await collect(store.list_prefix("foo/bar/")) == sorted(k for k in values if k.startswith("foo/bar/"))

    async def test_list_dir(self, store: IcechunkStore) -> None:
        roots: list[tuple[str, dict[str, bytes]]] = [
            ("foo", {"foo/zarr.json": array_document((2, 2)), "foo/c/1/0": b"\x01", "foo/c/0/1": b"\x01"}),
            ("foo/c", {}),
            ("foo/c/1", {}),
            (
                "bar/baz",
                {
                    "bar/baz/first_child/zarr.json": group_document(),
                    "bar/baz/second_child/deep/zarr.json": group_document(),
                },
            ),
            ("bar", {}),
        ]
        assert await collect(store.list_dir("")) == []
        written: dict[str, bytes] = {}
        for root, values in roots:
            if values:
                assert await collect(store.list_dir(root)) == []
            await store._set_many([(key, buffer(value)) for key, value in values.items()])
            written.update(values)
            expected = {k.removeprefix(f"{root}/").split("/")[0] for k in written if k.startswith(f"{root}/")}
            assert expected
            assert await collect(store.list_dir(root)) == sorted(expected)
            assert await collect(store.list_dir(f"{root}/")) == sorted(expected)

    @pytest.mark.parametrize(
        ("keys", "values"),
        [
            (("foo/c/0", "foo/c/1"), (b"0000", b"1111")),
            (("foo/zarr.json", "bar/zarr.json"), (group_document(n=0), group_document(n=1))),
        ],
    )
    async def test_set_if_not_exists(  # pytest passes the parameters that it names
        self, store: IcechunkStore, keys: tuple[str, str], values: tuple[bytes, bytes]
    ) -> None:
        old, new = map(buffer, values)
        await self.set(store, keys[0], old)
        await store.set_if_not_exists(keys[0], new)
        assert await store.get(keys[0], PROTOTYPE) == old
        await store.set_if_not_exists(keys[1], new)
        assert await store.get(keys[1], PROTOTYPE) == new

    @pytest.mark.skipif(not hasattr(Store, "_get_bytes"), reason="this zarr has no such methods")
    async def test_get_bytes(self, store: IcechunkStore) -> None:
        values = {"zarr.json": group_document(hello="world"), "foo/c/0": b"hello world"}
        for key, value in values.items():
            await self.set(store, key, buffer(value))
            assert await store._get_bytes(key, prototype=PROTOTYPE) == value
        for key in ("foo/c/1", "bar/zarr.json"):
            with pytest.raises(FileNotFoundError):
                await store._get_bytes(key, prototype=PROTOTYPE)

    @pytest.mark.skipif(not hasattr(Store, "_get_bytes"), reason="this zarr has no such methods")
    def test_get_bytes_sync(self, store: IcechunkStore) -> None:
        values = {"zarr.json": group_document(hello="world"), "foo/c/0": b"hello world"}
        for key, value in values.items():
            sync(self.set(store, key, buffer(value)))
            assert store._get_bytes_sync(key, prototype=PROTOTYPE) == value

    @pytest.mark.skipif(not hasattr(Store, "_get_bytes"), reason="this zarr has no such methods")
    async def test_get_json(self, store: IcechunkStore) -> None:
        values = {"zarr.json": group_document(hello="world"), "foo/c/0": b'{"foo": "bar"}'}
        for key, value in values.items():
            await self.set(store, key, buffer(value))
            assert await store._get_json(key, prototype=PROTOTYPE) == json_codec.loads(value)

    @pytest.mark.skipif(not hasattr(Store, "_get_bytes"), reason="this zarr has no such methods")
    def test_get_json_sync(self, store: IcechunkStore) -> None:
        values = {"zarr.json": group_document(hello="world"), "foo/c/0": b'{"foo": "bar"}'}
        for key, value in values.items():
            sync(self.set(store, key, buffer(value)))
            assert store._get_json_sync(key, prototype=PROTOTYPE) == json_codec.loads(value)

    # -- beyond the suite ----------------------------------------------------------------------------------------

    async def test_store_of_a_committed_session_reads_the_same(self, store: IcechunkStore) -> None:
        await self.set(store, "foo/c/0", buffer(b"inline"))
        await self.set(store, "foo/c/1", buffer(b"native" * 10))
        keys = await collect(store.list())
        session: Session = store.session
        await session.commit_async("data")
        assert store.read_only
        with raises(ReadOnlyError, "read-only-store", READ_ONLY):
            await store.set("foo/c/0", buffer(b"too late"))
        assert await collect(store.list()) == keys
        assert await read(store, "foo/c/0") == b"inline"
        assert await read(store, "foo/c/1") == b"native" * 10
