"""``python -m icechunk.cli``: the `icechunk` command where no script is on PATH."""

from __future__ import annotations

import sys

from icechunk.cli import main

sys.exit(main())
