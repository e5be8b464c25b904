"""Our names, signatures and enum values beside the official wheel's."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from icechunk.config import EngineConfig, StorageConcurrencySettings, config_from_yaml, config_to_yaml
from tests.test_config_stored import official_config
from tools import oracle
from tools.parity import MODULES, compare, describe, describe_official

ELSEWHERE = "a name of the package itself, not of the module where the official one shows it too"

KNOWN = {
    "AncestryGraph: missing": ELSEWHERE,
    "ErrorKind: no parameter 'values'": "how the enum module of Python 3.11 spells its constructor",
    "ManifestSplittingConfig.to_dict: no parameter 'config'": "the official library shows its self by that name",
    "ObjectStoreConfig._repr_html_: missing": "the union has no instances; each nested class has it",
    "StrEnum: missing": "an import of the official module, no name of its API",
    "initialize_logs: missing": ELSEWHERE,
    "set_logs_filter: missing": ELSEWHERE,
    "shutdown_telemetry: missing": ELSEWHERE,
}


@pytest.fixture(scope="module")
def official() -> Path:
    python = oracle.find(oracle.OFFICIAL_CURRENT)
    if python is None:
        pytest.skip("no environment with the official library: python tools/oracle.py 2.3.0 makes one")
    return python


@pytest.mark.oracle
def test_value_classes_differ_from_the_official_ones_only_where_a_reason_is_given(official: Path) -> None:
    differences = compare(describe(MODULES), describe_official(str(official), MODULES))
    assert set(differences) <= set(KNOWN)


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
    config.engine = None  # the official library forgets what it does not know
    again = config_from_yaml((repository / "config.yaml").read_bytes())
    assert again == config
