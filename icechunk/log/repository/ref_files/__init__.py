"""The ref-files layout: format 1, with one object per branch and tag, and the upgrade from it to format 2.

Not here: what happens to a repository after its upgrade (`log.repository.repo_object`).
"""
