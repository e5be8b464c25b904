"""``zarr.open("s3://bucket/prefix|icechunk:@tag.v1/path")``: the adapter that zarr finds by its entry point.

The contract is the one that zarr-python proposes for URL pipelines (module ``zarr.abc.url_pipeline``, entry points
``zarr.url_adapters``). Versions of zarr without it never load this module.
"""

from __future__ import annotations

from typing import Any

from zarr.abc.url_pipeline import AdapterResolution, URLPipelineAdapter

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.repository.by_url import Mode, session_at
from icechunk.storage.url import parse_url

__all__ = ["IcechunkAdapter"]

_MODES: dict[str | None, Mode] = {None: "r", "r": "r", "r+": "r+", "a": "a"}


class IcechunkAdapter(URLPipelineAdapter):  # type: ignore[misc]  # not in every zarr that we run with
    """Resolves the stage ``icechunk:`` of a URL pipeline to the store of a session.

    Writing modes give the store of a writable session: its changes are seen by others only once
    ``store.session.commit`` is called.
    """

    @classmethod
    async def open_pipeline_segment(cls, segment: Any, context: Any) -> AdapterResolution:
        """Open the repository to the left of the stage, at the version that the stage names.

        Raises
        ------
        InvalidInputError
            The URL is wrong, or ``mode`` is one that replaces existing nodes.
        """
        if context.mode not in _MODES:
            raise InvalidInputError(
                f"cannot open a repository in mode {context.mode!r}: the modes are 'r', 'r+' and 'a'",
                ErrorKind.INVALID_SETTING,
            )
        url = parse_url(f"{context.preceding_url}|{segment.raw}")
        mode = "r" if context.read_only else _MODES[context.mode]
        session = await session_at(url, mode, storage_options=context.storage_options)
        return AdapterResolution(store=session.store, path=url.path, zarr_format=3)
