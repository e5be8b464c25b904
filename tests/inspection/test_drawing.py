"""Drawings of history: the places of snapshots and refs, as text and as picture."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.format.ids import ObjectId, encode_id
from icechunk.format.repo.repo_info import SnapshotRecord
from icechunk.inspection.drawing import AncestryGraph, Drawing, draw_svg, draw_text, lay_out

SVG = "{http://www.w3.org/2000/svg}"


def id_of(number: int) -> ObjectId:
    return ObjectId(number.to_bytes(12))


def history(
    parents: Mapping[int, int | None], messages: Mapping[int, str] | None = None
) -> dict[ObjectId, SnapshotRecord]:
    """Snapshots by number, each newer than those with lower ones."""
    return {
        id_of(n): SnapshotRecord(
            id=id_of(n),
            parent=None if parent is None else id_of(parent),
            flushed_at_us=n,
            message=(messages or {}).get(n, f"m{n}"),
        )
        for n, parent in parents.items()
    }


def draw(
    parents: Mapping[int, int | None],
    branches: Mapping[str, int],
    tags: Mapping[str, int] | None = None,
    messages: Mapping[int, str] | None = None,
) -> Drawing:
    refs = {name: id_of(n) for name, n in branches.items()}
    names = {name: id_of(n) for name, n in (tags or {}).items()}
    tips = [*refs.values(), *names.values()]
    return lay_out(history(parents, messages), tips, branches=refs, tags=names, main=refs.get("main"))


def lines(drawing: Drawing) -> list[str]:
    """The text without ids, and without blanks at the ends."""
    text = draw_text(drawing, plain=True)
    for row in drawing.rows:
        text = text.replace(f"{row.short_id} ", "")
    return [line.rstrip() for line in text.splitlines()]


def test_one_line_of_descent_is_one_column() -> None:
    assert lines(draw({1: None, 2: 1, 3: 2}, {"main": 3}, {"v1": 2})) == ["● (main) m3", "│", "● (v1) m2", "│", "● m1"]


def test_a_branch_bends_into_the_snapshot_that_it_comes_from() -> None:
    assert lines(draw({1: None, 2: 1, 3: 1, 4: 2}, {"main": 3, "dev": 4})) == [
        "  ● (dev) m4",
        "  │",
        "● │ (main) m3",
        "│ │",
        "│ ● m2",
        "│ │",
        "●─╯ m1",
    ]


def test_several_branches_meet_in_one_snapshot_and_lines_between_are_crossed() -> None:
    parents = {1: None, 2: 1, 3: 2, 4: 2, 5: 1, 6: 2}
    assert lines(draw(parents, {"main": 3, "a": 4, "b": 5, "c": 6})) == [
        "  ●     (c) m6",
        "  │",
        "  │ ●   (b) m5",
        "  │ │",
        "  │ │ ● (a) m4",
        "  │ │ │",
        "● │ │ │ (main) m3",
        "│ │ │ │",
        "●─┴─┼─╯ m2",
        "│   │",
        "●───╯   m1",
    ]


def test_a_column_whose_line_has_ended_is_used_again() -> None:
    parents = {1: None, 2: 1, 3: 1, 4: 3, 5: 4, 6: 4}
    drawing = draw(parents, {"main": 5, "new": 6, "old": 2})
    assert drawing.lanes == 2
    assert lines(drawing) == [
        "  ● (new) m6",
        "  │",
        "● │ (main) m5",
        "│ │",
        "●─╯ m4",
        "│",
        "●   m3",
        "│",
        "│ ● (old) m2",
        "│ │",
        "●─╯ m1",
    ]


def test_a_parent_that_was_expired_ends_its_line() -> None:
    assert lines(draw({1: None, 3: 2, 4: 3}, {"main": 4, "other": 1})) == [
        "● (main) m4",
        "│",
        "● m3",
        "",
        "● (other) m1",
    ]


def test_names_are_shown_with_main_first_and_tags_last() -> None:
    drawing = draw({1: None}, {"b": 1, "main": 1, "a": 1}, {"t2": 1, "t1": 1})
    assert lines(drawing) == ["● (main, a, b, t1, t2) m1"]


def test_an_empty_history_is_drawn_as_nothing() -> None:
    assert draw_text(draw({}, {}), plain=False) == ""
    assert ElementTree.fromstring(draw_svg(draw({}, {}), plain=False)).tag == f"{SVG}svg"


def test_only_the_first_line_of_a_message_is_shown_and_a_long_one_is_cut() -> None:
    drawing = draw({1: None, 2: 1}, {"main": 2}, messages={2: "\n  title\nbody", 1: "é" * 61})
    assert [row.message for row in drawing.rows] == ["title", "é" * 57 + "..."]


def test_nothing_in_a_message_acts_on_the_terminal() -> None:
    evil = "a\x1b[2Jb\x07c\u202ed\te\x9b"
    text = str(AncestryGraph(draw({1: None}, {"main": 1}, messages={1: evil}), plain=True))
    assert text == f"● {encode_id(id_of(1))[:8]} (main) a\ufffd[2Jb\ufffdc\ufffdd\ufffde\ufffd\n"


def test_nothing_in_names_and_messages_acts_on_the_page() -> None:
    evil = "</text><script>alert(1)</script>&\"'<tspan onload='x'>"
    svg = AncestryGraph(draw({1: None}, {"main": 1, evil: 1}, {evil: 1}, {1: evil}))._repr_svg_()
    tree = ElementTree.fromstring(svg)
    assert {element.tag for element in tree.iter()} == {f"{SVG}{name}" for name in ("svg", "circle", "text", "tspan")}
    assert "".join(tree.itertext()).count(evil[:40]) == 3
    assert not [name for element in tree.iter() for name in element.attrib if name.startswith("on")]


def test_plain_drawings_have_no_colours_and_others_have() -> None:
    drawing = draw({1: None, 2: 1, 3: 1}, {"main": 2, "dev": 3}, {"t": 1})
    assert "\x1b" not in draw_text(drawing, plain=True)
    assert "\x1b[38;2;" in draw_text(drawing, plain=False)
    assert "#" not in draw_svg(drawing, plain=True)
    assert "#" in draw_svg(drawing, plain=False)


def test_the_text_of_a_graph_is_its_repr() -> None:
    graph = AncestryGraph(draw({1: None}, {"main": 1}))
    assert str(graph) == repr(graph) != ""


@settings(max_examples=60)
@given(st.data())
def test_every_history_is_drawn_with_each_snapshot_once_and_children_above_parents(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 25))
    parents: dict[int, int | None] = {
        n: data.draw(st.sampled_from([None, *range(1, n)])) if n > 1 else None for n in range(1, size + 1)
    }
    tips = data.draw(st.lists(st.integers(1, size), max_size=6))
    drawing = draw(parents, {f"b{i}": tip for i, tip in enumerate(tips)} | {"main": size})
    order = [row.message for row in drawing.rows]
    wanted = set()
    for tip in {*tips, size}:
        at: int | None = tip
        while at is not None:
            wanted.add(f"m{at}")
            at = parents[at]
    assert (len(order), set(order)) == (len(wanted), wanted)
    places = {message: row for row, message in enumerate(order)}
    for message, row in places.items():
        parent = parents[int(message[1:])]
        assert parent is None or places[f"m{parent}"] > row
    text = draw_text(drawing, plain=True).splitlines()
    assert len(text) == 2 * len(order) - 1
    assert all(line.count("●") == 1 for line in text[::2])
    tree = ElementTree.fromstring(draw_svg(drawing, plain=False))
    assert len(tree.findall(f"{SVG}circle")) == len(order)
    # Each snapshot with a parent lies on one line to it: straight ones cover the rows in between.
    bends = tree.findall(f"{SVG}path")
    assert len(bends) == sum(len(row.joining) for row in drawing.rows)
