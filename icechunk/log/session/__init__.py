"""The session log: events, their fold, and the computation of commits, merges and diffs from it.

Pure: no I/O, no clock, no randomness.
"""
