"""The checker accepts what can be explained, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from tools.simulator.checker import Operation, Outcome, Verdict, View, check


def op(client: str, verb: str, *, at: tuple[int, int | None], outcome: Outcome = "ok", **what: Any) -> Operation:
    return Operation(client=client, verb=verb, began=at[0], ended=at[1], outcome=outcome, **what)


def commit(client: str, name: str, *, at: tuple[int, int | None], branch: str = "main", **what: Any) -> Operation:
    return op(client, "commit", ref=branch, commit=name, at=at, **what)


def read(client: str, *, at: tuple[int, int], tags: dict[str, str] | None = None, **branches: str) -> Operation:
    view = View(branches={name: tuple(commits.split()) for name, commits in branches.items()}, tags=tags or {})
    return op(client, "read", at=at, seen=view)


def right(*history: Operation, **how: Any) -> bool:
    verdict: Verdict = check(history, **how)
    assert not verdict.undecided
    return not verdict.problems


GOOD = {
    "nothing happens": [read("r", at=(1, 2), main="root")],
    "one after the other": [
        commit("a", "1", at=(1, 2), parent="root"),
        commit("b", "2", at=(3, 4), parent="1"),
        read("r", at=(5, 6), main="root 1 2"),
    ],
    "at the same time, in either order": [
        commit("a", "1", at=(1, 5)),
        commit("b", "2", at=(2, 4)),
        read("r", at=(6, 7), main="root 1 2"),
    ],
    "a reader before, during and after": [
        read("r", at=(1, 2), main="root"),
        commit("a", "1", at=(3, 10)),
        read("r", at=(4, 5), main="root"),
        read("r", at=(6, 7), main="root 1"),
        read("s", at=(11, 12), main="root 1"),
    ],
    "unknown, and it happened": [
        commit("a", "1", at=(1, 2), outcome="unknown"),
        read("r", at=(3, 4), main="root"),
        read("r", at=(5, 6), main="root 1"),
    ],
    "unknown, and it never happened": [
        commit("a", "1", at=(1, 2), outcome="unknown"),
        commit("b", "2", at=(3, 4), parent="root"),
        read("r", at=(5, 6), main="root 2"),
    ],
    "no answer yet counts as unknown": [
        commit("a", "1", at=(1, None), outcome="open"),
        read("r", at=(5, 6), main="root 1"),
    ],
    "a refusal that was right": [
        commit("a", "1", at=(1, 4), parent="root"),
        commit("b", "2", at=(2, 3), parent="root", outcome="refused"),
        read("r", at=(5, 6), main="root 1"),
    ],
    "branches and tags": [
        commit("a", "1", at=(1, 2)),
        op("a", "create-branch", ref="b", commit="1", at=(3, 4)),
        op("a", "create-tag", ref="t", commit="root", at=(5, 6)),
        commit("a", "2", at=(7, 8), branch="b", parent="1"),
        read("r", at=(9, 10), tags={"t": "root"}, main="root 1", b="root 1 2"),
        op("a", "reset-branch", ref="main", commit="2", parent="1", at=(11, 12)),
        op("a", "delete-branch", ref="b", at=(13, 14)),
        op("a", "delete-tag", ref="t", at=(15, 16)),
        op("a", "create-tag", ref="t", commit="2", at=(17, 18), outcome="refused"),
        read("r", at=(19, 20), main="root 1 2"),
    ],
    "an amended commit": [
        commit("a", "1", at=(1, 2)),
        commit("a", "2", at=(3, 4)),
        op("a", "amend", ref="main", commit="3", parent="2", at=(5, 6)),
        read("r", at=(7, 8), main="root 1 3"),
    ],
}

BAD = {
    "an acknowledged commit is lost": [
        commit("a", "1", at=(1, 2)),
        commit("b", "2", at=(3, 4)),
        read("r", at=(5, 6), main="root 2"),
    ],
    "an acknowledged commit is seen, and then lost": [
        commit("a", "1", at=(1, 2)),
        read("r", at=(3, 4), main="root 1"),
        read("r", at=(5, 6), main="root"),
    ],
    "a failed commit is in history": [
        commit("a", "1", at=(1, 2), outcome="failed"),
        read("r", at=(3, 4), main="root 1"),
    ],
    "a refused commit is in history": [
        commit("a", "1", at=(1, 2), outcome="refused"),
        read("r", at=(3, 4), main="root 1"),
    ],
    "a commit that no client made": [read("r", at=(3, 4), main="root 7")],
    "a commit is in history twice": [commit("a", "1", at=(1, 2)), read("r", at=(3, 4), main="root 1 1")],
    "real time: a reader misses what was acknowledged before it looked": [
        commit("a", "1", at=(1, 2)),
        read("r", at=(3, 4), main="root"),
        read("r", at=(5, 6), main="root 1"),
    ],
    "a reader goes back": [
        commit("a", "1", at=(1, 10)),
        read("r", at=(2, 3), main="root 1"),
        read("r", at=(4, 5), main="root"),
    ],
    "two readers disagree about the order": [
        commit("a", "1", at=(1, 10)),
        commit("b", "2", at=(1, 10)),
        read("r", at=(11, 12), main="root 1 2"),
        read("s", at=(11, 12), main="root 2 1"),
    ],
    "two commits on one parent": [
        commit("a", "1", at=(1, 5), parent="root"),
        commit("b", "2", at=(2, 4), parent="root"),
        read("r", at=(6, 7), main="root 1 2"),
    ],
    "a conflict where there was none": [
        commit("a", "1", at=(1, 2), parent="root"),
        commit("b", "2", at=(3, 4), parent="1", outcome="refused"),
        read("r", at=(5, 6), main="root 1"),
    ],
    "a reader sees one branch before and the other after": [
        op("a", "create-branch", ref="b", commit="root", at=(1, 2)),
        commit("a", "1", at=(3, 4)),
        commit("a", "2", at=(5, 6), branch="b"),
        read("r", at=(3, 7), main="root", b="root 2"),
    ],
    "an unknown outcome that acts, after it was settled as failed": [
        op("a", "create-branch", ref="precious", commit="root", at=(1, 2)),
        op("a", "delete-branch", ref="precious", at=(3, 4), outcome="failed"),
        commit("a", "1", at=(5, 6)),
        read("r", at=(7, 8), main="root 1"),
    ],
    "a tag whose name was used before": [
        op("a", "create-tag", ref="t", commit="root", at=(1, 2)),
        op("a", "delete-tag", ref="t", at=(3, 4)),
        op("b", "create-tag", ref="t", commit="root", at=(5, 6)),
    ],
    "an amended commit stays": [
        commit("a", "1", at=(1, 2)),
        commit("a", "2", at=(3, 4)),
        op("a", "amend", ref="main", commit="3", parent="2", at=(5, 6)),
        read("r", at=(7, 8), main="root 1 2 3"),
    ],
}


@pytest.mark.parametrize("history", GOOD.values(), ids=GOOD)
def test_a_history_that_can_be_explained_is_accepted(history: list[Operation]) -> None:
    assert right(*history)


@pytest.mark.parametrize("history", BAD.values(), ids=BAD)
def test_a_history_that_cannot_be_explained_is_refused(history: list[Operation]) -> None:
    assert not right(*history)


def test_a_reader_of_independent_refs_may_see_them_at_different_moments() -> None:
    torn = BAD["a reader sees one branch before and the other after"]
    assert right(*torn, independent=True)


@pytest.mark.parametrize(
    "name",
    [
        "an acknowledged commit is lost",
        "a reader goes back",
        "two commits on one parent",
        "a failed commit is in history",
    ],
)
def test_a_bad_history_is_refused_also_if_refs_are_independent(name: str) -> None:
    assert not right(*BAD[name], independent=True)


def test_a_creation_that_a_deletion_overlaps_may_take_effect_twice_if_refs_are_independent() -> None:
    created = op("a", "create-branch", ref="b", commit="root", at=(1, 8))
    deleted = op("b", "delete-branch", ref="b", at=(4, 5))
    seen, gone = read("r", at=(2, 3), main="root", b="root"), read("r", at=(6, 7), main="root")
    again = read("r", at=(9, 10), main="root", b="root")
    assert right(created, seen, deleted, gone, again, independent=True)
    assert not right(created, seen, deleted, gone, again)
    later = read("r", at=(11, 12), main="root")
    assert not right(created, seen, deleted, gone, again, later, independent=True)
    # Acknowledged before the deletion began, it has taken effect for the last time.
    created = op("a", "create-branch", ref="b", commit="root", at=(1, 2))
    assert not right(created, read("r", at=(3, 3), main="root", b="root"), deleted, again, independent=True)


def test_expired_commits_may_be_missing_from_an_observation_but_others_may_not() -> None:
    made = [commit("a", "1", at=(1, 2)), commit("a", "2", at=(3, 4)), commit("a", "3", at=(5, 6))]
    gap = read("r", at=(7, 8), main="root 2 3")
    assert right(*made, gap, shortened=True)
    assert not right(*made, gap)
    assert not right(*made, read("r", at=(7, 8), main="root 1 2"), shortened=True)
    assert not right(*made, read("r", at=(7, 8), main="root 2 1 3"), shortened=True)


def test_a_history_may_begin_with_a_repository_that_is_not_empty() -> None:
    start = View(branches={"main": ("root", "x", "y"), "b": ("root", "x")}, tags={"t": "y"})
    history = [
        commit("a", "1", at=(1, 2), branch="b", parent="x"),
        op("a", "amend", ref="main", commit="z", parent="y", at=(3, 4)),
        read("r", at=(5, 6), tags={"t": "y"}, main="root x z", b="root x 1"),
    ]
    assert right(*history, start=start)
    assert right(*history, start=start, independent=True)
    assert not right(*history)


def test_contents_are_those_of_the_commit_over_those_of_its_parent() -> None:
    made = [
        commit("a", "1", at=(1, 2), writes={"x": "1", "y": "1"}),
        commit("a", "2", at=(3, 4), writes={"y": "2"}),
        read("r", at=(5, 6), main="root 1 2"),
    ]
    assert right(*made, op("r", "read-content", commit="2", content={"x": "1", "y": "2", "z": ""}, at=(7, 8)))
    assert right(*made, op("r", "read-content", commit="1", content={"x": "1", "y": "1"}, at=(7, 8)))
    assert not right(*made, op("r", "read-content", commit="2", content={"x": "1", "y": "1"}, at=(7, 8)))
    assert not right(*made, op("r", "read-content", commit="2", content={"x": "", "y": "2"}, at=(7, 8)))
    assert not right(*made, op("r", "read-content", commit="1", content={"z": "3"}, at=(7, 8)))


@pytest.mark.parametrize("independent", [False, True])
def test_many_commits_at_one_time_are_put_in_order_by_what_readers_saw(independent: bool) -> None:
    order = [3, 7, 1, 9, 5, 0, 8, 2, 6, 4]
    commits = [commit(f"w{n}", f"c{n}", at=(1 + n, 100 + n)) for n in range(10)]
    history = [*commits, read("r", at=(200, 201), main=" ".join(["root", *(f"c{n}" for n in order)]))]
    assert right(*history, independent=independent)
    # One more began when the others had ended, and readers see it between them.
    late = commit("w", "late", at=(150, 151))
    wrong = read(
        "r",
        at=(200, 201),
        main=" ".join(["root", *(f"c{n}" for n in order[:5]), "late", *map("c{}".format, order[5:])]),
    )
    assert not right(*commits, late, wrong, independent=independent)
    # Two readers that saw different parents of a commit cannot both be right.
    other = read("s", at=(202, 203), main=" ".join(["root", *(f"c{n}" for n in reversed(order))]))
    assert not right(*history, other, independent=independent)


@pytest.mark.thorough
def test_a_history_with_no_end_of_possible_orders_is_given_up_not_accepted_as_right_or_wrong() -> None:
    many = [commit("a", f"{i}", at=(i, None), outcome="unknown") for i in range(40)]
    verdict = check(
        [*many, read("r", at=(100, 101), main=" ".join(["root", *(f"{i}" for i in range(0, 40, 2)), "39"]))]
    )
    assert verdict.undecided or not verdict.problems


def test_an_amended_commit_has_the_contents_of_the_replaced_one() -> None:
    made = [
        commit("a", "1", at=(1, 2), parent="root", writes={"x": "1", "y": "1"}),
        op("a", "amend", ref="main", commit="2", parent="1", at=(3, 4), writes={"y": "2"}),
        read("r", at=(5, 6), main="root 2"),
    ]
    assert right(*made, op("r", "read-content", commit="2", content={"x": "1", "y": "2"}, at=(7, 8)))
    assert not right(*made, op("r", "read-content", commit="2", content={"x": "", "y": "2"}, at=(7, 8)))


@pytest.mark.timeout(20)
def test_no_order_makes_a_commit_its_own_ancestor() -> None:
    """An attempt whose fate was unknown had landed before the history began: it cannot land once more."""
    start = View(branches={"main": ("root", "1")}, tags={})
    late = commit("a", "1", at=(1, None), outcome="open")
    assert right(late, read("r", at=(2, 3), main="root 1"), start=start)
    assert not right(late, read("r", at=(2, 3), main="root 1 1"), start=start)
