"""What file systems promise about a power failure, and how bytes are handed over to a device."""

from __future__ import annotations

import ctypes
import errno
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from icechunk.storage.local import syncs
from icechunk.storage.local.syncs import Promises
from tests.promises import BTRFS, EXT4, EXT4_WITHOUT_JOURNAL, UNKNOWN

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how a file system is mounted")

MOUNTS = """\
22 1 0:21 / /proc rw - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
31 27 254:0 /a /mnt/bound ro - ext4 /dev/vda rw,discard
28 27 8:1 / /xfs rw - xfs /dev/sda1 rw,attr2,inode64,logbufs=8
29 27 8:2 / /realtime rw - xfs /dev/sda2 rw,rtdev=/dev/sdb1
30 27 0:40 / /overlay rw - overlay overlay rw,lowerdir=/a,upperdir=/b
32 27 0:41 / /btrfs rw - btrfs /dev/sdc rw,ssd
33 27 8:3 / /late rw - ext4 /dev/sda3 rw,journal_async_commit
34 27 0:42 / /unnamed rw - nfs4  rw
"""
WITHOUT_ORDER = Promises(names_follow_files=True, syncs_all=True, flushes_all=True)


def promises(monkeypatch: pytest.MonkeyPatch, device: tuple[int, int], journals: list[str], release: str) -> Promises:
    monkeypatch.setattr("builtins.open", lambda *_, **__: io.StringIO(MOUNTS))
    monkeypatch.setattr(os, "listdir", lambda path: journals)
    monkeypatch.setattr(os, "readlink", lambda path: {"254:0": "../block/vda", "8:3": "../sda/sda3"}[path[15:]])
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    return syncs.promises_of.__wrapped__(os.makedev(*device))


@pytest.mark.parametrize(
    ("device", "journals", "expected"),
    [
        pytest.param((254, 0), ["vda-8"], EXT4, id="ext4"),
        pytest.param((254, 0), [], EXT4_WITHOUT_JOURNAL, id="ext4 without a journal"),
        pytest.param((254, 0), ["sdx", "vda1-8"], EXT4_WITHOUT_JOURNAL, id="ext4 with a journal elsewhere"),
        pytest.param((8, 3), ["sda3-8"], WITHOUT_ORDER, id="ext4 with commits that do not flush first"),
        pytest.param((8, 1), [], EXT4, id="xfs"),
        pytest.param((8, 2), [], WITHOUT_ORDER, id="xfs with a realtime device"),
        pytest.param((0, 41), [], BTRFS, id="btrfs"),
        pytest.param((0, 40), [], UNKNOWN, id="overlay"),
        pytest.param((0, 42), [], UNKNOWN, id="network"),
        pytest.param((9, 9), [], UNKNOWN, id="not mounted here"),
    ],
)
def test_order_is_relied_on_where_a_journal_is_known_to_keep_it(
    monkeypatch: pytest.MonkeyPatch, device: tuple[int, int], journals: list[str], expected: Promises
) -> None:
    assert promises(monkeypatch, device, journals, "5.8.0") == expected


@pytest.mark.parametrize("release", ["4.18.0-553.el8.x86_64", "5.7.1", "unknown"])
@pytest.mark.parametrize("device", [(254, 0), (8, 1)])
def test_order_is_not_relied_on_where_the_kernel_may_leave_pages_out(
    monkeypatch: pytest.MonkeyPatch, device: tuple[int, int], release: str
) -> None:
    assert not promises(monkeypatch, device, ["vda-8"], release).orders


def answering(monkeypatch: pytest.MonkeyPatch, code: int) -> list[int]:
    """The system's `sync_file_range` fails; returns the descriptors that are synced instead."""

    def fail(descriptor: int, offset: int, size: int, flags: int) -> int:
        ctypes.set_errno(code)
        return -1

    synced: list[int] = []
    monkeypatch.setattr(syncs, "_sync_file_range", lambda: fail)
    monkeypatch.setattr(os, "fsync", synced.append)
    return synced


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.ESPIPE, errno.EOPNOTSUPP])
def test_a_system_that_cannot_hand_over_syncs(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    synced = answering(monkeypatch, code)
    syncs.hand_over(7)
    assert synced == [7]


def test_a_system_without_the_call_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    synced = answering(monkeypatch, 0)
    monkeypatch.setattr(syncs, "_sync_file_range", lambda: None)
    syncs.hand_over(7)
    assert synced == [7]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_bytes_that_the_device_did_not_take_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    synced = answering(monkeypatch, code)
    # words: a system error has no kind
    with pytest.raises(OSError, match=rf"Errno {code}\b"):
        syncs.hand_over(7)
    (tmp_path / "x").write_bytes(b"1")
    # words: a system error has no kind
    with pytest.raises(OSError, match=rf"Errno {code}\b") as caught:
        syncs.hand_over_together([str(tmp_path / "x")])
    assert caught.value.filename == str(tmp_path / "x")
    assert synced == []


def test_the_device_works_on_many_files_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []

    def note(descriptor: int, offset: int, size: int, flags: int) -> int:
        calls.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), flags))
        return 0

    monkeypatch.setattr(syncs, "_sync_file_range", lambda: note)
    names = [str(number) for number in range(70)]
    for name in names:
        (tmp_path / name).write_bytes(b"1")
    before = len(os.listdir("/proc/self/fd"))
    syncs.hand_over_together([str(tmp_path / name) for name in names])
    assert [name for name, flags in calls if flags == 7] == names
    assert [flags for _, flags in calls[:64]] == [2] * 64, "begun before any is waited for"
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_systems_own_call_works(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    syncs.hand_over_together([str(tmp_path / "x")])
    with pytest.raises(FileNotFoundError):
        syncs.hand_over_together([str(tmp_path / "y")])


def test_the_promises_of_this_machine_are_known(tmp_path: Path) -> None:
    found: Any = syncs.promises_of(os.stat(tmp_path).st_dev)
    assert found in (UNKNOWN, BTRFS, EXT4, EXT4_WITHOUT_JOURNAL, WITHOUT_ORDER)
