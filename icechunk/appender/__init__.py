"""The appender: rows that arrive become commits, each row once, whatever crashes in between.

`position` says what a commit records of its sources, `target` the arrays that rows are appended to, `chunk_encoding`
how rows become chunks, and `appender` when rows are committed and how conflicts are solved. Users get it by
`Repository.appender`. Not here: commits and rebases themselves (`session`).
"""

from __future__ import annotations

from icechunk.appender.appender import Appender, AppenderStats

__all__ = ["Appender", "AppenderStats"]
