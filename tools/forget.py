"""Looks for bytes that were deleted: after any history, expiration and collection, no object may hold them.

``python -m tools.forget --runs 1000 --seed 0 --workers 2`` generates histories, seed after seed and in every layout.
Every chunk, every location of a virtual chunk and every attribute is a secret of its own. Some of them were written in
sessions that were persisted, handed over by their forks, resumed, abandoned, or left until their lease was over.

In the end the history is expired and collected, the log is pruned once its entries may go, and every object that is
left is taken apart and searched: for secrets that no branch or tag reaches, which must not be there, and, by reading
through the library, for those that one reaches. Every second history is collected with the default of
``repack_below_percent`` first, after which such secrets may be left in objects that several chunks or several arrays
share, nowhere else, and after which no more than `MAX_STORED` times the living bytes of chunks may be stored; then,
like the others, with 100, after which no secret may be left anywhere. It prints the seeds of histories that break a
promise, and ends with status 1 if there were any.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import logging
import multiprocessing
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from zarr.core.buffer import default_buffer_prototype

import icechunk
from icechunk.config import EngineConfig
from icechunk.errors import FormatError
from icechunk.format.envelope import FileType, unseal
from icechunk.format.manifest import decode_manifest
from icechunk.maintenance.repack_plan import MAX_STORED
from icechunk.runtime import json_codec
from icechunk.storage.memory import MemoryStorage

__all__ = ["LAYOUTS", "Outcome", "run"]

LAYOUTS = (None, 2, 1)
_PREFIX = "s3://secrets/"
_TOKEN_BYTES = 16
_CHUNKS = 6
_WEEK_US = 8 * 86_400_000_000
_BUFFER = default_buffer_prototype().buffer


@dataclass(slots=True)
class Outcome:
    """The result of one history."""

    seed: int
    version: int | None
    secrets: int = 0
    """Planted."""
    living: int = 0
    """Planted secrets that a branch or tag reaches in the end."""
    rewritten: int = 0
    """Snapshots."""
    stored: float = 0.0
    """Bytes of chunk objects, as a multiple of their living bytes."""
    persisted: int = 0
    """Sessions, of which the secrets are counted above."""
    kept: int = 0
    """Secrets that are in no living data, and were left by the collection with the default threshold."""
    problems: list[str] = field(default_factory=list)


Content = dict[str, bytes]
"""Key to secret."""


@dataclass(slots=True)
class _Persisted:
    """A session that has been persisted."""

    content: Content
    abandoned: bool
    """Whether it is, in the end."""


class _History:
    def __init__(self, seed: int, version: int | None) -> None:
        self.rng = random.Random(f"{seed} {version}")
        self.version = version
        self.storage = MemoryStorage()
        self.outcome = Outcome(seed=seed, version=version)
        self.contents: dict[str, Content] = {}
        self.secrets: set[bytes] = set()
        self.sessions: dict[str, _Persisted] = {}

    def config(self) -> icechunk.RepositoryConfig:
        rng = self.rng
        config = icechunk.RepositoryConfig.default()
        config.inline_chunk_threshold_bytes = rng.choice((0, 64, 512))
        config.num_updates_per_repo_info_file = rng.choice((3, 1000))
        packs, shares = rng.choice((0, 256, 1 << 20, 1 << 20)), rng.choice((0, 4096, 4096))
        self.shared = (*(("chunks/",) if packs else ()), *(("manifests/",) if shares else ()))
        config.engine = EngineConfig(
            pack_threshold_bytes=packs,
            pack_size_bytes=rng.choice((256, 2048)),
            small_commit_bytes=rng.choice((0, 65536)),
            share_manifests_below_refs=shares,
            max_refs_per_manifest=rng.choice((4, 65536, 65536)),
        )
        config.set_virtual_chunk_container(
            icechunk.VirtualChunkContainer(_PREFIX, icechunk.s3_store(region="us-east-1"))
        )
        return config

    def secret(self) -> bytes:
        token = self.rng.randbytes(_TOKEN_BYTES // 2).hex().encode()
        self.secrets.add(token)
        return token

    async def create(self) -> None:
        self.repo = await icechunk.Repository.create_async(self.storage, self.config(), spec_version=self.version)
        self.contents[await self.repo.lookup_branch_async("main")] = {}

    # ------------------------------------------------------------- changes of a session

    async def write(self, store: icechunk.IcechunkStore, content: Content) -> None:
        """A few changes."""
        for _ in range(self.rng.choice((1, 2, 3, 20))):
            await self.change(store, content)

    async def change(self, store: icechunk.IcechunkStore, content: Content) -> None:
        rng = self.rng
        arrays = sorted(key.removesuffix("/zarr.json") for key in content if key.endswith("/zarr.json"))
        action = rng.choice(
            ("create", "chunk", "chunk", "chunk", "chunk", "virtual", "delete", "shrink", "remove", "attribute")
        )
        if action == "create" or not arrays:
            await self.document(store, content, f"a{rng.randrange(3)}", _CHUNKS)
            return
        array = rng.choice(arrays)
        key = f"{array}/c/{rng.randrange(_CHUNKS)}"
        match action:
            case "chunk":
                token = self.secret()
                await store.set(key, _BUFFER.from_bytes(token * rng.choice((1, 8, 40))))
                content[key] = token
            case "virtual":
                token = self.secret()
                await store.set_virtual_ref_async(key, f"{_PREFIX}{token.decode()}.nc", offset=0, length=10)
                content[key] = token
            case "delete":
                await store.delete(key)
                content.pop(key, None)
            case "attribute":
                await self.document(store, content, array, _CHUNKS)
            case "shrink":
                # As zarr does it, and back.
                for i in range(1, _CHUNKS):
                    await store.delete(f"{array}/c/{i}")
                await self.document(store, content, array, 1)
                await self.document(store, content, array, _CHUNKS)
            case _:
                await store.delete_dir(array)
                for gone in [key for key in content if key.startswith(f"{array}/")]:
                    del content[gone]

    async def document(self, store: icechunk.IcechunkStore, content: Content, array: str, chunks: int) -> None:
        """An array's metadata, with a secret in its attributes."""
        token = self.secret()
        document = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [chunks * 640],
            "data_type": "uint8",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [640]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "bytes"}],
            "fill_value": 0,
            "attributes": {"secret": token.decode()},
        }
        await store.set(f"{array}/zarr.json", _BUFFER.from_bytes(json.dumps(document).encode()))
        content[f"{array}/zarr.json"] = token
        for key in [key for key in content if key.startswith(f"{array}/c/")]:
            if int(key.rpartition("/")[2]) >= chunks:
                del content[key]

    # ------------------------------------------------------------- changes of the repository

    async def step(self, i: int) -> None:
        rng, repo = self.rng, self.repo
        branches = sorted(await repo.list_branches_async())
        branch = rng.choice(branches)
        tip = await repo.lookup_branch_async(branch)
        actions = ["commit"] * 6 + ["branch", "tag", "reset", "delete branch", "delete tag"]
        actions += ["flush", "expire", "collect", "persist", "persist", "resume"]
        if self.version != 1:
            actions += ["amend", "amend"]
        action = rng.choice(actions)
        match action:
            case "commit" | "amend" | "flush":
                session = await repo.writable_session_async(branch)
                content = dict(self.contents[session.snapshot_id])
                await self.write(session.store, content)
                if action == "commit":
                    id = await session.commit_async(f"c{i}", allow_empty=True)
                elif action == "flush" or tip == self.root:
                    id = await session.flush_async(f"f{i}")
                else:
                    id = await session.amend_async(f"m{i}", allow_empty=True)
                self.contents[id] = content
            case "branch":
                await repo.create_branch_async(f"b{i}", tip)
            case "tag":
                await repo.create_tag_async(f"t{i}", tip)
            case "reset":
                ids = [info.id async for info in repo.async_ancestry(branch=branch)]
                await repo.reset_branch_async(branch, rng.choice(ids))
            case "delete branch":
                if branch != "main":
                    await repo.delete_branch_async(branch)
            case "delete tag":
                for tag in sorted(await repo.list_tags_async())[:1]:
                    await repo.delete_tag_async(tag)
            case "expire":
                await self.expire(rng.random() < 0.5)
            case "persist":
                await self.persist(branch)
            case "resume":
                await self.resume(i)
            case _:
                await self.collect(rng.choice((None, 0, 100)))

    async def persist(self, branch: str) -> None:
        """A session that outlives its handle, and perhaps a fork of it that has handed over."""
        rng = self.rng
        session = await self.repo.writable_session_async(branch)
        content = dict(self.contents[session.snapshot_id])
        await self.write(session.store, content)
        id = await session.checkpoint_async()
        if rng.random() < 0.5:
            await self.write(session.store, content)
            await session.checkpoint_async()
        if rng.random() < 0.5:
            # The session does not collect the changes of this fork.
            fork = await self.repo.join_session_async(id)
            await self.write(fork.store, dict(content))
            await fork.checkpoint_async()
        self.sessions[id] = _Persisted(content, rng.random() < 0.3)
        self.outcome.persisted += 1

    async def resume(self, i: int) -> None:
        """Go on with one of the sessions, or end it."""
        for id in self.rng.sample(sorted(self.sessions), min(1, len(self.sessions))):
            known = self.sessions[id]
            session = await self.repo.resume_session_async(id)
            if self.rng.random() < 0.3:
                await session.abandon_async()
            else:
                await self.write(session.store, known.content)
                try:
                    snapshot = await session.commit_async(f"r{i}", allow_empty=True)
                except (icechunk.ConflictError, icechunk.RefNotFoundError):
                    # Its branch went on, or is gone.
                    await session.checkpoint_async()
                    continue
                self.contents[snapshot] = known.content
            del self.sessions[id]

    async def expire(self, refs: bool) -> None:
        infos = [info async for info in self.repo.async_ancestry(branch="main")]
        await self.repo.expire_snapshots_async(
            self.rng.choice(infos).written_at, delete_expired_branches=refs, delete_expired_tags=refs
        )

    async def collect(self, percent: int | None) -> None:
        """Collect, and follow the contents to the snapshots that they are in now."""
        before = await self.reached()
        now = datetime.now(UTC) + timedelta(seconds=1)
        done = await self.repo.garbage_collect_async(now, repack_below_percent=percent)
        self.outcome.rewritten += done.snapshots_rewritten
        after = await self.reached()
        for name, ids in before.items():
            if len(ids) != len(after.get(name, [])):
                self.outcome.problems.append(f"a collection changed the history of {name}")
                continue
            for old, new in zip(ids, after[name], strict=True):
                self.contents[new] = self.contents[old]

    async def reached(self) -> dict[str, list[str]]:
        """The snapshots of each ref, newest first."""
        repo = self.repo
        found: dict[str, list[str]] = {}
        for name in sorted(await repo.list_branches_async()):
            found[f"branch {name}"] = [info.id async for info in repo.async_ancestry(branch=name)]
        for name in sorted(await repo.list_tags_async()):
            found[f"tag {name}"] = [info.id async for info in repo.async_ancestry(tag=name)]
        return found

    # ------------------------------------------------------------- the end

    async def run(self) -> Outcome:
        await self.create()
        self.root = await self.repo.lookup_branch_async("main")
        for i in range(self.rng.randint(4, 16)):
            await self.step(i)
        await self.expire(refs=self.rng.random() < 0.5)
        # Every second one with the default.
        percent = None if self.outcome.seed % 2 else 100
        await self.collect(percent)
        await self.end_sessions()
        # Entries of the log, and the files that are embedded in them, go a week after they were announced, which
        # happens once a day. By then the leases of the other sessions are over.
        for _ in range(2):
            await self.pass_time()
            await self.collect(percent)
        await self.check_sessions_ended()
        living = await self.check_living()
        if percent is None:
            self.outcome.kept = self.search(living, self.shared)
            await self.check_stored(MAX_STORED)
        await self.collect(100)
        if await self.check_living() != living:
            self.outcome.problems.append("the last collection changed what refs reach")
        self.search(living)
        await self.check_stored(1)
        await self.repo.aclose()
        self.outcome.secrets, self.outcome.living = len(self.secrets), len(living)
        return self.outcome

    async def end_sessions(self) -> None:
        """Sessions are whole after a collection; some are abandoned, and the others left."""
        for id, known in self.sessions.items():
            session = await self.repo.resume_session_async(id)
            await self.check_content(session, known.content, f"session {id}")
            if known.abandoned:
                await session.abandon_async()

    async def check_sessions_ended(self) -> None:
        """Collections after their leases have ended them all."""
        for id in self.sessions:
            try:
                await self.repo.resume_session_async(id)
            except icechunk.SessionEndedError:
                continue
            self.outcome.problems.append(f"session {id} is there after its lease")

    async def check_stored(self, most: float) -> None:
        """Compare the bytes of chunk objects with the living ones."""
        living = (await self.repo.chunk_storage_stats_async()).native_bytes
        stored = sum(info.size for key, (info, _) in self.storage._objects.items() if key.startswith("chunks/"))
        if living:
            self.outcome.stored = stored / living
        if stored > most * living:
            self.outcome.problems.append(f"{stored} bytes of chunks are stored, {living} live")

    async def pass_time(self) -> None:
        """Eight days pass."""
        await self.repo.checkpoint_async()
        await self.repo.aclose()
        objects = self.storage._objects
        for key, (info, data) in list(objects.items()):
            objects[key] = replace(info, modified_us=info.modified_us - _WEEK_US), data
        self.repo = await icechunk.Repository.open_async(self.storage)

    async def check_living(self) -> set[bytes]:
        """Read everything that refs reach; returns the secrets in it."""
        living: set[bytes] = set()
        for id in {id for ids in (await self.reached()).values() for id in ids}:
            content = self.contents[id]
            living.update(content.values())
            session = await self.repo.readonly_session_async(snapshot_id=id)
            await self.check_content(session, content, f"snapshot {id}")
        return living

    async def check_content(self, session: icechunk.Session, content: Content, name: str) -> None:
        """Read everything in a session."""
        store, prototype = session.store, default_buffer_prototype()
        keys = {key async for key in store.list() if key != "zarr.json"}
        if keys != content.keys():
            more, less = sorted(keys - content.keys()), sorted(content.keys() - keys)
            self.outcome.problems.append(f"{name} has {more} too many and {less} too few")
            return
        virtual = set(await session.all_virtual_chunk_locations_async())
        for key, token in content.items():
            if f"{_PREFIX}{token.decode()}.nc" in virtual:
                continue
            found = await store.get(key, prototype)
            if found is None or token not in found.to_bytes():
                self.outcome.problems.append(f"{name} lost {key}")

    def search(self, living: set[bytes], allowed: tuple[str, ...] = ()) -> int:
        """Look for secrets that are not living; returns how many of them objects with allowed prefixes hold."""
        dead, kept = self.secrets - living, set[bytes]()
        for key, (_, data) in self.storage._objects.items():
            found = {token for part in _parts(data) for token in dead if token in part}
            if key.startswith(allowed) and allowed:
                kept |= found
            elif found:
                self.outcome.problems.append(f"{len(found)} secrets are left in {key}")
        return len(kept)


def _parts(data: bytes) -> Iterator[bytes]:
    """An object's bytes, and those of everything that is compressed or embedded in it."""
    yield data
    for kind in FileType:
        try:
            payload = unseal(data, kind)[1][:]
        except FormatError:
            continue
        yield payload
        if kind is FileType.MANIFEST:
            for refs in decode_manifest(data).arrays.values():
                yield refs.inline_data
                yield "\n".join(refs.locations).encode()
        for found in _documents(payload):
            yield from found
    if data.startswith(b"{"):
        yield from _embedded(json_codec.loads(data))


def _documents(payload: bytes) -> Iterator[Iterator[bytes]]:
    """JSON documents inside a file: markers, with copies of files."""
    at = payload.find(b'{"aioicechunk')
    while at >= 0:
        try:
            document, _ = json.JSONDecoder().raw_decode(payload[at:].decode(errors="replace"))
        except ValueError:
            return
        yield _embedded(document)
        at = payload.find(b'{"aioicechunk', at + 1)


def _embedded(document: dict[str, object]) -> Iterator[bytes]:
    for name in ("objects", "files"):
        files = document.get(name)
        if isinstance(files, dict):
            for text in files.values():
                yield from _parts(base64.b64decode(text))


def run(seed: int, version: int | None) -> Outcome:
    """One history."""
    return asyncio.run(_History(seed, version).run())


def _run_seed(seed: int) -> list[Outcome]:
    logging.disable(logging.CRITICAL)
    outcomes = []
    for version in LAYOUTS:
        try:
            outcomes.append(run(seed, version))
        except Exception as error:
            kind = type(error).__name__
            outcomes.append(Outcome(seed=seed, version=version, problems=[f"{kind}: {error}"]))
    return outcomes


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.forget", description=__doc__)
    parser.add_argument("--runs", type=int, default=100, help="histories, each in every layout (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the first (default 0)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    args = parser.parse_args()
    seeds = range(args.seed, args.seed + args.runs)
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        outcomes = [one for found in pool.imap_unordered(_run_seed, seeds) for one in found]
    broken = [one for one in outcomes if one.problems]
    for one in broken:
        print(f"seed {one.seed}, version {one.version}: {'; '.join(one.problems[:3])}")
    print(
        f"{len(outcomes)} histories, {sum(one.secrets for one in outcomes)} secrets, "
        f"{sum(one.living for one in outcomes)} of them alive in the end; "
        f"{sum(one.rewritten for one in outcomes)} snapshots rewritten, "
        f"{sum(one.persisted for one in outcomes)} sessions persisted, "
        f"{sum(one.kept for one in outcomes)} dead secrets left by collections with the default threshold; "
        f"{len(broken)} histories broke a promise"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
