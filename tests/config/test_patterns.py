"""Expressions from configurations that others wrote: the results of Python's engine, in bounded time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.config import patterns
from icechunk.config.patterns import Pattern, PatternError

expressions = st.recursive(
    st.sampled_from(
        ["a", "b", ".", r"\d", r"\w", "[ab]", "[^a]", "^", "$", r"\b", "é", "(?i:A)", "x{0,2}", r"\Aa", ""]
    ),
    lambda inner: (
        st.tuples(inner, inner).map("".join)
        | st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format)
        | st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}"])).map(lambda t: f"(?:{t[0]}){t[1]}")
    ),
    max_leaves=6,
)


@settings(max_examples=300)
@given(expressions, st.text("abAéx1_ /\n", max_size=8))
def test_the_automaton_matches_where_pythons_engine_does(expression: str, text: str) -> None:
    pattern = Pattern(expression)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns, "_MAX_STEPS", -1)
        assert pattern.search(text) == (re.search(expression, text) is not None)
    assert pattern.search(text) == (re.search(expression, text) is not None)


@pytest.mark.parametrize(
    "expression",
    ["^(a+)+$", "^(a|aa)+$", "(a*)*b", "^(a?){40}a{40}$", "a*a*a*a*a*b", "(){4000000000}", "((a{0}){60000}){60000}"],
)
def test_no_expression_takes_long(expression: str) -> None:
    began = time.process_time()
    Pattern(expression).search("a" * 500 + "c")
    assert time.process_time() - began < 5


@pytest.mark.parametrize("expression", ["(", r"(a)\1", "(?=a)b", "(?<!a)b", "(a{300}){300}", "(" * 5000])
def test_patterns_without_a_bounded_search_time_are_refused(expression: str) -> None:
    with pytest.raises(PatternError):
        Pattern(expression)


@pytest.mark.parametrize(
    ("expression", "matches", "others"),
    [
        (r"^/[[:alpha:]]+$", ["/ab"], ["/a1", "/:"]),
        (r"^/[[:digit:]_]+$", ["/1_2"], ["/a", "/["]),
        (r"^/\p{L}+$", ["/aé"], ["/a1", "/_"]),
        (r"^/\pN+$", ["/12"], ["/a"]),
        (r"^(?<year>\d{4})\z", ["2024"], ["2024\n", "20245"]),
        (r"\x{61}\u{62}", ["ab"], ["xb"]),
        (r"^[]a]+$", ["]a"], ["b"]),
        (r"^[^\]]+$", ["ab"], ["a]"]),
    ],
)
def test_expressions_of_rusts_engine_match_as_there(expression: str, matches: list[str], others: list[str]) -> None:
    pattern = Pattern(expression)
    assert all(pattern.search(text) for text in matches)
    assert not any(pattern.search(text) for text in others)


@pytest.mark.parametrize(
    "expression",
    ["[a-z&&[^b]]", "[a[b]]", "[a--b]", "[[:^alpha:]]", "[[:nope:]]", r"\p{Greek}", r"[\p{L}]", r"a\Z", r"\PL"],
)
def test_expressions_that_python_reads_differently_are_refused(expression: str) -> None:
    with pytest.raises(PatternError):
        Pattern(expression)
