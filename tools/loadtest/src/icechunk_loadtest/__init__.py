"""The load test: how fast a store of chunks is, next to whatever else one could use, with every byte verified.

``icechunk-loadtest`` and ``python -m icechunk_loadtest`` are the same command; the manual is
``docs/loadtest.md``.

How it works: `plan` turns the command line into a list of cases; `place` provides storage for them (MinIO, latency,
request counts); `runner` gives each case to worker processes (`worker`, which is also run by the official library's
interpreter) and gathers `results`; `report` draws them, and `thresholds` judges them.

`services` and `oracle` need nothing but Python: the repository's tests and CI use them where nothing is installed.
"""

from __future__ import annotations
