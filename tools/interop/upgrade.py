"""Upgrade the repository of format 1 in a folder, with whichever library is installed.

``python -m tools.interop.upgrade PATH`` prints the kinds of its ops log afterwards, newest first, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

import icechunk

__all__ = ["upgrade"]


def upgrade(path: str) -> Any:
    """A dry run first, then the upgrade; the repository."""
    repo = icechunk.Repository.open(icechunk.local_filesystem_storage(path))
    icechunk.upgrade_icechunk_repository(repo, dry_run=True)
    return icechunk.upgrade_icechunk_repository(repo, dry_run=False)


def main(arguments: list[str]) -> None:
    warnings.simplefilter("ignore")
    print(json.dumps([type(update.kind).__name__ for update in upgrade(arguments[0]).ops_log()]))


if __name__ == "__main__":
    main(sys.argv[1:])
    # Not through the interpreter's end, where official libraries sometimes abort.
    sys.stdout.flush()
    os._exit(0)
