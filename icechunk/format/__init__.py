"""Bytes of the published format to values and back: pure functions, no I/O, no clock, no randomness."""
