"""A folder that belongs to a group: every member can commit, whatever the umasks."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import icechunk
from icechunk.storage.local.storage import RESERVED

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask")

WRITE = """
import asyncio, os, sys
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.port import Matches
os.umask(0o077)
async def main():
    storage = LocalStorage(sys.argv[1])
    version = (await storage.put("repo", b"1")).version
    await storage.put("repo", b"2", Matches(version))
    await storage.put("chunks/x", bytes(2_000_000))
asyncio.run(main())
"""

COMMIT = """
import os, sys
import icechunk, zarr
root, user, group, umask = sys.argv[1], *map(int, sys.argv[2:5])
def commit(storage):
    new = not icechunk.Repository.exists(storage)
    repo = icechunk.Repository.create(storage) if new else icechunk.Repository.open(storage)
    session = repo.writable_session("main")
    name = f"a{user}"
    array = zarr.create_array(store=session.store, name=name, shape=(5000,), chunks=(5000,), dtype="f8", overwrite=True)
    array[:] = user
    session.commit(f"by {user}")
    assert (zarr.open_group(repo.readonly_session("main").store, mode="r")[name][:] == user).all()
# Modules are loaded with root's rights: the interpreter may be in a folder of root's.
commit(icechunk.local_filesystem_storage(root + ".first"))
# A child has one thread: of a process with many, some may keep root's group for a moment.
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os.setgroups([])
os.setresgid(group, group, group)
os.setresuid(user, user, user)
os.umask(umask)
commit(icechunk.local_filesystem_storage(root))
"""


def _modes(root: Path) -> dict[str, int]:
    return {
        str(path.relative_to(root)): stat.S_IMODE(path.stat().st_mode) & 0o070
        for path in root.rglob("*")
        if path.name != RESERVED or path.is_dir()
    }


@pytest.mark.parametrize(("group", "folder", "file", "lock"), [(0o070, 0o070, 0o040, 0o060), (0o050, 0, 0, 0)])
def test_new_files_have_the_rights_of_the_roots_group(
    tmp_path: Path, group: int, folder: int, file: int, lock: int
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    root.chmod(0o700 | group)
    subprocess.run([sys.executable, "-c", WRITE, str(root)], check=True, timeout=60)
    assert _modes(root) == {
        RESERVED: folder,
        f"{RESERVED}/lock": lock,
        "chunks": folder,
        "chunks/x": file,
        "repo": file,
    }


@pytest.mark.thorough
@pytest.mark.skipif(getattr(os, "getuid", int)() != 0, reason="only root can be two users")
def test_a_second_member_of_the_group_can_commit(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for parent in (tmp_path, *tmp_path.parents):
        if stat.S_IMODE(parent.stat().st_mode) & 0o005 != 0o005 and str(parent) != "/":
            parent.chmod(stat.S_IMODE(parent.stat().st_mode) | 0o055)
    os.chown(root, 4001, 4000)
    root.chmod(0o2770)
    for user in (4001, 4002, 4001):
        subprocess.run(
            [sys.executable, "-c", COMMIT, str(root), str(user), "4000", str(0o077)],
            check=True,
            timeout=120,
            env={**os.environ, "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"},
        )
    history = icechunk.Repository.open(icechunk.local_filesystem_storage(str(root))).ancestry(branch="main")
    assert [snapshot.message for snapshot in history][:-1] == ["by 4001", "by 4002", "by 4001"]
