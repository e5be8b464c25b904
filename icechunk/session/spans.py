"""Sums of the commits since a snapshot, for all sessions of a repository that began there.

A session that is rebased looks at all commits since its base at once. Sessions that began together share the base; so
each of these commits is read and added up once, not once for each session.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from icechunk.format.ids import ObjectId
from icechunk.format.values import TransactionLog
from icechunk.log.session.merge.conflict_rules import Landed

__all__ = ["Spans"]

_MOST: Final = 4
"""Bases that are remembered: one for each crowd of writers."""


@dataclass(slots=True)
class _Span:
    tip: ObjectId
    """The last commit that is added up."""
    landed: Landed = field(default_factory=Landed)


class Spans:
    """Sums of commits by the snapshot that they begin at. Safe among threads."""

    def __init__(self) -> None:
        self._spans: OrderedDict[ObjectId, _Span] = OrderedDict()
        self._lock = threading.Lock()

    def tip(self, base: ObjectId) -> ObjectId | None:
        """The last commit that the sum from ``base`` has; None where there is no such sum."""
        span = self._spans.get(base)
        return None if span is None else span.tip

    def extended(
        self, base: ObjectId, begin: ObjectId | None, tip: ObjectId, transactions: Iterable[TransactionLog]
    ) -> Landed | None:
        """The sum from ``base``, with more commits added.

        Parameters
        ----------
        begin
            The last commit that the sum had when the caller asked; None: begin a new sum.
        tip, transactions
            The last of the added commits, and the transaction logs of all of them, oldest first.

        Returns
        -------
        Landed or None
            None: another caller has added commits meanwhile, perhaps others.
        """
        with self._lock:
            span = self._spans.get(base)
            if begin is None:
                span = self._spans[base] = _Span(tip)
            elif span is None or span.tip != begin:
                return None
            for log in transactions:
                span.landed.add(log)
            span.tip = tip
            self._spans.move_to_end(base)
            while len(self._spans) > _MOST:
                self._spans.popitem(last=False)
            return span.landed
