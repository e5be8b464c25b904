"""Results of two sessions at once: run with our package and with the official one, the answers are compared.

``python -m tools.interop.conflicts DIRECTORY`` prints for each pair of changes and each solver, the conflicts, or the
nodes and values after both are committed, as JSON.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.core.sync import sync

import icechunk

Change = Callable[[Any], object]


def write(path: str, *chunks: int, value: int = 7) -> Change:
    def change(session: Any) -> None:
        array = zarr.open_array(session.store, path=path, mode="r+")
        for chunk in chunks:
            array[chunk] = value

    return change


def attribute(path: str, value: int) -> Change:
    return lambda session: zarr.open(session.store, path=path, mode="r+", zarr_format=3).attrs.update({"k": value})


def resize(path: str, length: int) -> Change:
    return lambda session: zarr.open_array(session.store, path=path, mode="r+").resize((length,))


def delete(path: str) -> Change:
    return lambda session: sync(session.store.delete_dir(path))


def drop(path: str, chunk: int) -> Change:
    return lambda session: sync(session.store.delete(f"{path}/c/{chunk}"))


def group(path: str) -> Change:
    return lambda session: zarr.create_group(session.store, path=path)


def array(path: str) -> Change:
    return lambda session: zarr.create_array(
        session.store, name=path, shape=(4,), chunks=(1,), dtype="i4", fill_value=0
    )


def both(*changes: Change) -> Change:
    return lambda session: [change(session) for change in changes]


def nothing(session: Any) -> None:
    pass


class Move:
    """A change for a session of its own."""

    def __init__(self, source: str, target: str) -> None:
        self._ends = source, target

    def __call__(self, session: Any) -> None:
        session.move(*self._ends)


again = both(delete("a"), array("a"))

CASES: dict[str, tuple[Change, Change]] = {
    "new group, new group": (group("n"), group("n")),
    "new array, new array": (array("n"), array("n")),
    "new group, new array": (group("n"), array("n")),
    "new nodes elsewhere": (group("n"), group("m")),
    "new array, new node in it": (array("n"), array("n/y")),
    "new node below an array made anew": (both(delete("h"), array("h")), array("h/y")),
    "new node in a deleted group": (delete("h"), array("h/y")),
    "metadata, metadata": (attribute("a", 1), attribute("a", 2)),
    "metadata, metadata of a group": (attribute("g", 1), attribute("g", 2)),
    "metadata elsewhere": (attribute("a", 1), attribute("b", 1)),
    "deleted array, metadata": (delete("a"), attribute("a", 1)),
    "deleted group, metadata": (delete("h"), attribute("h", 1)),
    "metadata, deleted array": (attribute("a", 1), delete("a")),
    "metadata, deleted group": (attribute("h", 1), delete("h")),
    "metadata, deleted group around it": (attribute("g/x", 1), delete("g")),
    "chunk, same chunk": (write("a", 0, value=1), write("a", 0, value=2)),
    "chunk, other chunk": (write("a", 0), write("a", 1)),
    "chunks, some the same": (write("a", 0, 1, value=1), write("a", 1, 2, value=2)),
    "metadata, chunk": (attribute("a", 1), write("a", 0)),
    "resized, chunk": (resize("a", 3), write("a", 8)),
    "chunk, metadata": (write("a", 0), attribute("a", 1)),
    "chunk, resized": (write("a", 8), resize("a", 3)),
    "deleted array, chunk": (delete("a"), write("a", 0)),
    "deleted group, chunk in it": (delete("g"), write("g/x", 0)),
    "chunk, deleted array": (write("a", 0), delete("a")),
    "chunk, deleted group around it": (write("g/x", 0), delete("g")),
    "deleted array, deleted array": (delete("a"), delete("a")),
    "deleted group, deleted group": (delete("g"), delete("g")),
    "deleted group, deleted array in it": (delete("g"), delete("g/x")),
    "deleted array, deleted group around it": (delete("g/x"), delete("g")),
    "new node, deleted group around it": (array("h/n"), delete("h")),
    "deleted chunk, chunk": (drop("a", 0), write("a", 0)),
    "chunk, deleted chunk": (write("a", 0), drop("a", 0)),
    "deleted chunk, deleted chunk": (drop("a", 0), drop("a", 0)),
    "made anew, chunk": (again, write("a", 0)),
    "made anew, metadata": (again, attribute("a", 1)),
    "chunk, made anew": (write("a", 0), again),
    "deleted array, made anew": (delete("a"), again),
    "made anew, deleted array": (again, delete("a")),
    "made anew, made anew": (both(again, attribute("a", 9)), again),
    "written and deleted, deleted array": (delete("a"), both(write("a", 0), delete("a"))),
    "new group, created and deleted": (group("n"), both(group("n"), delete("n"))),
    "move, chunk elsewhere": (Move("/a", "/c"), write("b", 0)),
    "move, nothing": (Move("/a", "/c"), nothing),
    "chunk, move": (write("a", 0), Move("/a", "/c")),
    "deleted array, move": (delete("a"), Move("/a", "/c")),
    "new node, group around it moved": (array("g/y"), Move("/g", "/k")),
    "several": (both(attribute("a", 1), write("b", 0)), both(attribute("a", 3), write("a", 0), write("b", 0, value=9))),
}


def solvers() -> dict[str, Any]:
    """Fresh ones: the classes are those of the package that runs."""
    choose = icechunk.VersionSelection
    return {
        "detect": icechunk.ConflictDetector(),
        "ours": icechunk.BasicConflictSolver(),
        "theirs": icechunk.BasicConflictSolver(on_chunk_conflict=choose.UseTheirs),
        "fail": icechunk.BasicConflictSolver(on_chunk_conflict=choose.Fail),
        "keep": icechunk.BasicConflictSolver(
            fail_on_delete_of_updated_array=True, fail_on_delete_of_updated_group=True
        ),
    }


def prepare(directory: Path) -> None:
    """A repository with arrays of ten chunks, of which five are written, and groups."""
    repo = icechunk.Repository.create(icechunk.local_filesystem_storage(str(directory)))
    session = repo.writable_session("main")
    for path in ("", "g", "g/sub", "h"):
        zarr.create_group(session.store, path=path)
    for path in ("a", "b", "g/x"):
        made = zarr.create_array(session.store, name=path, shape=(10,), chunks=(1,), dtype="i4", fill_value=-1)
        made[:5] = np.arange(5)
    session.commit("base")


def outcome(repo: Any, branch: str, theirs: Change, ours: Change, solver: Any) -> Any:
    """The conflicts, or what the branch holds in the end."""

    def session(change: Change) -> Any:
        return (repo.rearrange_session if isinstance(change, Move) else repo.writable_session)(branch)

    winner, late = session(theirs), session(ours)
    theirs(winner)
    ours(late)
    winner.commit("theirs", allow_empty=True)
    try:
        late.rebase(solver)
        late.commit("ours", allow_empty=True)
    except icechunk.RebaseFailedError as failed:
        return [[repr(c.conflict_type), c.path, c.conflicted_chunks] for c in failed.conflicts]
    except icechunk.IcechunkError as error:
        return type(error).__name__
    root = zarr.open_group(repo.readonly_session(branch).store, mode="r")
    return {
        path: [np.asarray(node[:]).tolist() if isinstance(node, zarr.Array) else None, dict(node.attrs)]
        for path, node in sorted(root.members(max_depth=None))
    }


def answers(directory: str) -> dict[str, dict[str, Any]]:
    """Outcomes by case and solver, in a repository made here, each on a branch of its own."""
    prepare(Path(directory))
    repo = icechunk.Repository.open(icechunk.local_filesystem_storage(directory))
    base = repo.lookup_branch("main")
    found: dict[str, dict[str, Any]] = {}
    for i, (name, (theirs, ours)) in enumerate(CASES.items()):
        found[name] = {}
        for solver_name, solver in solvers().items():
            branch = f"case-{i}-{solver_name}"
            repo.create_branch(branch, base)
            found[name][solver_name] = outcome(repo, branch, theirs, ours, solver)
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(answers(sys.argv[1])))
