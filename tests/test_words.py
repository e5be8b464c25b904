"""The words of the house (CONTRIBUTING.md): some are in no docstring, comment, message, page or specification."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = [
    *(ROOT / "icechunk").rglob("*.py"),
    *(ROOT / "spec").rglob("*.py"),
    *(ROOT / "tools").rglob("*.py"),
    *(ROOT / "spec").rglob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / name for name in ("README.md", "SECURITY.md")),
]
AVOIDED = re.compile(r"\b(whoever|nobody|somebody|anybody|everybody|strangers?|deaf|heels|he|him|his)\b", re.IGNORECASE)
"""A client is *it*, a person is named by the part that they play: user, caller, reader, writer."""
HEADLESS = re.compile(
    r'^(?:(?:"""|# )(?:Who|What|Whoever|Whatever) (?!is normative)'
    r'|"""(?:Of|That|Those|Why|How|Which|When|After them|By which|For whom|In which)\b)'
)
"""Docstrings and comments begin with their subject."""


def prose(path: Path) -> list[tuple[int, str]]:
    """Numbered lines of a page; of a module those with comments and strings."""
    lines = path.read_text("utf-8").splitlines()
    if path.suffix != ".py":
        return list(enumerate(lines, 1))
    kept: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline):
        # Python 3.12 and later split formatted strings into tokens of their own.
        if token.type in (tokenize.COMMENT, tokenize.STRING) or tokenize.tok_name[token.type].startswith("FSTRING"):
            kept.update(range(token.start[0], token.end[0] + 1))
    return [(number, lines[number - 1]) for number in sorted(kept)]


@pytest.mark.parametrize("path", sorted(TEXTS), ids=lambda path: str(path.relative_to(ROOT)))
def test_texts_avoid_words_that_name_no_one_and_begin_with_their_subject(path: Path) -> None:
    found = [
        f"{number}: {line.strip()}"
        for number, line in prose(path)
        if AVOIDED.search(line) or HEADLESS.match(line.strip())
    ]
    assert found == []
