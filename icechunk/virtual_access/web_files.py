"""Virtual chunks on web servers."""

from __future__ import annotations

from collections.abc import Mapping

from icechunk.config import StorageSettings
from icechunk.runtime.clock import Sources
from icechunk.storage.http.options import check_options, reader_maker
from icechunk.storage.port import GetResult, Range
from icechunk.virtual_access.locations import require_no_way_out

__all__ = ["WebFiles"]


class WebFiles:
    """Reads ranges of files by HTTP; the server must know ranges, since files may be large.

    Parameters
    ----------
    options
        Of the HTTP client, as `icechunk.http_storage` takes them.
    headers
        Sent with every request to the container's own server; a redirect to another one goes without them.
    settings
        Tries and timeouts.

    Raises
    ------
    InvalidInputError
        An option that is none.
    """

    def __init__(
        self,
        options: Mapping[str, str],
        headers: Mapping[str, str],
        settings: StorageSettings | None,
        sources: Sources,
    ) -> None:
        options = {name.lower(): value for name, value in options.items()}
        check_options(options)
        self._reader = reader_maker(options, headers, settings, sources, serves_ranges=True)()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._reader.aclose()

    async def get(self, location: str, wanted: Range) -> GetResult:
        """As `Reader.get`."""
        # The path as a server decodes it has to stay below the prefix too.
        require_no_way_out(location)
        return await self._reader.get(location, wanted)
