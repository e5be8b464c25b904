"""The ``repo`` object of format 2: refs, snapshots and the ops log, bytes to values and back."""
