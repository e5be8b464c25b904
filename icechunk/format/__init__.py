"""Bytes of the published format to values and back: pure functions, no I/O, no clock, no randomness.

Not here: which files a commit writes (`log.session.plan`), and stored forms that are our own (`log`).
"""
