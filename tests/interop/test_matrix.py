"""Every feature, written and continued by both libraries in turn: they see the same at every step.

A cell is a feature, the library that begins, an official library, and a version of the format. The first writes, the
other reads and continues, and so on: each of the steps of `tools.interop.features` on what the other library has left.
What a library or a version of the format does not have is refused, by every library.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icechunk.format.manifest import decode_manifest, encode_manifest
from icechunk.format.repo.codec import decode_repo, encode_repo
from icechunk.format.snapshot.codec import decode_snapshot, encode_snapshot
from icechunk.format.transaction import decode_transaction_log, encode_transaction_log
from icechunk.format.values import ChunkRefs
from tools import oracle
from tools.interop import matrix
from tools.interop.features import FEATURES, Feature

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(300)]

STEPS = 3
SPEC_VERSION = 36
"""Offset of the version in a file."""
OFFICIALS = {"2.3.0, format 2": ("2.3.0", 2), "2.3.0, format 1": ("2.3.0", 1), "1.1.21, format 1": ("1.1.21", 1)}


@pytest.fixture(scope="session")
def officials() -> Iterator[Callable[[str], oracle.Resident]]:
    """A process of each version of the official library, started when it is first asked for."""
    running: dict[str, oracle.Resident] = {}

    def resident(version: str) -> oracle.Resident:
        if version not in running:
            if os.environ.get("ICECHUNK_REQUIRE_ORACLE") != "1" and oracle.find(version) is None:
                pytest.skip(f"the official library has no environment: `python tools/oracle.py {version}` makes one")
            running[version] = oracle.Resident(version)
        return running[version]

    yield resident
    for one in running.values():
        one.close()


class Ours:
    """Our library, called as the official ones are."""

    def call(self, function: str, *arguments: Any) -> Any:
        result = getattr(matrix, function.partition(":")[2])(*arguments)
        return json.loads(json.dumps(result))


def begin(library: Any, feature: Feature, path: Path, spec_version: int | None) -> None:
    library.call("tools.interop.matrix:begin", feature.name, str(path), spec_version)


def go_on(library: Any, feature: Feature, path: Path, step: int) -> None:
    library.call("tools.interop.matrix:go_on", feature.name, str(path), step)


def describe(library: Any, feature: Feature, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = library.call("tools.interop.matrix:describe", feature.name, str(path))
    return found


def check_agreement(feature: Feature, path: Path, official: oracle.Resident, without: frozenset[str]) -> None:
    """Both see the same, but for what one of them has no name for."""
    ours, theirs = describe(Ours(), feature, path), describe(official, feature, path)
    if official.version == "2.3.0":
        assert ours.keys() == theirs.keys()
    for key in sorted((ours.keys() & theirs.keys()) - feature.left_out - without):
        assert ours[key] == theirs[key], key


def comparable(table: Any) -> Any:
    """A table as plain values; references row by row, since the encoder may place inline bytes anywhere."""
    match table:
        case ChunkRefs():
            return [(table.coords[i].tolist(), table.row(i)) for i in range(len(table))]
        case np.ndarray():
            return table.tolist()
        case Mapping():
            return {key: comparable(value) for key, value in table.items()}
        case list() | tuple():
            return [comparable(value) for value in table]
        case _ if is_dataclass(table):
            return {field.name: comparable(getattr(table, field.name)) for field in fields(table)}
        case _:
            return table


def check_files(path: Path) -> None:
    """A file that this package encodes again decodes to equal values."""
    codecs: dict[str, tuple[Callable[[bytes], Any], Callable[[Any, int], bytes]]] = {
        "snapshots": (decode_snapshot, encode_snapshot),
        "manifests": (decode_manifest, encode_manifest),
        "transactions": (decode_transaction_log, encode_transaction_log),
    }
    for folder, (decode, encode) in codecs.items():
        for file in sorted((path / folder).glob("*")):
            data = file.read_bytes()
            table = decode(data)
            again = decode(encode(table, data[SPEC_VERSION]))
            assert comparable(again) == comparable(table), file.name
    if (path / "repo").exists():
        info = decode_repo((path / "repo").read_bytes())
        assert decode_repo(encode_repo(info)) == info


def cells() -> Iterator[Any]:
    for feature in FEATURES:
        for name, (version, spec_version) in OFFICIALS.items():
            if version in feature.unable or spec_version < feature.format or version in feature.reads_only:
                continue
            for first in ("they", "we"):
                yield pytest.param(feature, version, spec_version, first, id=f"{feature.name}; {name}; {first} begin")


@pytest.mark.parametrize(("feature", "version", "spec_version", "first"), list(cells()))
def test_each_library_reads_and_continues_a_repository_of_the_other(
    feature: Feature,
    version: str,
    spec_version: int,
    first: str,
    officials: Callable[[str], oracle.Resident],
    tmp_path: Path,
) -> None:
    path = tmp_path / "repo"
    official = officials(version)
    order = [official, Ours()] if first == "they" else [Ours(), official]
    old = first == "they" and version == "1.1.21"
    begin(order[0], feature, path, None if old else spec_version)
    for step in range(1, STEPS):
        go_on(order[step % 2], feature, path, step)
    # The whole history is read, by both: what either library wrote, and what it continued.
    check_agreement(feature, path, official, frozenset())
    check_files(path)


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_the_official_library_reads_a_repository_in_our_log_layout(
    feature: Feature, officials: Callable[[str], oracle.Resident], tmp_path: Path
) -> None:
    path = tmp_path / "repo"
    begin(Ours(), feature, path, None)
    for step in range(1, STEPS):
        go_on(Ours(), feature, path, step)
    # Its status is shown as read-only to others, and it is no part of the ops log that this is so.
    check_agreement(feature, path, officials("2.3.0"), frozenset({"status"}))
    assert describe(officials("2.3.0"), feature, path)["status"][0] == 1
    check_files(path)


def refusals() -> Iterator[Any]:
    for feature in FEATURES:
        for name, (version, spec_version) in OFFICIALS.items():
            if version in feature.unable or spec_version < feature.format:
                yield pytest.param(feature, version, spec_version, id=f"{feature.name}; {name}")


@pytest.mark.parametrize(("feature", "version", "spec_version"), list(refusals()))
def test_operations_that_a_library_or_format_lacks_are_refused(
    feature: Feature,
    version: str,
    spec_version: int,
    officials: Callable[[str], oracle.Resident],
    tmp_path: Path,
) -> None:
    for library, path in ((officials(version), tmp_path / "theirs"), (Ours(), tmp_path / "ours")):
        if isinstance(library, Ours) and spec_version >= feature.format:
            continue
        begin(Ours(), matrix.feature("groups"), path, spec_version)
        before = describe(Ours(), matrix.feature("groups"), path)
        assert library.call("tools.interop.matrix:refused", feature.name, str(path), 0) is not None
        after = describe(Ours(), matrix.feature("groups"), path)
        assert after["branches"].keys() == before["branches"].keys()


@pytest.mark.parametrize("feature", [one for one in FEATURES if one.reads_only], ids=lambda feature: feature.name)
def test_features_that_a_library_only_reads_are_read(
    feature: Feature, officials: Callable[[str], oracle.Resident], tmp_path: Path
) -> None:
    for version in feature.reads_only:
        begin(Ours(), feature, tmp_path / version, 2)
        check_agreement(feature, tmp_path / version, officials(version), frozenset())
