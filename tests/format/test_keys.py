from __future__ import annotations

import re

import pytest

from icechunk.format import keys
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId


def test_keys_name_the_object_by_prefix_and_id_text() -> None:
    assert keys.snapshot_key(FIRST_SNAPSHOT) == "snapshots/1CECHNKREP0F1RSTCMT0"
    assert keys.manifest_key(FIRST_SNAPSHOT) == "manifests/1CECHNKREP0F1RSTCMT0"
    assert keys.transaction_key(FIRST_SNAPSHOT) == "transactions/1CECHNKREP0F1RSTCMT0"
    assert keys.chunk_key(FIRST_SNAPSHOT) == "chunks/1CECHNKREP0F1RSTCMT0"
    ids = [FIRST_SNAPSHOT, *[ObjectId(bytes([i]) * 12) for i in range(100)]]
    assert keys.snapshot_keys(ids) == [keys.snapshot_key(id) for id in ids]
    assert keys.manifest_keys(ids) == [keys.manifest_key(id) for id in ids]


def test_newer_backups_list_before_older_ones() -> None:
    older = keys.overwritten_repo_name(1_795_350_195_629, bytes(12))
    newer = keys.overwritten_repo_name(1_795_350_195_630, bytes(12))
    assert older == "repo.30708329804371.00000000000000000000"
    assert newer < older
    assert keys.overwritten_repo_key(newer) == "overwritten/" + newer
    assert keys.overwritten_config_key(0, bytes(12)) == "overwritten/config.yaml.32503680000000.00000000000000000000"


def test_a_backup_name_refuses_a_random_part_of_another_length() -> None:
    with pytest.raises(ValueError, match=re.escape("12")):
        keys.overwritten_repo_name(0, b"short")
