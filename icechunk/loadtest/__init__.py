"""The load test: how fast a store of chunks is, next to whatever else one could use, with every byte verified.

``icechunk-loadtest``, ``python -m icechunk.loadtest`` and, in a checkout, ``python -m tools.loadtest`` are the same
command; ``docs/loadtest.md`` tells how to use it.

It lives in the package, not in ``tools/``, so that a wheel has it and a console command can be installed. The two
helpers that it shares with the tests, `services` and `oracle`, are links to their files in ``tools/``, where they
must run without any dependency; a wheel contains copies.

How it works: `plan` turns the command line into a list of cases; `place` provides storage for them (MinIO, latency,
request counts); `runner` gives each case to worker processes (`worker`, which is also run by the official library's
interpreter) and gathers `results`; `report` draws them, and `thresholds` judges them.
"""

from __future__ import annotations
