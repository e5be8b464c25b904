"""The appender: rows that arrive become commits, each row once, whatever crashes in between.

`position` says what a commit records of its sources, `target` the arrays that rows are appended to, and `appender` when
rows are committed and how conflicts are solved. Users get it by `Repository.appender`.
"""

from __future__ import annotations

from icechunk.appender.appender import Appender, AppenderStats

__all__ = ["Appender", "AppenderStats"]
