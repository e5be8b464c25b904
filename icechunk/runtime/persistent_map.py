"""Maps of which a changed copy costs O(log n), since it shares all else with the original.

By immutables; or, where that is not installed, by pyrsistent, which is slower and needs no compiler: immutables has no
wheels for Python 3.14 and later.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pyrsistent import PMap

__all__ = ["Map", "PyrsistentMap"]

K = TypeVar("K")
V = TypeVar("V")


class PyrsistentMap(Mapping[K, V]):
    """An immutable map; `set`, `delete` and `update` return changed copies."""

    __slots__ = ("_map",)

    def __init__(self, items: Mapping[K, V] | Iterable[tuple[K, V]] = ()) -> None:
        from pyrsistent import pmap

        self._map: PMap[K, V] = pmap(dict(items))

    @classmethod
    def _of(cls, changed: PMap[K, V]) -> PyrsistentMap[K, V]:
        made = cls.__new__(cls)
        made._map = changed
        return made

    def set(self, key: K, value: V) -> PyrsistentMap[K, V]:
        """The map with this value."""
        return self._of(self._map.set(key, value))

    def delete(self, key: K) -> PyrsistentMap[K, V]:
        """The map without this key. Raises `KeyError` if it is not there."""
        return self._of(self._map.remove(key))

    def update(self, items: Mapping[K, V]) -> PyrsistentMap[K, V]:
        """The map with all of these values."""
        return self._of(self._map.update(items))

    def __getitem__(self, key: K) -> V:
        return self._map[key]

    def get(self, key: K, default: Any = None) -> Any:
        """The value of a key, or the default."""
        return self._map.get(key, default)

    def __contains__(self, key: object) -> bool:
        return key in self._map

    def __len__(self) -> int:
        return len(self._map)

    def __iter__(self) -> Iterator[K]:
        return iter(self._map)

    def items(self) -> ItemsView[K, V]:
        """Pairs of keys and values."""
        return self._map.items()

    def values(self) -> ValuesView[V]:
        """Values."""
        return self._map.values()

    def __hash__(self) -> int:
        return hash(frozenset(self._map.items()))


if TYPE_CHECKING:
    from immutables import Map
else:
    try:
        from immutables import Map
    except ImportError:
        Map = PyrsistentMap
