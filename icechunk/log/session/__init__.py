"""The session log: events, their fold, and what commits, merges and diffs make of it.

Pure: no I/O, no clock, no randomness.
"""
