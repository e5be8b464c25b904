"""The weighted cache."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from icechunk.transfer.cache import WeightedCache


def test_least_recently_used_leaves_first() -> None:
    cache: WeightedCache[str, int] = WeightedCache(3)
    for key in "abc":
        cache.put(key, ord(key), 1)
    cache.get("a")
    cache.put("d", 0, 1)
    assert cache.get("b") is None
    assert cache.get("a") == ord("a")


def test_values_that_weigh_next_to_nothing_are_bounded_by_their_number() -> None:
    cache = WeightedCache[int, str](10**9, 3)
    for key in range(5):
        cache.put(key, "x", 1)
    assert [key for key, _ in cache.items()] == [2, 3, 4]
    assert cache.weight == 3


def test_value_heavier_than_the_bound_is_not_kept_and_pushes_nothing_out() -> None:
    cache: WeightedCache[str, int] = WeightedCache(3)
    cache.put("a", 1, 3)
    cache.put("b", 2, 4)
    assert cache.get("a") == 1
    assert cache.get("b") is None


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), max_size=60), st.integers(0, 20))
def test_weight_is_the_sum_of_the_kept_values_and_never_passes_the_bound(
    puts: list[tuple[int, int]], bound: int
) -> None:
    cache: WeightedCache[int, int] = WeightedCache(bound)
    weights: dict[int, int] = {}
    for key, weight in puts:
        cache.put(key, weight, weight)
        weights[key] = weight
        kept = [found for i in range(10) if (found := cache.get(i)) is not None]
        assert cache.weight == sum(kept) <= bound
