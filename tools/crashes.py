"""Crash a real file system while slots are written to it, and see that every slot that is there is whole.

    sudo python -m tools.crashes --on ext4 --crashes 60
    sudo python -m tools.crashes --on xfs --crashes 60
    sudo python -m tools.crashes --on ext4 --crashes 6 --without-handing-over

Makes the file system in a file, and mounts it. A process writes chunks and slots as `LocalStorage` does where a
journal keeps the order (``spec/repository-log-safety.md``, "One sync a commit"). At a random moment it is shut down
without writing its log, is mounted again, and read. The last line is a summary; the command ends with 1 where a slot is
torn, lacks its chunk, leaves a gap, or was acknowledged and is gone. Needs Linux, root, ``losetup`` and ``mkfs``.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Final

from icechunk.storage.local.files import temporary_name, write_new
from icechunk.storage.local.syncs import fsync_folder, hand_over

__all__ = ["main"]

_SHUTDOWN: Final = 0x8004587D
_WITHOUT_LOG: Final = 2
_MAKE: Final = {"ext4": ("mkfs.ext4", "-q", "-F"), "xfs": ("mkfs.xfs", "-q", "-f")}
_SIZES: Final = (40, 3_000, 60_000, 300_000, 3_000_000)
_CHUNK_EVERY: Final = 3


def main() -> int:
    """Crash as often as the command line says and print what was found."""
    parser = argparse.ArgumentParser(prog="python -m tools.crashes", description=__doc__.split("\n\n")[0])
    parser.add_argument("--on", choices=sorted(_MAKE), required=True)
    parser.add_argument("--crashes", type=int, default=60)
    parser.add_argument("--without-handing-over", action="store_true", help="which leaves torn objects")
    args = parser.parse_args()
    slots = bad = gaps = lost = 0
    with tempfile.TemporaryDirectory() as folder:
        image, mounted = Path(folder) / "image", Path(folder) / "mounted"
        mounted.mkdir()
        _run("truncate", "-s", "1G", str(image))
        _run(*_MAKE[args.on], str(image))
        device = subprocess.check_output(["losetup", "-f", "--show", str(image)], text=True).strip()
        try:
            for turn in range(args.crashes):
                root = mounted / str(turn)
                _run("mount", device, str(mounted))
                try:
                    acknowledged = _crash(root, long=turn % 4 == 3, handing_over=not args.without_handing_over)
                finally:
                    _run("umount", str(mounted))
                _run("mount", device, str(mounted))
                try:
                    found = sorted(int(path.name) for path in root.glob("log/*"))
                    paths = [(root / "log" / str(n), n) for n in found]
                    paths += [(root / "chunks" / str(n), n) for n in found if n % _CHUNK_EVERY == 0]
                    slots += len(found)
                    bad += sum(
                        not path.exists() or path.read_bytes() != _body(path.parent.name, n) for path, n in paths
                    )
                    gaps += found != list(range(len(found)))
                    lost += len(found) < acknowledged
                    _run("rm", "-r", str(root))
                finally:
                    _run("umount", str(mounted))
        finally:
            _run("losetup", "-d", device)
    print(
        f"{args.on}: {args.crashes} crashes, {slots} slots; {bad} torn or missing objects, {gaps} logs with gaps, "
        f"{lost} without acknowledged slots"
    )
    return int(bool(bad or gaps or lost))


def _crash(root: Path, *, long: bool, handing_over: bool) -> int:
    """Write below the root of a file system until that is shut down; returns how many slots were acknowledged."""
    for name in ("unfinished", "log", "chunks"):
        (root / name).mkdir(parents=True)
    descriptor = os.open(root, os.O_RDONLY)
    try:
        os.sync()
        acknowledged: Synchronized[int] = multiprocessing.Value("i", 0)
        often = random.choice([1.0, 0.1, 0.0])
        writer = multiprocessing.Process(target=_write, args=(root, acknowledged, often, handing_over))
        writer.start()
        # After five seconds a journal commits by itself.
        time.sleep(random.uniform(5.0, 7.0) if long else random.uniform(0.05, 1.2))
        fcntl.ioctl(descriptor, _SHUTDOWN, ctypes.c_uint32(_WITHOUT_LOG))
        count = acknowledged.value
        writer.join()
        return count
    finally:
        os.close(descriptor)


def _write(root: Path, acknowledged: Synchronized[int], often: float, handing_over: bool) -> None:
    number = 0
    try:
        while True:
            for folder in ("chunks", "log") if number % _CHUNK_EVERY == 0 else ("log",):
                unfinished = str(root / "unfinished" / temporary_name())
                write_new(unfinished, _body(folder, number), finish=hand_over if handing_over else None)
                os.link(unfinished, root / folder / str(number))
                os.unlink(unfinished)
            number += 1
            if random.random() < often:
                fsync_folder(str(root / "log"))
                acknowledged.value = number
    except OSError:
        os._exit(0)


def _body(folder: str, number: int) -> bytes:
    seed = hashlib.sha256(f"{folder} {number}".encode()).digest()
    return seed * (random.Random(seed).choice(_SIZES) // len(seed) + 1)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
