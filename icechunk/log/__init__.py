"""The two logs of the engine: `session` (changes before a commit) and `repository` (the history of a repository).

Not here: the objects that use them, with their caches and requests (`session`, `repository`).
"""
