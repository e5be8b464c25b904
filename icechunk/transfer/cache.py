"""A cache of immutable values, bounded by weight, shared by all loops and threads of a repository."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["WeightedCache"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class WeightedCache(Generic[K, V]):
    """Least recently used values leave first once the total weight passes the bound.

    Parameters
    ----------
    max_weight
        Largest sum of weights, in the caller's unit. A value that is heavier is not kept.
    max_items
        Number of values kept, however light: each takes room that its weight does not count.
    """

    def __init__(self, max_weight: int, max_items: int | None = None) -> None:
        self._max_weight = max_weight
        self._max_items = sys.maxsize if max_items is None else max_items
        self._items: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._weight = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._items)

    @property
    def max_weight(self) -> int:
        """The bound."""
        return self._max_weight

    @property
    def weight(self) -> int:
        """Sum of the weights of the values that are kept."""
        return self._weight

    def get(self, key: K) -> V | None:
        """The value, which becomes the most recently used one; None if there is none."""
        with self._lock:
            item = self._items.get(key)
            if item is None:
                return None
            self._items.move_to_end(key)
            return item[0]

    def items(self) -> list[tuple[K, V]]:
        """The values that are kept, the least recently used first."""
        with self._lock:
            return [(key, value) for key, (value, _) in self._items.items()]

    def put(self, key: K, value: V, weight: int) -> None:
        """Keep a value, and drop the least recently used ones to make room."""
        if weight > self._max_weight:
            return
        with self._lock:
            old = self._items.pop(key, None)
            if old is not None:
                self._weight -= old[1]
            self._items[key] = (value, weight)
            self._weight += weight
            while self._weight > self._max_weight or len(self._items) > self._max_items:
                _, (_, gone) = self._items.popitem(last=False)
                self._weight -= gone
