"""Settings: checked at every assignment, compared by value, merged field by field, shown without secrets."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from icechunk.config import (
    CachingConfig,
    ChecksumAlgorithm,
    CompressionAlgorithm,
    CompressionConfig,
    EngineConfig,
    ManifestConfig,
    ManifestPreloadCondition,
    ManifestPreloadConfig,
    ManifestSplitCondition,
    ManifestSplitDimCondition,
    ManifestSplittingConfig,
    ManifestVirtualChunkLocationCompressionConfig,
    ObjectStoreConfig,
    RepositoryConfig,
    RepoUpdateRetryConfig,
    S3Options,
    StorageConcurrencySettings,
    StorageRetriesSettings,
    StorageSettings,
    StorageTimeoutSettings,
    VirtualChunkContainer,
)
from icechunk.errors import InvalidInputError
from icechunk.runtime.checks import WrongTypeError
from tests.raising import raises

SETTINGS = (
    CachingConfig,
    CompressionConfig,
    EngineConfig,
    ManifestConfig,
    ManifestPreloadConfig,
    ManifestSplittingConfig,
    ManifestVirtualChunkLocationCompressionConfig,
    RepoUpdateRetryConfig,
    RepositoryConfig,
    S3Options,
    StorageConcurrencySettings,
    StorageRetriesSettings,
    StorageSettings,
    StorageTimeoutSettings,
)
NUMBERS = [(cls, f.name) for cls in SETTINGS for f in dataclasses.fields(cls) if str(f.type).startswith(("U", "_Some"))]
STORES = [
    ObjectStoreConfig.InMemory(),
    ObjectStoreConfig.LocalFileSystem(Path("/data")),
    ObjectStoreConfig.S3(S3Options(region="r")),
    ObjectStoreConfig.S3Compatible(S3Options()),
    ObjectStoreConfig.Tigris(S3Options()),
    ObjectStoreConfig.Gcs({"a": "b"}),
    ObjectStoreConfig.Azure(),
    ObjectStoreConfig.Http({"a": "b"}, {"h": "v"}),
]


@pytest.mark.parametrize("cls", SETTINGS)
def test_settings_are_unset_equal_picklable_and_unhashable_by_default(cls: type[Any]) -> None:
    value = cls()
    assert value == cls()
    assert value != 3
    assert pickle.loads(pickle.dumps(value)) == value
    assert copy.deepcopy(value) == value
    assert "None" in repr(value)
    assert str(value).startswith("<icechunk.")
    with pytest.raises(TypeError):
        hash(value)


@pytest.mark.parametrize("cls", [RepositoryConfig, CachingConfig, CompressionConfig])
def test_default_has_everything_unset(cls: type[Any]) -> None:
    assert cls.default() == cls()


@pytest.mark.parametrize(("cls", "name"), NUMBERS)
def test_numbers_out_of_range_are_refused_at_construction_and_assignment(cls: type[Any], name: str) -> None:
    for bad in (-1, 2**64):
        with pytest.raises(InvalidInputError) as caught:
            cls(**{name: bad})
        assert isinstance(caught.value, OverflowError)
        assert f"{cls.__name__}.{name}" in str(caught.value)
        value = cls()
        with pytest.raises(InvalidInputError):
            setattr(value, name, bad)
        assert value == cls()
    for bad_type in ("1", 1.5):
        with pytest.raises(TypeError):
            cls(**{name: bad_type})


def test_wrong_types_are_refused_and_leave_the_settings_as_they_were() -> None:
    settings = StorageSettings(storage_class="A")
    for name, bad in (("retries", 3), ("storage_class", 3), ("unsafe_use_metadata", 1), ("timeouts", "x")):
        with pytest.raises(TypeError, match=re.escape(name)):
            setattr(settings, name, bad)
    assert settings == StorageSettings(storage_class="A")
    with pytest.raises(AttributeError):
        settings.no_such_setting = 3
    with pytest.raises(AttributeError):
        del settings.storage_class


def test_parts_of_a_configuration_can_be_changed_in_place() -> None:
    settings = StorageSettings(retries=StorageRetriesSettings(1))
    assert settings.retries is not None
    settings.retries.max_tries = 7
    assert settings == StorageSettings(retries=StorageRetriesSettings(7))


def test_str_shows_effective_values_and_repr_the_values_that_are_set() -> None:
    assert "max_tries: 10 (default)" in str(StorageRetriesSettings())
    assert "max_tries=None" in repr(StorageRetriesSettings())
    assert "inline_chunk_threshold_bytes: 512 (default)" in str(RepositoryConfig())
    assert "inline_chunk_threshold_bytes: 5\n" in str(RepositoryConfig(5))


def test_html_is_escaped() -> None:
    shown = StorageSettings(storage_class="<script>")._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown


@pytest.mark.parametrize("store", STORES)
def test_every_kind_of_store_is_an_object_store_config_and_pickles(store: Any) -> None:
    kind: Any = type(store)
    assert issubclass(kind, ObjectStoreConfig)
    assert pickle.loads(pickle.dumps(store)) == store
    assert type(store).__qualname__ == f"ObjectStoreConfig.{type(store).__name__}"
    assert len(store) == len(kind.__match_args__)
    assert [store[i] for i in range(len(store))] == [getattr(store, n) for n in kind.__match_args__]
    assert repr(store).startswith("icechunk.config.ObjectStoreConfig.")
    assert store._repr_html_()


def test_a_kind_of_store_can_be_matched_by_position() -> None:
    options = S3Options(region="r")
    store: Any = ObjectStoreConfig.S3(options)
    match store:
        case ObjectStoreConfig.S3(found):
            assert found is options
        case _:
            pytest.fail("not matched")
    with pytest.raises(TypeError):
        ObjectStoreConfig()
    with pytest.raises(TypeError):
        ObjectStoreConfig.S3(3)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        store._1  # noqa: B018


def test_secrets_in_stores_and_urls_are_never_shown() -> None:
    values: list[Any] = [
        S3Options(endpoint_url="https://user:SECRET@host/x?sig=SECRET"),
        ObjectStoreConfig.Http({"token": "SECRET", "url": "http://u:SECRET@h/"}, {"X-Any": "SECRET"}),
        ObjectStoreConfig.Azure({"azure_storage_account_key": "SECRET", "sas": "SECRET"}),
        ObjectStoreConfig.Gcs({"google_service_account_key": "SECRET"}),
    ]
    values.append(VirtualChunkContainer("https://u:SECRET@h/", values[1]))
    values.append(RepositoryConfig(virtual_chunk_containers={"h": values[-1]}))
    for value in values:
        for shown in (repr(value), str(value), value._repr_html_()):
            assert "SECRET" not in shown


def test_enums_equal_their_number_and_hash_like_it() -> None:
    assert ChecksumAlgorithm.Sha1 == 3
    assert int(ChecksumAlgorithm.Sha1) == 3
    assert ChecksumAlgorithm.Sha1 != ChecksumAlgorithm.Sha256
    assert ChecksumAlgorithm.Sha1 in {ChecksumAlgorithm.Sha1}
    assert repr(ChecksumAlgorithm.Sha1) == "ChecksumAlgorithm.Sha1"
    assert pickle.loads(pickle.dumps(ChecksumAlgorithm.Sha1)) is ChecksumAlgorithm.Sha1
    without_a_value: Any = CompressionAlgorithm
    assert without_a_value() is CompressionAlgorithm.default() is CompressionAlgorithm.Zstd
    with pytest.raises(TypeError):
        S3Options(checksum_algorithm=1)  # type: ignore[arg-type]


def test_preload_conditions_combine_compare_and_pickle() -> None:
    p = ManifestPreloadCondition
    condition = (p.name_matches("^a$") | p.path_matches("b")) & p.num_refs(1, None)
    assert condition == (p.name_matches("^a$") | p.path_matches("b")) & p.num_refs(1, None)
    assert condition != p.true()
    assert pickle.loads(pickle.dumps(condition)) == condition
    assert isinstance(condition, p)
    assert type(p.true()).__qualname__ == "ManifestPreloadCondition.True"
    assert getattr(p.num_refs(1, 5), "from") == 1
    assert repr(p.num_refs(1, 5)) == "icechunk.config.ManifestPreloadCondition.num_refs(1, 5)"
    with pytest.raises(TypeError):
        condition | 3  # type: ignore[operator]
    with pytest.raises(InvalidInputError):
        p.num_refs(-1, None)
    with pytest.raises(TypeError):
        p.or_conditions([3])  # type: ignore[list-item]
    with pytest.raises(TypeError):
        ManifestPreloadCondition()


def test_splitting_goes_to_a_dict_and_back_in_order() -> None:
    s, d = ManifestSplitCondition, ManifestSplitDimCondition
    rules = {s.name_matches("x") & s.AnyArray(): {d.DimensionName("t"): 2, d.Axis(0): 3}, s.AnyArray(): {d.Any(): 7}}
    config = ManifestSplittingConfig.from_dict(rules)  # type: ignore[arg-type]
    assert config.to_dict() == rules
    assert list(config.to_dict()) == list(rules)
    assert pickle.loads(pickle.dumps(config)) == config
    assert ManifestSplittingConfig().to_dict() == {}
    assert d.Axis(0) == d.Axis(0) != d.Axis(1)


@pytest.mark.parametrize("size", [0, -1, 2**32])
def test_split_sizes_out_of_range_are_refused(size: int) -> None:
    s, d = ManifestSplitCondition, ManifestSplitDimCondition
    with pytest.raises(InvalidInputError):
        ManifestSplittingConfig.from_dict({s.AnyArray(): {d.Any(): size}})


def test_split_rules_of_wrong_types_are_refused() -> None:
    s, d = ManifestSplitCondition, ManifestSplitDimCondition
    for bad in ({3: {d.Any(): 1}}, {s.AnyArray(): {3: 1}}, {s.AnyArray(): {d.Any(): "x"}}):
        with pytest.raises(TypeError):
            ManifestSplittingConfig.from_dict(bad)  # type: ignore[arg-type]


def test_containers_are_kept_by_prefix_and_names_stay_unique() -> None:
    config = RepositoryConfig()
    assert config.virtual_chunk_containers is None
    store = ObjectStoreConfig.S3(S3Options())
    config.set_virtual_chunk_container(VirtualChunkContainer("s3://a/", store, "n"))
    config.set_virtual_chunk_container(VirtualChunkContainer("s3://b/", store, "n"))
    config.set_virtual_chunk_container(VirtualChunkContainer("s3://c/", store))
    assert list(config.virtual_chunk_containers or ()) == ["s3://b/", "s3://c/"]
    assert config.get_virtual_chunk_container("s3://b/") == VirtualChunkContainer("s3://b/", store, "n")
    assert config.get_virtual_chunk_container("n") is None
    config.clear_virtual_chunk_containers()
    assert config.virtual_chunk_containers == {}


@pytest.mark.parametrize(
    ("prefix", "store", "name"),
    [
        ("s3://a", ObjectStoreConfig.S3(S3Options()), None),
        ("s3:///", ObjectStoreConfig.S3(S3Options()), None),
        ("s3://a/", ObjectStoreConfig.Gcs(), None),
        ("file:///", ObjectStoreConfig.LocalFileSystem(Path("/a")), None),
        ("/a/", ObjectStoreConfig.LocalFileSystem(Path("/a")), None),
        ("", ObjectStoreConfig.LocalFileSystem(Path("/a")), None),
        ("vcc://a/", ObjectStoreConfig.S3(S3Options()), None),
        ("s3://a b/", ObjectStoreConfig.S3(S3Options()), None),
        ("memory:///", ObjectStoreConfig.InMemory(), None),
        ("s3://a/", ObjectStoreConfig.S3(S3Options()), ""),
        ("s3://a/", ObjectStoreConfig.S3(S3Options()), "x/y"),
    ],
)
def test_containers_that_cannot_work_are_refused_and_not_added(prefix: str, store: Any, name: str | None) -> None:
    config = RepositoryConfig()
    container = VirtualChunkContainer(prefix, store, name)
    with pytest.raises(InvalidInputError):
        config.set_virtual_chunk_container(container)
    assert config == RepositoryConfig()
    with pytest.raises(InvalidInputError):
        RepositoryConfig(virtual_chunk_containers={"x": container}).validate()


@pytest.mark.parametrize(
    "name", ["get_partial_values_concurrency", "max_concurrent_requests", "max_concurrent_decodes"]
)
def test_a_limit_of_no_requests_is_refused_when_a_repository_would_use_it(name: str) -> None:
    with raises(InvalidInputError, "invalid-setting", name):
        RepositoryConfig(**{name: 0}).validate()  # type: ignore[arg-type]


def test_merge_takes_the_other_side_where_it_is_set() -> None:
    container = VirtualChunkContainer("s3://a/", ObjectStoreConfig.S3(S3Options()))
    base = RepositoryConfig(
        inline_chunk_threshold_bytes=1,
        caching=CachingConfig(num_chunk_refs=1),
        compression=CompressionConfig(level=1),
        storage=StorageSettings(StorageConcurrencySettings(1, 2), StorageRetriesSettings(1)),
        manifest=ManifestConfig(ManifestPreloadConfig(max_total_refs=1)),
        virtual_chunk_containers={"a": container, "b": container},
        repo_update_retries=RepoUpdateRetryConfig(StorageRetriesSettings(1, 2)),
    )
    other = RepositoryConfig(
        caching=CachingConfig(num_snapshot_nodes=5),
        compression=CompressionConfig(CompressionAlgorithm.Zstd),
        storage=StorageSettings(StorageConcurrencySettings(9), StorageRetriesSettings(None, 7), storage_class="x"),
        manifest=ManifestConfig(ManifestPreloadConfig(max_arrays_to_scan=5), ManifestSplittingConfig([])),
        virtual_chunk_containers={"c": container},
        repo_update_retries=RepoUpdateRetryConfig(StorageRetriesSettings(None, 5)),
        engine=EngineConfig(put_memory_bytes=3),
    )
    before = copy.deepcopy(base), copy.deepcopy(other)
    merged = base.merge(other)
    assert merged == RepositoryConfig(
        inline_chunk_threshold_bytes=1,
        caching=CachingConfig(5, 1),
        compression=CompressionConfig(CompressionAlgorithm.Zstd, 1),
        storage=StorageSettings(StorageConcurrencySettings(9, 2), StorageRetriesSettings(1, 7), storage_class="x"),
        # Preloading and splitting are taken as a whole, and so are the containers.
        manifest=ManifestConfig(ManifestPreloadConfig(max_arrays_to_scan=5), ManifestSplittingConfig([])),
        virtual_chunk_containers={"c": container},
        repo_update_retries=RepoUpdateRetryConfig(StorageRetriesSettings(1, 5)),
        engine=EngineConfig(put_memory_bytes=3),
    )
    assert merged.storage is not None
    assert merged.storage.retries is not None
    merged.storage.retries.max_tries = 99
    assert (base, other) == before


def test_unknown_layouts_are_refused() -> None:
    assert EngineConfig(layout="log").layout == "log"
    with pytest.raises(InvalidInputError):
        EngineConfig(layout="paper")  # type: ignore[arg-type]


def test_storage_class_falls_back_to_the_common_one() -> None:
    settings = StorageSettings(storage_class="A", metadata_storage_class="B")
    assert settings.storage_class_of("metadata") == "B"
    assert settings.storage_class_of("chunk") == "A"
    assert StorageSettings().storage_class_of("chunk") is None


def test_splitting_is_given_as_pairs() -> None:
    condition, dimension = ManifestSplitCondition.path_matches("a"), ManifestSplitDimCondition.Any()
    with raises(WrongTypeError, "invalid-setting", "ManifestSplittingConfig.from_dict"):
        ManifestSplittingConfig({condition: {dimension: 3}})  # type: ignore[dict-item]
