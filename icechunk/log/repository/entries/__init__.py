"""The log layout: one new object per entry, checkpoints of the log in ``repo``, and files embedded in entries.

Not here: what another layout needs too (entries as bytes, single slots, ``repo`` itself), in `log.repository`.
"""
