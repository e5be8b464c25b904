"""Proposals that keep what they are told."""

from __future__ import annotations

from collections.abc import Sequence

from icechunk.log.repository.events import Event
from icechunk.log.repository.port import Proposal, Propose, SwapToken
from icechunk.log.repository.state import RepoState

__all__ = ["Told"]


class Told(list[SwapToken | None]):
    """The tokens that a caller received."""

    def of(self, propose: Propose) -> Proposal:
        """A proposal of these events that is told here."""
        return _ToldProposal(propose, self)

    @property
    def is_open(self) -> bool:
        """Whether an attempt may still land."""
        return bool(self) and self[-1] is not None


class _ToldProposal(Proposal):
    def __init__(self, propose: Propose, told: Told) -> None:
        self._propose = propose
        self._told = told

    def events(self, state: RepoState) -> Sequence[Event]:
        return self._propose(state)

    def sent(self, token: SwapToken | None) -> None:
        self._told.append(token)
