"""Helpers for tests of this package and of what is built on it: contract suites, recording and faulty storages."""
