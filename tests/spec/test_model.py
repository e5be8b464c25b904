"""``spec/model``: every promise holds under all rules, and every rule is needed for one of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from spec.model.__main__ import main, markdown, rule_rows
from spec.model.explore import Label, Result, Space, explore, text
from spec.model.rules import RULES, Verdict, judge
from spec.model.scenarios import LARGE, LIMITS, QUICK, SMALL, AnyScenario, space_of
from tests.spec.pages import page

pytestmark = pytest.mark.thorough


class Heard:
    """A space that remembers the labels of its steps."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self.initial, self.broken, self.stuck = space.initial, space.broken, space.stuck
        self.labels: set[str] = set()

    def successors(self, state: Any) -> Iterator[tuple[bool, Label, Any]]:
        for own, label, after in self._space.successors(state):
            self.labels.add(text(label))
            yield own, label, after


def everything(scenario: AnyScenario) -> Result:
    result = explore(space_of(scenario))
    assert result.broken == "", "\n".join(result.history)
    return result


@pytest.mark.parametrize("name", SMALL)
def test_every_promise_holds_in_the_small_world_of_a_rule(name: str) -> None:
    assert everything(SMALL[name]).complete


@pytest.mark.parametrize("name", QUICK)
def test_every_promise_holds_where_much_happens_at_once(name: str) -> None:
    result = everything(LARGE[name])
    assert result.complete
    assert result.states > 1_000


@pytest.mark.parametrize("name", RULES)
def test_a_rule_that_is_left_out_is_found(name: str) -> None:
    result = explore(space_of(SMALL[name], [name]))
    assert result.broken
    assert len(result.history) >= 2


def test_every_numbered_rule_is_among_them() -> None:
    assert set(SMALL) == set(RULES)
    assert {number for number, _ in RULES.values()} == set(range(1, 16))


def test_the_model_finds_a_told_attempt_that_is_sent_again() -> None:
    result = explore(space_of(SMALL["told"], ["told"]))
    assert result.broken.startswith("LATER")
    assert any("TIMED OUT" in step for step in result.history)
    assert "outcome unknown" in result.history[-2]


@pytest.mark.parametrize(
    ("world", "steps"),
    [
        (
            "told twice",
            "TIMED OUT, still travelling|DOUBLED|refused for certain|was refused: outcome unknown|cannot settle yet|"
            "taken: folds it|has seen the slot taken|fills: void|ConflictError|GETs the slot → NO ANSWER",
        ),
        (
            "settled elsewhere",
            "CRASHES|settled: committed, its snapshot is in history|its slot is taken, and its snapshot is not|"
            "by the nonce in its slot|fills: void",
        ),
        ("callers", "the first caller is cancelled|sends commit 1, commit 3|sends commit 3 "),
        ("collect and lose", "PUTs embedded files|DELETEs garbage|LATE PUT of the embedded file|has nothing to bring"),
        ("resumed", "CRASHES, and is resumed|settles change|LATE PUT of slot"),
    ],
)
def test_a_world_reaches_the_states_it_is_about(world: str, steps: str) -> None:
    heard = Heard(space_of(LARGE[world]))
    assert explore(heard).broken == ""
    assert [step for step in steps.split("|") if not any(step in label for label in heard.labels)] == []


def test_the_limit_of_the_layout_is_one() -> None:
    assert [explore(space_of(scenario)).broken.partition(":")[0] for scenario in LIMITS.values()] == ["ACKNOWLEDGED"]


def test_a_bounded_exploration_reports_that_it_is_not_complete() -> None:
    result = explore(space_of(LARGE["told twice"]), limit=500)
    assert not result.complete
    assert result.states >= 500


@pytest.mark.parametrize(
    ("found", "fresh", "verdict"),
    [
        ("a", True, Verdict.LANDED),
        ("b", True, Verdict.LOST),
        (None, True, Verdict.EMPTY),
        ("a", False, Verdict.REOPEN),
        (None, False, Verdict.REOPEN),
    ],
)
def test_a_slot_decides_the_outcome_of_an_attempt(found: str | None, fresh: bool, verdict: Verdict) -> None:
    assert judge("a", found, fresh=fresh) is verdict


def test_the_table_on_the_page_equals_the_output_of_the_command() -> None:
    assert "\n".join(markdown(rule_rows())) in page("model/README.md")


def test_a_rule_left_out_on_the_command_line_prints_its_history(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--without", "void"]) == 0
    printed = capsys.readouterr().out
    assert "its slot is empty" in printed
    assert "FAILED" in printed


def test_a_world_under_all_rules_ends_well_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--world", "chain"]) == 0
    assert "every promise holds" in capsys.readouterr().out
