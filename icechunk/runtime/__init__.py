"""Event loops, synchronous twins, tasks, the clock, checks and representations of values, pickles, logging.

Not here: anything that knows of Zarr (`store`), of the format (`format`), or of storage (`storage`).
"""
