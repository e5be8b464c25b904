"""``python -m tools.fuzz``: see `tools.fuzz.guided`."""

from __future__ import annotations

import sys

from tools.fuzz.guided import main

if __name__ == "__main__":
    sys.exit(main())
