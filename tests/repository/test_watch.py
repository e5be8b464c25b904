"""The feed: every event once, in order, in all layouts, with tokens that survive."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import zarr

from icechunk import Repository, RepositoryConfig, in_memory_storage, local_filesystem_storage
from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.repository.watch import EventKind, RepositoryEvent
from icechunk.testing.recording import RecordingStorage


def commit(repo: Repository, name: str, branch: str = "main") -> str:
    with repo.transaction(branch, message=name) as store:
        zarr.create_group(store, path=name)
    return repo.lookup_branch(branch)


async def events_of(repo: Repository, **options: Any) -> list[RepositoryEvent]:
    return [event async for event in repo.watch(**options, stop_at_end=True)]


def create(layout: str) -> Repository:
    config = RepositoryConfig.default()
    return Repository.create(in_memory_storage(), config, spec_version={"log": None, "repo": 2, "refs": 1}[layout])


LAYOUTS = pytest.mark.parametrize("layout", ["log", "repo", "refs"])


@LAYOUTS
async def test_commits_branches_and_tags_are_events_in_order(layout: str) -> None:
    repo = await asyncio.to_thread(create, layout)
    start = (await events_of(repo, since=""))[-1].token

    def change() -> list[str]:
        one, two = commit(repo, "one"), commit(repo, "two")
        repo.create_branch("dev", one)
        commit(repo, "three", "dev")
        repo.create_tag("v1", two)
        repo.delete_branch("dev")
        return [one, two]

    one, two = await asyncio.to_thread(change)
    events = await events_of(repo, since=start)
    commits = [e for e in events if e.kind is EventKind.COMMIT and e.branch == "main"]
    assert [e.snapshot_id for e in commits] == [one, two]
    assert [e.snapshot.message for e in commits if e.snapshot] == ["one", "two"]
    assert commits[1].previous_snapshot_id == one
    assert [e.tag for e in events if e.kind is EventKind.TAG_CREATED] == ["v1"]
    if layout != "refs":
        kinds = ["commit", "commit", "branch-created", "commit", "tag-created", "branch-deleted"]
        assert [e.kind for e in events] == kinds
    assert [e.at for e in events] == sorted(e.at for e in events) or layout == "refs"
    assert [e.snapshot_id for e in await events_of(repo, branch="main", since=start)] == [one, two]


@LAYOUTS
async def test_a_commit_tells_what_it_changed_where_that_is_asked(layout: str) -> None:
    repo = await asyncio.to_thread(create, layout)
    start = (await events_of(repo, since=""))[-1].token

    def change() -> None:
        with repo.transaction("main", message="new") as store:
            zarr.create_array(store, name="a", shape=(6,), chunks=(2,), dtype="i4")
        with repo.transaction("main", message="written") as store:
            zarr.open_array(store, path="a", mode="r+")[2:6] = 1
        session = repo.writable_session("main")
        zarr.open_array(session.store, path="a", mode="r+")[0] = 1
        if layout == "refs":  # format 1 has no amendments
            session.commit("more")
        else:
            session.amend("written in full")

    await asyncio.to_thread(change)
    events = await events_of(repo, branch="main", since=start, with_changes=True)
    found = [
        (e.snapshot.message, [(c.path, c.is_new, c.chunks.ravel().tolist()) for c in e.changes])
        for e in events
        if e.changes and e.snapshot
    ]
    assert found[0] == ("new", [("/a", True, [])])
    more = ("more", [("/a", False, [0])]) if layout == "refs" else ("written in full", [("/a", False, [0, 1, 2])])
    assert found[1:] == [("written", [("/a", False, [1, 2])]), more]
    assert all(event.changes is None for event in await events_of(repo, branch="main", since=start))


@pytest.mark.parametrize("layout", ["log", "repo"])
async def test_a_commit_with_an_expired_snapshot_does_not_tell_what_it_changed(layout: str) -> None:
    repo = await asyncio.to_thread(create, layout)
    start = (await events_of(repo, since=""))[-1].token

    def change() -> list[str]:
        made = [commit(repo, name) for name in "abc"]
        repo.expire_snapshots(datetime.now(UTC) + timedelta(days=1))
        repo.garbage_collect(datetime.now(UTC) + timedelta(days=1))
        return made

    made = await asyncio.to_thread(change)
    events = await events_of(repo, since=start, with_changes=True)
    commits = [e for e in events if e.kind is EventKind.COMMIT]
    assert [e.snapshot_id for e in commits] == made
    assert [e.snapshot_id for e in commits if e.changes is None] == made[:2]


@LAYOUTS
async def test_any_token_goes_on_behind_its_event_after_a_restart(layout: str) -> None:
    repo = await asyncio.to_thread(create, layout)
    await asyncio.to_thread(lambda: [commit(repo, name) for name in "abc"])
    events = await events_of(repo, since="", branch="main")
    commits = [e for e in events if e.kind is EventKind.COMMIT]
    again = await Repository.open_async(repo.storage)
    for i, event in enumerate(commits):
        rest = await events_of(again, since=event.token, branch="main")
        assert [e.snapshot_id for e in rest] == [e.snapshot_id for e in commits[i + 1 :]]


@LAYOUTS
@pytest.mark.parametrize("since", ["the oldest", "the creation"])
async def test_commits_of_a_branch_that_is_new_to_the_watcher_are_events(layout: str, since: str) -> None:
    repo = await asyncio.to_thread(create, layout)
    start = "" if since == "the oldest" else (await events_of(repo, since=""))[-1].token

    def change() -> list[str]:
        a, b = commit(repo, "a"), commit(repo, "b")
        repo.create_branch("dev", a)
        c, d, e = commit(repo, "c", "dev"), commit(repo, "d"), commit(repo, "e", "dev")
        repo.create_branch("on-a-tip", e)
        repo.create_branch("within", c)
        return [a, b, c, d, e]

    a, b, c, d, e = await asyncio.to_thread(change)
    events = await events_of(repo, since=start, with_changes=True)
    found = {
        name: [(str(one.kind), one.snapshot_id) for one in events if one.branch == name]
        for name in ("main", "dev", "on-a-tip", "within")
    }
    assert [one for one in found["main"] if one[0] == "commit"] == [("commit", a), ("commit", b), ("commit", d)]
    assert found["dev"] == [("branch-created", a), ("commit", c), ("commit", e)]
    assert found["on-a-tip"] == [("branch-created", e)]
    assert found["within"] == [("branch-created", c)]
    assert all((one.changes is not None) == (one.kind is EventKind.COMMIT) for one in events)
    for position, event in enumerate(events):
        rest = await events_of(repo, since=event.token)
        assert [one.snapshot_id for one in rest] == [one.snapshot_id for one in events[position + 1 :]]


@LAYOUTS
async def test_branches_and_tags_that_an_expiration_deletes_are_events(layout: str) -> None:
    repo = await asyncio.to_thread(create, layout)

    def prepare() -> str:
        first = commit(repo, "first")
        repo.create_branch("dev", first)
        repo.create_tag("v1", first)
        commit(repo, "second")
        return first

    first = await asyncio.to_thread(prepare)
    token = (await events_of(repo, since=""))[-1].token
    late = datetime.now(UTC) + timedelta(days=1)
    released = await repo.expire_snapshots_async(late, delete_expired_branches=True, delete_expired_tags=True)
    assert first in released
    events = await events_of(await Repository.open_async(repo.storage), since=token)
    found = [(str(one.kind), one.branch, one.tag, one.previous_snapshot_id) for one in events]
    deleted = [("branch-deleted", "dev", None, first), ("tag-deleted", None, "v1", first)]
    assert [one for one in found if one[0].endswith("-deleted")] == deleted
    if layout != "refs":
        assert found == [*deleted, ("expired", None, None, None)]
    assert (await repo.list_branches_async(), await repo.list_tags_async()) == ({"main"}, set())
    assert len(await events_of(repo, since=token, branch="dev")) == 1


@LAYOUTS
async def test_a_watcher_gets_events_that_happen_while_it_waits(layout: str) -> None:
    repo = await asyncio.to_thread(create, layout)
    heard: list[str | None] = []

    async def listen() -> None:
        async for event in repo.watch("main", idle_s=0.05):
            heard.append(event.snapshot_id)
            if len(heard) == 3:
                return

    listener = asyncio.create_task(listen())
    await asyncio.sleep(0)
    other = await Repository.open_async(repo.storage)
    made = [await asyncio.to_thread(commit, other, name) for name in "abcd"]
    await asyncio.wait_for(listener, 30)
    assert heard == made[-3:] or heard == made[:3]


async def test_a_poll_without_changes_costs_one_request() -> None:
    storage = RecordingStorage(in_memory_storage())
    repo = await Repository.create_async(storage)
    await events_of(repo)
    storage.requests.clear()
    await events_of(repo)
    assert [r.verb for r in storage.requests] == ["get"] * 2


@LAYOUTS
async def test_a_restarted_watcher_reads_in_proportion_to_what_is_new(layout: str) -> None:
    repo = await asyncio.to_thread(create, layout)
    await asyncio.to_thread(lambda: [commit(repo, f"g{i}") for i in range(30)])
    token = (await events_of(repo, since=""))[-1].token
    tip = await asyncio.to_thread(commit, repo, "last")
    storage = RecordingStorage(repo.storage)
    again = await Repository.open_async(storage)
    storage.requests.clear()
    events = await events_of(again, since=token)
    assert [one.snapshot_id for one in events] == [tip]
    assert len(storage.requests) < 10


async def test_configuration_status_and_maintenance_are_events() -> None:
    repo = await Repository.create_async(in_memory_storage())
    token = (await events_of(repo, since=""))[-1].token
    await repo.set_metadata_async({"a": 1})
    await repo.expire_snapshots_async(datetime.now(UTC) - timedelta(days=1))
    await repo.garbage_collect_async(datetime.now(UTC) - timedelta(days=1))
    kinds = [e.kind for e in await events_of(repo, since=token)]
    assert EventKind.METADATA in kinds
    assert set(kinds) <= {EventKind.METADATA, EventKind.EXPIRED, EventKind.COLLECTED}


@LAYOUTS
async def test_a_wrong_token_is_refused(layout: str) -> None:
    repo, other = await asyncio.to_thread(create, layout), await asyncio.to_thread(create, layout)
    await asyncio.to_thread(commit, other, "x")
    with pytest.raises(InvalidInputError) as caught:
        await events_of(repo, since="nonsense")
    assert caught.value.kind == ErrorKind.INVALID_SETTING
    token = (await events_of(other, since=""))[-1].token
    with pytest.raises(InvalidInputError) as caught:
        await events_of(repo, since=token)
    assert caught.value.kind == ErrorKind.INVALID_SETTING
    await asyncio.to_thread(commit, repo, "y")
    with pytest.raises(InvalidInputError):
        await events_of(repo, since=token)
    wrong: list[dict[str, Any]] = [
        {"idle_s": 0},
        {"idle_s": "5"},
        {"idle_s": float("nan")},
        {"since": 5},
        {"since": b"x"},
    ]
    for options in wrong:
        with pytest.raises(InvalidInputError):
            await events_of(repo, **options)


@LAYOUTS
async def test_a_reset_while_it_waits_is_an_event_that_names_both_tips(layout: str) -> None:
    repo = await asyncio.to_thread(create, layout)
    one = await asyncio.to_thread(commit, repo, "one")
    two = await asyncio.to_thread(commit, repo, "two")
    watched = repo.watch("main", idle_s=0.05)
    waiting = asyncio.ensure_future(anext(watched))
    await asyncio.sleep(0)
    other = await Repository.open_async(repo.storage)
    while not waiting.done():
        # The watcher begins at some time: then it hears of the next change.
        await other.reset_branch_async("main", one)
        await asyncio.wait([waiting], timeout=0.5)
        if not waiting.done():
            await other.reset_branch_async("main", two)
    event = await waiting
    assert event.kind is EventKind.BRANCH_RESET
    assert {event.snapshot_id, event.previous_snapshot_id} == {one, two}


@pytest.mark.parametrize("layout", ["log", "repo"])
async def test_every_event_of_a_branch_names_where_it_points_then(layout: str) -> None:
    repo = await asyncio.to_thread(create, layout)
    token = (await events_of(repo, since=""))[-1].token

    def change() -> tuple[str, ...]:
        one, two = commit(repo, "one"), commit(repo, "two")
        repo.create_branch("dev", two)
        three = commit(repo, "three", "dev")
        repo.reset_branch("dev", one)
        four = commit(repo, "four", "dev")
        repo.delete_branch("dev")
        repo.create_branch("dev", four)
        return two, three, one, four

    two, three, one, four = await asyncio.to_thread(change)
    events = await events_of(repo, since=token, branch="dev")
    assert [(str(e.kind), e.snapshot_id, e.previous_snapshot_id) for e in events] == [
        ("branch-created", two, None),
        ("commit", three, two),
        ("branch-reset", one, three),
        ("commit", four, one),
        ("branch-deleted", None, four),
        ("branch-created", four, None),
    ]


@pytest.mark.parametrize("layout", ["log", "repo"])
async def test_updates_that_are_forgotten_are_a_gap_to_begin_again_from(layout: str, tmp_path: Path) -> None:
    def build() -> tuple[Repository, list[str], str]:
        config = RepositoryConfig(num_updates_per_repo_info_file=3)
        version = None if layout == "log" else 2
        repo = Repository.create(local_filesystem_storage(str(tmp_path)), config, spec_version=version)
        token = list(repo.watch_sync(since="", stop_at_end=True))[-1].token
        first = commit(repo, "first")
        repo.create_branch("dev", first)
        commits = [commit(repo, f"c{n}", "dev") for n in range(9)]
        return repo, commits, token

    repo, commits, token = await asyncio.to_thread(build)
    await repo.aclose()
    # Copies of the ops log that were deleted by hand.
    for path in (tmp_path / "overwritten").iterdir():
        path.unlink()
    again = await Repository.open_async(local_filesystem_storage(str(tmp_path)))
    gap, *events = await events_of(again, since=token, branch="dev")
    assert gap.kind is EventKind.GAP
    assert [e.kind for e in events] == [EventKind.COMMIT] * len(events)
    assert [gap.snapshot_id, *[e.snapshot_id for e in events]] == commits[-1 - len(events) :]
    # After the gap, each event comes once.
    assert [e.snapshot_id for e in await events_of(again, since=gap.token, branch="dev")] == [
        e.snapshot_id for e in events
    ]


async def test_snapshots_that_were_collected_are_a_gap_in_format_1() -> None:
    repo = await asyncio.to_thread(create, "refs")
    first = await asyncio.to_thread(commit, repo, "first")
    await repo.create_tag_async("kept", first)
    await asyncio.to_thread(commit, repo, "second")
    token = (await events_of(repo, since=""))[-1].token
    last = await asyncio.to_thread(commit, repo, "third")
    now = datetime.now(UTC) + timedelta(seconds=5)
    await repo.expire_snapshots_async(now)
    await repo.garbage_collect_async(now)
    again = await Repository.open_async(repo.storage)
    (gap,) = await events_of(again, since=token)
    assert (gap.kind, gap.branch, gap.snapshot_id) == (EventKind.GAP, "main", last)
    assert await events_of(again, since=gap.token) == []


def test_the_synchronous_twin_yields_the_same_events() -> None:
    repo = create("log")
    token = list(repo.watch_sync(since="", stop_at_end=True))[-1].token
    made = commit(repo, "a")
    assert [e.snapshot_id for e in repo.watch_sync(since=token, stop_at_end=True)] == [made]


async def test_an_amended_commit_names_the_snapshot_it_replaced() -> None:
    repo = await Repository.create_async(in_memory_storage())
    first = await asyncio.to_thread(commit, repo, "a")
    token = [e async for e in repo.watch(since="", stop_at_end=True)][-1].token
    session = await repo.writable_session_async("main")
    await asyncio.to_thread(lambda: zarr.create_group(session.store, path="b"))
    amended = await session.amend_async("a and b")
    (event,) = await events_of(repo, since=token)
    assert (event.kind, event.snapshot_id, event.previous_snapshot_id) == (EventKind.AMEND, amended, first)


def test_the_page_about_the_feed_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "feed.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "__main__"}
    for source in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(compile(source, "docs/feed.md", "exec"), names)
    out = capsys.readouterr().out
    assert "two days /sst [{'time': slice(1, 3, None), 'x': slice(0, 6, None)}]" in out
    assert re.findall(r"commit \((\d), array\(\[\[(\d)", out) == [("0", "0"), ("2", "1")]
