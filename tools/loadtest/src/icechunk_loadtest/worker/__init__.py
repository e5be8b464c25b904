"""The part of the load test that touches the systems under test; runs in a process of its own.

It is written once against the API that our library and the official one share, and must run where ``import icechunk``
finds either: it imports nothing of ours, only numpy, zarr and its own modules (relatively), because the runner starts
it from a folder where it is called ``loadtest_worker``.

The runner and a worker exchange JSON objects, one a line: see `serve`.
"""

from __future__ import annotations
