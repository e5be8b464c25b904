"""`PyRepository`: a repository whose sessions are `PySession`."""

from __future__ import annotations

import json
import pickle
from datetime import datetime
from typing import Any

from icechunk._icechunk_python.passing import Passed
from icechunk._icechunk_python.session import PySession
from icechunk.config import Attribution, RepositoryConfig, StorageSettings
from icechunk.credentials import AnyCredential
from icechunk.repository import Repository
from icechunk.status import SpecVersion
from icechunk.storage import Storage

__all__ = ["PyRepository"]

_Access = dict[str, AnyCredential | None]
_KEPT: Any = object()


class PyRepository:
    """A `Repository`, as ``repo._repository`` hands it out; ``Repository(py_repository)`` leads back."""

    def __init__(self, repository: Repository) -> None:
        self._wrapped = repository

    async_ancestry = Passed(Repository, "_wrapped")
    ancestry_graph = Passed(Repository, "_wrapped")
    ancestry_graph_async = Passed(Repository, "_wrapped")
    attribution = Passed(Repository, "_wrapped")
    authorized_virtual_container_prefixes = Passed(Repository, "_wrapped")
    chunk_storage_stats = Passed(Repository, "_wrapped")
    chunk_storage_stats_async = Passed(Repository, "_wrapped")
    default_commit_metadata = Passed(Repository, "_wrapped")
    delete_branch = Passed(Repository, "_wrapped")
    delete_branch_async = Passed(Repository, "_wrapped")
    delete_tag = Passed(Repository, "_wrapped")
    delete_tag_async = Passed(Repository, "_wrapped")
    diff = Passed(Repository, "_wrapped")
    diff_async = Passed(Repository, "_wrapped")
    disabled_feature_flags = Passed(Repository, "_wrapped")
    disabled_feature_flags_async = Passed(Repository, "_wrapped")
    enabled_feature_flags = Passed(Repository, "_wrapped")
    enabled_feature_flags_async = Passed(Repository, "_wrapped")
    exists = Passed(Repository, "_wrapped")
    exists_async = Passed(Repository, "_wrapped")
    expire_snapshots = Passed(Repository, "_wrapped")
    expire_snapshots_async = Passed(Repository, "_wrapped")
    feature_flags = Passed(Repository, "_wrapped")
    feature_flags_async = Passed(Repository, "_wrapped")
    fetch_config = Passed(Repository, "_wrapped")
    fetch_config_async = Passed(Repository, "_wrapped")
    fetch_spec_version = Passed(Repository, "_wrapped")
    fetch_spec_version_async = Passed(Repository, "_wrapped")
    garbage_collect = Passed(Repository, "_wrapped")
    garbage_collect_async = Passed(Repository, "_wrapped")
    get_metadata = Passed(Repository, "_wrapped")
    get_metadata_async = Passed(Repository, "_wrapped")
    get_status = Passed(Repository, "_wrapped")
    get_status_async = Passed(Repository, "_wrapped")
    list_branches = Passed(Repository, "_wrapped")
    list_branches_async = Passed(Repository, "_wrapped")
    list_manifest_files = Passed(Repository, "_wrapped")
    list_manifest_files_async = Passed(Repository, "_wrapped")
    list_tags = Passed(Repository, "_wrapped")
    list_tags_async = Passed(Repository, "_wrapped")
    lookup_snapshot = Passed(Repository, "_wrapped")
    lookup_snapshot_async = Passed(Repository, "_wrapped")
    rewrite_manifests = Passed(Repository, "_wrapped")
    rewrite_manifests_async = Passed(Repository, "_wrapped")
    save_config = Passed(Repository, "_wrapped")
    save_config_async = Passed(Repository, "_wrapped")
    set_default_commit_metadata = Passed(Repository, "_wrapped")
    set_feature_flag = Passed(Repository, "_wrapped")
    set_feature_flag_async = Passed(Repository, "_wrapped")
    set_metadata = Passed(Repository, "_wrapped")
    set_metadata_async = Passed(Repository, "_wrapped")
    set_status = Passed(Repository, "_wrapped")
    set_status_async = Passed(Repository, "_wrapped")
    spec_version = Passed(Repository, "_wrapped")
    update_metadata = Passed(Repository, "_wrapped")
    update_metadata_async = Passed(Repository, "_wrapped")
    _repr_html_ = Passed(Repository, "_wrapped")

    # -- coming into being ---------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        storage: Storage,
        *,
        config: RepositoryConfig | None = None,
        authorize_virtual_chunk_access: _Access | None = None,
        spec_version: SpecVersion | int | None = None,
        check_clean_root: bool = True,
        attribution: Attribution | None = None,
    ) -> PyRepository:
        """`Repository.create`."""
        made = Repository.create(
            storage, config, authorize_virtual_chunk_access, spec_version, check_clean_root, attribution
        )
        return cls(made)

    @classmethod
    async def create_async(
        cls,
        storage: Storage,
        *,
        config: RepositoryConfig | None = None,
        authorize_virtual_chunk_access: _Access | None = None,
        spec_version: SpecVersion | int | None = None,
        check_clean_root: bool = True,
        attribution: Attribution | None = None,
    ) -> PyRepository:
        """`Repository.create_async`."""
        made = await Repository.create_async(
            storage, config, authorize_virtual_chunk_access, spec_version, check_clean_root, attribution
        )
        return cls(made)

    @classmethod
    def open(
        cls,
        storage: Storage,
        *,
        config: RepositoryConfig | None = None,
        authorize_virtual_chunk_access: _Access | None = None,
        attribution: Attribution | None = None,
    ) -> PyRepository:
        """`Repository.open`."""
        return cls(Repository.open(storage, config, authorize_virtual_chunk_access, attribution))

    @classmethod
    async def open_async(
        cls,
        storage: Storage,
        *,
        config: RepositoryConfig | None = None,
        authorize_virtual_chunk_access: _Access | None = None,
        attribution: Attribution | None = None,
    ) -> PyRepository:
        """`Repository.open_async`."""
        return cls(await Repository.open_async(storage, config, authorize_virtual_chunk_access, attribution))

    @classmethod
    def open_or_create(
        cls,
        storage: Storage,
        *,
        config: RepositoryConfig | None = None,
        authorize_virtual_chunk_access: _Access | None = None,
        create_version: SpecVersion | int | None = None,
        check_clean_root: bool = True,
        attribution: Attribution | None = None,
    ) -> PyRepository:
        """`Repository.open_or_create`."""
        found = Repository.open_or_create(
            storage, config, authorize_virtual_chunk_access, create_version, check_clean_root, attribution
        )
        return cls(found)

    @classmethod
    async def open_or_create_async(
        cls,
        storage: Storage,
        *,
        config: RepositoryConfig | None = None,
        authorize_virtual_chunk_access: _Access | None = None,
        create_version: SpecVersion | int | None = None,
        check_clean_root: bool = True,
        attribution: Attribution | None = None,
    ) -> PyRepository:
        """`Repository.open_or_create_async`."""
        found = await Repository.open_or_create_async(
            storage, config, authorize_virtual_chunk_access, create_version, check_clean_root, attribution
        )
        return cls(found)

    def reopen(
        self, *, config: RepositoryConfig | None = None, authorize_virtual_chunk_access: _Access | None = _KEPT
    ) -> PyRepository:
        """`Repository.reopen`; here None takes every authorisation away, and leaving it out keeps them."""
        return PyRepository(self._wrapped.reopen(config, _access(authorize_virtual_chunk_access)))

    async def reopen_async(
        self, *, config: RepositoryConfig | None = None, authorize_virtual_chunk_access: _Access | None = _KEPT
    ) -> PyRepository:
        """Asynchronous twin of `reopen`."""
        return PyRepository(await self._wrapped.reopen_async(config, _access(authorize_virtual_chunk_access)))

    @classmethod
    def from_bytes(cls, bytes: bytes) -> PyRepository:
        """The repository that `as_bytes` wrote. The bytes are a pickle: load only what you trust."""
        return cls(pickle.loads(bytes))

    def as_bytes(self) -> bytes:
        """Where the repository is and how it is opened, credentials included."""
        return pickle.dumps(self._wrapped)

    # -- what it is ----------------------------------------------------------------------------------------------

    def config(self) -> RepositoryConfig:
        """`Repository.config`."""
        return self._wrapped.config

    def storage(self) -> Storage:
        """`Repository.storage`."""
        return self._wrapped.storage

    def storage_settings(self) -> StorageSettings:
        """The storage settings in force: the configuration's, or the storage's own."""
        return self._wrapped.config.storage or self._wrapped.storage.default_settings()

    def async_ops_log(self) -> Any:
        """`Repository.ops_log_async`."""
        return self._wrapped.ops_log_async()

    def inspect_snapshot(self, snapshot_id: str, *, pretty: bool = True) -> str:
        """`Repository.inspect_snapshot` as JSON."""
        return _json(self._wrapped.inspect_snapshot(snapshot_id), pretty)

    async def inspect_snapshot_async(self, snapshot_id: str, *, pretty: bool = True) -> str:
        """`Repository.inspect_snapshot_async` as JSON."""
        return _json(await self._wrapped.inspect_snapshot_async(snapshot_id), pretty)

    def inspect_repo_info(self, *, pretty: bool = True) -> str:
        """`Repository.inspect_repo_info` as JSON."""
        return _json(self._wrapped.inspect_repo_info(), pretty)

    async def inspect_repo_info_async(self, *, pretty: bool = True) -> str:
        """`Repository.inspect_repo_info_async` as JSON."""
        return _json(await self._wrapped.inspect_repo_info_async(), pretty)

    def inspect_manifest(self, manifest_id: str, *, pretty: bool = True) -> str:
        """`Repository.inspect_manifest` as JSON."""
        return _json(self._wrapped.inspect_manifest(manifest_id), pretty)

    async def inspect_manifest_async(self, manifest_id: str, *, pretty: bool = True) -> str:
        """`Repository.inspect_manifest_async` as JSON."""
        return _json(await self._wrapped.inspect_manifest_async(manifest_id), pretty)

    def inspect_transaction_log(self, snapshot_id: str, *, pretty: bool = True) -> str:
        """`Repository.inspect_transaction_log` as JSON."""
        return _json(self._wrapped.inspect_transaction_log(snapshot_id), pretty)

    async def inspect_transaction_log_async(self, snapshot_id: str, *, pretty: bool = True) -> str:
        """`Repository.inspect_transaction_log_async` as JSON."""
        return _json(await self._wrapped.inspect_transaction_log_async(snapshot_id), pretty)

    # -- branches and tags ---------------------------------------------------------------------------------------

    def create_branch(self, branch_name: str, snapshot_id: str) -> None:
        """`Repository.create_branch`."""
        self._wrapped.create_branch(branch_name, snapshot_id)

    async def create_branch_async(self, branch_name: str, snapshot_id: str) -> None:
        """`Repository.create_branch_async`."""
        await self._wrapped.create_branch_async(branch_name, snapshot_id)

    def lookup_branch(self, branch_name: str) -> str:
        """`Repository.lookup_branch`."""
        return self._wrapped.lookup_branch(branch_name)

    async def lookup_branch_async(self, branch_name: str) -> str:
        """`Repository.lookup_branch_async`."""
        return await self._wrapped.lookup_branch_async(branch_name)

    def reset_branch(self, branch_name: str, to_snapshot_id: str, from_snapshot_id: str | None) -> None:
        """`Repository.reset_branch` with its arguments by position."""
        self._wrapped.reset_branch(branch_name, to_snapshot_id, from_snapshot_id=from_snapshot_id)

    async def reset_branch_async(self, branch_name: str, to_snapshot_id: str, from_snapshot_id: str | None) -> None:
        """`Repository.reset_branch_async` with its arguments by position."""
        await self._wrapped.reset_branch_async(branch_name, to_snapshot_id, from_snapshot_id=from_snapshot_id)

    def create_tag(self, tag_name: str, snapshot_id: str) -> None:
        """`Repository.create_tag`."""
        self._wrapped.create_tag(tag_name, snapshot_id)

    async def create_tag_async(self, tag_name: str, snapshot_id: str) -> None:
        """`Repository.create_tag_async`."""
        await self._wrapped.create_tag_async(tag_name, snapshot_id)

    def lookup_tag(self, tag: str) -> str:
        """`Repository.lookup_tag`."""
        return self._wrapped.lookup_tag(tag)

    async def lookup_tag_async(self, tag: str) -> str:
        """`Repository.lookup_tag_async`."""
        return await self._wrapped.lookup_tag_async(tag)

    # -- sessions ------------------------------------------------------------------------------------------------

    def readonly_session(
        self,
        *,
        branch: str | None = None,
        tag: str | None = None,
        snapshot_id: str | None = None,
        as_of: datetime | None = None,
    ) -> PySession:
        """`Repository.readonly_session`."""
        return PySession(self._wrapped.readonly_session(branch, tag=tag, snapshot_id=snapshot_id, as_of=as_of))

    async def readonly_session_async(
        self,
        *,
        branch: str | None = None,
        tag: str | None = None,
        snapshot_id: str | None = None,
        as_of: datetime | None = None,
    ) -> PySession:
        """`Repository.readonly_session_async`."""
        opened = await self._wrapped.readonly_session_async(branch, tag=tag, snapshot_id=snapshot_id, as_of=as_of)
        return PySession(opened)

    def writable_session(self, branch: str) -> PySession:
        """`Repository.writable_session`."""
        return PySession(self._wrapped.writable_session(branch))

    async def writable_session_async(self, branch: str) -> PySession:
        """`Repository.writable_session_async`."""
        return PySession(await self._wrapped.writable_session_async(branch))

    def rearrange_session(self, branch: str) -> PySession:
        """`Repository.rearrange_session`."""
        return PySession(self._wrapped.rearrange_session(branch))

    async def rearrange_session_async(self, branch: str) -> PySession:
        """`Repository.rearrange_session_async`."""
        return PySession(await self._wrapped.rearrange_session_async(branch))

    def __repr__(self) -> str:
        return repr(self._wrapped)


def _access(given: Any) -> _Access | None:
    if given is _KEPT:
        return None
    return {} if given is None else given


def _json(facts: Any, pretty: bool) -> str:
    return json.dumps(facts, indent=2 if pretty else None)
