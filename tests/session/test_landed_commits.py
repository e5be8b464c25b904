"""The lines of commits that sessions of one process share when they rebase."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import zarr
from zarr.core.buffer import default_buffer_prototype

import icechunk
from icechunk import ConflictDetector, Repository
from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.values import TransactionLog
from icechunk.log.session.merge.landed import Landed
from icechunk.session import landed_commits
from icechunk.session.landed_commits import LandedCommits, Line

NODE = NodeId(bytes(8))


def id_of(number: int) -> ObjectId:
    return ObjectId(number.to_bytes(12, "big"))


def commit(number: int, chunk: int) -> tuple[ObjectId, Sequence[TransactionLog]]:
    log = TransactionLog(id=id_of(number), updated_chunks={NODE: np.array([[chunk]], np.uint32)})
    return id_of(number), [log]


def written(commits: LandedCommits, line: Line, base: int, chunks: Sequence[int] = range(10)) -> list[int]:
    since = commits.since("main", id_of(base), line, line.tip, line.tip, [])
    assert since is not None
    found: list[int] = since.written(NODE, np.array([[chunk] for chunk in chunks], np.uint32)).ravel().tolist()
    return found


def a_line(commits: LandedCommits) -> Line:
    """Commits 1 to 4 on snapshot 0, each of a chunk of the same number."""
    since = commits.since("main", id_of(0), None, None, id_of(0), [commit(i, i) for i in (1, 2, 3, 4)])
    assert since is not None
    line = commits.line("main", id_of(0))
    assert line is not None
    return line


def count_additions(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A counter whose next number is that of the commits that have been added up from now on."""
    added, add = itertools.count(), Landed.add

    def counted(self: Landed, transactions: Sequence[TransactionLog]) -> None:
        next(added)
        add(self, transactions)

    monkeypatch.setattr(Landed, "add", counted)
    return added


def test_each_base_in_a_line_has_the_commits_after_it() -> None:
    commits = LandedCommits()
    line = a_line(commits)
    assert [written(commits, line, base) for base in (0, 2, 4)] == [[1, 2, 3, 4], [3, 4], []]
    assert commits.line("main", id_of(5)) is None
    assert commits.line("other", id_of(0)) is None


def test_commits_that_did_not_land_leave_the_line_with_their_changes() -> None:
    commits = LandedCommits()
    line = a_line(commits)
    since = commits.since("main", id_of(1), line, line.tip, id_of(2), [commit(7, 7)])
    assert since is not None
    assert [written(commits, line, base) for base in (0, 2, 7)] == [[1, 2, 7], [7], []]
    assert commits.line("main", id_of(3)) is None


def test_nobody_adds_to_a_line_that_another_caller_has_moved_on() -> None:
    commits = LandedCommits()
    line = a_line(commits)
    tip = line.tip
    assert commits.since("main", id_of(0), line, tip, tip, [commit(5, 5)]) is not None
    assert commits.since("main", id_of(0), line, tip, tip, [commit(6, 6)]) is None
    assert line.tip == id_of(5)


@pytest.mark.parametrize("bound", ["_MOST_COMMITS", "_MOST_ROWS"])
def test_a_line_that_is_too_long_is_forgotten(monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    monkeypatch.setattr(landed_commits, bound, 3)
    commits = LandedCommits()
    since = commits.since("main", id_of(0), None, None, id_of(0), [commit(i, i) for i in (1, 2, 3, 4)])
    assert since is not None
    assert since.has_touched(NODE)
    assert commits.line("main", id_of(0)) is None


def test_few_branches_have_a_line() -> None:
    commits = LandedCommits()
    for number in range(6):
        assert commits.since(f"branch-{number}", id_of(0), None, None, id_of(0), [commit(1, 1)]) is not None
    assert [commits.line(f"branch-{number}", id_of(0)) is not None for number in range(6)] == [False] * 2 + [True] * 4


@pytest.mark.parametrize("spec_version", [None, 2, 1])
async def test_commits_from_many_bases_are_added_up_once(
    monkeypatch: pytest.MonkeyPatch, spec_version: int | None
) -> None:
    """Each task commits again and again from a new session, so that every base is another one."""
    tasks, rounds = 24, 6
    added = count_additions(monkeypatch)
    repo = await Repository.create_async(icechunk.in_memory_storage(), spec_version=spec_version)
    session = await repo.writable_session_async("main")
    await zarr.api.asynchronous.create_array(store=session.store, name="a", shape=(tasks,), chunks=(1,), dtype="u1")
    await session.commit_async("an array")
    prototype = default_buffer_prototype()

    async def work(task: int) -> None:
        for turn in range(rounds):
            session = await repo.writable_session_async("main")
            await session.store.set(f"a/c/{task}", prototype.buffer.from_bytes(bytes([turn])))
            await session.commit_async(f"{task} {turn}", rebase_with=ConflictDetector())

    await asyncio.gather(*(work(task) for task in range(tasks)))
    # One addition for each commit, and few again for those whose entry was lost.
    assert next(added) < 3 * tasks * rounds
    reader = await repo.readonly_session_async("main")
    for task in range(tasks):
        found = await reader.store.get(f"a/c/{task}", prototype)
        assert found is not None
        assert found.to_bytes() == bytes([rounds - 1])
    assert len([info async for info in repo.async_ancestry(branch="main")]) == tasks * rounds + 2


async def test_two_branches_that_are_committed_to_in_turn_are_not_added_up_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repo = await Repository.create_async(icechunk.in_memory_storage())
    session = await repo.writable_session_async("main")
    await zarr.api.asynchronous.create_array(store=session.store, name="a", shape=(40,), chunks=(1,), dtype="u1")
    await session.commit_async("an array")
    await repo.create_branch_async("other", await repo.lookup_branch_async("main"))
    prototype = default_buffer_prototype()
    waiting = {branch: await repo.writable_session_async(branch) for branch in ("main", "other")}
    for branch, one in waiting.items():
        await one.store.set("a/c/39", prototype.buffer.from_bytes(branch[:1].encode()))
    added = count_additions(monkeypatch)
    for turn in range(20):
        for branch in ("main", "other"):
            before = await repo.writable_session_async(branch)
            await before.store.set(f"a/c/{turn}", prototype.buffer.from_bytes(b"\1"))
            session = await repo.writable_session_async(branch)
            await session.store.set(f"a/c/{turn + 19}", prototype.buffer.from_bytes(b"\2"))
            await session.commit_async("first")
            await before.commit_async("second", rebase_with=ConflictDetector())
    for one in waiting.values():
        await one.commit_async("last", rebase_with=ConflictDetector())
    # Each branch once from its first base, and once more from the base of the session that waited.
    assert next(added) <= 4 * 20 * 2 + 8
