"""Changes of several sessions side by side: conflicts, merging of forks, differences between snapshots.

Not here: fetching the commits that are compared (`session.rebase`), and the public values (`conflicts`, `snapshots`).
"""
