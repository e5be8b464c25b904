"""The ``repo`` object of format 2: refs, snapshots and the ops log, bytes to values and back.

Not here: the effect of an event on these values (`log.repository`), and how the object is replaced
(`log.repository.repo_object`).
"""
