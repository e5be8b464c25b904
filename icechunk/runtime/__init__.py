"""The ground of the engine: event loops, synchronous twins, tasks, the clock, checks of values, logging.

Nothing here knows of Zarr, of the format, or of storage.
"""
