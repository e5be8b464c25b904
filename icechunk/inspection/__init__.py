"""What stands in a repository's files, as plain JSON values, and pictures of its history. Pure: no I/O.

`files` and `repo_info` describe single files in the structure that the official library prints. `layout` decides
where the snapshots and lines of a history go, `text_drawing` and `svg_drawing` draw that, and
`icechunk.inspection.drawing.AncestryGraph` is what users get.
"""

from __future__ import annotations
