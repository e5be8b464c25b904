"""The settings that a repository keeps: configuration, metadata, status, feature flags, and the layout of its log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from icechunk.config import config_to_dict
from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.log.repository.events import (
    ConfigReplaced,
    Event,
    FeatureFlagSet,
    MetadataReplaced,
    MetadataUpdated,
    StatusSet,
)
from icechunk.log.repository.port import Layout
from icechunk.ops import FeatureFlag, RepoStatus
from icechunk.repository.base import RepositoryBase
from icechunk.repository.views import feature_flag_id, feature_flags, repo_status
from icechunk.runtime.checks import json_metadata, require_type
from icechunk.runtime.twins import synchronous

__all__ = ["Configuration"]


class Configuration(RepositoryBase):
    """The methods for configuration, metadata, status, feature flags and layout."""

    async def save_config_async(self) -> None:
        """Persist the present configuration with the repository, for every client that opens it.

        Raises
        ------
        ConflictError
            Another client persisted another one since this repository was opened (kind ``config-updated``).
        """
        log = await self._core.log()
        config = config_to_dict(self._core.config)
        expected = self._core.persisted_config
        await log.append(lambda _: [ConfigReplaced(config=config, expected=expected, check=True)])
        self._core.persisted_config = config

    save_config: Final = synchronous(save_config_async)

    def set_default_commit_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Metadata of every commit of this object; values of the commit itself take precedence."""
        self._core.default_metadata = json_metadata("metadata", metadata)

    def default_commit_metadata(self) -> dict[str, Any]:
        """The metadata that `set_default_commit_metadata` set."""
        return dict(self._core.default_metadata)

    async def get_metadata_async(self) -> dict[str, Any]:
        """The repository's own metadata."""
        await self._require_format_2("read the repository's metadata")
        return dict((await self._core.state()).metadata)

    get_metadata: Final = synchronous(get_metadata_async)

    @property
    def metadata(self) -> dict[str, Any]:
        """The repository's own metadata, read now."""
        return self.get_metadata()

    async def set_metadata_async(self, metadata: Mapping[str, Any]) -> None:
        """Replace the repository's metadata as a whole. Raises `ReadOnlyError` where its status is read-only."""
        await self._happen(MetadataReplaced(metadata=json_metadata("metadata", metadata)))

    set_metadata: Final = synchronous(set_metadata_async)

    async def update_metadata_async(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Set some keys of the repository's metadata atomically, and return all of it."""
        wanted = json_metadata("metadata", metadata)
        log = await self._core.log()
        return dict((await log.append(lambda _: [MetadataUpdated(metadata=wanted)])).metadata)

    update_metadata: Final = synchronous(update_metadata_async)

    async def get_status_async(self) -> RepoStatus:
        """Whether the repository takes writes: its real status, which may differ from that in the checkpoint."""
        await self._require_format_2("read the repository's status")
        return repo_status((await self._core.state()).status)

    get_status: Final = synchronous(get_status_async)

    @property
    def status(self) -> RepoStatus:
        """The repository's status, read now."""
        return self.get_status()

    async def set_status_async(self, status: RepoStatus) -> None:
        """Make the repository read-only for all clients, or writable again."""
        require_type("status", status, RepoStatus)
        await self._happen(StatusSet(availability=int(status.availability), reason=status.limited_availability_reason))

    set_status: Final = synchronous(set_status_async)

    async def feature_flags_async(self) -> list[FeatureFlag]:
        """Every feature that can be switched, and how it is set."""
        await self._require_format_2("read feature flags")
        state = await self._core.state()
        return feature_flags(state.enabled_feature_flags or (), state.disabled_feature_flags or ())

    feature_flags: Final = synchronous(feature_flags_async)

    async def enabled_feature_flags_async(self) -> list[FeatureFlag]:
        """The features that are on."""
        return [flag for flag in await self.feature_flags_async() if flag.enabled]

    enabled_feature_flags: Final = synchronous(enabled_feature_flags_async)

    async def disabled_feature_flags_async(self) -> list[FeatureFlag]:
        """The features that are off."""
        return [flag for flag in await self.feature_flags_async() if not flag.enabled]

    disabled_feature_flags: Final = synchronous(disabled_feature_flags_async)

    async def set_feature_flag_async(self, name: str, setting: bool | None) -> None:
        """Switch a feature on or off, or back to its default (None).

        Raises
        ------
        InvalidInputError
            There is no feature with this name (kind ``invalid-feature-flag``).
        """
        require_type("setting", setting, bool, optional=True)
        await self._happen(FeatureFlagSet(flag=feature_flag_id(name), value=setting))

    set_feature_flag: Final = synchronous(set_feature_flag_async)

    async def convert_async(self, layout: Layout | str) -> None:
        """Persist the repository log in another layout from now on, in O(1) writes, also while others write.

        Parameters
        ----------
        layout
            ``"log"`` or ``"repo"``. Nothing happens where it is that already. Other objects open on the repository,
            in this process or others, of either library, are told to open it again when they write; none of their
            commits is lost.

        Raises
        ------
        InvalidInputError
            There is no such layout, or one of the two is format 1 (kind ``invalid-repository-migration``).
        ReadOnlyError
            The storage can only be read.
        CommitOutcomeUnknown, StorageError
            No certain answer; opening the repository finishes the conversion, and so does another call.
        """
        if layout not in tuple(Layout):
            raise InvalidInputError(
                f"cannot convert to layout {layout!r}: the layouts are {', '.join(map(repr, map(str, Layout)))}",
                ErrorKind.INVALID_SETTING,
            )
        await self._core.convert(Layout(layout))

    convert: Final = synchronous(convert_async)

    async def _happen(self, event: Event) -> None:
        await (await self._core.log()).append(lambda _: [event])
