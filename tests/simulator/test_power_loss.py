"""A power failure at any moment: what was acknowledged is there, and work goes on from it."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pytest
import zarr

import icechunk
from icechunk.config import EngineConfig
from icechunk.errors import FormatError, RepositoryNotFoundError
from icechunk.format.ids import object_id_from_text
from icechunk.format.keys import manifest_key, snapshot_key, transaction_key
from icechunk.format.manifest import decode_manifest
from icechunk.format.repo.codec import decode_repo
from icechunk.format.snapshot.codec import decode_snapshot
from icechunk.format.transaction import decode_transaction_log
from icechunk.log.repository.entries.takeover import seal_log
from icechunk.log.repository.entry import floor_key
from icechunk.log.repository.marker import decode_marker
from icechunk.log.repository.open import open_repository
from icechunk.maintenance.prune import prune_log
from icechunk.runtime.clock import SYSTEM
from icechunk.storage.local import folders
from icechunk.storage.local import storage as local
from icechunk.storage.local.syncs import Promises
from tests.promises import BTRFS, EXT4, UNKNOWN
from tools.simulator.power_loss import Loss, Recorder, Trace

pytestmark = pytest.mark.thorough

Name: TypeAlias = Literal["log", "repo", "refs"]
LAYOUTS: tuple[Name, ...] = ("log", "repo", "refs")
CHUNK = 1000
"""Values of a chunk, too many to be inline."""
MOST = 10
"""Commits that fit into the arrays; each check reads all their chunks in every version."""


def repository(root: Path, *, create: bool = False, layout: Name = "log") -> icechunk.Repository:
    storage = icechunk.local_filesystem_storage(str(root))
    if not create:
        return icechunk.Repository.open(storage)
    config = icechunk.RepositoryConfig(engine=EngineConfig(layout=layout))
    return icechunk.Repository.create(storage, config=config)


def commit(repo: icechunk.Repository, number: int) -> None:
    """Change an attribute, an inline chunk, and with every other commit a chunk that is an object, in a pack.

    Every fourth commit fills a new array, whose chunks are objects of their own.
    """
    session = repo.writable_session("main")
    group: Any = zarr.open_group(session.store, mode="a")
    if not number:
        group.create_array("small", shape=(MOST,), chunks=(1,), dtype="i4", compressors=None)
        group.create_array("large", shape=(MOST * CHUNK,), chunks=(CHUNK,), dtype="i4", compressors=None)
    group.attrs["number"] = number
    group["small"][number] = number + 1
    if number % 2:
        group["large"][number * CHUNK : (number + 1) * CHUNK] = number + 1
    if number % 4 == 2:
        several = group.create_array(
            f"several/{number}", shape=(3, 1 << 18), chunks=(1, 1 << 18), dtype="i4", compressors=None
        )
        several[:] = number
    session.commit(str(number))


def commits(repo: icechunk.Repository) -> list[str]:
    """Messages of the commits above, oldest first."""
    return [found.message for found in repo.ancestry(branch="main")][-2::-1]


def check_contents(repo: icechunk.Repository, *, first: int = 0) -> int:
    """As `check_contents_of`, and the ops log has a line for each commit."""
    count = check_contents_of(repo, first=first)
    if repo.spec_version != 1:
        kinds = [update.kind for update in repo.ops_log()]
        assert sum(isinstance(kind, icechunk.UpdateType.NewCommit) for kind in kinds) == count
    return count


def check_contents_of(repo: icechunk.Repository, *, first: int = 0) -> int:
    """Everything in history, from commit ``first`` on, is what was committed; returns how many commits there are."""
    found = list(repo.ancestry(branch="main"))[-2::-1]
    for number, snapshot in enumerate(found):
        assert snapshot.message == str(number)
        if number < first:
            continue
        group: Any = zarr.open_group(repo.readonly_session(snapshot_id=snapshot.id).store, mode="r")
        assert group.attrs["number"] == number
        small, large = np.asarray(group["small"][:]), np.asarray(group["large"][::CHUNK])
        assert small[: number + 1].tolist() == list(range(1, number + 2))
        assert not small[number + 1 :].any()
        assert large[: number + 1].tolist() == [n + 1 if n % 2 else 0 for n in range(number + 1)]
        for other in range(2, number + 1, 4):
            assert np.all(group[f"several/{other}"][:] == other)
    return len(found)


def check_files(root: Path) -> None:
    """The files that another reader of the format finds are whole."""
    if (root / "repo").exists():
        ids = list(decode_repo((root / "repo").read_bytes()).snapshots)
    else:
        ids = [object_id_from_text(found.id) for found in list(repository(root).ancestry(branch="main"))[:-1]]
    for id in ids:
        snapshot = decode_snapshot((root / snapshot_key(id)).read_bytes(), expected_id=id)
        decode_transaction_log((root / transaction_key(id)).read_bytes(), expected_id=id)
        for manifest in snapshot.manifest_files:
            decode_manifest((root / manifest_key(manifest)).read_bytes(), expected_id=manifest)


def check(root: Path, acknowledged: list[Any]) -> None:
    try:
        repo = repository(root)
    except (RepositoryNotFoundError, FormatError):
        # Its creation was not acknowledged.
        assert not acknowledged
        return
    wanted = max((number for number in acknowledged if isinstance(number, int)), default=-1) + 1
    assert commits(repo)[:wanted] == [str(number) for number in range(wanted)]
    assert len(commits(repo)) <= wanted + 1
    count = check_contents(repo)
    commit(repo, count)
    # A client of its own, which knows nothing.
    again = repository(root)
    assert check_contents(again, first=count) == count + 1
    again.checkpoint()
    check_files(root)


def check_each(trace: Trace, points: Iterable[int], loss: Loss, folder: Path) -> None:
    """Check what is there if the power fails at any of these points; the same contents in a row are checked once."""
    before: tuple[dict[Path, bytes], list[Any]] | None = None
    for end in points:
        image = folder / f"image {end}"
        trace.image(end, image, loss, random.Random(f"{loss} {end}"))
        contents = {path.relative_to(image): path.read_bytes() for path in image.rglob("*") if path.is_file()}
        now = contents, trace.acknowledged(end)
        if now != before:
            check(image, now[1])
        before = now
        shutil.rmtree(image)


def record(root: Path, life: Callable[[Recorder], None], promises: Promises) -> Trace:
    recorder = Recorder(root)
    with recorder.recording():
        life(recorder)
    return Trace(recorder.events, promises)


@pytest.mark.parametrize("promises", [BTRFS, EXT4], ids=["btrfs", "ext4"])
def test_a_second_failure_may_follow_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, promises: Promises
) -> None:
    monkeypatch.setattr(folders, "promises_of", lambda device: promises)
    live = tmp_path / "live"

    def life(recorder: Recorder) -> None:
        repo = repository(live, create=True)
        recorder.acknowledge("created")
        for number in range(3):
            commit(repo, number)
            recorder.acknowledge(number)

    first = record(live, life, promises)
    chance = random.Random(1)
    for turn in range(10):
        before, after = tmp_path / f"before {turn}", tmp_path / f"after {turn}"
        first.image(len(first.events), before, Loss.ANY, chance)
        # Of the last commit, which was acknowledged, and of all before it.
        number = len(commits(repository(before)))
        repo = repository(before)
        second = record(before, lambda recorder: commit(repo, 3), promises)  # noqa: B023
        assert number == 3
        second.image(len(second.events), after, Loss.ANY, chance)
        check(after, [*first.acknowledged(len(first.events)), 3])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_journal_alone_loses_commits_whose_bytes_were_not_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Name
) -> None:
    monkeypatch.setattr(folders, "promises_of", lambda device: EXT4)
    monkeypatch.setattr(local, "hand_over", lambda descriptor: None)
    live = tmp_path / "live"

    def life(recorder: Recorder) -> None:
        repo = repository(live, create=True, layout=layout)
        commit(repo, 0)
        recorder.acknowledge(0)

    trace = record(live, life, EXT4)
    trace.image(len(trace.events), tmp_path / "image", Loss.BYTES, random.Random(0))
    with pytest.raises((AssertionError, icechunk.IcechunkError)):
        check(tmp_path / "image", [0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_journal_alone_loses_chunks_that_were_not_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Name
) -> None:
    monkeypatch.setattr(folders, "promises_of", lambda device: EXT4)
    monkeypatch.setattr(local, "hand_over_together", lambda paths: None)
    live = tmp_path / "live"

    def life(recorder: Recorder) -> None:
        repo = repository(live, create=True, layout=layout)
        for number in (0, 1):
            commit(repo, number)
            recorder.acknowledge(number)

    trace = record(live, life, EXT4)
    trace.image(len(trace.events), tmp_path / "image", Loss.BYTES, random.Random(0))
    with pytest.raises((AssertionError, icechunk.IcechunkError, ValueError)):
        check(tmp_path / "image", [0, 1])


def test_a_collection_reads_torn_files_from_the_log_and_leaves_whole_ones(tmp_path: Path) -> None:
    root = tmp_path / "r"
    repo = repository(root, create=True)
    for number in range(4):
        commit(repo, number)
    for folder in ("snapshots", "manifests", "transactions"):
        for path in (root / folder).iterdir():
            if path.name != "1CECHNKREP0F1RSTCMT0":
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    again = repository(root)
    again.garbage_collect(datetime.now(UTC))
    check_files(root)
    assert check_contents(repository(root)) == 4


def test_slots_whose_files_are_not_durable_are_not_announced_for_pruning(tmp_path: Path) -> None:
    root = tmp_path / "r"
    repo = repository(root, create=True)
    commit(repo, 0)
    repo.checkpoint()
    commit(repo, 1)
    commit(repo, 2)
    marker = decode_marker(decode_repo((root / "repo").read_bytes()).extra)
    assert marker is not None
    assert (marker.n, marker.durable, marker.durable_n) == (3, 1, 1)
    asyncio.run(_prune(root))
    floors = [path.name for path in root.glob("log/*.floor/*")]
    assert floors == [floor_key(marker.epoch, 1).rpartition("/")[2]]


def test_pruning_leaves_the_durable_copy_that_counts(tmp_path: Path) -> None:
    root = tmp_path / "r"
    repo = repository(root, create=True)
    for number in range(3):
        commit(repo, number)
    repo.checkpoint()
    asyncio.run(_prune(root))
    (floor,) = root.glob("log/*.floor/*")
    os.utime(floor, (0, 0))
    asyncio.run(_prune(root))
    commit(repo, 3)
    (root / "repo").write_bytes(b"")
    again = repository(root)
    assert [path.suffix for path in sorted(root.glob("log/*/*"))] == ["", "", ".repo"]
    assert check_contents(again) == 4


async def _prune(root: Path) -> None:
    storage = icechunk.local_filesystem_storage(str(root))
    log = await open_repository(storage)
    await prune_log(log, storage, SYSTEM)


def test_a_repo_that_is_torn_without_a_copy_is_an_error(tmp_path: Path) -> None:
    root = tmp_path / "r"
    repo = repository(root, create=True)
    commit(repo, 0)
    (root / "repo").write_bytes(b"")
    for path in root.glob("log/*/*.repo"):
        path.unlink()
    with pytest.raises(FormatError):
        repository(root)


def test_a_copy_of_a_log_that_was_taken_over_is_not_taken_for_the_log(tmp_path: Path) -> None:
    root = tmp_path / "r"
    repo = repository(root, create=True)
    commit(repo, 0)
    (copy,) = root.glob("log/*/*.repo")
    asyncio.run(seal_log(icechunk.local_filesystem_storage(str(root)), SYSTEM, copy.parent.name, 1))
    (root / "repo").write_bytes(b"")
    with pytest.raises(FormatError):
        repository(root)


@pytest.mark.parametrize("promises", [UNKNOWN, EXT4], ids=["unknown", "ext4"])
@pytest.mark.parametrize("loss", [Loss.ALL, Loss.NOTHING], ids=lambda loss: loss.value)
def test_no_copy_of_a_log_is_left_once_its_repo_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: Loss, promises: Promises
) -> None:
    monkeypatch.setattr(folders, "promises_of", lambda device: promises)
    live = tmp_path / "live"
    repo = repository(live, create=True)
    commit(repo, 0)
    (copy,) = live.glob("log/*/*.repo")
    data = copy.read_bytes()
    repo.checkpoint()
    commit(repo, 1)
    # As a process leaves it that ends before it deletes the copy that it replaced.
    copy.write_bytes(data)
    trace = record(live, lambda recorder: repo.convert("repo"), promises)
    counts = 0
    for end in range(1, len(trace.events) + 1):
        image = tmp_path / f"image {end}"
        trace.image(end, image, loss, random.Random(0))
        found = (image / "repo").read_bytes() if (image / "repo").exists() else b""
        if found and decode_marker(decode_repo(found).extra) is None:
            counts += 1
            assert not list(image.glob("log/*/*.repo"))
        shutil.rmtree(image)
    assert counts


@pytest.mark.parametrize("promises", [UNKNOWN, BTRFS, EXT4], ids=["unknown", "btrfs", "ext4"])
@pytest.mark.parametrize("loss", list(Loss), ids=lambda loss: loss.value)
@pytest.mark.parametrize("layout", ["log", "repo"])
def test_a_power_failure_at_each_point_of_a_conversion_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Name, loss: Loss, promises: Promises
) -> None:
    monkeypatch.setattr(folders, "promises_of", lambda device: promises)
    live = tmp_path / "live"

    def life(recorder: Recorder) -> None:
        repo = repository(live, create=True, layout=layout)
        for number in range(3):
            commit(repo, number)
            recorder.acknowledge(number)
        recorder.acknowledge("commits")
        repo.convert("repo" if layout == "log" else "log")
        recorder.acknowledge("converted")
        commit(repo, 3)
        recorder.acknowledge(3)

    trace = record(live, life, promises)
    first, last = (
        next(n for n, event in enumerate(trace.events, 1) if event.value == value) for value in ("commits", "converted")
    )
    check_each(trace, [*range(first, last + 1), len(trace.events)], loss, tmp_path)


@pytest.mark.parametrize("promises", [UNKNOWN, EXT4], ids=["unknown", "ext4"])
@pytest.mark.parametrize("loss", [Loss.ALL, Loss.ANY], ids=lambda loss: loss.value)
def test_a_session_that_was_persisted_is_resumed_after_a_power_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: Loss, promises: Promises
) -> None:
    monkeypatch.setattr(folders, "promises_of", lambda device: promises)
    live = tmp_path / "live"

    def life(recorder: Recorder) -> None:
        repo = repository(live, create=True)
        commit(repo, 0)
        session = repo.writable_session("main")
        group: Any = zarr.open_group(session.store, mode="a")
        for number in range(1, 4):
            group["small"][number] = number + 1
            group["large"][number * CHUNK : (number + 1) * CHUNK] = number + 1
            recorder.acknowledge((session.checkpoint(), number))
        session.commit("1")
        recorder.acknowledge("committed")

    trace = record(live, life, promises)
    first = next(n for n, event in enumerate(trace.events, 1) if event.verb == "acknowledged")
    for end in range(first, len(trace.events) + 1):
        image = tmp_path / f"image {end}"
        trace.image(end, image, loss, random.Random(end))
        *_, newest = [value for value in trace.acknowledged(end) if value != "committed"]
        repo = repository(image)
        if "committed" in trace.acknowledged(end):
            assert commits(repo) == ["0", "1"]
        if commits(repo) == ["0"]:
            repo.resume_session(newest[0]).commit("1")
        group: Any = zarr.open_group(repository(image).readonly_session("main").store, mode="r")
        assert group["small"][: newest[1] + 1].tolist() == list(range(1, newest[1] + 2))
        assert group["large"][CHUNK : (newest[1] + 1) * CHUNK : CHUNK].tolist() == list(range(2, newest[1] + 2))
        shutil.rmtree(image)


@pytest.mark.parametrize("promises", [UNKNOWN, EXT4], ids=["unknown", "ext4"])
@pytest.mark.parametrize("loss", [Loss.ALL, Loss.ANY], ids=lambda loss: loss.value)
def test_an_upgrade_is_finished_after_a_power_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: Loss, promises: Promises
) -> None:
    monkeypatch.setattr(folders, "promises_of", lambda device: promises)
    live = tmp_path / "live"

    def life(recorder: Recorder) -> None:
        repo = repository(live, create=True, layout="refs")
        for number in range(3):
            commit(repo, number)
        recorder.acknowledge("commits")
        icechunk.upgrade_icechunk_repository(repo, dry_run=False)
        recorder.acknowledge("upgraded")

    trace = record(live, life, promises)
    first = next(n for n, event in enumerate(trace.events, 1) if event.verb == "acknowledged")
    for end in range(first, len(trace.events) + 1):
        image = tmp_path / f"image {end}"
        trace.image(end, image, loss, random.Random(end))
        repo = repository(image)
        assert check_contents_of(repo) == 3
        if repo.spec_version == 1 or repo.status.availability != icechunk.RepoAvailability.online:
            assert "upgraded" not in trace.acknowledged(end)
            icechunk.upgrade_icechunk_repository(repo, dry_run=False)
        repo = repository(image)
        assert repo.spec_version == 2
        commit(repo, 3)
        assert check_contents_of(repository(image)) == 4
        shutil.rmtree(image)


@pytest.mark.parametrize("promises", [UNKNOWN, BTRFS, EXT4], ids=["unknown", "btrfs", "ext4"])
@pytest.mark.parametrize("loss", list(Loss), ids=lambda loss: loss.value)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_power_failure_at_each_point_of_a_commit_leaves_it_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Name, loss: Loss, promises: Promises
) -> None:
    monkeypatch.setattr(folders, "promises_of", lambda device: promises)
    live = tmp_path / "live"
    repo = repository(live, create=True, layout=layout)
    commit(repo, 0)
    repo.checkpoint()

    def life(recorder: Recorder) -> None:
        for number in (1, 2, 3):
            commit(repo, number)
            recorder.acknowledge(number)

    trace = record(live, life, promises)
    points = [end for end, event in enumerate(trace.events, 1) if event.verb == "acknowledged"]
    check_each(trace, range(points[0], points[2] + 1), loss, tmp_path)


@pytest.mark.parametrize("promises", [UNKNOWN, BTRFS, EXT4], ids=["unknown", "btrfs", "ext4"])
@pytest.mark.parametrize("loss", list(Loss), ids=lambda loss: loss.value)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_acknowledged_changes_outlive_a_power_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Name, loss: Loss, promises: Promises
) -> None:
    monkeypatch.setattr(folders, "promises_of", lambda device: promises)
    live = tmp_path / "live"

    def life(recorder: Recorder) -> None:
        repo = repository(live, create=True, layout=layout)
        recorder.acknowledge("created")
        for number in range(6):
            if number == 3:
                repo.checkpoint()
            if number == 4:
                repo = repository(live)
            commit(repo, number)
            recorder.acknowledge(number)

    trace = record(live, life, promises)
    chance = random.Random(f"{loss} {promises}")
    for end in [*chance.sample(range(len(trace.events)), 10), len(trace.events)]:
        # A folder for each: clients of the machine that failed are gone, those of the image before are not.
        image = tmp_path / f"image {end}"
        trace.image(end, image, loss, chance)
        check(image, trace.acknowledged(end))
        shutil.rmtree(image)
