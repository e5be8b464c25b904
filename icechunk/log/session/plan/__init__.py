"""The plan of a commit, from the fold of a session to files: which manifests are rewritten, and their contents."""
