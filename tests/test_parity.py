"""Our names, signatures and enum values beside the official wheel's."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from icechunk.config import EngineConfig, StorageConcurrencySettings
from icechunk.config.yaml_text import config_from_yaml, config_to_yaml
from tests.config.test_config_stored import official_config
from tools import oracle
from tools.parity import MODULES, compare, describe, describe_official

ELSEWHERE = "a name of the package itself, not of the module where the official one shows it too"

CONCURRENCY = "as many requests as other reads of several values have"
ADDED_ZARR = "a method of newer versions of zarr, which stores inherit"
TO_DICT = "the official library shows its self by that name"
UNION = "the union has no instances; each nested class has it"
MADE = "repositories are opened, and sessions made by them; the compiled object that official ones hold does not exist"
PRIVATE = "a private name, which no public code was found to import"
KNOWN = {
    "icechunk.Repository: no parameter 'repository'": MADE,
    "icechunk._upgrade_icechunk_repository: missing": PRIVATE,
    "icechunk.ErrorKind: no parameter 'values'": "how the enum module of Python 3.11 spells its constructor",
    "icechunk.ForkSession: no parameter 'session'": MADE,
    "icechunk.IcechunkStore.get_ranges: parameter 'max_concurrency' defaults to None, official 10": CONCURRENCY,
    "icechunk.ManifestSplittingConfig.to_dict: no parameter 'config'": TO_DICT,
    "icechunk.ObjectStoreConfig._repr_html_: missing": UNION,
    "icechunk.Session: no parameter 'session'": MADE,
    "icechunk.config.ManifestSplittingConfig.to_dict: no parameter 'config'": TO_DICT,
    "icechunk.config.ObjectStoreConfig._repr_html_: missing": UNION,
    "icechunk.dask.store_dask: parameter 'store_kwargs' is number 5, official 4": "through_storage precedes the rest",
    "icechunk.repository.Repository: no parameter 'repository'": MADE,
    "icechunk.repository._none_credential_guidance: missing": PRIVATE,
    "icechunk.repository._warn_on_none_virtual_chunk_credentials: missing": PRIVATE,
    "icechunk.session.ForkSession: no parameter 'session'": MADE,
    "icechunk.session.Session: no parameter 'session'": MADE,
    "icechunk.storage.ObjectStoreConfig._repr_html_: missing": UNION,
    "icechunk.store.IcechunkStore.get_ranges: parameter 'max_concurrency' defaults to None, official 10": CONCURRENCY,
    "icechunk.store.TYPE_CHECKING: missing": "an import from typing, no name of the module",
    "icechunk.store._byte_request_to_tuple: missing": PRIVATE,
    "icechunk.testing.trees.node_names: missing": "an import from zarr, no name of the module",
    "icechunk.xarray.has_dask: missing": "a flag that the official module sets for itself",
}
OF_VERSIONS = {
    "icechunk.testing.models.ModelStore.get_ranges: missing": ADDED_ZARR,
    "icechunk.testing.models.ModelStore.get_ranges_sync: missing": ADDED_ZARR,
}
"""Differences that there are with some versions of Python and zarr, and not with others."""

ROOT = Path(__file__).parents[1]
KINDS = "errors that say more: the class and kind decide what a caller does next"
PERSISTED = "sessions that outlive their process: docs/sessions.md"
TWIN = "the asynchronous twin, or the synchronous one, of an official method"
PORT = "the port to object storage, which adapters implement: docs/storages.md"
MEMBERS = "members of unions have a common base here"
ADDED = {
    "icechunk": {
        "AccessDeniedError CommitOutcomeUnknown MergeFailedError ObjectNotFoundError PreconditionFailedError": KINDS,
        "PersistedSession SessionEndedError SessionNotFoundError": PERSISTED,
        "ArrayChange Blame ChangedRegions": "what changed: docs/inspecting.md",
        "EventKind RepositoryEvent": "what happens in a repository: docs/feed.md",
        "EngineConfig allow_metadata_bytes": "settings of this engine: docs/tuning.md",
        "open open_async storage_from_url": "one URL for a repository: docs/urls.md",
        "azure_store upgrade_icechunk_repository_async": TWIN,
        "__api_version__": "the official version that is matched: docs/releasing.md",
        "TYPE_CHECKING _API_VERSION _initialize_logs_on_import": "imports of the module",
    },
    "icechunk.Attribution": {"user_agent": "the same in a header of requests"},
    "icechunk.BasicConflictSolver": {
        "fail_on_delete_of_updated_array fail_on_delete_of_updated_group on_chunk_conflict": "its arguments can be read"
    },
    "icechunk.Diff": {"of": "made of what a transaction log says"},
    "icechunk.ErrorKind": {
        "COMMIT_OUTCOME_UNKNOWN INVALID_SETTING": KINDS,
        "SESSION_ABANDONED SESSION_COMMITTED SESSION_EXPIRED SESSION_FENCED SESSION_NOT_FOUND": PERSISTED,
    },
    "icechunk.GCSummary": {
        "chunk_bytes_copied manifests_rewritten packs_rewritten snapshots_rewritten": "repacking: docs/tuning.md"
    },
    "icechunk.GcsBearerCredential": {"_0 _1 _repr_html_": MEMBERS},
    "icechunk.IcechunkStore": {"delete_sync get_sync set_sync": "zarr's fused codec pipeline asks for them"},
    "icechunk.ManifestPreloadCondition": {"_0 _1 _repr_html_": MEMBERS},
    "icechunk.ManifestSplitCondition": {"_0 _1 _repr_html_": MEMBERS},
    "icechunk.Repository": {
        "aclose transaction_async": TWIN,
        "appender": "records appended to a growing array: docs/appending.md",
        "blame changed_labels changes coverage": "what changed, and who changed it: docs/inspecting.md",
        "checkpoint convert layout prune_log settle": "the log layout: docs/coming-from-the-official-library.md",
        "join_session resume_session sessions": PERSISTED,
        "watch watch_sync": "what happens in a repository: docs/feed.md",
    },
    "icechunk.RepositoryConfig": {"engine": "docs/tuning.md", "validate": "what create and open refuse"},
    "icechunk.Session": {
        "abandon checkpoint collect_forks id": PERSISTED,
        "reindex_array_async shift_array_async": TWIN,
        "rollback savepoint": "a part of the changes can be taken back",
        "unsettled_commit": "a commit without an answer: docs/coming-from-the-official-library.md",
    },
    "icechunk.Storage": {
        "aclose atomic_preconditions barrier batches_reads clock_resolution_us copy defers_syncs delete describe": PORT,
        "endpoint_url for_sender gains_from_split_reads get get_all head list_pages lists_any_prefix_fast": PORT,
        "lists_first_keys_fast prepare put put_after put_before put_unsynced read_nowait reads_nowait": PORT,
        "get_at_once supports_writes sync with_settings with_user_agent": PORT,
        "list_objects_async list_objects_metadata_async": TWIN,
    },
    "icechunk.StorageError": {"lost refused unsent": KINDS},
    "icechunk.StorageSettings": {"storage_class_of": "which class a new object has"},
    "icechunk.VirtualChunkContainer": {"validate": "what create and open refuse"},
    "icechunk.VirtualChunkSpec": {"_repr_html_": "it is shown like other values"},
}
ADDED["icechunk.ForkSession"] = ADDED["icechunk.Session"]
"""Public names and members by class that the official library lacks, with the reason or the page about them."""


@pytest.fixture(scope="module")
def official() -> Path:
    python = oracle.find(oracle.OFFICIAL_CURRENT)
    if python is None:
        pytest.skip("no environment with the official library: python tools/oracle.py 2.3.0 makes one")
    return python


@pytest.mark.oracle
def test_names_and_signatures_differ_from_the_official_ones_only_where_a_reason_is_given(official: Path) -> None:
    pytest.importorskip("dask")
    differences = set(compare(describe(MODULES), describe_official(str(official), MODULES)))
    assert not differences - set(KNOWN) - set(OF_VERSIONS)
    always = {line for line in KNOWN if "'values'" not in line}
    assert not always - differences, "explained, but no difference any more"


@pytest.mark.oracle
def test_public_names_and_members_that_are_added_have_a_reason(official: Path) -> None:
    """An asynchronous twin needs none of its own."""
    ours, theirs = describe(["icechunk"]), describe_official(str(official), ["icechunk"])
    known = {owner: {name for names in reasons for name in names.split()} for owner, reasons in ADDED.items()}
    added = {"icechunk": {name.partition(".")[2] for name in ours.keys() - theirs.keys()}}
    for name in ours.keys() & theirs.keys():
        members = set(ours[name].get("members", ())) - set(theirs[name].get("members", ())) - {"default_kind"}
        if members:
            added[name] = {member for member in members if member.removesuffix("_async") not in known.get(name, ())}
            added[name] |= members & known.get(name, set())
    assert added == known


def test_pages_that_reasons_name_are_there() -> None:
    reasons = " ".join(reason for members in ADDED.values() for reason in members.values())
    assert [page for page in re.findall(r"docs/[\w-]+\.md", reasons) if not (ROOT / page).exists()] == []


READ_CONFIG = """
import sys, icechunk
config = icechunk.Repository.fetch_config(icechunk.local_filesystem_storage(sys.argv[1]))
print(repr(config))
icechunk.Repository.open(icechunk.local_filesystem_storage(sys.argv[1])).save_config()
"""


@pytest.mark.oracle
def test_the_official_library_reads_our_yaml_and_we_read_it_back(official: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"ICECHUNK_LOG": "error"}
    repository = tmp_path / "repository"
    create = (
        "import sys, icechunk\n"
        "icechunk.Repository.create(icechunk.local_filesystem_storage(sys.argv[1]), spec_version=1)"
    )

    def run(script: str) -> str:
        command = [str(official), "-c", script, str(repository)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(create)
    config = official_config()
    config.engine = EngineConfig(put_memory_bytes=5)
    # Unset, the official library would save its defaults for local disks in their place.
    assert config.storage is not None
    config.storage.concurrency = StorageConcurrencySettings(1, 2)
    (repository / "config.yaml").write_bytes(config_to_yaml(config))
    shown = run(READ_CONFIG)
    assert 'name_matches("^a$")' in shown
    assert "num_updates_per_repo_info_file=31" in shown
    config.engine = None  # the official library drops values it does not know
    again = config_from_yaml((repository / "config.yaml").read_bytes())
    assert again == config
