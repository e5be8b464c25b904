"""The session log: events, their fold, and what commits, diffs and checkpoints make of it. No I/O at all."""
