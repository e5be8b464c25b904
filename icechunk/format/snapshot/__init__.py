"""Snapshots and their nodes: bytes to values and back.

Not here: changes to nodes (`log.session`), and the history of snapshots (`format.repo`).
"""
