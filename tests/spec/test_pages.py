"""Links, names and numbers of the pages of ``spec/`` are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from icechunk.format.envelope import HEADER_SIZE
from icechunk.format.flat.flatbuffers import MAX_TABLES
from icechunk.format.flat.flexbuffers import MAX_DEPTH
from icechunk.format.transaction import MAX_CHUNKS
from icechunk.log.repository.freshness import MAX_SKEW_US, PRUNE_WAIT_US, TRUST_US
from icechunk.log.repository.queue import MAX_MEMBERS
from icechunk.log.session.array_fold import LARGE_LAYER, MANY_LAYERS, OPEN_ROWS
from icechunk.log.session.plan.compaction import Policy
from tests.spec.pages import PAGES, ROOT, page, rows


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_inside_the_project_leads_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        place, _, anchor = target.partition("#")
        file = (path.parent / place).resolve() if place else path
        assert file.exists(), f"{path.name}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text("utf-8")), f"{path.name}: {target}"


def test_the_index_names_every_page_and_note() -> None:
    index = page("README.md")
    assert [path.name for path in PAGES if path.name != "README.md" and f"{path.name})" not in index] == []


def test_the_glossary_has_every_word_once() -> None:
    words = [row[0] for row in rows(page("README.md"), "| word")]
    assert len(words) == len(set(words)) > 40


def test_every_rule_that_code_cites_is_on_the_page() -> None:
    cited: set[str] = set()
    for path in (ROOT / "icechunk").rglob("*.py"):
        for numbers in re.findall(r"\brules? (\d+(?:(?:, | and )\d+)*)", path.read_text("utf-8")):
            cited.update(re.findall(r"\d+", numbers))
    known = set(re.findall(r"^### Rule (\d+) ", page("repository-log.md"), re.MULTILINE))
    assert known == {str(i) for i in range(1, 16)}
    assert cited <= known


@pytest.mark.parametrize(
    ("name", "phrase", "value"),
    [
        ("repository-log.md", "*G* is seven days", PRUNE_WAIT_US == 7 * 86_400_000_000),
        ("repository-log.md", "at most G/2", TRUST_US * 2 == PRUNE_WAIT_US),
        ("repository-log.md", "more than 10 minutes off", MAX_SKEW_US == 600_000_000),
        ("repository-log.md", "up to 1000 of them", MAX_MEMBERS == 1000),
        ("session-log.md", "at 16 384 rows", OPEN_ROWS == 16_384),
        ("session-log.md", "more than 1 048 576 rows together", LARGE_LAYER == 1_048_576),
        ("session-log.md", "of more than 64", MANY_LAYERS == 64),
        ("session-log.md", "at most 65 536 references", Policy().max_refs_per_manifest == 65_536),
        ("session-log.md", "8 388 608 chunks", MAX_CHUNKS == 8_388_608),
        ("session-log.md", "50 million tables", MAX_TABLES == 50_000_000),
        ("session-log.md", "fewer than 4096 references", Policy().share_below_refs == 4096),
        ("session-log.md", "With *f* = 8", Policy().fan_in == 8),
        ("tables.md", "| FlexBuffers | 100 levels", MAX_DEPTH == 100),
        ("objects.md", "begin with 39 bytes", HEADER_SIZE == 39),
    ],
)
def test_numbers_on_the_pages_are_those_of_the_code(name: str, phrase: str, value: bool) -> None:
    assert phrase in " ".join(page(name).split())
    assert value, phrase
