"""Snapshots and their nodes: bytes to values and back."""
