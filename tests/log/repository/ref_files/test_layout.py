"""Format 1: one object per branch and tag; the same promises, as far as the format goes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from icechunk.errors import (
    AlreadyExistsError,
    CommitOutcomeUnknown,
    ConflictError,
    FormatError,
    InvalidInputError,
    PreconditionFailedError,
    RefNotFoundError,
    RepositoryNotFoundError,
    SessionStateError,
    SnapshotNotFoundError,
)
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId, encode_id
from icechunk.format.keys import snapshot_key
from icechunk.format.repo.repo_info import SnapshotRecord
from icechunk.format.snapshot.codec import encode_snapshot
from icechunk.format.values import Snapshot
from icechunk.log.repository import events as e
from icechunk.log.repository.create import create_ref_files, create_repo_object
from icechunk.log.repository.open import create_repository, detect, open_repository
from icechunk.log.repository.port import Layout, Propose
from icechunk.log.repository.ref_files.names import (
    RefKey,
    RefNames,
    decode_ref,
    encode_ref,
    known_mark,
    mark_of,
    marks_after,
    marks_in,
)
from icechunk.log.repository.state import RepoState
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.memory import MemoryStorage
from icechunk.testing.scripted import Request, ScriptedStorage, Send, lost_answer
from tests.log.repository.strategies import an_id
from tests.log.repository.told import Told
from tests.log.repository.world import World
from tests.raising import raises

MAIN_KEY = "refs/branch.main/ref.json"


class RefFilesWorld(World):
    """The same for format 1, where a snapshot is known by its file."""

    def __init__(self) -> None:
        super().__init__(create_ref_files)

    async def commit(self, i: int, branch: str = "main", parent: ObjectId | None = None) -> Propose:
        """Write a snapshot, and propose it on a branch."""
        self.clock.move(1)
        snapshot = Snapshot(
            id=an_id(i),
            parent_id=parent or FIRST_SNAPSHOT,
            flushed_at_us=self.clock.now_us,
            message=str(i),
            metadata={"i": i},
        )
        await self.store.put(snapshot_key(snapshot.id), encode_snapshot(snapshot, 1))
        record = SnapshotRecord.of(snapshot)

        def propose(state: RepoState) -> list[e.Event]:
            return [e.CommitAdded(branch=branch, snapshot=record)]

        return propose

    async def tip(self, key: str = MAIN_KEY) -> ObjectId:
        return decode_ref((await self.store.get(key)).data, key)


new_world = RefFilesWorld


def replaces(key: str) -> Callable[[Request], bool]:
    return lambda request: request.verb == "put" and request.key == key


def losing_replacements(storage: ScriptedStorage) -> list[Send]:
    """Replacements of ``main`` get no answer and are not executed; returns functions that execute them after all."""
    held: list[Send] = []

    async def script(request: Request, send: Send) -> object:
        if replaces(MAIN_KEY)(request):
            held.append(send)
            raise lost_answer()
        return await send()

    storage.script = script
    return held


# ------------------------------------------------------------ what is written


async def test_the_files_are_those_of_the_official_library(world: RefFilesWorld) -> None:
    log, _ = await world.create(config={"inline_chunk_threshold_bytes": 7})
    await log.append(lambda _: [e.BranchCreated(name="dev", snapshot=FIRST_SNAPSHOT)])
    await log.append(lambda _: [e.TagCreated(name="t", snapshot=FIRST_SNAPSHOT)])
    await log.append(lambda _: [e.TagDeleted(name="t")])
    await log.append(lambda _: [e.ConfigReplaced(config={"inline_chunk_threshold_bytes": 8})])
    files = {info.key: info.size async for page in world.store.list_pages() for info in page}
    backup = next(key for key in files if key.startswith("overwritten/config.yaml."))
    assert sorted(files) == sorted(
        [
            "config.yaml",
            backup,
            "refs/branch.dev/ref.json",
            MAIN_KEY,
            "refs/tag.t/ref.json",
            "refs/tag.t/ref.json.deleted",
            snapshot_key(FIRST_SNAPSHOT),
        ]
    )
    assert not (await world.store.get("refs/tag.t/ref.json.deleted")).data.strip()
    assert (await world.store.get(MAIN_KEY)).data == b'{"snapshot":"1CECHNKREP0F1RSTCMT0"}'
    assert b"inline_chunk_threshold_bytes: 7" in (await world.store.get(backup)).data
    other, _ = await world.open()
    assert other.state.config["inline_chunk_threshold_bytes"] == 8


async def test_opening_shows_branches_tags_and_ancestry(world: RefFilesWorld) -> None:
    log, _ = await world.create()
    await log.append(await world.commit(1))
    await log.append(await world.commit(2, parent=an_id(1)))
    await log.append(lambda _: [e.TagCreated(name="t", snapshot=an_id(1))])
    other, _ = await world.open()
    assert dict(other.state.branches) == {"main": an_id(2)}
    assert dict(other.state.tags) == {"t": an_id(1)}
    state = await other.learn([an_id(2)], ancestry=True)
    assert [(record.message, record.metadata) for record in state.ancestry(an_id(2))][:2] == [
        ("2", {"i": 2}),
        ("1", {"i": 1}),
    ]


async def test_snapshots_are_read_once(world: RefFilesWorld) -> None:
    log, _ = await world.create()
    await log.append(await world.commit(1))
    other, storage = await world.open()
    await other.learn([an_id(1)], ancestry=True)
    storage.requests.clear()
    await other.learn([an_id(1)], ancestry=True)
    assert storage.requests == []
    with pytest.raises(SnapshotNotFoundError):
        await other.learn([an_id(9)])


async def test_it_is_detected_opened_and_created_like_the_others(world: RefFilesWorld) -> None:
    log = await create_repository(world.store, Layout.REFS, world.clock.sources())
    assert await detect(world.store) is Layout.REFS
    opened = await open_repository(world.store, world.clock.sources())
    assert (opened.layout, opened.spec_version) == (Layout.REFS, 1)
    await opened.aclose()
    await log.aclose()


# ------------------------------------------------------------------- refusals


async def test_of_two_commits_on_a_branch_one_conflicts(world: RefFilesWorld) -> None:
    one, _ = await world.create()
    two, _ = await world.open()
    await one.append(await world.commit(1))
    with pytest.raises(ConflictError):
        await two.append(await world.commit(2))
    assert await world.tip() == an_id(1)


async def test_a_race_between_look_and_put_is_lost_for_certain(world: RefFilesWorld) -> None:
    one, storage = await world.create()
    two, _ = await world.open()
    other_commit = await world.commit(1)

    async def overtake(request: Request, send: Send) -> object:
        if request.verb == "put" and request.key == MAIN_KEY:
            storage.script = None
            await two.append(other_commit)
        return await send()

    storage.script = overtake
    with pytest.raises(ConflictError):
        await one.append(await world.commit(2))
    assert await world.tip() == an_id(1)


async def test_names_are_taken_and_given_up_as_in_the_other_layouts(world: RefFilesWorld) -> None:
    log, _ = await world.create()
    await log.append(lambda _: [e.BranchCreated(name="dev", snapshot=FIRST_SNAPSHOT)])
    await log.append(lambda _: [e.TagCreated(name="t", snapshot=FIRST_SNAPSHOT)])
    for event, error in [
        (e.BranchCreated(name="dev", snapshot=FIRST_SNAPSHOT), AlreadyExistsError),
        (e.TagCreated(name="t", snapshot=FIRST_SNAPSHOT), AlreadyExistsError),
        (e.BranchCreated(name="a/b", snapshot=FIRST_SNAPSHOT), InvalidInputError),
        (e.TagCreated(name="", snapshot=FIRST_SNAPSHOT), InvalidInputError),
        (e.BranchCreated(name="new", snapshot=an_id(9)), SnapshotNotFoundError),
        (e.BranchDeleted(name="nowhere"), RefNotFoundError),
        (e.BranchDeleted(name="main"), SessionStateError),
        (e.TagDeleted(name="nowhere"), RefNotFoundError),
    ]:
        with pytest.raises(error):
            await log.append(lambda _, event=event: [event])
    await log.append(lambda _: [e.BranchDeleted(name="dev")])
    await log.append(lambda _: [e.TagDeleted(name="t")])
    with pytest.raises(AlreadyExistsError):
        await log.append(lambda _: [e.TagCreated(name="t", snapshot=FIRST_SNAPSHOT)])
    assert (set((await log.refresh()).branches), set(log.state.tags)) == ({"main"}, set())


async def test_operations_that_format_1_lacks_are_refused_and_nothing_is_written(world: RefFilesWorld) -> None:
    log, storage = await world.create()
    await log.prepare_writes()
    storage.requests.clear()
    for events in (
        [e.StatusSet(availability=1)],
        [e.MetadataReplaced(metadata={})],
        [e.FeatureFlagSet(flag=3, value=False)],
        [e.TagCreated(name="a", snapshot=FIRST_SNAPSHOT), e.TagCreated(name="b", snapshot=FIRST_SNAPSHOT)],
    ):
        with raises(FormatError, "unsupported-spec-version"):
            await log.append(lambda _, events=events: events)
    with raises(FormatError, "unsupported-spec-version"):
        [update async for update in log.updates()]
    assert not storage.of("put")


async def test_a_configuration_that_was_changed_meanwhile_is_not_replaced(world: RefFilesWorld) -> None:
    log, _ = await world.create(config={"inline_chunk_threshold_bytes": 7})
    known = log.state.config
    await log.append(
        lambda _: [e.ConfigReplaced(config={"inline_chunk_threshold_bytes": 8}, expected=known, check=True)]
    )
    with pytest.raises(ConflictError) as refused:
        await log.append(lambda _: [e.ConfigReplaced(config={}, expected=known, check=True)])
    assert refused.value.kind == "config-updated"


async def test_a_repository_that_was_upgraded_meanwhile_is_not_written_to(world: RefFilesWorld) -> None:
    log, _ = await world.create()
    commit = await world.commit(1)
    elsewhere = MemoryStorage(world.clock.sources())
    await (await create_repo_object(elsewhere, world.clock.sources())).aclose()
    await world.store.put("repo", (await elsewhere.get("repo")).data)
    with raises(FormatError, "unsupported-spec-version", "open it again"):  # words: the remedy
        await log.append(commit)
    assert await world.tip() == FIRST_SNAPSHOT


# --------------------------------------------------------------- lost answers


async def test_a_clients_own_commit_is_recognised_below_that_of_another(world: RefFilesWorld) -> None:
    log, storage = await world.create()
    other, _ = await world.open()
    first, second = await world.commit(1), await world.commit(2, parent=an_id(1))

    async def lose_and_be_followed(request: Request, send: Send) -> object:
        answer = await send()
        if request.verb == "put" and request.key == MAIN_KEY:
            storage.script = None
            await other.append(second)
            raise lost_answer()
        return answer

    storage.script = lose_and_be_followed
    await log.append(first)
    assert await world.tip() == an_id(2)


def reset(expected: ObjectId, branch: str = "main") -> Propose:
    return lambda _: [e.BranchReset(name=branch, snapshot=FIRST_SNAPSHOT, expected=expected)]


@pytest.mark.parametrize("landed", [True, False])
@pytest.mark.parametrize("followers", [0, 3])
async def test_a_commit_that_others_moved_the_branch_away_from_is_told_by_the_marks(
    world: RefFilesWorld, landed: bool, followers: int
) -> None:
    log, storage = await world.create()
    other, _ = await world.open()
    propose = await world.commit(1)
    later = [await world.commit(i + 3, parent=an_id(i + 2) if i else FIRST_SNAPSHOT) for i in range(followers)]

    async def lose_and_be_moved(request: Request, send: Send) -> object:
        if request.verb != "put" or request.key != MAIN_KEY:
            return await send()
        storage.script = None
        if landed:
            await send()
        else:
            await other.append(await world.commit(2))
        await other.append(reset(an_id(1 if landed else 2)))
        for each in later:
            await other.append(each)
        raise lost_answer()

    storage.script = lose_and_be_moved
    if landed:
        await log.append(propose)
    else:
        # Nothing of it landed, for certain: so it is validated on what is there, and refused or made.
        with pytest.raises(ConflictError) if followers else nullcontext():
            await log.append(propose)
    tip = an_id(followers + 2) if followers else FIRST_SNAPSHOT
    assert await world.tip() == (an_id(1) if not landed and not followers else tip)


@pytest.mark.parametrize("by", ["another library", "many", "deleted"])
async def test_a_commit_is_not_called_lost_where_no_mark_tells(world: RefFilesWorld, by: str) -> None:
    log, storage = await world.create()
    await log.append(lambda _: [e.BranchCreated(name="b", snapshot=FIRST_SNAPSHOT)])
    other, theirs = await world.open()
    propose = await world.commit(1, branch="b")
    key = MAIN_KEY.replace("main", "b")

    async def lose_and_be_replaced(request: Request, send: Send) -> object:
        if request.verb != "put" or request.key != key:
            return await send()
        storage.script = None
        await send()
        if by == "deleted":
            await other.append(lambda _: [e.BranchDeleted(name="b")])
        elif by == "many":
            await other.append(reset(an_id(1), branch="b"))
            for i in range(40):
                previous = an_id(i + 1) if i else FIRST_SNAPSHOT
                await other.append(await world.commit(i + 2, branch="b", parent=previous))
        else:
            await theirs.put(key, encode_ref(FIRST_SNAPSHOT))
        raise lost_answer()

    storage.script = lose_and_be_replaced
    with pytest.raises(CommitOutcomeUnknown) as caught:
        await log.append(propose)
    with pytest.raises(CommitOutcomeUnknown):
        await other.settle(caught.value.token)


async def test_a_token_of_a_commit_tells_what_the_marks_tell(world: RefFilesWorld) -> None:
    log, storage = await world.create()
    other, _ = await world.open()
    tokens = []
    for i, landed in enumerate([True, False], 1):
        propose = await world.commit(i)
        held = losing_replacements(storage)
        with pytest.raises(CommitOutcomeUnknown) as caught:
            await log.append(propose)
        storage.script = None
        tokens.append(caught.value.token)
        if landed:
            await held[0]()
            await other.append(reset(an_id(1)))
        else:
            await other.append(await world.commit(3))
            await other.append(reset(an_id(3)))
    assert [await other.settle(token) for token in tokens] == [True, False]
    assert await world.tip() == FIRST_SNAPSHOT


def test_marks_are_followed_by_those_before_them() -> None:
    bodies = [encode_ref(FIRST_SNAPSHOT)]
    for i in range(40):
        bodies.append(encode_ref(FIRST_SNAPSHOT, mark_of(bytes([i]) * 8) + marks_after(bodies[-1])))
    assert [marks_in(body)[::-1] for body in bodies[:3]] == [
        [],
        [known_mark(bodies[0]), known_mark(bodies[1])],
        [known_mark(body) for body in bodies[:3]],
    ]
    assert marks_in(bodies[-1]) == [known_mark(body) for body in bodies[:-33:-1]]
    assert known_mark(encode_ref(FIRST_SNAPSHOT) + b"\n") == known_mark(bodies[0])
    assert {decode_ref(body, "a ref") for body in bodies} == {FIRST_SNAPSHOT}


# ----------------------------------------------------------------- places


async def test_an_existing_repository_is_not_replaced_and_a_missing_one_not_opened(world: RefFilesWorld) -> None:
    with pytest.raises(RepositoryNotFoundError):
        await world.open()
    await (await create_repo_object(world.store, world.clock.sources())).aclose()
    with pytest.raises(InvalidInputError):
        await world.create()
    with pytest.raises(AlreadyExistsError):
        await world.create(check_clean_root=False)


async def test_a_ref_without_a_snapshot_is_an_error_that_names_the_file(world: RefFilesWorld) -> None:
    await world.create()
    await world.store.put(MAIN_KEY, b'{"snapshot": 7}')
    with raises(FormatError, "deserialization", MAIN_KEY):
        await world.open()


def test_names_are_in_keys_as_the_official_library_writes_them(tmp_path: Path) -> None:
    on_disk, elsewhere = RefNames.of(LocalStorage(tmp_path)), RefNames.of(MemoryStorage())
    assert on_disk.branch_key("é x%") == "refs/branch.%C3%A9 x%25/ref.json"
    assert elsewhere.branch_key("é x%") == "refs/branch.é x%/ref.json"
    for names in (on_disk, elsewhere):
        for name in ("main", "é x%", "a.b", "..", "日本", '~*?"<>|'):
            assert names.parse(names.branch_key(name)) == RefKey(is_tag=False, name=name)
            assert names.parse(names.tag_key(name)) == RefKey(is_tag=True, name=name)
            assert names.parse(names.tombstone_key(name)) == RefKey(is_tag=True, name=name, tombstone=True)
        for key in ("refs/x", "refs/branch.main/other", "refs/other.x/ref.json", "refs/branch.a/ref.json.deleted"):
            assert names.parse(key) is None


async def test_everything_works_on_a_disk_too(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    log = await create_ref_files(storage)
    await log.append(lambda _: [e.BranchCreated(name="é x", snapshot=FIRST_SNAPSHOT)])
    assert (tmp_path / "refs" / "branch.%C3%A9 x" / "ref.json").read_text().count(encode_id(FIRST_SNAPSHOT)) == 1
    assert set((await log.refresh()).branches) == {"main", "é x"}
    await log.append(lambda _: [e.BranchDeleted(name="é x")])
    assert set((await log.refresh()).branches) == {"main"}
    await log.aclose()


# ------------------------------------------------------ changes without a snapshot of their own

SAME: dict[str, e.Event] = {
    "create-branch": e.BranchCreated(name="b", snapshot=FIRST_SNAPSHOT),
    "create-tag": e.TagCreated(name="t", snapshot=FIRST_SNAPSHOT),
    "delete-tag": e.TagDeleted(name="old"),
}


@pytest.mark.parametrize("what", SAME)
@pytest.mark.parametrize("lost", [False, True])
async def test_of_two_clients_that_ask_for_the_same_one_succeeds(world: RefFilesWorld, what: str, lost: bool) -> None:
    first, _ = await world.create()
    await first.append(lambda _: [e.TagCreated(name="old", snapshot=FIRST_SNAPSHOT)])
    second, storage = await world.open()

    async def be_overtaken(request: Request, send: Send) -> object:
        if request.verb == "put" and request.key.startswith("refs/"):
            storage.script = None
            await first.append(lambda _: [SAME[what]])
            if lost:
                raise lost_answer()
        return await send()

    storage.script = be_overtaken
    with pytest.raises((AlreadyExistsError, RefNotFoundError, CommitOutcomeUnknown)) as caught:
        await second.append(lambda _: [SAME[what]])
    # A branch that is there may be what became of one's own.
    assert isinstance(caught.value, CommitOutcomeUnknown) is (lost and what == "create-branch")


@pytest.mark.parametrize("what", SAME)
@pytest.mark.parametrize("landed", [True, False])
async def test_a_creation_is_recognised_and_settled_by_its_mark(world: RefFilesWorld, what: str, landed: bool) -> None:
    log, storage = await world.create()
    await log.append(lambda _: [e.TagCreated(name="old", snapshot=FIRST_SNAPSHOT)])
    other, _ = await world.open()

    async def lose(request: Request, send: Send) -> object:
        if request.verb == "put" and request.key.startswith("refs/"):
            if landed:
                await send()
            raise lost_answer()
        return await send()

    storage.script = lose
    tokens = Told()
    if landed:
        await log.append(tokens.of(lambda _: [SAME[what]]))
    else:
        with pytest.raises(CommitOutcomeUnknown):
            await log.append(tokens.of(lambda _: [SAME[what]]))
        storage.script = None
        await other.append(lambda _: [SAME[what]])
    assert tokens[-1] is not None
    if what == "create-branch" and not landed:
        with pytest.raises(CommitOutcomeUnknown):
            await other.settle(tokens[-1])
    else:
        assert await other.settle(tokens[-1]) is landed


async def test_a_reset_whose_branch_is_unchanged_is_kept_out_for_good(world: RefFilesWorld) -> None:
    log, storage = await world.create()
    await log.append(await world.commit(1))
    held = losing_replacements(storage)
    with pytest.raises(CommitOutcomeUnknown) as caught:
        await log.append(lambda _: [e.BranchReset(name="main", snapshot=FIRST_SNAPSHOT, expected=an_id(1))])
    storage.script = None
    assert not await log.settle(caught.value.token)
    with pytest.raises(PreconditionFailedError):
        await held[0]()
    assert await world.tip() == an_id(1)


async def test_a_late_write_does_not_land_on_a_branch_that_was_moved_away_and_back(world: RefFilesWorld) -> None:
    log, storage = await world.create()
    propose = await world.commit(1)
    other, _ = await world.open()
    await other.append(await world.commit(2))
    await other.append(lambda _: [e.BranchReset(name="main", snapshot=FIRST_SNAPSHOT, expected=an_id(2))])
    held = losing_replacements(storage)
    with pytest.raises(CommitOutcomeUnknown):
        await log.append(propose)
    await other.append(await world.commit(3))
    await other.append(lambda _: [e.BranchReset(name="main", snapshot=FIRST_SNAPSHOT, expected=an_id(3))])
    with pytest.raises(PreconditionFailedError):
        await held[0]()
    assert await world.tip() == FIRST_SNAPSHOT
