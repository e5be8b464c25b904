"""``python -m tools.loadtest``: the same as the command ``icechunk-loadtest``."""

from __future__ import annotations

import sys

from icechunk.loadtest.cli import main

if __name__ == "__main__":
    sys.exit(main())
