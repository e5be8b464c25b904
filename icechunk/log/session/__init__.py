"""The session log: events, their fold, and the computation of commits, merges and diffs from it.

Pure: no I/O, no clock, no randomness. Not here: locks, requests and the state of a session (`session`), and the
segments of persisted sessions in storage (`transfer.segments`).
"""
