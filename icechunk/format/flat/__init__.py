"""FlatBuffers and FlexBuffers: single tables, and whole vectors of tables as numpy columns.

Not here: the tables of a certain file; each has a package or module of its own (`format.manifest`, `format.repo`,
`format.snapshot`, `format.transaction`).
"""
