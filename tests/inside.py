"""The engine behind public handles, for tests that look at what no public name shows.

The private names are reached here, once, so that a test which uses them survives when they change.
"""

from __future__ import annotations

from icechunk import Repository, Session
from icechunk.log.repository.port import RepositoryLog
from icechunk.session.content import SessionContent
from icechunk.session.core import Core

__all__ = ["content_of", "core_of", "log_of", "prepare_writes"]


def core_of(repository: Repository) -> Core:
    """The open repository: its log, its files, its settings."""
    return repository._core  # private: there is no public name for it


def content_of(session: Session) -> SessionContent:
    """The nodes and chunks of a session, and its log."""
    return session._content  # private: there is no public name for it


async def log_of(repository: Repository) -> RepositoryLog:
    """The log of a repository, as the running loop has it open."""
    return await core_of(repository).log()


async def prepare_writes(repository: Repository) -> None:
    """Check the store now, as a client does before its first write, so that the requests of a test are its own."""
    await (await log_of(repository)).prepare_writes()
