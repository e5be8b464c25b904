"""The contents of a repository's files as plain JSON values, and drawings of its history. Pure: no I/O.

`description` describes single files in the structure that the official library prints. `drawing` arranges the snapshots
and lines of a history and draws them as text or SVG; users get an `icechunk.inspection.drawing.AncestryGraph`. Not
here: fetching the files, and the methods that users call (`repository.inspection`).
"""

from __future__ import annotations
