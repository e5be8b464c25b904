"""The repo-object layout: format 2.1 as published, in which every change replaces the object ``repo``.

The log that such a repository was converted to, and the refs of format 1, are read through `client.Successors`. Not
here: the bytes of ``repo`` (`format.repo`), and what another layout needs too (`log.repository`).
"""
