"""Files of the official library: read, compared with what it says of them, written again and read again."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from icechunk.format.ids import encode_id, object_id_from_text
from icechunk.format.manifest import decode_manifest, encode_manifest
from icechunk.format.repo.codec import decode_repo, encode_repo
from icechunk.format.snapshot.codec import decode_snapshot, encode_snapshot
from icechunk.format.transaction import decode_transaction_log, encode_transaction_log
from icechunk.format.values import INLINE, NATIVE, VIRTUAL, NodeKind
from tools.fuzz.strategies import contents

FIXTURES = Path(__file__).parent / "fixtures"
KINDS = ["v1-old", "v1", "v2"]


def files(kind: str, prefix: str) -> list[Path]:
    return sorted((FIXTURES / kind / prefix).iterdir())


def views(kind: str) -> dict[str, Any]:
    raw = json.loads((FIXTURES / kind / "inspect.json").read_text())
    return {name: json.loads(view) if isinstance(view, str) else view for name, view in raw.items()}


def time(text: str) -> int:
    moment = datetime.fromisoformat(text).astimezone(UTC)
    return round(moment.replace(microsecond=0).timestamp()) * 1_000_000 + moment.microsecond


@pytest.mark.parametrize("kind", KINDS)
def test_snapshots_decode_to_the_values_of_the_official_library(kind: str) -> None:
    official = views(kind)
    for path in files(kind, "snapshots"):
        data = path.read_bytes()
        snapshot = decode_snapshot(data, expected_id=object_id_from_text(path.name))
        view = official[f"snapshots/{path.name}"]
        assert view["id"] == path.name
        assert view["commit_message"] == snapshot.message
        assert view["metadata"] == snapshot.metadata
        assert time(view["flushed_at"]) == snapshot.flushed_at_us
        assert {node["path"]: node["id"] for node in view["nodes"]} == {
            node.path: encode_id(node.id) for node in snapshot.nodes.values()
        }
        assert {manifest["id"] for manifest in view["manifests"]} == {encode_id(id) for id in snapshot.manifest_files}
        again = decode_snapshot(encode_snapshot(snapshot, data[36]))
        assert again == snapshot


@pytest.mark.parametrize("kind", KINDS)
def test_snapshots_name_the_existing_manifests_and_their_contents(kind: str) -> None:
    for path in files(kind, "snapshots"):
        snapshot = decode_snapshot(path.read_bytes())
        referred = set()
        for node in snapshot.nodes.values():
            assert node.kind is NodeKind.GROUP or b"chunk_grid" in node.user_data
            for ref in node.manifests:
                manifest = decode_manifest((FIXTURES / kind / "manifests" / encode_id(ref.object_id)).read_bytes())
                file = snapshot.manifest_files[ref.object_id]
                assert file.num_chunk_refs == manifest.num_chunk_refs
                refs = manifest.arrays[node.id]
                assert refs.ndim == len(node.shape) == len(ref.extents)
                if refs.ndim:
                    bounds = zip(refs.coords.min(axis=0).tolist(), (refs.coords.max(axis=0) + 1).tolist(), strict=True)
                    assert ref.extents == tuple(bounds)
                referred.add(ref.object_id)
        assert referred == set(snapshot.manifest_files)


@pytest.mark.parametrize("kind", KINDS)
def test_manifests_decode_to_the_values_of_the_official_library(kind: str) -> None:
    official = views(kind)
    for path in files(kind, "manifests"):
        data = path.read_bytes()
        manifest = decode_manifest(data, expected_id=object_id_from_text(path.name))
        view = official.get(f"manifests/{path.name}")
        if view is not None:
            counted = {
                encode_id(node): [int((refs.kind == k).sum()) for k in (INLINE, NATIVE, VIRTUAL)]
                for node, refs in manifest.arrays.items()
            }
            assert {
                array["node_id"]: [array["num_inline"], array["num_native"], array["num_virtual"]]
                for array in view["arrays"]
            } == counted
        again = decode_manifest(encode_manifest(manifest, data[36]))
        assert contents(again) == contents(manifest)


@pytest.mark.parametrize("kind", KINDS)
def test_virtual_references_and_their_checksums_are_read(kind: str) -> None:
    found = {}
    for path in files(kind, "manifests"):
        for refs in decode_manifest(path.read_bytes()).arrays.values():
            if (refs.kind == VIRTUAL).any():
                found[len(refs)] = refs
    many, mixed = found[1200], found[4]
    for i in (0, 1, 599, 1199):
        ref = many.row(i)
        assert ref.location == f"s3://bucket/some/long/prefix/{i % 7}/{i:05}.nc"
        assert (ref.offset, ref.length, ref.last_modified) == (i, 1, None)
        assert ref.etag == (f"etag-{i % 3}" if i % 2 else None)
    assert [mixed.row(i).etag for i in range(4)] == [None, None, '"an-etag"', None]
    assert mixed.row(3).last_modified == 1_704_164_645 + 20_000 * 86_400
    assert mixed.row(0).kind == INLINE


@pytest.mark.parametrize("kind", KINDS)
def test_transaction_logs_are_read_and_written_back(kind: str) -> None:
    official = views(kind)
    pruned = set()
    if kind == "v2":
        records = decode_repo((FIXTURES / "v2" / "repo").read_bytes()).snapshots.values()
        pruned = {record.id for record in records if record.pruned_ancestor_tx_logs}
    for path in files(kind, "transactions"):
        data = path.read_bytes()
        log = decode_transaction_log(data, expected_id=object_id_from_text(path.name))
        view = official.get(f"transactions/{path.name}")
        # where ancestors expired, the official view is of their logs too
        if view is not None and log.id not in pruned:
            for field in (
                "new_groups",
                "new_arrays",
                "deleted_groups",
                "deleted_arrays",
                "updated_groups",
                "updated_arrays",
            ):
                assert sorted(view[field]) == sorted(encode_id(id) for id in getattr(log, field))
        again = decode_transaction_log(encode_transaction_log(log, data[36]))
        assert again.moved_nodes == log.moved_nodes
        assert repr(again) == repr(log)


def repo_files() -> list[Path]:
    return [FIXTURES / "v2" / "repo", *files("v2", "overwritten")]


def test_repo_infos_are_read_and_written_back() -> None:
    for path in repo_files():
        info = decode_repo(path.read_bytes())
        assert decode_repo(encode_repo(info)) == info


def test_the_repo_info_decodes_to_the_values_of_the_official_library() -> None:
    info = decode_repo((FIXTURES / "v2" / "repo").read_bytes())
    view = views("v2")["repo"]
    assert view["branches"] == {name: encode_id(id) for name, id in info.branches.items()}
    assert view["tags"] == {name: encode_id(id) for name, id in info.tags.items()}
    assert set(view["deleted_tags"]) == info.deleted_tags == {"gone"}
    assert info.metadata == {"owner": "me", "sizes": [1, 2.5, -3]}
    assert info.enabled_feature_flags == frozenset({4})
    assert info.disabled_feature_flags == frozenset({3})
    assert info.status.availability == 0
    assert info.config is not None
    assert info.config["inline_chunk_threshold_bytes"] == 40
    kinds = {type(update.change).__name__ for update in info.updates}
    assert len(kinds) == 15
    assert max(len(record.pruned_ancestor_tx_logs) for record in info.snapshots.values()) == 2


def test_config_round_trips_as_plain_values() -> None:
    info = decode_repo((FIXTURES / "v2" / "repo").read_bytes())
    changed = replace(
        info, config={"previous_file": None, "manifest": {"splitting": [["any_array", [{"Axis": 0}, 5]]]}}
    )
    assert decode_repo(encode_repo(changed)).config == changed.config
