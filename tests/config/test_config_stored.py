"""Stored forms of a configuration: what the official library wrote is read, and what we write is what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    config_from_dict,
    config_to_dict,
)
from icechunk.config.yaml_text import MAX_YAML_BYTES, config_from_yaml, config_to_yaml
from icechunk.errors import ErrorKind, FormatError
from icechunk.format.flat import flexbuffers

# Stored by 2.3.0 as config.yaml of a format 1 repository (containers cut down).
OFFICIAL_YAML = """\
inline_chunk_threshold_bytes: 1
get_partial_values_concurrency: null
compression:
  algorithm: zstd
  level: 4
max_concurrent_requests: null
max_concurrent_decodes: 32
caching: null
storage:
  concurrency: null
  retries:
    max_tries: 13
    initial_backoff_ms: 14
    max_backoff_ms: 15
  timeouts: null
  unsafe_use_conditional_update: true
  unsafe_use_conditional_create: null
  unsafe_use_metadata: false
  storage_class: A
  metadata_storage_class: null
  chunks_storage_class: null
  minimum_size_for_multipart_upload: null
virtual_chunk_containers:
  s3://b/:
    name: n1
    url_prefix: s3://b/
    store: !s3_compatible
      region: null
      endpoint_url: null
      anonymous: false
      allow_http: false
      force_path_style: false
      network_stream_timeout_seconds: null
      requester_pays: false
      checksum_algorithm: crc64_nvme
  https://a/:
    name: null
    url_prefix: https://a/
    store: !http
      o: p
      headers:
        h: q
  gcs://b/:
    name: null
    url_prefix: gcs://b/
    store: !gcs {}
  file:///a/:
    name: null
    url_prefix: file:///a/
    store: !local_file_system /a
manifest:
  preload:
    max_total_refs: 21
    preload_if: !and
    - !or
      - !name_matches
        regex: ^a$
      - 'true'
    - !num_refs
      from: !Included 1
      to: !Excluded 5
    - !num_refs
      from: Unbounded
      to: Unbounded
    max_arrays_to_scan: null
  splitting:
    split_sizes:
    - - any_array
      - - condition: !Axis 0
          num_chunks: 5
        - condition: Any
          num_chunks: 7
    - - !path_matches
        regex: q
      - - condition: !DimensionName t
          num_chunks: 2
  virtual_chunk_location_compression: null
  max_concurrent_manifest_fetches_during_commit: 27
previous_file: null
repo_update_retries:
  default:
    max_tries: 28
    initial_backoff_ms: null
    max_backoff_ms: null
num_updates_per_repo_info_file: 31
"""


def official_config() -> RepositoryConfig:
    p, s, d = ManifestPreloadCondition, ManifestSplitCondition, ManifestSplitDimCondition
    config = RepositoryConfig(
        1,
        compression=CompressionConfig(CompressionAlgorithm.Zstd, 4),
        max_concurrent_decodes=32,
        storage=StorageSettings(
            retries=StorageRetriesSettings(13, 14, 15),
            unsafe_use_conditional_update=True,
            unsafe_use_metadata=False,
            storage_class="A",
        ),
        manifest=ManifestConfig(
            ManifestPreloadConfig(
                21,
                p.and_conditions([p.name_matches("^a$") | p.true(), p.num_refs(1, 5), p.num_refs(None, None)]),
            ),
            ManifestSplittingConfig.from_dict(
                {s.AnyArray(): {d.Axis(0): 5, d.Any(): 7}, s.path_matches("q"): {d.DimensionName("t"): 2}}
            ),
            max_concurrent_manifest_fetches_during_commit=27,
        ),
        repo_update_retries=RepoUpdateRetryConfig(StorageRetriesSettings(28)),
        num_updates_per_repo_info_file=31,
    )
    for container in (
        VirtualChunkContainer(
            "s3://b/",
            ObjectStoreConfig.S3Compatible(S3Options(checksum_algorithm=ChecksumAlgorithm.Crc64Nvme)),
            "n1",
        ),
        VirtualChunkContainer("https://a/", ObjectStoreConfig.Http({"o": "p"}, {"h": "q"})),
        VirtualChunkContainer("gcs://b/", ObjectStoreConfig.Gcs()),
        VirtualChunkContainer("file:///a/", ObjectStoreConfig.LocalFileSystem(Path("/a"))),
    ):
        config.set_virtual_chunk_container(container)
    return config


def test_yaml_of_the_official_library_is_read() -> None:
    assert config_from_yaml(OFFICIAL_YAML.encode()) == official_config()


def test_our_yaml_differs_from_the_official_librarys_in_quotes_only() -> None:
    ours = config_to_yaml(official_config()).decode()
    assert ours.replace('"', "").replace("'", "") == OFFICIAL_YAML.replace("'", "")


def test_enum_variants_are_one_key_maps_in_a_dict() -> None:
    data = config_to_dict(official_config())
    assert data["virtual_chunk_containers"]["gcs://b/"] == {
        "name": None,
        "url_prefix": "gcs://b/",
        "store": {"gcs": {}},
    }
    assert data["manifest"]["preload"]["preload_if"]["and"][1] == {
        "num_refs": {"from": {"Included": 1}, "to": {"Excluded": 5}}
    }
    assert data["manifest"]["splitting"]["split_sizes"][0] == [
        "any_array",
        [{"condition": {"Axis": 0}, "num_chunks": 5}, {"condition": "Any", "num_chunks": 7}],
    ]
    assert data["compression"] == {"algorithm": "zstd", "level": 4}


def test_an_empty_configuration_is_written_as_nulls() -> None:
    data = config_to_dict(RepositoryConfig())
    assert len(data) == 12
    assert set(data.values()) == {None}
    assert config_from_yaml(b"") == RepositoryConfig()


def optionally(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=8) | st.sampled_from(
    ["true", "no", "null", "~", "1", "1e3", "0x1", "2020-01-01", " a ", "a: b", "#", "- x", "!t", "", "&a", "*a"]
)
mappings = st.dictionaries(words, words, max_size=2)
u16, u32, u64 = (st.integers(0, 2**n - 1) for n in (16, 32, 64))
tries = st.integers(1, 2**16 - 1)
s3 = st.builds(
    S3Options,
    region=optionally(words),
    endpoint_url=optionally(words),
    allow_http=st.booleans(),
    network_stream_timeout_seconds=optionally(u32),
    checksum_algorithm=optionally(st.sampled_from(ChecksumAlgorithm)),
)
stores = st.one_of(
    st.just(ObjectStoreConfig.InMemory()),
    words.map(Path).map(ObjectStoreConfig.LocalFileSystem),
    s3.map(ObjectStoreConfig.S3),
    s3.map(ObjectStoreConfig.S3Compatible),
    s3.map(ObjectStoreConfig.Tigris),
    mappings.map(ObjectStoreConfig.Gcs),
    mappings.map(ObjectStoreConfig.Azure),
    st.builds(ObjectStoreConfig.Http, mappings.map(lambda m: {k: v for k, v in m.items() if k != "headers"}), mappings),
)
preloads = st.recursive(
    st.one_of(
        st.just(ManifestPreloadCondition.true()),
        st.just(ManifestPreloadCondition.false()),
        words.map(ManifestPreloadCondition.name_matches),
        words.map(ManifestPreloadCondition.path_matches),
        st.builds(ManifestPreloadCondition.num_refs, optionally(u32), optionally(u32)),
    ),
    lambda inner: (
        st.lists(inner, max_size=2).map(ManifestPreloadCondition.or_conditions)
        | st.lists(inner, max_size=2).map(ManifestPreloadCondition.and_conditions)
    ),
    max_leaves=4,
)
splits = st.recursive(
    st.just(ManifestSplitCondition.AnyArray())
    | words.map(ManifestSplitCondition.name_matches)
    | words.map(ManifestSplitCondition.path_matches),
    lambda inner: (
        st.lists(inner, max_size=2).map(ManifestSplitCondition.or_conditions)
        | st.lists(inner, max_size=2).map(ManifestSplitCondition.and_conditions)
    ),
    max_leaves=3,
)
dimensions = st.one_of(
    u32.map(ManifestSplitDimCondition.Axis),
    words.map(ManifestSplitDimCondition.DimensionName),
    st.just(ManifestSplitDimCondition.Any()),
)
sizes = st.lists(st.tuples(dimensions, st.integers(1, 2**32 - 1)), max_size=2)
configs = st.builds(
    RepositoryConfig,
    inline_chunk_threshold_bytes=optionally(u16),
    max_concurrent_requests=optionally(u16),
    compression=optionally(
        st.builds(CompressionConfig, optionally(st.just(CompressionAlgorithm.Zstd)), optionally(st.integers(0, 255)))
    ),
    caching=optionally(st.builds(CachingConfig, optionally(u64), num_bytes_chunks=optionally(u64))),
    storage=optionally(
        st.builds(
            StorageSettings,
            optionally(st.builds(StorageConcurrencySettings, optionally(tries))),
            optionally(st.builds(StorageRetriesSettings, optionally(tries), optionally(u32))),
            optionally(st.booleans()),
            storage_class=optionally(words),
            timeouts=optionally(st.builds(StorageTimeoutSettings, optionally(u32))),
        )
    ),
    virtual_chunk_containers=optionally(
        st.dictionaries(words, st.builds(VirtualChunkContainer, words, stores, optionally(words)), max_size=2)
    ),
    manifest=optionally(
        st.builds(
            ManifestConfig,
            optionally(st.builds(ManifestPreloadConfig, optionally(u32), optionally(preloads))),
            optionally(st.builds(ManifestSplittingConfig, optionally(st.lists(st.tuples(splits, sizes), max_size=2)))),
            optionally(
                st.builds(
                    ManifestVirtualChunkLocationCompressionConfig,
                    optionally(u16),
                    compression_level=optionally(st.integers(-(2**31), 2**31 - 1)),
                )
            ),
        )
    ),
    repo_update_retries=optionally(st.builds(RepoUpdateRetryConfig, optionally(st.builds(StorageRetriesSettings)))),
    engine=optionally(st.builds(EngineConfig, put_memory_bytes=st.integers(1, 2**40))),
)


@settings(max_examples=60)
@given(configs)
def test_every_configuration_round_trips_through_both_stored_forms(config: RepositoryConfig) -> None:
    data = config_to_dict(config)
    assert config_from_dict(data) == config
    assert flexbuffers.loads(flexbuffers.dumps(data)) == data
    assert config_from_yaml(config_to_yaml(config)) == config


def test_our_own_settings_are_stored_without_the_layout() -> None:
    config = RepositoryConfig(engine=EngineConfig(layout="repo", put_memory_bytes=5))
    assert config_from_dict(config_to_dict(config)) == RepositoryConfig(engine=EngineConfig(put_memory_bytes=5))
    layout_only = RepositoryConfig(engine=EngineConfig(layout="repo"))
    assert config_to_dict(layout_only) == config_to_dict(RepositoryConfig())


def test_unknown_keys_are_skipped_and_missing_ones_unset() -> None:
    assert config_from_dict({"compression": {"level": 3}, "from_the_future": {"a": 1}}) == RepositoryConfig(
        compression=CompressionConfig(level=3)
    )


@pytest.mark.parametrize(
    "data",
    [
        [],
        {"caching": 3},
        {"inline_chunk_threshold_bytes": -1},
        {"inline_chunk_threshold_bytes": "x"},
        {"compression": {"algorithm": "rot13"}},
        {"virtual_chunk_containers": {"a": {"url_prefix": "a"}}},
        {"virtual_chunk_containers": {"a": {"url_prefix": "a", "store": {"tape": {}}}}},
        {"virtual_chunk_containers": {"a": {"url_prefix": "a", "store": {"s3": {}, "gcs": {}}}}},
        {"virtual_chunk_containers": {"a": {"url_prefix": "a", "store": {"local_file_system": 3}}}},
        {"virtual_chunk_containers": {"a": {"url_prefix": "a", "store": {"s3": {"checksum_algorithm": "md4"}}}}},
        {"manifest": {"preload": {"preload_if": "maybe"}}},
        {"manifest": {"preload": {"preload_if": {"num_refs": {"from": "Unbounded"}}}}},
        {"manifest": {"preload": {"preload_if": {"num_refs": {"from": {"Included": "x"}, "to": "Unbounded"}}}}},
        {"manifest": {"preload": {"preload_if": {"or": 3}}}},
        {"manifest": {"splitting": {"split_sizes": [["any_array"]]}}},
        {"manifest": {"splitting": {"split_sizes": [["any_array", [{"condition": "Any", "num_chunks": 0}]]]}}},
        {"manifest": {"splitting": {"split_sizes": [["any_array", [{"condition": "Some", "num_chunks": 1}]]]}}},
    ],
)
def test_values_that_are_no_configuration_are_a_format_error(data: Any) -> None:
    with pytest.raises(FormatError) as caught:
        config_from_dict(data)
    assert caught.value.kind == ErrorKind.CONFIG_DESERIALIZATION


@pytest.mark.parametrize(
    "text",
    [
        b"\xff",
        b"{",
        b"[1]",
        b"a: &x 1\nb: *x",
        b"compression: !!python/object:os.system {}",
        b"!!python/object/apply:os.system ['true']",
        b"[" * 200_000,
        b"- " * 100_000,
        b" " * (MAX_YAML_BYTES + 1),
    ],
)
def test_hostile_or_broken_yaml_is_a_format_error(text: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        config_from_yaml(text)
    assert caught.value.kind == ErrorKind.CONFIG_DESERIALIZATION


def test_secrets_of_a_broken_configuration_are_not_in_the_error() -> None:
    with pytest.raises(FormatError) as caught:
        config_from_dict({"virtual_chunk_containers": {"a": {"url_prefix": "a", "store": {"http": {"t": ["SECRET"]}}}}})
    assert "SECRET" not in str(caught.value)
