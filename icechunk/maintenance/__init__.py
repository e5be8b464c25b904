"""Looking after a repository: expiration, collection of garbage, repacking, pruning of the log, storage statistics.

Not here: the public methods with their checks of arguments (`repository.maintenance`), and the rules of writing the log
(`log.repository`).
"""
