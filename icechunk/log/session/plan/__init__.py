"""The plan of a commit, from the fold of a session to files: which manifests are rewritten, and their contents.

Not here: the bytes of files (`format`), and writing them (`session.commit`).
"""
