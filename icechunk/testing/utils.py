"""Steps that property tests of repositories repeat."""

from __future__ import annotations

from collections.abc import Generator

from icechunk.repository import Repository
from icechunk.session import Session
from icechunk.storage import in_memory_storage
from icechunk.store import IcechunkStore
from icechunk.testing.models import GroupNode, ModelStore

__all__ = ["precommit_postcommit_readonly", "tree_to_model_and_icechunk", "update_paths_after_move"]


def tree_to_model_and_icechunk(
    tree: GroupNode, add_hypothesis_note: bool = True
) -> tuple[ModelStore, Session, Repository]:
    """Write a tree to a model and to a new repository in memory, where it is uncommitted in the session.

    Parameters
    ----------
    add_hypothesis_note
        Show the tree among the notes of a failing example.
    """
    if add_hypothesis_note:
        from hypothesis import note

        note(f"tree: {tree!r}")
    model = ModelStore()
    repo = Repository.create(in_memory_storage())
    session = repo.writable_session("main")
    tree.materialize(model)
    tree.materialize(session.store)
    return model, session, repo


def precommit_postcommit_readonly(
    session: Session, repo: Repository, *, allow_empty: bool = False
) -> Generator[tuple[str, IcechunkStore], None, None]:
    """The store of a writable session before its commit, then after its commit, and then the store of a new session.

    Yields
    ------
    tuple
        A name for the stage, and the store. The commit goes to the session's branch when the second one is taken.
    """
    branch = session.branch
    assert branch is not None, "the session must be writable"
    yield "pre-commit", session.store
    session.commit("commit", allow_empty=allow_empty)
    yield "post-commit", session.store
    yield "read-only", repo.readonly_session(branch).store


def update_paths_after_move(source: str, dest: str, arrays: set[str], groups: set[str]) -> list[set[str]]:
    """The paths of the arrays and of the groups after a node was moved, all in the same form."""

    def moved(path: str) -> str:
        return dest + path.removeprefix(source) if path == source or path.startswith(f"{source}/") else path

    return [{moved(path) for path in paths} for paths in (arrays, groups)]
