"""The ``repo`` object of format 2: refs, snapshots and the ops log, bytes to values and back.

Not here: what an event does to these values (`log.repository`), and how the object is replaced
(`log.repository.repo_object`).
"""
