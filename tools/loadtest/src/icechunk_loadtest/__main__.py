"""``python -m icechunk_loadtest``."""

from __future__ import annotations

import sys

from icechunk_loadtest.cli import main

if __name__ == "__main__":
    sys.exit(main())
