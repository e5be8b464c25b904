"""The appender: rows that arrive become commits, each row once, also after crashes.

`position` has the record of its sources in a commit, `target` the arrays that rows are appended to, `chunk_encoding`
the encoding of rows as chunks, and `appender` the times of commits and the solution of conflicts. Users get it by
`Repository.appender`. Not here: commits and rebases themselves (`session`).
"""

from __future__ import annotations

from icechunk.appender.appender import Appender, AppenderStats

__all__ = ["Appender", "AppenderStats"]
